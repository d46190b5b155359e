"""``qbmscvi.samplers.testing``: honest samplers keep the contract, each planted fault breaks the rule that it should.

Wrong signs, temperatures and node orders and lost edges are planted around samplers in ``test_sampler_contract.py``.

The gates are compared with those of ``oracles.py``, which were written separately and call none of the package's sums.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from dwave.samplers import RandomSampler, SteepestDescentSampler
from oracles import (
    Distribution,
    block_gibbs_distribution,
    energy_table,
    judge,
    random_problem,
    random_scan_distribution,
)
from scipy import stats
from tables import corners, over

from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.enumeration import all_states
from qbmscvi.boltzmann.ising import SampleBatch
from qbmscvi.exceptions import GraphMismatchError, QBMSCVIError, SamplerUnavailable
from qbmscvi.samplers import (
    BlockGibbsSampler,
    DimodSampler,
    ExactSampler,
    Sampler,
    SamplerTraits,
    SamplingRequest,
    testing,
)
from qbmscvi.samplers.testing import (
    SamplerCheckError,
    assert_boltzmann,
    check_sampler,
    compare_with_boltzmann,
    tiny_problems,
)

N_SAMPLES = 5_000
PROBLEM_NAMES = ("bipartite-3x5", "complete-6", "chimera-12")
each_problem = pytest.mark.parametrize("name", PROBLEM_NAMES)


def batch_of(problem, spins) -> SampleBatch:
    return SampleBatch(spins, problem.energy(spins))


# Problems ----------------------------------------------------------------------------------------------------------


def test_tiny_problems_are_of_three_kinds():
    problems = tiny_problems()
    assert tuple(problems) == PROBLEM_NAMES
    assert [p.n_spins for p in problems.values()] == [8, 6, 12]
    assert sorted(len(c) for c in problems["bipartite-3x5"].graph.color_classes) == [3, 5]
    assert problems["complete-6"].graph.n_edges == 15
    for problem in problems.values():
        values = torch.cat([problem.h, problem.J])
        assert ((values.abs() >= 0.15) & (values.abs() <= 0.45)).all()
        assert (values > 0).any()
        assert (values < 0).any()
        assert problem.offset != 0


def test_tiny_problems_are_the_same_in_every_precision():
    for single, double in zip(tiny_problems(torch.float32).values(), tiny_problems().values(), strict=True):
        assert single.h.dtype == torch.float32
        assert torch.equal(single.h, double.h.float())
        assert torch.equal(single.J, double.J.float())


@each_problem
def test_honest_short_chains_mix_on_tiny_problems(name):
    """Exact distribution of 30 sweeps at beta = 2 from uniform spins: within 1e-3 of the target."""
    problem = tiny_problems()[name]
    target = Distribution.boltzmann(problem, 2.0)
    distances = (
        block_gibbs_distribution(problem, 2.0, 30).distance(target),
        random_scan_distribution(problem, 2.0 * np.ones(30)).distance(target),
    )
    assert max(distances) < 1e-3


def test_without_dwave_networkx_another_sparse_problem_takes_the_place_of_chimera(monkeypatch):
    monkeypatch.setitem(sys.modules, "dwave_networkx", None)
    monkeypatch.setattr("qbmscvi.samplers.testing._problems.find_spec", lambda name: None)
    problems = tiny_problems()
    assert list(problems)[2] == "chorded-ring-9"
    problem = problems["chorded-ring-9"]
    assert (problem.n_spins, problem.graph.n_edges) == (9, 13)
    assert len(problem.graph.color_classes) == 3
    assert random_scan_distribution(problem, 2.0 * np.ones(30)).distance(Distribution.boltzmann(problem, 2.0)) < 1e-3
    check_sampler(ExactSampler(), n_samples=1000)


@each_problem
def test_no_field_or_coupling_can_be_lost_unnoticed(name):
    """Exact draws without one value fail at some beta, at the level of ``check_sampler`` with its defaults."""
    problem = tiny_problems()[name]
    alpha = testing.ALPHA / 18
    faults = [replace(problem, h=problem.h.index_fill(0, torch.tensor(i), 0.0)) for i in range(problem.n_spins)]
    faults += [replace(problem, J=problem.J.index_fill(0, torch.tensor(e), 0.0)) for e in range(problem.graph.n_edges)]
    for fault in faults:
        draws = ((beta, Distribution.boltzmann(fault, beta).draw(N_SAMPLES, seed=1)) for beta in (1.0, 0.3, 2.0))
        assert any(compare_with_boltzmann(problem, batch_of(problem, s), beta).p_value < alpha for beta, s in draws)


# The gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "beta"), corners(PROBLEM_NAMES, [0.3, 1.0, 2.0]))
def test_comparison_agrees_with_the_gate_of_the_tests(name, beta):
    problem = tiny_problems()[name]
    distribution = Distribution.boltzmann(problem, beta)
    spins = distribution.draw(N_SAMPLES, seed=2)
    verdict, other = compare_with_boltzmann(problem, batch_of(problem, spins), beta), judge(spins, distribution)
    assert verdict.moments == pytest.approx(other.moments, rel=1e-6)
    assert verdict.worst_moment == other.worst_moment
    assert verdict.energy == pytest.approx(other.energy, rel=1e-6)
    code = ((spins.numpy() + 1) // 2) @ (1 << np.arange(problem.n_spins - 1, -1, -1))
    frequencies = np.bincount(code, minlength=2**problem.n_spins) / N_SAMPLES
    assert verdict.distance == pytest.approx(0.5 * np.abs(frequencies - distribution.probabilities).sum(), rel=1e-9)


@pytest.mark.parametrize("n_samples", [150, 3000])
def test_distance_by_chance_is_the_mean_over_exact_draws(n_samples):
    """Within 5 standard errors of 300 simulated sets; the formula is exact."""
    problem = tiny_problems()["complete-6"]
    distribution = Distribution.boltzmann(problem, 1.0)
    rng = np.random.default_rng(3)
    sets = rng.multinomial(n_samples, distribution.probabilities, size=300) / n_samples
    distances = 0.5 * np.abs(sets - distribution.probabilities).sum(1)
    verdict = compare_with_boltzmann(problem, batch_of(problem, distribution.draw(n_samples, 0)), 1.0)
    assert abs(verdict.distance_by_chance - distances.mean()) < 5 * distances.std() / np.sqrt(300)


@each_problem
def test_gate_holds_its_level(name):
    """At alpha = 0.05 at most 11 of 60 exact sets fail: a gate that held its level would exceed that in 1e-4."""
    problem, beta = tiny_problems()[name], 1.5
    distribution = Distribution.boltzmann(problem, beta)
    n_failed = 0
    for seed in range(60):
        try:
            assert_boltzmann(problem, batch_of(problem, distribution.draw(2000, seed)), beta, alpha=0.05)
        except SamplerCheckError:
            n_failed += 1
    assert n_failed <= 11


def test_correlations_of_three_spins_show_in_the_cells_alone():
    """``p + c s_0 s_1 s_2`` has the moments and the energy of ``p``: only the table of states shows the difference."""
    problem, beta = tiny_problems()["complete-6"], 0.3
    distribution = Distribution.boltzmann(problem, beta)
    probabilities = distribution.probabilities + 0.9 * distribution.probabilities.min() * distribution.states[
        :, :3
    ].prod(1)
    spins = replace(distribution, probabilities=probabilities).draw(N_SAMPLES, seed=9)
    verdict = compare_with_boltzmann(problem, batch_of(problem, spins), beta)
    assert min(verdict.moments, verdict.energy) > testing.ALPHA
    assert verdict.cells < testing.ALPHA / 100
    with pytest.raises(SamplerCheckError, match="all states"):
        assert_boltzmann(problem, batch_of(problem, spins), beta)


def test_chi_square_of_the_cells_is_pearsons():
    """Cells large enough that none is merged: scipy's test on the same table."""
    problem = tiny_problems()["complete-6"]
    distribution = Distribution.boltzmann(problem, 0.3)
    spins = distribution.draw(20_000, seed=10)
    code = ((spins.numpy() + 1) // 2) @ (1 << np.arange(5, -1, -1))
    due = 20_000 * distribution.probabilities
    assert due.min() > 10
    expected = stats.chisquare(np.bincount(code, minlength=64), due).pvalue
    assert compare_with_boltzmann(problem, batch_of(problem, spins), 0.3).cells == pytest.approx(expected, rel=1e-9)


def test_beyond_twelve_spins_moments_and_energy_are_compared():
    problem = random_problem(graphs.bipartite(3, 12), seed=6, scale=0.4)
    batches = [
        ExactSampler().sample(SamplingRequest(p, N_SAMPLES, seed=7))
        for p in (problem, replace(problem, J=-problem.J), problem.scaled(1.1))
    ]
    verdicts = [compare_with_boltzmann(problem, batch, 1.0) for batch in batches]
    assert all(v.cells is None and v.distance is None for v in verdicts)
    assert verdicts[0].p_value > testing.ALPHA
    assert max(v.p_value for v in verdicts[1:]) < testing.ALPHA
    assert verdicts[2].energy < testing.ALPHA


def test_samples_that_are_all_equal_are_rejected():
    """No spread: standard errors from the samples would be zero."""
    problem = tiny_problems()["bipartite-3x5"]
    spins = torch.ones(500, 8, dtype=torch.int8)
    with pytest.raises(SamplerCheckError):
        assert_boltzmann(problem, batch_of(problem, spins), 1.0)


def test_comparisons_without_meaning_are_refused():
    problem = tiny_problems()["complete-6"]
    spins = Distribution.boltzmann(problem, 1.0).draw(200, seed=8)
    with pytest.raises(ValueError, match=r"\(200, 5\).*6 spins"):
        compare_with_boltzmann(problem, SampleBatch(spins[:, :5], torch.zeros(200)), 1.0)
    with pytest.raises(ValueError, match="100 samples.*99"):
        compare_with_boltzmann(problem, batch_of(problem, spins[:99]), 1.0)
    large = random_problem(graphs.complete(25))
    with pytest.raises(GraphMismatchError, match="at most 20"):
        compare_with_boltzmann(large, batch_of(large, torch.ones(200, 25, dtype=torch.int8)), 1.0)


# Samplers that keep the contract -----------------------------------------------------------------------------------


def test_an_honest_sampler_keeps_the_contract():
    """Alpha 1e-4. Every other sampler: ``test_sampler_contract.py``."""
    sampler = ExactSampler()
    before = torch.get_rng_state(), random.getstate()
    report = check_sampler(sampler)
    assert report.has_passed
    assert len(report.verdicts) == 3 * 3 * 2
    assert not report.failures
    assert not report.skipped
    p = [verdict.p_value for verdict in report.verdicts.values()]
    assert stats.kstest(p, "uniform", alternative="greater").pvalue > 1e-4  # corrected p-values may be too large
    assert str(report).startswith(f"{sampler.name} (target: boltzmann) keeps the contract\nbipartite-3x5, float32")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_too_short_chains_are_found():
    with pytest.raises(SamplerCheckError) as caught:
        check_sampler(BlockGibbsSampler(burn_in=1), dtypes=(torch.float32,))
    assert rules_of(caught) == {"distribution"}


def test_a_sampler_of_an_approximate_distribution_gets_its_distance_reported():
    """Uniform spins: far away where the distribution is not uniform, and that is no failure."""
    report = check_sampler(DimodSampler(RandomSampler()), betas=(1e-6, 2.0), dtypes=(torch.float64,))
    assert report.has_passed
    assert set(report.distances) == set(report.verdicts)
    for name, problem in tiny_problems().items():
        hot, cold = (report.verdicts[f"{name}, float64, beta={beta}"] for beta in ("1e-06", "2"))
        assert hot.distance == pytest.approx(hot.distance_by_chance, rel=0.25)
        probabilities = Distribution.boltzmann(problem, 2.0).probabilities
        uniform = 0.5 * np.abs(probabilities - 0.5**problem.n_spins).sum()
        assert cold.distance == pytest.approx(uniform, abs=0.05)


def test_a_sampler_of_ground_states_is_held_to_the_contract_alone():
    report = check_sampler(DimodSampler(SteepestDescentSampler(), target="ground_state"))
    assert report.has_passed
    assert report.verdicts == {}
    assert report.distances == {}


class Remote(ExactSampler):
    """Another machine, with random numbers of its own."""

    traits = SamplerTraits(is_remote=True)

    def _sample(self, request, seed):
        return super()._sample(request, torch.Generator().seed() % 2**31)


def test_remote_samplers_need_not_be_seedable():
    """Not reproducible, so alpha counts here: 1e-4."""
    assert check_sampler(Remote(), n_samples=1000, betas=(1.0,)).has_passed


class Small(ExactSampler):
    traits = SamplerTraits(max_spins=7)
    check = Sampler.check


def test_problems_that_do_not_fit_are_skipped_with_the_reason():
    report = check_sampler(Small(), betas=(1.0,))
    assert sorted(report.skipped) == ["bipartite-3x5", "chimera-12"]
    assert "at most 7" in report.skipped["chimera-12"]
    assert len(report.verdicts) == 2
    assert "skipped chimera-12: The problem has 12 spins" in str(report)


class Tiny(Small):
    traits = SamplerTraits(max_spins=3)


def test_a_sampler_that_takes_no_problem_is_not_passed():
    with pytest.raises(SamplerCheckError, match="none of them"):
        check_sampler(Tiny())


# Planted faults ----------------------------------------------------------------------------------------------------


class LostCoupling(ExactSampler):
    def _sample(self, request, seed):
        J = request.problem.J.clone()
        J[-1] = 0.0
        return super()._sample(replace(request, problem=replace(request.problem, J=J)), seed)


class SeedsTorch(ExactSampler):
    def _sample(self, request, seed):
        torch.manual_seed(seed)
        return super()._sample(request, seed)


class DrawsFromNumpy(ExactSampler):
    def _sample(self, request, seed):
        np.random.random()  # noqa: NPY002
        return super()._sample(request, seed)


class DrawsFromPython(ExactSampler):
    def _sample(self, request, seed):
        random.random()
        return super()._sample(request, seed)


class IgnoresTheSeed(ExactSampler):
    def _sample(self, request, seed):
        return super()._sample(request, torch.Generator().seed() % 2**31)


class AlwaysTheSameSeed(ExactSampler):
    def _sample(self, request, seed):
        return super()._sample(request, 1234)


class SwappedAnswers(ExactSampler):
    """The second and the third answer of a batch in each other's place; their shapes agree."""

    def _sample_batch(self, requests, seeds):
        draws = super()._sample_batch(requests, seeds)
        return draws if len(draws) < 3 else [draws[0], draws[2], draws[1], *draws[3:]]


class ReversedAnswers(ExactSampler):
    """The shapes disagree, which the public method finds."""

    def _sample_batch(self, requests, seeds):
        return super()._sample_batch(requests, seeds)[::-1]


class ScalesInPlace(ExactSampler):
    def _sample(self, request, seed):
        request.problem.J.mul_(1.0 / request.problem.J.abs().max().clamp(min=1e-6))
        return super()._sample(request, seed)


class MovesTheCallersChains(ExactSampler):
    traits = SamplerTraits(is_persistent=True)

    def _sample(self, request, seed):
        draw = super()._sample(request, seed)
        if request.initial_spins is not None:
            request.initial_spins.copy_(draw.spins)
        return draw


class OtherEnergies(ExactSampler):
    """Energies at the temperature asked for; possible through a private method only."""

    def _finish(self, request, draw, seed, seconds):
        batch = super()._finish(request, draw, seed, seconds)
        return replace(batch, energies=1.01 * batch.energies)


class OutOfReach(ExactSampler):
    def _sample(self, request, seed):
        raise SamplerUnavailable("no route to the device")


def rules_of(caught) -> set[str]:
    return {failure.rule for failure in caught.value.report.failures}


@pytest.mark.parametrize(
    ("fault", "rules", "finding"),
    [
        (
            LostCoupling,
            {"distribution"},
            r"complete-6, float32, beta=2.: p = .*moments .* at <s_\d.*, energy .*, all states .*distance",
        ),
        (SeedsTorch, {"random state"}, "global stream of torch"),
        (DrawsFromNumpy, {"random state"}, "global stream of numpy"),
        (DrawsFromPython, {"random state"}, "global stream of Python"),
        (IgnoresTheSeed, {"seeds"}, "complete-6, float64.*same seed"),
        (AlwaysTheSameSeed, {"seeds"}, "complete-6, float32.*different seeds"),
        (SwappedAnswers, {"order"}, "answer 2 .*another request"),
        (ReversedAnswers, {"answers"}, "InvalidSamples.*shape"),
        (ScalesInPlace, {"requests", "energies", "distribution"}, "J .*modified"),
        (MovesTheCallersChains, {"requests"}, "initial_spins .*modified"),
        (OtherEnergies, {"energies"}, "energies"),
        (OutOfReach, {"answers"}, "SamplerUnavailable"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_planted_faults_break_the_rules_that_they_should_and_no_others(fault, rules, finding):
    with pytest.raises(SamplerCheckError, match=finding) as caught:
        check_sampler(fault())
    report = caught.value.report
    assert rules_of(caught) == rules
    assert not report.has_passed
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{fault.__name__} breaks the contract of a sampler in {len(lines) - 1} cases:"
    assert [line[2:] for line in lines[1:]] == [str(failure) for failure in report.failures]
    if "distribution" in rules:  # in either precision
        cases = [failure.case for failure in report.failures if failure.rule == "distribution"]
        assert any("float32" in case for case in cases)
        assert any("float64" in case for case in cases)


def test_the_error_is_an_assertion_and_of_the_package():
    assert issubclass(SamplerCheckError, AssertionError)
    assert issubclass(SamplerCheckError, QBMSCVIError)


@over(
    ("arguments", "match"),
    [
        ({"n_samples": 99}, "n_samples=99.*100"),
        ({"betas": ()}, r"betas=\(\)"),
        ({"dtypes": ()}, r"dtypes=\(\)"),
        ({"betas": (-1.0,)}, "beta=-1.0"),
    ],
)
def test_arguments_without_meaning_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        check_sampler(ExactSampler(), **arguments)


@over("sampler", ["gibbs", ExactSampler, RandomSampler], ids=["name", "class", "dimod-class"])
def test_only_samplers_are_checked(sampler):
    with pytest.raises(TypeError, match="dimod sampler|is a class"):
        check_sampler(sampler)


def test_rows_of_all_states_are_counted_as_the_gate_counts_them():
    """A slip in the order of bits would misplace every cell: one sample per state gives distance by counting."""
    problem = tiny_problems()["bipartite-3x5"]
    states = all_states(8, torch.int8)
    verdict = compare_with_boltzmann(problem, batch_of(problem, states), 1.0)
    distribution = np.exp(-energy_table(problem))
    assert verdict.distance == pytest.approx(0.5 * np.abs(1 / 256 - distribution / distribution.sum()).sum(), rel=1e-9)
