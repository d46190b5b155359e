"""A gate for answers that cannot be samples of the problem at the temperature asked for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qbmscvi.exceptions import InvalidSamples
from qbmscvi.samplers._base import Draw, Sampler
from qbmscvi.samplers._composites import Composite, pass_on
from qbmscvi.samplers._gibbs import gibbs_sweeps
from qbmscvi.samplers._temperature import effective_beta, pseudo_likelihood_score

if TYPE_CHECKING:
    from torch import Tensor

    from qbmscvi.ising import SampleBatch
    from qbmscvi.samplers._base import SamplingRequest

_MAX_Z = 5.0  # a correct sampler is refused once in 10**6 answers
_N_SWEEPS = 5
_MAX_GROWTH = 2.0


class Vetted(Composite):
    r"""Refuse answers that are no samples of the problem at the temperature asked for.

    Two signs are looked at. The derivative of the log pseudo-likelihood must not place the samples, by more than five
    standard errors, beyond ``max_ratio`` times the inverse temperature asked for, nor below its ``max_ratio``-th part:
    ground states are infinitely cold, random states infinitely hot. And Gibbs sweeps at the temperature asked for,
    which leave Boltzmann samples as they are, must not double the effective number of distinct states
    :math:`1 / \sum_k f_k^2` (:math:`f_k`: shares of the states): repeated states fall apart. ``info`` has
    ``effective_beta`` and ``effective_share``, that number over the number of samples.

    Parameters
    ----------
    child
        The wrapped sampler.
    max_ratio
        Largest acceptable factor between the inverse temperature of the samples and the one asked for.
    """

    def __init__(self, child: Sampler, max_ratio: float = 4.0) -> None:
        super().__init__(child)
        if not max_ratio > 1:
            msg = f"max_ratio={max_ratio} must be above 1."
            raise ValueError(msg)
        self.max_ratio = max_ratio

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        asked = [replace(request, seed=seed) for request, seed in zip(requests, seeds, strict=True)]
        batches = self.child.sample_batch(asked)
        return [self._vet(request, batch) for request, batch in zip(asked, batches, strict=True)]

    def _vet(self, request: SamplingRequest, batch: SampleBatch) -> Draw:
        problem, beta = request.problem, request.beta
        highest, lowest = beta * self.max_ratio, beta / self.max_ratio
        is_cold = _z_score(pseudo_likelihood_score(problem, batch, highest), batch) > _MAX_Z
        is_hot = _z_score(pseudo_likelihood_score(problem, batch, lowest), batch) < -_MAX_Z
        if is_cold or is_hot:
            where = f"above {highest:.3g}, as ground states have" if is_cold else f"below {lowest:.3g}, as noise has"
            msg = (
                f"The answer of {self.child.name} has an inverse temperature {where}; {beta:.3g} was asked for. These "
                "are no Boltzmann samples of the problem: calibrate the sampler (`qbmscvi.samplers.Calibrated`), or "
                "choose another."
            )
            raise InvalidSamples(msg)
        n_distinct = _n_effective_states(batch.spins, batch.weights)
        generator = torch.Generator(device=problem.h.device).manual_seed(self._own_seed(request.seed))
        swept = gibbs_sweeps(problem, batch.spins.to(problem.h), _N_SWEEPS, beta, generator)
        n_swept = _n_effective_states(swept, batch.weights)
        if n_swept > _MAX_GROWTH * n_distinct:
            msg = (
                f"The answer of {self.child.name} repeats states: {batch.n_samples} samples are worth "
                f"{n_distinct:.0f}, and {n_swept:.0f} after {_N_SWEEPS} Gibbs sweeps. Ask the device for raw, not for "
                "sorted or best, samples."
            )
            raise InvalidSamples(msg)
        facts = {"effective_share": n_distinct / batch.n_samples}
        try:
            facts["effective_beta"] = effective_beta(problem, batch).value
        except ValueError:  # the problem is nearly flat: every temperature fits
            pass
        return pass_on(batch, **facts)


def _z_score(values: Tensor, batch: SampleBatch) -> float:
    """Mean over its standard error; infinite for equal values other than zero."""
    weights = torch.full_like(values, 1.0 / len(values)) if batch.weights is None else batch.weights.to(values)
    mean = weights @ values
    scale = (weights * (values - mean)).square().sum().sqrt()
    return math.inf * float(mean.sign()) if scale == 0 != mean else float(mean / scale) if scale > 0 else 0.0


def _n_effective_states(spins: Tensor, weights: Tensor | None) -> float:
    _, state = torch.unique(spins, dim=0, return_inverse=True)
    ones = torch.ones(len(spins), dtype=torch.float64) if weights is None else weights.double()
    shares = torch.zeros(len(spins), dtype=torch.float64, device=state.device).index_add_(
        0, state, ones.to(state.device)
    )
    shares = shares / shares.sum()
    return float(1.0 / shares.square().sum())
