"""Oracle for embedded problems: the distribution of what is read off chains, by enumeration of their qubits."""

from __future__ import annotations

import numpy as np
import torch
from oracles import Distribution, energy_table, state_table

from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.ising import IsingModel


def majority_distribution(program, problem: IsingModel, beta: float) -> Distribution:
    """Distribution of the spins read off one copy, from all states of its qubits; a tie counts half for either side."""
    embedding = program.embedding
    edges = np.sort(embedding.couplers, axis=1)
    graph = graphs.Graph(embedding.n_qubits, edges)
    coupling = {tuple(edge): value for edge, value in zip(edges.tolist(), program.J, strict=True)}
    J = torch.tensor([coupling[tuple(edge)] for edge in graph.edges.tolist()], dtype=torch.float64)
    qubits = IsingModel(torch.tensor(program.h), J, graph)
    weights = Distribution.boltzmann(qubits, beta).probabilities
    states = state_table(embedding.n_qubits)
    spins = state_table(problem.n_spins)
    probabilities = np.ones((len(states), 1))
    for spin in range(problem.n_spins):  # p(spin = +1 | state of the qubits) is 0, 1/2 or 1
        up = 0.5 * (1.0 + np.sign(states[:, embedding.spin_of == spin].sum(1)))
        probabilities = np.concatenate([probabilities * (1.0 - up)[:, None], probabilities * up[:, None]], axis=1)
    # Columns: the last spin was appended last, so it is the highest bit; the table wants the first spin highest.
    order = (((spins[:, ::-1] + 1) // 2) @ (1 << np.arange(problem.n_spins - 1, -1, -1))).astype(int)
    return Distribution(spins, energy_table(problem), (weights @ probabilities)[order])
