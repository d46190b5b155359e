r"""Fields of many spins by products of whole numbers, of which processors do four to five times as many as of floats.

For two color classes with couplings :math:`J_{ij} \approx q_{ij}\, \epsilon`, :math:`q_{ij}` a whole number of 16 bits
in two parts of 8, and :math:`\epsilon = \max |J| / 32512`. Sums of them are exact, so that what is sampled is exactly
the law of the rounded couplings. With independent spins its divergence from the law asked for would be
:math:`\beta^2 n \epsilon^2 / 24` nats for :math:`n` edges; where that exceeds ``MAX_DIVERGENCE``, because couplings are
large, or in double precision, floats are used. Not for problems with a factor, nor on GPUs.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qbmscvi.ising import IsingModel

_LEAST_WIDTH = 128  # spins of a class; with fewer the products are not what takes the time
_MOST_SPINS = 2**15  # sums stay below 2**31
_PART = 255
_LARGEST = 127 * _PART + 127
MAX_DIVERGENCE = 1e-5  # nats: it takes some 100,000 independent samples to see it


@cache
def _is_fast_here() -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return hasattr(torch, "_int_mm") and bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def rounding_step(problem: IsingModel, beta: float) -> float | None:
    """Distance of the whole multiples to which couplings would be rounded; None where floats are to be used."""
    h, bounds = problem.h, problem.graph.color_bounds
    if len(bounds) != 3 or not problem.graph.is_dense or min(bounds[1], bounds[2] - bounds[1]) < _LEAST_WIDTH:
        return None
    if (
        problem.factor is not None
        or h.dtype != torch.float32
        or h.device.type != "cpu"
        or problem.n_spins > _MOST_SPINS
    ):
        return None
    if not _is_fast_here():
        return None
    step = float(problem.J.abs().max()) / _LARGEST
    divergence = problem.graph.n_edges * (beta * step) ** 2 / 24.0
    return step if 0.0 < divergence <= MAX_DIVERGENCE else None


class WholeNumberChains:
    """States of two color classes as bits, and their fields; spins are in the order of the classes.

    Parameters
    ----------
    state
        Spins, shape ``(n_chains, n_spins)``.
    block
        Couplings of the first class (rows) to the second.
    scale
        Factor of the fields.
    step
        See :func:`rounding_step`.
    """

    def __init__(self, state: Tensor, block: Tensor, scale: float, step: float) -> None:
        n_chains, sizes = len(state), block.shape
        self._bits = [(part > 0).to(torch.int8) for part in state.split(tuple(sizes), dim=1)]
        whole = torch.round(block / step)
        high = torch.round(whole / _PART)
        parts = [high.to(torch.int8), torch.sub(whole, high, alpha=_PART).to(torch.int8)]
        # For the second class as they are; for the first one transposed.
        self._planes = [torch.cat([part.T for part in parts], dim=1).contiguous(), torch.cat(parts, dim=1)]
        # s = 2 b - 1
        self._factor = 2.0 * scale * step
        self._shifts = [whole.sum(1) * (-scale * step), whole.sum(0) * (-scale * step)]
        self._sums = [torch.empty(n_chains, 2 * size, dtype=torch.int32) for size in sizes]
        self._logits = [state.new_empty(n_chains, size) for size in sizes]

    def logits(self, k: int, base: Tensor) -> Tensor:
        """Scaled fields of class ``k`` plus ``base``, shape ``(n_chains, size)``; good until the next call."""
        sums, logits = self._sums[k], self._logits[k]
        torch._int_mm(self._bits[1 - k], self._planes[k], out=sums)
        high, low = sums.split(logits.shape[1], dim=1)
        logits.copy_(low.add_(high, alpha=_PART))
        return torch.add(base + self._shifts[k], logits, alpha=self._factor, out=logits)

    def update(self, k: int, difference: Tensor) -> None:
        """Set the spins of class ``k`` to +1 where the number is not negative, elsewhere to -1."""
        torch.ge(difference, 0.0, out=self._bits[k])

    def spins(self) -> Tensor:
        """Return the states as spins, shape ``(n_chains, n_spins)``."""
        return torch.cat(self._bits, dim=1).to(self._logits[0]).mul_(2.0).sub_(1.0)
