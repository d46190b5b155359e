"""Intervals of paired differences: coverage on generated numbers, planted differences, hand-computed values.

Gates on coverage allow four binomial standard errors around the nominal rate, or around the rate that the module's
docstring states; alpha is below 1e-4 per gate.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from qbmscvi.benchmark import paired_difference, pooled_difference

N_REPEATS = 400


def covers(low, high, truth):
    return (low <= truth) & (truth <= high)


def within(rate, expected, n=N_REPEATS):
    return abs(rate - expected) < 4 * np.sqrt(expected * (1 - expected) / n)


def test_student_interval_is_scipys():
    model, reference = np.array([0.9, 0.8, 0.85, 0.95]), np.array([0.7, 0.75, 0.8, 0.8])
    result = paired_difference(model, reference)
    expected = stats.ttest_rel(model, reference).confidence_interval(0.95)
    assert (result.t_low, result.t_high) == pytest.approx((expected.low, expected.high))
    assert result.mean == pytest.approx(np.mean(model - reference))
    assert result.n == 4


def test_pairs_matter_not_the_spread_over_seeds():
    """Seeds differ by 10, models by 1 +- 0.1: unpaired this would be lost."""
    rng = np.random.default_rng(0)
    seeds = rng.normal(scale=10, size=5)
    result = paired_difference(seeds + 1 + rng.normal(scale=0.1, size=5), seeds)
    assert 0 < result.t_low < 1 < result.t_high < 2
    assert stats.ttest_ind(seeds + 1, seeds).pvalue > 0.5


@pytest.fixture(scope="module")
def five_seeds():
    values = np.random.default_rng(1).normal(0.3, 1.0, size=(N_REPEATS, 5))
    return [paired_difference(row, np.zeros(5)) for row in values]


def test_student_interval_covers_the_truth_in_95_of_100(five_seeds):
    assert within(np.mean([covers(r.t_low, r.t_high, 0.3) for r in five_seeds]), 0.95)


def test_the_gate_finds_an_interval_that_is_too_narrow(five_seeds):
    normal = stats.norm.ppf(0.975) / stats.t.ppf(0.975, 4)
    rate = np.mean([abs(r.mean - 0.3) < normal * (r.t_high - r.mean) for r in five_seeds])
    assert not within(rate, 0.95)


def test_bootstrap_of_five_seeds_covers_as_stated(five_seeds):
    assert within(np.mean([covers(r.bootstrap_low, r.bootstrap_high, 0.3) for r in five_seeds]), 0.83)


def hierarchical(n_sets, truth, rng, between=1.0):
    centers = truth + between * rng.normal(size=n_sets)
    return {str(i): center + rng.normal(size=5) for i, center in enumerate(centers)}, centers.mean()


@pytest.mark.parametrize(("n_sets", "expected"), [(4, 0.82), (30, 0.94)])
def test_hierarchical_interval_covers_the_mean_over_unseen_sets(n_sets, expected):
    rng = np.random.default_rng(2)
    results = [pooled_difference(hierarchical(n_sets, 0.3, rng)[0]) for _ in range(100)]
    assert within(np.mean([covers(r.low, r.high, 0.3) for r in results]), expected, n=100)
    assert all(r.n_sets == n_sets for r in results)


def test_interval_within_sets_covers_the_mean_of_these_sets_only():
    rng = np.random.default_rng(3)
    for_these, for_unseen = [], []
    for _ in range(200):
        differences, center = hierarchical(4, 0.3, rng)
        result = pooled_difference(differences)
        for_these.append(covers(result.within_low, result.within_high, center))
        for_unseen.append(covers(result.within_low, result.within_high, 0.3))
    assert within(np.mean(for_these), 0.91, n=200)
    assert np.mean(for_unseen) < 0.75  # four sets that differ by as much as seeds do say little of others


def test_a_planted_difference_is_found_and_none_is_not():
    rng = np.random.default_rng(4)
    planted = {str(i): 0.02 + 0.003 * rng.normal(size=5) for i in range(4)}
    assert pooled_difference(planted).low > 0
    assert paired_difference(planted["0"], np.zeros(5)).t_low > 0
    null = {str(i): 0.003 * rng.normal(size=5) for i in range(4)}
    assert covers(*pooled_difference(null)[1:3], 0.0)


def test_sets_weigh_the_same_whatever_their_number_of_seeds():
    result = pooled_difference({"a": np.zeros(2), "b": np.ones(20)})
    assert result.mean == 0.5
    assert (result.low, result.high) == (0.0, 1.0)
    assert (result.within_low, result.within_high) == (0.5, 0.5)


def test_equal_seeds_give_equal_intervals():
    differences = {"a": np.random.default_rng(5).normal(size=9), "b": [0.0, 0.3]}
    assert pooled_difference(differences, seed=7) == pooled_difference(differences, seed=7)
    assert pooled_difference(differences, seed=7) != pooled_difference(differences, seed=8)


def test_incomplete_pairs_are_left_out():
    result = paired_difference([1.0, np.nan, 3.0], [0.0, 0.0, np.nan])
    assert (result.mean, result.n, result.t_low) == (1.0, 1, -np.inf)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="the seeds that both were run with"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="None of 2 pairs is finite"):
        paired_difference([np.nan, 1.0], [1.0, np.nan])
    with pytest.raises(ValueError, match=r"of which \['b'\] have no finite"):
        pooled_difference({"a": [1.0], "b": [np.nan]})
    with pytest.raises(ValueError, match="0 data sets"):
        pooled_difference({})
