"""The program of an annealer: an embedded problem, scaled into the ranges of the device.

The scale sets the temperature. On a device at inverse temperature ``device_beta`` the energy is multiplied by
``beta / device_beta``, or by less if the ranges are too narrow. Nothing is clipped. Every limit is symmetric in the
signs of the problem, so that all gauges of a problem have the same scale and temperature.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qbmscvi.exceptions import GraphMismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import networkx as nx

    from qbmscvi.boltzmann.ising import IsingModel
    from qbmscvi.samplers.dwave._embedding import Embedding

# In units of the device's temperature; in equilibrium such a coupler is broken with odds of e**-4.
_LEAST_CHAIN = 2.0
_NO_LIMIT = (-np.inf, np.inf)
_MARGIN = 1.0 - 1e-9  # stays below the limits, because the service compares them in its own arithmetic


@dataclass(frozen=True)
class Ranges:
    """Limits of a device, in its own units.

    Parameters
    ----------
    h, J
        Largest field, and largest coupling of either sign.
    chain
        Largest ferromagnetic coupling.
    qubit
        Lowest and highest sum of the couplings of a qubit; infinite where the device has no such limit.
    group
        The same for each of the two groups of couplers of a qubit (Advantage2).
    group_of
        Group of the coupler from a qubit to another, by ``(qubit, other)``.
    """

    h: float
    J: float
    chain: float
    qubit: tuple[float, float] = _NO_LIMIT
    group: tuple[float, float] = _NO_LIMIT
    group_of: Mapping[tuple[int, int], int] = field(default_factory=dict, repr=False)

    @classmethod
    def from_properties(cls, properties: Mapping[str, Any], lattice: nx.Graph) -> Ranges:
        """Read the limits from the properties of a D-Wave solver with this working graph."""
        h, J = properties["h_range"], properties["j_range"]
        extended = properties.get("extended_j_range", J)
        qubit, group = (tuple(properties.get(f"per_{part}_coupling_range", _NO_LIMIT)) for part in ("qubit", "group"))
        group_of = {}
        if group != _NO_LIMIT:
            from dwave.system.coupling_groups import coupling_groups

            groups = enumerate(coupling_groups(lattice))
            group_of = {(qubit, other): number for number, pairs in groups for other, qubit in pairs}
        return cls(min(-h[0], h[1]), min(-J[0], J[1]), -extended[0], qubit, group, group_of)


@dataclass(frozen=True, eq=False)
class Program:
    """A problem as the device gets it.

    Parameters
    ----------
    embedding
        Qubits of each spin.
    h, J
        Values of places and couplers of a copy, chains included, in the units of the device.
    scale
        Factor from the problem to these values.
    chain_strength
        Ferromagnetic coupling within chains.
    is_range_limited
        Whether the ranges of the device did not allow the scale for the requested temperature.
    """

    embedding: Embedding
    h: np.ndarray
    J: np.ndarray
    scale: float
    chain_strength: float
    is_range_limited: bool

    def on_chip(self) -> tuple[dict[int, float], dict[tuple[int, int], float]]:
        """Fields and couplings by the names of the qubits, all copies together."""
        qubits = self.embedding.qubits
        fields = dict(zip(qubits.ravel().tolist(), np.tile(self.h, len(qubits)).tolist(), strict=True))
        a, b = qubits[:, self.embedding.couplers[:, 0]], qubits[:, self.embedding.couplers[:, 1]]
        pairs = zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)
        return fields, dict(zip(pairs, np.tile(self.J, len(qubits)).tolist(), strict=True))


def fit(
    problem: IsingModel,
    embedding: Embedding,
    ranges: Ranges,
    *,
    beta: float,
    device_beta: float,
    chain_strength: float | None,
) -> Program:
    """Embed a problem and scale it.

    Parameters
    ----------
    problem
        The problem.
    embedding
        Embedding of its graph.
    ranges
        Limits of the device.
    beta
        Requested inverse temperature.
    device_beta
        Inverse temperature of the device in its own units.
    chain_strength
        Coupling within chains in the units of the device. None for uniform torque compensation, with
        ``2 / device_beta`` as the least value, so that chains hold if couplings are small.

    Raises
    ------
    GraphMismatchError
        If chains of that strength leave no range for the problem.
    """
    problem = problem.to("cpu", torch.float64)
    h, J = embedding.spread(problem.h.numpy(), problem.J.numpy())
    is_chain = embedding.is_chain
    compensation, least = 0.0, 0.0
    if is_chain.any():
        if chain_strength is None:
            compensation, least = _torque_compensation(problem), min(_LEAST_CHAIN / device_beta, ranges.chain)
        else:
            least = chain_strength
    # Pairs (amount at unit scale, room for it); all amounts are linear in the scale.
    bounds = [
        (np.abs(h).max(initial=0.0), ranges.h),
        (np.abs(J).max(initial=0.0), ranges.J),
        (compensation, ranges.chain),
    ]
    totals = [(embedding.couplers.T, ranges.qubit)]
    if ranges.group_of:
        totals.append((_groups(embedding, ranges), ranges.group))
    for ends, (low, high) in totals:
        load, n_links = _loads(ends, np.abs(J), is_chain)
        bounds += zip(load + compensation * n_links, np.full_like(load, -low), strict=True)
        bounds += zip(load, -low - least * n_links, strict=True)
        bounds += zip(load, high + least * n_links, strict=True)
    if least > ranges.chain or min(room for _, room in bounds) <= 0.0:
        msg = (
            f"Chains of strength {least:g} do not fit the device: at most {ranges.chain:g} per coupler, couplings of a "
            f"qubit between {ranges.qubit[0]:g} and {ranges.qubit[1]:g}, of a group of them between "
            f"{ranges.group[0]:g} and {ranges.group[1]:g}. Lower `chain_strength`."
        )
        raise GraphMismatchError(msg)
    wanted = beta / device_beta
    scale = min([wanted, *(_MARGIN * room / amount for amount, room in bounds if amount > 0.0)])
    strength = max(scale * compensation, least)
    couplings = np.where(is_chain, -strength, scale * J)
    return Program(embedding, scale * h, couplings, float(scale), float(strength), bool(scale < wanted))


def _groups(embedding: Embedding, ranges: Ranges) -> np.ndarray:
    """Group of each end of each coupler, shape ``(n_copies, 2, n_couplers)``.

    Copies are equal as graphs, but the chip groups their couplers differently.
    """
    ends = embedding.qubits[:, embedding.couplers.T]
    pairs = np.stack([ends, ends[:, ::-1]], axis=-1).reshape(-1, 2)
    return np.array([ranges.group_of[qubit, other] for qubit, other in pairs.tolist()]).reshape(ends.shape)


def _loads(ends: np.ndarray, amounts: np.ndarray, is_chain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum the couplings, and count the chain couplers, for each qubit or group at the ends of couplers."""
    numbers = np.unique(ends, return_inverse=True)[1].reshape(ends.shape)
    n = numbers.max(initial=-1) + 1
    values = [np.broadcast_to(each, numbers.shape).ravel() for each in (np.where(is_chain, 0.0, amounts), is_chain)]
    load, n_links = (np.bincount(numbers.ravel(), each, minlength=n) for each in values)
    return load, n_links


def _torque_compensation(problem: IsingModel) -> float:
    from dwave.embedding.chain_strength import uniform_torque_compensation

    return float(uniform_torque_compensation(problem.to_bqm())) if problem.graph.n_edges else 0.0
