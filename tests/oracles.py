r"""Oracles and gates shared by the tests of spins, samplers and log Z.

Nothing here calls :mod:`qbmscvi.boltzmann.enumeration` or :meth:`qbmscvi.boltzmann.ising.IsingModel.energy`: energies,
log Z, probabilities and the distributions of Markov chains of finite length are written out anew, over all states, in
numpy and float64.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import networkx as nx
import numpy as np
import torch
from scipy import special, stats

from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.ising import IsingModel

ALPHA = 1e-4
_MIN_EXPECTED = 5


def random_problem(graph, seed=0, scale=0.5, dtype=torch.float64, offset=0.37) -> IsingModel:
    """Gaussian fields and couplings of standard deviation ``scale``."""
    rng = np.random.default_rng(seed)
    h, J = (torch.tensor(scale * rng.normal(size=n), dtype=dtype) for n in (graph.n_nodes, graph.n_edges))
    return IsingModel(h, J, graph, offset)


def scrambled_bipartite(n_left=3, n_right=5, seed=3) -> graphs.Graph:
    """Complete bipartite graph whose layers are interleaved, so that no color class is a range of nodes."""
    names = np.random.default_rng(seed).permutation(n_left + n_right).tolist()
    left, right = names[:n_left], names[n_left:]
    return graphs.Graph(n_left + n_right, np.array(list(itertools.product(left, right))), "scrambled")


def ring(n_nodes: int) -> graphs.Graph:
    return graphs.from_networkx(nx.cycle_graph(n_nodes), "ring")


# The three kinds of problem a sampler has to manage: a restricted Boltzmann machine, a general one, a hardware patch.
PROBLEMS = {
    "bipartite-3x5": lambda **kw: random_problem(scrambled_bipartite(), seed=33, **kw),
    "complete-6": lambda **kw: random_problem(graphs.complete(6), seed=20, **kw),
    "chimera-12": lambda **kw: random_problem(graphs.hardware("chimera", 12), seed=25, **kw),
}


def state_table(n_spins: int) -> np.ndarray:
    """All states, shape ``(2**n_spins, n_spins)``; row number = bits read as a binary number, first spin highest."""
    return np.array(list(itertools.product((-1, 1), repeat=n_spins)))


def energy_table(problem: IsingModel) -> np.ndarray:
    """Energies of :func:`state_table`, from the definition."""
    s = state_table(problem.n_spins).astype(float)
    energy = float(problem.offset) + s @ problem.h.double().numpy()
    for (i, j), value in zip(problem.graph.edges, problem.J.double().numpy(), strict=True):
        energy += value * s[:, i] * s[:, j]
    return energy


@dataclass(frozen=True)
class Distribution:
    """A distribution over :func:`state_table`, with the energies of the problem it belongs to."""

    states: np.ndarray
    energies: np.ndarray
    probabilities: np.ndarray
    log_z: float = math.nan

    @classmethod
    def boltzmann(cls, problem: IsingModel, beta: float = 1.0) -> Distribution:
        energies = energy_table(problem)
        log_z = float(special.logsumexp(-beta * energies))
        return cls(state_table(problem.n_spins), energies, np.exp(-beta * energies - log_z), log_z)

    @property
    def mean(self) -> np.ndarray:
        return self.probabilities @ self.states

    @property
    def second(self) -> np.ndarray:
        return self.states.T @ (self.probabilities[:, None] * self.states)

    def distance(self, other: Distribution) -> float:
        """Total variation distance."""
        return 0.5 * float(np.abs(self.probabilities - other.probabilities).sum())

    def draw(self, n_samples: int, seed: int) -> torch.Tensor:
        """Independent draws by numpy, int8."""
        index = np.random.default_rng(seed).choice(len(self.states), size=n_samples, p=self.probabilities)
        return torch.from_numpy(self.states[index].astype(np.int8))


def set_exact_moments(prior) -> None:
    """Give a prior the exact moments of its spins, as a sampler without sampling error would."""
    distribution = Distribution.boltzmann(prior.to_ising())
    i, j = prior.graph.edges.T
    with torch.no_grad():
        prior.spin_mean.copy_(torch.from_numpy(distribution.mean))
        prior.edge_mean.copy_(torch.from_numpy(distribution.second[i, j]))
        prior.n_updates.add_(1)


# Chains of finite length -------------------------------------------------------------------------------------------


def _start(problem: IsingModel, start: np.ndarray | None) -> np.ndarray:
    """Distribution of the start as a tensor with one axis per spin: one state, or uniform."""
    shape = (2,) * problem.n_spins
    if start is None:
        return np.full(shape, 0.5**problem.n_spins)
    distribution = np.zeros(shape)
    distribution[tuple((np.asarray(start) + 1) // 2)] = 1.0
    return distribution


def _as_distribution(problem: IsingModel, tensor: np.ndarray) -> Distribution:
    return Distribution(state_table(problem.n_spins), energy_table(problem), tensor.ravel())


def block_gibbs_distribution(
    problem: IsingModel, beta: float, n_sweeps: int, start: np.ndarray | None = None
) -> Distribution:
    """Exact distribution after block Gibbs sweeps, from a state or from uniform spins.

    Color class after color class, spin by spin (spins of a class do not feel each other).
    """
    n, distribution = problem.n_spins, _start(problem, start)
    axis = np.array([-1.0, 1.0])
    spins = [axis.reshape([-1 if k == i else 1 for k in range(n)]) for i in range(n)]
    h, J = problem.h.double().numpy(), problem.J.double().numpy()
    neighbors = [[] for _ in range(n)]
    for (a, b), value in zip(problem.graph.edges, J, strict=True):
        neighbors[a].append((b, value))
        neighbors[b].append((a, value))
    field = [h[i] + sum((value * spins[k] for k, value in neighbors[i]), start=np.zeros((1,) * n)) for i in range(n)]
    up = [special.expit(-2.0 * beta * fields) for fields in field]
    heat_bath = [np.concatenate([1.0 - u, u], axis=i) for i, u in enumerate(up)]
    for _ in range(n_sweeps):
        for i in np.concatenate(problem.graph.color_classes):
            distribution = distribution.sum(i, keepdims=True) * heat_bath[i]
    return _as_distribution(problem, distribution)


def random_scan_distribution(problem: IsingModel, betas: np.ndarray, start: np.ndarray | None = None) -> Distribution:
    """Exact distribution after heat-bath sweeps, one per value of ``betas``, of ``n_spins`` updates of random spins."""
    n = problem.n_spins
    distribution = _start(problem, start)
    energies = energy_table(problem).reshape(distribution.shape)
    before = None
    for beta in betas:
        if beta != before:
            weight = np.exp(-beta * (energies - energies.min()))
            heat_bath = [weight / weight.sum(i, keepdims=True) / n for i in range(n)]
            before = beta
        for _ in range(n):
            distribution = sum(distribution.sum(i, keepdims=True) * heat_bath[i] for i in range(n))
    return _as_distribution(problem, distribution)


# The gate ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """p-values of :func:`judge`, each already corrected for the tests it is the smallest of."""

    cells: float
    moments: float
    energy: float
    n_cells: int
    worst_moment: str

    @property
    def p_value(self) -> float:
        return min(1.0, 3.0 * min(self.cells, self.moments, self.energy))


def judge(spins: torch.Tensor, distribution: Distribution) -> Verdict:
    r"""Test independent draws against a distribution.

    The rows must be independent: one chain each, so that the effective sample size is the number of rows whatever
    the autocorrelation within a chain. Whether chains are long enough for the stationary distribution is no
    matter of statistics here: :func:`block_gibbs_distribution` and :func:`random_scan_distribution` say it exactly.
    Three tests, Bonferroni over the three:

    - cells: Pearson's chi-square over all states, merged from the least likely up until each cell expects at
      least 5;
    - moments: every mean spin and every pair product is a binomial count, so its two-sided p-value is exact;
      Bonferroni over all :math:`n (n + 1) / 2` of them;
    - energy: z-score of the mean energy, with its exact standard error. It is the sufficient statistic of beta.

    At :math:`\alpha = 10^{-4}` a case of a correct sampler fails once in 10,000 seeds, so a hundred cases raise a
    false alarm in one suite of a hundred. (Measured on exact draws, p-values below 3e-4 come up to twice too often
    where many cells expect just five.) What the gate detects is tested too, in ``test_samplers.py``.
    """
    n = len(spins)
    rows = spins.numpy().astype(np.int64)
    n_spins = rows.shape[1]

    code = ((rows + 1) // 2) @ (1 << np.arange(n_spins - 1, -1, -1))
    cells, n_cells = _merged_chi_square(
        np.bincount(code, minlength=len(distribution.states)), n * distribution.probabilities
    )

    i, j = np.triu_indices(n_spins, k=1)
    ups = np.concatenate([(rows > 0).sum(0), (rows[:, i] == rows[:, j]).sum(0)])
    chance = np.clip(0.5 * (1.0 + np.concatenate([distribution.mean, distribution.second[i, j]])), 0.0, 1.0)
    p = binomial_p_value(ups, n, chance)
    worst = int(p.argmin())
    name = f"<s_{worst}>" if worst < n_spins else f"<s_{i[worst - n_spins]} s_{j[worst - n_spins]}>"

    mean_energy = distribution.probabilities @ distribution.energies
    energy_scale = math.sqrt(distribution.probabilities @ (distribution.energies - mean_energy) ** 2 / n)
    z = (distribution.energies[code].mean() - mean_energy) / energy_scale
    return Verdict(cells, min(1.0, len(p) * float(p[worst])), float(2.0 * stats.norm.sf(abs(z))), n_cells, name)


def _merged_chi_square(observed: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    order = np.argsort(expected, kind="stable")
    cell, n_cells, filled = np.empty(len(order), dtype=np.int64), 0, 0.0
    for state in order:
        cell[state] = n_cells
        filled += expected[state]
        if filled >= _MIN_EXPECTED:
            n_cells, filled = n_cells + 1, 0.0
    if filled:  # a rest below the threshold joins the cell before it
        cell[cell == n_cells] = max(n_cells - 1, 0)
    n_cells = max(n_cells, 1)
    if n_cells == 1:
        return 1.0, 1
    seen, due = np.bincount(cell, observed, n_cells), np.bincount(cell, expected, n_cells)
    return float(stats.chi2.sf(((seen - due) ** 2 / due).sum(), n_cells - 1)), n_cells


def binomial_p_value(count, n, chance):
    """Two-sided p-value of a count, exact."""
    return np.minimum(1.0, 2.0 * np.minimum(stats.binom.cdf(count, n, chance), stats.binom.sf(count - 1, n, chance)))


def assert_follows(spins: torch.Tensor, distribution: Distribution, alpha: float = ALPHA) -> None:
    """Assert that independent draws pass :func:`judge` at level ``alpha``."""
    verdict = judge(spins, distribution)
    assert verdict.p_value > alpha, f"the draws do not follow the distribution: {verdict}"


# Planted faults ----------------------------------------------------------------------------------------------------

FAULTS = ("sign-of-J", "one-edge-less", "beta-10-percent-high", "shifted-nodes")


def faulty_draws(fault: str, problem: IsingModel, beta: float, n_samples: int, seed: int) -> torch.Tensor:
    """Exact draws with a fault of :data:`FAULTS`."""
    if fault == "beta-10-percent-high":
        return Distribution.boltzmann(problem, 1.1 * beta).draw(n_samples, seed)
    if fault == "shifted-nodes":
        return Distribution.boltzmann(problem, beta).draw(n_samples, seed).roll(1, dims=1)
    if fault == "sign-of-J":
        J = -problem.J
    else:  # without the coupling that ranks at three quarters by size
        J = problem.J.index_fill(0, problem.J.abs().argsort()[3 * problem.graph.n_edges // 4], 0.0)
    return Distribution.boltzmann(replace(problem, J=J), beta).draw(n_samples, seed)
