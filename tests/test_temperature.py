"""Estimates of the inverse temperature: against exact draws, a likelihood written out anew, and bad samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import Distribution, energy_table, random_problem, state_table
from scipy import optimize, stats
from tables import corners, over

from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.ising import IsingModel, SampleBatch
from qbmscvi.samplers import BetaEstimate, effective_beta
from qbmscvi.samplers.testing import tiny_problems

ALPHA = 1e-4
PROBLEMS = tiny_problems()
each_problem = pytest.mark.parametrize("name", list(PROBLEMS))


def exact_batch(problem: IsingModel, beta: float, n_samples: int, seed: int) -> SampleBatch:
    """Independent draws by numpy; negative temperatures too."""
    spins = Distribution.boltzmann(problem, beta).draw(n_samples, seed)
    return SampleBatch(spins, problem.energy(spins))


def log_pseudo_likelihood(problem: IsingModel, batch: SampleBatch, beta: float) -> float:
    """Mean over samples of sum_i log p(s_i | rest), from energies of single flips."""
    table, n = energy_table(problem), problem.n_spins
    code = ((batch.spins.numpy() + 1) // 2) @ (1 << np.arange(n - 1, -1, -1))
    gain = np.stack([table[code ^ (1 << i)] - table[code] for i in range(n)], axis=1)  # energy after a flip, minus now
    each = -np.logaddexp(0.0, -beta * gain).sum(1)
    return float(each.mean())


# Value and error ---------------------------------------------------------------------------------------------------


@each_problem
def test_pseudo_likelihood_estimate_maximizes_the_pseudo_likelihood(name):
    problem = PROBLEMS[name]
    batch = exact_batch(problem, 1.3, 300, seed=1)
    best = optimize.minimize_scalar(
        lambda beta: -log_pseudo_likelihood(problem, batch, beta), bounds=(0.1, 5.0), options={"xatol": 1e-9}
    ).x
    assert effective_beta(problem, batch).value == pytest.approx(best, abs=1e-6)


@over(("name", "beta"), corners(list(PROBLEMS), [0.05, 0.3, 1.0, 2.0, 4.0]))
def test_pseudo_likelihood_is_consistent(name, beta):
    """States as often as their probability says, rounded in the order of energies: a third of the sampling error."""
    problem = PROBLEMS[name]
    distribution = Distribution.boltzmann(problem, beta)
    order = distribution.energies.argsort()
    counts = np.diff(np.rint(40_000 * distribution.probabilities[order].cumsum()), prepend=0).astype(int)
    spins = torch.from_numpy(np.repeat(distribution.states[order], counts, axis=0).astype(np.int8))
    estimate = effective_beta(problem, SampleBatch(spins, problem.energy(spins)))
    assert abs(estimate.value - beta) < estimate.scale / 3


def test_intervals_cover_the_true_temperature(capsys):
    """Of 40 seeds at 95 % a case covers at least 31 (binomial, P below that: 2e-5 in each of 12 cases).

    Over all cases the share must lie where a binomial of 95 % lies with probability 1 - 1e-4, so that intervals far too
    wide fail as well as intervals too narrow.
    """
    cases = [(name, beta) for name in PROBLEMS for beta in (0.3, 1.0, 2.0)]
    hits, z = [], []
    for name, beta in cases:
        estimates = [effective_beta(PROBLEMS[name], exact_batch(PROBLEMS[name], beta, 400, seed)) for seed in range(40)]
        hits.append(sum(low <= beta <= high for low, high in (estimate.interval for estimate in estimates)))
        z += [(estimate.value - beta) / estimate.scale for estimate in estimates]
    n = 40 * len(cases)
    with capsys.disabled():
        print(f"\n{sum(hits)} of {n} intervals cover; z {np.mean(z):+.2f} +- {np.std(z):.2f}; cases {hits}")
    assert min(hits) >= 31
    low, high = stats.binom.ppf([ALPHA / 2, 1 - ALPHA / 2], n, 0.95)
    assert low <= sum(hits) <= high


def test_estimates_converge_to_the_true_temperature():
    """Within 4 standard errors (alpha 6e-5), at a hundredth of beta, from both sides of one."""
    problem = PROBLEMS["complete-6"]
    for beta in (0.5, 1.7):
        estimate = effective_beta(problem, exact_batch(problem, beta, 40_000, seed=3))
        assert estimate.scale < 0.012 * beta
        assert abs(estimate.value - beta) < 4 * estimate.scale


def test_estimates_scale_with_the_problem():
    """Samples of 2 E at beta are those of E at 2 beta."""
    problem = PROBLEMS["bipartite-3x5"]
    batch = exact_batch(problem, 1.0, 1000, seed=4)
    whole, half = effective_beta(problem, batch), effective_beta(problem.scaled(2.0), batch)
    assert half.value == pytest.approx(whole.value / 2, rel=1e-6)
    assert half.scale == pytest.approx(whole.scale / 2, rel=1e-6)


def test_single_precision_is_enough():
    problem = PROBLEMS["chimera-12"]
    batch = exact_batch(problem, 1.0, 2000, seed=6)
    double = effective_beta(problem, batch)
    single = effective_beta(problem.to(torch.float32), replace(batch, energies=batch.energies.float()))
    assert abs(single.value - double.value) < 1e-4
    assert single.scale == pytest.approx(double.scale, rel=0.2)


def test_samples_without_correlations_look_hotter():
    """Shuffled columns: every mean spin is that of beta = 1."""
    problem = PROBLEMS["complete-6"]
    batch = exact_batch(problem, 1.0, 5000, seed=7)
    rng = np.random.default_rng(7)
    spins = torch.from_numpy(np.stack([rng.permutation(column) for column in batch.spins.numpy().T], axis=1))
    assert effective_beta(problem, SampleBatch(spins, problem.energy(spins))).interval[1] < 0.9


# The contract ------------------------------------------------------------------------------------------------------


def test_interval_is_95_percent_of_a_normal():
    low, high = BetaEstimate(1.0, 0.1).interval
    assert stats.norm.cdf(high, 1.0, 0.1) - stats.norm.cdf(low, 1.0, 0.1) == pytest.approx(0.95, abs=1e-4)


def test_global_random_state_and_samples_are_left_alone():
    problem = PROBLEMS["complete-6"]
    batch = exact_batch(problem, 1.0, 300, seed=11)
    spins, state = batch.spins.clone(), torch.get_rng_state()
    effective_beta(problem, batch)
    assert torch.equal(batch.spins, spins)
    assert torch.equal(torch.get_rng_state(), state)


def ground_states(problem: IsingModel) -> torch.Tensor:
    lowest = state_table(problem.n_spins)[energy_table(problem).argmin()]
    return torch.from_numpy(lowest.astype(np.int8)).expand(500, -1)


@each_problem
def test_ground_states_have_no_temperature(name):
    problem = PROBLEMS[name]
    spins = ground_states(problem)
    with pytest.raises(ValueError, match="above.*local minima"):
        effective_beta(problem, SampleBatch(spins, problem.energy(spins)))


@each_problem
def test_uniform_samples_have_no_positive_temperature(name):
    """Each state once. Random uniform samples have an estimate near zero of either sign; see the next test."""
    problem = PROBLEMS[name]
    spins = torch.from_numpy(state_table(problem.n_spins).astype(np.int8))
    with pytest.raises(ValueError, match="below.*uniform"):
        effective_beta(problem, SampleBatch(spins, problem.energy(spins)))


def test_random_uniform_samples_have_none_or_one_that_may_be_zero():
    """Within 4 standard errors of zero (alpha 3e-5 a seed, one-sided), or refused; both happen."""
    problem = PROBLEMS["complete-6"]
    n_refused = 0
    for seed in range(20):
        try:
            estimate = effective_beta(problem, exact_batch(problem, 1e-12, 500, seed))
        except ValueError as error:
            assert "below" in str(error)
            n_refused += 1
        else:
            assert estimate.value < 4 * estimate.scale
    assert 0 < n_refused < 20


@each_problem
def test_samples_of_the_opposite_sign_have_no_temperature(name):
    problem = PROBLEMS[name]
    with pytest.raises(ValueError, match="below"):
        effective_beta(problem, exact_batch(problem, -1.0, 500, seed=12))


def test_an_estimate_outside_the_bracket_is_refused():
    problem = PROBLEMS["bipartite-3x5"]
    batch = exact_batch(problem, 1.0, 1000, seed=13)
    with pytest.raises(ValueError, match=r"\(2.0, 9.0\).*below"):
        effective_beta(problem, batch, bracket=(2.0, 9.0))
    with pytest.raises(ValueError, match=r"\(0.01, 0.5\).*above"):
        effective_beta(problem, batch, bracket=(0.01, 0.5))
    narrow = effective_beta(problem, batch, bracket=(0.5, 2.0))
    assert narrow.value == pytest.approx(effective_beta(problem, batch).value, abs=1e-6)


@over("bracket", [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, 1.0), (float("nan"), 1.0)], ids=str)
def test_brackets_without_meaning_are_refused(bracket):
    problem = PROBLEMS["bipartite-3x5"]
    with pytest.raises(ValueError, match="increasing"):
        effective_beta(problem, exact_batch(problem, 1.0, 100, seed=14), bracket=bracket)


def test_samples_of_another_width_are_refused():
    problem = PROBLEMS["bipartite-3x5"]
    with pytest.raises(ValueError, match="6 spins.*8"):
        effective_beta(problem, exact_batch(PROBLEMS["complete-6"], 1.0, 100, seed=15))


def test_a_problem_without_energy_has_no_temperature():
    """All fields and couplings zero: every temperature gives the same samples."""
    problem = random_problem(graphs.complete(5), scale=0.0)
    with pytest.raises(ValueError, match="No inverse temperature"):
        effective_beta(problem, exact_batch(problem, 1.0, 100, seed=17))


def test_independent_spins_have_a_temperature():
    """No edges: the pseudo-likelihood is the likelihood. Within 4 standard errors (alpha 6e-5)."""
    problem = random_problem(graphs.independent(6), seed=1, scale=0.5)
    estimate = effective_beta(problem, exact_batch(problem, 1.4, 3000, seed=18))
    assert abs(estimate.value - 1.4) < 4 * estimate.scale
