"""Gibbs sweeps after the answers of a sampler."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qbmscvi.samplers.local._gibbs import gibbs_sweeps
from qbmscvi.samplers.wrappers._wrapper import Wrapper, pass_on

if TYPE_CHECKING:
    from qbmscvi.samplers._contract import Draw, Sampler, SamplingRequest


class Polished(Wrapper):
    """Run a few Gibbs sweeps at the requested temperature from the states of the answer.

    Sweeps leave the Boltzmann distribution invariant and bring other distributions closer to it, fastest where single
    spins relax. They do not change the child's shares of distant modes.

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
