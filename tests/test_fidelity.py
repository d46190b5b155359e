"""What a device would make of a problem, against enumeration in numpy and against samples of the loopback service."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from annealer import majority_distribution
from devices import annealer_service, connected
from oracles import Distribution, random_problem, state_table

from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.ising import IsingModel
from qbmscvi.diagnostics import device_fidelity
from qbmscvi.exceptions import GraphMismatchError
from qbmscvi.samplers import DWaveSampler, SamplingRequest

BETA = 5.0  # of the service


def device(**settings) -> DWaveSampler:
    return connected(DWaveSampler, **{"device_beta": BETA, **settings})


def divergence(p: Distribution, q: Distribution) -> float:
    return float(p.probabilities @ (np.log(p.probabilities) - np.log(q.probabilities)))


def intact_distribution(program, problem: IsingModel, h, J, beta: float) -> Distribution:
    """Distribution over spins of what the qubits of a copy are programmed to, all chains intact."""
    embedding, states = program.embedding, state_table(problem.n_spins)
    qubits = states[:, embedding.spin_of]
    energy = qubits @ h + (qubits[:, embedding.couplers[:, 0]] * qubits[:, embedding.couplers[:, 1]]) @ J
    weights = np.exp(-beta * (energy - energy.min()))
    return Distribution(states, energy, weights / weights.sum())


def test_a_problem_that_fits_without_chains_loses_nothing():
    problem = random_problem(graphs.bipartite(4, 5), seed=1)
    report = device_fidelity(device(), problem, beta=0.7)
    assert (report.method, report.kl_scale, report.max_chain_length, report.chain_break_rate) == ("exact", 0.0, 1, 0.0)
    assert report.kl == pytest.approx(0.0, abs=1e-9)
    assert report.effective_beta == pytest.approx(0.7)
    assert not report.is_range_limited


@pytest.mark.parametrize("chain_strength", [0.15, 0.4])
@pytest.mark.parametrize("n_bits", [None, 5])
def test_broken_chains_and_rounding_match_enumeration(chain_strength, n_bits):
    problem = random_problem(graphs.complete(5), seed=9)
    sampler = device(chain_strength=chain_strength)
    report = device_fidelity(sampler, problem, n_bits=n_bits)
    program = sampler.program(problem)
    h, J = program.h, program.J
    if n_bits:
        h, J = 4.0 / 15 * np.round(h * 15 / 4.0), 2.0 / 15 * np.round(J * 15 / 2.0)
    rounded = type(program)(program.embedding, h, J, program.scale, program.chain_strength, False)
    expected = divergence(Distribution.boltzmann(problem), majority_distribution(rounded, problem, BETA))
    assert report.counts_broken_chains
    assert report.kl == pytest.approx(expected, rel=1e-9)
    assert report.kl > 5e-4


def test_discarded_samples_leave_the_divergence_of_intact_chains():
    problem = random_problem(graphs.complete(5), seed=9)
    sampler = device(chain_strength=0.15, chain_break="discard")
    assert device_fidelity(sampler, problem).kl == pytest.approx(0.0, abs=1e-9)
    report, program = device_fidelity(sampler, problem, n_bits=5), sampler.program(problem)
    h, J = 4.0 / 15 * np.round(program.h * 15 / 4.0), 2.0 / 15 * np.round(program.J * 15 / 2.0)
    assert report.kl == pytest.approx(
        divergence(Distribution.boltzmann(problem), intact_distribution(program, problem, h, J, BETA))
    )
    assert not report.counts_broken_chains


def test_ranges_and_a_wrong_temperature_match_enumeration():
    problem = random_problem(graphs.bipartite(4, 4), seed=8, scale=8.0)
    report = device_fidelity(device(), problem)
    assert report.is_range_limited
    hot = Distribution.boltzmann(problem, report.effective_beta)
    assert report.kl == pytest.approx(divergence(Distribution.boltzmann(problem), hot), rel=1e-6)
    cool = random_problem(graphs.bipartite(4, 4), seed=8)
    report = device_fidelity(device(device_beta=8.0), cool, device_beta=BETA)
    assert report.kl == pytest.approx(
        divergence(Distribution.boltzmann(cool), Distribution.boltzmann(cool, BETA / 8.0)), rel=1e-6
    )


def test_estimates_agree_with_enumeration():
    """Four standard errors of 4,000 independent Gibbs chains; the exact value is far from zero in these units."""
    problem = random_problem(graphs.bipartite(6, 6), seed=3, scale=0.3)
    sampler = device(device_beta=8.0)
    exact = device_fidelity(sampler, problem, device_beta=BETA, n_bits=8)
    estimate = device_fidelity(sampler, problem, device_beta=BETA, n_bits=8, n_samples=4_000, method="estimate")
    assert estimate.method == "estimate"
    assert 0.0 < estimate.kl_scale < 0.2 * exact.kl
    assert abs(estimate.kl - exact.kl) < 4.0 * estimate.kl_scale
    assert exact.kl > 20.0 * estimate.kl_scale / 4.0


def test_the_rate_of_breaks_is_what_the_service_answers(capsys):
    """Exact for 12 qubits; chain by chain for more, where it neglects that breaks make each other likelier."""
    for n_spins, tolerance in ((5, 0.1), (12, 0.35)):
        problem = random_problem(graphs.complete(n_spins), seed=9, scale=0.3)
        sampler = device(chain_strength=0.25)
        report = device_fidelity(sampler, problem)
        measured = sampler.sample(SamplingRequest(problem, 4_000, seed=1)).info["chain_break_rate"]
        with capsys.disabled():
            print(
                f"\n{n_spins} spins: {report.chain_break_rate:.4f} of the chains expected to break, {measured:.4f} did"
            )
        assert report.chain_break_rate == pytest.approx(measured, rel=tolerance)


def test_nothing_is_submitted_and_the_access_time_is_told():
    service = annealer_service()
    n_jobs = len(service.jobs)
    report = device_fidelity(device(), random_problem(graphs.complete(6)), n_samples=800)
    assert len(service.jobs) == n_jobs
    assert report.n_copies == 8
    assert report.access_seconds == pytest.approx(1e-6 * (14072.88 + 100 * 275.54))


def test_large_problems_are_estimated_and_bad_arguments_refused():
    sampler = device()
    patch = random_problem(graphs.patch(sampler.working_graph, 60), seed=2, scale=0.2)
    report = device_fidelity(sampler, patch, n_bits=6, n_samples=500)
    assert report.method == "estimate"
    assert report.kl > 3.0 * report.kl_scale > 0.0
    with pytest.raises(GraphMismatchError, match="at most 20"):
        device_fidelity(sampler, patch, method="exact")
    for wrong in ({"method": "fast"}, {"n_bits": 1}):
        with pytest.raises(ValueError, match="'auto', 'exact' or 'estimate'"):
            device_fidelity(sampler, patch, **wrong)
    with pytest.raises(GraphMismatchError, match="was not found"):
        device_fidelity(sampler, IsingModel(torch.zeros(400), torch.zeros(79800), graphs.complete(400)))
    assert math.isfinite(report.kl)
