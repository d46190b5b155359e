"""Interaction graphs of Ising problems.

A :class:`Graph` says which spins interact. Its ``color_classes`` partition the nodes so that no edge lies inside a
class; block Gibbs updates one class after another. Nodes are ``0 .. n_nodes - 1``. Self-loops and double edges are
errors. Hypergraphs are not supported.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import networkx as nx

GraphName = Literal["bipartite", "complete", "independent", "chimera", "pegasus", "zephyr"]
_HARDWARE_TOPOLOGIES = ("chimera", "pegasus", "zephyr")


@dataclass(frozen=True, eq=False)
class Graph:
    """Undirected interaction graph over spins.

    Parameters
    ----------
    n_nodes
        Number of nodes, named ``0 .. n_nodes - 1``.
    edges
        Node pairs, shape ``(n_edges, 2)``. Stored with the smaller node first, in lexicographic order.
    name
        Name in messages and plots.

    Raises
    ------
    ValueError
        For a self-loop, a repeated edge, a node outside the range, or a graph without nodes.
    """

    n_nodes: int
    edges: np.ndarray
    name: str = "custom"

    def __post_init__(self) -> None:
        given = np.asarray(self.edges)
        if given.size and (given.ndim != 2 or given.shape[1] != 2 or (given != np.floor(given)).any()):
            msg = f"`edges` has shape {given.shape}; it must hold pairs of node numbers, shape (n_edges, 2)."
            raise ValueError(msg)
        edges = given.astype(np.int64).reshape(-1, 2)
        if self.n_nodes < 1:
            msg = f"A graph needs at least one node, got n_nodes={self.n_nodes}. Raise the number of spins."
            raise ValueError(msg)
        outside = edges[(edges < 0) | (edges >= self.n_nodes)]
        if outside.size:
            msg = (
                f"Edge endpoint {outside[0]} is not a node of a graph with {self.n_nodes} nodes; allowed are "
                f"0 to {self.n_nodes - 1}. Relabel the nodes, e.g. with `networkx.convert_node_labels_to_integers`."
            )
            raise ValueError(msg)
        loops = edges[edges[:, 0] == edges[:, 1], 0]
        if loops.size:
            msg = (
                f"Node {loops[0]} has a self-loop. s_i * s_i = 1 for every spin, so such a term is a constant, "
                "not a coupling. Remove it, e.g. with `graph.remove_edges_from(networkx.selfloop_edges(graph))`."
            )
            raise ValueError(msg)
        edges = np.sort(edges, axis=1)
        edges = edges[np.lexsort((edges[:, 1], edges[:, 0]))]
        repeated = np.flatnonzero((edges[1:] == edges[:-1]).all(axis=1))
        if repeated.size:
            i, j = edges[repeated[0]]
            msg = f"Edge ({i}, {j}) is given more than once. List each edge once, in either direction."
            raise ValueError(msg)
        edges.setflags(write=False)
        object.__setattr__(self, "edges", edges)

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return len(self.edges)

    @property
    def is_dense(self) -> bool:
        """Whether a matrix product over all pairs is cheaper than gathering the edges."""
        return self.n_edges * 8 > self.n_nodes**2

    @cached_property
    def layers(self) -> tuple[int, int] | None:
        """Sizes of the two layers of a complete bipartite graph, numbered one after the other; otherwise None.

        The couplings of such a graph form a matrix without reordering: ``J.view(layers)``.
        """
        n_first = int(self.edges[0, 1]) if self.n_edges else 0
        n_second = self.n_nodes - n_first
        if self.n_edges == 0 or self.n_edges != n_first * n_second:
            return None
        return (
            (n_first, n_second) if (self.edges[:, 0] < n_first).all() and (self.edges[:, 1] >= n_first).all() else None
        )

    def edge_index(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Endpoints of the edges as two index tensors of shape ``(n_edges,)``, kept per device."""
        return self._kept("edge_index", device, lambda: tuple(self.edges.T.copy()))

    def edge_numbers(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Symmetric matrix of edge numbers, ``n_edges`` where two nodes have no edge; kept per device."""

        def build() -> tuple[np.ndarray]:
            i, j = self.edges.T
            numbers = np.full((self.n_nodes, self.n_nodes), self.n_edges, dtype=np.int32)
            numbers[i, j] = numbers[j, i] = np.arange(self.n_edges)
            return (numbers,)

        return self._kept("edge_numbers", device, build)[0]

    def color_permutation(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, ...]:
        """:attr:`color_order` and its inverse as index tensors, kept per device; empty if it is the identity."""

        def build() -> tuple[np.ndarray, ...]:
            is_identity = (self.color_order == np.arange(self.n_nodes)).all()
            return () if is_identity else (self.color_order, np.argsort(self.color_order))

        return self._kept("color_permutation", device, build)

    def _kept(
        self, name: str, device: torch.device | str, build: Callable[[], tuple[np.ndarray, ...]]
    ) -> tuple[torch.Tensor, ...]:
        cache = self.__dict__.setdefault("_tensors", {})
        key = (name, str(device))
        if key not in cache:
            with torch.inference_mode(False):  # inference tensors cannot be saved for backward
                cache[key] = tuple(torch.tensor(values, device=device) for values in build())
        return cache[key]

    @cached_property
    def color_order(self) -> np.ndarray:
        """Nodes class by class, shape ``(n_nodes,)``: the node at each position of a color-sorted state."""
        return np.concatenate(self.color_classes)

    @cached_property
    def color_bounds(self) -> tuple[int, ...]:
        """Slice bounds of the classes in :attr:`color_order`, ``n_classes + 1`` numbers."""
        return (0, *np.cumsum([len(c) for c in self.color_classes]).tolist())

    def __getstate__(self) -> dict:
        """Leave cached tensors out of pickles."""
        return {"n_nodes": self.n_nodes, "edges": self.edges, "name": self.name}

    def __setstate__(self, state: dict) -> None:
        """Restore the fields; the edges are read-only again."""
        self.__dict__.update(state)
        self.edges.setflags(write=False)

    def to_networkx(self) -> nx.Graph:
        """Return the graph as a :class:`networkx.Graph` with integer nodes."""
        import networkx as nx  # imported here because it would double the import time of the package

        graph = nx.empty_graph(self.n_nodes)
        graph.add_edges_from(self.edges.tolist())
        return graph

    @cached_property
    def color_classes(self) -> tuple[np.ndarray, ...]:
        """Independent sets that partition the nodes, in a deterministic order.

        A bipartite graph has two classes; other graphs are colored greedily (DSATUR). Nodes within a class are sorted.
        """
        if self.n_edges == 0:
            return (np.arange(self.n_nodes),)
        if self.n_edges == self.n_nodes * (self.n_nodes - 1) // 2:
            return tuple(np.array([i]) for i in range(self.n_nodes))
        import networkx as nx

        graph = self.to_networkx()
        if nx.is_bipartite(graph):
            color = nx.bipartite.color(graph)
            # networkx starts each component with color 1; flip so that node 0 is in class 0.
            color = {node: 1 - value if color[0] == 1 else value for node, value in color.items()}
        else:
            color = nx.greedy_color(graph, strategy="DSATUR")
        labels = np.array([color[node] for node in range(self.n_nodes)])
        return tuple(np.flatnonzero(labels == label) for label in np.unique(labels))

    @cached_property
    def treewidth(self) -> int:
        """Upper bound of the treewidth, by the min-fill heuristic of networkx."""
        from networkx.algorithms.approximation import treewidth_min_fill_in

        return treewidth_min_fill_in(self.to_networkx())[0]

    def __repr__(self) -> str:
        return f"Graph({self.name}, n_nodes={self.n_nodes}, n_edges={self.n_edges})"


def bipartite(n_left: int, n_right: int) -> Graph:
    """Complete bipartite graph, the graph of a restricted Boltzmann machine.

    Nodes ``0 .. n_left - 1`` are coupled to nodes ``n_left .. n_left + n_right - 1``.
    """
    if n_left < 1 or n_right < 1:
        msg = (
            f"A bipartite graph needs a node on either side, got n_left={n_left}, n_right={n_right}. "
            "Raise the smaller one, or use `independent` for spins without couplings."
        )
        raise ValueError(msg)
    left, right = np.meshgrid(np.arange(n_left), np.arange(n_left, n_left + n_right), indexing="ij")
    return Graph(n_left + n_right, np.stack([left.ravel(), right.ravel()], axis=1), "bipartite")


def complete(n_nodes: int) -> Graph:
    """Complete graph: every pair of spins interacts."""
    return Graph(n_nodes, np.stack(np.triu_indices(n_nodes, k=1), axis=1), "complete")


def independent(n_nodes: int) -> Graph:
    """Graph without edges: the J = 0 control."""
    return Graph(n_nodes, np.empty((0, 2), dtype=np.int64), "independent")


def with_hidden(graph: Graph, n_hidden: int) -> Graph:
    """Append hidden nodes, each coupled to every node of the graph and to no other hidden node."""
    n = graph.n_nodes
    pairs = [(node, hidden) for node in range(n) for hidden in range(n, n + n_hidden)]
    edges = np.concatenate([graph.edges, np.array(pairs, dtype=np.int64).reshape(-1, 2)])
    name = "bipartite" if graph.n_edges == 0 else f"{graph.name} with {n_hidden} hidden"
    return Graph(n + n_hidden, edges, name)


def from_networkx(graph: nx.Graph, name: str = "custom") -> Graph:
    """Convert any undirected :class:`networkx.Graph`; nodes are numbered in the order of ``graph.nodes``.

    Raises
    ------
    TypeError
        If the graph is directed or a multigraph.
    ValueError
        If it has a self-loop or no nodes.
    """
    if graph.is_directed() or graph.is_multigraph():
        msg = (
            f"Couplings are symmetric and single, but the graph is a {type(graph).__name__}. "
            "Convert it first, e.g. `networkx.Graph(graph.to_undirected())`."
        )
        raise TypeError(msg)
    index = {node: i for i, node in enumerate(graph.nodes)}
    return Graph(len(index), np.array([[index[a], index[b]] for a, b in graph.edges], dtype=np.int64), name)


def hardware(topology: Literal["chimera", "pegasus", "zephyr"], n_nodes: int) -> Graph:
    """Connected patch of ``n_nodes`` qubits of a D-Wave topology.

    The patch grows breadth-first from the middle of the smallest lattice of the family with enough qubits. So it is
    dense and deterministic.

    Raises
    ------
    ModuleNotFoundError
        If ``dwave-networkx`` is not installed.
    ValueError
        If the topology is unknown.
    """
    if topology not in _HARDWARE_TOPOLOGIES:
        msg = f"Unknown topology {topology!r}. Use one of {', '.join(map(repr, _HARDWARE_TOPOLOGIES))}."
        raise ValueError(msg)
    try:
        import dwave_networkx as dnx
    except ModuleNotFoundError as error:
        msg = f"The {topology!r} graph needs `dwave-networkx`. Install it with `pip install 'qbmscvi[dwave]'`."
        raise ModuleNotFoundError(msg) from error

    build = {"chimera": dnx.chimera_graph, "pegasus": dnx.pegasus_graph, "zephyr": dnx.zephyr_graph}[topology]
    size = 2 if topology == "pegasus" else 1  # P1 has no qubits
    while len(lattice := build(size)) < n_nodes:
        size += 1
    return patch(lattice, n_nodes, topology)


def patch(lattice: nx.Graph, n_nodes: int, name: str | None = None) -> Graph:
    """Connected patch of ``n_nodes`` qubits of a lattice, e.g. of the working graph of a device.

    The patch grows breadth-first from the middle of the largest connected part, so it is dense and deterministic. A
    patch of :attr:`~qbmscvi.samplers.DWaveSampler.working_graph` uses only qubits and couplers that work. As the prior
    graph of a model it needs no chains on that device.

    Parameters
    ----------
    lattice
        Any graph whose nodes can be sorted.
    n_nodes
        Number of qubits.
    name
        Name in messages and plots; None for the family that ``dwave-networkx`` stores in the graph.

    Raises
    ------
    ValueError
        If no connected part is large enough.
    """
    import networkx as nx

    part = lattice.subgraph(max(nx.connected_components(lattice), key=len, default=()))
    if not 1 <= n_nodes <= len(part):
        msg = (
            f"A patch of {n_nodes} connected qubits was requested, but the lattice has {len(lattice)} qubits, "
            f"{len(part)} of them connected. Ask for 1 to {len(part)}."
        )
        raise ValueError(msg)
    middle = nx.center(part)[0] if len(part) <= 200 else sorted(part)[len(part) // 2]
    order = [middle, *(node for _, node in nx.bfs_edges(part, middle, sort_neighbors=sorted))][:n_nodes]
    chosen = nx.convert_node_labels_to_integers(lattice.subgraph(sorted(order)), ordering="sorted")
    return from_networkx(chosen, name or str(lattice.graph.get("family", "patch")))


def build_graph(spec: GraphName | nx.Graph | Graph, n_nodes: int) -> Graph:
    """Turn a graph name, a networkx graph or a :class:`Graph` into a :class:`Graph` over ``n_nodes`` spins.

    ``"bipartite"`` splits the spins into two layers; if their number is odd, the first layer has one spin more.
    ``"independent"`` has no couplings. ``"chimera"``, ``"pegasus"`` and ``"zephyr"`` are patches of D-Wave topologies.

    Raises
    ------
    ValueError
        If the name is unknown, ``"bipartite"`` has fewer than two spins, or a given graph has not ``n_nodes`` nodes.
    TypeError
        If ``spec`` is of another type.
    """
    import networkx as nx

    if isinstance(spec, nx.Graph):
        spec = from_networkx(spec)
    if isinstance(spec, Graph):
        if spec.n_nodes != n_nodes:
            msg = (
                f"The prior graph has {spec.n_nodes} nodes, but the model has {n_nodes} spins. "
                f"Set the number of spins to {spec.n_nodes}, or pass a graph with {n_nodes} nodes."
            )
            raise ValueError(msg)
        return spec
    if not isinstance(spec, str):
        msg = (
            f"`prior_graph` must be a name, a networkx.Graph or a qbmscvi.graphs.Graph, got {type(spec).__name__}. "
            "Use e.g. 'bipartite'."
        )
        raise TypeError(msg)
    if spec == "bipartite":
        if n_nodes < 2:
            msg = (
                f"The bipartite prior splits the spins into two layers, but there are {n_nodes}. Use at least 2, or "
                "`prior_graph='independent'`."
            )
            raise ValueError(msg)
        return bipartite(n_nodes - n_nodes // 2, n_nodes // 2)
    if spec == "complete":
        return complete(n_nodes)
    if spec == "independent":
        return independent(n_nodes)
    if spec in _HARDWARE_TOPOLOGIES:
        return hardware(spec, n_nodes)
    names: Iterable[str] = ("bipartite", "complete", "independent", *_HARDWARE_TOPOLOGIES)
    msg = f"Unknown prior graph {spec!r}. Use one of {', '.join(names)}, or pass a networkx.Graph."
    raise ValueError(msg)
