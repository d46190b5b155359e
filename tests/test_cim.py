"""The simulated coherent Ising machine, and the matrix that it shares with a real one.

Sign, ancilla, scale and rounding are checked by enumeration. Gates on samples: alpha 1e-4 (``oracles.judge``).
"""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
import torch
from oracles import PROBLEMS, Distribution, assert_follows, energy_table, judge, random_problem, state_table
from tables import corners

from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.ising import IsingModel
from qbmscvi.exceptions import GraphMismatchError, InvalidSamples, SamplerUnavailable
from qbmscvi.samplers import (
    CoherentIsingSampler,
    SamplingRequest,
    Vetted,
    build_coherent_ising_sampler,
    build_sampler,
    effective_beta,
    vet,
)
from qbmscvi.samplers._background import call_in_background
from qbmscvi.samplers.kaiwu._ising_matrix import IsingMatrix, fill_up

each_problem = pytest.mark.parametrize("name", PROBLEMS)


def with_ancilla(spins: np.ndarray, ancilla: int) -> np.ndarray:
    """States of the machine: flipped as a whole where the ancilla is down."""
    return ancilla * np.concatenate([spins, np.ones((len(spins), 1), dtype=spins.dtype)], axis=1)


def moment_error(spins: torch.Tensor, distribution: Distribution) -> float:
    """Largest deviation of a mean spin or a pair product."""
    rows = spins.double().numpy()
    i, j = np.triu_indices(rows.shape[1], 1)
    errors = np.concatenate([rows.mean(0) - distribution.mean, (rows.T @ rows / len(rows) - distribution.second)[i, j]])
    return float(np.abs(errors).max())


# The matrix --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "beta", "ancilla"), corners(list(PROBLEMS), [0.5, 3.0, 100.0], [-1, 1]))
def test_the_matrix_has_the_energies_of_the_problem(name, beta, ancilla):
    """All states, against sums written out over edges; up to the rounding that is reported."""
    problem = PROBLEMS[name]()
    program = IsingMatrix.from_problem(problem, beta, device_beta=2.0, n_bits=24)
    M = program.values
    assert np.array_equal(M, M.T)
    assert not M.diagonal().any()
    states = with_ancilla(state_table(problem.n_spins), ancilla)
    H = np.array([-(s @ M.astype(float) @ s) for s in states])
    assert np.array_equal(program.energy(states), H)
    energies = H / (2 * (2**23 - 1) * program.scale)
    difference = energies - energy_table(problem)
    assert np.ptp(difference) < 1e-4  # the offset remains
    assert program.scale <= beta / 2.0
    assert program.is_range_limited == (program.scale < beta / 2.0)


@each_problem
def test_rounding_is_what_is_reported(name):
    problem = PROBLEMS[name]()
    coarse, fine = (IsingMatrix.from_problem(problem, 1.0, 2.0, n_bits) for n_bits in (8, 30))
    exact = fine.values / (2**29 - 1)
    error = (coarse.values / 127 - exact)[np.triu(exact != 0)] / coarse.scale
    assert coarse.rounding_error == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-4)
    assert np.abs(error).max() * coarse.scale <= 0.5 / 127 + 1e-9
    assert coarse.scale == fine.scale == 0.5  # not that of the largest coupling


def test_what_does_not_fit_the_range_is_scaled_down_and_not_clipped():
    problem = IsingModel(torch.tensor([8.0, -2.0]), torch.tensor([4.0]), graphs.complete(2))
    program = IsingMatrix.from_problem(problem, beta=1.0, device_beta=0.5, n_bits=8)
    assert program.is_range_limited
    assert program.scale == pytest.approx(1 / 8)
    assert program.values.tolist() == [[0, -63, -127], [-63, 0, 32], [-127, 32, 0]]
    flat = IsingModel(torch.zeros(2), torch.zeros(1), graphs.complete(2))
    assert not IsingMatrix.from_problem(flat, 1.0, 0.5, 8).values.any()


@each_problem
def test_answers_are_read_against_the_ancilla_in_random_order(name):
    problem = PROBLEMS[name]()
    program = IsingMatrix.from_problem(problem, 1.0, 2.0, 8)
    distribution = Distribution.boltzmann(problem)
    drawn = distribution.draw(500, seed=1).numpy()
    flips = np.random.default_rng(0).choice([-1, 1], size=(500, 1))
    states = flips * with_ancilla(drawn, 1)
    spins, facts = program.read(states, 500, np.random.default_rng(0))
    assert not facts["is_sorted"]
    assert not facts["is_deduplicated"]
    assert sorted(map(tuple, spins.tolist())) == sorted(map(tuple, drawn.tolist()))
    assert not np.array_equal(spins.numpy(), drawn)
    states = states[np.argsort(program.energy(states), kind="stable")]
    spins, facts = program.read(states, 500, np.random.default_rng(0))
    assert facts["is_sorted"]
    energies = problem.energy(spins)
    assert bool((energies.diff() < 0).any())
    states = np.unique(with_ancilla(drawn, 1), axis=0)
    _, facts = program.read(states, 500, np.random.default_rng(0))
    assert facts["n_distinct"] == len(states)
    assert facts["is_deduplicated"]  # fewer than 500
    is_suspect = IsingMatrix.read(program, states, len(states), np.random.default_rng(0))[1]["is_deduplicated"]
    assert is_suspect == (len(states) * (len(states) - 1) / 2 > 13.9 * 2**problem.n_spins)


def test_answers_of_another_form_are_refused():
    program = IsingMatrix.from_problem(PROBLEMS["complete-6"](), 1.0, 2.0, 8)
    rng = np.random.default_rng(0)
    for states, words in (
        (np.ones((4, 6)), r"shape \(4, 6\)"),
        (np.ones((0, 7)), r"shape \(0, 7\)"),
        (np.ones(7), r"shape \(7,\)"),
        (np.zeros((4, 7)), "values other than"),
        (np.full((4, 7), np.nan), "values other than"),
    ):
        with pytest.raises(InvalidSamples, match=words):
            program.read(states, 4, rng)


def test_candidates_are_repeated_equally_often():
    states = torch.tensor([[1, 1], [1, -1], [-1, 1]], dtype=torch.int8)
    counts = fill_up(states, 11, np.random.default_rng(0)).unique(dim=0, return_counts=True)[1]
    assert sorted(counts.tolist()) == [3, 4, 4]
    assert len(fill_up(states, 2, np.random.default_rng(0)).unique(dim=0)) == 2


# The machine -------------------------------------------------------------------------------------------------------


@each_problem
def test_ground_states_are_found_where_it_is_asked_for_cold_ones(name):
    """At the end of the range; in ten times as many runs as by chance, and in next to none of the negative problem."""
    problem = PROBLEMS[name]()
    machine = CoherentIsingSampler(noise=0.2)
    batch = machine.sample(SamplingRequest(problem, 200, beta=1e3, seed=1))
    assert batch.info["is_range_limited"]
    lowest = energy_table(problem).min()
    share = float((batch.energies < lowest + 1e-6).double().mean())
    assert share > 10 * 2.0**-problem.n_spins
    negative = IsingModel(-problem.h, -problem.J, problem.graph)
    spins = machine.sample(SamplingRequest(negative, 200, 1e3, seed=1)).spins
    assert float((problem.energy(spins) < lowest + 1e-6).double().mean()) < 0.2 * share


@each_problem
def test_calibration_and_polish_make_boltzmann_samples_of_what_is_none(name, capsys):
    """5,000 samples at twice the usual inverse temperature; moments, whose error is at most 1 / sqrt(5000) = 0.014."""
    problem, beta, n_samples = PROBLEMS[name](), 2.0, 5_000
    distribution = Distribution.boltzmann(problem, beta)
    raw = CoherentIsingSampler().sample(SamplingRequest(problem, n_samples, beta, seed=1))
    stack = build_coherent_ising_sampler()
    for seed in range(2, 6):
        mended = stack.sample(SamplingRequest(problem, n_samples, beta, seed=seed))
    before, after = moment_error(raw.spins, distribution), moment_error(mended.spins, distribution)
    with capsys.disabled():
        print(f"\n{name}: largest error of a moment {before:.3f} raw, {after:.3f} calibrated and polished")
    assert judge(raw.spins, distribution).p_value < 1e-10
    assert before > 0.1
    assert_follows(mended.spins, distribution)
    assert after < 5 / np.sqrt(n_samples)
    assert mended.info["effective_beta"] == pytest.approx(beta, rel=0.1)


def test_limits_are_those_of_the_devices():
    machine = CoherentIsingSampler(n_physical_spins=550)
    assert machine.traits.max_spins == 549
    machine.check(random_problem(graphs.independent(549)))
    with pytest.raises(GraphMismatchError, match="550 spins.*CoherentIsingSampler.*549"):
        machine.sample(SamplingRequest(random_problem(graphs.independent(550)), 1))
    for settings in ({"device_beta": 0.0}, {"noise": -1.0}, {"feedback": np.inf}, {"pump": 1.0}, {"latency": -1.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            CoherentIsingSampler(**settings)
    for settings in ({"n_bits": 1}, {"n_physical_spins": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}=1 is too small"):
            CoherentIsingSampler(**settings)


def test_the_machine_sorts_and_may_leave_repetitions_out():
    problem = PROBLEMS["complete-6"]()
    program = IsingMatrix.from_problem(problem, 2.0, 2.5, 8)
    states = CoherentIsingSampler().solve(program.values, 300, seed=1)
    assert states.shape == (300, 7)
    assert (np.diff(program.energy(states)) >= 0).all()
    few = CoherentIsingSampler(deduplicates=True).solve(program.values, 300, seed=1)
    distinct = np.unique(states * states[:, -1:], axis=0)
    assert np.array_equal(np.unique(few * few[:, -1:], axis=0), distinct)
    assert len(few) == len(distinct) < 64
    request = SamplingRequest(problem, 300, 2.0, seed=1)
    full = CoherentIsingSampler().sample(request)
    assert full.info["is_sorted"]
    batch = CoherentIsingSampler(deduplicates=True).sample(request)
    assert batch.info["is_deduplicated"]
    assert batch.info["n_distinct"] == len(few)
    # Without multiplicities the answer is far too hot.
    assert effective_beta(problem, batch).value < 0.6 * effective_beta(problem, full).value


def test_answers_take_their_time_and_can_be_given_up():
    machine = CoherentIsingSampler(latency=30.0)
    assert machine.traits.is_remote
    answer = call_in_background(machine.sample, SamplingRequest(PROBLEMS["complete-6"](), 10, seed=1))
    time.sleep(0.2)
    started = time.monotonic()
    machine.cancel()
    with pytest.raises(SamplerUnavailable, match="canceled"):
        answer.result(timeout=20.0)
    assert time.monotonic() - started < 10.0
    assert pickle.loads(pickle.dumps(machine)).latency == 30.0


def test_the_name_builds_it_and_training_vets_it():
    sampler = build_sampler("coherent_ising")
    assert sampler.name == "Polished(Calibrated(CoherentIsingSampler))"
    assert sampler.traits.target == "approximate"
    assert isinstance(vet(sampler), Vetted)
