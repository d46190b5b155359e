r"""Rival priors: densities fitted to the codes of a trained model, networks frozen.

The codes of cells are their posteriors :math:`q(z \mid x)`, with one row per cell: a
:class:`~qbmscvi.boltzmann.posterior.FactorialPosterior` over the spins of QBMSCVI, or scVI's normal distributions. A
density :math:`p(z)` is fitted to the aggregated posterior, that is to draws of the codes and not to their means. It is
judged by :math:`KL(q \| p)` of cells outside the fit. The rivals show how many nats any prior could still gain, and
whether another fitted prior generates equally good cells.

All of them are normalized exactly; the strongest is in :mod:`qbmscvi.benchmark._autoregressive`. Boltzmann machines
are not among them, because their log Z has to be estimated.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sklearn import mixture
from torch import Tensor
from torch.distributions import Normal
from torch.nn.functional import linear, logsigmoid

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from torch.distributions import Distribution

    from qbmscvi.boltzmann.posterior import FactorialPosterior

_HELD_OUT = 0.1  # share of the cells that chooses a number of components or stops the training
_MIN_CELLS = 20
N_VALIDATION_DRAWS = 5


class Divergence(NamedTuple):
    """KL divergence from codes to a density, in nats per cell.

    ``error`` is the standard error of the draws for these cells. Compare two densities by the differences of
    ``per_cell``, shape ``(n_cells,)``: with one seed both see the same draws.
    """

    kl: float
    error: float
    per_cell: np.ndarray


class Density(ABC):
    """Normalized density over codes."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """Log probability in nats of codes ``z`` of shape ``(n, n_units)``, shape ``(n,)``."""

    @abstractmethod
    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Independent draws, shape ``(n_samples, n_units)``."""


class FittedDensity(Density):
    """Density that :meth:`fit` builds."""

    @classmethod
    @abstractmethod
    def fit(cls, codes: Distribution, seed: int = 0) -> Self:
        """Fit to the codes of training cells; global random numbers are not touched."""


def divergence(codes: Distribution, density: Density, *, n_draws: int = 10, seed: int = 0) -> Divergence:
    r"""Estimate the KL divergence from codes to a density.

    :math:`E_q[-\log p(z)]` is a mean over draws, the entropy of the codes is exact.

    Parameters
    ----------
    codes
        Codes of cells, usually not of those that ``density`` was fitted to.
    density
        Density over the same units.
    n_draws
        Draws per cell, two at least.
    seed
        Decides the draws.

    Returns
    -------
    Mean over cells with its Monte Carlo error, and the values of the cells.

    Raises
    ------
    ValueError
        If there are fewer than two draws.
    """
    if n_draws < 2:
        msg = f"n_draws={n_draws} leaves the error unknown, but at least 2 are needed. 10 are usual."
        raise ValueError(msg)
    generator = torch.Generator().manual_seed(seed)
    cross = -torch.stack([density.log_prob(draw(codes, generator)).double() for _ in range(n_draws)])
    per_cell = cross.mean(0) - codes.entropy().double().sum(1)
    error = (cross.var(0).mean() / cross.numel()).sqrt()
    return Divergence(float(per_cell.mean()), float(error), per_cell.numpy())


@dataclass(frozen=True)
class IndependentSpins(FittedDensity):
    """Independent spins with the mean spins of the codes: the limit of fields without couplings.

    ``logits`` are the log odds of the spins, shape ``(n_spins,)``.
    """

    logits: Tensor

    @classmethod
    def fit(cls, codes: FactorialPosterior, seed: int = 0) -> Self:
        """See :meth:`FittedDensity.fit`."""
        return cls(torch.logit(_smoothed(torch.sigmoid(spin_logits(codes)).mean(0))))

    def log_prob(self, z: Tensor) -> Tensor:
        """See :meth:`Density.log_prob`."""
        return spin_log_prob(z, self.logits)

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Density.sample`."""
        return draw_spins(self.logits.expand(n_samples, -1), generator)


@dataclass(frozen=True)
class BernoulliMixture(FittedDensity):
    """Mixture of products of Bernoulli distributions: clusters of cells, and no Boltzmann machine.

    Fitted by expectation maximization on the mean spins, from the codes of random cells. All draws of a cell then
    share their probabilities of the components; probabilities by draw gave no better fit.

    Parameters
    ----------
    up
        Probability of spin +1 by component, shape ``(n_components, n_spins)``.
    weights
        Probability of each component, shape ``(n_components,)``.
    """

    up: Tensor
    weights: Tensor

    @classmethod
    def fit(
        cls, codes: FactorialPosterior, seed: int = 0, *, n_components: Sequence[int] = (20, 50, 100, 200, 400, 800)
    ) -> Self:
        """Fit as many components as describe held-out codes best.

        Parameters
        ----------
        codes
            Codes of training cells.
        seed
            Decides the held-out cells, a tenth, and the starts.
        n_components
            Numbers to try. There are no more components than cells.
        """
        logits = spin_logits(codes)
        generator = torch.Generator().manual_seed(seed)
        train, held_out = split_cells(logits, generator)
        spins = draw_spins(held_out.repeat(N_VALIDATION_DRAWS, 1), generator)
        best = max(n_components, key=lambda n: cls.maximize(train, n, generator).log_prob(spins).mean())
        return cls.maximize(logits, best, generator)

    @classmethod
    def maximize(cls, logits: Tensor, n_components: int, generator: torch.Generator, n_steps: int = 100) -> Self:
        """Fit this many components to all cells by expectation maximization."""
        # Weight of the overall mean, in cells; better than 0.3 and 1 on held-out codes of four data sets.
        mean_weight = 0.1
        p = torch.sigmoid(logits)  # (n_cells, n_spins)
        start = torch.randperm(len(p), generator=generator)[:n_components]
        density = cls(_smoothed(0.8 * p[start] + 0.1), torch.full((len(start),), 1.0 / len(start)))
        last = -math.inf
        for _ in range(n_steps):
            joint = density._joint(2.0 * p - 1.0)  # linear in each spin, so this is its mean over draws of a cell
            value = float(joint.logsumexp(1).mean())
            if value - last < 1e-5:
                break
            last = value
            share = joint.softmax(1)  # (n_cells, n_components)
            n_cells = share.sum(0)
            up = (share.T @ p + mean_weight * p.mean(0)) / (n_cells[:, None] + mean_weight)
            density = cls(_smoothed(up), (n_cells + mean_weight) / (n_cells + mean_weight).sum())
        return density

    def _joint(self, z: Tensor) -> Tensor:
        """Log probability of spins and component, shape ``(n, n_components)``."""
        up, down = self.up.log(), torch.log1p(-self.up)
        return linear(z, 0.5 * (up - down), 0.5 * (up + down).sum(1) + self.weights.log())

    def log_prob(self, z: Tensor) -> Tensor:
        """See :meth:`Density.log_prob`."""
        return self._joint(z).logsumexp(1)

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Density.sample`."""
        component = torch.multinomial(self.weights, n_samples, replacement=True, generator=generator)
        return draw_spins(torch.logit(self.up[component]), generator)


@dataclass(frozen=True)
class GaussianMixture(FittedDensity):
    """Mixture of Gaussians with full covariances, scikit-learn's: the rival on codes of scVI.

    ``fitted`` is the estimator. It is fitted to draws of the codes, not to their means, which are too narrow.
    """

    fitted: mixture.GaussianMixture

    @classmethod
    def fit(cls, codes: Normal, seed: int = 0, *, n_components: Sequence[int] = (1, 5, 10, 20, 30, 50)) -> Self:
        """Fit as many components as describe held-out codes best.

        Parameters
        ----------
        codes
            Codes of training cells.
        seed
            Decides the held-out cells, a tenth, the draws and the starts.
        n_components
            Numbers to try.
        """
        generator = torch.Generator().manual_seed(seed)
        draws = torch.stack([draw(codes, generator) for _ in range(5)], 1)  # (n_cells, 5, n_units)
        train, held_out = (part.flatten(0, 1).double().numpy() for part in split_cells(draws, generator))

        def estimate(values: np.ndarray, n: int) -> mixture.GaussianMixture:
            return mixture.GaussianMixture(n, reg_covar=1e-3, random_state=seed).fit(values)

        best = max(n_components, key=lambda n: estimate(train, n).score(held_out))
        return cls(estimate(draws.flatten(0, 1).double().numpy(), best))

    def log_prob(self, z: Tensor) -> Tensor:
        """See :meth:`Density.log_prob`."""
        return torch.from_numpy(self.fitted.score_samples(z.double().numpy()))

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Density.sample`."""
        weights, means, scales = (
            torch.from_numpy(values)
            for values in (self.fitted.weights_, self.fitted.means_, np.linalg.cholesky(self.fitted.covariances_))
        )
        component = torch.multinomial(weights, n_samples, replacement=True, generator=generator)
        noise = torch.randn(n_samples, means.shape[1], generator=generator, dtype=means.dtype)
        return (means[component] + torch.einsum("nij,nj->ni", scales[component], noise)).float()


def spin_logits(codes: FactorialPosterior) -> Tensor:
    """Log odds of the spins of each cell, on the CPU in single precision."""
    return codes.logits.detach().cpu().float()


def _smoothed(up: Tensor) -> Tensor:
    """Probabilities without zeros and ones; at most 1e-4 nats are lost for each spin that is always the same."""
    return up.clamp(1e-4, 1.0 - 1e-4)


def spin_log_prob(spins: Tensor, log_odds: Tensor) -> Tensor:
    """Log probability of spins at these log odds, shape ``(n,)``."""
    return logsigmoid(spins * log_odds).sum(1)


def draw_spins(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Independent spins at these log odds, of the same shape."""
    return torch.where(torch.rand(logits.shape, generator=generator) < torch.sigmoid(logits), 1.0, -1.0)


def draw(codes: FactorialPosterior | Normal, generator: torch.Generator) -> Tensor:
    """One draw of each cell, from the random numbers of ``generator``, which torch's distributions cannot use."""
    if isinstance(codes, Normal):
        return codes.loc + codes.scale * torch.randn(codes.loc.shape, generator=generator)
    return draw_spins(codes.logits, generator)


def split_cells(cells: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training cells, held-out cells."""
    if len(cells) < _MIN_CELLS:
        msg = (
            f"The codes are those of {len(cells)} cells, but at least {_MIN_CELLS} are needed, since some are held "
            "out of the fit. Pass the codes of all training cells."
        )
        raise ValueError(msg)
    order = torch.randperm(len(cells), generator=generator)
    n_held_out = int(_HELD_OUT * len(cells))
    return cells[order[n_held_out:]], cells[order[:n_held_out]]
