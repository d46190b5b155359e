r"""Exact sums over all states of small Ising problems: log Z, moments, draws.

Only the spins outside the largest color class are enumerated. Given these, the spins of that class are independent and
are summed out in closed form. So a bipartite problem costs ``2^min(n_left, n_right)`` states and a complete one ``2^(n
- 1)``. Everything is computed in float64. The tests compare every sampler with these sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import softplus

from qbmscvi.exceptions import GraphMismatchError

if TYPE_CHECKING:
    from qbmscvi.boltzmann.ising import IsingModel

MAX_ENUMERATED_SPINS = 20
_CHUNK = 1 << 16


def all_states(n_spins: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """All spin states, shape ``(2**n_spins, n_spins)``; the first spin changes slowest, -1 before +1."""
    bits = torch.arange(2**n_spins)[:, None] >> torch.arange(n_spins - 1, -1, -1)
    return (2 * (bits & 1) - 1).to(dtype)


def log_2cosh(x: Tensor) -> Tensor:
    """``log(2 cosh x)`` without overflow."""
    return x.abs() + softplus(-2.0 * x.abs())


@dataclass(frozen=True)
class Enumeration:
    """Collapsed enumeration of a problem at one inverse temperature.

    Parameters
    ----------
    rest
        Enumerated spins, shape ``(n_rest,)`` of node numbers.
    summed
        Spins summed out, shape ``(n_summed,)`` of node numbers.
    states
        Shape ``(2**n_rest, n_rest)``.
    fields
        Field on each summed spin in each state, shape ``(2**n_rest, n_summed)``.
    log_weights
        Unnormalized log probability of each state, shape ``(2**n_rest,)``.
    """

    rest: Tensor
    summed: Tensor
    states: Tensor
    fields: Tensor
    log_weights: Tensor
    beta: float

    @property
    def log_z(self) -> float:
        """Log partition function in nats."""
        return float(torch.logsumexp(self.log_weights, 0))

    @property
    def probabilities(self) -> Tensor:
        """Probability of each enumerated state, shape ``(2**n_rest,)``."""
        return torch.softmax(self.log_weights, 0)


def n_enumerated(problem: IsingModel) -> int:
    """Number of spins outside the largest color class, which an enumeration visits."""
    return problem.n_spins - max(len(c) for c in problem.graph.color_classes)


def enumerate_ising(problem: IsingModel, beta: float = 1.0) -> Enumeration:
    """Enumerate a problem.

    Raises
    ------
    GraphMismatchError
        If the enumeration would have to visit more than 20 spins.
    """
    n_rest = n_enumerated(problem)
    if n_rest > MAX_ENUMERATED_SPINS:
        msg = (
            f"Exact enumeration needs the states of {n_rest} spins ({problem!r}), but at most "
            f"{MAX_ENUMERATED_SPINS} are feasible. Lower `n_latent`, or use sampler='gibbs'."
        )
        raise GraphMismatchError(msg)
    problem = problem.to("cpu", torch.float64)
    summed = torch.from_numpy(max(problem.graph.color_classes, key=len))
    rest = torch.tensor(sorted(set(range(problem.n_spins)) - set(summed.tolist())), dtype=torch.long)
    matrix = problem.couplings()
    states = all_states(len(rest))
    fields, log_weights = [], []
    for chunk in states.split(_CHUNK):
        field = problem.h[summed] + chunk @ matrix[rest][:, summed]  # (n_states, n_summed)
        within = 0.5 * (chunk @ matrix[rest][:, rest] * chunk).sum(-1) + chunk @ problem.h[rest] + float(problem.offset)
        fields.append(field)
        log_weights.append(log_2cosh(beta * field).sum(-1) - beta * within)
    return Enumeration(rest, summed, states, torch.cat(fields), torch.cat(log_weights), beta)


def exact_log_z(problem: IsingModel, beta: float = 1.0) -> float:
    """Log partition function by enumeration, in nats."""
    return enumerate_ising(problem, beta).log_z


def exact_moments(problem: IsingModel, beta: float = 1.0) -> tuple[Tensor, Tensor]:
    """Exact ``<s_i>``, shape ``(n_spins,)``, and ``<s_i s_j>``, shape ``(n_spins, n_spins)``, in float64."""
    table = enumerate_ising(problem, beta)
    p = table.probabilities
    conditional = torch.tanh(-beta * table.fields)  # mean of the summed spins in each state
    spins = torch.empty(len(p), problem.n_spins, dtype=torch.float64)
    spins[:, table.rest], spins[:, table.summed] = table.states, conditional
    mean = p @ spins
    # Summed spins are independent given the rest, so products of conditional means are exact off the diagonal.
    second = spins.T @ (p[:, None] * spins)
    second.fill_diagonal_(1.0)
    return mean, second


def draw_exact(problem: IsingModel, n_samples: int, beta: float, generator: torch.Generator) -> Tensor:
    """Independent exact draws, shape ``(n_samples, n_spins)``, int8, on the CPU."""
    table = enumerate_ising(problem, beta)
    cumulative = table.probabilities.cumsum(0)
    u = torch.rand(n_samples, generator=generator, dtype=torch.float64) * cumulative[-1]
    index = torch.searchsorted(cumulative, u).clamp(max=len(cumulative) - 1)
    up = torch.sigmoid(-2.0 * beta * table.fields[index])
    spins = torch.empty(n_samples, problem.n_spins, dtype=torch.int8)
    spins[:, table.rest] = table.states[index].to(torch.int8)
    uniform = torch.rand(up.shape, generator=generator, dtype=torch.float64)
    spins[:, table.summed] = torch.where(uniform < up, 1, -1).to(torch.int8)
    return spins
