r"""The factorial posterior over spins, and their relaxations.

:math:`q(s \mid x) = \prod_i \sigma(l_i)^{[s_i = +1]} \sigma(-l_i)^{[s_i = -1]}` with the mean spins
:math:`m_i = \tanh(l_i / 2)`.

A :class:`Smoothing` says what the decoder sees during training in place of a discrete spin, so that a gradient
reaches the logits. None of them changes the KL divergence, which needs the mean spins only. Not implemented:
hierarchical posteriors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.nn.functional import logsigmoid, softplus

if TYPE_CHECKING:
    from collections.abc import Sequence

SmoothingName = Literal["straight-through", "gumbel", "spike-exponential"]


@dataclass(frozen=True)
class Smoothing(ABC):
    """Differentiable stand-in ``zeta`` for a spin ``z``."""

    @abstractmethod
    def relax(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Return ``zeta`` in ``[-1, 1]`` for logits and uniform noise of the same shape; carries a gradient."""

    def emit(self, spins: Tensor, uniform: Tensor) -> Tensor:
        """Return what the decoder sees outside training, given hard spins: the spins themselves."""
        return spins

    def recover(self, zeta: Tensor) -> Tensor:
        """Return the hard spins behind an emitted ``zeta``."""
        return zeta


@dataclass(frozen=True)
class StraightThrough(Smoothing):
    r"""Hard spins forward, the gradient of the mean spin backward :cite:p:`Bengio13`.

    The generative model is discrete and its ELBO is honest; the gradient to the logits is biased wherever the
    decoder is not linear in each spin.
    """

    def relax(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """See :meth:`Smoothing.relax`."""
        mean = torch.tanh(0.5 * logits)
        return _harden(logits, uniform) + (mean - mean.detach())


@dataclass(frozen=True)
class Gumbel(Smoothing):
    r"""Concrete relaxation :math:`\zeta = \tanh((l + \log u - \log(1 - u)) / 2T)` :cite:p:`Maddison17`.

    As in GumBolt :cite:p:`Khoshaman18a` the relaxed spin is used in training only; outside training the decoder
    sees hard spins. Unbiased for the relaxed objective, biased for the discrete one, less so at low temperature,
    where its variance grows.
    """

    temperature: float = 0.5

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            msg = f"temperature={self.temperature} must be above zero; 0.3 to 1 is usual."
            raise ValueError(msg)

    def relax(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """See :meth:`Smoothing.relax`."""
        return torch.tanh(0.5 * (logits + torch.logit(uniform)) / self.temperature)


@dataclass(frozen=True)
class SpikeExponential(Smoothing):
    r"""Spike-and-exponential smoothing of the discrete VAE :cite:p:`Rolfe17`, used by the QBM-VAE.

    On bits: :math:`\zeta = 0` for :math:`b = 0`, and density proportional to :math:`e^{\beta \zeta}` on
    :math:`[0, 1]` for :math:`b = 1`; here stretched to :math:`[-1, 1]`. It belongs to the generative model, so the
    decoder sees it outside training too. Unbiased for its own model. ``sharpness`` is :math:`\beta`: the discrete
    VAE used 4 to 5.
    """

    sharpness: float = 4.0

    def __post_init__(self) -> None:
        if not self.sharpness > 0:
            msg = f"sharpness={self.sharpness} must be above zero; 3 to 6 is usual."
            raise ValueError(msg)

    def _inverse(self, rank: Tensor) -> Tensor:
        return torch.log1p(rank * math.expm1(self.sharpness)) / self.sharpness

    def relax(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """See :meth:`Smoothing.relax`."""
        q = torch.sigmoid(logits)
        # The inverse CDF of the mixture; the floor keeps 0/0 out of the gradient where q underflows.
        rank = (uniform + q - 1.0).clamp(min=0.0) / q.clamp(min=torch.finfo(q.dtype).tiny ** 0.5)
        return 2.0 * self._inverse(rank) - 1.0

    def emit(self, spins: Tensor, uniform: Tensor) -> Tensor:
        """Draw ``zeta`` given hard spins."""
        above_spike = -1.0 + torch.finfo(spins.dtype).eps
        exponential = (2.0 * self._inverse(uniform) - 1.0).clamp(min=above_spike)
        return torch.where(spins > 0, exponential, -torch.ones_like(spins))

    def recover(self, zeta: Tensor) -> Tensor:
        """Return the hard spins behind an emitted ``zeta``: -1 at the spike, +1 elsewhere."""
        return torch.where(zeta > -1.0, 1.0, -1.0).to(zeta)


_BY_NAME: dict[str, type[Smoothing]] = {
    "straight-through": StraightThrough,
    "gumbel": Gumbel,
    "spike-exponential": SpikeExponential,
}


def build_smoothing(spec: SmoothingName | Smoothing) -> Smoothing:
    """Turn a smoothing's name into an instance with default settings.

    Raises
    ------
    ValueError
        If the name is unknown.
    TypeError
        If ``spec`` is neither a name nor a :class:`Smoothing`.
    """
    if isinstance(spec, Smoothing):
        return spec
    if isinstance(spec, str):
        if spec in _BY_NAME:
            return _BY_NAME[spec]()
        msg = (
            f"Unknown smoothing {spec!r}. Use one of {', '.join(map(repr, _BY_NAME))}, or an instance from "
            "`qbmscvi.distributions`, e.g. `Gumbel(temperature=0.3)`."
        )
        raise ValueError(msg)
    msg = f"`smoothing` must be a name or a qbmscvi.distributions.Smoothing, got {type(spec).__name__}."
    raise TypeError(msg)


class FactorialPosterior(Distribution):
    r"""Independent spins, as a torch distribution.

    Values have shape ``(..., n_spins)`` and are hard spins in ``{-1, +1}``. ``log_prob`` and ``entropy`` are per spin,
    so that sums over the last axis are those of the vector, as scvi-tools expects of
    :class:`torch.distributions.Normal`.

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
        """Rebuild a posterior from its :attr:`mean` and :attr:`variance`, which come back unchanged.

        Parameters
        ----------
        mean, variance
            ``m`` and ``1 - m^2`` of each spin, shape ``(..., n_spins)``.
        smoothing
            Relaxation used by :meth:`rsample`.
        """
        # l = log (1 + m) / (1 - m), and 1 - |m| = var / (1 + |m|): the variance still resolves a saturated spin whose
        # mean is rounded to one. Below the smallest normal number, at |l| = 88 in single precision, it ends too.
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
        """The mean, under the name of :class:`torch.distributions.Normal`."""
        return self.mean

    @property
    def scale(self) -> Tensor:
        """The standard deviation, under the name of :class:`torch.distributions.Normal`."""
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
        return _harden(self.logits, self._noise(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of hard spins, per spin, in nats."""
        return logsigmoid(value * self.logits)

    def entropy(self) -> Tensor:
        """Entropy per spin, in nats."""
        # H = softplus(l) - l sigma(l), written without cancellation for large |l|.
        magnitude = self.logits.abs()
        return softplus(-magnitude) + magnitude * torch.sigmoid(-magnitude)


class MixtureComponent(FactorialPosterior):
    r"""Component of an aggregated posterior, continued from hard to mean spins.

    A product of spin masses is linear in each spin: :math:`q(s) = \prod_i (1 + s_i m_i) / 2`. Put at mean spins, this
    is the mass expected for independent spins of these means.

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


def _harden(logits: Tensor, uniform: Tensor) -> Tensor:
    return torch.where(uniform < torch.sigmoid(logits), 1.0, -1.0).to(logits)
