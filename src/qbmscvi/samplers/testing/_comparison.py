"""Whether samples follow a Boltzmann distribution, by comparison with enumeration in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats

from qbmscvi.boltzmann.enumeration import all_states, exact_moments
from qbmscvi.samplers.testing._report import SamplerCheckError

if TYPE_CHECKING:
    from qbmscvi.boltzmann.ising import IsingModel, SampleBatch

ALPHA = 1e-4
MIN_SAMPLES = 100  # below, the normal approximation of the mean energy is not worth a p-value
_MAX_TABLE_SPINS = 12
# Least expected number of (effective) samples in a merged cell. At 10 the tail of Pearson's chi-square is right down to
# 1e-4 within a factor of 1.5 (simulated, 15 to 850 cells).
_MIN_EXPECTED = 10


@dataclass(frozen=True)
class Verdict:
    """Comparison of samples with a Boltzmann distribution.

    Parameters
    ----------
    moments
        p-value of the worst of all ``<s_i>`` and ``<s_i s_j>``, corrected for their number.
    energy
        p-value of the mean energy.
    cells
        p-value of the distribution over all states; None beyond 12 spins.
    worst_moment
        Name of the worst moment.
    distance
        Total variation distance between the samples and this distribution; None beyond 12 spins.
    distance_by_chance
        Mean distance of as many independent draws from the distribution itself.
    """

    moments: float
    energy: float
    cells: float | None
    worst_moment: str
    distance: float | None = None
    distance_by_chance: float | None = None

    @property
    def p_value(self) -> float:
        """Smallest of the p-values, corrected for their number."""
        p_values = [p for p in (self.moments, self.energy, self.cells) if p is not None]
        return min(1.0, len(p_values) * min(p_values))

    def __str__(self) -> str:
        cells = "" if self.cells is None else f", all states {self.cells:.1g}"
        distance = "" if self.distance is None else f"; distance {self.distance:.3f}, {self.distance_by_chance:.3f} due"
        return (
            f"p = {self.p_value:.1g} (moments {self.moments:.1g} at {self.worst_moment}, energy {self.energy:.1g}"
            f"{cells}{distance})"
        )


def compare_with_boltzmann(problem: IsingModel, batch: SampleBatch, beta: float) -> Verdict:
    r"""Compare samples with :math:`\exp(-\beta E)/Z`, taking them as independent.

    There are three tests. Every mean spin and every pair product is a binomial count with an exact two-sided p-value
    (Bonferroni over all :math:`n (n + 1) / 2`). The mean energy, sufficient for :math:`\beta`, has a z-score. Up to 12
    spins, Pearson's chi-square covers all states; the least likely states are merged until each cell expects 10
    samples.

    Parameters
    ----------
    problem
        Requested problem; enumerated, see :func:`~qbmscvi.boltzmann.enumeration.exact_moments`.
    batch
        Samples of it, spins of shape ``(n_samples, n_spins)``.
    beta
        Requested inverse temperature.

    Raises
    ------
    ValueError
        If there are fewer than 100 samples, or they have another number of spins than the problem.
    GraphMismatchError
        If the problem is too large to enumerate.
    """
    if batch.spins.shape[1:] != (problem.n_spins,):
        msg = f"The samples have shape {tuple(batch.spins.shape)}, the problem {problem.n_spins} spins."
        raise ValueError(msg)
    if batch.n_samples < MIN_SAMPLES:
        msg = f"A verdict needs at least {MIN_SAMPLES} samples, but there are {batch.n_samples}. Ask for more samples."
        raise ValueError(msg)
    problem = problem.to("cpu", torch.float64)
    energies = problem.energy(batch.spins.cpu().double()).numpy()
    spins = batch.spins.cpu().numpy().astype(np.int64)
    mean, second = (moment.numpy() for moment in exact_moments(problem, beta))
    p_moments, worst_moment = _compare_moments(spins, mean, second)

    i, j = problem.graph.edges.T
    mean_energy = float(problem.offset + problem.h.numpy() @ mean + problem.J.numpy() @ second[i, j])
    energy_scale = float(energies.std())
    p_cells = distance = by_chance = None
    if problem.n_spins <= _MAX_TABLE_SPINS:
        table_energies = problem.energy(all_states(problem.n_spins))
        probabilities = torch.softmax(-beta * table_energies, 0).numpy()
        energy_scale = math.sqrt(probabilities @ np.square(table_energies.numpy() - mean_energy))
        rows = ((spins + 1) // 2) @ (1 << np.arange(problem.n_spins - 1, -1, -1))  # row of `all_states`
        counts = np.bincount(rows, minlength=len(probabilities))
        p_cells = _compare_cells(counts, probabilities)
        distance = 0.5 * float(np.abs(counts / batch.n_samples - probabilities).sum())
        by_chance = _mean_distance(probabilities, batch.n_samples)
    p_energy = 1.0  # all samples at one energy: moments and cells judge
    if energy_scale > 0:
        z = (energies.mean() - mean_energy) / energy_scale * math.sqrt(batch.n_samples)
        p_energy = float(2.0 * stats.norm.sf(abs(z)))
    return Verdict(p_moments, p_energy, p_cells, worst_moment, distance, by_chance)


def assert_boltzmann(problem: IsingModel, batch: SampleBatch, beta: float, *, alpha: float = ALPHA) -> None:
    """Raise if samples do not follow the Boltzmann distribution of a problem.

    Parameters
    ----------
    problem, batch, beta
        As in :func:`compare_with_boltzmann`, which describes the tests.
    alpha
        Probability that correct samples fail, over all tests together.

    Raises
    ------
    SamplerCheckError
        If the p-value is below ``alpha``. It is an :class:`AssertionError`, too.
    ValueError, GraphMismatchError
        As :func:`compare_with_boltzmann`.
    """
    verdict = compare_with_boltzmann(problem, batch, beta)
    if verdict.p_value < alpha:
        msg = f"The samples do not follow the Boltzmann distribution at beta={beta:g}: {verdict}."
        raise SamplerCheckError(msg)


def _compare_moments(spins: np.ndarray, mean: np.ndarray, second: np.ndarray) -> tuple[float, str]:
    """Corrected p-value of the worst moment, and its name."""
    n_samples, n_spins = spins.shape
    i, j = np.triu_indices(n_spins, k=1)
    # One column per quantity: rates of up spins and of equal pairs.
    rates = np.clip(0.5 * (1.0 + np.concatenate([mean, second[i, j]])), 0.0, 1.0)
    hits = np.concatenate([spins > 0, spins[:, i] == spins[:, j]], axis=1).sum(0)
    # `scipy.stats.binomtest` takes one count at a time.
    tails = np.minimum(stats.binom.cdf(hits, n_samples, rates), stats.binom.sf(hits - 1, n_samples, rates))
    worst = int(tails.argmin())
    name = f"<s_{worst}>" if worst < n_spins else f"<s_{i[worst - n_spins]} s_{j[worst - n_spins]}>"
    return min(1.0, len(rates) * min(1.0, 2.0 * float(tails[worst]))), name


def _compare_cells(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of the distribution over states, rare ones merged into cells."""
    n_samples = counts.sum()
    cell, n_cells, filled = np.empty(len(probabilities), dtype=np.int64), 0, 0.0
    for state in np.argsort(probabilities, kind="stable"):
        cell[state] = n_cells
        filled += n_samples * probabilities[state]
        if filled >= _MIN_EXPECTED:
            n_cells, filled = n_cells + 1, 0.0
    cell = np.minimum(cell, n_cells - 1)  # the remainder joins the last cell, which holds the likeliest states
    if n_cells < 2:
        return 1.0
    due = n_samples * np.bincount(cell, probabilities, n_cells)
    return float(stats.chisquare(np.bincount(cell, counts, n_cells), due).pvalue)


def _mean_distance(probabilities: np.ndarray, n: int) -> float:
    """Mean total variation distance of ``n`` draws to their distribution (De Moivre, per cell)."""
    m = np.floor(n * probabilities) + 1.0
    return float((m * (1.0 - probabilities) * stats.binom.pmf(m, n, probabilities)).sum() / n)
