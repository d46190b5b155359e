r"""The factorial posterior over a Gaussian and a spin layer, and the relaxations of its spins.

:math:`q(v, s \mid x) = \prod_a N(v_a; \mu_a, \sigma_a^2) \prod_i \sigma(l_i)^{[s_i = +1]} \sigma(-l_i)^{[s_i = -1]}`;
either layer may be empty. The mean spin is :math:`m_i = \tanh(l_i / 2)`.

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
    r"""Independent Gaussian and spin units, as a torch distribution over ``z = [v, s]``.

    Values have shape ``(..., n_gaussian + n_spins)``, Gaussian units first, hard spins in ``{-1, +1}`` after them.
    ``log_prob`` and ``entropy`` are per unit, so that sums over the last axis are those of the vector, as
    scvi-tools expects of :class:`torch.distributions.Normal`.

    Parameters
    ----------
    gaussian_loc, gaussian_scale
        Mean and standard deviation, shape ``(..., n_gaussian)``.
    logits
        Log odds of spin +1, shape ``(..., n_spins)``.
    smoothing
        Relaxation used by :meth:`rsample`.
    """

    arg_constraints: ClassVar = {
        "gaussian_loc": constraints.real,
        "gaussian_scale": constraints.positive,
        "logits": constraints.real,
    }
    has_rsample = True

    def __init__(
        self,
        gaussian_loc: Tensor,
        gaussian_scale: Tensor,
        logits: Tensor,
        smoothing: Smoothing | None = None,
        validate_args: bool | None = False,
    ) -> None:
        self.gaussian_loc = gaussian_loc
        self.gaussian_scale = gaussian_scale
        self.logits = logits
        self.smoothing = StraightThrough() if smoothing is None else smoothing
        self.given_spin_mean: Tensor | None = None
        width = gaussian_loc.shape[-1] + logits.shape[-1]
        super().__init__(torch.Size((*logits.shape[:-1], width)), validate_args=validate_args)

    @classmethod
    def from_moments(
        cls, mean: Tensor, variance: Tensor, n_gaussian: int, smoothing: Smoothing | None = None
    ) -> FactorialPosterior:
        """Rebuild a posterior from its :attr:`mean` and :attr:`variance`, which come back unchanged.

        Parameters
        ----------
        mean, variance
            Shape ``(..., n_gaussian + n_spins)``; of a spin, ``m`` and ``1 - m^2``.
        n_gaussian
            Number of Gaussian units.
        smoothing
            Relaxation used by :meth:`rsample`.
        """
        m, var = mean[..., n_gaussian:], variance[..., n_gaussian:]
        # l = log (1 + m) / (1 - m), and 1 - |m| = var / (1 + |m|): the variance still resolves a saturated spin whose
        # mean is rounded to one. Below the smallest normal number, at |l| = 88 in single precision, it ends too.
        magnitude = 2.0 * torch.log1p(m.abs()) - var.clamp(min=torch.finfo(var.dtype).tiny).log()
        is_saturated = m.abs() > 0.5
        logits = torch.where(is_saturated, m.sign() * magnitude, 2.0 * torch.atanh(m.clamp(-0.5, 0.5)))
        posterior = cls(mean[..., :n_gaussian], variance[..., :n_gaussian].sqrt(), logits, smoothing)
        posterior.given_spin_mean = m
        return posterior

    @property
    def n_gaussian(self) -> int:
        """Number of Gaussian units."""
        return self.gaussian_loc.shape[-1]

    @property
    def spin_mean(self) -> Tensor:
        """Mean spins ``tanh(logits / 2)``, shape ``(..., n_spins)``."""
        return torch.tanh(0.5 * self.logits) if self.given_spin_mean is None else self.given_spin_mean

    @property
    def mean(self) -> Tensor:
        """Mean of ``[v, s]``."""
        return torch.cat([self.gaussian_loc, self.spin_mean], dim=-1)

    @property
    def variance(self) -> Tensor:
        """Variance of ``[v, s]``; ``1 - m^2`` for a spin."""
        # sigma(l) sigma(-l) does not cancel for saturated logits, 1 - m^2 does.
        spin_var = 4.0 * torch.sigmoid(self.logits) * torch.sigmoid(-self.logits)
        return torch.cat([self.gaussian_scale.square(), spin_var], dim=-1)

    @property
    def loc(self) -> Tensor:
        """The mean, under the name of :class:`torch.distributions.Normal`."""
        return self.mean

    @property
    def scale(self) -> Tensor:
        """The standard deviation, under the name of :class:`torch.distributions.Normal`."""
        return self.variance.sqrt()

    def _noise(self, sample_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        shape = torch.Size(sample_shape)
        normal = torch.randn(
            shape + self.gaussian_loc.shape, dtype=self.gaussian_loc.dtype, device=self.gaussian_loc.device
        )
        uniform = torch.rand(shape + self.logits.shape, dtype=self.logits.dtype, device=self.logits.device)
        return normal, uniform.clamp(min=torch.finfo(uniform.dtype).tiny)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw ``[v, zeta]`` with a gradient to all parameters."""
        normal, uniform = self._noise(sample_shape)
        v = self.gaussian_loc + self.gaussian_scale * normal
        zeta = self.smoothing.relax(self.logits.expand_as(uniform), uniform)
        return torch.cat([v, zeta], dim=-1)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw ``[v, s]`` with hard spins, without a gradient."""
        normal, uniform = self._noise(sample_shape)
        v = self.gaussian_loc + self.gaussian_scale * normal
        return torch.cat([v, _harden(self.logits, uniform)], dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of ``v`` and log probability of hard spins, per unit, in nats."""
        v, s = value.split([self.n_gaussian, self.logits.shape[-1]], dim=-1)
        deviation = (v - self.gaussian_loc) / self.gaussian_scale
        gaussian = -0.5 * (deviation.square() + math.log(2.0 * math.pi)) - self.gaussian_scale.log()
        return torch.cat([gaussian, logsigmoid(s * self.logits)], dim=-1)

    def entropy(self) -> Tensor:
        """Entropy per unit, in nats (differential for the Gaussian units)."""
        # H = softplus(l) - l sigma(l), written without cancellation for large |l|.
        magnitude = self.logits.abs()
        spin = softplus(-magnitude) + magnitude * torch.sigmoid(-magnitude)
        if not self.n_gaussian:
            return spin
        gaussian = 0.5 * (1.0 + math.log(2.0 * math.pi)) + self.gaussian_scale.log()
        return torch.cat([gaussian, spin], dim=-1)


class MixtureComponent(FactorialPosterior):
    r"""Component of an aggregated posterior: continued from hard to mean spins, with heavy tails if wanted.

    A product of spin masses is linear in each spin: :math:`q(s) = \prod_i (1 + s_i m_i) / 2`. Put at mean spins, this
    is the mass expected for independent spins of these means.

    Parameters
    ----------
    gaussian_loc, gaussian_scale, logits
        As in :class:`FactorialPosterior`.
    dof
        Degrees of freedom of Student's t-distribution in place of the Gaussian; None for the Gaussian.
    """

    def __init__(self, gaussian_loc: Tensor, gaussian_scale: Tensor, logits: Tensor, dof: float | None = None) -> None:
        super().__init__(gaussian_loc, gaussian_scale, logits)
        normal = torch.distributions.Normal(gaussian_loc, gaussian_scale)
        self.layer = normal if dof is None else torch.distributions.StudentT(dof, gaussian_loc, gaussian_scale)

    @property
    def support(self) -> constraints.Constraint:
        """Real Gaussian units, spins or mean spins in ``[-1, 1]``."""
        lengths = [self.n_gaussian, self.logits.shape[-1]]
        return constraints.cat([constraints.real, constraints.interval(-1.0, 1.0)], -1, lengths)

    @property
    def mean(self) -> Tensor:
        """Mean of ``[v, s]``."""
        return torch.cat([self.layer.mean, self.spin_mean], dim=-1)

    @property
    def variance(self) -> Tensor:
        """Variance of ``[v, s]``."""
        return torch.cat([self.layer.variance, super().variance[..., self.n_gaussian :]], dim=-1)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw ``[v, s]`` with hard spins."""
        v, s = super().sample(sample_shape).split([self.n_gaussian, self.logits.shape[-1]], dim=-1)
        return torch.cat([self.layer.sample(torch.Size(sample_shape)).to(v), s], dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of ``v`` and log mass of hard or mean spins, per unit, in nats."""
        v, s = value.split([self.n_gaussian, self.logits.shape[-1]], dim=-1)
        # As a sum over the two states of each spin: 1 + s m would vanish for saturated logits.
        up, down = torch.log1p(s) + logsigmoid(self.logits), torch.log1p(-s) + logsigmoid(-self.logits)
        return torch.cat([self.layer.log_prob(v), torch.logaddexp(up, down) - math.log(2.0)], dim=-1)


def _harden(logits: Tensor, uniform: Tensor) -> Tensor:
    return torch.where(uniform < torch.sigmoid(logits), 1.0, -1.0).to(logits)
