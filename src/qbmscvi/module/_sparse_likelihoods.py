r"""scVI's count likelihoods, with costly terms of the log probability at non-zero counts only.

These subclasses of :mod:`scvi.distributions` override ``log_prob`` alone; only its time and rounding differ. At a zero,
:math:`\log p(0) = -\theta \log(1 + \mu / \theta)`; a count :math:`x` adds

.. math:: x \log\frac{\mu}{\theta + \mu} + \log\Gamma(x + \theta) - \log\Gamma(\theta) - \log\Gamma(x + 1),

Log gammas and digammas of every entry would take most of the time of a training step. The gradient is explicit and
cannot be differentiated again. The terms use scVI's ``eps`` as scVI does. scVI's own code handles gradients to the
counts, values that are no counts, and Apple's MPS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scvi.distributions import NegativeBinomial, Normal, Poisson, ZeroInflatedNegativeBinomial
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx
    from torch.distributions import Distribution

ROUNDING = 1e-3
"""Largest distance to an integer, relative to integers above one, that counts as rounding error."""

_EPS = 1e-8  # scVI's


class SparseNegativeBinomial(NegativeBinomial):
    """scVI's negative binomial distribution, faster where most counts are zero; takes ``mu`` and ``theta``."""

    _zero_inflation: Tensor | None = None

    def __init__(self, *, mu: Tensor, theta: Tensor, **kwargs: Any) -> None:
        super().__init__(mu=mu, theta=theta, **kwargs)
        self._theta_per_gene = theta  # scVI broadcasts it; here terms of a gene are computed once per gene

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts, of the shape that ``value`` and the parameters broadcast to."""
        if self._validate_args or value.requires_grad or self.on_mps:
            return super().log_prob(value)
        shape = torch.broadcast_shapes(value.shape, self.mu.shape)
        position, counts = _nonzero(value, shape)
        return self._sparse_log_prob(position, counts, shape, torch.result_type(value, self.mu))

    def _sparse_log_prob(self, position: Tensor, counts: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        logits = self._zero_inflation
        for parameter in (self.theta, logits):
            dtype = dtype if parameter is None else torch.promote_types(dtype, parameter.dtype)
        return _LogProb.apply(
            self.mu.to(dtype).expand(shape),
            self._theta_per_gene.to(dtype),
            None if logits is None else logits.to(dtype).expand(shape),
            position,
            counts.to(dtype),
        )


class SparseZeroInflatedNegativeBinomial(SparseNegativeBinomial, ZeroInflatedNegativeBinomial):
    """scVI's zero-inflated negative binomial distribution, faster where most counts are zero."""

    @property
    def _zero_inflation(self) -> Tensor:
        return self.zi_logits

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts, of the shape that ``value`` and the parameters broadcast to."""
        shape = torch.broadcast_shapes(value.shape, self.mu.shape)
        position, counts = _nonzero(value, shape)
        if value.requires_grad or self.on_mps or not _are_counts(counts):
            # warns of values that are no counts
            value = value if value.requires_grad else without_rounding_error(value)
            return ZeroInflatedNegativeBinomial.log_prob(self, value)
        return self._sparse_log_prob(position, counts, shape, torch.result_type(value, self.mu))


class SparsePoisson(Poisson):
    """scVI's Poisson distribution, faster where most counts are zero."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts, of the shape that ``value`` and the rate broadcast to."""
        shape = torch.broadcast_shapes(value.shape, self.rate.shape)
        position, counts = _nonzero(value, shape)
        if value.requires_grad or (self._validate_args and not _are_counts(counts)):
            # refuses values that are no counts
            return super().log_prob(value if value.requires_grad else without_rounding_error(value))
        rate = self.rate.to(torch.result_type(value, self.rate)).expand(shape)
        counts = counts.to(rate)
        rate_there = rate.reshape(-1).index_select(0, position)
        gain = torch.xlogy(counts, rate_there) - torch.lgamma(counts + 1)
        return torch.neg(rate).reshape(-1).index_add(0, position, gain).view(shape)


class RebuildableNormal(Normal):
    """scVI's normal distribution, with torch's names of its parameters, which scvi-tools needs to concatenate."""

    def __init__(self, loc: Tensor, scale: Tensor, **kwargs: Any) -> None:
        super().__init__(loc, scale, **kwargs)


def with_sparse_log_prob(px: Distribution, theta: Tensor | None = None) -> Distribution:
    """Return the same distribution with the faster ``log_prob`` if there is one.

    Parameters
    ----------
    px
        Distribution built by scVI's module.
    theta
        Inverse dispersion before scVI broadcast it, e.g. of shape ``(n_genes,)``; None for ``px.theta``.
    """
    if type(px) is Poisson:
        return SparsePoisson(px.rate, scale=px.scale)
    if type(px) is NegativeBinomial:
        return SparseNegativeBinomial(mu=px.mu, theta=px.theta if theta is None else theta, scale=px.scale)
    if type(px) is ZeroInflatedNegativeBinomial:
        theta = px.theta if theta is None else theta
        return SparseZeroInflatedNegativeBinomial(mu=px.mu, theta=theta, zi_logits=px.zi_logits, scale=px.scale)
    if type(px) is Normal:
        return RebuildableNormal(px.loc, px.scale, normal_mu=px.normal_mu)
    return px


class _LogProb(Function):
    """Log probability of the negative binomial, zero-inflated or not, from the non-zero counts.

    ``mu`` and ``logits`` have the shape of the result; ``theta`` broadcasts to it. ``position`` counts its elements in
    row-major order.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, mu: Tensor, theta: Tensor, logits: Tensor | None, position: Tensor, counts: Tensor
    ) -> Tensor:
        log_ratio = torch.log1p(mu * (theta + _EPS).reciprocal())  # log((theta + mu) / theta)
        log_prob = log_ratio * -theta  # of a zero that is a count
        mu_there, theta_there = (_take(values, position, mu.shape) for values in (mu, theta))
        gain = counts * torch.log((mu_there + _EPS) / (theta_there + mu_there + _EPS))
        gain += torch.lgamma(counts + theta_there) - torch.lgamma(counts + 1)
        gain -= _take(torch.lgamma(theta), position, mu.shape)
        odds = None
        if logits is None:
            log_prob.view(-1).index_add_(0, position, gain)
        else:
            odds = log_prob - logits  # log odds of a zero that is a count
            log_prob_count = softplus(-logits)
            log_prob = softplus(odds) - log_prob_count
            gain += _take(odds, position, mu.shape) - _take(log_prob_count, position, mu.shape)
            log_prob.view(-1).index_copy_(0, position, gain)
        ctx.save_for_backward(mu, theta, logits, position, counts, log_ratio, odds)
        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        mu, theta, logits, position, counts, log_ratio, odds = ctx.saved_tensors
        needs_mu, needs_theta, needs_logits, *_ = ctx.needs_input_grad
        grad_mu = grad_theta = grad_logits = None
        grad_there = _take(grad, position, mu.shape)
        if logits is not None:
            is_count = torch.sigmoid(odds)  # probability that the zero is a count
            is_count.view(-1).index_fill_(0, position, 1.0)
            if needs_logits:
                grad_logits = torch.sigmoid(-logits).sub_(is_count).mul_(grad)
            grad = is_count.mul_(grad)
        theta_eps = theta + _EPS
        inverse = (mu + theta_eps).reciprocal_()
        mu_there, theta_there, inverse_there = (_take(values, position, mu.shape) for values in (mu, theta, inverse))
        if needs_mu:
            grad_mu = (inverse * -theta).mul_(grad)
            gain = grad_there * counts * theta_there * inverse_there / (mu_there + _EPS)
            grad_mu.view(-1).index_add_(0, position, gain)
        if needs_theta:
            grad_theta = inverse.mul_(mu).mul_(theta / theta_eps).sub_(log_ratio).mul_(grad)
            gain = torch.digamma(counts + theta_there) - _take(torch.digamma(theta), position, mu.shape)
            gain = grad_there * (gain - counts * inverse_there)
            grad_theta.view(-1).index_add_(0, position, gain)
            grad_theta = grad_theta.sum_to_size(theta.shape)
        return grad_mu, grad_theta, grad_logits, None, None


def without_rounding_error(counts: Tensor) -> Tensor:
    """Round values that a transformation and its inverse moved off integers; other values stay."""
    nearest = counts.round()
    return torch.where((counts - nearest).abs() <= ROUNDING * nearest.clamp(min=1.0), nearest, counts)


def _nonzero(value: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Positions, in row-major order, and values of the entries other than zero of ``value`` expanded to ``shape``."""
    if value.shape != shape[len(shape) - value.dim() :]:
        value = value.expand(shape)
    flat = value.reshape(-1)
    position = flat.bool().nonzero().squeeze(1)
    counts = without_rounding_error(flat.index_select(0, position))
    n_copies = shape.numel() // max(flat.numel(), 1)
    if n_copies > 1:
        starts = torch.arange(n_copies, device=position.device) * flat.numel()
        position = (starts[:, None] + position).reshape(-1)
        counts = counts.repeat(n_copies)
    return position, counts


def _are_counts(values: Tensor) -> bool:
    return bool(((values > 0) & (values == values.floor())).all())


def _take(values: Tensor, position: Tensor, shape: torch.Size) -> Tensor:
    return values.expand(shape).reshape(-1).index_select(0, position)
