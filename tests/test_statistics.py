"""Intervals of paired differences: coverage on generated numbers, planted differences, hand-computed values.

Gates on coverage allow four binomial standard errors around the nominal rate; alpha is below 1e-4 per gate.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from qbmscvi.benchmark import paired_difference, pooled_difference

N_REPEATS = 400


def covers(result, truth):
    return result.low <= truth <= result.high


def within(rate, expected, n=N_REPEATS):
    return abs(rate - expected) < 4 * np.sqrt(expected * (1 - expected) / n)


def test_student_interval_is_scipys():
    model, reference = np.array([0.9, 0.8, 0.85, 0.95]), np.array([0.7, 0.75, 0.8, 0.8])
    result = paired_difference(model, reference)
    expected = stats.ttest_rel(model, reference).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high))
    assert result.mean == pytest.approx(np.mean(model - reference))
    assert result.n == 4


def test_pairs_matter_not_the_spread_over_seeds():
    """Seeds differ by 10, models by 1 +- 0.1: unpaired this would be lost."""
    rng = np.random.default_rng(0)
    seeds = rng.normal(scale=10, size=5)
    result = paired_difference(seeds + 1 + rng.normal(scale=0.1, size=5), seeds)
    assert 0 < result.low < 1 < result.high < 2
    assert stats.ttest_ind(seeds + 1, seeds).pvalue > 0.5


@pytest.fixture(scope="module")
def five_seeds():
    values = np.random.default_rng(1).normal(0.3, 1.0, size=(N_REPEATS, 5))
    return [paired_difference(row, np.zeros(5)) for row in values]


def test_interval_of_one_set_covers_the_truth_in_95_of_100(five_seeds):
    assert within(np.mean([covers(r, 0.3) for r in five_seeds]), 0.95)


def test_the_gate_finds_an_interval_that_is_too_narrow(five_seeds):
    normal = stats.norm.ppf(0.975) / stats.t.ppf(0.975, 4)
    rate = np.mean([abs(r.mean - 0.3) < normal * (r.high - r.mean) for r in five_seeds])
    assert not within(rate, 0.95)


MU, TAU = 0.01, 0.02  # as differences of scores are: sets differ by more than the mean of all


def simulate_sets(n_sets, rng):
    """Differences of five to ten seeds by data set, around the set's own effect, with the set's own noise."""
    effects = rng.normal(MU, TAU, size=n_sets)
    noise = TAU * rng.uniform(0.2, 2.0, size=n_sets)
    n_seeds = rng.integers(5, 11, size=n_sets)
    return {str(i): rng.normal(effects[i], noise[i], size=n_seeds[i]) for i in range(n_sets)}


def bootstrap_covers(sets, rng, n_resamples=400):
    """The planted fault: percentiles of means of resampled sets, each with resampled seeds."""
    means = np.array([rng.choice(values, size=(n_resamples, len(values))).mean(axis=1) for values in sets.values()])
    chosen = rng.integers(len(means), size=means.shape)
    across = means[chosen, rng.integers(n_resamples, size=means.shape)].mean(axis=0)
    low, high = np.percentile(across, (2.5, 97.5))
    return low <= MU <= high


def holds(coverage):
    return 0.93 <= coverage <= 0.97


@pytest.mark.parametrize("n_sets", [2, 4, 7])
def test_pooled_interval_covers_the_mean_over_unseen_sets(n_sets):
    """The Monte Carlo standard error of 4,000 repeats is 0.0034, so the gate is six of them wide on each side."""
    rng, n_repeats = np.random.default_rng(2), 4000
    results = [pooled_difference(simulate_sets(n_sets, rng)) for _ in range(n_repeats)]
    coverage = np.mean([covers(result, MU) for result in results])
    error = np.sqrt(coverage * (1 - coverage) / n_repeats)
    print(f"\ncoverage over {n_sets} sets: {coverage:.3f} (Monte Carlo standard error {error:.4f})")
    assert all(result.n == n_sets for result in results)
    assert holds(coverage)


@pytest.mark.parametrize("n_sets", [2, 4, 7])
def test_that_gate_finds_the_percentile_bootstrap_too_narrow(n_sets):
    rng = np.random.default_rng(3)
    coverage = np.mean([bootstrap_covers(simulate_sets(n_sets, rng), rng) for _ in range(1000)])
    print(f"\ncoverage of a percentile bootstrap over {n_sets} sets: {coverage:.3f}")
    assert not holds(coverage)


def test_a_planted_difference_is_found_and_none_is_not():
    rng = np.random.default_rng(4)
    planted = {str(i): 0.02 + 0.003 * rng.normal(size=5) for i in range(4)}
    assert pooled_difference(planted).low > 0
    assert paired_difference(planted["0"], np.zeros(5)).low > 0
    null = {str(i): 0.003 * rng.normal(size=5) for i in range(4)}
    assert covers(pooled_difference(null), 0.0)


def test_sets_weigh_the_same_whatever_their_number_of_seeds():
    result = pooled_difference({"a": np.zeros(2), "b": np.ones(20)})
    expected = stats.ttest_1samp([0.0, 1.0], 0.0).confidence_interval(0.95)
    assert result == pytest.approx((0.5, expected.low, expected.high, 2))


def test_a_single_set_has_the_interval_of_its_seeds():
    values = np.array([0.1, 0.3, 0.2, np.nan])
    pooled, paired = pooled_difference({"a": values}), paired_difference(values, np.zeros(4))
    assert pooled[:3] == paired[:3]
    assert (pooled.n, paired.n) == (1, 3)


def test_incomplete_pairs_are_left_out():
    result = paired_difference([1.0, np.nan, 3.0], [0.0, 0.0, np.nan])
    assert (result.mean, result.n, result.low) == (1.0, 1, -np.inf)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="seeds"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="2 pairs.*finite"):
        paired_difference([np.nan, 1.0], [1.0, np.nan])
    with pytest.raises(ValueError, match=r"\['b'\].*no finite"):
        pooled_difference({"a": [1.0], "b": [np.nan]})
    with pytest.raises(ValueError, match="0 data sets"):
        pooled_difference({})
