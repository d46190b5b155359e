r"""Ising problems and their samples; the sign convention of the package.

Energy, in nats at unit inverse temperature:

.. math::

    E(s) = c + \sum_i h_i s_i + \sum_{(i,j)} J_{ij} s_i s_j, \qquad s_i \in \{-1, +1\},

with each edge once and no self-loops; :math:`c` is ``offset``. Samplers target :math:`p(s) \propto \exp(-\beta E(s))`.
This is dimod's convention.

Only this module converts other forms (bits, QUBO, dimod). It keeps constants, so that energies and log Z agree in every
form. Higher-order terms are not supported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qbmscvi.boltzmann import graphs

if TYPE_CHECKING:
    from collections.abc import Sequence

    import dimod

    from qbmscvi.boltzmann.graphs import Graph


@dataclass(frozen=True, eq=False)
class IsingModel:
    r"""Ising problem; the docstring of the module defines the energy.

    Parameters
    ----------
    h
        Fields, shape ``(n_spins,)``.
    J
        Couplings, shape ``(n_edges,)``, in the order of ``graph.edges``.
    graph
        Which spins interact, and its color classes.
    offset
        Constant of the energy.

    Raises
    ------
    ValueError
        If shapes disagree with the graph.
    """

    h: Tensor
    J: Tensor
    graph: Graph
    offset: float | Tensor = 0.0

    def __post_init__(self) -> None:
        n, m = self.graph.n_nodes, self.graph.n_edges
        if self.h.shape != (n,) or self.J.shape != (m,):
            msg = (
                f"h has shape {tuple(self.h.shape)} and J has shape {tuple(self.J.shape)}, but the graph has {n} "
                f"nodes and {m} edges. Pass h of shape ({n},) and J of shape ({m},) in the order of `graph.edges`."
            )
            raise ValueError(msg)

    @property
    def n_spins(self) -> int:
        """Number of spins."""
        return self.graph.n_nodes

    @property
    def is_finite(self) -> bool:
        """Whether every field and coupling is finite."""
        return math.isfinite(self.h.sum() + self.J.sum() + self.offset)

    @property
    def edge_couplings(self) -> Tensor | None:
        """Couplings of the edges alone as a symmetric matrix with zero diagonal; None without edges.

        The matrix is cached until ``J`` changes, unless ``J`` has a gradient.
        """
        if not self.graph.n_edges:
            return None
        if self.J.requires_grad or self.J.is_inference():
            return coupling_matrix(self.J, self.graph)
        version, matrix = self.__dict__.get("_edge_couplings", (None, None))
        if version != self.J._version:
            with torch.inference_mode(False):
                matrix = coupling_matrix(self.J, self.graph)
            object.__setattr__(self, "_edge_couplings", (self.J._version, matrix))
        return matrix

    def energy(self, spins: Tensor) -> Tensor:
        """Energy of spin configurations.

        Parameters
        ----------
        spins
            Shape ``(..., n_spins)``; values in ``{-1, +1}``, any dtype.

        Returns
        -------
        Shape ``(...)``.
        """
        spins, layers = spins.to(self.h), self.graph.layers
        if layers is not None:
            first, second = spins.split(layers, dim=-1)
            field = self.h[layers[0] :] + first @ self.J.view(layers)
            energy = (second * field).sum(-1) + first @ self.h[: layers[0]]
        else:
            field = self.h
            if self.graph.is_dense:
                field = field + 0.5 * (spins @ self.edge_couplings)
            elif self.graph.n_edges:
                field = field + 0.5 * edge_fields(spins, self.J, self.graph)
            energy = (spins * field).sum(-1)
        return energy + self.offset

    def couplings(self) -> Tensor:
        """Symmetric coupling matrix with zero diagonal, shape ``(n_spins, n_spins)``; a copy, differentiable."""
        return coupling_matrix(self.J, self.graph)

    def scaled(self, scale: float) -> IsingModel:
        """Multiply the energy by a positive number; the result at ``beta`` is this problem at ``beta * scale``."""
        return replace(self, h=self.h * scale, J=self.J * scale, offset=self.offset * scale)

    def gauged(self, gauge: Tensor) -> IsingModel:
        """Flip the sign convention of some spins: ``gauge * s`` has the energy that ``s`` has here.

        Parameters
        ----------
        gauge
            Shape ``(n_spins,)``, values in ``{-1, +1}``.
        """
        i, j = self.graph.edge_index(self.h.device)
        gauge = gauge.to(self.h)
        return replace(self, h=self.h * gauge, J=self.J * gauge[i] * gauge[j])

    def conditioned(self, nodes: Sequence[int], values: Sequence[int] | Tensor) -> IsingModel:
        r"""Hold some spins fixed, and return the problem of the others; energies stay the same.

        With fixed spins :math:`t` the fields become :math:`h + J t`. Terms that depend on :math:`t` alone go to the
        offset. So ``exp(-energy)`` is the conditional distribution up to a constant. Its sum over the other spins is
        the weight of all states that agree with ``values``.

        Parameters
        ----------
        nodes
            Numbers of the spins to hold fixed.
        values
            Their values in ``{-1, +1}``, in the same order.

        Returns
        -------
        Problem of the other spins, in their order.

        Raises
        ------
        ValueError
            If a number is no spin or is repeated, no spin is left, or ``values`` has another length or other values.
        """
        nodes, values = np.asarray(nodes, dtype=np.int64), torch.as_tensor(values, device=self.h.device)
        is_free = np.ones(self.n_spins, dtype=bool)
        is_free[nodes[(nodes >= 0) & (nodes < self.n_spins)]] = False
        if nodes.ndim != 1 or self.n_spins - is_free.sum() != len(nodes) or not is_free.any():
            msg = (
                f"`nodes` is {nodes.tolist()}, but it must hold different numbers from 0 to {self.n_spins - 1}, and "
                "leave a spin out. Name each spin to hold fixed once."
            )
            raise ValueError(msg)
        if values.shape != nodes.shape or not (values.abs() == 1).all():
            msg = f"`values` is {values.tolist()}, but each of the {len(nodes)} fixed spins needs a value: -1 or 1."
            raise ValueError(msg)
        free = torch.from_numpy(np.flatnonzero(is_free)).to(self.h.device)
        fixed = torch.zeros_like(self.h)  # zero where a spin is free: its terms vanish from the energy
        fixed[torch.from_numpy(nodes).to(self.h.device)] = values.to(self.h)
        field = self.h + edge_fields(fixed, self.J, self.graph)
        number = np.cumsum(is_free) - 1  # keeps the order of nodes, and so of edges
        is_kept = is_free[self.graph.edges].all(axis=1)
        name = f"{self.graph.name}, {len(nodes)} spins fixed"
        return IsingModel(
            field[free],
            self.J[torch.from_numpy(is_kept).to(self.J.device)],
            graphs.Graph(len(free), number[self.graph.edges[is_kept]], name),
            self.energy(fixed),
        )

    def to(self, *targets: torch.device | str | torch.dtype) -> IsingModel:
        """Move all tensors to a device, cast them to a precision, or both."""

        def convert(values: Tensor) -> Tensor:
            # Some devices (Apple's MPS) have no float64, so the cast happens in main memory, before or after the move.
            is_on_cpu = values.device.type == "cpu"
            for target in sorted(targets, key=lambda target: isinstance(target, torch.dtype) != is_on_cpu):
                values = values.to(target)
            return values

        offset = convert(self.offset) if isinstance(self.offset, Tensor) else self.offset
        return replace(self, h=convert(self.h), J=convert(self.J), offset=offset)

    def __repr__(self) -> str:
        return f"IsingModel({self.n_spins} spins, {self.graph.n_edges} couplings, {self.graph.name})"

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers from which :meth:`from_state_dict` builds the problem."""
        return {
            "h": self.h,
            "J": self.J,
            "offset": float(self.offset),
            "edges": torch.tensor(self.graph.edges),
            "graph_name": self.graph.name,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> IsingModel:
        """Build a problem from :meth:`state_dict`."""
        graph = graphs.Graph(len(state["h"]), state["edges"].numpy(), state["graph_name"])
        return cls(state["h"], state["J"], graph, state["offset"])

    def to_bqm(self) -> dimod.BinaryQuadraticModel:
        """Return a SPIN :class:`dimod.BinaryQuadraticModel` whose variables are the numbers of the spins."""
        import dimod

        problem = self.to("cpu", torch.float64)
        i, j = problem.graph.edges.T
        return dimod.BinaryQuadraticModel.from_numpy_vectors(
            problem.h.numpy(), (i, j, problem.J.numpy()), float(problem.offset), "SPIN"
        )

    @classmethod
    def from_bqm(cls, bqm: dimod.BinaryQuadraticModel, dtype: torch.dtype = torch.float32) -> IsingModel:
        """Convert a dimod problem of either vartype; spins are numbered in the order of ``bqm.variables``."""
        spin = bqm.change_vartype("SPIN", inplace=False)
        index = {variable: k for k, variable in enumerate(spin.variables)}
        coupling = {tuple(sorted((index[a], index[b]))): value for (a, b), value in spin.quadratic.items()}
        graph = graphs.Graph(len(index), np.array(list(coupling), dtype=np.int64).reshape(-1, 2))
        h = torch.tensor([spin.linear[variable] for variable in spin.variables], dtype=dtype)
        J = torch.tensor([coupling[tuple(edge)] for edge in graph.edges.tolist()], dtype=dtype)
        return cls(h, J, graph, float(spin.offset))

    def to_qubo(self) -> tuple[Tensor, float]:
        r"""Return ``(Q, offset)`` with :math:`E = b^\top Q b + \text{offset}` for bits :math:`b = (s + 1) / 2`.

        ``Q`` has shape ``(n_spins, n_spins)`` and is upper triangular.
        """
        matrix = self.couplings()
        linear = 2.0 * self.h - 2.0 * matrix.sum(0)
        quadratic = torch.triu(4.0 * matrix, diagonal=1)
        offset = float(self.offset) - float(self.h.sum()) + 0.5 * float(matrix.sum())
        return quadratic + torch.diag(linear), offset


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """Samples of one problem, all of equal weight, with their provenance.

    Parameters
    ----------
    spins
        Shape ``(n_samples, n_spins)``, int8, values in ``{-1, +1}``.
    energies
        Energies under the requested problem, shape ``(n_samples,)``, in nats at ``beta = 1``. If you pass that problem
        instead, the energies are computed.
    info
        Provenance: ``sampler``, ``seed``, ``beta``, ``seconds``, and entries that the sampler adds.
    """

    spins: Tensor
    energies: Tensor | IsingModel
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.energies, IsingModel):
            object.__setattr__(self, "energies", self.energies.energy(self.spins))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of energies and moments."""
        return self.energies.dtype

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return self.spins.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> SampleBatch:
        """Some of the samples."""
        return replace(self, spins=self.spins[rows], energies=self.energies[rows])

    def moments(self, graph: Graph) -> tuple[Tensor, Tensor]:
        """Return ``<s_i>``, shape ``(n_spins,)``, and ``<s_i s_j>`` on the edges, shape ``(n_edges,)``."""
        spins = self.spins.to(self.dtype)
        return spins.sum(0) / self.n_samples, edge_products(spins, spins, graph) / self.n_samples


def disjoint_union(problems: Sequence[IsingModel]) -> IsingModel:
    """Join problems without couplings between them; spins are in the order of the problems.

    The columns of each problem in samples of the union are samples of that problem, independent of the others.
    """
    starts = np.cumsum([0, *(problem.n_spins for problem in problems)])
    edges = np.concatenate([problem.graph.edges + start for problem, start in zip(problems, starts, strict=False)])
    return IsingModel(
        torch.cat([problem.h for problem in problems]),
        torch.cat([problem.J for problem in problems]),
        graphs.Graph(int(starts[-1]), edges, "union"),
        sum(problem.offset for problem in problems),
    )


def coupling_matrix(J: Tensor, graph: Graph) -> Tensor:
    """Edge couplings as a symmetric matrix with zero diagonal, shape ``(n_spins, n_spins)``; differentiable."""
    places = graph.edge_numbers(J.device)
    return torch.cat([J, J.new_zeros(1)]).index_select(0, places.view(-1)).view_as(places)


def block_couplings(J: Tensor, graph: Graph, rows: slice, columns: slice) -> Tensor:
    """Couplings between two ranges of spins, shape ``(n_rows, n_columns)``; differentiable."""
    if graph.layers is not None and rows.stop <= graph.layers[0] <= columns.start:
        start = graph.layers[0]
        return J.view(graph.layers)[rows, columns.start - start : columns.stop - start]
    places = graph.edge_numbers(J.device)[rows, columns]
    return torch.cat([J, J.new_zeros(1)]).index_select(0, places.flatten()).view(places.shape)


def edge_fields(values: Tensor, J: Tensor, graph: Graph) -> Tensor:
    """``sum_j J_ij values_j`` over the edges: shape ``(..., n_spins)`` for spins or mean spins of that shape."""
    if graph.layers is not None:
        block = J.view(graph.layers)
        first, second = values.split(graph.layers, dim=-1)
        return torch.cat([second @ block.T, first @ block], dim=-1)
    if graph.is_dense:
        return values @ coupling_matrix(J, graph)
    i, j = graph.edge_index(J.device)
    fields = torch.zeros_like(values).index_add(-1, i, J * values[..., j])
    return fields.index_add(-1, j, J * values[..., i])


def edge_products(left: Tensor, right: Tensor, graph: Graph) -> Tensor:
    """``sum_r left_ri right_rj`` over rows, for each edge ``i < j``: shape ``(n_edges,)`` for ``(n_rows, n_spins)``."""
    if graph.layers is not None:
        n_first = graph.layers[0]
        return (left[:, :n_first].T @ right[:, n_first:]).view(-1)
    i, j = graph.edge_index(left.device)
    if graph.is_dense:
        return (left.T @ right)[i, j]
    return (left[:, i] * right[:, j]).sum(0)


def are_spins(values: Tensor) -> bool:
    """Whether every value is -1 or +1; NaN is neither."""
    # This runs at every training step; `aminmax` takes a tenth of the time of comparing each value.
    least, largest = torch.aminmax(values.abs())
    return least.item() == largest.item() == 1


def spins_to_bits(spins: Tensor) -> Tensor:
    """Map ``{-1, +1}`` to ``{0, 1}``."""
    return (spins + 1) // 2


def bits_to_spins(bits: Tensor) -> Tensor:
    """Map ``{0, 1}`` to ``{-1, +1}``."""
    return 2 * bits - 1
