"""Interaction graphs: each edge once, color classes without edges inside, patches as D-Wave cuts them."""

from __future__ import annotations

import pickle
import sys

import networkx as nx
import numpy as np
import pytest
from oracles import ring, scrambled_bipartite
from tables import over

from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.graphs import Graph, build_graph, from_networkx, hardware

CUSTOM = [
    pytest.param(lambda: graphs.bipartite(3, 5), 2, id="bipartite-3x5"),
    pytest.param(scrambled_bipartite, 2, id="scrambled-bipartite-3x5"),
    pytest.param(lambda: graphs.complete(6), 6, id="complete-6"),
    pytest.param(lambda: graphs.complete(2), 2, id="complete-2"),
    pytest.param(lambda: graphs.independent(4), 1, id="independent-4"),
    pytest.param(lambda: graphs.independent(1), 1, id="one-node"),
    pytest.param(lambda: ring(6), 2, id="even-ring"),
    pytest.param(lambda: ring(7), 3, id="odd-ring"),
    pytest.param(lambda: Graph(7, [[5, 1], [6, 0]]), 2, id="pairs-and-isolated-nodes"),
    pytest.param(lambda: hardware("chimera", 12), 2, id="chimera-12"),
    pytest.param(lambda: hardware("pegasus", 30), None, id="pegasus-30"),
    pytest.param(lambda: hardware("zephyr", 30), None, id="zephyr-30"),
]


@over(("make", "n_colors"), CUSTOM)
def test_color_classes_partition_the_nodes_and_hold_no_edge(make, n_colors):
    graph = make()
    classes = graph.color_classes
    assert sorted(np.concatenate(classes).tolist()) == list(range(graph.n_nodes))
    color = {node: k for k, nodes in enumerate(classes) for node in nodes.tolist()}
    assert all(color[i] != color[j] for i, j in graph.edges.tolist())
    assert all((np.diff(nodes) > 0).all() for nodes in classes)
    if n_colors is not None:
        assert len(classes) == n_colors


@over(("make", "n_colors"), CUSTOM)
def test_color_order_and_bounds_cut_out_the_classes(make, n_colors):
    graph = make()
    bounds = graph.color_bounds
    slices = [graph.color_order[a:b].tolist() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    assert slices == [nodes.tolist() for nodes in graph.color_classes]


@over(
    ("graph", "layers"),
    [
        pytest.param(graphs.bipartite(3, 5), (3, 5), id="bipartite"),
        pytest.param(graphs.bipartite(1, 1), (1, 1), id="one-edge"),
        pytest.param(scrambled_bipartite(), None, id="scrambled"),
        pytest.param(graphs.complete(4), None, id="complete"),
        pytest.param(graphs.independent(4), None, id="independent"),
        pytest.param(Graph(4, [[0, 2], [0, 3], [1, 2]]), None, id="an-edge-missing"),
        pytest.param(Graph(5, [[0, 2], [0, 3], [1, 2], [1, 3]]), None, id="a-node-apart"),
        pytest.param(Graph(4, [[0, 1], [0, 2], [0, 3], [1, 2]]), None, id="as-many-edges"),
    ],
)
def test_layers_are_those_of_a_complete_bipartite_graph_in_order(graph, layers):
    assert graph.layers == layers


def test_first_node_is_in_the_first_class_of_a_bipartite_graph():
    assert 0 in scrambled_bipartite().color_classes[0]
    assert [c.tolist() for c in graphs.bipartite(2, 3).color_classes] == [[0, 1], [2, 3, 4]]


def test_edges_are_stored_sorted_whatever_their_direction_and_order():
    graph = Graph(5, [[4, 1], [3, 0], [2, 0], [1, 0]])
    assert graph.edges.tolist() == [[0, 1], [0, 2], [0, 3], [1, 4]]
    assert graph.n_edges == 4
    with pytest.raises(ValueError, match="read-only"):
        graph.edges[0, 0] = 3


def test_graph_does_not_share_memory_with_its_argument():
    edges = np.array([[0, 1], [1, 2]])
    graph = Graph(3, edges)
    edges[0] = 2, 0
    assert graph.edges.tolist() == [[0, 1], [1, 2]]


@over(
    ("n_nodes", "edges", "match"),
    [
        pytest.param(0, [], r"n_nodes=0", id="no-nodes"),
        pytest.param(3, [[0, 3]], r"endpoint 3 .*0 to 2", id="endpoint-too-large"),
        pytest.param(3, [[0, 1], [-1, 2]], r"endpoint -1", id="endpoint-negative"),
        pytest.param(3, [[0, 1], [2, 2]], r"Node 2 .*self-loop", id="self-loop"),
        pytest.param(3, [[0, 1], [1, 2], [1, 0]], r"\(0, 1\).*more than once", id="repeated-reversed"),
    ],
)
def test_graph_refuses(n_nodes, edges, match):
    with pytest.raises(ValueError, match=match):
        Graph(n_nodes, edges)


@pytest.mark.parametrize(
    "edges",
    [
        pytest.param([[0, 1, 2], [3, 4, 5]], id="transposed"),
        pytest.param([[0.7, 1.2]], id="fractions"),
    ],
)
def test_graph_refuses_edges_that_are_not_pairs_of_nodes(edges):
    with pytest.raises(ValueError, match="edges"):
        Graph(6, edges)


@pytest.mark.parametrize("sides", [pytest.param((0, 3), id="no-left"), pytest.param((3, 0), id="no-right")])
def test_bipartite_refuses_an_empty_side(sides):
    with pytest.raises(ValueError, match="either side"):
        graphs.bipartite(*sides)


def test_bipartite_couples_every_pair_across_and_none_within():
    edges = {tuple(edge) for edge in graphs.bipartite(3, 5).edges.tolist()}
    assert edges == {(i, j) for i in range(3) for j in range(3, 8)}


def test_complete_couples_every_pair():
    edges = {tuple(edge) for edge in graphs.complete(6).edges.tolist()}
    assert edges == {(i, j) for i in range(6) for j in range(i + 1, 6)}


@over(
    ("graph", "is_dense"),
    [
        pytest.param(graphs.complete(6), True, id="complete"),
        pytest.param(graphs.bipartite(4, 4), True, id="bipartite"),
        pytest.param(ring(40), False, id="ring"),
        pytest.param(graphs.independent(3), False, id="independent"),
    ],
)
def test_is_dense_compares_edges_with_pairs(graph, is_dense):
    assert graph.is_dense is is_dense


def test_edge_index_holds_both_ends_and_is_kept():
    graph = Graph(4, [[0, 3], [1, 2]])
    i, j = graph.edge_index()
    assert (i.tolist(), j.tolist()) == ([0, 1], [3, 2])
    assert graph.edge_index()[0] is i


def test_pickling_keeps_the_graph_and_drops_cached_tensors():
    graph = scrambled_bipartite()
    graph.edge_index()
    assert graph.color_classes
    copy = pickle.loads(pickle.dumps(graph))
    assert set(vars(copy)) == {"n_nodes", "edges", "name"}
    assert copy.edges.tolist() == graph.edges.tolist()
    assert (copy.n_nodes, copy.name) == (graph.n_nodes, "scrambled")
    assert repr(copy) == "Graph(scrambled, n_nodes=8, n_edges=15)"


def test_networkx_round_trip_keeps_edges_and_isolated_nodes():
    graph = Graph(7, [[5, 1], [6, 0]])
    there = graph.to_networkx()
    assert sorted(there.nodes) == list(range(7))
    assert from_networkx(there).edges.tolist() == graph.edges.tolist()


def test_from_networkx_numbers_nodes_in_their_own_order():
    graph = nx.Graph()
    graph.add_nodes_from(["c", "a", "b"])
    graph.add_edges_from([("a", "b"), ("c", "b")])
    assert from_networkx(graph).edges.tolist() == [[0, 2], [1, 2]]


@over(
    ("graph", "error", "match"),
    [
        pytest.param(nx.DiGraph([(0, 1)]), TypeError, "graph is a DiGraph", id="directed"),
        pytest.param(nx.MultiGraph([(0, 1), (0, 1)]), TypeError, "graph is a MultiGraph", id="multigraph"),
        pytest.param(nx.Graph([(0, 0), (0, 1)]), ValueError, "self-loop", id="self-loop"),
        pytest.param(nx.Graph(), ValueError, "at least one node", id="empty"),
    ],
)
def test_from_networkx_refuses(graph, error, match):
    with pytest.raises(error, match=match):
        from_networkx(graph)


@pytest.mark.parametrize(
    ("topology", "n_nodes"), [("chimera", 70), ("pegasus", 5), ("pegasus", 70), ("zephyr", 12), ("zephyr", 70)]
)
def test_hardware_patch_is_a_connected_deterministic_piece_of_the_lattice(topology, n_nodes):
    dnx = pytest.importorskip("dwave_networkx")
    patch = hardware(topology, n_nodes)
    assert patch.n_nodes == n_nodes
    assert nx.is_connected(patch.to_networkx())
    assert patch.edges.tolist() == hardware(topology, n_nodes).edges.tolist()
    degree = {"chimera": 6, "pegasus": 15, "zephyr": 20}[topology]
    assert max(dict(patch.to_networkx().degree).values()) <= degree
    if n_nodes <= 12:
        lattice = {"chimera": dnx.chimera_graph, "pegasus": dnx.pegasus_graph, "zephyr": dnx.zephyr_graph}[topology](4)
        matcher = nx.isomorphism.GraphMatcher(lattice, patch.to_networkx())
        assert matcher.subgraph_is_isomorphic()


def test_full_chimera_cell_is_the_complete_bipartite_graph():
    pytest.importorskip("dwave_networkx")
    assert nx.is_isomorphic(hardware("chimera", 8).to_networkx(), nx.complete_bipartite_graph(4, 4))


def test_hardware_names_the_extra_when_dwave_networkx_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "dwave_networkx", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'qbmscvi\[dwave\]'"):
        hardware("pegasus", 8)


@over(
    ("name", "n_nodes", "n_edges"),
    [
        pytest.param("bipartite", 8, 16, id="bipartite"),
        pytest.param("bipartite", 7, 12, id="bipartite-odd"),
        pytest.param("complete", 5, 10, id="complete"),
        pytest.param("independent", 5, 0, id="independent"),
        pytest.param("chimera", 8, 16, id="chimera"),
    ],
)
def test_build_graph_by_name(name, n_nodes, n_edges):
    graph = build_graph(name, n_nodes)
    assert (graph.name, graph.n_nodes, graph.n_edges) == (name, n_nodes, n_edges)


def test_build_graph_takes_graphs_as_they_are():
    graph = scrambled_bipartite()
    assert build_graph(graph, 8) is graph
    assert build_graph(graph.to_networkx(), 8).edges.tolist() == graph.edges.tolist()


@over(
    ("spec", "n_nodes", "error", "match"),
    [
        pytest.param("bipartite", 1, ValueError, r"1.*at least 2", id="one-spin-bipartite"),
        pytest.param("bipartite", 0, ValueError, r"0.*at least 2", id="empty-bipartite"),
        pytest.param("kagome", 6, ValueError, "'kagome'.*chimera", id="unknown-name"),
        pytest.param(graphs.complete(5), 6, ValueError, "5 nodes.*6", id="graph-size"),
        pytest.param(nx.path_graph(4), 6, ValueError, "4 nodes.*6", id="networkx-size"),
        pytest.param(nx.DiGraph([(0, 1)]), 2, TypeError, "DiGraph", id="directed"),
        pytest.param(17, 6, TypeError, "got int", id="wrong-type"),
    ],
)
def test_build_graph_refuses(spec, n_nodes, error, match):
    with pytest.raises(error, match=match):
        build_graph(spec, n_nodes)


def test_unknown_topology_is_refused():
    with pytest.raises(ValueError, match="'hexagon'.*'chimera'"):
        graphs.hardware("hexagon", 3)


def test_edges_stay_read_only_after_pickling():
    graph = pickle.loads(pickle.dumps(graphs.bipartite(2, 3)))
    with pytest.raises(ValueError, match="read-only"):
        graph.edges[0, 0] = 1


def test_color_permutation_sorts_nodes_by_class_and_back():
    for graph in (scrambled_bipartite(), ring(7), ring(8)):
        order, inverse = graph.color_permutation()
        nodes = np.arange(graph.n_nodes)
        np.testing.assert_array_equal(order, graph.color_order)
        np.testing.assert_array_equal(nodes[order][inverse], nodes)
        assert graph.color_permutation()[0] is order
    assert graphs.bipartite(3, 4).color_permutation() == ()
