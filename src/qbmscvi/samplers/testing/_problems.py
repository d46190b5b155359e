"""Small problems with known answers."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch

from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.ising import IsingModel


def tiny_problems(dtype: torch.dtype = torch.float64) -> dict[str, IsingModel]:
    """Three small problems, by name, whose distribution can be enumerated.

    They are complete bipartite with layers of 3 and 5 spins, complete with 6 spins, and sparse. The sparse problem has
    12 qubits of the Chimera graph, or without ``dwave-networkx`` a ring of 9 spins with chords. Every field and
    coupling has a random sign and a size between 0.15 and 0.45. A test would notice if one were lost, and single-spin
    chains still forget a uniform start within 30 sweeps at ``beta = 2`` (total variation below 1e-3).
    """
    chords = [(i, (i + 1) % 9) for i in range(9)] + [(0, 2), (3, 7), (4, 8), (1, 5)]
    has_chimera = find_spec("dwave_networkx") is not None
    sparse = graphs.hardware("chimera", 12) if has_chimera else graphs.Graph(9, np.array(chords), "chorded ring")
    return {
        "bipartite-3x5": _draw_problem(graphs.bipartite(3, 5), 11, dtype),
        "complete-6": _draw_problem(graphs.complete(6), 12, dtype),
        "chimera-12" if has_chimera else "chorded-ring-9": _draw_problem(sparse, 10 if has_chimera else 3, dtype),
    }


def _draw_problem(graph: graphs.Graph, seed: int, dtype: torch.dtype) -> IsingModel:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.tensor(rng.uniform(0.15, 0.45, shape) * rng.choice([-1.0, 1.0], shape), dtype=dtype)

    h, J = draw(graph.n_nodes), draw(graph.n_edges)
    return IsingModel(h, J, graph, 0.25)
