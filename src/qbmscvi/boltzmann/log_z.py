r"""Log partition function: exact where the graph allows it, annealed importance sampling elsewhere.

Exact values come from enumeration of the spins outside the largest color class, or from the tree decomposition of
``dwave-samplers``. The latter takes time and memory of the order of two to the treewidth.

Annealed importance sampling :cite:p:`Neal01` scales the couplings by ``t``, from 0 (log Z is known) to 1 (the problem
itself). Spins of the largest color class are summed out of the weights. In expectation, forward runs give a lower bound
of log Z. Reverse runs start from samples of the problem and give an upper bound :cite:p:`Burda15`, provided that these
follow its distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from qbmscvi.boltzmann.enumeration import exact_log_z, log_2cosh, n_enumerated
from qbmscvi.boltzmann.ising import coupling_matrix

if TYPE_CHECKING:
    from qbmscvi.boltzmann.ising import IsingModel

_MAX_ENUMERATED = 16  # 2**16 states: milliseconds
_MAX_TREEWIDTH = 14  # tenths of a second; twice as long for each one more, and training estimates log Z ten times
_WITHOUT_FLOAT64 = ("mps",)  # types of devices


@dataclass(frozen=True)
class LogPartition:
    """Estimate of log Z in nats.

    Parameters
    ----------
    value
        The estimate: exact, or the middle between the two bounds.
    lower, upper
        Forward and reverse estimates; equal to ``value`` if exact.
    scale
        Standard error: half the gap between the bounds and the Monte Carlo errors of both, added in quadrature.
    """

    value: float
    lower: float
    upper: float
    scale: float
    method: Literal["exact", "ais"]

    @property
    def interval(self) -> tuple[float, float]:
        """Two standard errors around the value."""
        return self.value - 2.0 * self.scale, self.value + 2.0 * self.scale


def estimate_log_z(
    problem: IsingModel,
    *,
    samples: Tensor | None = None,
    n_chains: int = 256,
    n_steps: int = 500,
    seed: int = 0,
    method: Literal["auto", "exact", "ais"] = "auto",
) -> LogPartition:
    """Estimate log Z of a problem at ``beta = 1``.

    Parameters
    ----------
    problem
        The problem.
    samples
        Samples of the problem, shape ``(n, n_spins)``, from which the reverse runs start. None starts them from the end
        states of the forward runs; both then share the error of these.
    n_chains
        Number of annealing runs in each direction.
    n_steps
        Temperature steps of a run.
    seed
        Seed of the runs.
    method
        ``"auto"`` enumerates if at most 16 spins have to be visited, decomposes if the treewidth is at most 20, and
        anneals otherwise. ``"exact"`` and ``"ais"`` choose one.

    Raises
    ------
    ValueError
        If ``n_chains`` is below 2, ``n_steps`` below 1, or the method is unknown.
    GraphMismatchError
        If ``method="exact"`` and the problem is too large.
    """
    if method not in ("auto", "exact", "ais"):
        msg = f"Unknown method {method!r}. Use 'auto', 'exact' or 'ais'."
        raise ValueError(msg)
    if n_chains < 2 or n_steps < 1:
        msg = f"n_chains={n_chains} must be at least 2 and n_steps={n_steps} at least 1."
        raise ValueError(msg)
    if method != "ais":
        value = _exact_where_feasible(problem)
        if value is None and method == "exact":
            value = exact_log_z(problem)  # raises if it is too large
        if value is not None:
            return LogPartition(value, value, value, 0.0, "exact")

    path = _AnnealingPath(problem, int(seed))
    forward, state = path.run(path.independent(n_chains), torch.linspace(0.0, 1.0, n_steps + 1))
    if samples is not None:
        generator = torch.Generator().manual_seed(int(seed))
        chosen = torch.randint(len(samples), (n_chains,), generator=generator).to(samples.device)
        state = samples[chosen].to(path.h.device).to(path.h)
    backward, _ = path.run(state, torch.linspace(1.0, 0.0, n_steps + 1))
    (lower, lower_scale), (negative_upper, upper_scale) = (
        (float(value), float(error)) for value, error in map(log_mean_exp, (forward, backward))
    )
    lower, upper = path.log_z0 + lower, path.log_z0 - negative_upper
    scale = math.sqrt(0.25 * (upper - lower) ** 2 + 0.25 * (lower_scale**2 + upper_scale**2))
    return LogPartition(0.5 * (lower + upper), lower, upper, scale, "ais")


def _exact_where_feasible(problem: IsingModel) -> float | None:
    n_rest = n_enumerated(problem)
    if n_rest <= _MAX_ENUMERATED:
        return exact_log_z(problem)
    # The number of enumerated spins bounds the treewidth.
    if n_rest > _MAX_TREEWIDTH and problem.graph.treewidth > _MAX_TREEWIDTH:
        return None
    from dwave.samplers import TreeDecompositionSampler  # as slow to import as the whole package

    bqm = problem.to("cpu", torch.float64).to_bqm()
    return float(TreeDecompositionSampler().sample(bqm, num_reads=1, seed=0).info["log_partition_function"])


def log_mean_exp(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the mean weight over the first axis, and its standard error by the delta method."""
    n_weights = len(log_weights)
    log_mean = torch.logsumexp(log_weights, 0) - math.log(n_weights)
    relative = (log_weights - log_mean).exp()
    return log_mean, relative.std(0, correction=min(1, n_weights - 1)) / math.sqrt(n_weights)


class _AnnealingPath:
    """Problems with couplings scaled by ``t``, from 0 to 1."""

    def __init__(self, problem: IsingModel, seed: int) -> None:
        device = problem.h.device
        if device.type in _WITHOUT_FLOAT64:
            device = torch.device("cpu")
        problem = problem.to(device, torch.float64)
        self.h, self.offset = problem.h, float(problem.offset)
        self.generator = torch.Generator(device=device).manual_seed(seed)
        coupling = coupling_matrix(problem.J, problem.graph)
        classes = [torch.from_numpy(nodes).to(device) for nodes in problem.graph.color_classes]
        self.summed = classes.pop(max(range(len(classes)), key=lambda k: len(classes[k])))
        self.others = [(nodes, coupling[:, nodes]) for nodes in classes]
        self.rest = torch.cat(classes) if classes else self.summed[:0]
        self.to_summed = coupling[self.rest][:, self.summed]
        within = coupling[self.rest][:, self.rest]
        self.within_rest = within if within.any() else None
        self.log_z0 = float(log_2cosh(self.h).sum()) - self.offset

    def independent(self, n_chains: int) -> Tensor:
        """Exact samples of the problem at ``t = 0``, shape ``(n_chains, n_spins)``."""
        return self._draw(self.h.expand(n_chains, -1))

    def _drive(self, spins: Tensor) -> Tensor:
        """Fields on the summed spins that their neighbors give at ``t = 1``."""
        return spins[:, self.rest] @ self.to_summed

    def _pairs(self, spins: Tensor) -> Tensor | float:
        """Energy of the couplings among the other spins at ``t = 1``."""
        if self.within_rest is None:
            return 0.0
        rest = spins[:, self.rest]
        return 0.5 * (rest @ self.within_rest * rest).sum(-1)

    def _gain(self, spins: Tensor, drive: Tensor, now: float, following: float) -> Tensor:
        """Log density at ``following`` minus log density at ``now``, with the summed class summed out."""
        h = self.h[self.summed]
        after, before = (log_2cosh(h + t * drive).sum(-1) for t in (following, now))
        return after - before - (following - now) * self._pairs(spins)

    def _sweep(self, spins: Tensor, drive: Tensor, t: float) -> Tensor:
        """One block Gibbs sweep at ``t``: the summed class, then the others."""
        spins = spins.clone()
        spins[:, self.summed] = self._draw(self.h[self.summed] + t * drive)
        for nodes, coupling in self.others:
            spins[:, nodes] = self._draw(self.h[nodes] + t * (spins @ coupling))
        return spins

    def _draw(self, field: Tensor) -> Tensor:
        uniform = torch.rand(field.shape, generator=self.generator, device=field.device, dtype=field.dtype)
        return torch.where(uniform < torch.sigmoid(-2.0 * field), 1.0, -1.0).to(field)

    @torch.no_grad()
    def run(self, spins: Tensor, schedule: Tensor) -> tuple[Tensor, Tensor]:
        """Anneal along ``schedule``; return the log weights, shape ``(n_chains,)``, and the last spins."""
        total = torch.zeros(len(spins), device=self.h.device, dtype=self.h.dtype)
        steps = schedule.tolist()
        for now, following in zip(steps[:-1], steps[1:], strict=True):
            drive = self._drive(spins)
            total += self._gain(spins, drive, now, following)
            spins = self._sweep(spins, drive, following)
        return total, spins
