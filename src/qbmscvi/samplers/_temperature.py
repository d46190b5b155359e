r"""Estimates of the inverse temperature at which samples were really drawn.

Two estimators. **Maximum pseudo-likelihood** :cite:p:`Chatterjee07` maximizes
:math:`\sum_{r,i} \log p_\beta(s_{ri} \mid s_{r,\setminus i})`, concave in :math:`\beta`; it looks at single flips and
needs no other samples. **Energy matching** looks for the :math:`\beta` whose Gibbs sweeps, started from the samples,
leave their mean energy where it is; it sees collective structure, but samples whose moves are frozen hide from it.

Both give an interval; samples are treated as independent. Where the two disagree beyond their intervals the samples do
not come from a Boltzmann distribution of the problem at any temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from qbmscvi.samplers._gibbs import gibbs_sweeps

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from qbmscvi.ising import IsingModel, SampleBatch

_TWO_SIDED_95 = 1.96
_MAX_Z = 4.0
_N_BISECTIONS = 60


@dataclass(frozen=True)
class BetaEstimate:
    """Effective inverse temperature, in inverse units of the problem's energy.

    Parameters
    ----------
    value
        The estimate.
    scale
        Its standard error.
    method
        How it was obtained.
    """

    value: float
    scale: float
    method: str

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval."""
        return self.value - _TWO_SIDED_95 * self.scale, self.value + _TWO_SIDED_95 * self.scale


def effective_beta(
    problem: IsingModel,
    batch: SampleBatch,
    *,
    method: Literal["pseudo-likelihood", "energy"] = "pseudo-likelihood",
    bracket: tuple[float, float] = (1e-3, 1e3),
    seed: int = 0,
) -> BetaEstimate:
    """Estimate the inverse temperature at which samples were really drawn.

    Parameters
    ----------
    problem
        Problem as asked for, before any scaling to hardware ranges.
    batch
        Samples of it, spins of shape ``(n_samples, n_spins)``.
    method
        See the module's first lines.
    bracket
        Search interval.
    seed
        Seed of the sweeps of energy matching.

    Raises
    ------
    ValueError
        If the number of spins differs, the method is unknown, or there is no estimate inside ``bracket``: samples that
        are all local minima have an infinite one.
    """
    if batch.spins.shape[1] != problem.n_spins:
        msg = f"The samples have {batch.spins.shape[1]} spins, the problem {problem.n_spins}. Pass the right problem."
        raise ValueError(msg)
    if method == "pseudo-likelihood":
        return _pseudo_likelihood(problem, batch, bracket)
    if method == "energy":
        return _energy_matching(problem, batch, bracket, seed)
    msg = f"Unknown method {method!r}. Use 'pseudo-likelihood' or 'energy'."
    raise ValueError(msg)


def pseudo_likelihood_score(problem: IsingModel, batch: SampleBatch, beta: float) -> Tensor:
    """Derivative of the log pseudo-likelihood of each sample with respect to ``beta``, shape ``(n_samples,)``.

    Its mean is positive where the samples are colder than ``beta``.
    """
    return _score(_alignment(problem, batch), beta)


def fits_beta(problem: IsingModel, batch: SampleBatch, beta: float) -> bool:
    """Whether samples are within four standard errors of ``beta``, by the score of the pseudo-likelihood.

    Where the problem is too flat for their number to have a temperature, they fit whatever is asked for.
    """
    score = pseudo_likelihood_score(problem, batch, beta)
    return abs(float(score.sum())) <= _MAX_Z * float(score.norm())


def _alignment(problem: IsingModel, batch: SampleBatch) -> Tensor:
    """Energy of each spin in its field, :math:`s_i f_i`."""
    dense = problem.to("cpu", torch.float64).to_dense()
    spins = batch.spins.cpu().double()
    return spins * (dense.h + spins @ dense.couplings())


def _score(alignment: Tensor, beta: float) -> Tensor:
    return (-2.0 * alignment * torch.sigmoid(2.0 * beta * alignment)).sum(-1)


def _pseudo_likelihood(problem: IsingModel, batch: SampleBatch, bracket: tuple[float, float]) -> BetaEstimate:
    alignment = _alignment(problem, batch)
    beta = _bisect(lambda value: float(_score(alignment, value).mean()), bracket)
    p = torch.sigmoid(2.0 * beta * alignment)
    curvature = float((4.0 * alignment.square() * p * (1.0 - p)).sum())
    # Sandwich: flips within a sample are correlated, samples are not.
    return BetaEstimate(beta, float(_score(alignment, beta).norm()) / curvature, "pseudo-likelihood")


def _energy_matching(
    problem: IsingModel, batch: SampleBatch, bracket: tuple[float, float], seed: int, n_sweeps: int = 5
) -> BetaEstimate:
    spins = batch.spins.to(problem.h)

    def drift(beta: float) -> Tensor:
        """Energy change of each sample under Gibbs sweeps at ``beta``, same random numbers for every ``beta``."""
        generator = torch.Generator(device=problem.h.device).manual_seed(seed)
        after = gibbs_sweeps(problem, spins, n_sweeps, beta, generator)
        return (problem.energy(after) - problem.energy(spins)).cpu().double()

    beta = _bisect(lambda value: float(drift(value).mean()), bracket)
    change = drift(beta)
    # At the temperature of the samples, p K = p under sweeps K; its derivative says that the mean drift falls with beta
    # by Var(E) - Cov(E, E'), which is half the mean squared change of the energy, for any kernel.
    slope = 0.5 * float(change.square().sum())
    return BetaEstimate(beta, float((change - change.mean()).norm()) / slope, "energy")


def _bisect(decreasing: Callable[[float], float], bracket: tuple[float, float]) -> float:
    """Root of a decreasing function, on a logarithmic scale."""
    low, high = bracket
    if not 0.0 < low < high:
        msg = f"bracket={bracket} must be two positive numbers in increasing order."
        raise ValueError(msg)
    at_low, at_high = decreasing(low), decreasing(high)
    if not at_low > 0.0 > at_high:
        side = "above" if at_low > 0.0 else "below"
        msg = (
            f"No inverse temperature inside {bracket} fits the samples: the estimate lies {side} it. Samples that are "
            "all local minima have none; samples that look uniform, or of the opposite sign, have one at or below zero."
        )
        raise ValueError(msg)
    for _ in range(_N_BISECTIONS):
        middle = math.sqrt(low * high)
        if high / low < 1.0 + 1e-9:
            break
        if decreasing(middle) > 0.0:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)
