"""Ising problems and sample batches: one energy in every form, moments from the definition."""

from __future__ import annotations

import itertools
import math

import dimod
import numpy as np
import pytest
import torch
from oracles import PROBLEMS, energy_table, random_problem, ring, scrambled_bipartite, state_table
from tables import over

from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.ising import (
    IsingModel,
    SampleBatch,
    are_spins,
    bits_to_spins,
    coupling_matrix,
    edge_fields,
    spins_to_bits,
)

# The problems of the samplers, one whose edges are gathered instead of multiplied out, and two borderline ones.
CASES = PROBLEMS | {
    "sparse-ring-11": lambda **kw: random_problem(ring(11), seed=4, **kw),
    "no-edges-4": lambda **kw: random_problem(graphs.independent(4), seed=6, **kw),
    "one-spin": lambda **kw: random_problem(graphs.independent(1), seed=7, **kw),
}
each_problem = over("make", [pytest.param(make, id=name) for name, make in CASES.items()])
# Energies are sums of at most 80 terms of order one.
each_dtype = over(
    ("dtype", "atol"),
    [pytest.param(torch.float64, 1e-12, id="float64"), pytest.param(torch.float32, 2e-5, id="float32")],
)


def energy_by_loops(problem, spins):
    """Energy of one configuration, term by term in Python."""
    energy = float(problem.offset)
    for i in range(problem.n_spins):
        energy += float(problem.h[i]) * spins[i]
    for e in range(problem.graph.n_edges):
        i, j = problem.graph.edges[e]
        energy += float(problem.J[e]) * spins[i] * spins[j]
    return energy


def some_states(problem, n_states=40, seed=0):
    return np.random.default_rng(seed).choice([-1, 1], size=(n_states, problem.n_spins))


@each_dtype
@each_problem
def test_energy_matches_the_definition_term_by_term(make, dtype, atol):
    problem = make(dtype=dtype)
    states = some_states(problem)
    energy = problem.energy(torch.tensor(states))
    assert energy.dtype == dtype
    assert np.allclose(energy.numpy(), [energy_by_loops(problem, s) for s in states], rtol=0, atol=atol)


@each_problem
def test_oracle_of_these_tests_matches_the_definition_term_by_term(make):
    problem = make()
    table, states = energy_table(problem), state_table(problem.n_spins)
    rows = np.random.default_rng(1).integers(len(states), size=40)
    assert np.allclose(table[rows], [energy_by_loops(problem, states[r]) for r in rows], rtol=0, atol=1e-12)


@over("dtype", [torch.int8, torch.int64, torch.float32, torch.float64], ids=str)
def test_energy_takes_spins_of_any_dtype_and_shape(dtype):
    problem = CASES["complete-6"]()
    states = torch.tensor(some_states(problem, 6)).to(dtype).reshape(2, 3, 6)
    expected = [[energy_by_loops(problem, s) for s in block] for block in states.tolist()]
    assert np.allclose(problem.energy(states).numpy(), expected, rtol=0, atol=1e-12)


@each_problem
def test_flipping_one_spin_costs_twice_its_local_field(make):
    problem = make()
    states = torch.tensor(some_states(problem)).double()
    fields = problem.h + states @ problem.couplings()
    for i in range(problem.n_spins):
        flipped = states.clone()
        flipped[:, i] *= -1
        cost = problem.energy(flipped) - problem.energy(states)
        assert torch.allclose(cost, -2.0 * states[:, i] * fields[:, i], rtol=0, atol=1e-12)


@each_problem
def test_couplings_are_symmetric_with_zero_diagonal(make):
    matrix = make().couplings()
    assert torch.equal(matrix, matrix.T)
    assert not matrix.diagonal().any()


@each_problem
def test_bqm_has_the_same_energies(make):
    problem = make()
    bqm = problem.to_bqm()
    assert bqm.vartype is dimod.SPIN
    assert list(bqm.variables) == list(range(problem.n_spins))
    states = some_states(problem)
    expected = [energy_by_loops(problem, s) for s in states]
    assert np.allclose(bqm.energies((states, range(problem.n_spins))), expected, rtol=0, atol=1e-11)


@over("vartype", ["SPIN", "BINARY"])
@each_problem
def test_bqm_round_trip_keeps_every_energy(make, vartype):
    problem = make()
    back = IsingModel.from_bqm(problem.to_bqm().change_vartype(vartype, inplace=False), dtype=torch.float64)
    states = some_states(problem)
    expected = [energy_by_loops(problem, s) for s in states]
    assert np.allclose(back.energy(torch.tensor(states)).numpy(), expected, rtol=0, atol=1e-11)


def test_round_trip_through_a_spin_bqm_is_the_identity():
    problem = CASES["bipartite-3x5"]()
    back = IsingModel.from_bqm(problem.to_bqm(), dtype=torch.float64)
    assert torch.equal(back.h, problem.h)
    assert torch.equal(back.J, problem.J)
    assert back.offset == problem.offset
    assert back.graph.edges.tolist() == problem.graph.edges.tolist()


@pytest.mark.parametrize(
    ("vartype", "values"),
    [pytest.param("SPIN", (-1, 1), id="SPIN"), pytest.param("BINARY", (0, 1), id="BINARY")],
)
def test_from_bqm_numbers_spins_in_the_order_of_its_variables(vartype, values):
    names = ["c", 7, "a", ("b", 2)]
    bqm = dimod.BinaryQuadraticModel(vartype)
    bqm.offset = -0.83
    for name, bias in zip(names, (0.3, -0.7, 1.1, 0.0), strict=True):
        bqm.add_linear(name, bias)
    for a, b, value in (("a", "c", 0.9), (("b", 2), 7, -0.4), (7, "c", 0.2)):
        bqm.add_quadratic(a, b, value)
    problem = IsingModel.from_bqm(bqm, dtype=torch.float64)
    for state in itertools.product(values, repeat=4):
        spins = torch.tensor([1 if value == 1 else -1 for value in state])
        expected = bqm.energy(dict(zip(names, state, strict=True)))
        assert math.isclose(float(problem.energy(spins)), expected, abs_tol=1e-12)


@each_problem
def test_qubo_has_the_same_energies_on_bits(make):
    problem = make()
    Q, offset = problem.to_qubo()
    assert torch.equal(Q, torch.triu(Q))
    for state in some_states(problem):
        bits = [(s + 1) // 2 for s in state]
        energy = offset
        for i, j in itertools.product(range(problem.n_spins), repeat=2):
            energy += bits[i] * float(Q[i, j]) * bits[j]
        assert math.isclose(energy, energy_by_loops(problem, state), abs_tol=1e-11)


def test_dimod_reads_our_qubo_with_the_same_energies():
    problem = CASES["complete-6"]()
    Q, offset = problem.to_qubo()
    bqm = dimod.BinaryQuadraticModel.from_qubo(
        {(i, j): float(Q[i, j]) for i in range(6) for j in range(i, 6)}, offset=offset
    )
    states = some_states(problem)
    expected = [energy_by_loops(problem, s) for s in states]
    assert np.allclose(bqm.energies(((states + 1) // 2, range(6))), expected, rtol=0, atol=1e-11)


def test_bits_and_spins_are_inverse():
    spins = torch.tensor([[-1, 1, 1], [1, -1, -1]], dtype=torch.int8)
    bits = spins_to_bits(spins)
    assert bits.tolist() == [[0, 1, 1], [1, 0, 0]]
    assert torch.equal(bits_to_spins(bits), spins)
    assert torch.equal(bits_to_spins(spins_to_bits(spins.float())), spins.float())


@pytest.mark.parametrize(
    ("h", "J", "match"),
    [
        pytest.param(5, 15, r"h has shape \(5,\).*15 edges", id="h"),
        pytest.param(8, 14, r"J .*\(14,\).*15 edges", id="J"),
    ],
)
def test_problem_refuses_shapes_that_disagree_with_the_graph(h, J, match):
    with pytest.raises(ValueError, match=match):
        IsingModel(torch.zeros(h), torch.zeros(J), graphs.bipartite(3, 5))


@over("value", [pytest.param(math.nan, id="nan"), pytest.param(-math.inf, id="inf")])
@over("where", ["h", "J", "offset"])
def test_one_bad_value_anywhere_makes_a_problem_not_finite(where, value):
    problem = CASES["complete-6"]()
    assert problem.is_finite
    parts = {"h": problem.h.clone(), "J": problem.J.clone(), "offset": problem.offset}
    if where == "offset":
        parts["offset"] = value
    else:
        parts[where].view(-1)[3] = value
    assert not IsingModel(graph=problem.graph, **parts).is_finite


def test_casting_a_problem_casts_every_tensor():
    problem = CASES["complete-6"]().to(torch.float32)
    assert {problem.h.dtype, problem.J.dtype} == {torch.float32}
    assert problem.energy(torch.ones(6)).dtype == torch.float32


def test_casting_a_problem_casts_an_offset_that_is_a_tensor():
    problem = IsingModel(torch.zeros(2), torch.zeros(1), graphs.complete(2), offset=torch.tensor(0.1))
    assert problem.to(torch.float64).offset.dtype == torch.float64


@each_dtype
@over(
    "graph",
    [
        pytest.param(ring(11), id="gathered"),
        pytest.param(scrambled_bipartite(), id="matrix-product"),
        pytest.param(graphs.bipartite(3, 5), id="layers"),
    ],
)
def test_edge_fields_sum_over_neighbors(graph, dtype, atol):
    rng = np.random.default_rng(2)
    J = torch.tensor(rng.normal(size=graph.n_edges), dtype=dtype)
    values = torch.tensor(rng.normal(size=(2, 3, graph.n_nodes)), dtype=dtype)
    expected = torch.zeros_like(values)
    for (i, j), coupling in zip(graph.edges.tolist(), J.tolist(), strict=True):
        expected[..., i] += coupling * values[..., j]
        expected[..., j] += coupling * values[..., i]
    assert torch.allclose(edge_fields(values, J, graph), expected, rtol=0, atol=atol)


@over(
    "graph",
    [
        pytest.param(ring(9), id="gathered"),
        pytest.param(graphs.complete(5), id="matrix"),
        pytest.param(graphs.bipartite(2, 3), id="layers"),
    ],
)
def test_edge_fields_and_coupling_matrix_carry_exact_gradients(graph):
    rng = np.random.default_rng(3)
    J = torch.tensor(rng.normal(size=graph.n_edges), requires_grad=True)
    values = torch.tensor(rng.normal(size=(4, graph.n_nodes)), requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, c: edge_fields(v, c, graph), (values, J))
    assert torch.autograd.gradcheck(lambda c: coupling_matrix(c, graph), (J,))


def batch_of(n_spins, dtype=torch.float64, n_samples=50, seed=8):
    rng = np.random.default_rng(seed)
    spins = torch.tensor(rng.choice([-1, 1], size=(n_samples, n_spins), p=[0.3, 0.7]), dtype=torch.int8)
    return SampleBatch(spins, torch.tensor(rng.normal(size=n_samples), dtype=dtype))


@each_dtype
@over(
    "graph",
    [
        pytest.param(ring(11), id="gathered"),
        pytest.param(scrambled_bipartite(), id="matrix-product"),
        pytest.param(graphs.bipartite(3, 5), id="layers"),
    ],
)
def test_batch_moments_match_their_definition(graph, dtype, atol):
    batch = batch_of(graph.n_nodes, dtype)
    rows = batch.spins.tolist()
    mean, edge_mean = batch.moments(graph)
    for i in range(graph.n_nodes):
        assert math.isclose(mean[i], sum(row[i] for row in rows) / 50, abs_tol=atol)
    assert edge_mean.shape == (graph.n_edges,)
    for value, (i, j) in zip(edge_mean.tolist(), graph.edges.tolist(), strict=True):
        assert math.isclose(value, sum(row[i] * row[j] for row in rows) / 50, abs_tol=atol)


def test_part_of_a_batch_keeps_its_rows():
    batch = batch_of(5)
    part = batch[10:25]
    assert part.n_samples == 15
    assert torch.equal(part.spins, batch.spins[10:25])
    assert torch.equal(part.energies, batch.energies[10:25])


@over("dtype", [torch.int8, torch.int64, torch.float32, torch.float64])
def test_spins_are_minus_one_and_one_and_nothing_else(dtype):
    spins = torch.tensor([[1, -1, 1], [-1, -1, 1]], dtype=dtype)
    assert are_spins(spins)
    others = [0, 2, -2, -128] + ([0.5, float("nan"), float("inf")] if dtype.is_floating_point else [])
    for other in others:
        spins[1, 1] = other
        assert not are_spins(spins), other


def test_energies_of_a_batch_are_computed_from_its_problem():
    problem = IsingModel(torch.zeros(4), torch.arange(1.0, 5.0), graphs.bipartite(2, 2))
    spins = torch.tensor([[1, 1, 1, -1], [1, -1, -1, 1], [-1, -1, 1, 1]], dtype=torch.int8)
    batch = SampleBatch(spins, problem)
    assert batch.dtype == torch.float32
    assert torch.equal(batch.energies, problem.energy(spins))
    assert torch.equal(batch[1:].energies, batch.energies[1:])


def test_kept_couplings_follow_the_problem():
    problem = IsingModel(torch.zeros(4), torch.arange(1.0, 5.0), ring(4))
    spins = torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    with torch.inference_mode():
        first = problem.energy(spins)
    assert problem.edge_couplings is problem.edge_couplings
    problem.J.mul_(3.0)
    assert torch.equal(problem.energy(spins), 3.0 * first)
    J = problem.J.clone().requires_grad_()
    learned = IsingModel(problem.h, J, problem.graph)
    for _ in range(2):  # a graph that was kept could not be used twice
        (gradient,) = torch.autograd.grad(learned.energy(spins).sum(), J)
        assert torch.equal(gradient, torch.tensor([1.0, -1.0, 1.0, -1.0]))
    with torch.inference_mode():
        assert torch.equal(IsingModel(problem.h, 2.0 * J, problem.graph).energy(spins), 6.0 * first)
    assert IsingModel(torch.zeros(4), torch.zeros(0), graphs.independent(4)).edge_couplings is None


# ---------------------------------------------------------------------------------------------------------------------
# Spins held fixed
# ---------------------------------------------------------------------------------------------------------------------


@each_dtype
@over("make", [pytest.param(make, id=name) for name, make in CASES.items() if name != "one-spin"])
def test_energies_given_fixed_spins_are_those_of_the_whole_problem(make, dtype, atol):
    """Every state of the others, for fixed spins in any order, none and all but one of them."""
    problem = make(dtype=dtype)
    n, table, states = problem.n_spins, energy_table(problem), state_table(problem.n_spins)
    rng = np.random.default_rng(3)
    for n_fixed in (0, 1, n // 2, n - 1):
        nodes, values = rng.permutation(n)[:n_fixed], rng.choice([-1, 1], n_fixed)
        rest = problem.conditioned(nodes, values)
        assert rest.h.dtype == dtype
        agrees = (states[:, nodes] == values).all(1)
        others = np.setdiff1d(np.arange(n), nodes)
        np.testing.assert_array_equal(states[agrees][:, others], state_table(n - n_fixed))
        np.testing.assert_allclose(energy_table(rest), table[agrees], rtol=0, atol=atol)
        own = rest.energy(torch.from_numpy(state_table(n - n_fixed)))
        np.testing.assert_allclose(own.numpy(), table[agrees], rtol=0, atol=atol)


@over(
    ("nodes", "values", "message"),
    [
        pytest.param([0, 6], [1, 1], r"\[0, 6\].*from 0 to 5", id="no-such-spin"),
        pytest.param([-1], [1], r"\[-1\].*from 0 to 5", id="negative"),
        pytest.param([2, 2], [1, 1], r"\[2, 2\].*once", id="twice"),
        pytest.param(range(6), [1] * 6, "leave a spin out", id="all"),
        pytest.param([0, 1], [1], "2 fixed spins", id="too-few-values"),
        pytest.param([0, 1], [1, 0], r"\[1, 0\].*-1 or 1", id="bits"),
    ],
)
def test_impossible_fixed_spins_are_refused(nodes, values, message):
    with pytest.raises(ValueError, match=message):
        PROBLEMS["complete-6"]().conditioned(nodes, values)
