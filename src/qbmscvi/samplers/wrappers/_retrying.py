"""Repeated calls after failures of a sampler."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from qbmscvi.exceptions import BudgetExceeded, SamplerError
from qbmscvi.samplers.wrappers._wrapper import Wrapper, pass_on

if TYPE_CHECKING:
    from qbmscvi.samplers._contract import Draw, Sampler, SamplingRequest


class Retrying(Wrapper):
    """Repeat a call that failed, after growing pauses, unless it was canceled.

    Parameters
    ----------
    child
        The wrapped sampler.
    n_attempts
        Number of calls at most.
    pause
        Seconds before the second call; doubled before each later one.
    """

    def __init__(self, child: Sampler, n_attempts: int = 3, *, pause: float = 1.0) -> None:
        super().__init__(child)
        if n_attempts < 1 or pause < 0:
            msg = f"n_attempts={n_attempts} must be at least 1 and pause={pause} at least 0."
            raise ValueError(msg)
        self.n_attempts = n_attempts
        self.pause = pause
        self._n_canceled = 0

    def cancel(self) -> None:
        """Cancel the child's call, and do not repeat it."""
        self._n_canceled += 1
        super().cancel()

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        asked = [replace(request, seed=seed) for request, seed in zip(requests, seeds, strict=True)]
        n_canceled = self._n_canceled
        for attempt in count(1):
            try:
                return [pass_on(batch, n_attempts=attempt) for batch in self.child.sample_batch(asked)]
            except BudgetExceeded:
                raise
            except SamplerError:
                if attempt < self.n_attempts and self._n_canceled == n_canceled:
                    time.sleep(self.pause * 2.0 ** (attempt - 1))
                if attempt == self.n_attempts or self._n_canceled > n_canceled:
                    raise
        raise AssertionError  # the loop returns or raises
