"""Distributions of kernels, the gate of the tests against planted faults, and the contract of the public methods.

That samplers follow the Boltzmann distribution is tested in ``test_sampler_contract.py``. Here their kernels are tested
sharply: ``oracles.block_gibbs_distribution`` and ``oracles.random_scan_distribution`` evolve the distribution of a
chain exactly, and short runs, far from equilibrium, must follow it.
"""

from __future__ import annotations

import dimod
import numpy as np
import pytest
import torch
from dwave.samplers import RandomSampler, SteepestDescentSampler
from oracles import (
    ALPHA,
    FAULTS,
    PROBLEMS,
    Distribution,
    assert_follows,
    binomial_p_value,
    block_gibbs_distribution,
    energy_table,
    faulty_draws,
    judge,
    random_problem,
    random_scan_distribution,
    state_table,
)
from tables import corners, over

from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.ising import IsingModel
from qbmscvi.exceptions import GraphMismatchError, InvalidSamples, QBMSCVIError, SamplerError, SamplerTimeout
from qbmscvi.samplers import (
    BlockGibbsSampler,
    DimodSampler,
    Draw,
    ExactSampler,
    Sampler,
    SamplerTraits,
    SamplingRequest,
    SimulatedAnnealingSampler,
    build_sampler,
)

N_SAMPLES = 20_000
BETAS = (0.3, 1.0, 2.0)

DESCENT = type(SteepestDescentSampler()).__name__  # the public name is an alias

SAMPLERS = {
    "exact": ExactSampler(),
    "gibbs": BlockGibbsSampler(),
    "simulated-annealing": SimulatedAnnealingSampler(),
}
PERSISTENT = [pytest.param(SAMPLERS[name], id=name) for name in ("gibbs", "simulated-annealing")]
each_sampler = pytest.mark.parametrize("sampler", [pytest.param(s, id=name) for name, s in SAMPLERS.items()])
each_problem = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in PROBLEMS.items()])


# The distribution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_sweeps", [pytest.param(1, id="one-sweep"), pytest.param(3, id="three-sweeps")])
@each_problem
def test_short_gibbs_runs_follow_the_distribution_of_their_kernel(make, n_sweeps):
    """From one state, far from equilibrium: any slip in order, fields or Gaussian block shows. Alpha 1e-4 a case."""
    problem = make()
    start = np.where(np.arange(problem.n_spins) % 3 == 0, -1, 1)
    distribution = block_gibbs_distribution(problem, 0.7, n_sweeps, start)
    assert distribution.distance(Distribution.boltzmann(problem, 0.7)) > 0.01
    request = SamplingRequest(
        problem,
        N_SAMPLES,
        0.7,
        initial_spins=torch.tensor(start).expand(N_SAMPLES, -1),
        n_sweeps=n_sweeps,
        seed=53,
    )
    assert_follows(BlockGibbsSampler().sample(request).spins, distribution)


@pytest.mark.parametrize("n_ramp", [pytest.param(None, id="continued"), pytest.param(4, id="fresh")])
@each_problem
def test_short_annealing_runs_follow_the_distribution_of_their_kernel(make, n_ramp):
    """Three sweeps at beta = 0.7 from one state, or a ramp of four from uniform spins. Alpha 1e-4 a case."""
    problem = make()
    start = np.where(np.arange(problem.n_spins) % 3 == 0, -1, 1)
    ramp = np.geomspace(0.01, 1.0, n_ramp) if n_ramp else np.empty(0)
    distribution = random_scan_distribution(
        problem, 0.7 * np.concatenate([ramp, np.ones(3)]), None if n_ramp else start
    )
    assert distribution.distance(Distribution.boltzmann(problem, 0.7)) > 0.01
    initial = None if n_ramp else torch.tensor(start).expand(N_SAMPLES, -1)
    request = SamplingRequest(problem, N_SAMPLES, 0.7, initial_spins=initial, n_sweeps=3, seed=54)
    assert_follows(SimulatedAnnealingSampler(n_ramp=n_ramp or 1).sample(request).spins, distribution)


@each_problem
@pytest.mark.parametrize("sampler", PERSISTENT)
def test_two_sweeps_leave_exact_draws_distributed_as_they_were(sampler, make):
    problem, beta = make(dtype=torch.float32), 1.3
    distribution = Distribution.boltzmann(problem, beta)
    request = SamplingRequest(
        problem, N_SAMPLES, beta, initial_spins=distribution.draw(N_SAMPLES, seed=55), n_sweeps=2, seed=56
    )
    after = sampler.sample(request).spins
    assert_follows(after, distribution)
    assert not torch.equal(after, request.initial_spins)


@pytest.mark.parametrize("sampler", PERSISTENT)
def test_chains_of_one_call_and_of_two_seeds_are_independent(sampler):
    """Energies of neighbors in a call, and of the same row under two seeds; |r| < 4 / sqrt(n), alpha 6e-5 each."""
    problem = PROBLEMS["bipartite-3x5"]()
    energies = [
        sampler.sample(SamplingRequest(problem, 4000, 0.7, n_sweeps=20, seed=seed)).energies.numpy() for seed in (1, 2)
    ]
    assert abs(np.corrcoef(*energies)[0, 1]) < 4 / np.sqrt(4000)
    within = np.corrcoef(energies[0][:-1], energies[0][1:])[0, 1]
    assert abs(within) < 4 / np.sqrt(4000)


# The gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "beta"), corners(PROBLEMS, BETAS))
@over("fault", FAULTS)
def test_gate_rejects_exact_draws_of_a_faulty_problem(make, beta, fault):
    """Each planted fault of ``oracles.FAULTS`` fails the gate of the table, at a hundredth of its alpha and less."""
    problem = make()
    verdict = judge(faulty_draws(fault, problem, beta, N_SAMPLES, seed=57), Distribution.boltzmann(problem, beta))
    print(f"{verdict.p_value:.0e}")
    assert verdict.p_value < 1e-2 * ALPHA


@each_problem
def test_gate_rejects_a_block_update_that_ignores_its_own_edges(make):
    """All spins at once from the old state, as if the graph had one color: the classic slip of parallel Gibbs."""
    problem, beta = make(), 1.0
    generator = np.random.default_rng(58)
    matrix, h = problem.couplings().numpy(), problem.h.numpy()
    spins = generator.choice([-1, 1], size=(N_SAMPLES, problem.n_spins))
    for _ in range(50):
        up = 1 / (1 + np.exp(2 * beta * (h + spins @ matrix)))
        spins = np.where(generator.random(up.shape) < up, 1, -1)
    assert judge(torch.from_numpy(spins), Distribution.boltzmann(problem, beta)).p_value < 1e-2 * ALPHA


@pytest.mark.parametrize(("make", "beta"), corners(PROBLEMS, BETAS))
def test_gate_accepts_exact_draws(make, beta):
    """At alpha = 0.05 at most 11 of 60 exact sets fail: a gate that held its level would exceed that in 1e-4."""
    problem = make()
    distribution = Distribution.boltzmann(problem, beta)
    p = [judge(distribution.draw(N_SAMPLES // 10, seed), distribution).p_value for seed in range(60)]
    assert sum(value < 0.05 for value in p) <= 11


def test_gate_merges_unlikely_states_until_each_cell_expects_five():
    distribution = Distribution.boltzmann(PROBLEMS["chimera-12"](), 2.0)
    verdict = judge(distribution.draw(2000, seed=0), distribution)
    assert 20 < verdict.n_cells < 200
    assert judge(distribution.draw(6, seed=0), distribution).n_cells == 1


# The contract ------------------------------------------------------------------------------------------------------


class Scripted(Sampler):
    """Answers what it is told to."""

    def __init__(self, answer, traits=None):
        self.answer = answer
        self.traits = traits or SamplerTraits()

    def _sample(self, request, seed):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def problem():
    return PROBLEMS["bipartite-3x5"]()


@pytest.mark.parametrize("method", ["sample", "sample_batch"])
def test_public_methods_cannot_be_overridden(method):
    with pytest.raises(TypeError, match=rf"Mine.*{method}.*`_sample`"):
        type("Mine", (ExactSampler,), {method: lambda self, request: None})


def test_public_methods_cannot_be_overridden_by_a_mixin():
    mixin = type("Mixin", (), {"sample": lambda self, request: None})
    with pytest.raises(TypeError, match="final"):
        type("Mine", (mixin, ExactSampler), {})


def test_a_sampler_may_implement_sample_batch_alone(problem):
    class Batched(Sampler):
        def _sample_batch(self, requests, seeds):
            return [Draw(torch.ones(r.n_samples, r.problem.n_spins)) for r in requests]

    assert Batched().sample(SamplingRequest(problem, 3)).n_samples == 3


@over(
    ("spins", "match"),
    [
        pytest.param(torch.ones(4, 7), r"\(4, 7\).*\(4, 8\)", id="spins"),
        pytest.param(torch.ones(3, 8), r"shape \(3, 8\); \(4, 8\)", id="short"),
        pytest.param(torch.ones(5, 8), r"shape \(5, 8\); \(4, 8\)", id="long"),
        pytest.param(torch.ones(32), r"shape \(32,\)", id="flat"),
        pytest.param(torch.zeros(4, 8), "other than -1.*bits_to_spins", id="bits"),
        pytest.param(torch.full((4, 8), 1.0001), "other than -1", id="nearly-spins"),
        pytest.param(torch.full((4, 8), torch.nan), "other than -1", id="nan"),
        pytest.param(torch.full((4, 8), -128, dtype=torch.int8), "values other than", id="int8-minimum"),
    ],
)
def test_answers_that_are_no_samples_are_refused(problem, spins, match):
    with pytest.raises(InvalidSamples, match=match):
        Scripted(Draw(spins)).sample(SamplingRequest(problem, 4))


def test_a_missing_answer_is_refused(problem):
    class Lazy(ExactSampler):
        def _sample_batch(self, requests, seeds):
            return super()._sample_batch(requests[1:], seeds[1:])

    with pytest.raises(InvalidSamples, match="1 of 2 requests"):
        Lazy().sample_batch([SamplingRequest(problem, 3), SamplingRequest(problem, 4)])


@over("error", [OSError("port closed"), KeyError("h"), ZeroDivisionError()], ids=repr)
def test_foreign_exceptions_become_sampler_errors_that_name_their_cause(problem, error):
    with pytest.raises(SamplerError, match=f"Scripted failed: {type(error).__name__}") as caught:
        Scripted(error).sample(SamplingRequest(problem, 4))
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, QBMSCVIError)


def test_sampler_errors_pass_unchanged(problem):
    error = SamplerTimeout("after 30 s")
    with pytest.raises(SamplerTimeout, match="after 30 s") as caught:
        Scripted(error).sample(SamplingRequest(problem, 4))
    assert caught.value is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_are_not_translated(problem, error):
    class Interrupted(ExactSampler):
        def _sample(self, request, seed):
            raise error

    with pytest.raises(error):
        Interrupted().sample(SamplingRequest(problem, 4))


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(None, id="none"),
        pytest.param(Draw([[1, -1], [1]]), id="ragged"),
    ],
)
def test_malformed_answers_are_refused(problem, answer):
    with pytest.raises(SamplerError):
        Scripted(answer).sample(SamplingRequest(problem, 4))


@over("dtype", [torch.int8, torch.int64, torch.float32], ids=str)
def test_energies_are_recomputed_from_the_spins(problem, dtype):
    spins = Distribution.boltzmann(problem, 0.7).draw(4, seed=1)
    batch = Scripted(Draw(spins.to(dtype), info={"energies": "nonsense"})).sample(SamplingRequest(problem, 4, 0.7))
    assert batch.spins.dtype == torch.int8
    code = ((spins.numpy() + 1) // 2) @ (1 << np.arange(7, -1, -1))
    assert np.allclose(batch.energies.numpy(), energy_table(problem)[code], rtol=0, atol=1e-12)


def test_numpy_spins_are_taken(problem):
    batch = Scripted(Draw(np.ones((4, 8), dtype=np.int8))).sample(SamplingRequest(problem, 4))
    assert torch.equal(batch.spins, torch.ones(4, 8, dtype=torch.int8))


def test_facts_of_the_run_are_carried_over(problem):
    draw = Draw(torch.ones(4, 8), {"chain_breaks": 0.02})
    batch = Scripted(draw).sample(SamplingRequest(problem, 4, 0.7, seed=9))
    assert batch.info.pop("seconds") >= 0
    assert batch.info == {"sampler": "Scripted", "seed": 9, "beta": 0.7, "chain_breaks": 0.02}


@each_sampler
def test_a_batch_answers_every_request_in_order(sampler):
    requests = [
        SamplingRequest(make(), n, beta, seed=seed, n_sweeps=5)
        for make, n, beta, seed in zip(PROBLEMS.values(), (3, 1, 4), (0.3, 0.7, 1.5), range(3), strict=True)
    ]
    together = sampler.sample_batch(requests)
    for request, batch in zip(requests, together, strict=True):
        assert batch.spins.shape == (request.n_samples, request.problem.n_spins)
        assert (batch.info["seed"], batch.info["beta"]) == (request.seed, request.beta)
        assert torch.equal(batch.spins, sampler.sample(request).spins)


@each_sampler
def test_without_a_seed_the_global_stream_decides(sampler, problem):
    draws = []
    for _ in range(2):
        torch.manual_seed(8)
        draws.append([sampler.sample(SamplingRequest(problem, 20, 0.7, n_sweeps=5)).spins for _ in range(2)])
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    assert not torch.equal(*draws[0])


@over("sampler", PERSISTENT)
@over("make", PROBLEMS.values(), PROBLEMS)
def test_one_cold_sweep_from_a_ground_state_stays_there(sampler, make):
    problem = make()
    table = energy_table(problem)
    ground = torch.from_numpy(state_table(problem.n_spins)[table.argmin()])
    request = SamplingRequest(problem, 30, 1e4, initial_spins=ground.expand(30, -1), n_sweeps=1, seed=6)
    batch = sampler.sample(request)
    assert torch.equal(batch.spins, ground.to(torch.int8).expand(30, -1))
    assert np.allclose(batch.energies.numpy(), table.min(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("sampler", PERSISTENT)
def test_each_chain_starts_from_its_own_row(sampler):
    """Two ground states, every third chain in the second one; nothing moves at this temperature."""
    problem = IsingModel(torch.zeros(6), -torch.ones(15), graphs.complete(6))
    initial = torch.ones(60, 6, dtype=torch.int8)
    initial[::3] = -1
    before = initial.clone()
    batch = sampler.sample(SamplingRequest(problem, 60, 50.0, initial_spins=initial, n_sweeps=3, seed=7))
    assert torch.equal(batch.spins, before)
    assert torch.equal(initial, before)


def test_gibbs_reports_its_sweeps_and_takes_its_own_numbers_by_default(problem):
    sampler = BlockGibbsSampler(n_sweeps=3, burn_in=7)
    fresh = sampler.sample(SamplingRequest(problem, 4, seed=1))
    continued = sampler.sample(SamplingRequest(problem, 4, seed=1, initial_spins=fresh.spins))
    asked = sampler.sample(SamplingRequest(problem, 4, seed=1, initial_spins=fresh.spins, n_sweeps=11))
    assert [batch.info["n_sweeps"] for batch in (fresh, continued, asked)] == [7, 3, 11]
    assert [batch.info["is_fresh"] for batch in (fresh, continued, asked)] == [True, False, False]


@over("value", [pytest.param(torch.nan, id="nan"), pytest.param(torch.inf, id="inf")])
@over("sampler", SAMPLERS.values(), SAMPLERS)
def test_problems_that_are_not_finite_are_refused(sampler, value, problem):
    problem.J[3] = value
    with pytest.raises(InvalidSamples, match="not finite.*learning rate"):
        sampler.sample(SamplingRequest(problem, 4))


def test_max_spins_is_checked_before_the_device_is_asked(problem):
    sampler = Scripted(RuntimeError("must not be reached"), SamplerTraits(max_spins=7))
    with pytest.raises(GraphMismatchError, match="8 spins.*Scripted.*7"):
        sampler.sample(SamplingRequest(problem, 4))
    assert Scripted(Draw(torch.ones(4, 8)), SamplerTraits(max_spins=8)).sample(SamplingRequest(problem, 4))


def test_exact_sampler_refuses_what_it_cannot_enumerate():
    with pytest.raises(GraphMismatchError, match="21 of the 46 spins.*20"):
        ExactSampler().sample(SamplingRequest(random_problem(graphs.bipartite(21, 25)), 4))


def test_exact_sampler_takes_a_wide_bipartite_problem():
    problem = random_problem(graphs.bipartite(4, 300), scale=0.1)
    assert ExactSampler().sample(SamplingRequest(problem, 5, 0.7, seed=1)).spins.shape == (5, 304)


@over(
    ("arguments", "match"),
    [
        pytest.param({"beta": 0.0}, "beta=0.0", id="beta-zero"),
        pytest.param({"beta": -1.0}, "beta=-1.0", id="beta-negative"),
        pytest.param({"beta": float("inf")}, "beta=inf", id="beta-infinite"),
        pytest.param({"beta": float("nan")}, "beta=nan", id="beta-nan"),
        pytest.param({"n_samples": 0}, "n_samples=0", id="no-samples"),
        pytest.param({"n_sweeps": 0}, "n_sweeps=0", id="no-sweeps"),
        pytest.param({"initial_spins": torch.ones(4, 7)}, r"\(4, 7\).*\(4, 8\)", id="initial-width"),
        pytest.param({"initial_spins": torch.ones(3, 8)}, r"\(3, 8\).*\(4, 8\)", id="initial-rows"),
    ],
)
def test_requests_without_meaning_are_refused(problem, arguments, match):
    with pytest.raises(ValueError, match=match):
        SamplingRequest(**({"problem": problem, "n_samples": 4} | arguments))


@over(
    ("build", "match"),
    [
        pytest.param(lambda: BlockGibbsSampler(n_sweeps=0), "n_sweeps=0 and burn_in=200", id="gibbs-sweeps"),
        pytest.param(lambda: BlockGibbsSampler(burn_in=0), "n_sweeps=10 and burn_in=0", id="gibbs-burn-in"),
        pytest.param(lambda: SimulatedAnnealingSampler(n_ramp=0), "n_ramp=0 and n_hold=100", id="annealing-ramp"),
        pytest.param(lambda: SimulatedAnnealingSampler(n_hold=0), "n_ramp=100 and n_hold=0", id="annealing-hold"),
        pytest.param(lambda: build_sampler("ising-machine"), "Unknown sampler 'ising-machine'.*'gibbs'", id="name"),
    ],
)
def test_samplers_refuse_values_without_meaning(build, match):
    with pytest.raises(ValueError, match=match):
        build()


@over(
    ("build", "match"),
    [
        pytest.param(lambda: build_sampler(3), "got int", id="number"),
        pytest.param(lambda: build_sampler(ExactSampler), r"ExactSampler is a class.*`ExactSampler\(\)`", id="class"),
        pytest.param(lambda: DimodSampler("tabu"), "'tabu'", id="not-a-sampler"),
        pytest.param(lambda: Sampler(), "abstract", id="abstract"),
    ],
)
def test_samplers_refuse_other_types(build, match):
    with pytest.raises(TypeError, match=match):
        build()


@over(
    ("name", "kind"),
    [
        pytest.param("gibbs", BlockGibbsSampler, id="gibbs"),
        pytest.param("simulated_annealing", SimulatedAnnealingSampler, id="simulated_annealing"),
        pytest.param("exact", ExactSampler, id="exact"),
    ],
)
def test_samplers_are_built_by_name_and_passed_through(name, kind):
    sampler = build_sampler(name)
    assert type(sampler) is kind
    assert build_sampler(sampler) is sampler
    assert repr(sampler) == f"{kind.__name__}()"
    assert sampler.traits.target == "boltzmann"


# Adapters of dimod samplers ----------------------------------------------------------------------------------------


class Replay(dimod.Sampler):
    """A dimod sampler that answers a fixed sample set and keeps what it was asked."""

    parameters = {"num_reads": [], "seed": [], "answer_mode": []}
    properties: dict = {}

    def __init__(self, answer):
        self.answer = answer

    def sample(self, bqm, **kwargs):
        self.bqm, self.kwargs = bqm, kwargs
        return self.answer


def test_dimod_sampler_sees_the_problem_times_beta(problem):
    sampler = Replay(dimod.SampleSet.from_samples(np.ones((2, 8), dtype=np.int8), "SPIN", energy=0))
    DimodSampler(sampler).sample(SamplingRequest(problem, 2, 0.7))
    states = state_table(8)
    assert np.allclose(sampler.bqm.energies((states, range(8))), 0.7 * energy_table(problem), rtol=0, atol=1e-12)


def test_dimod_sampler_gets_reads_and_seed_and_the_users_arguments():
    problem = PROBLEMS["complete-6"]()
    sampler = Replay(dimod.SampleSet.from_samples(np.ones((3, 6), dtype=np.int8), "SPIN", energy=0))
    DimodSampler(sampler, sample_kwargs={"answer_mode": "raw"}).sample(SamplingRequest(problem, 3, 0.7, seed=12))
    assert sampler.kwargs == {"num_reads": 3, "seed": 12, "answer_mode": "raw"}


def test_repeated_samples_of_a_sample_set_are_expanded_and_columns_put_in_order(problem):
    order = [5, 0, 7, 2, 1, 6, 3, 4]
    rows = np.random.default_rng(1).choice([-1, 1], size=(3, 8)).astype(np.int8)
    answer = dimod.SampleSet.from_samples(
        (rows[:, order], order), "SPIN", energy=0, num_occurrences=[2, 1, 3], sort_labels=False
    )
    assert list(answer.variables) == order
    batch = DimodSampler(Replay(answer)).sample(SamplingRequest(problem, 6, 0.7))
    assert batch.spins.tolist() == rows[[0, 0, 1, 2, 2, 2]].tolist()
    assert batch.info["backend"] == "Replay"
    assert batch.info["sampler"] == "DimodSampler[Replay]"


def test_exact_solver_answers_if_its_number_of_states_was_asked_for():
    problem = PROBLEMS["complete-6"]()
    batch = DimodSampler(dimod.ExactSolver()).sample(SamplingRequest(problem, 64, 0.7))
    assert sorted(batch.spins.tolist()) == state_table(6).tolist()
    assert np.allclose(np.sort(batch.energies.numpy()), np.sort(energy_table(problem)), rtol=0, atol=1e-12)


@each_problem
def test_steepest_descent_returns_local_minima(make):
    problem = make()
    batch = DimodSampler(SteepestDescentSampler(), target="ground_state").sample(SamplingRequest(problem, 200, seed=2))
    spins = batch.spins.double()
    assert (spins * (problem.h + spins @ problem.couplings()) <= 0).all()
    assert batch.info["sampler"] == f"DimodSampler[{DESCENT}]"


def test_random_sampler_ignores_the_energy(problem):
    """Uniform bits; the gate passes at beta near zero and rejects the asked beta."""
    batch = DimodSampler(RandomSampler()).sample(SamplingRequest(problem, N_SAMPLES, 1.0, seed=3))
    assert_follows(batch.spins, Distribution.boltzmann(problem, 1e-12))
    assert judge(batch.spins, Distribution.boltzmann(problem, 1.0)).p_value < 1e-2 * ALPHA


def test_dimod_sampler_declares_what_it_was_told():
    sampler = DimodSampler(SteepestDescentSampler(), target="ground_state", max_spins=5)
    assert sampler.traits == SamplerTraits(target="ground_state", max_spins=5)
    assert DimodSampler(RandomSampler()).traits.target == "approximate"
    with pytest.raises(GraphMismatchError, match="at most 5"):
        sampler.sample(SamplingRequest(PROBLEMS["complete-6"](), 4))


def test_binomial_p_value_is_two_sided_and_exact():
    assert binomial_p_value(0, 10, 0.5) == pytest.approx(2 / 1024)
    assert binomial_p_value(10, 10, 0.5) == pytest.approx(2 / 1024)
    assert binomial_p_value(5, 10, 0.5) == 1.0


def test_chain_states_that_are_not_spins_are_refused(problem):
    with pytest.raises(ValueError, match=r"initial_spins.*other than -1"):
        SamplingRequest(problem, 4, initial_spins=torch.full((4, problem.n_spins), 7.0))


def test_annealing_takes_seeds_beyond_32_bits(problem):
    request = SamplingRequest(problem, 4, seed=2**40 + 5)
    assert SimulatedAnnealingSampler().sample(request).info["seed"] == 2**40 + 5
