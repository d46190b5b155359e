r"""Block Gibbs sampling on the device of the problem.

The color classes of the graph are updated in turn, all spins of a class at once:
:math:`p(s_i = +1 \mid s_{\setminus i}) = \sigma(-2 \beta f_i)` with :math:`f_i = h_i + \sum_j J_{ij} s_j`. A factor
``F`` of the problem adds one block, the Gaussian variable :math:`v \mid s \sim N(F s, 1/\beta)` of its
Hubbard-Stratonovich form, and :math:`-F^\top v` to the fields; spins that interact only through the factor
are then updated together. Sweeps leave the Boltzmann distribution invariant; the only errors are that of
finite chains and, for two large classes on some processors, that of rounded couplings, which is bounded in
:mod:`qbmscvi.samplers._whole_numbers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

from qbmscvi.samplers._base import Draw, Sampler, SamplerTraits
from qbmscvi.samplers._whole_numbers import WholeNumberChains, rounding_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qbmscvi.ising import IsingModel
    from qbmscvi.samplers._base import SamplingRequest

_DRAWN_AHEAD = 2**16  # random numbers; for small problems those of several sweeps at once
_WORDS_PER_DRAW = 12_288  # 96 KiB, below what the C library takes from, and gives back to, the system each time
_WITHOUT_SIGNS = 0x7FFFFFFF_7FFFFFFF  # of two 32-bit integers


class BlockGibbsSampler(Sampler):
    """Persistent block Gibbs chains; the default sampler.

    Parameters
    ----------
    n_sweeps
        Sweeps of a chain that continues from ``initial_spins``, unless the request says otherwise.
    burn_in
        Sweeps of a chain that starts from random spins, unless the request says otherwise.

    Raises
    ------
    ValueError
        If either is below one.
    """

    traits = SamplerTraits(target="boltzmann", is_persistent=True)

    def __init__(self, n_sweeps: int = 10, burn_in: int = 200) -> None:
        if n_sweeps < 1 or burn_in < 1:
            msg = f"n_sweeps={n_sweeps} and burn_in={burn_in} must both be at least 1."
            raise ValueError(msg)
        self.n_sweeps = n_sweeps
        self.burn_in = burn_in

    def _sample(self, request: SamplingRequest, seed: int) -> Draw:
        problem = request.problem
        generator = torch.Generator(device=problem.h.device).manual_seed(seed)
        fresh = request.initial_spins is None
        n_sweeps = request.n_sweeps or (self.burn_in if fresh else self.n_sweeps)
        if fresh:
            spins = random_spins(request.n_samples, problem, generator)
        else:
            spins = request.initial_spins.to(problem.h)
        spins = gibbs_sweeps(problem, spins, n_sweeps, request.beta, generator)
        return Draw(spins, info={"n_sweeps": n_sweeps, "is_fresh": fresh})


def random_spins(n_samples: int, problem: IsingModel, generator: torch.Generator) -> Tensor:
    """Uniform spins, shape ``(n_samples, n_spins)``, in the dtype and on the device of the problem."""
    uniform = torch.rand(n_samples, problem.n_spins, generator=generator, device=problem.h.device)
    return torch.where(uniform < 0.5, 1.0, -1.0).to(problem.h)


@torch.no_grad()
def gibbs_sweeps(
    problem: IsingModel,
    spins: Tensor,
    n_sweeps: int,
    beta: float,
    generator: torch.Generator,
    *,
    is_reversible: bool = False,
) -> Tensor:
    """Run block Gibbs sweeps from ``spins``, shape ``(n_chains, n_spins)``; return the new states.

    Reversible sweeps go through the color classes and back, so that Boltzmann samples before and after them can be
    exchanged: both orders are equally likely.
    """
    device, dtype = problem.h.device, problem.h.dtype
    # Nodes are permuted so that each color class is one slice and its neighbors are at most two.
    permutation = problem.graph.color_permutation(device)
    bounds = problem.graph.color_bounds
    field, factor = problem.h, problem.factor
    if permutation:
        order, inverse = permutation
        state = spins.index_select(1, order)  # a copy; six times as fast as indexing
        field, factor = field[order], None if factor is None else factor.index_select(1, order)
    else:
        state = spins.clone()
    n_chains = len(state)
    scale = -2.0 * beta  # of a field that makes it the logit of s_i = +1
    field = scale * field
    couplings, step = _couplings_of_classes(problem), rounding_step(problem, beta)
    if step is None:
        chains = _FloatChains(state, bounds, couplings, scale)
    else:
        ((_, block),) = couplings[1]
        chains = WholeNumberChains(state, block, scale, step)
    sizes = [stop - start for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    uniform = _Uniform(generator, max(n_chains * max(sizes), min(n_sweeps * state.numel(), _DRAWN_AHEAD)), state)
    order_of_classes = [*range(len(sizes)), *(range(len(sizes) - 2, -1, -1) if is_reversible else ())]
    for _ in range(n_sweeps):
        base = field
        if factor is not None:
            noise = torch.randn(n_chains, len(factor), generator=generator, device=device, dtype=dtype)
            gaussian = torch.addmm(noise, chains.spins(), factor.T, beta=beta**-0.5)  # v given s, (n_chains, rank)
            base = torch.addmm(field, gaussian, factor, alpha=-scale)  # (n_chains, n_spins)
        for k in order_of_classes:
            difference = chains.logits(k, base[..., bounds[k] : bounds[k + 1]]).sigmoid_()
            chains.update(k, difference.sub_(uniform.multiples(n_chains, sizes[k]), alpha=uniform.scale))
    state = chains.spins()
    return state.index_select(1, inverse) if permutation else state


class _FloatChains:
    """States as floats, changed in place, and their fields; as :class:`WholeNumberChains`, for any color classes."""

    def __init__(
        self, state: Tensor, bounds: Sequence[int], couplings: list[list[tuple[slice, Tensor]]], scale: float
    ) -> None:
        self._state, self._couplings, self._scale = state, couplings, scale
        self._parts = [state[:, start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
        self._logits = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in self._parts]
        self._one = state.new_ones(())

    def logits(self, k: int, base: Tensor) -> Tensor:
        logits = self._logits[k]
        for columns, coupling in self._couplings[k]:
            base = torch.addmm(base, self._state[:, columns], coupling, alpha=self._scale, out=logits)
        return logits if base is logits else logits.copy_(base)

    def update(self, k: int, difference: Tensor) -> None:
        torch.copysign(self._one, difference, out=self._parts[k])

    def spins(self) -> Tensor:
        return self._state


def _couplings_of_classes(problem: IsingModel) -> list[list[tuple[slice, Tensor]]]:
    """For each color class: columns of its neighbors, nodes sorted by class, and their couplings to it."""
    graph, n = problem.graph, problem.n_spins
    if graph.layers is not None:
        first, block = graph.layers[0], problem.J.view(graph.layers)
        return [[(slice(first, n), block.T)], [(slice(0, first), block)]]
    bounds, matrix = graph.color_bounds, problem.edge_couplings
    if matrix is None:
        return [[] for _ in bounds[1:]]
    for order in graph.color_permutation(matrix.device)[:1]:
        matrix = matrix.index_select(0, order).index_select(1, order)
    return [
        [
            (columns, matrix[columns, start:stop])
            for columns in (slice(0, start), slice(stop, n))
            if columns.start < columns.stop
        ]
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
    ]


class _Uniform:
    """Uniform numbers from the seed that a generator gives, as whole multiples of ``2**-31``.

    In main memory they come from numpy's SFC64, two from each of its numbers: :func:`torch.rand` alone takes a good
    part of a sweep of a few hundred spins. They go into one piece of memory, in parts that the cache holds: fresh
    memory for each class of spins took longer than the numbers.
    """

    scale = 2.0**-31

    def __init__(self, generator: torch.Generator, n_ahead: int, like: Tensor) -> None:
        self._generator = generator
        self._source = np.random.SFC64(_Words(generator)) if like.device.type == "cpu" else None
        self._numbers = like.new_empty(n_ahead + n_ahead % 2)
        self._n_used = n_ahead

    def multiples(self, n_rows: int, n_columns: int) -> Tensor:
        """Numbers of ``[0, 1]``, divided by :attr:`scale`, of the given shape; good until the next call."""
        n = n_rows * n_columns
        if self._n_used + n > len(self._numbers):
            self._draw()
        self._n_used += n
        return self._numbers[self._n_used - n : self._n_used].view(n_rows, n_columns)

    def _draw(self) -> None:
        self._n_used = 0
        if self._source is None:
            words = torch.empty(len(self._numbers) // 2, dtype=torch.int64, device=self._numbers.device)
            words.random_(-(2**63), None, generator=self._generator)
            self._numbers.copy_(words.bitwise_and_(_WITHOUT_SIGNS).view(torch.int32))
            return
        for part in self._numbers.split(2 * _WORDS_PER_DRAW):
            words = torch.from_numpy(self._source.random_raw(len(part) // 2).view(np.int64))
            part.copy_(words.bitwise_and_(_WITHOUT_SIGNS).view(torch.int32))


class _Words(ISeedSequence):
    """Seed of a numpy stream: words of a torch generator. Hashing them once more would take longer than a sweep."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def generate_state(self, n_words: int, dtype: type = np.uint64) -> np.ndarray:
        words = torch.empty(n_words, dtype=torch.int64).random_(-(2**63), None, generator=self._generator)
        return words.numpy().view(dtype)
