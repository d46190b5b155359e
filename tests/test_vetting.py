"""Vetted: honest answers pass, whatever the problem; answers that are no samples do not."""

from __future__ import annotations

from dataclasses import replace

import dimod
import pytest
import torch
from faulty import ground_states
from oracles import Distribution
from tables import corners, over

from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.ising import IsingModel
from qbmscvi.exceptions import InvalidSamples
from qbmscvi.samplers import (
    BlockGibbsSampler,
    DimodSampler,
    Draw,
    ExactSampler,
    ParallelTemperingSampler,
    PathIntegralAnnealingSampler,
    Sampler,
    SamplerTraits,
    SamplingRequest,
    Vetted,
    effective_beta,
    vet,
)
from qbmscvi.samplers.local._gibbs import gibbs_sweeps
from qbmscvi.samplers.testing import tiny_problems

PROBLEMS = tiny_problems()
BETAS = (0.3, 1.0, 2.0)


class Device(Sampler):
    """Answers with ``answer(request)``: spins."""

    traits = SamplerTraits(is_persistent=True)

    def __init__(self, answer) -> None:
        self.answer = answer

    def _sample(self, request, seed):
        return Draw(self.answer(replace(request, seed=seed)))


def exact(request, ratio=1.0) -> torch.Tensor:
    """Independent draws at ``ratio`` times the inverse temperature asked for."""
    return Distribution.boltzmann(request.problem, ratio * request.beta).draw(request.n_samples, request.seed)


def is_refused(answer, problem, n_samples=512, beta=1.0, seed=0) -> str:
    """Empty, or the reason."""
    try:
        Vetted(Device(answer)).sample(SamplingRequest(problem, n_samples, beta=beta, seed=seed))
    except InvalidSamples as error:
        return str(error)
    return ""


def independent(*fields: float) -> IsingModel:
    """Spins without couplings; large fields leave few low states, whose honest samples repeat."""
    return IsingModel(
        torch.tensor(fields, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), graphs.independent(len(fields))
    )


FLAT = independent(*[0.0] * 8)
PEAKED = independent(*[3.0] * 8)  # 98 % of the probability in one state
FEW = independent(0.3, 0.1, *[4.0] * 6)  # four states share it
HEAVY = independent(*[0.6] * 8)  # one state has 14 %


def strongly_coupled() -> IsingModel:
    problem = PROBLEMS["complete-6"]
    return problem.scaled(4.0)


HONEST = PROBLEMS | {"flat": FLAT, "peaked": PEAKED, "few": FEW, "heavy": HEAVY}


@pytest.mark.parametrize(
    ("problem", "beta", "n_samples"),
    corners(HONEST, BETAS, [8]) + corners(HONEST, BETAS[::-1], [64]),
)
def test_honest_answers_pass(problem, beta, n_samples):
    """Ten answers in each of 14 cases, each refused with probability 3e-6 at most: false alarm 5e-4.

    The cases of few states and of eight samples are where standard errors estimated from the answer itself, or a
    bound on how much the number of states may grow, refuse up to a third of all honest answers.
    """
    distribution = Distribution.boltzmann(problem, beta)
    sampler = Vetted(Device(lambda request: distribution.draw(request.n_samples, request.seed)))
    for seed in range(10):
        sampler.sample(SamplingRequest(problem, n_samples, beta=beta, seed=seed))


@pytest.mark.parametrize(("name", "beta"), corners(list(PROBLEMS), BETAS))
def test_temperatures_within_the_ratio_pass_and_others_do_not(name, beta):
    """Of a ratio of 4: 2 is inside, 8 outside; the latter in 8,192 samples, for what is nearly flat shows little."""
    problem = PROBLEMS[name]
    for ratio in (0.5, 2.0):
        assert not is_refused(lambda r, ratio=ratio: exact(r, ratio), problem, beta=beta)
    assert "as ground states have" in is_refused(lambda r: exact(r, 8.0), problem, 8192, beta)
    assert "as noise has" in is_refused(lambda r: exact(r, 0.125), problem, 8192, beta)


@pytest.mark.parametrize(
    ("problem", "n_samples"),
    [
        pytest.param(PROBLEMS["bipartite-3x5"].scaled(0.01), 64, id="nearly-flat"),
        pytest.param(PROBLEMS["bipartite-3x5"].scaled(0.01), 512, id="nearly-flat-512"),
        pytest.param(PROBLEMS["bipartite-3x5"], 512, id="moderate"),
        pytest.param(strongly_coupled().scaled(0.5), 64, id="strongly-coupled"),
        pytest.param(PROBLEMS["complete-6"], 512, id="complete"),
    ],
)
def test_ground_states_are_refused(problem, n_samples):
    reason = is_refused(lambda r: ground_states(r.problem, r.n_samples), problem, n_samples)
    assert "above 4, as ground states have; 1 was requested" in reason
    assert "Calibrated" in reason


def test_ground_states_of_a_flat_problem_are_refused_as_repeats():
    """Where every state is a ground state, one state again and again is still no sample."""
    assert "repeats states: 512 samples are worth 1" in is_refused(lambda r: ground_states(FLAT, r.n_samples), FLAT)


def test_samples_of_the_opposite_sign_are_refused():
    assert "as noise has" in is_refused(lambda r: -exact(r), independent(*[0.5] * 6))


@pytest.mark.parametrize("n_states", [1, 4, 16])
def test_repeated_states_are_refused(n_states):
    problem = PROBLEMS["chimera-12"]

    def answer(request):
        return exact(request)[:n_states].repeat(request.n_samples // n_states, 1)

    # One state may look too cold as well; which of the two reasons is given is a matter of order.
    assert "repeats states" in (reason := is_refused(answer, problem)) or (n_states == 1 and "ground states" in reason)


def test_facts_are_those_of_the_answer():
    problem = PROBLEMS["bipartite-3x5"]
    request = SamplingRequest(problem, 512, beta=0.7, seed=3)
    direct, vetted = ExactSampler().sample(request), Vetted(ExactSampler()).sample(request)
    assert torch.equal(vetted.spins, direct.spins)
    assert vetted.info["effective_beta"] == effective_beta(problem, direct).value
    _, counts = torch.unique(direct.spins, dim=0, return_counts=True)
    assert vetted.info["effective_share"] == pytest.approx(512 / float(counts.square().sum()))
    assert "effective_beta" not in Vetted(ExactSampler()).sample(SamplingRequest(FLAT, 64, seed=0)).info


@pytest.mark.parametrize("name", PROBLEMS)
def test_reversible_sweeps_can_be_exchanged(name):
    """Counts of pairs of states before and after a sweep, in both orders: chi-square, alpha 1e-4.

    Sweeps in one direction are not reversible; on the complete graph the same test finds them out.
    """
    problem, n = PROBLEMS[name], 100_000
    spins = Distribution.boltzmann(problem).draw(n, seed=0).to(problem.h)

    def chi_square(is_reversible):
        generator = torch.Generator().manual_seed(1)
        swept = gibbs_sweeps(problem, spins, 1, 1.0, generator, is_reversible=is_reversible)
        power = 2 ** torch.arange(4)
        first, second = (((x[:, :4] > 0).long() * power).sum(1) for x in (spins, swept))
        counts = torch.zeros(16, 16, dtype=torch.float64).index_put_((first, second), torch.ones(n).double(), True)
        i, j = torch.triu_indices(16, 16, 1)
        a, b = counts[i, j], counts[j, i]
        enough = a + b >= 20
        return float(((a - b).square() / (a + b))[enough].sum()), int(enough.sum())

    statistic, n_pairs = chi_square(True)
    assert n_pairs > 50
    assert statistic < n_pairs + 4.0 * (2.0 * n_pairs) ** 0.5 + 10.0  # above the 1 - 1e-4 quantile
    if name == "complete-6":
        assert chi_square(False)[0] > 2.0 * n_pairs


class Claims(BlockGibbsSampler):
    """Somebody's subclass, which may return anything."""


@over(
    ("sampler", "is_vetted"),
    [
        pytest.param(BlockGibbsSampler(), False, id="default"),
        pytest.param(ExactSampler(), False, id="exact"),
        pytest.param(ParallelTemperingSampler(), False, id="tempering"),
        pytest.param(Vetted(Claims(), max_ratio=10.0), False, id="already"),
        pytest.param(PathIntegralAnnealingSampler(n_hold=0), True, id="approximate"),
        pytest.param(Claims(), True, id="subclass"),
        pytest.param(Device(exact), True, id="foreign"),
        pytest.param(DimodSampler(dimod.ExactSolver(), target="boltzmann"), True, id="dimod"),
    ],
)
def test_only_local_boltzmann_samplers_of_this_package_are_trusted(sampler, is_vetted):
    assert (vet(sampler) is not sampler) == is_vetted


def test_own_samplers_that_are_remote_are_vetted():
    sampler = ExactSampler()
    sampler.traits = replace(sampler.traits, is_remote=True)
    assert isinstance(vet(sampler), Vetted)


@over("max_ratio", [1.0, 0.0, float("nan")])
def test_ratios_without_meaning_are_refused(max_ratio):
    with pytest.raises(ValueError, match="must be above 1"):
        Vetted(ExactSampler(), max_ratio)
