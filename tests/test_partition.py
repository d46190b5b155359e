"""log Z: annealed importance sampling inside its own interval, and the estimate carried along in training."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import PROBLEMS, Distribution, random_problem, ring, scrambled_bipartite
from scipy import stats
from tables import over

from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann import log_z as _partition
from qbmscvi.boltzmann.enumeration import exact_log_z
from qbmscvi.boltzmann.prior import BoltzmannPrior
from qbmscvi.diagnostics import LogPartition, estimate_log_z
from qbmscvi.exceptions import GraphMismatchError
from qbmscvi.samplers import BlockGibbsSampler, ExactSampler, SamplingRequest
from qbmscvi.train._sampling import SamplingCallback
from qbmscvi.train._schedule import SamplingSchedule

N_PROBLEMS = 20
FAMILIES = {
    "bipartite-5x7": lambda seed: random_problem(scrambled_bipartite(5, 7), seed=seed),
    "complete-8": lambda seed: random_problem(graphs.complete(8), seed=seed),
    "chimera-12": lambda seed: random_problem(graphs.hardware("chimera", 12), seed=seed),
    "ring-9": lambda seed: random_problem(ring(9), seed=seed),
}


def run_family(make, n_problems=N_PROBLEMS, n_steps=30):
    """Estimates and exact values; every other problem starts its reverse runs from exact samples."""
    rows = []
    for seed in range(200, 200 + n_problems):
        problem = make(seed)
        distribution = Distribution.boltzmann(problem)
        samples = distribution.draw(500, seed) if seed % 2 else None
        estimate = estimate_log_z(problem, samples=samples, n_chains=64, n_steps=n_steps, seed=seed, method="ais")
        rows.append((estimate, distribution.log_z))
    return rows


def n_inside(rows):
    return sum(estimate.interval[0] <= exact <= estimate.interval[1] for estimate, exact in rows)


@pytest.fixture(scope="module")
def estimates():
    return {name: run_family(make) for name, make in FAMILIES.items()}


def test_exact_log_z_lies_inside_the_interval_as_often_as_it_says(estimates):
    """80 random problems of four families at h and J near 0.5.

    If the interval covers with 95 %, fewer than 69 of 80 fall inside in 6 of 10,000 suites, and fewer than 15 of the
    20 of a family in 3. The counts themselves carry a binomial error of 1.9 and 1.0; they are printed with -s.
    """
    inside = {name: n_inside(rows) for name, rows in estimates.items()}
    print(inside)
    assert stats.binom.cdf(68, 80, 0.95) < 1e-3
    assert stats.binom.cdf(14, 20, 0.95) < 1e-3
    assert sum(inside.values()) >= 69
    assert min(inside.values()) >= 15


@pytest.mark.parametrize("name", FAMILIES)
def test_lower_bound_is_below_the_upper_one_within_errors(estimates, name):
    """Their difference may turn by chance, but not by more than three standard errors."""
    for estimate, _ in estimates[name]:
        assert estimate.method == "ais"
        assert estimate.lower - estimate.upper < 3 * estimate.scale
        assert math.isclose(estimate.value, 0.5 * (estimate.lower + estimate.upper))
        assert estimate.scale >= 0.5 * abs(estimate.upper - estimate.lower)


def test_bounds_are_bounds_on_average(estimates):
    """E log of a mean weight is below log Z for forward runs, above for reverse ones started from exact samples."""
    lower = np.array([e.lower - exact for rows in estimates.values() for e, exact in rows])
    upper = np.array([e.upper - exact for rows in estimates.values() for e, exact in rows[1::2]])
    assert lower.mean() < 3 * lower.std() / math.sqrt(len(lower))
    assert upper.mean() > -3 * upper.std() / math.sqrt(len(upper))


def _wrong_base_field(path):
    path.log_z0 += float((torch.cosh(1.1 * path.h) / torch.cosh(path.h)).log().sum())


def _lost_offset(path):
    path.log_z0 += path.offset


def _wrong_couplings(path):
    path.to_summed = -path.to_summed


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(_wrong_base_field, id="base-field-10-percent-off"),
        pytest.param(_lost_offset, id="offset-lost"),
        pytest.param(_wrong_couplings, id="couplings-flipped"),
    ],
)
def test_a_faulty_path_misses_the_exact_value(monkeypatch, fault):
    """Each planted fault leaves fewer than half of the problems inside; the gate asks for 86 %."""
    build = _partition._AnnealingPath.__init__

    def faulty(path, problem, seed):
        build(path, problem, seed)
        fault(path)

    monkeypatch.setattr(_partition._AnnealingPath, "__init__", faulty)
    inside = {name: n_inside(run_family(make, n_problems=5)) for name, make in FAMILIES.items()}
    print(inside)
    assert sum(inside.values()) < 0.5 * 5 * len(FAMILIES)


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in FAMILIES.items()])
def test_longer_annealing_narrows_the_interval(make):
    short, long = (
        np.mean([e.scale for e, _ in run_family(make, n_problems=3, n_steps=n_steps)]) for n_steps in (5, 120)
    )
    assert long < 0.5 * short


def test_annealing_is_exact_without_couplings():
    problem = random_problem(graphs.independent(7), seed=1)
    estimate = estimate_log_z(problem, n_chains=2, n_steps=1, method="ais")
    assert math.isclose(estimate.value, Distribution.boltzmann(problem).log_z, rel_tol=1e-12)
    assert estimate.scale < 1e-12


def test_annealing_meets_enumeration_on_a_problem_beyond_the_automatic_limit():
    problem = random_problem(graphs.bipartite(17, 18), seed=2, scale=0.2, dtype=torch.float32)
    estimate = estimate_log_z(problem, n_chains=128, n_steps=300, seed=3, method="ais")
    assert estimate.scale < 0.05
    assert abs(estimate.value - exact_log_z(problem)) < 3 * estimate.scale


@over(
    ("graph", "method"),
    [
        pytest.param(graphs.bipartite(16, 18), "exact", id="16-of-34"),
        pytest.param(graphs.bipartite(17, 18), "ais", id="17-of-35"),  # exact would take seconds each time
        pytest.param(graphs.bipartite(21, 22), "ais", id="21-of-43"),
        pytest.param(graphs.hardware("chimera", 16), "exact", id="chimera-16"),
        pytest.param(graphs.complete(10), "exact", id="complete-10"),
        pytest.param(graphs.complete(22), "ais", id="21-of-22"),
        pytest.param(graphs.independent(40), "exact", id="independent-40"),
    ],
)
def test_small_problems_are_exact(graph, method):
    problem = random_problem(graph, seed=4, scale=0.1)
    estimate = estimate_log_z(problem, n_chains=4, n_steps=2)
    assert estimate.method == method
    if method == "exact":
        value = exact_log_z(problem)
        assert estimate.interval == pytest.approx((value, value), rel=1e-12)
        assert estimate == LogPartition(estimate.value, estimate.value, estimate.value, 0.0, "exact")


def test_large_problems_of_low_treewidth_are_exact():
    """A ring of 60 against the trace of its transfer matrices, in 100 random machines none of which may miss."""
    for seed in range(100):
        problem = random_problem(ring(60), seed=seed, dtype=torch.float32 if seed % 2 else torch.float64)
        h, s = problem.h.double().numpy(), np.array([-1.0, 1.0])
        J = {tuple(edge): float(value) for edge, value in zip(problem.graph.edges.tolist(), problem.J, strict=True)}
        log_trace, matrix = 0.0, np.eye(2)
        for i in range(60):
            coupling = J[tuple(sorted((i, (i + 1) % 60)))]
            matrix = matrix @ np.exp(-h[i] * s[:, None] - coupling * np.outer(s, s))
            log_trace, matrix = log_trace + math.log(matrix.sum()), matrix / matrix.sum()
        exact = log_trace + math.log(np.trace(matrix)) - float(problem.offset)
        estimate = estimate_log_z(problem)
        assert estimate.method == "exact"
        assert estimate.value == pytest.approx(exact, abs=1e-9)


@pytest.mark.slow
def test_interval_contains_log_z_in_glassy_machines():
    """100 Sherrington-Kirkpatrick and bipartite machines of 16 spins, up to three times the critical coupling.

    Below 95 % coverage fewer than 87 of 100 are inside in 5 of 10,000 suites.
    """
    rows = []
    for seed in range(100):
        g = [0.5, 1.0, 2.0, 3.0][seed % 4]
        graph = graphs.complete(16) if seed < 50 else graphs.bipartite(8, 8)
        problem = random_problem(graph, seed=seed, scale=g / 4)
        estimate = estimate_log_z(problem, n_chains=128, n_steps=300, seed=seed, method="ais")
        rows.append((estimate, exact_log_z(problem)))
    print(n_inside(rows), "of 100; mean scale", np.mean([estimate.scale for estimate, _ in rows]))
    assert n_inside(rows) >= 95


def test_method_exact_goes_up_to_the_limit_of_enumeration():
    problem = random_problem(graphs.bipartite(17, 18), seed=5)
    assert estimate_log_z(problem, method="exact").value == pytest.approx(exact_log_z(problem), rel=1e-12)
    with pytest.raises(GraphMismatchError, match="21 spins"):
        estimate_log_z(random_problem(graphs.bipartite(21, 22)), method="exact")


@over(
    ("arguments", "match"),
    [
        pytest.param({"method": "tap"}, "Unknown method 'tap'", id="method"),
        pytest.param({"n_chains": 1}, "n_chains=1", id="one-chain"),
        pytest.param({"n_steps": 0}, "n_steps=0 at least 1", id="no-steps"),
    ],
)
def test_estimate_refuses(arguments, match):
    with pytest.raises(ValueError, match=match):
        estimate_log_z(PROBLEMS["complete-6"](), **arguments)


def test_equal_seeds_give_equal_estimates_and_leave_the_global_stream_alone():
    problem = PROBLEMS["complete-6"]()
    before = torch.get_rng_state()
    first, second, other = (
        estimate_log_z(problem, n_chains=8, n_steps=10, seed=seed, method="ais") for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other
    assert torch.equal(torch.get_rng_state(), before)


# The estimate carried along in training ----------------------------------------------------------------------------


def make_callback(seed, n_chains, graph=None, sampler=None):
    torch.manual_seed(seed)
    prior = BoltzmannPrior(graph or graphs.bipartite(8, 8), n_chains=n_chains)
    callback = SamplingCallback(prior, sampler or BlockGibbsSampler(), SamplingSchedule())
    callback._seeds.manual_seed(seed)
    return prior, callback


def drive(seed, n_chains=512, n_steps=200, sampler=None):
    """Move all parameters on a straight line to a random machine; return the errors of log Z and its exact course."""
    prior, callback = make_callback(seed, n_chains, sampler=sampler)
    generator = torch.Generator().manual_seed(seed)
    parameters = list(prior.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    end = [0.3 * torch.randn(parameter.shape, generator=generator) for parameter in parameters]
    errors, course = [], []
    for step in range(n_steps):
        callback._refresh()
        course.append(exact_log_z(prior.to_ising()))
        errors.append(float(prior.log_z) - course[-1])
        with torch.no_grad():
            for parameter, a, b in zip(parameters, start, end, strict=True):
                parameter.copy_(torch.lerp(a, b, (step + 1) / n_steps))
    return np.array(errors), np.array(course)


@pytest.mark.parametrize(
    ("seed", "sampler"),
    [
        pytest.param(0, None, id="persistent-chains-0"),
        pytest.param(1, None, id="persistent-chains-1"),
        pytest.param(2, ExactSampler(), id="fresh-samples"),
    ],
)
def test_running_log_z_stays_within_a_tenth_of_a_nat_of_exact(seed, sampler):
    """512 chains, 64 of them tracking, 200 updates; the error over ten seeds is 0.01 to 0.06 at worst."""
    errors, course = drive(seed, sampler=sampler)
    print(f"largest error {np.abs(errors).max():.3f} on a course of {np.ptp(course):.2f} nats")
    assert np.ptp(course) > 1.0
    assert np.abs(errors).max() < 0.1


@pytest.mark.parametrize(
    ("sampler", "is_fresh"),
    [pytest.param(ExactSampler(), True, id="fresh"), pytest.param(BlockGibbsSampler(), False, id="persistent")],
)
def test_weights_of_the_tracking_chains_last_as_long_as_the_chains(sampler, is_fresh):
    prior, callback = make_callback(7, 64, sampler=sampler)
    callback._refresh()
    with torch.no_grad():
        prior.h.add_(0.05)
    callback._refresh()
    assert prior.tracking_log_weights.any() != is_fresh


def learn(seed, n_steps, take_moments):
    """Maximum likelihood on 4 + 4 spins at a high learning rate; return the last error of log Z."""
    target = random_problem(graphs.bipartite(4, 4), seed=81, offset=0.0)
    data = ExactSampler().sample(SamplingRequest(target, 2000, seed=82)).spins.float()
    prior, callback = make_callback(seed, 256, graphs.bipartite(4, 4))
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.02)
    for step in range(n_steps):
        callback._refresh()
        take_moments(prior, callback)
        rows = torch.arange(100 * step, 100 * (step + 1)) % len(data)
        loss = prior.energy(data[rows]).mean() + prior.log_partition()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    callback._refresh()
    return float(prior.log_z) - exact_log_z(prior.to_ising())


@pytest.fixture(scope="module")
def learning_errors():
    return np.array([learn(seed, 60, lambda prior, callback: None) for seed in range(8)])


def test_running_log_z_is_unbiased_in_training(learning_errors):
    """Jarzynski's equality holds if the path does not look at the tracking chains: <exp(error)> = 1, 4 SE."""
    ratio = np.exp(learning_errors)
    print(f"error {learning_errors.mean():.3f}, spread {learning_errors.std():.3f}, <exp> {ratio.mean():.3f}")
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))
    assert learning_errors.std() < 0.15


def test_running_log_z_drifts_if_the_moments_come_from_the_tracking_chains(learning_errors):
    """The planted fault that separate tracking chains exist for: log Z comes out low, by four standard errors."""

    def from_tracking_chains(prior, callback):
        prior.set_moments(callback.log_z.chains)

    errors = np.array([learn(seed, 60, from_tracking_chains) for seed in range(3)])
    scale = learning_errors.std(ddof=1) * math.sqrt(1 / len(errors) + 1 / len(learning_errors))
    print(f"error {errors.mean():.3f}, {(errors.mean() - learning_errors.mean()) / scale:.1f} standard errors")
    assert errors.mean() < learning_errors.mean() - 4 * scale


def test_tracking_chains_take_no_part_in_the_moments():
    prior, callback = make_callback(4, 64)
    callback._refresh()
    assert torch.allclose(prior.spin_mean, prior.chains[:-8].float().mean(0))
    assert torch.equal(prior.chains[-8:], callback.log_z.chains.spins)


def test_validation_carries_log_z_over_the_last_update_once():
    """512 tracking chains; the weights of so large a step spread so far that its error is a tenth of a nat."""
    prior, callback = make_callback(8, 4096)
    callback._refresh()
    before, exact_before = float(prior.log_z), exact_log_z(prior.to_ising())
    with torch.no_grad():
        prior.h.copy_(torch.linspace(-0.5, 0.5, 16))
    callback.on_validation_start(SimpleNamespace(world_size=1), None)
    moved = float(prior.log_z) - before
    exact = exact_log_z(prior.to_ising()) - exact_before
    print(moved, exact)
    assert exact > 0.5
    assert abs(moved - exact) < 0.3
    callback.on_validation_start(SimpleNamespace(world_size=1), None)
    assert float(prior.log_z) - before == pytest.approx(moved, abs=1e-5)


def test_resampling_keeps_log_z_and_equalizes_the_weights():
    """A jump in the parameters kills most tracking chains; the survivors take their places, the estimate stays."""
    prior, callback = make_callback(5, 512)
    callback._refresh()
    with torch.no_grad():
        prior.h.add_(1.0)
    spins = callback.log_z.chains.spins.double()
    log_z, problem = float(prior.log_z), prior.to_ising()
    work = spins.sum(1)  # the energy rises by the sum of the spins
    callback.log_z.follow(problem)
    assert float(prior.log_z) - log_z == pytest.approx(float(torch.logsumexp(-work, 0)) - math.log(64), abs=1e-4)
    assert not prior.tracking_log_weights.any()
    weights = torch.softmax(-work, 0)
    assert 1 / float(weights.square().sum()) < 32
    # Work of the survivors: within 4.5 standard errors of the weighted mean, and not of the mean of all.
    mean = float(weights @ work)
    scale = math.sqrt(float(weights @ (work - mean) ** 2) / 64)
    survivors = prior.chains[-64:].double()
    assert abs(float(survivors.sum(1).mean()) - mean) < 4.5 * scale < abs(float(work.mean()) - mean)
    assert all((spins == row).all(1).any() for row in survivors)


@pytest.mark.parametrize("n_chains", [pytest.param(2, id="2"), pytest.param(7, id="7")])
def test_few_chains_still_give_moments_and_log_z(n_chains):
    prior, callback = make_callback(6, n_chains)
    for _ in range(2):
        callback._refresh()
    assert prior.spin_mean.isfinite().all()
    assert prior.log_z.isfinite()
