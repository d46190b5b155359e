"""Ising problems on the qubits of an annealer: the qubits of each spin, and their fields and couplings.

A spin is one qubit, or a chain of qubits with couplings that make them agree. :func:`find_embedding` tries, in this
order: the graph itself among the working qubits and couplers (Glasgow subgraph solver, exact), a clique or biclique
embedding if the graph is dense (busclique), and a minor embedding (minorminer). It repeats the embedding over the chip
as often as it fits. The qubits of a chain share a field equally, and the couplers between two chains share a coupling
equally, as in ``dwave.embedding.embed_bqm``.

Other modules scale problems to the ranges of a device (``_program.py``) and communicate with it (``_sampler.py``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from qbmscvi.exceptions import GraphMismatchError

if TYPE_CHECKING:
    import networkx as nx

    from qbmscvi.boltzmann.graphs import Graph

Kind = Literal["native", "clique", "biclique", "minor"]

_NATIVE_SECONDS = 20
_COPY_SECONDS = 3  # on a chip of 5,000 qubits a copy is found within two seconds
_NATIVE_SECONDS_DENSE = 2  # small ones are found at once; the proof that a large one is absent takes long
_DENSE = 0.5  # from this share of (bipartite) pairs that are edges, busclique goes first
_EDGE_OF_CHAIN = -1


@dataclass(frozen=True, eq=False)
class Embedding:
    """Spins of a problem on the qubits of a working graph, in one copy or several equal ones.

    Parameters
    ----------
    kind
        Method that found it.
    qubits
        Names of the qubits, shape ``(n_copies, n_qubits)``; column ``k`` is *place* ``k`` of every copy.
    spin_of
        Spin of each place, shape ``(n_qubits,)``.
    couplers
        Pairs of places that are coupled, shape ``(n_couplers, 2)``.
    edge_of
        Edge of the problem for each coupler, shape ``(n_couplers,)``; -1 within a chain.
    """

    kind: Kind
    qubits: np.ndarray
    spin_of: np.ndarray
    couplers: np.ndarray
    edge_of: np.ndarray

    @property
    def n_copies(self) -> int:
        """Number of copies on the chip."""
        return self.qubits.shape[0]

    @property
    def n_qubits(self) -> int:
        """Qubits of one copy."""
        return self.qubits.shape[1]

    @cached_property
    def chain_lengths(self) -> np.ndarray:
        """Qubits per spin, shape ``(n_spins,)``."""
        return np.bincount(self.spin_of)

    @cached_property
    def is_chain(self) -> np.ndarray:
        """Couplers that hold a chain together, shape ``(n_couplers,)``."""
        return self.edge_of == _EDGE_OF_CHAIN

    def spread(self, h: np.ndarray, J: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distribute fields and couplings over places and couplers.

        Returns
        -------
        Fields of the places, shape ``(n_qubits,)``, and couplings, shape ``(n_couplers,)``, zero within chains.
        """
        fields = (h / self.chain_lengths)[self.spin_of]
        carriers = np.bincount(self.edge_of[~self.is_chain], minlength=len(J))
        couplings = np.zeros(len(self.couplers))
        couplings[~self.is_chain] = (J / np.maximum(carriers, 1))[self.edge_of[~self.is_chain]]
        return fields, couplings

    def gather(self, values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Read spins from the qubits: the majority of each chain, or a fair coin for a tie.

        Parameters
        ----------
        values
            Shape ``(n_rows, n_qubits)``, -1 or +1.
        rng
            Source of the coins.

        Returns
        -------
        Spins, shape ``(n_rows, n_spins)``, int8, and which chains were broken, of the same shape.
        """
        members = np.zeros((self.n_qubits, len(self.chain_lengths)), dtype=np.float32)
        members[np.arange(self.n_qubits), self.spin_of] = 1.0
        votes = values.astype(np.float32) @ members
        coins = rng.choice(np.array([-1.0, 1.0], dtype=np.float32), size=votes.shape)
        spins = np.sign(np.where(votes == 0.0, coins, votes)).astype(np.int8)
        return spins, np.abs(votes) < self.chain_lengths


def find_embedding(graph: Graph, lattice: nx.Graph, *, max_copies: int, seed: int, seconds: float) -> Embedding:
    """Place a problem's graph on a working graph.

    Parameters
    ----------
    graph
        Graph of the problem.
    lattice
        Working graph as ``dwave-networkx`` builds it, with integer qubit names.
    max_copies
        Largest number of copies.
    seed
        Seed of the heuristics. Equal seeds and graphs give equal embeddings, unless time runs out.
    seconds
        Longest search of each heuristic, in seconds.

    Raises
    ------
    GraphMismatchError
        If no embedding was found.
    """
    source = graph.to_networkx()
    lonely = [node for node, degree in source.degree if degree == 0]
    core = source.subgraph(sorted(set(source) - set(lonely)))
    kind, chains = _find_chains(core, lattice, seed, seconds)
    free = iter(sorted(set(lattice).difference(*chains.values())))
    chains.update(zip(lonely, ([qubit] for qubit in free), strict=False))
    if len(chains) < graph.n_nodes:
        msg = (
            f"{graph!r} was not found on the working graph of {len(lattice)} qubits and {lattice.number_of_edges()} "
            f"couplers (max degree {max(dict(lattice.degree).values())}) within {seconds:g} s per method. Use fewer "
            "spins, a `prior_graph` cut from this device (`qbmscvi.graphs.patch`), or a longer `embedding_seconds`."
        )
        raise GraphMismatchError(msg)
    first = _build(kind, graph, chains, lattice)
    return _repeat(first, lattice, max_copies)


def _find_chains(core: nx.Graph, lattice: nx.Graph, seed: int, seconds: float) -> tuple[Kind, dict[int, list[int]]]:
    import networkx as nx

    if len(core) == 0:
        return "native", {}
    if len(core) > len(lattice):
        return "minor", {}
    names = list(core)
    sides = [names]
    density = 2.0 * core.number_of_edges() / (len(core) * (len(core) - 1))
    if nx.is_bipartite(core) and nx.is_connected(core):
        left, right = nx.bipartite.sets(core)
        sides = [sorted(left), sorted(right)]
        density = core.number_of_edges() / (len(left) * len(right))
    is_dense = density >= _DENSE
    if max(dict(core.degree).values()) <= max(dict(lattice.degree).values()):
        qubits = _find_subgraph(core, lattice, _NATIVE_SECONDS_DENSE if is_dense else _NATIVE_SECONDS)
        if qubits:
            return "native", {node: [qubits[node]] for node in names}

    bus_kind: Kind = "clique" if len(sides) == 1 else "biclique"
    methods = [(bus_kind, lambda: _ask_busclique(sides, lattice, seed, seconds))]
    methods.insert(is_dense, ("minor", lambda: _minor(core, lattice, seed, seconds)))
    for kind, find in methods:
        chains = find()
        if chains:
            return kind, chains
    return "minor", {}


def _find_subgraph(source: nx.Graph, target: nx.Graph, seconds: int) -> dict[int, int]:
    from minorminer.subgraph import find_subgraph

    return find_subgraph(source, target, timeout=seconds)


def _minor(core: nx.Graph, lattice: nx.Graph, seed: int, seconds: float) -> dict[int, list[int]]:
    import minorminer

    found = minorminer.find_embedding(core, lattice, random_seed=seed, timeout=max(1, round(seconds)))
    return {node: sorted(chain) for node, chain in found.items()}


def _ask_busclique(sides: list[list[int]], lattice: nx.Graph, seed: int, seconds: float) -> dict[int, list[int]]:
    about = lattice.graph
    shape = {
        "chimera": lambda: [about["rows"], about["columns"], about["tile"]],
        "pegasus": lambda: [about["rows"]],
        "zephyr": lambda: [about["rows"], about["tile"]],
    }[about["family"]]()
    request = {
        "family": about["family"],
        "shape": shape,
        "nodes": sorted(lattice),
        "edges": [list(edge) for edge in lattice.edges],
        "sizes": [len(side) for side in sides],
        "seed": seed,
    }
    command = [sys.executable, str(Path(__file__).with_name("_busclique.py"))]
    try:
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {}
    if done.returncode != 0 or not done.stdout.strip():
        return {}
    chains = json.loads(done.stdout)
    return dict(zip((node for side in sides for node in side), chains, strict=True)) if chains else {}


def _build(kind: Kind, graph: Graph, chains: dict[int, list[int]], lattice: nx.Graph) -> Embedding:
    from dwave.embedding import verify_embedding

    verify_embedding(chains, graph.to_networkx(), lattice)
    spin_of = np.repeat(np.arange(graph.n_nodes), [len(chains[node]) for node in range(graph.n_nodes)])
    qubits = np.concatenate([chains[node] for node in range(graph.n_nodes)]).astype(np.int64)
    place = {qubit: k for k, qubit in enumerate(qubits.tolist())}
    couplers, edge_of = [], []
    for chain in chains.values():
        for a, b in lattice.subgraph(chain).edges:
            couplers.append((place[a], place[b]))
            edge_of.append(_EDGE_OF_CHAIN)
    for number, (i, j) in enumerate(graph.edges.tolist()):
        for a, b in product(chains[i], chains[j]):
            if lattice.has_edge(a, b):
                couplers.append((place[a], place[b]))
                edge_of.append(number)
    pairs = np.array(couplers, dtype=np.int64).reshape(-1, 2)
    return Embedding(kind, qubits[None], spin_of, pairs, np.array(edge_of, dtype=np.int64))


def _repeat(first: Embedding, lattice: nx.Graph, max_copies: int) -> Embedding:
    """Find more copies of these qubits and couplers in the unused part of the chip, one after another."""
    import networkx as nx

    copies = [first.qubits[0]]
    structure = nx.Graph(first.couplers.tolist())
    lonely = sorted(set(range(first.n_qubits)) - set(structure))
    rest = lattice.copy()
    while len(copies) < max_copies:
        rest.remove_nodes_from(copies[-1].tolist())
        if len(rest) < first.n_qubits:
            break
        found = _find_subgraph(structure, rest, _COPY_SECONDS) if len(structure) else {}
        if len(structure) and not found:
            break
        free = sorted(set(rest).difference(found.values()))
        found.update(zip(lonely, free, strict=False))
        copies.append(np.array([found[k] for k in range(first.n_qubits)], dtype=np.int64))
    return Embedding(first.kind, np.stack(copies), first.spin_of, first.couplers, first.edge_of)
