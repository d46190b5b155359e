"""Another try when a sampler fails."""

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
    """Ask again when the child fails, with growing pauses; not a request that was canceled.

    Parameters
    ----------
    child
        The wrapped sampler.
    n_attempts
        Calls in all.
    pause
        Seconds before the second call; doubled before each further one.
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
        """Let the child give up its question, and do not ask it again."""
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
