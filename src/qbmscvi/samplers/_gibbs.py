r"""Block Gibbs sampling on the device of the problem.

The color classes of the graph are updated in turn, all spins of a class at once:
:math:`p(s_i = +1 \mid s_{\setminus i}) = \sigma(-2 \beta f_i)` with :math:`f_i = h_i + \sum_j J_{ij} s_j`. A factor
``F`` of the problem adds one block, the Gaussian variable :math:`v \mid s \sim N(F s, 1/\beta)` of its
Hubbard-Stratonovich form, and :math:`-F^\top v` to the fields; spins that interact only through the factor
are then updated together. Sweeps leave the Boltzmann distribution invariant; the only error is that of
finite chains.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qbmscvi.samplers._base import Draw, Sampler, SamplerTraits

if TYPE_CHECKING:
    from qbmscvi.ising import IsingModel
    from qbmscvi.samplers._base import SamplingRequest

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
    field, coupling, factor = problem.h, problem.edge_couplings, problem.factor
    if permutation:
        order, inverse = permutation
        state = spins.index_select(1, order)  # a copy; six times as fast as indexing
        field, factor = field[order], None if factor is None else factor.index_select(1, order)
        coupling = None if coupling is None else coupling.index_select(0, order).index_select(1, order)
    else:
        state = spins.clone()
    n_chains, n_spins = state.shape
    # Fields, couplings and factor are scaled once, so that a sum of them is the logit of s_i = +1.
    field = -2.0 * beta * field
    coupling = None if coupling is None else -2.0 * beta * coupling
    one, uniform = torch.ones((), device=device, dtype=dtype), _Uniform(generator, state)
    classes = list(zip(bounds[:-1], bounds[1:], strict=True))
    if is_reversible:
        classes += classes[-2::-1]
    for _ in range(n_sweeps):
        base = field
        if factor is not None:
            noise = torch.randn(n_chains, len(factor), generator=generator, device=device, dtype=dtype)
            gaussian = torch.addmm(noise, state, factor.T, beta=beta**-0.5)  # v given s, (n_chains, rank)
            base = torch.addmm(field, gaussian, factor, alpha=2.0 * beta)  # (n_chains, n_spins)
        for start, stop in classes:
            logits = base[..., start:stop]
            if coupling is not None and start > 0:
                logits = torch.addmm(logits, state[:, :start], coupling[:start, start:stop])
            if coupling is not None and stop < n_spins:
                logits = torch.addmm(logits, state[:, stop:], coupling[stop:, start:stop])
            multiples = uniform.multiples(n_chains, stop - start)
            difference = torch.sub(torch.sigmoid(logits), multiples, alpha=uniform.scale)
            torch.copysign(one, difference, out=state[:, start:stop])
    return state.index_select(1, inverse) if permutation else state


class _Uniform:
    """Uniform numbers from the seed that a generator gives, as whole multiples of ``2**-31``.

    In main memory they come from numpy's SFC64, two from each of its numbers: :func:`torch.rand` alone takes a good
    part of a sweep of a few hundred spins.
    """

    scale = 2.0**-31

    def __init__(self, generator: torch.Generator, like: Tensor) -> None:
        self._generator, self._device, self._dtype = generator, like.device, like.dtype
        self._source = None
        if like.device.type == "cpu":
            self._source = np.random.SFC64(int(torch.randint(2**63 - 1, (), generator=generator)))

    def multiples(self, *shape: int) -> Tensor:
        """Numbers of ``[0, 1]``, divided by :attr:`scale`, of the given shape."""
        n = math.prod(shape)
        if self._source is None:
            bits = torch.empty((n + 1) // 2, dtype=torch.int64, device=self._device)
            bits.random_(-(2**63), None, generator=self._generator)
        else:
            bits = torch.from_numpy(self._source.random_raw((n + 1) // 2).view(np.int64))
        return bits.bitwise_and_(_WITHOUT_SIGNS).view(torch.int32)[:n].view(shape).to(self._dtype)
