"""Exact enumeration: sums over all states, written out anew, and a tree decomposition agree with it."""

from __future__ import annotations

import itertools
import math

import networkx as nx
import numpy as np
import pytest
import torch
from dwave.samplers import TreeDecompositionSampler
from oracles import PROBLEMS, Distribution, assert_follows, random_problem, ring
from tables import corners, over

from qbmscvi.boltzmann import enumeration, graphs
from qbmscvi.boltzmann.enumeration import (
    all_states,
    draw_exact,
    enumerate_ising,
    exact_log_z,
    exact_moments,
    log_2cosh,
    n_enumerated,
)
from qbmscvi.boltzmann.ising import IsingModel
from qbmscvi.exceptions import GraphMismatchError, QBMSCVIError

CASES = PROBLEMS | {
    "ring-9": lambda **kw: random_problem(ring(9), seed=31, **kw),
    "independent-5": lambda **kw: random_problem(graphs.independent(5), seed=32, **kw),
    "one-spin": lambda **kw: random_problem(graphs.independent(1), seed=33, **kw),
    "two-spins": lambda **kw: random_problem(graphs.complete(2), seed=34, **kw),
}
each_problem = over("make", [pytest.param(make, id=name) for name, make in CASES.items()])
each_beta = over("beta", [pytest.param(beta, id=f"beta-{beta}") for beta in (0.3, 0.7, 2.0)])


@each_beta
@each_problem
def test_log_z_is_the_sum_over_all_states(make, beta):
    problem = make()
    assert math.isclose(
        exact_log_z(problem, beta), Distribution.boltzmann(problem, beta).log_z, rel_tol=1e-12, abs_tol=1e-11
    )


@each_beta
@each_problem
def test_moments_are_the_sums_over_all_states(make, beta):
    problem = make()
    distribution = Distribution.boltzmann(problem, beta)
    mean, second = exact_moments(problem, beta)
    assert (mean.dtype, second.dtype) == (torch.float64, torch.float64)
    assert np.allclose(mean.numpy(), distribution.mean, rtol=0, atol=1e-12)
    assert np.allclose(second.numpy(), distribution.second, rtol=0, atol=1e-12)


@each_problem
def test_enumerated_states_have_their_marginal_probabilities(make):
    problem = make()
    distribution = Distribution.boltzmann(problem, 0.7)
    table = enumerate_ising(problem, 0.7)
    assert sorted(torch.cat([table.rest, table.summed]).tolist()) == list(range(problem.n_spins))
    kept = distribution.states[:, table.rest.numpy()]
    for state, probability in zip(table.states.numpy(), table.probabilities.tolist(), strict=True):
        rows = (kept == state).all(axis=1)
        assert math.isclose(probability, distribution.probabilities[rows].sum(), abs_tol=1e-13)


@each_problem
def test_log_z_derivative_in_beta_is_minus_the_mean_energy(make):
    problem, beta, step = make(), 0.7, 1e-4
    slope = (exact_log_z(problem, beta + step) - exact_log_z(problem, beta - step)) / (2 * step)
    distribution = Distribution.boltzmann(problem, beta)
    assert math.isclose(
        slope, -distribution.probabilities @ distribution.energies, abs_tol=1e-6
    )  # step**2 times a third derivative


@each_beta
@over(
    "graph",
    [
        pytest.param(graphs.from_networkx(nx.random_labeled_tree(20, seed=2)), id="tree-20"),
        pytest.param(ring(18), id="ring-18"),
        pytest.param(graphs.from_networkx(nx.grid_2d_graph(3, 6)), id="grid-3x6"),
        pytest.param(graphs.bipartite(3, 9), id="bipartite-3x9"),
    ],
)
def test_tree_decomposition_agrees_on_log_z_and_moments(graph, beta):
    """A second opinion by another algorithm and another library, beyond the size of a plain sum."""
    problem = random_problem(graph, seed=35)
    info = TreeDecompositionSampler().sample(problem.to_bqm(), beta=beta, seed=1).info
    assert math.isclose(exact_log_z(problem, beta), info["log_partition_function"], abs_tol=1e-10)
    mean, second = exact_moments(problem, beta)
    for i, p_up in info["variable_marginals"].items():
        assert math.isclose(mean[i], 2 * p_up - 1, abs_tol=1e-10)
    for (i, j), table in info["interaction_marginals"].items():
        agreement = sum(a * b * p for (a, b), p in table.items())
        assert math.isclose(second[i, j], agreement, abs_tol=1e-10)


def test_bipartite_problem_may_be_large_on_one_side():
    problem = random_problem(graphs.bipartite(3, 200), seed=36, scale=0.2)
    info = TreeDecompositionSampler().sample(problem.to_bqm(), beta=0.7, seed=1).info
    assert n_enumerated(problem) == 3
    assert math.isclose(exact_log_z(problem, 0.7), info["log_partition_function"], rel_tol=1e-12)


def test_splitting_the_states_into_chunks_changes_nothing(monkeypatch):
    problem = CASES["chimera-12"]()
    whole = exact_log_z(problem, 0.7), exact_moments(problem, 0.7)
    monkeypatch.setattr(enumeration, "_CHUNK", 7)
    assert math.isclose(exact_log_z(problem, 0.7), whole[0], rel_tol=1e-14)
    for part, expected in zip(exact_moments(problem, 0.7), whole[1], strict=True):
        assert torch.allclose(part, expected, rtol=0, atol=1e-14)


@over(("make", "beta"), corners(CASES, (0.3, 0.7, 2.0)))
def test_exact_draws_follow_the_distribution(make, beta):
    """Gate of ``oracles.judge`` at its alpha of 1e-4."""
    problem = make()
    spins = draw_exact(problem, 20_000, beta, torch.Generator().manual_seed(41))
    assert spins.dtype == torch.int8
    assert_follows(spins, Distribution.boltzmann(problem, beta))


def test_equal_generators_give_equal_draws_and_leave_the_global_stream_alone():
    problem = CASES["bipartite-3x5"]()
    before = torch.get_rng_state()
    first, second = (draw_exact(problem, 50, 0.7, torch.Generator().manual_seed(5)) for _ in range(2))
    other = draw_exact(problem, 50, 0.7, torch.Generator().manual_seed(6))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("beta", [pytest.param(60.0, id="cold"), pytest.param(1e-6, id="hot")])
def test_extreme_temperatures_neither_overflow_nor_underflow(beta):
    problem = CASES["complete-6"]()
    distribution = Distribution.boltzmann(problem, beta)
    assert math.isclose(exact_log_z(problem, beta), distribution.log_z, rel_tol=1e-12)
    assert np.allclose(exact_moments(problem, beta)[0].numpy(), distribution.mean, rtol=0, atol=1e-12)


def test_a_float32_problem_is_enumerated_in_float64():
    problem = CASES["bipartite-3x5"](dtype=torch.float32)
    assert math.isclose(exact_log_z(problem, 0.7), exact_log_z(problem.to(torch.float64), 0.7), rel_tol=1e-15)


@over(
    ("graph", "expected"),
    [
        pytest.param(graphs.bipartite(3, 5), 3, id="smaller-layer"),
        pytest.param(graphs.complete(6), 5, id="complete"),
        pytest.param(graphs.independent(6), 0, id="independent"),
        pytest.param(ring(7), 4, id="odd-ring"),
    ],
)
def test_all_but_the_largest_color_class_is_enumerated(graph, expected):
    problem = random_problem(graph)
    assert n_enumerated(problem) == expected
    assert len(enumerate_ising(problem).rest) == expected


@pytest.mark.parametrize(
    ("graph", "n_rest"),
    [
        pytest.param(graphs.bipartite(21, 30), 21, id="bipartite"),
        pytest.param(graphs.complete(22), 21, id="complete"),
    ],
)
def test_too_large_a_problem_is_refused_with_its_size(graph, n_rest):
    problem = random_problem(graph)
    for call in (exact_log_z, exact_moments, enumerate_ising):
        with pytest.raises(GraphMismatchError, match=rf"(?s){n_rest} spins.*20"):
            call(problem)
    assert issubclass(GraphMismatchError, (ValueError, QBMSCVIError))


def test_refusal_of_a_large_problem_is_short():
    problem = IsingModel(torch.zeros(30), torch.zeros(435), graphs.complete(30))
    with pytest.raises(GraphMismatchError) as caught:
        exact_log_z(problem)
    assert len(str(caught.value)) < 500


def test_states_are_all_there_once_in_binary_order():
    expected = list(itertools.product([-1.0, 1.0], repeat=4))
    assert [tuple(row) for row in all_states(4).tolist()] == expected
    assert all_states(0).shape == (1, 0)
    assert all_states(3, torch.int8).dtype == torch.int8


def test_log_2cosh_is_accurate_and_does_not_overflow():
    x = torch.linspace(-15, 15, 301, dtype=torch.float64)
    assert torch.allclose(log_2cosh(x), torch.log(2 * torch.cosh(x)), rtol=1e-14, atol=0)
    assert log_2cosh(torch.tensor([-2000.0, 2000.0])).tolist() == [2000.0, 2000.0]
    assert torch.autograd.gradcheck(log_2cosh, (torch.tensor([-2.0, 0.3, 4.0], dtype=torch.float64).requires_grad_(),))
