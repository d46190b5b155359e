"""D-Wave annealers: embedding, ranges, the distribution of the answers, faults and secrets.

D-Wave's real client talks to ``sapi_server.py`` on this machine, which samples what was submitted. No quantum annealer
was ever reached.
"""

from __future__ import annotations

import logging
import pickle
import sys
import time
import traceback
from dataclasses import replace
from functools import cache
from itertools import count

import dimod
import dwave.samplers
import dwave_networkx as dnx
import networkx as nx
import numpy as np
import pytest
import torch
from annealer import majority_distribution
from dwave.embedding import embed_bqm, verify_embedding
from dwave.system.testing import MockDWaveSampler
from faulty import Pace
from oracles import PROBLEMS, Distribution, assert_follows, energy_table, judge, random_problem, state_table
from sapi_server import TOKEN, SapiServer, Solver, working_graph
from tables import corners

from qbmscvi import QBMSCVI, SamplingSchedule
from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.ising import IsingModel
from qbmscvi.datasets import synthetic_counts
from qbmscvi.exceptions import (
    BudgetExceeded,
    GraphMismatchError,
    InvalidSamples,
    SamplerError,
    SamplerTimeout,
    SamplerUnavailable,
)
from qbmscvi.samplers import (
    Broker,
    Calibrated,
    DWaveSampler,
    Polished,
    Recorded,
    Retrying,
    SamplingRequest,
    SpinReversed,
    Wrapper,
    build_dwave_sampler,
    build_sampler,
)
from qbmscvi.samplers._background import call_in_background
from qbmscvi.samplers.dwave._embedding import Embedding, find_embedding
from qbmscvi.samplers.dwave._program import Ranges, fit
from qbmscvi.samplers.wrappers._wrapper import pass_on

TRUE_BETA = 5.0
# Of an Advantage2 system, as its documentation has them: per group of couplers and not per qubit.
ADVANTAGE2 = {"per_qubit_coupling_range": None, "per_group_coupling_range": [-13.0, 10.0]}
LIMITS = Ranges(h=4.0, J=1.0, chain=2.0, qubit=(-18.0, 15.0))


@pytest.fixture(scope="module")
def service():
    solvers = [
        Solver("Loop_zephyr", working_graph("zephyr", 3), beta=TRUE_BETA),
        Solver("Loop_pegasus", working_graph("pegasus", 4), beta=TRUE_BETA),
        Solver("Loop_advantage2", working_graph("zephyr", 2), beta=TRUE_BETA, properties=ADVANTAGE2),
    ]
    with SapiServer(*solvers) as server:
        yield server


@pytest.fixture(autouse=True)
def configured(service, tmp_path, monkeypatch):
    """D-Wave's client finds the server by its own configuration file, and nothing else."""
    for name in ("DWAVE_API_TOKEN", "DWAVE_API_ENDPOINT", "DWAVE_API_SOLVER", "DWAVE_PROFILE", "DWAVE_API_REGION"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "dwave.conf").write_text(service.configuration())
    monkeypatch.setenv("DWAVE_CONFIG_FILE", str(tmp_path / "dwave.conf"))
    service.calm()
    service.solvers["Loop_zephyr"].status = "ONLINE"
    return tmp_path


def sampler(**settings) -> DWaveSampler:
    return DWaveSampler(**{"topology": "zephyr", "device_beta": TRUE_BETA, "timeout": 60.0, **settings})


def patient(seconds: float) -> DWaveSampler:
    """Connect in peace, then wait that long for answers."""
    device = sampler()
    device.timeout = seconds
    return device


# Embedding ---------------------------------------------------------------------------------------------------------

LATTICES = {
    "chimera": lambda: dnx.chimera_graph(4, node_list=sorted(dnx.chimera_graph(4))[3:]),
    "pegasus": lambda: working_graph("pegasus", 3),
    "zephyr": lambda: working_graph("zephyr", 3),
}
GRAPHS = {
    "bipartite-3x5": lambda: graphs.bipartite(3, 5),
    "bipartite-12x10": lambda: graphs.bipartite(12, 10),
    "complete-7": lambda: graphs.complete(7),
    "independent-4": lambda: graphs.independent(4),
    "ring-and-two-alone": lambda: graphs.Graph(7, [[0, 1], [1, 2], [2, 3], [3, 4], [0, 4]]),
    "petersen": lambda: graphs.from_networkx(nx.petersen_graph()),
}


@pytest.mark.parametrize(("name", "family"), corners(list(GRAPHS), list(LATTICES)))
def test_every_copy_is_an_embedding_of_its_own(family, name):
    graph, lattice = GRAPHS[name](), LATTICES[family]()
    found = find_embedding(graph, lattice, max_copies=3, seed=1, seconds=20.0)
    assert 1 <= found.n_copies <= 3
    assert len(np.unique(found.qubits)) == found.qubits.size  # no qubit twice
    for qubits in found.qubits:
        chains = {spin: qubits[found.spin_of == spin].tolist() for spin in range(graph.n_nodes)}
        assert verify_embedding(chains, graph.to_networkx(), lattice)
        assert all(lattice.has_edge(*qubits[pair]) for pair in found.couplers)
    assert found.kind != "native" or found.chain_lengths.max() == 1


@pytest.mark.parametrize("name", ["bipartite-12x10", "petersen", "ring-and-two-alone"])
def test_equal_seeds_find_equal_embeddings(name):
    lattice = LATTICES["pegasus"]()
    first, second = (find_embedding(GRAPHS[name](), lattice, max_copies=2, seed=1, seconds=20.0) for _ in range(2))
    assert np.array_equal(first.qubits, second.qubits)
    assert np.array_equal(first.couplers, second.couplers)


def test_the_kind_follows_the_graph():
    lattice = LATTICES["zephyr"]()
    find = {"max_copies": 1, "seed": 0, "seconds": 20.0}
    assert find_embedding(graphs.patch(lattice, 40), lattice, **find).kind == "native"
    assert find_embedding(graphs.bipartite(14, 14), lattice, **find).kind == "biclique"
    assert find_embedding(graphs.complete(12), lattice, **find).kind == "clique"
    wheel = graphs.from_networkx(nx.wheel_graph(30))  # a hub of degree 29; a qubit has 20 couplers at most
    assert find_embedding(wheel, lattice, **find).kind == "minor"
    with pytest.raises(GraphMismatchError, match="333 qubits"):
        find_embedding(graphs.complete(400), lattice, **find)


@pytest.mark.parametrize("family", LATTICES)
def test_programs_are_those_of_dwaves_own_embedding(family):
    """Fields and couplings of a copy against ``dwave.embedding.embed_bqm``, to rounding."""
    problem, lattice = random_problem(graphs.complete(7), seed=4, scale=0.1), LATTICES[family]()
    found = find_embedding(problem.graph, lattice, max_copies=1, seed=1, seconds=20.0)
    program = fit(problem, found, LIMITS, beta=1.0, device_beta=1.0, chain_strength=1.5)
    chains = {spin: found.qubits[0][found.spin_of == spin].tolist() for spin in range(7)}
    theirs = embed_bqm(problem.to_bqm(), chains, nx.to_dict_of_lists(lattice), chain_strength=1.5)
    fields, couplings = program.on_chip()
    assert fields == pytest.approx(dict(theirs.linear))
    ours = {tuple(sorted(pair)): value for pair, value in couplings.items()}
    assert ours == pytest.approx({tuple(sorted(pair)): value for pair, value in theirs.quadratic.items()})


def test_intact_chains_have_the_scaled_energy_of_the_problem():
    problem = random_problem(graphs.complete(7), seed=4, scale=3.0)
    found = find_embedding(problem.graph, LATTICES["pegasus"](), max_copies=1, seed=1, seconds=20.0)
    program = fit(problem, found, LIMITS, beta=1.0, device_beta=2.0, chain_strength=None)
    assert program.is_range_limited
    spins = state_table(7)
    qubits = spins[:, found.spin_of]
    energy = qubits @ program.h + (qubits[:, found.couplers[:, 0]] * qubits[:, found.couplers[:, 1]]) @ program.J
    expected = program.scale * energy_table(problem)
    assert np.ptp(energy - expected) < 1e-9  # up to the constant of the chains
    gathered, broken = found.gather(qubits, np.random.default_rng(0))
    assert np.array_equal(gathered, spins)
    assert not broken.any()


# Ranges ------------------------------------------------------------------------------------------------------------


@cache
def on_zephyr(name: str) -> Embedding:
    return find_embedding(GRAPHS[name](), LATTICES["zephyr"](), max_copies=2, seed=1, seconds=20.0)


@pytest.mark.parametrize(("size", "chain_strength"), corners([0.01, 1.0, 30.0], [0.7, None, 2.0]))
def test_programs_stay_within_the_ranges_and_nothing_is_clipped(service, size, chain_strength):
    solver = service.solvers["Loop_zephyr"]
    for name in ("bipartite-12x10", "complete-7", "petersen", "independent-4"):
        problem = random_problem(GRAPHS[name](), seed=2, scale=size)
        found = on_zephyr(name)
        program = fit(problem, found, LIMITS, beta=1.0, device_beta=5.0, chain_strength=chain_strength)
        assert solver.complaint(*program.on_chip(), {"num_reads": 1, "auto_scale": False}) is None
        h, J = found.spread(problem.h.numpy(), problem.J.numpy())
        assert np.allclose(program.h, program.scale * h, atol=1e-12)
        assert np.allclose(program.J[~found.is_chain], program.scale * J[~found.is_chain], atol=1e-12)
        assert program.is_range_limited == (program.scale < 0.2)
        for gauge in (torch.ones(problem.n_spins), -torch.ones(problem.n_spins)):
            gauge[::2] *= -1
            flipped = fit(
                problem.gauged(gauge), found, LIMITS, beta=1.0, device_beta=5.0, chain_strength=chain_strength
            )
            assert flipped.scale == pytest.approx(program.scale, rel=1e-12)
            assert solver.complaint(*flipped.on_chip(), {"num_reads": 1, "auto_scale": False}) is None


def test_the_total_coupling_of_a_qubit_limits_the_scale():
    star = graphs.Graph(9, [[0, k] for k in range(1, 9)])
    problem = IsingModel(torch.zeros(9), torch.ones(8), star)
    found = find_embedding(star, LATTICES["zephyr"](), max_copies=1, seed=1, seconds=20.0)
    ranges = Ranges(h=4.0, J=1.0, chain=2.0, qubit=(-9.0, 4.0))
    assert fit(problem, found, ranges, beta=1.0, device_beta=1.0, chain_strength=None).scale == pytest.approx(0.5)
    free = replace(ranges, qubit=(-np.inf, np.inf))
    assert fit(problem, found, free, beta=1.0, device_beta=1.0, chain_strength=None).scale == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "limits", "is_binding"),
    [
        ("bipartite-12x10", (-13.0, 10.0), False),
        ("bipartite-12x10", (-4.2, 3.0), True),
        ("bipartite-3x5", (-9.0, 0.9), True),
    ],
)
def test_the_total_coupling_of_a_group_limits_the_scale(service, name, limits, is_binding, monkeypatch):
    """As the service adds up: what is programmed passes, in every gauge; a permille more is refused."""
    solver = service.solvers["Loop_zephyr"]
    monkeypatch.setattr(solver, "properties", {**ADVANTAGE2, "per_group_coupling_range": list(limits)})
    ranges = Ranges.from_properties(solver.describe()["properties"], solver.lattice)
    assert ranges.qubit == (-np.inf, np.inf)
    assert ranges.group == limits
    assert len(ranges.group_of) == 2 * solver.lattice.number_of_edges()
    problem = random_problem(GRAPHS[name](), seed=2, scale=30.0)
    problem = replace(problem, h=torch.zeros_like(problem.h), J=problem.J.abs())
    found = on_zephyr(name)
    assert found.n_copies > 1  # whose couplers are grouped in other ways
    strength = 2.0 if found.chain_lengths.max() > 1 else None
    settings = {"beta": 1.0, "device_beta": 5.0, "chain_strength": strength}
    program = fit(problem, found, ranges, **settings)
    parameters = {"num_reads": 1, "auto_scale": False}
    assert program.is_range_limited
    couplings = found.spread(problem.h.numpy(), problem.J.numpy())[1]
    assert np.allclose(program.J[~found.is_chain], program.scale * couplings[~found.is_chain])
    gauge = torch.ones(problem.n_spins)
    gauge[::2] = -1
    for other in (problem, problem.gauged(gauge)):
        flipped = fit(other, found, ranges, **settings)
        assert flipped.scale == pytest.approx(program.scale, rel=1e-12)
        assert solver.complaint(*flipped.on_chip(), parameters) is None
    refusals = []
    for factor in (1.001, -1.001):
        couplings = np.where(found.is_chain, program.J, factor * program.J)
        refusals.append(solver.complaint(*replace(program, J=couplings).on_chip(), parameters) or "")
    assert any(refusals)
    assert any("per_group_coupling_range" in words for words in refusals) == is_binding


def test_a_solver_with_coupling_groups_answers_within_them(service, monkeypatch):
    problem = random_problem(graphs.bipartite(4, 4), seed=8, scale=8.0)
    device = sampler(solver="Loop_advantage2")
    free = device.program(problem).scale
    monkeypatch.setitem(ADVANTAGE2, "per_group_coupling_range", [-1.0, 1.0])
    device = sampler(solver="Loop_advantage2")
    batch = device.sample(SamplingRequest(problem, 4_000, seed=1))
    assert batch.info["scale"] < 0.8 * free
    assert_follows(batch.spins, Distribution.boltzmann(problem, batch.info["effective_beta"]))
    device._ranges = replace(device.ranges, group_of={})  # a sampler that does not know of groups
    with pytest.raises(SamplerUnavailable, match="per_group_coupling_range"):
        device.sample(SamplingRequest(problem, 4_000, seed=1))


def test_chains_that_leave_no_room_are_refused():
    problem = random_problem(graphs.complete(7), seed=4)
    found = find_embedding(problem.graph, LATTICES["pegasus"](), max_copies=1, seed=1, seconds=20.0)
    for strength, ranges in ((2.5, LIMITS), (2.0, replace(LIMITS, qubit=(-2.0, 2.0)))):
        with pytest.raises(GraphMismatchError, match="chain_strength"):
            fit(problem, found, ranges, beta=1.0, device_beta=5.0, chain_strength=strength)


def test_chains_hold_where_couplings_are_zero():
    """Torque compensation alone would leave chains uncoupled: a field alone would be shared by independent qubits."""
    problem = random_problem(graphs.complete(6), seed=4)
    problem = replace(problem, J=torch.zeros_like(problem.J))
    batch = sampler().sample(SamplingRequest(problem, 4_000, seed=3))
    assert batch.info["max_chain_length"] == 2
    assert batch.info["chain_break_rate"] < 0.05
    assert judge(batch.spins, Distribution.boltzmann(problem)).moments > 1e-6


# The distribution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "topology"), corners(list(PROBLEMS), ["zephyr", "pegasus"]))
def test_answers_follow_the_distribution_through_embedding_and_back(name, topology):
    """Alpha 1e-4 a case. Chains so strong that 1.8 * 2 * 5 keeps them from breaking."""
    problem = PROBLEMS[name]()
    device = sampler(topology=topology, chain_strength=1.8)
    batch = device.sample(SamplingRequest(problem, 4_000, beta=0.8, seed=1))
    assert_follows(batch.spins, Distribution.boltzmann(problem, 0.8))
    assert batch.info["chain_break_rate"] < 1e-3
    assert batch.info["scale"] == pytest.approx(0.8 / TRUE_BETA)
    assert judge(batch.spins, Distribution.boltzmann(problem, 0.6)).p_value < 1e-4


def test_problems_beyond_the_ranges_are_hotter_and_info_says_so():
    problem = random_problem(graphs.bipartite(4, 4), seed=8, scale=8.0)
    batch = sampler().sample(SamplingRequest(problem, 4_000, seed=1))
    assert batch.info["is_range_limited"]
    assert batch.info["effective_beta"] < 0.5
    assert_follows(batch.spins, Distribution.boltzmann(problem, batch.info["effective_beta"]))
    assert judge(batch.spins, Distribution.boltzmann(problem, 1.0)).p_value < 1e-4


WEAK = 0.25  # chains of two break with odds of exp(-2.5) times what the fields add


def test_majority_votes_follow_the_distribution_that_enumeration_of_the_qubits_gives():
    problem = random_problem(graphs.complete(5), seed=9)
    device = sampler(chain_strength=WEAK)
    program = device.program(problem)
    assert program.embedding.n_qubits <= 12
    batch = device.sample(SamplingRequest(problem, 6_000, seed=1))
    assert 0.02 < batch.info["chain_break_rate"] < 0.3
    distribution = majority_distribution(program, problem, TRUE_BETA)
    assert distribution.probabilities.sum() == pytest.approx(1.0)
    assert_follows(batch.spins, distribution)
    assert judge(batch.spins, Distribution.boltzmann(problem)).p_value < 1e-4  # what broken chains cost


def test_without_broken_chains_the_distribution_is_that_of_the_problem():
    """The same weak chains; given that all of them hold, the energy is that of the problem."""
    problem = random_problem(graphs.complete(5), seed=9)
    device = sampler(chain_strength=WEAK, chain_break="discard")
    batch = device.sample(SamplingRequest(problem, 6_000, seed=1))
    assert batch.info["chain_break_rate"] > 0.02
    assert len(batch.info["job_ids"]) > 1  # what was discarded was asked for again
    assert_follows(batch.spins, Distribution.boltzmann(problem))


def test_too_many_broken_chains_are_an_error():
    problem = random_problem(graphs.complete(12), seed=9, scale=1.0)
    device = sampler(chain_strength=0.001, chain_break="discard")
    with pytest.raises(InvalidSamples, match="3 jobs.*chain_strength"):
        device.sample(SamplingRequest(problem, 500, seed=1))


def test_gauges_average_the_bias_of_the_device_out(service, monkeypatch):
    """A field of 0.05 on every qubit, 0.25 in units of the problem; 64 gauges leave an eighth of it at random."""
    problem = random_problem(graphs.bipartite(3, 5), seed=5, scale=0.3)
    monkeypatch.setattr(service.solvers["Loop_zephyr"], "bias", 0.05)
    distribution = Distribution.boltzmann(problem)

    def error(device) -> float:
        batch = device.sample(SamplingRequest(problem, 16_000, seed=2))
        return float(np.abs(batch.spins.double().mean(0).numpy() - distribution.mean).max())

    device = sampler()
    alone, averaged = error(device), error(SpinReversed(device, 64))
    assert alone > 0.15
    assert averaged < 0.4 * alone


def test_calibration_finds_the_temperature_of_the_device():
    problem = random_problem(graphs.bipartite(3, 5), seed=5)
    device = Calibrated(sampler(device_beta=8.0), memory=0.0)  # believed 8, true 5
    first = device.sample(SamplingRequest(problem, 8_000, seed=1))
    second = device.sample(SamplingRequest(problem, 8_000, seed=2))
    assert first.info["effective_beta"] == pytest.approx(TRUE_BETA / 8.0, rel=0.1)
    assert second.info["effective_beta"] == pytest.approx(1.0, rel=0.1)
    assert judge(first.spins, Distribution.boltzmann(problem)).p_value < 1e-4
    assert judge(second.spins, Distribution.boltzmann(problem)).moments > 1e-4


def test_a_mock_sampler_stands_in_for_a_solver():
    """MockDWaveSampler around simulated annealing of dwave-samplers, held at the device's temperature."""
    backend = {
        "beta_schedule_type": "custom",
        "beta_schedule": np.concatenate([np.geomspace(0.05, 1.0, 50), np.ones(100)]) * TRUE_BETA,
        "num_sweeps_per_beta": 1,
        "proposal_acceptance_criteria": "Gibbs",
        "randomize_order": True,
    }

    class Anneal(dimod.Sampler):
        parameters, properties, seeds = {"num_reads": []}, {}, count(1)

        def sample(self, bqm, num_reads=1, **ignored):
            seed = next(self.seeds)
            return dwave.samplers.SimulatedAnnealingSampler().sample(bqm, num_reads=num_reads, seed=seed, **backend)

    problem = random_problem(graphs.complete(5), seed=9, scale=0.3)
    mock = MockDWaveSampler(topology_type="pegasus", substitute_sampler=Anneal(), parameter_warnings=False)
    device = DWaveSampler(device=mock, device_beta=TRUE_BETA, chain_strength=0.2, chain_break="discard")
    assert device.name == "DWaveSampler[MockDWaveSampler]"
    batch = device.sample(SamplingRequest(problem, 3_000, seed=1))
    assert batch.info["embedding"] == "clique"
    assert_follows(batch.spins, Distribution.boltzmann(problem))
    with pytest.raises(ValueError, match="`device` is given"):
        DWaveSampler(device=mock, topology="pegasus")


# The service -------------------------------------------------------------------------------------------------------


@pytest.fixture
def problem():
    return random_problem(graphs.bipartite(3, 5), seed=5)


def test_solvers_are_chosen_by_topology_and_by_name():
    assert sampler(topology="pegasus").solver_name == "Loop_pegasus"
    assert sampler(topology=None, solver="Loop_zephyr").solver_name == "Loop_zephyr"
    assert sampler(topology=None).solver_name == "Loop_zephyr"  # the largest
    for choice in ({"topology": "chimera"}, {"solver": "Advantage_system4.1"}):
        with pytest.raises(SamplerUnavailable, match="no such solver"):
            sampler(**choice)


def test_a_prior_cut_from_the_working_graph_needs_no_chains(service):
    device = sampler()
    lattice = service.solvers["Loop_zephyr"].lattice
    assert set(device.working_graph) == set(lattice)
    assert set(map(frozenset, device.working_graph.edges)) == set(map(frozenset, lattice.edges))
    graph = graphs.patch(device.working_graph, 64)
    assert graph.n_nodes == 64
    assert nx.is_connected(graph.to_networkx())
    found = device.embedding(random_problem(graph))
    assert found.kind == "native"
    assert found.n_copies > 1


def test_an_embedding_is_found_once_per_graph_and_kept(problem):
    device = sampler()
    found = device.embedding(problem)
    assert device.embedding(random_problem(graphs.bipartite(3, 5), seed=99)) is found
    assert device.embedding(random_problem(graphs.bipartite(4, 4))) is not found
    revived = pickle.loads(pickle.dumps(device))
    assert np.array_equal(revived.embedding(problem).qubits, found.qubits)
    assert len(revived._embeddings) == 2  # taken over, not looked for again


def test_parameters_travel_and_others_are_refused_before_anything_is_submitted(service, problem):
    device = sampler(parameters={"annealing_time": 50.0})
    n_jobs = len(service.jobs)
    device.sample(SamplingRequest(problem, 10, seed=1, request_id="step-40"))
    job = list(service.jobs.values())[n_jobs]
    assert job.params == {"annealing_time": 50.0, "answer_mode": "raw", "auto_scale": False, "num_reads": 2}
    assert job.label == "step-40"
    schedule = [[0.0, 0.0], [5.0, 0.5], [15.0, 0.5], [20.0, 1.0]]
    device = sampler(parameters={"anneal_schedule": schedule})
    assert device.access_seconds(device.program(problem), 10) > 0
    job = device.sample(SamplingRequest(problem, 10, seed=1)).info["job_ids"][0]
    assert service.jobs[job].params["anneal_schedule"] == schedule
    n_jobs = len(service.jobs)
    for parameters, words in (
        ({"anneal_tme": 5}, r"\['anneal_tme'\] are not allowed. Loop_zephyr takes anneal_schedule, annealing_time,"),
        ({"num_reads": 5}, "num_reads: set by the sampler"),
        ({"annealing_time": 1e6}, "annealing_time=1e.06 is outside the range of Loop_zephyr: 0.5 to 2000"),
        ({"anneal_schedule": [[0.0, 0.0], [5.0, 0.5]]}, "anneal fraction s must equal 1"),
    ):
        with pytest.raises(ValueError, match=words):
            sampler(parameters=parameters)
    for settings in ({"timeout": 0.0}, {"chain_strength": -1.0}, {"chain_break": "vote"}, {"device_beta": np.inf}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            sampler(**settings)
    assert len(service.jobs) == n_jobs


def test_large_requests_are_split_into_jobs_that_the_solver_takes(service, problem, monkeypatch):
    monkeypatch.setattr(service.solvers["Loop_zephyr"], "properties", {"num_reads_range": [1, 100]})
    device = sampler(max_copies=1)
    batch = device.sample(SamplingRequest(problem, 250, seed=1))
    assert len(batch.info["job_ids"]) == 3
    reads = [service.jobs[name].params["num_reads"] for name in batch.info["job_ids"]]
    assert reads == [100, 100, 50]
    monkeypatch.setattr(service.solvers["Loop_zephyr"], "properties", {"problem_run_duration_range": [0.0, 30_000.0]})
    device = sampler(max_copies=1)
    batch = device.sample(SamplingRequest(problem, 100, seed=1))
    assert len(batch.info["job_ids"]) == 2  # 57 reads of 275.5 microseconds after 14,073 of programming


def test_the_requests_of_a_batch_are_under_way_together(service, problem):
    device = patient(1.0)
    service.plan("run", "never", n_times=3)
    n_jobs = len(service.jobs)
    with pytest.raises(SamplerTimeout):
        device.sample_batch([SamplingRequest(problem, 10, seed=seed) for seed in range(3)])
    assert len(service.jobs) == n_jobs + 3
    deadline = time.monotonic() + 20.0
    while any(job.status == "PENDING" for job in service.jobs.values()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [job.status for job in service.jobs.values()][n_jobs:] == ["CANCELLED"] * 3


def test_access_time_is_in_the_ledger_and_was_known_before(problem):
    device = sampler()
    broker = Broker(device)
    for purpose in ("negative_phase", "diagnostics"):
        broker.submit(SamplingRequest(problem, 80, seed=1, purpose=purpose))
    broker.dispatch(0)
    broker.collect(0)
    expected = device.access_seconds(device.program(problem), 160)
    assert expected == pytest.approx(1e-6 * (14072.88 + 20 * 275.54))  # eight copies
    assert broker.ledger.n_trips == 1
    assert broker.ledger.device_seconds == pytest.approx(2 * expected / 2)  # merged, then reported for both parts


def test_the_ready_chain_has_its_layers_and_is_what_the_name_builds(problem):
    ready = build_sampler("dwave")
    assert ready.name == "Calibrated(SpinReversed(Retrying(DWaveSampler[Loop_zephyr])))"
    assert ready.traits.is_remote
    ready = Polished(build_dwave_sampler(device_beta=8.0, topology="zephyr", n_gauges=2))
    for seed in range(3):
        batch = ready.sample(SamplingRequest(problem, 4_000, seed=seed))
    assert_follows(batch.spins, Distribution.boltzmann(problem))
    assert batch.info["gain"] == pytest.approx(TRUE_BETA / 8.0, rel=0.1)
    assert batch.info["n_gauges"] == 2
    assert batch.info["n_attempts"] == 1


# Faults ------------------------------------------------------------------------------------------------------------

FAULTS = [
    ("submit", "401", SamplerUnavailable, "does not accept the credentials"),
    ("submit", "403", SamplerUnavailable, "does not accept the credentials"),
    ("submit", "429", SamplerUnavailable, "takes no more requests for now"),
    ("submit", "500", SamplerUnavailable, "failed or cannot be reached"),
    ("submit", "503", SamplerUnavailable, "failed or cannot be reached"),
    ("submit", "malformed", SamplerUnavailable, "JSON response expected"),
    ("submit", "nonsense", SamplerUnavailable, "'id' missing"),
    ("submit", "reset", SamplerUnavailable, "failed or cannot be reached"),
    ("poll", "401", SamplerUnavailable, "does not accept the credentials"),
    ("poll", "malformed", SamplerUnavailable, "JSON response expected"),
    ("answer", "500", SamplerUnavailable, "failed or cannot be reached"),
    ("answer", "malformed", SamplerUnavailable, "JSON response expected"),
    ("run", "offline", SamplerUnavailable, "offline"),
    ("run", "failed", SamplerUnavailable, "Internal error"),
    ("run", "budget", BudgetExceeded, "no access time left"),
    ("run", "truncated", InvalidSamples, "cannot be read"),
    ("run", "short", InvalidSamples, "has 12 of 25 reads"),
    ("run", "never", SamplerTimeout, "did not answer within 2 s"),
    ("submit", "hang", SamplerTimeout, "did not answer"),
]


@pytest.mark.parametrize(("place", "fault", "kind", "words"), FAULTS, ids=[f"{p}-{f}" for p, f, _, _ in FAULTS])
def test_every_fault_ends_in_an_error_of_its_kind_in_time(service, problem, place, fault, kind, words):
    device = patient(2.0)
    request = SamplingRequest(problem, 200, seed=1)
    service.plan(place, fault, n_times=1 if fault != "reset" else 5)
    started = time.monotonic()
    with pytest.raises(kind, match=words) as caught:
        device.sample(request)
    assert type(caught.value) is kind
    assert time.monotonic() - started < 5.0
    assert device._trips == []
    service.calm()
    assert device.sample(request).n_samples == 200  # the client has survived


def test_training_outlives_every_fault(service):
    """A request every two steps, and a fault for each of the first; those that come after are answered."""
    adata = synthetic_counts(n_cells=240, n_genes=30, seed=0)
    QBMSCVI.setup_anndata(adata)
    device = patient(2.0)
    model = QBMSCVI(adata, n_latent=8, prior_graph=graphs.patch(device.working_graph, 8), n_chains=64)
    faults = [(place, fault) for place, fault, *_ in FAULTS]

    class Unlucky(Wrapper):
        def _sample_batch(self, requests, seeds):
            service.calm()
            if faults:
                place, fault = faults.pop(0)
                service.plan(place, fault, n_times=5 if fault == "reset" else 1)
            asked = [replace(request, seed=seed) for request, seed in zip(requests, seeds, strict=True)]
            return [pass_on(batch) for batch in self.child.sample_batch(asked)]

    schedule = SamplingSchedule(every_n_steps=1, latency=2)
    with pytest.warns(RuntimeWarning, match="Block Gibbs"):
        model.train(max_epochs=16, batch_size=64, sampler=Unlucky(device), schedule=schedule, callbacks=[Pace()])
    sampling = model.trainer.lightning_module.sampling
    assert sampling.n_fallbacks == len(FAULTS)
    assert sampling.broker.ledger.n_samples > 0
    assert np.isfinite(model.get_latent_representation()).all()


def test_server_errors_while_polling_are_waited_out(service, problem):
    service.plan("poll", "503", n_times=3)
    assert sampler().sample(SamplingRequest(problem, 50, seed=1)).n_samples == 50


@pytest.mark.parametrize(("fault", "kind"), [("401", SamplerUnavailable), ("hang", SamplerTimeout)])
def test_a_service_that_lists_no_solvers_is_an_error_in_time(service, fault, kind):
    service.plan("list", fault, n_times=5)
    started = time.monotonic()
    with pytest.raises(kind):
        sampler(timeout=2.0)
    assert time.monotonic() - started < 6.0


def test_offline_solvers_are_not_chosen(service):
    service.solvers["Loop_zephyr"].status = "OFFLINE"
    assert sampler(topology=None).solver_name == "Loop_pegasus"


def test_an_account_that_is_not_configured_says_what_to_do(configured, monkeypatch):
    (configured / "dwave.conf").write_text("[defaults]\n")
    with pytest.raises(SamplerUnavailable, match="dwave config create"):
        sampler()
    monkeypatch.setenv("DWAVE_CONFIG_FILE", str(configured / "not-there.conf"))
    with pytest.raises(SamplerUnavailable, match="DWAVE_API_TOKEN"):
        sampler()


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dwave.system", None)
    with pytest.raises(SamplerUnavailable, match=r"pip install 'qbmscvi\[dwave\]'"):
        sampler()


def test_retries_are_as_many_as_documented(service, problem):
    device = Retrying(sampler(), n_attempts=3, pause=0.01)
    service.heard.clear()
    service.plan("submit", "500", n_times=3)
    with pytest.raises(SamplerUnavailable):
        device.sample(SamplingRequest(problem, 10, seed=1))
    assert [method for method, _ in service.heard].count("POST") == 3
    service.plan("submit", "500", n_times=2)
    assert device.sample(SamplingRequest(problem, 10, seed=1)).info["n_attempts"] == 3


def job_under_way(device: DWaveSampler) -> str:
    """Id of the first job, as soon as the service has given it one."""
    deadline = time.monotonic() + 20.0
    while not (device._trips and device._trips[0].jobs and device._trips[0].jobs[0].id):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return device._trips[0].jobs[0].id


def test_cancel_reaches_the_job(service, problem):
    device = sampler()
    service.plan("run", "never")
    answer = call_in_background(device.sample, SamplingRequest(problem, 10, seed=1))
    n_canceled = len(service.canceled)
    deadline = time.monotonic() + 20.0
    job = job_under_way(device)
    SpinReversed(device).cancel()  # from another thread, through a wrapper
    with pytest.raises(SamplerUnavailable, match="canceled"):
        answer.result(timeout=20.0)
    while len(service.canceled) == n_canceled and time.monotonic() < deadline:
        time.sleep(0.01)
    assert service.canceled[n_canceled:] == [job]
    assert service.jobs[job].status == "CANCELLED"


def test_jobs_that_took_too_long_are_canceled_on_the_device(service, problem):
    device = patient(0.5)
    service.plan("run", "never")
    with pytest.raises(SamplerTimeout):
        device.sample(SamplingRequest(problem, 10, seed=1))
    deadline = time.monotonic() + 20.0
    while "CANCELLED" not in [job.status for job in service.jobs.values()][-1:] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(service.jobs.values())[-1].status == "CANCELLED"


def test_closing_waits_for_nobody(service, problem):
    device = sampler()
    service.plan("run", "never")
    answer = call_in_background(device.sample, SamplingRequest(problem, 10, seed=1))
    job_under_way(device)
    started = time.monotonic()
    device.close()
    assert time.monotonic() - started < 1.0
    with pytest.raises(SamplerError):
        answer.result(timeout=20.0)
    assert device.sample(SamplingRequest(problem, 10, seed=1)).n_samples == 10  # opened anew


# Secrets -----------------------------------------------------------------------------------------------------------


def test_the_token_is_nowhere_but_in_the_requests(service, problem, configured, caplog):
    """Names, states, recordings, logs and tracebacks with all local variables; the token is what the server demands."""
    caplog.set_level(logging.DEBUG)
    assert TOKEN in (configured / "dwave.conf").read_text()
    device = patient(1.0)
    stack = Recorded(Polished(Calibrated(SpinReversed(Retrying(device, pause=0.01), 2)), 2), configured / "recording")
    seen = []
    batch = stack.sample(SamplingRequest(problem, 100, seed=1))
    for place, fault in (
        ("submit", "401"),
        ("submit", "500"),
        ("poll", "reset"),
        ("run", "truncated"),
        ("run", "never"),
    ):
        service.plan(place, fault, n_times=20)
        try:
            stack.sample(SamplingRequest(problem, 20, seed=1))
        except SamplerError as error:
            trace = traceback.TracebackException.from_exception(error, capture_locals=True)
            seen += [*trace.format(), repr(error), pickle.dumps(error).decode("latin-1")]
            links = []
            while error is not None:
                links.append(error)
                error = error.__cause__ or error.__context__
            assert {type(link).__module__ for link in links} == {"qbmscvi.exceptions"}
        service.calm()
    assert len(seen) > 5 * 5
    seen += [repr(device), str(stack), repr(batch.info), pickle.dumps(device).decode("latin-1")]
    seen += [repr(device.__getstate__()), (configured / "recording").read_text(), caplog.text]
    assert [text for text in seen if TOKEN in text] == []
    assert "dwave.cloud" in caplog.text  # D-Wave's client did log


def test_a_token_that_a_library_quotes_is_taken_out(configured):
    (configured / "dwave.conf").write_text(f"[defaults]\nendpoint = http://127.0.0.1:9/\ntoken = {TOKEN}\n")
    from qbmscvi.samplers.dwave._errors import guarded

    def quote():
        raise RuntimeError(f"bad header {TOKEN}")

    _, error = guarded(quote, profile=None)
    assert "[token]" in str(error)
    assert TOKEN not in str(error)
