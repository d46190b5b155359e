r"""Rival priors: densities fitted to the codes of a trained model, networks frozen.

The codes of cells are their posteriors :math:`q(z \mid x)`, with one row per cell: a
:class:`~qbmscvi.boltzmann.posterior.FactorialPosterior` over the spins of QBMSCVI, or scVI's normal distributions. A
density :math:`p(z)` is fitted to the aggregated posterior, that is to draws of the codes and not to their means. It is
judged by :math:`KL(q \| p)` of cells outside the fit. The rivals show how many nats any prior could still gain, and
whether another fitted prior generates equally good cells.

All of them are normalized exactly. Boltzmann machines are not among them, because their log Z has to be estimated.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sklearn import mixture
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import linear, logsigmoid

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from torch.distributions import Distribution

    from qbmscvi.boltzmann.posterior import FactorialPosterior

_HELD_OUT = 0.1  # share of the cells that chooses a number of components or stops the training
_MIN_CELLS = 20
_N_VALIDATION_DRAWS = 5


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
        return cls(torch.logit(_smoothed(torch.sigmoid(_spin_logits(codes)).mean(0))))

    def log_prob(self, z: Tensor) -> Tensor:
        """See :meth:`Density.log_prob`."""
        return _log_prob(z, self.logits)

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Density.sample`."""
        return _draw_spins(self.logits.expand(n_samples, -1), generator)


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
        logits = _spin_logits(codes)
        generator = torch.Generator().manual_seed(seed)
        train, held_out = _split(logits, generator)
        spins = _draw_spins(held_out.repeat(_N_VALIDATION_DRAWS, 1), generator)
        best = max(n_components, key=lambda n: cls._maximize(train, n, generator).log_prob(spins).mean())
        return cls._maximize(logits, best, generator)

    @classmethod
    def _maximize(cls, logits: Tensor, n_components: int, generator: torch.Generator, n_steps: int = 100) -> Self:
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
        return _draw_spins(torch.logit(self.up[component]), generator)


class _MaskedLinear(nn.Linear):
    """Linear map of which only the entries of ``mask`` are used."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.float())

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight * self.mask, self.bias)


class _MaskedNetwork(nn.Module):
    """Log odds of spin ``i`` given the spins before: those offered, scaled, plus a residual network's.

    The network is masked as in :cite:p:`Germain15`. It starts from the odds offered, unchanged.
    """

    def __init__(self, n_spins: int, width: int, dropout: float = 0.3) -> None:
        super().__init__()
        place, degree = torch.arange(n_spins)[:, None], torch.arange(width)[:, None] % n_spins
        self.first = _MaskedLinear(degree >= place.T)  # a hidden unit of degree d sees the spins 0 to d
        self.block = nn.Sequential(
            nn.ReLU(),
            nn.Dropout(dropout),
            _MaskedLinear(degree >= degree.T),
            nn.ReLU(),
            nn.Dropout(dropout),
            _MaskedLinear(degree >= degree.T),
        )
        self.last = nn.Sequential(nn.ReLU(), nn.Dropout(dropout), _MaskedLinear(place > degree.T))
        self.direct = _MaskedLinear(place > place.T)
        self.scale = nn.Parameter(torch.zeros(n_spins))
        for layer in (self.last[-1], self.direct):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, spins: Tensor, offered: Tensor) -> Tensor:
        hidden = self.first(spins)
        return (1.0 + self.scale) * offered + self.last(hidden + self.block(hidden)) + self.direct(spins)


@dataclass(frozen=True)
class _Chain:
    """Autoregressive density in one order: log odds of a mixture given the spins before, plus those of a network.

    Without the network this is the mixture; the network learns what the mixture leaves.
    """

    order: Tensor
    mixture: BernoulliMixture  # of the spins in this order
    network: _MaskedNetwork

    @classmethod
    def fit(
        cls,
        train: Tensor,
        held_out: Tensor,
        n_components: int,
        width: int,
        generator: torch.Generator,
        n_folds: int = 5,
    ) -> Self:
        order = torch.randperm(train.shape[1], generator=generator)
        train, held_out = train[:, order], held_out[:, order]
        start = BernoulliMixture._maximize(train, n_components, generator)
        chain = cls(order, start, _MaskedNetwork(len(order), width))
        # Mixtures stay as they are, so their log odds are computed once, for ten draws of each cell. Those of a cell
        # come from a mixture that was fitted without it: a mixture describes its own cells too well, and a network
        # trained on that would correct too little for new cells.
        spins = torch.stack([_draw_spins(train, generator) for _ in range(10)], 1)  # (n_cells, 10, n_spins)
        offered = torch.empty_like(spins)
        for fold in range(n_folds):
            inside = torch.arange(len(train)) % n_folds == fold
            other = replace(chain, mixture=BernoulliMixture._maximize(train[~inside], n_components, generator))
            offered[inside] = other.mixture_log_odds(spins[inside].flatten(0, 1)).view_as(spins[inside])
        validation = _draw_spins(held_out.repeat(_N_VALIDATION_DRAWS, 1), generator)
        validation_offered = chain.mixture_log_odds(validation)
        optimizer = torch.optim.AdamW(chain.network.parameters(), lr=1e-3, weight_decay=0.1)
        average = copy.deepcopy(chain.network).eval()  # of the weights along the way
        best, n_since, weights = -math.inf, 0, average.state_dict()
        while n_since < 20:
            for cells in torch.randperm(len(train), generator=generator).split(256):
                draw = torch.randint(spins.shape[1], (len(cells),), generator=generator)
                loss = -_log_prob(spins[cells, draw], chain.network(spins[cells, draw], offered[cells, draw])).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                for mean, current in zip(average.parameters(), chain.network.parameters(), strict=True):
                    mean.data.lerp_(current.data, 0.02)
            with torch.no_grad():
                value = float(_log_prob(validation, average(validation, validation_offered)).mean())
            n_since += 1
            if value > best + 1e-3:
                best, n_since, weights = value, 0, copy.deepcopy(average.state_dict())
        chain.network.load_state_dict(weights)
        chain.network.eval().requires_grad_(False)
        return chain

    def mixture_log_odds(self, spins: Tensor) -> Tensor:
        """Log odds of each spin under the mixture given the spins before it, shape ``(n, n_spins)``."""
        joint, log_odds = self.mixture.weights.log(), torch.empty_like(spins)
        joint = joint.expand(len(spins), -1)
        for i in range(spins.shape[1]):
            log_odds[:, i] = self._next_log_odds(joint, i)
            joint = self._observe(joint, i, spins[:, i])
        return log_odds

    def _next_log_odds(self, joint: Tensor, i: int) -> Tensor:
        return torch.logit(joint.softmax(1) @ self.mixture.up[:, i])

    def _observe(self, joint: Tensor, i: int, spin: Tensor) -> Tensor:
        """Log probability of components and spins up to ``i``, up to a constant, shape ``(n, n_components)``."""
        up = self.mixture.up[:, i]
        return joint + 0.5 * spin[:, None] * torch.logit(up) + 0.5 * (up.log() + torch.log1p(-up))

    def log_prob(self, z: Tensor) -> Tensor:
        spins = z[:, self.order]
        return _log_prob(spins, self.network(spins, self.mixture_log_odds(spins)))

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        joint = self.mixture.weights.log().expand(n_samples, -1)
        spins, offered = torch.zeros(2, n_samples, len(self.order))
        for i in range(len(self.order)):
            offered[:, i] = self._next_log_odds(joint, i)
            spins[:, i] = _draw_spins(self.network(spins, offered)[:, i], generator)
            joint = self._observe(joint, i, spins[:, i])
        return spins[:, self.order.argsort()]


@dataclass(frozen=True)
class AutoregressiveDensity(FittedDensity):
    r"""Strong density over spins, a yardstick for what any prior could reach.

    A mixture of autoregressive densities :math:`p(s) = \prod_i p(s_i \mid s_{<i})`, each in its own random order. The
    conditional log odds of a mixture of Bernoulli products are corrected by a masked residual network
    :cite:p:`Germain15`, with dropout, weight decay and several draws of each cell. Each member stops early on another
    tenth of the cells.
    """

    # On held-out cells of kang_ifnb (one run, standard error over cells): networks without mixtures lose 0.24 +- 0.03
    # nats; one network for all orders, averaged over four, loses 0.04 +- 0.02. Eight members, or 800 components, change
    # less than 0.02.

    members: tuple[_Chain, ...]

    @classmethod
    def fit(
        cls, codes: FactorialPosterior, seed: int = 0, *, n_members: int = 4, n_components: int = 200, width: int = 256
    ) -> Self:
        """Fit all members.

        Parameters
        ----------
        codes
            Codes of training cells.
        seed
            Decides orders, held-out cells, draws and starts.
        n_members
            Number of orders. Cost grows in proportion, gains come from the first few.
        n_components
            Components of each member's mixture.
        width
            Hidden units of each member's network.
        """
        logits = _spin_logits(codes)
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # weights and dropout
            return cls(
                tuple(_Chain.fit(*_split(logits, generator), n_components, width, generator) for _ in range(n_members))
            )

    def log_prob(self, z: Tensor) -> Tensor:
        """See :meth:`Density.log_prob`."""
        each = torch.stack([member.log_prob(z) for member in self.members])
        return each.logsumexp(0) - math.log(len(self.members))

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Density.sample`."""
        counts = torch.randint(len(self.members), (n_samples,), generator=generator).bincount(
            minlength=len(self.members)
        )
        spins = torch.cat([m.sample(int(n), generator) for m, n in zip(self.members, counts, strict=True)])
        return spins[torch.randperm(n_samples, generator=generator)]


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
        train, held_out = (part.flatten(0, 1).double().numpy() for part in _split(draws, generator))

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


def _spin_logits(codes: FactorialPosterior) -> Tensor:
    return codes.logits.detach().cpu().float()


def _smoothed(up: Tensor) -> Tensor:
    """Probabilities without zeros and ones; at most 1e-4 nats are lost for each spin that is always the same."""
    return up.clamp(1e-4, 1.0 - 1e-4)


def _log_prob(spins: Tensor, log_odds: Tensor) -> Tensor:
    return logsigmoid(spins * log_odds).sum(1)


def _draw_spins(logits: Tensor, generator: torch.Generator) -> Tensor:
    return torch.where(torch.rand(logits.shape, generator=generator) < torch.sigmoid(logits), 1.0, -1.0)


def draw(codes: FactorialPosterior | Normal, generator: torch.Generator) -> Tensor:
    """One draw of each cell, from the random numbers of ``generator``, which torch's distributions cannot use."""
    if isinstance(codes, Normal):
        return codes.loc + codes.scale * torch.randn(codes.loc.shape, generator=generator)
    return _draw_spins(codes.logits, generator)


def _split(cells: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
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
