"""When and how much the prior is sampled during training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qbmscvi.exceptions import require_integer

if TYPE_CHECKING:
    from qbmscvi.samplers import Sampler

_MAX_STALENESS = 500  # steps
_STEPS_BETWEEN_MOVES, _STEPS_BETWEEN_ANSWERS = 2, 8


@dataclass(frozen=True)
class SamplingSchedule:
    """When and how much the prior is sampled during training.

    Parameters
    ----------
    every_n_steps
        Optimizer steps between two requests to the sampler. None means two for a local sampler that continues chains,
        and eight otherwise. Between requests the moments of a local sampler stay the same; with a remote sampler, local
        chains renew them at every step.
    n_sweeps
        Sweeps of each persistent chain per renewal of the moments (the k of PCD-k). Raise it if the chains lag behind.
    burn_in
        Sweeps of the first request of a model, in which chains start from random spins.
    latency
        Steps between a request to a remote sampler and the use of its answer; a late answer is used at the next
        multiple. Training does not wait, except with zero, which waits for each answer. Local samplers answer at once.
    max_staleness
        Age in steps beyond which an answer of a remote sampler is not used. None means 500, or ``latency`` if that is
        more. A sampler with answers that take minutes (``traits.is_slow``) then has no limit, because its answers are
        always older.

    Raises
    ------
    TypeError, ValueError
        If a value is not an integer, or is below one (``latency``: below zero; ``max_staleness``: below ``latency``).
    """

    every_n_steps: int | None = None
    n_sweeps: int = 2
    burn_in: int = 100
    latency: int = 20
    max_staleness: int | None = None

    def __post_init__(self) -> None:
        least_values = dict.fromkeys(["n_sweeps", "burn_in"], 1) | {"latency": 0}
        optional = {"every_n_steps": 1, "max_staleness": self.latency}
        least_values |= {name: least for name, least in optional.items() if getattr(self, name) is not None}
        for name, least in least_values.items():
            require_integer(f"SamplingSchedule.{name}", getattr(self, name), least)

    def interval(self, sampler: Sampler) -> int:
        """Optimizer steps between two requests to this sampler."""
        if self.every_n_steps is not None:
            return self.every_n_steps
        traits = sampler.traits
        return _STEPS_BETWEEN_MOVES if traits.is_persistent and not traits.is_remote else _STEPS_BETWEEN_ANSWERS

    def oldest_answer(self, sampler: Sampler) -> float:
        """Age in steps beyond which an answer of this sampler is not used; may be infinite."""
        if self.max_staleness is not None:
            return self.max_staleness
        return math.inf if sampler.traits.is_slow else max(_MAX_STALENESS, self.latency)
