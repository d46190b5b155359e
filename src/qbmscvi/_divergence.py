r"""KL divergence of a factorial posterior from a Boltzmann distribution, in one pass forward and one backward.

Per cell and unit, the mean energy less the entropy and an equal share of log Z; a term that couples two units is
halved:

.. math::

    \tfrac12 (\mu_a^2 + \sigma_a^2) - a_a \mu_a - \tfrac12 \mu_a (W m)_a - H_a + \frac{\log Z}{n}, \qquad
    m_i \bigl(h_i + \tfrac12 (J m)_i - \tfrac12 (W^\top \mu)_i\bigr) - H_i + \frac{\log Z}{n} .

Cells may feel the couplings ``J`` and ``W`` with a weight below one: then the gradient of that mean energy to what the
posterior is made of is so much smaller. Its value, and the gradient to the prior, are not.

The gradient is written out, because as some fifty operations on small tensors it took longer than sampling; it cannot
be differentiated again. That of log Z comes from moments of the prior, and its value from a buffer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from qbmscvi.ising import edge_fields, edge_products

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

    from qbmscvi.graphs import Graph

_GAUSSIAN_ENTROPY = 0.5 * (1.0 + math.log(2.0 * math.pi))  # at unit scale


class Moments(NamedTuple):
    """Moments of the spins of a prior, as in :class:`~qbmscvi._prior.BoltzmannPrior`."""

    spin_mean: Tensor
    edge_mean: Tensor
    spin_second: Tensor


class LogPartition(Function):
    """Value of a buffer with the gradient of log Z; takes ``log_z, a, h, W, J`` and their :class:`Moments`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, log_z: Tensor, a: Tensor, h: Tensor, W: Tensor, J: Tensor, moments: Moments
    ) -> Tensor:
        ctx.save_for_backward(a, W, *moments)
        return log_z.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, W, *moments = ctx.saved_tensors
        return None, *_partition_gradients(grad, a, W, Moments(*moments)), None


class FactorialKL(Function):
    """KL per unit, shape ``(n_cells, n_gaussian + n_spins)``.

    Takes mean and scale of the Gaussian layer, logits of the spins, their means where these are known better than from
    the logits (which alone get a gradient), the prior's ``a, h, W, J``, its log Z and :class:`Moments`, its graph, and
    the weight with which cells feel the couplings.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        loc: Tensor,
        scale: Tensor,
        logits: Tensor,
        mean: Tensor | None,
        a: Tensor,
        h: Tensor,
        W: Tensor,
        J: Tensor,
        log_z: Tensor,
        moments: Moments,
        graph: Graph,
        coupling_weight: float,
    ) -> Tensor:
        n_gaussian = loc.shape[-1]
        descent = logits.abs().neg_()  # -|l|
        rarer = torch.sigmoid(descent)
        if mean is None:
            mean = torch.rsub(rarer, 1.0, alpha=2.0).copysign_(logits)
        field = _add_fields(h.expand_as(mean), mean, J, graph, scale=0.5)
        if n_gaussian:
            field = torch.addmm(field, loc, W, alpha=-0.5)
        share = log_z / (n_gaussian + len(h))
        # H = softplus(l) - l sigma(l), written without cancellation for large |l|: softplus(-|l|) + |l| sigma(-|l|).
        kl = torch.addcmul(share, mean, field).sub_(softplus(descent)).addcmul_(descent, rarer)
        drive = None
        if n_gaussian:
            drive = torch.addmm(a, mean, W.T, alpha=0.5)
            gaussian = torch.sub(share - _GAUSSIAN_ENTROPY, scale.log()).addcmul_(loc, drive, value=-1.0)
            gaussian.addcmul_(loc, loc, value=0.5).addcmul_(scale, scale, value=0.5)
            kl = torch.cat([gaussian, kl], dim=-1)
        ctx.save_for_backward(loc, scale, logits, mean, a, h, W, J, rarer, field, drive, *moments)
        ctx.graph, ctx.coupling_weight = graph, coupling_weight
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        loc, scale, logits, mean, a, h, W, J, rarer, field, drive, *moments = ctx.saved_tensors
        graph, n_gaussian, felt = ctx.graph, loc.shape[-1], ctx.coupling_weight
        needs = dict(zip(("loc", "scale", "logits", "mean", "a", "h", "W", "J"), ctx.needs_input_grad, strict=False))
        # In training units are summed. Then both halves of a term that couples two of them have the same weight, and
        # three products are enough in place of six: a tenth of what the divergence takes (benchmarks/SPEED.md).
        of_sum = grad.stride(-1) == 0
        grad_v, grad_s = (grad[..., :1],) * 2 if of_sum else (grad[..., :n_gaussian], grad[..., n_gaussian:])
        grad_mean = grad_s * mean  # weight of the field of each spin
        weight = grad_v * loc if n_gaussian else None
        grad_loc = grad_scale = grad_logits = None
        if needs["logits"]:
            # dm/dl = 2 r (1 - r), r the probability of the rarer state, and dH/dl = -l r (1 - r).
            if of_sum:
                slope = torch.add(logits, field, alpha=4.0 * felt).add_(h, alpha=2.0 - 4.0 * felt).mul_(grad_s)
            else:
                slope = torch.add(logits, field, alpha=2.0 * felt).add_(h, alpha=2.0 - 2.0 * felt).mul_(grad_s)
                slope = _add_fields(slope, grad_mean, J, graph, scale=felt)
                if n_gaussian:
                    slope = torch.addmm(slope, weight, W, alpha=-felt)
            grad_logits = torch.addcmul(rarer, rarer, rarer, value=-1.0).mul_(slope)
        if n_gaussian and needs["loc"]:
            if of_sum:
                grad_loc = torch.add(loc, drive, alpha=-2.0 * felt).add_(a, alpha=2.0 * felt - 1.0).mul_(grad_v)
            else:
                grad_loc = torch.addcmul(weight, grad_v, drive, value=-felt).sub_(grad_v * a, alpha=1.0 - felt)
                grad_loc.addmm_(grad_mean, W.T, alpha=-0.5 * felt)
        if n_gaussian and needs["scale"]:
            grad_scale = grad_v * (scale - scale.reciprocal())
        of_prior = [None] * 4
        if any(needs[name] for name in "ahWJ"):
            of_prior = _partition_gradients(grad.sum() / grad.shape[-1], a, W, Moments(*moments))
            of_prior[1].add_(grad_mean.sum(0))
            _add_products(of_prior[3], grad_mean, mean, graph, both_ways=not of_sum)
            if n_gaussian:
                of_prior[0].sub_(weight.sum(0))
                if of_sum:
                    of_prior[2].addmm_(weight.T, mean, alpha=-1.0)
                else:
                    of_prior[2].addmm_(loc.T, grad_mean, alpha=-0.5).addmm_(weight.T, mean, alpha=-0.5)
        return grad_loc, grad_scale, grad_logits, None, *of_prior, None, None, None, None


def _add_fields(base: Tensor, values: Tensor, J: Tensor, graph: Graph, scale: float) -> Tensor:
    """``base + scale * edge_fields(values, J, graph)``, a new tensor unless there is no edge; no autograd."""
    if not graph.n_edges:
        return base
    if graph.layers is None:
        return torch.add(base, edge_fields(values, J, graph), alpha=scale)
    n_first, block, fields = graph.layers[0], J.view(graph.layers), torch.empty_like(values)
    torch.addmm(base[:, :n_first], values[:, n_first:], block.T, alpha=scale, out=fields[:, :n_first])
    torch.addmm(base[:, n_first:], values[:, :n_first], block, alpha=scale, out=fields[:, n_first:])
    return fields


def _add_products(of_J: Tensor, left: Tensor, right: Tensor, graph: Graph, both_ways: bool) -> None:
    """Add to each edge the products of ``left`` at one end with ``right`` at the other, or the mean of both ways."""
    if not graph.n_edges:
        return
    share = 0.5 if both_ways else 1.0
    if graph.layers is None:
        products = edge_products(left, right, graph)
        of_J.add_(products + edge_products(right, left, graph) if both_ways else products, alpha=share)
        return
    n_first, block = graph.layers[0], of_J.view(graph.layers)
    block.addmm_(left[:, :n_first].T, right[:, n_first:], alpha=share)
    if both_ways:
        block.addmm_(right[:, :n_first].T, left[:, n_first:], alpha=share)


def _partition_gradients(grad: Tensor, a: Tensor, W: Tensor, moments: Moments) -> list[Tensor | None]:
    """Gradients of ``grad * log Z`` to ``a, h, W, J``: minus those of the mean energy of the prior."""
    mean, edge_mean, second = moments
    less = -grad
    if not len(a):
        return [None, mean * less, None, edge_mean * less]
    of_a = torch.addmv(a, W, mean)
    of_W = torch.addmm(torch.outer(a, mean), W, second)
    return [of_a * grad, mean * less, of_W * grad, edge_mean * less]
