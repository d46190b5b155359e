"""Exact independent samples by enumeration, for small priors and for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qbmscvi.boltzmann.enumeration import MAX_ENUMERATED_SPINS, draw_exact, n_enumerated
from qbmscvi.exceptions import GraphMismatchError
from qbmscvi.samplers._contract import Draw, Sampler, SamplerTraits

if TYPE_CHECKING:
    from qbmscvi.boltzmann.ising import IsingModel
    from qbmscvi.samplers._contract import SamplingRequest


class ExactSampler(Sampler):
    """Draw exactly from the Boltzmann distribution, by enumerating all but the largest color class.

    It takes bipartite problems with at most 20 spins in the smaller layer, and complete ones with at most 21 spins.
    """

    traits = SamplerTraits(target="boltzmann", is_exact=True)

    def check(self, problem: IsingModel) -> None:
        """Raise :class:`~qbmscvi.exceptions.GraphMismatchError` if too many spins would have to be enumerated."""
        if n_enumerated(problem) > MAX_ENUMERATED_SPINS:
            msg = (
                f"ExactSampler would have to enumerate {n_enumerated(problem)} of the {problem.n_spins} spins, but at "
                f"most {MAX_ENUMERATED_SPINS} are feasible. Lower `n_latent`, or use sampler='gibbs'."
            )
            raise GraphMismatchError(msg)

    def _sample(self, request: SamplingRequest, seed: int) -> Draw:
        generator = torch.Generator().manual_seed(seed)
        return Draw(draw_exact(request.problem, request.n_samples, request.beta, generator))
