"""Wrappers that change what a sampler is asked, or what is made of its answer.

Each wraps one sampler and is a sampler itself, so they nest. What they did is in ``info`` of the batch.

A usual stack around a device of fixed, roughly known temperature and limited ranges, from the inside out: ``Rescaled``
(fit the ranges), ``SpinReversed`` (average out its bias fields), ``Calibrated`` (find out and correct its temperature),
``Polished`` (repair what is left by a few Gibbs sweeps).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from qbmscvi.exceptions import InvalidSamples
from qbmscvi.samplers._base import Draw, Sampler, derive_seed
from qbmscvi.samplers._dimod import as_sampler
from qbmscvi.samplers._gibbs import gibbs_sweeps
from qbmscvi.samplers._temperature import effective_beta, fits_beta

if TYPE_CHECKING:
    from qbmscvi.ising import IsingModel, SampleBatch
    from qbmscvi.samplers._base import SamplerTraits, SamplingRequest

_OWN_FACTS = ("sampler", "seed", "beta", "seconds")


class Wrapper(Sampler):
    """Base of samplers that wrap another one.

    Parameters
    ----------
    child
        The wrapped sampler; a dimod sampler is taken as :class:`DimodSampler`.

    Raises
    ------
    TypeError
        If ``child`` is no sampler, or a class in place of an instance.
    """

    def __init__(self, child: Sampler) -> None:
        self.child = as_sampler(child)

    @property
    def traits(self) -> SamplerTraits:
        """Those of the child."""
        return self.child.traits

    @property
    def name(self) -> str:
        """Name for logs and provenance."""
        return f"{type(self).__name__}({self.child.name})"

    def cancel(self) -> None:
        """Let the child give up its question."""
        self.child.cancel()

    def state_dict(self) -> dict[str, Any]:
        """That of the child."""
        return {"child": self.child.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hand it to the child."""
        self.child.load_state_dict(state["child"])

    def check(self, problem: IsingModel) -> None:
        """Raise if the child cannot take the problem."""
        self.child.check(problem)

    def _own_seed(self, seed: int) -> int:
        """Seed of this wrapper, unlike that of the child and of other wrappers of its class."""
        depth, child = 0, self.child
        while isinstance(child, Wrapper):
            depth += type(child) is type(self)
            child = child.child
        return derive_seed(seed, f"{type(self).__name__} {depth}")

    def _sample(self, request: SamplingRequest, seed: int) -> Draw:
        return self._sample_batch([request], [seed])[0]


def pass_on(batch: SampleBatch, **facts: Any) -> Draw:
    """Hand a child's batch upwards, with further facts beside those that it reported."""
    inherited = {key: value for key, value in batch.info.items() if key not in _OWN_FACTS}
    return Draw(batch.spins, {**inherited, **facts})


class Rescaled(Wrapper):
    r"""Fit problems into the ranges and the precision of a device, and keep account of the temperature.

    The energy is multiplied by a scale :math:`c`; samples of the scaled problem at :math:`\beta / c` are those asked
    for. Nothing is clipped: a problem that does not fit is scaled down. On a device of fixed temperature
    (``device_beta``) the scale sets the temperature, :math:`c = \beta / \beta_\text{dev}`; where the ranges do not
    allow it the samples are hotter than asked for, and ``info["effective_beta"]`` says so.

    Parameters
    ----------
    child
        The wrapped sampler.
    h_limit, J_limit
        Largest absolute field and coupling that it takes; None for no limit.
    n_bits
        Signed precision of fields and couplings within the limits; None for no rounding.
    device_beta
        Inverse temperature of the device in its own units, if it cannot be chosen.
    """

    def __init__(
        self,
        child: Sampler,
        *,
        h_limit: float | None = None,
        J_limit: float | None = None,
        n_bits: int | None = None,
        device_beta: float | None = None,
    ) -> None:
        super().__init__(child)
        for name, value in (("h_limit", h_limit), ("J_limit", J_limit), ("device_beta", device_beta)):
            if value is not None and not value > 0:
                msg = f"{name}={value} must be positive, or None for none."
                raise ValueError(msg)
        if n_bits is not None and (n_bits < 2 or h_limit is None or J_limit is None):
            msg = f"n_bits={n_bits} needs at least 2 bits and both `h_limit` and `J_limit`, which set the step."
            raise ValueError(msg)
        self.h_limit, self.J_limit, self.n_bits, self.device_beta = h_limit, J_limit, n_bits, device_beta

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        fitted = [self._fit(request, seed) for request, seed in zip(requests, seeds, strict=True)]
        batches = self.child.sample_batch([request for request, _ in fitted])
        return [pass_on(batch, **facts) for batch, (_, facts) in zip(batches, fitted, strict=True)]

    def _fit(self, request: SamplingRequest, seed: int) -> tuple[SamplingRequest, dict[str, Any]]:
        problem = request.problem
        largest = [(problem.h, self.h_limit), (problem.J, self.J_limit)]
        room = [limit / float(values.abs().max()) for values, limit in largest if limit and values.any()]
        # Half a unit in the last place below, or the product may round to just above the limit.
        fills_range = min(room, default=1.0) * (1.0 - torch.finfo(problem.h.dtype).eps if room else 1.0)
        wanted = fills_range if self.device_beta is None else request.beta / self.device_beta
        scale = min(wanted, fills_range) if room else wanted
        child_beta = request.beta / scale if self.device_beta is None else self.device_beta
        scaled = problem.scaled(scale)
        facts = {"scale": scale, "effective_beta": child_beta * scale, "is_range_limited": scale < wanted}
        if self.n_bits is not None:
            levels = 2 ** (self.n_bits - 1) - 1
            h_step, J_step = self.h_limit / levels, self.J_limit / levels
            h_top, J_top = (limit * (1.0 - torch.finfo(scaled.h.dtype).eps) for limit in (self.h_limit, self.J_limit))
            rounded = replace(
                scaled,
                h=((scaled.h / h_step).round() * h_step).clamp(-h_top, h_top),
                J=((scaled.J / J_step).round() * J_step).clamp(-J_top, J_top),
            )
            error = torch.cat([rounded.h - scaled.h, rounded.J - scaled.J]) / scale
            facts["rounding_error"] = float(error.square().mean().sqrt())
            scaled = rounded
        return replace(request, problem=scaled, beta=child_beta, seed=seed), facts


class SpinReversed(Wrapper):
    """Average over random gauges, so that fields that a device adds to its spins cancel.

    Each gauge flips the sign convention of half the spins at random, in the problem and back in the answer; all gauges
    of a request travel in one trip.

    Parameters
    ----------
    child
        The wrapped sampler.
    n_gauges
        Gauges per request; the samples are shared out among them.
    """

    def __init__(self, child: Sampler, n_gauges: int = 4) -> None:
        super().__init__(child)
        if n_gauges < 1:
            msg = f"n_gauges={n_gauges} must be at least 1; 4 to 16 is usual."
            raise ValueError(msg)
        self.n_gauges = n_gauges

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        flipped, gauges = [], []
        for request, seed in zip(requests, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            rows = torch.tensor_split(torch.arange(request.n_samples), min(self.n_gauges, request.n_samples))
            for number, part in enumerate(rows):
                gauge = (2 * torch.randint(2, (request.problem.n_spins,), generator=generator) - 1).to(
                    request.problem.h.device, torch.int8
                )
                start = None if request.initial_spins is None else request.initial_spins[part] * gauge
                flipped.append(
                    replace(
                        request,
                        problem=request.problem.gauged(gauge),
                        n_samples=len(part),
                        initial_spins=start,
                        seed=int(torch.randint(2**31 - 1, (), generator=generator)),
                        request_id=request.request_id and f"{request.request_id}-gauge-{number}",
                    )
                )
                gauges.append(gauge)
        batches = self.child.sample_batch(flipped)
        draws, position = [], 0
        for request in requests:
            n_parts = min(self.n_gauges, request.n_samples)
            parts = list(zip(batches, gauges, strict=True))[position : position + n_parts]
            position += n_parts
            spins = torch.cat([batch.spins * gauge for batch, gauge in parts])
            facts = {"n_gauges": n_parts}
            if "device_seconds" in parts[0][0].info:
                facts["device_seconds"] = sum(batch.info["device_seconds"] for batch, _ in parts)
            if "chain_break_rate" in parts[0][0].info:
                broken = [batch.info["chain_break_rate"] * batch.n_samples for batch, _ in parts]
                facts["chain_break_rate"] = sum(broken) / request.n_samples
            draws.append(replace(pass_on(parts[0][0], **facts), spins=spins))
        return draws


class Calibrated(Wrapper):
    """Measure the temperature of every answer, and correct the next question by it.

    The child is taken to answer at ``gain * beta`` when asked for ``beta``. Each answer gives an estimate of the gain;
    a running mean of its logarithm corrects what the child is asked. ``info`` has ``effective_beta``,
    ``effective_beta_scale`` (its standard error) and ``gain``. Answers to a problem that is too flat to have a
    temperature, as at the beginning of training, are passed on without an estimate.

    Parameters
    ----------
    child
        The wrapped sampler.
    memory
        Weight of the past in the running mean, in ``[0, 1)``.
    """

    def __init__(self, child: Sampler, *, memory: float = 0.7) -> None:
        super().__init__(child)
        if not 0.0 <= memory < 1.0:
            msg = f"memory={memory} must be at least 0 and below 1."
            raise ValueError(msg)
        self.memory = memory
        self.log_gain: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The gain, which decides what the child is asked."""
        return {**super().state_dict(), "log_gain": self.log_gain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the gain."""
        super().load_state_dict(state)
        self.log_gain = state["log_gain"]

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        gain = 1.0 if self.log_gain is None else float(torch.tensor(self.log_gain).exp())
        asked = [
            replace(request, beta=request.beta / gain, seed=seed) for request, seed in zip(requests, seeds, strict=True)
        ]
        draws = []
        for request, question, batch in zip(requests, asked, self.child.sample_batch(asked), strict=True):
            try:
                estimate = effective_beta(request.problem, batch)
            except ValueError as error:
                if fits_beta(request.problem, batch, request.beta):
                    draws.append(pass_on(batch, gain=gain))
                    continue
                msg = f"The answer of {self.child.name} has no temperature: {error}"
                raise InvalidSamples(msg) from error
            # A device at the end of its range answers as hot as it can, which says nothing of its gain.
            if not batch.info.get("is_range_limited", False):
                observed = float(torch.tensor(estimate.value / question.beta).log())
                past = observed if self.log_gain is None else self.log_gain
                self.log_gain = self.memory * past + (1.0 - self.memory) * observed
            facts = {"effective_beta": estimate.value, "effective_beta_scale": estimate.scale, "gain": gain}
            draws.append(pass_on(batch, **facts))
        return draws


class Polished(Wrapper):
    """Run a few Gibbs sweeps at the requested temperature from the states of the answer.

    Sweeps leave the Boltzmann distribution alone and pull everything else towards it, fastest where single spins relax;
    shares of far-apart modes stay those of the child.

    Parameters
    ----------
    child
        The wrapped sampler.
    n_sweeps
        Gibbs sweeps.
    """

    def __init__(self, child: Sampler, n_sweeps: int = 10) -> None:
        super().__init__(child)
        if n_sweeps < 1:
            msg = f"n_sweeps={n_sweeps} must be at least 1."
            raise ValueError(msg)
        self.n_sweeps = n_sweeps

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        asked = [replace(request, seed=seed) for request, seed in zip(requests, seeds, strict=True)]
        draws = []
        for request, batch in zip(asked, self.child.sample_batch(asked), strict=True):
            problem = request.problem
            generator = torch.Generator(device=problem.h.device).manual_seed(self._own_seed(request.seed))
            spins = gibbs_sweeps(problem, batch.spins.to(problem.h), self.n_sweeps, request.beta, generator)
            draws.append(replace(pass_on(batch, n_polish_sweeps=self.n_sweeps), spins=spins))
        return draws
