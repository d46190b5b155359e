"""The contract of every sampler.

A sampler answers each :class:`SamplingRequest` with a :class:`~qbmscvi.boltzmann.ising.SampleBatch`. The public methods
are final: they check the request, call the private hook, check the answer and compute the energies. So an
implementation only has to return spins. Its exceptions are raised as :class:`~qbmscvi.exceptions.SamplerError`.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from qbmscvi.boltzmann.ising import IsingModel, SampleBatch, are_spins
from qbmscvi.exceptions import GraphMismatchError, InvalidSamples, SamplerError, require_integer

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class SamplerTraits:
    r"""Properties of a sampler.

    Parameters
    ----------
    target
        Distribution of the samples in the limit of long runs: ``"boltzmann"`` for :math:`\exp(-\beta E)/Z`,
        ``"approximate"`` for a distribution near it, ``"ground_state"`` for an optimizer.
    is_exact
        Whether samples are independent and exactly distributed.
    is_persistent
        Whether the sampler continues chains from ``initial_spins`` of a request.
    is_remote
        Whether answers come from another machine, and so may be slow or fail.
    is_slow
        Whether answers take minutes, that is thousands of training steps.
    packs_problems
        Whether several small problems may be sent as one problem without couplings between them, to save trips.
    is_replay
        Whether answers come from a recording. They arrive at once, but are used after the latency of the schedule.
    max_spins
        Largest problem accepted, or None.
    """

    target: Literal["boltzmann", "approximate", "ground_state"] = "boltzmann"
    is_exact: bool = False
    is_persistent: bool = False
    is_remote: bool = False
    is_slow: bool = False
    is_replay: bool = False
    packs_problems: bool = False
    max_spins: int | None = None


@dataclass(frozen=True, eq=False)
class SamplingRequest:
    """One request to a sampler.

    Parameters
    ----------
    problem
        Problem to sample.
    n_samples
        Number of samples (chains).
    beta
        Requested inverse temperature, in inverse units of the energy of ``problem``.
    initial_spins
        Chain states to start from, shape ``(n_samples, n_spins)``; None for a fresh start.
    n_sweeps
        Sweeps per chain; None for the sampler's own number. Ignored by samplers without sweeps.
    seed
        Seed of the random numbers; None draws one from torch's global stream.
    purpose
        Name in logs, e.g. ``"negative_phase"``.
    request_id
        Id that stays the same when a restarted run repeats the request, so that a device can find the job.
    """

    problem: IsingModel
    n_samples: int
    beta: float = 1.0
    initial_spins: Tensor | None = None
    n_sweeps: int | None = None
    seed: int | None = None
    purpose: str = "samples"
    request_id: str | None = None

    def __post_init__(self) -> None:
        if not (self.beta > 0 and np.isfinite(self.beta)):
            msg = f"beta={self.beta} is not a positive finite number. Pass an inverse temperature above zero."
            raise ValueError(msg)
        require_integer("n_samples", self.n_samples, 1, "Ask for at least one sample.")
        if self.seed is not None:
            require_integer("seed", self.seed, 0, "Use None for one from torch's global stream.")
        if self.n_sweeps is not None:
            require_integer("n_sweeps", self.n_sweeps, 1, "Use None for the sampler's default.")
        expected = (self.n_samples, self.problem.n_spins)
        if self.initial_spins is not None and tuple(self.initial_spins.shape) != expected:
            msg = f"initial_spins has shape {tuple(self.initial_spins.shape)}; it must be {expected}."
            raise ValueError(msg)
        if self.initial_spins is not None and not are_spins(self.initial_spins):
            msg = "initial_spins has values other than -1 and +1. Convert bits with `qbmscvi.ising.bits_to_spins`."
            raise ValueError(msg)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings from which :meth:`from_state_dict` builds the request."""
        own = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        return {**own, "problem": self.problem.state_dict(), "initial_spins": self.initial_spins}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> SamplingRequest:
        """Build a request from :meth:`state_dict`."""
        return cls(**{**state, "problem": IsingModel.from_state_dict(state["problem"])})


_AMOUNTS = ("seconds", "device_seconds", "n_attempts")  # facts that are added up
_NUMBERS = (*_AMOUNTS, "effective_beta", "effective_share", "exchange_rate")  # facts that the package computes with
_PLAIN_FIELDS = ("n_samples", "beta", "n_sweeps", "seed", "purpose", "request_id")


@dataclass(frozen=True, eq=False)
class Draw:
    """Answer of a sampler's private hook: spins ``(n_samples, n_spins)`` and facts about the run.

    All rows have equal weight; a sampler of weighted samples has to resample them.
    """

    spins: Tensor
    info: dict[str, Any] = field(default_factory=dict)


class Sampler:
    """Source of samples of Ising problems.

    Subclasses set ``traits`` and implement ``_sample`` (or ``_sample_batch``, if the device takes several
    problems in one trip). They must not override :meth:`sample` and :meth:`sample_batch`.
    """

    traits = SamplerTraits()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        overridden = [name for name in ("sample", "sample_batch") if getattr(cls, name) is not getattr(Sampler, name)]
        if overridden:
            msg = f"{cls.__name__} overrides {overridden}, which are final. Implement `_sample` instead."
            raise TypeError(msg)

    def __init__(self) -> None:
        # Not in `__new__`: `help` and the site would show its arguments for every subclass.
        if type(self) is Sampler:
            msg = "Sampler is abstract. Build one of its subclasses, or write one that implements `_sample`."
            raise TypeError(msg)

    @property
    def name(self) -> str:
        """Name for logs and provenance."""
        return type(self).__name__

    def cancel(self) -> None:
        """Cancel the call under way, if that is possible; its answer is no longer needed."""

    def state_dict(self) -> dict[str, Any]:
        """State that answers depend on besides request and settings: plain values and tensors, for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state, so that the next answers are the same as they were after :meth:`state_dict`."""

    def check(self, problem: IsingModel) -> None:
        """Raise if this sampler cannot take a problem of this size and graph.

        Raises
        ------
        GraphMismatchError
            If the problem has more spins than the sampler accepts.
        """
        limit = self.traits.max_spins
        if limit is not None and problem.n_spins > limit:
            msg = (
                f"The problem has {problem.n_spins} spins, but {self.name} accepts at most {limit}. "
                "Lower `n_latent`, or choose a sampler without a size limit, e.g. sampler='gibbs'."
            )
            raise GraphMismatchError(msg)

    @final
    def sample(self, request: SamplingRequest) -> SampleBatch:
        """Answer one request; see :meth:`sample_batch`."""
        return self.sample_batch([request])[0]

    @final
    def sample_batch(self, requests: Sequence[SamplingRequest]) -> list[SampleBatch]:
        """Answer several requests in one trip.

        Returns
        -------
        One batch per request, in order, on the device of its problem.

        Raises
        ------
        GraphMismatchError
            If a problem does not fit the sampler.
        InvalidSamples
            If a problem is not finite, or the answer has the wrong shape or values other than -1 and +1.
        SamplerError
            If the sampler fails otherwise.
        """
        for request in requests:
            self.check(request.problem)
            if not request.problem.is_finite:
                msg = (
                    "The Ising problem has values that are not finite. Training has probably diverged: lower the "
                    "learning rate (`plan_kwargs={'lr': ...}`) and check the counts."
                )
                raise InvalidSamples(msg)
        seeds = [_resolve_seed(request.seed) for request in requests]
        started = time.perf_counter()
        try:
            draws = list(self._sample_batch(list(requests), seeds))
        except SamplerError:
            raise
        except Exception as error:
            msg = f"{self.name} failed: {type(error).__name__}: {error}"
            raise SamplerError(msg) from error
        seconds = time.perf_counter() - started
        if len(draws) != len(requests):
            msg = f"{self.name} answered {len(draws)} of {len(requests)} requests."
            raise InvalidSamples(msg)
        return [
            self._finish(request, draw, seed, seconds / len(requests))
            for request, draw, seed in zip(requests, draws, seeds, strict=True)
        ]

    def _finish(self, request: SamplingRequest, draw: Draw, seed: int, seconds: float) -> SampleBatch:
        problem = request.problem
        try:
            spins = torch.as_tensor(draw.spins)
            info = _with_numbers(dict(draw.info))
        except (AttributeError, TypeError, ValueError) as error:
            msg = f"{self.name} returned {type(draw).__name__}, which is not a Draw of spins and facts: {error}"
            raise InvalidSamples(msg) from error
        expected = (request.n_samples, problem.n_spins)
        if tuple(spins.shape) != expected:
            msg = f"{self.name} returned samples of shape {tuple(spins.shape)}; {expected} was requested."
            raise InvalidSamples(msg)
        if not are_spins(spins):
            msg = f"{self.name} returned values other than -1 and +1. Convert bits with `qbmscvi.ising.bits_to_spins`."
            raise InvalidSamples(msg)
        info = {"sampler": self.name, "seed": seed, "beta": request.beta, "seconds": seconds, **info}
        return SampleBatch(spins.to(torch.int8).to(problem.h.device), problem, info)

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        return [self._sample(request, seed) for request, seed in zip(requests, seeds, strict=True)]

    def _sample(self, request: SamplingRequest, seed: int) -> Draw:
        """Draw the samples of one request."""
        msg = f"{self.name} implements neither `_sample` nor `_sample_batch`."
        raise NotImplementedError(msg)

    def __repr__(self) -> str:
        return f"{self.name}()"


def derive_seed(seed: int, purpose: str) -> int:
    """Seed whose random numbers are independent of those of ``seed`` and of other purposes."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:4], "little") % 2**31


def _with_numbers(info: dict[str, Any]) -> dict[str, Any]:
    """Facts with valid numbers; facts that are None are unknown and left out."""
    numbers = {key: info.pop(key) for key in _NUMBERS if key in info}
    numbers = {key: float(value) for key, value in numbers.items() if value is not None}
    for key in _AMOUNTS:
        if not numbers.get(key, 0.0) >= 0.0:
            msg = f"info[{key!r}]={numbers[key]} is not an amount. Report a number of at least 0, or leave it out."
            raise ValueError(msg)
    return {**info, **numbers}


def _resolve_seed(seed: int | None) -> int:
    return int(torch.randint(2**31 - 1, ())) if seed is None else int(seed)
