"""Estimate of the effective inverse temperature of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from qbmscvi.boltzmann.ising import IsingModel, SampleBatch

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
    """

    value: float
    scale: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval."""
        return self.value - _TWO_SIDED_95 * self.scale, self.value + _TWO_SIDED_95 * self.scale


def effective_beta(
    problem: IsingModel, batch: SampleBatch, *, bracket: tuple[float, float] = (1e-3, 1e3)
) -> BetaEstimate:
    r"""Estimate the inverse temperature at which samples were really drawn.

    Maximizes the pseudo-likelihood :math:`\sum_{r,i} \log p_\beta(s_{ri} \mid s_{r,\setminus i})` over
    :math:`\beta`, in which it is concave :cite:p:`Chatterjee07`. Samples are treated as independent.

    Parameters
    ----------
    problem
        Requested problem, before any scaling to hardware ranges.
    batch
        Samples of it, spins of shape ``(n_samples, n_spins)``.

    bracket
        Search interval.

    Raises
    ------
    ValueError
        If the number of spins differs, or no estimate lies inside ``bracket``. For samples that are all local minima
        the estimate is infinite.
    """
    if batch.spins.shape[1] != problem.n_spins:
        msg = f"The samples have {batch.spins.shape[1]} spins, the problem {problem.n_spins}. Pass the right problem."
        raise ValueError(msg)
    alignment = _alignment(problem, batch)
    beta = _bisect(lambda value: float(_score(alignment, value).mean()), bracket)
    p = torch.sigmoid(2.0 * beta * alignment)
    curvature = float((4.0 * alignment.square() * p * (1.0 - p)).sum())
    # Sandwich estimate: flips within a sample are correlated, samples are not.
    return BetaEstimate(beta, float(_score(alignment, beta).norm()) / curvature)


def pseudo_likelihood_score(problem: IsingModel, batch: SampleBatch, beta: float) -> Tensor:
    """Derivative of the log pseudo-likelihood of each sample with respect to ``beta``, shape ``(n_samples,)``.

    Its mean is positive where the samples are colder than ``beta``.
    """
    return _score(_alignment(problem, batch), beta)


def fits_beta(problem: IsingModel, batch: SampleBatch, beta: float) -> bool:
    """Whether samples are within four standard errors of ``beta``, by the score of the pseudo-likelihood.

    If the problem is too flat to show a temperature with this number of samples, every ``beta`` fits.
    """
    score = pseudo_likelihood_score(problem, batch, beta)
    return abs(float(score.sum())) <= _MAX_Z * float(score.norm())


def _alignment(problem: IsingModel, batch: SampleBatch) -> Tensor:
    """Energy of each spin in its field, :math:`s_i f_i`."""
    problem = problem.to("cpu", torch.float64)
    spins = batch.spins.cpu().double()
    return spins * (problem.h + spins @ problem.couplings())


def _score(alignment: Tensor, beta: float) -> Tensor:
    return (-2.0 * alignment * torch.sigmoid(2.0 * beta * alignment)).sum(-1)


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
