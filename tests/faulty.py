"""Samplers that fail in every way we could think of, and what tells honest moments from others."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from oracles import Distribution, state_table

from qbmscvi.exceptions import SamplerTimeout
from qbmscvi.samplers import Draw, ExactSampler, Sampler

if TYPE_CHECKING:
    from collections.abc import Callable


class Fault(NamedTuple):
    """What is made of an honest draw, ``spoil(sampler, request, draw)``, and words of the warning it must cause."""

    spoil: Callable
    words: str


def _raise(error):
    raise error


def ground_states(problem, n_samples: int) -> torch.Tensor:
    """The lowest state, ``n_samples`` times."""
    states = torch.from_numpy(state_table(problem.n_spins)).to(torch.int8)
    return states[problem.energy(states).argmin()].repeat(n_samples, 1)


def _noise(sampler, request, draw):
    generator = torch.Generator().manual_seed(request.seed)
    return Draw(2 * torch.randint(2, draw.spins.shape, generator=generator) - 1)


def _few_states(sampler, request, draw):
    return Draw(draw.spins[:4].repeat(len(draw.spins) // 4 + 1, 1)[: len(draw.spins)])


FAULTS = {
    "timeout": Fault(lambda s, r, d: _raise(SamplerTimeout("no answer after 60 s")), "no answer after 60 s"),
    "any-exception": Fault(lambda s, r, d: _raise(RuntimeError("lost link")), "RuntimeError: lost link"),
    "no-answer": Fault(lambda s, r, d: None, "not a Draw of spins"),
    "text": Fault(lambda s, r, d: Draw("up up down"), "not a Draw of spins"),
    "facts-in-words": Fault(lambda s, r, d: replace(d, info={"device_seconds": "12 ms"}), "Draw of spins and facts"),
    "facts-below-zero": Fault(lambda s, r, d: replace(d, info={"device_seconds": -1.0}), "is not an amount"),
    "empty": Fault(lambda s, r, d: Draw(d.spins[:0]), r"returned samples of shape \(0, 8\)"),
    "one-sample-less": Fault(lambda s, r, d: Draw(d.spins[:-1]), r"returned samples of shape \(511, 8\)"),
    "one-spin-less": Fault(lambda s, r, d: Draw(d.spins[:, :-1]), r"returned samples of shape \(512, 7\)"),
    "bits": Fault(lambda s, r, d: Draw((d.spins + 1) / 2), r"values other than -1 and \+1"),
    "nan": Fault(lambda s, r, d: Draw(d.spins * float("nan")), r"values other than -1 and \+1"),
    "ground-states": Fault(lambda s, r, d: Draw(ground_states(r.problem, len(d.spins))), "as ground states have"),
    "noise": Fault(_noise, "as noise has"),
    "few-states": Fault(_few_states, "repeats states"),
}


class Faulty(Sampler):
    """Draws of another sampler, spoiled at the calls for which ``is_due(number of the call)`` holds."""

    def __init__(self, spoil, is_due=lambda call: call % 2 == 1, child=None, **traits) -> None:
        self.spoil, self.is_due, self.n_calls = spoil, is_due, 0
        self.child = ExactSampler() if child is None else child
        self.traits = replace(self.child.traits, **traits)

    def _sample(self, request, seed):
        self.n_calls += 1
        request = replace(request, seed=seed)
        draw = Draw(self.child.sample(request).spins)
        return self.spoil(self, request, draw) if self.is_due(self.n_calls - 1) else draw


class Pace(Callback):
    """Lets no step begin before the sampler's thread has answered, so that runs depend on seeds alone."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        wait_for_answer(pl_module)


def wait_for_answer(pl_module) -> None:
    """Until the thread of the trip under way ends; its future is not part of the broker's public face."""
    trip = pl_module.sampling.broker._trip
    if trip is not None:
        trip.future.exception(timeout=60.0)


def moment_z_scores(prior, mean: torch.Tensor, edge_mean: torch.Tensor, n_samples: int) -> np.ndarray:
    """Deviations of spin means and edge means from their exact values, in exact standard errors."""
    distribution = Distribution.boltzmann(prior.to_ising())
    i, j = prior.graph.edges.T
    exact = np.concatenate([distribution.mean, distribution.second[i, j]])
    return (torch.cat([mean, edge_mean]).double().numpy() - exact) / np.sqrt((1.0 - exact**2) / n_samples)


class Honesty(Callback):
    """Largest deviation of the moments that the loss saw from the exact ones of its prior, every so many steps."""

    def __init__(self, every_n_steps: int = 1) -> None:
        self.every_n_steps = every_n_steps
        self.worst: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if (trainer.global_step + 1) % self.every_n_steps:
            return
        prior = pl_module.module.prior
        n_samples = len(prior.chains) - len(prior.tracking_log_weights)
        with torch.no_grad():
            z = moment_z_scores(prior, prior.spin_mean, prior.edge_mean, n_samples)
        self.worst.append(float(np.abs(z).max()))


class SteppedDevice(Faulty):
    """A remote device whose jobs take steps of training and not seconds: ``latencies`` in turn, in steps.

    Its clock is :meth:`advance`; a latency of None is a job that never ends, unless it is cancelled.
    """

    def __init__(self, spoil, is_due, latencies, **kwargs) -> None:
        super().__init__(spoil, is_due, is_remote=True, **kwargs)
        self.latencies = iter(latencies)
        self.step, self.n_cancelled = 0, 0
        self.ready_at: dict[str, float] = {}
        self.clock = threading.Condition()

    def _sample(self, request, seed):
        with self.clock:
            latency, n_cancelled = next(self.latencies), self.n_cancelled
            ready_at = math.inf if latency is None else self.asked_at(request) + latency
            self.ready_at[request.request_id] = ready_at
            self.clock.notify_all()
            self.clock.wait_for(lambda: self.step >= ready_at or self.n_cancelled > n_cancelled, timeout=600.0)
            if self.n_cancelled > n_cancelled:
                raise SamplerTimeout("cancelled")
        return super()._sample(request, seed)

    @staticmethod
    def asked_at(request) -> int:
        """Step of a request, from its name."""
        return int(request.request_id.split("-")[2])

    def is_ready(self, request) -> bool:
        """Whether the job is done, or will be in no time."""
        with self.clock:
            self.clock.wait_for(lambda: request.request_id in self.ready_at, timeout=60.0)
            return self.step >= self.ready_at[request.request_id]

    def advance(self, step: int) -> None:
        with self.clock:
            self.step = step
            self.clock.notify_all()

    def cancel(self) -> None:
        with self.clock:
            self.n_cancelled += 1
            self.clock.notify_all()


class SteppedClock(Callback):
    """Moves the time of a device by a step; lets no step begin before an answer that is ready is there."""

    def __init__(self, device) -> None:
        self.device, self.n_cancelled = device, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.device.advance(trainer.global_step)
        trip = pl_module.sampling.broker._trip
        was_cancelled, self.n_cancelled = self.device.n_cancelled > self.n_cancelled, self.device.n_cancelled
        if trip is not None and (was_cancelled or self.device.is_ready(trip.requests[0])):
            wait_for_answer(pl_module)
