r"""Relaxations of spins: what the decoder sees during training in place of a discrete spin.

They carry a gradient to the logits. They do not change the KL divergence, which needs only the mean spins.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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

    The generative model is discrete and its ELBO is a true bound. The gradient to the logits is biased unless the
    decoder is linear in each spin.
    """

    def relax(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """See :meth:`Smoothing.relax`."""
        mean = torch.tanh(0.5 * logits)
        return harden(logits, uniform) + (mean - mean.detach())


@dataclass(frozen=True)
class Gumbel(Smoothing):
    r"""Concrete relaxation :math:`\zeta = \tanh((l + \log u - \log(1 - u)) / 2T)` :cite:p:`Maddison17`.

    As in GumBolt :cite:p:`Khoshaman18a` the decoder sees relaxed spins in training only, and hard spins otherwise. The
    gradient is unbiased for the relaxed objective and biased for the discrete one. A lower temperature reduces this
    bias and raises the variance.
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

    On bits: :math:`\zeta = 0` for :math:`b = 0`, and density proportional to :math:`e^{\beta \zeta}` on :math:`[0, 1]`
    for :math:`b = 1`; here it is stretched to :math:`[-1, 1]`. It belongs to the generative model, so the decoder sees
    it outside training, too. The gradient is unbiased for this model. ``sharpness`` is :math:`\beta`; the discrete VAE
    used 4 to 5.
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
        # Inverse CDF of the mixture; the floor avoids 0/0 in the gradient where q underflows.
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
            "`qbmscvi.boltzmann.smoothing`, e.g. `Gumbel(temperature=0.3)`."
        )
        raise ValueError(msg)
    msg = f"`smoothing` must be a name or a qbmscvi.boltzmann.smoothing.Smoothing, got {type(spec).__name__}."
    raise TypeError(msg)


def harden(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw hard spins with uniform random numbers."""
    return torch.where(uniform < torch.sigmoid(logits), 1.0, -1.0).to(logits)
