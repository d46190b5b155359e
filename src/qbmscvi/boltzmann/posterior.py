r"""The factorial posterior over spins.

:math:`q(s \mid x) = \prod_i \sigma(l_i)^{[s_i = +1]} \sigma(-l_i)^{[s_i = -1]}` with the mean spins
:math:`m_i = \tanh(l_i / 2)`. Not implemented: hierarchical posteriors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.nn.functional import logsigmoid, softplus

from qbmscvi.boltzmann.smoothing import Smoothing, StraightThrough, harden

if TYPE_CHECKING:
    from collections.abc import Sequence


class FactorialPosterior(Distribution):
    r"""Independent spins, as a torch distribution.

    Values have shape ``(..., n_spins)`` and are hard spins in ``{-1, +1}``. As scvi-tools expects of
    :class:`torch.distributions.Normal`, ``log_prob`` and ``entropy`` are per spin; sum over the last axis for the whole
    vector.

    Parameters
    ----------
    logits
        Log odds of spin +1, shape ``(..., n_spins)``.
    smoothing
        Relaxation used by :meth:`rsample`.
    """

    arg_constraints: ClassVar = {"logits": constraints.real}
    has_rsample = True

    def __init__(self, logits: Tensor, smoothing: Smoothing | None = None, validate_args: bool | None = False) -> None:
        self.logits = logits
        self.smoothing = StraightThrough() if smoothing is None else smoothing
        self.given_mean: Tensor | None = None
        super().__init__(logits.shape, validate_args=validate_args)

    @classmethod
    def from_moments(cls, mean: Tensor, variance: Tensor, smoothing: Smoothing | None = None) -> FactorialPosterior:
        """Rebuild a posterior from its :attr:`mean` and :attr:`variance`, without loss.

        Parameters
        ----------
        mean, variance
            ``m`` and ``1 - m^2`` of each spin, shape ``(..., n_spins)``.
        smoothing
            Relaxation used by :meth:`rsample`.
        """
        # l = log (1 + m) / (1 - m), and 1 - |m| = var / (1 + |m|). A saturated spin has a mean that is rounded to one;
        # its variance still resolves l, up to the smallest normal number (|l| = 88 in single precision).
        magnitude = 2.0 * torch.log1p(mean.abs()) - variance.clamp(min=torch.finfo(variance.dtype).tiny).log()
        is_saturated = mean.abs() > 0.5
        logits = torch.where(is_saturated, mean.sign() * magnitude, 2.0 * torch.atanh(mean.clamp(-0.5, 0.5)))
        posterior = cls(logits, smoothing)
        posterior.given_mean = mean
        return posterior

    @property
    def mean(self) -> Tensor:
        """Mean spins ``tanh(logits / 2)``."""
        return torch.tanh(0.5 * self.logits) if self.given_mean is None else self.given_mean

    @property
    def variance(self) -> Tensor:
        """Variance ``1 - m^2`` of the spins."""
        # sigma(l) sigma(-l) does not cancel for saturated logits, 1 - m^2 does.
        return 4.0 * torch.sigmoid(self.logits) * torch.sigmoid(-self.logits)

    @property
    def loc(self) -> Tensor:
        """The mean, as :class:`torch.distributions.Normal` names it."""
        return self.mean

    @property
    def scale(self) -> Tensor:
        """The standard deviation, as :class:`torch.distributions.Normal` names it."""
        return self.variance.sqrt()

    def _noise(self, sample_shape: Sequence[int]) -> Tensor:
        shape = torch.Size(sample_shape) + self.logits.shape
        uniform = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
        return uniform.clamp(min=torch.finfo(uniform.dtype).tiny)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw relaxed spins, with a gradient to the logits."""
        uniform = self._noise(sample_shape)
        return self.smoothing.relax(self.logits.expand_as(uniform), uniform)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw hard spins, without a gradient."""
        return harden(self.logits, self._noise(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of hard spins, per spin, in nats."""
        return logsigmoid(value * self.logits)

    def entropy(self) -> Tensor:
        """Entropy per spin, in nats."""
        # H = softplus(l) - l sigma(l), written without cancellation for large |l|.
        magnitude = self.logits.abs()
        return softplus(-magnitude) + magnitude * torch.sigmoid(-magnitude)


class MixtureComponent(FactorialPosterior):
    r"""Component of an aggregated posterior, for hard and for mean spins.

    A product of spin masses is linear in each spin: :math:`q(s) = \prod_i (1 + s_i m_i) / 2`. Its value at mean spins
    is the expected mass of independent spins with these means.

    Parameters
    ----------
    logits
        As in :class:`FactorialPosterior`.
    """

    support = constraints.interval(-1.0, 1.0)  # hard or mean spins

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass of hard or mean spins, per spin, in nats."""
        # As a sum over the two states of each spin: 1 + s m would vanish for saturated logits.
        up, down = torch.log1p(value) + logsigmoid(self.logits), torch.log1p(-value) + logsigmoid(-self.logits)
        return torch.logaddexp(up, down) - math.log(2.0)
