"""Wrappers: each removes from a bad child what it says it removes, and nests.

That they keep the distribution of a good child is tested in ``test_sampler_contract.py``. The bad child is a device as
annealers are: one temperature that is not the one believed, a field that it adds to every spin, limited ranges and
eight bits. What it does is known exactly, so that what a wrapper leaves is, too.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from devices import BELIEVED_BETA, TRUE_BETA, Device, Faulty, OffTemperature, rescaled
from dwave.samplers import RandomSampler, SteepestDescentSampler
from oracles import Distribution, assert_follows, block_gibbs_distribution, random_problem
from tables import corners, over

from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.ising import IsingModel
from qbmscvi.exceptions import GraphMismatchError, InvalidSamples, SamplerError
from qbmscvi.samplers import (
    BlockGibbsSampler,
    Budgeted,
    Calibrated,
    DimodSampler,
    Draw,
    ExactSampler,
    Polished,
    Rescaled,
    Retrying,
    Sampler,
    SamplerTraits,
    SamplingRequest,
    SpinReversed,
    effective_beta,
)
from qbmscvi.samplers.testing import assert_boltzmann, compare_with_boltzmann, tiny_problems

PROBLEMS = tiny_problems()
each_problem = pytest.mark.parametrize("name", list(PROBLEMS))


class Spy(ExactSampler):
    """Keeps what it was asked."""

    def __init__(self):
        self.requests = []
        self.n_trips = 0

    def _sample_batch(self, requests, seeds):
        self.requests += requests
        self.n_trips += 1
        return super()._sample_batch(requests, seeds)


class Frozen(Sampler):
    """Chains of zero moves."""

    traits = SamplerTraits(is_persistent=True)

    def _sample(self, request, seed):
        return Draw(request.initial_spins)


class Reporting(ExactSampler):
    """Tells the device time and the fields and couplings of every request."""

    def _sample(self, request, seed):
        return replace(super()._sample(request, seed), info={"device_seconds": 2.0, "chain_breaks": 0.01})


def ask(sampler, problem, n_samples=2000, beta=1.0, seed=0, **kwargs):
    return sampler.sample(SamplingRequest(problem, n_samples, beta, seed=seed, **kwargs))


# The device --------------------------------------------------------------------------------------------------------


def worst_mean(batch, distribution) -> float:
    return float(np.abs(batch.spins.double().mean(0).numpy() - distribution.mean).max())


def answers_by_layer(problem, n):
    """Answers of the device, a further layer around it each time; also for ``benchmarks/sampling.py``."""
    bare = rescaled(Device())
    reversed_ = SpinReversed(rescaled(Device()), 400)
    calibrated = Calibrated(SpinReversed(rescaled(Device()), 400))
    polished = Polished(Calibrated(SpinReversed(rescaled(Device()), 400)), 10)
    return {
        "Rescaled": ask(bare, problem, n, seed=1),
        "SpinReversed": ask(reversed_, problem, n, seed=1),
        "Calibrated, first answer": ask(calibrated, problem, n, seed=2),
        "Calibrated, second answer": ask(calibrated, problem, n, seed=3),
        "Polished, first answer": ask(polished, problem, n, seed=2),
        "Polished, second answer": ask(polished, problem, n, seed=3),
    }


def test_each_layer_around_a_device_removes_what_it_says(capsys):
    problem, n = PROBLEMS["bipartite-3x5"].to(torch.float32), 40_000
    target = Distribution.boltzmann(problem, 1.0)
    hot = Distribution.boltzmann(problem, TRUE_BETA / BELIEVED_BETA)
    noise = np.sqrt((1 - target.mean**2) / n).max()

    batches = answers_by_layer(problem, n)
    worst = {stage: worst_mean(batch, target) for stage, batch in batches.items()}
    worst_hot = {stage: worst_mean(batch, hot) for stage, batch in batches.items()}
    with capsys.disabled():
        print(f"\nlargest error of <s_i>, one standard error {noise:.4f}; in brackets against the distribution at 0.74")
        for stage in batches:
            print(f"  {stage:26} {worst[stage]:.4f}  ({worst_hot[stage]:.4f})")

    # The field is gone: what is left is the distribution at the true temperature.
    assert worst_hot["Rescaled"] > 10 * noise
    assert worst_hot["SpinReversed"] < 5 * noise
    assert worst["SpinReversed"] > 10 * noise
    # The temperature is measured, and right from the second answer on.
    info = batches["Calibrated, first answer"].info
    assert abs(info["effective_beta"] - TRUE_BETA / BELIEVED_BETA) < 1.96 * info["effective_beta_scale"]
    assert worst["Calibrated, first answer"] > 10 * noise
    assert worst["Calibrated, second answer"] < 5 * noise
    info = batches["Calibrated, second answer"].info
    assert abs(info["effective_beta"] - 1.0) < 4 * info["effective_beta_scale"]
    # Ten sweeps at the right temperature repair what is left, and most of it before anything is calibrated.
    assert worst["Polished, first answer"] < 5 * noise
    assert_boltzmann(problem, batches["Polished, second answer"], 1.0)
    # By themselves the layers below are not enough.
    for stage in ("Rescaled", "SpinReversed", "Calibrated, first answer"):
        assert compare_with_boltzmann(problem, batches[stage], 1.0).p_value < 1e-6


def test_gauges_average_a_field_out_up_to_second_order():
    """The mean over all 256 gauges, enumerated: above 0.1 before, 0.006 after."""
    problem, bias = PROBLEMS["bipartite-3x5"].scaled(1 / BELIEVED_BETA), Device().bias
    target = Distribution.boltzmann(problem, TRUE_BETA).mean
    means = [
        Distribution.boltzmann(replace(problem, h=problem.h + bias * torch.tensor(gauge)), TRUE_BETA).mean
        for gauge in itertools.product((-1.0, 1.0), repeat=8)
    ]
    assert np.abs(means[-1] - target).max() > 0.1
    assert np.abs(np.mean(means, axis=0) - target).max() < 0.007


def test_many_gauges_leave_no_field_beyond_their_standard_error():
    """Standard errors from the spread between 400 gauges of 50 samples; 5 of them over 8 spins, alpha 5e-6."""
    problem, n_gauges = PROBLEMS["bipartite-3x5"], 400
    distribution = Distribution.boltzmann(problem, TRUE_BETA / BELIEVED_BETA)
    batch = ask(SpinReversed(rescaled(Device()), n_gauges), problem, 50 * n_gauges, seed=4)
    by_gauge = batch.spins.double().reshape(n_gauges, 50, 8).mean(1).numpy()
    z = (by_gauge.mean(0) - distribution.mean) / (by_gauge.std(0, ddof=1) / np.sqrt(n_gauges))
    assert np.abs(z).max() < 5
    plain = ask(rescaled(Device()), problem, 50 * n_gauges, seed=4)
    assert (np.abs(plain.spins.double().mean(0).numpy() - distribution.mean) > 0.05).sum() >= 6


# Rescaled ----------------------------------------------------------------------------------------------------------


@over(("h_limit", "J_limit"), [(1.0, 0.5), (0.01, None), (None, 3.0), (100.0, 1e-3)], ids=str)
@over("size", [1e-6, 1.0, 1e6])
def test_rescaled_scales_and_never_clips(h_limit, J_limit, size):
    """The child's problem is a multiple of the caller's, fills a range, and beta takes the multiple up."""
    problem, spy = random_problem(graphs.bipartite(3, 4), seed=1, scale=size), Spy()
    batch = ask(Rescaled(spy, h_limit=h_limit, J_limit=J_limit), problem, 5, beta=0.7 / size)
    asked, scale = spy.requests[0], batch.info["scale"]
    assert torch.allclose(asked.problem.h, problem.h * scale, rtol=1e-12, atol=0)
    assert torch.allclose(asked.problem.J, problem.J * scale, rtol=1e-12, atol=0)
    assert asked.beta * scale == pytest.approx(0.7 / size, rel=1e-12)
    shares = [float(v.abs().max()) / lim for v, lim in ((asked.problem.h, h_limit), (asked.problem.J, J_limit)) if lim]
    assert max(shares) == pytest.approx(1.0, rel=1e-12)
    assert batch.info["effective_beta"] == pytest.approx(0.7 / size, rel=1e-12)
    assert not batch.info["is_range_limited"]
    assert "rounding_error" not in batch.info
    assert torch.allclose(batch.energies, problem.energy(batch.spins))


@pytest.mark.parametrize("n_bits", [None, 8])
def test_limits_hold_to_the_last_bit(n_bits):
    """A device compares with its limits exactly."""
    for seed in range(50):
        problem, spy = random_problem(graphs.bipartite(2, 3), seed=seed, dtype=torch.float32), Spy()
        ask(Rescaled(spy, h_limit=0.3, J_limit=0.3, n_bits=n_bits), problem, 1)
        seen = spy.requests[0].problem
        assert float(seen.h.abs().max()) <= 0.3
        assert float(seen.J.abs().max()) <= 0.3


def test_a_fixed_temperature_sets_the_scale():
    problem, spy = PROBLEMS["complete-6"], Spy()
    batch = ask(Rescaled(spy, h_limit=1, J_limit=1, device_beta=5.0), problem, 5, beta=2.0)
    assert spy.requests[0].beta == 5.0
    assert batch.info["scale"] == pytest.approx(0.4)
    assert batch.info["effective_beta"] == pytest.approx(2.0)
    assert batch.info["beta"] == 2.0
    assert not batch.info["is_range_limited"]
    assert torch.allclose(spy.requests[0].problem.h, 0.4 * problem.h)


@each_problem
def test_where_the_range_ends_samples_are_as_hot_as_reported(name):
    """Gate at alpha = 1e-4 at the reported temperature, and rejection at the one asked for."""
    problem = PROBLEMS[name]
    sampler = Rescaled(ExactSampler(), h_limit=0.1, J_limit=0.1, device_beta=5.0)
    batch = ask(sampler, problem, 5000, beta=2.0, seed=5)
    info, largest = batch.info, max(float(problem.h.abs().max()), float(problem.J.abs().max()))
    assert info["is_range_limited"] is True
    assert info["scale"] == pytest.approx(0.1 / largest)
    assert info["effective_beta"] == pytest.approx(5.0 * 0.1 / largest)
    assert info["effective_beta"] < 2.0
    assert_boltzmann(problem, batch, info["effective_beta"])
    assert compare_with_boltzmann(problem, batch, 2.0).p_value < 1e-6


@over("n_bits", [2, 5, 8, 16])
@over("name", PROBLEMS)
def test_rounding_is_to_the_grid_and_its_error_is_recorded(name, n_bits):
    problem, spy = PROBLEMS[name], Spy()
    batch = ask(Rescaled(spy, h_limit=2.0, J_limit=1.0, n_bits=n_bits), problem, 5)
    seen, scale = spy.requests[0].problem, batch.info["scale"]
    levels = 2 ** (n_bits - 1) - 1
    for values, limit in ((seen.h, 2.0), (seen.J, 1.0)):
        level = values / limit * levels
        assert torch.allclose(level, level.round(), rtol=0, atol=1e-9)
        assert level.abs().max() <= levels + 1e-9
    error = torch.cat([seen.h / scale - problem.h, seen.J / scale - problem.J])
    assert batch.info["rounding_error"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-9)
    steps = torch.cat([torch.full_like(seen.h, 2.0), torch.full_like(seen.J, 1.0)]) / levels / scale
    assert (error.abs() <= 0.5 * steps * (1 + 1e-9)).all()
    if n_bits == 16:
        assert batch.info["rounding_error"] < 1e-4


@pytest.mark.parametrize("device_beta", [None, 5.0])
def test_a_problem_of_zeros_needs_no_scale(device_beta):
    problem, spy = IsingModel(torch.zeros(4), torch.zeros(6), graphs.complete(4)), Spy()
    sampler = Rescaled(spy, h_limit=1, J_limit=1, n_bits=8, device_beta=device_beta)
    info = ask(sampler, problem, 5, beta=2.0).info
    assert info["effective_beta"] == pytest.approx(2.0)
    assert not info["is_range_limited"]
    assert info["rounding_error"] == 0.0


def test_without_limits_a_problem_is_passed_on_as_it_is():
    problem, spy = PROBLEMS["complete-6"], Spy()
    info = ask(Rescaled(spy), problem, 5, beta=0.7).info
    assert (info["scale"], spy.requests[0].beta) == (1.0, 0.7)
    assert torch.equal(spy.requests[0].problem.h, problem.h)


def test_each_request_of_a_batch_has_its_own_scale():
    spy = Spy()
    requests = [SamplingRequest(p, 3 + k, 0.5 + k, seed=k) for k, p in enumerate(PROBLEMS.values())]
    batches = Rescaled(spy, h_limit=1, J_limit=1).sample_batch(requests)
    assert spy.n_trips == 1
    for request, batch, seen in zip(requests, batches, spy.requests, strict=True):
        assert batch.spins.shape == (request.n_samples, request.problem.n_spins)
        assert torch.allclose(seen.problem.h, request.problem.h * batch.info["scale"])
        assert seen.seed == request.seed
    assert len({batch.info["scale"] for batch in batches}) == 3


# SpinReversed ------------------------------------------------------------------------------------------------------


@over(("n_samples", "n_gauges"), [(10, 3), (7, 7), (2, 5), (1, 4), (12, 1)])
def test_samples_are_shared_out_among_gauges_in_one_trip(n_samples, n_gauges):
    problem, spy = PROBLEMS["complete-6"], Spy()
    batch = ask(SpinReversed(spy, n_gauges), problem, n_samples)
    sizes = [request.n_samples for request in spy.requests]
    assert spy.n_trips == 1
    assert sum(sizes) == n_samples
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == batch.info["n_gauges"] == min(n_gauges, n_samples)
    assert len({request.seed for request in spy.requests}) == len(sizes)


def test_gauges_flip_about_half_of_the_spins_and_leave_energies_alone():
    """Of 8 x 500 signs between 1,850 and 2,150 are negative (binomial, alpha 2e-6)."""
    problem, spy = PROBLEMS["bipartite-3x5"], Spy()
    batch = ask(SpinReversed(spy, 500), problem, 500, seed=6)
    gauges = torch.stack([(request.problem.h / problem.h).sign() for request in spy.requests])
    assert 1850 < (gauges < 0).sum() < 2150
    i, j = problem.graph.edge_index()
    for request, gauge, spins, energy in zip(spy.requests, gauges, batch.spins, batch.energies, strict=True):
        assert torch.equal(request.problem.h, gauge * problem.h)
        assert torch.equal(request.problem.J, gauge[i] * gauge[j] * problem.J)
        assert request.problem.energy(spins * gauge) == pytest.approx(float(energy), abs=1e-12)


def test_gauges_follow_the_seed_and_the_requests():
    problem, spy = PROBLEMS["complete-6"], Spy()
    sampler = SpinReversed(spy, 2)
    for seed in (1, 1, 2):
        ask(sampler, problem, 4, seed=seed)
    signs = [request.problem.h.sign().tolist() for request in spy.requests]
    assert signs[0:2] == signs[2:4] != signs[4:6]
    pair = [SamplingRequest(problem, n, seed=n) for n in (4, 9)]
    for one, both in zip(pair, sampler.sample_batch(pair), strict=True):
        assert torch.equal(sampler.sample(one).spins, both.spins)


@over(
    "build",
    [
        pytest.param(lambda: SpinReversed(Frozen(), 3), id="once"),
        pytest.param(lambda: SpinReversed(SpinReversed(Frozen(), 2), 3), id="twice"),
        pytest.param(lambda: Retrying(SpinReversed(Rescaled(SpinReversed(Frozen(), 4), h_limit=1), 3)), id="stack"),
    ],
)
@over("dtype", [torch.int8, torch.int64, torch.float32], ids=str)
@over("name", PROBLEMS)
def test_chains_that_do_not_move_come_back_as_they_were(name, dtype, build):
    problem = PROBLEMS[name]
    rows = np.random.default_rng(7).choice([-1, 1], size=(11, problem.n_spins))
    initial = torch.tensor(rows, dtype=dtype)
    batch = ask(build(), problem, 11, initial_spins=initial)
    assert torch.equal(batch.spins, torch.tensor(rows, dtype=torch.int8))
    assert torch.equal(initial, torch.tensor(rows, dtype=dtype))


def test_chains_through_gauges_keep_the_distribution():
    """Two sweeps from exact draws, gauges drawn anew each time; alpha 1e-4."""
    problem = PROBLEMS["chimera-12"]
    sampler, distribution = SpinReversed(BlockGibbsSampler(), 5), Distribution.boltzmann(problem, 1.3)
    spins = distribution.draw(5000, seed=8)
    for seed in (81, 82, 83):
        spins = ask(sampler, problem, 5000, 1.3, seed=seed, initial_spins=spins, n_sweeps=2).spins
    assert_follows(spins, distribution)


# Calibrated --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [0.4, 1.0, 2.5])
def test_calibrated_learns_a_gain_and_corrects_it(gain):
    problem, sampler = PROBLEMS["complete-6"], Calibrated(OffTemperature(gain), memory=0.5)
    first = ask(sampler, problem, 10_000, 0.8, seed=10)
    assert first.info["gain"] == 1.0
    assert abs(first.info["effective_beta"] - 0.8 * gain) < 4 * first.info["effective_beta_scale"]
    assert_boltzmann(problem, first, 0.8 * gain)
    for seed in (11, 12, 13):
        batch = ask(sampler, problem, 2000, 0.8, seed=seed)
        # A mean over answers, none of them less exact than this one: 4 of its standard errors.
        error = batch.info["effective_beta_scale"] / batch.info["effective_beta"]
        assert abs(np.log(batch.info["gain"] / gain)) < 4 * error
        assert abs(batch.info["effective_beta"] - 0.8) < 4 * batch.info["effective_beta_scale"]
        assert_boltzmann(problem, batch, 0.8)
    if gain != 1.0:
        assert compare_with_boltzmann(problem, first, 0.8).p_value < 1e-6


@pytest.mark.parametrize("memory", [0.0, 0.7])
def test_gain_is_a_running_mean_of_logarithms(memory):
    problem, sampler = PROBLEMS["complete-6"], Calibrated(OffTemperature(0.6), memory=memory)
    log_gain = None
    for seed in range(4):
        batch = ask(sampler, problem, 500, seed=seed)
        asked = 1.0 if log_gain is None else np.exp(-log_gain)
        assert batch.info["gain"] == pytest.approx(1 / asked, rel=1e-5)
        observed = np.log(batch.info["effective_beta"] / asked)
        log_gain = observed if log_gain is None else memory * log_gain + (1 - memory) * observed
        assert sampler.log_gain == pytest.approx(log_gain, rel=1e-5)


def test_calibrations_with_the_same_past_answer_the_same():
    answers = []
    for _ in range(2):
        sampler = Calibrated(OffTemperature(0.6))
        answers.append([ask(sampler, PROBLEMS["complete-6"], seed=seed).spins for seed in (3, 4)])
    assert all(torch.equal(*pair) for pair in zip(*answers, strict=True))


def test_every_request_of_a_batch_is_measured():
    sampler = Calibrated(OffTemperature(0.6))
    requests = [SamplingRequest(problem, 2000, 1.0, seed=k) for k, problem in enumerate(PROBLEMS.values())]
    batches = sampler.sample_batch(requests)
    assert {batch.info["gain"] for batch in batches} == {1.0}
    for request, batch in zip(requests, batches, strict=True):
        estimate = effective_beta(request.problem, batch)
        assert batch.info["effective_beta"] == pytest.approx(estimate.value)
        assert batch.info["effective_beta_scale"] == pytest.approx(estimate.scale)


def test_an_answer_without_temperature_is_refused():
    sampler = Calibrated(DimodSampler(SteepestDescentSampler()))
    with pytest.raises(InvalidSamples, match=r"DimodSampler.*no temperature"):
        ask(sampler, PROBLEMS["bipartite-3x5"], 500)
    assert sampler.log_gain is None


def test_a_device_at_the_end_of_its_range_does_not_spoil_the_calibration():
    sampler = Calibrated(Rescaled(ExactSampler(), h_limit=0.1, J_limit=0.1, device_beta=5.0))
    problem = PROBLEMS["complete-6"]
    for seed in range(10):
        ask(sampler, problem, 500, beta=2.0, seed=seed)  # 1.1 is the most that the range allows
    assert ask(sampler, problem, 500, beta=0.5, seed=11).info["gain"] > 0.5


def test_calibrated_passes_flat_problems_on_and_refuses_noise_and_the_opposite_sign():
    """A problem of size 1e-3 has no temperature that 200 samples could show; in one of size 1 a wrong sign shows."""
    problem = random_problem(graphs.bipartite(3, 5), seed=5)
    flat = Calibrated(ExactSampler())
    for scale in (0.0, 1e-3):
        batch = flat.sample(SamplingRequest(problem.scaled(scale), 200, seed=3))
        assert batch.n_samples == 200
    noise = DimodSampler(RandomSampler())
    for child in (Faulty(ExactSampler(), "sign-of-everything"), noise):
        with pytest.raises(InvalidSamples, match="no temperature"):
            for seed in range(8):  # noise looks a little cold or a little wrong, by chance
                Calibrated(child).sample(SamplingRequest(problem, 200, seed=seed))


# Polished ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "n_sweeps"), corners(list(PROBLEMS), [1, 3]))
def test_polish_is_so_many_gibbs_sweeps_at_the_requested_temperature(name, n_sweeps):
    """From uniform spins, far from equilibrium, to the exact distribution of the sweeps. Alpha 1e-4 a case."""
    problem = PROBLEMS[name]
    distribution = block_gibbs_distribution(problem, 1.7, n_sweeps)
    assert distribution.distance(Distribution.boltzmann(problem, 1.7)) > 0.01
    batch = ask(Polished(DimodSampler(RandomSampler()), n_sweeps), problem, 10_000, 1.7, seed=14)
    assert batch.info["n_polish_sweeps"] == n_sweeps
    assert_follows(batch.spins, distribution)
    assert torch.allclose(batch.energies, problem.energy(batch.spins))


def test_polish_starts_from_the_childs_states_and_moves_them():
    """One sweep at a beta of 1e4 from ground states: nothing moves. At 0.5: it does."""
    problem = PROBLEMS["bipartite-3x5"]
    initial = ask(DimodSampler(SteepestDescentSampler()), problem, 50).spins
    assert torch.equal(ask(Polished(Frozen(), 1), problem, 50, 1e4, initial_spins=initial).spins, initial)
    assert not torch.equal(ask(Polished(Frozen(), 1), problem, 50, 0.5, initial_spins=initial).spins, initial)


def test_polish_upon_polish_keeps_the_distribution():
    """Exact draws stay exact under any sweeps with random numbers of their own; alpha 1e-4."""
    problem = PROBLEMS["complete-6"]
    assert_boltzmann(problem, ask(Polished(Polished(ExactSampler(), 1), 1), problem, 2000), 1.0)


def test_polished_chains_with_seeds_in_sequence_keep_the_distribution():
    problem, sampler = PROBLEMS["bipartite-3x5"], Polished(BlockGibbsSampler(n_sweeps=1), 1)
    spins = Distribution.boltzmann(problem, 2.0).draw(40_000, seed=15)
    for step in range(3):
        batch = ask(sampler, problem, 40_000, 2.0, seed=step, initial_spins=spins)
        spins = batch.spins
    assert_boltzmann(problem, batch, 2.0)


# All ---------------------------------------------------------------------------------------------------------------


def test_facts_of_the_child_are_passed_on_and_own_ones_replaced():
    problem = PROBLEMS["complete-6"]
    for wrapper in (Rescaled(Reporting()), SpinReversed(Reporting()), Calibrated(Reporting()), Polished(Reporting())):
        info = ask(wrapper, problem, 200, 0.9, seed=18).info
        assert info["chain_breaks"] == 0.01
        assert (info["sampler"], info["seed"], info["beta"]) == (wrapper.name, 18, 0.9)


def test_failures_of_the_child_pass_through():
    class Broken(Sampler):
        def _sample(self, request, seed):
            raise OSError("port closed")

    for wrapper in (Rescaled, SpinReversed, Calibrated, Polished):
        with pytest.raises(SamplerError, match="Broken.*OSError"):
            ask(wrapper(Broken()), PROBLEMS["complete-6"], 4)


def test_device_time_of_all_gauges_counts():
    budgeted = Budgeted(SpinReversed(Reporting(), 4), device_seconds=100.0)
    ask(budgeted, PROBLEMS["complete-6"], 8)
    assert budgeted.spent["device_seconds"] == 8.0


def test_rescaled_checks_the_problem_that_the_child_will_see():
    class Ring(ExactSampler):
        def check(self, problem):
            if problem.graph.n_edges > problem.n_spins:
                msg = "A ring, no more."
                raise GraphMismatchError(msg)

    with pytest.raises(GraphMismatchError, match="A ring"):
        Rescaled(Ring()).check(PROBLEMS["complete-6"])


@over(
    ("build", "match"),
    [
        (lambda: Rescaled(ExactSampler(), h_limit=0.0), "h_limit=0.0"),
        (lambda: Rescaled(ExactSampler(), J_limit=-1.0), "J_limit=-1.0"),
        (lambda: Rescaled(ExactSampler(), J_limit=float("nan")), "J_limit=nan"),
        (lambda: Rescaled(ExactSampler(), device_beta=0.0), "device_beta=0.0"),
        (lambda: Rescaled(ExactSampler(), h_limit=1, J_limit=1, n_bits=1), "n_bits=1"),
        (lambda: Rescaled(ExactSampler(), h_limit=1, n_bits=8), "n_bits=8.*`h_limit` and `J_limit`"),
        (lambda: Rescaled(ExactSampler(), J_limit=1, n_bits=8), "n_bits=8 needs"),
        (lambda: SpinReversed(ExactSampler(), 0), "n_gauges=0"),
        (lambda: Calibrated(ExactSampler(), memory=1.0), "memory=1.0"),
        (lambda: Calibrated(ExactSampler(), memory=-0.1), "memory=-0.1 must be"),
        (lambda: Polished(ExactSampler(), 0), "n_sweeps=0"),
    ],
)
def test_values_without_meaning_are_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_every_gauge_is_a_job_of_its_own():
    """A device that finds jobs by their name must not take the second gauge for the first."""
    asked = []

    class Listening(ExactSampler):
        def _sample_batch(self, requests, seeds):
            asked.extend(request.request_id for request in requests)
            return super()._sample_batch(requests, seeds)

    request = SamplingRequest(PROBLEMS["complete-6"], 6, seed=0, request_id="refresh-7")
    SpinReversed(Listening(), 3).sample(request)
    SpinReversed(Listening(), 2).sample(replace(request, request_id=None))
    assert asked == ["refresh-7-gauge-0", "refresh-7-gauge-1", "refresh-7-gauge-2", None, None]
