r"""The Boltzmann prior over visible and hidden spins.

.. math::

    E(s, u) = \sum_i h_i s_i + \sum_j c_j u_j + \sum_{(i,j)} J_{ij} s_i s_j + \sum_{i,j} J_{ij} s_i u_j,
    \qquad p(s, u) = e^{-E(s, u)} / Z .

The decoder sees the visible spins ``s``. Only the prior has hidden spins ``u``, which couple to visible spins only.
Without couplings among visible spins this is a restricted Boltzmann machine. In each case

- hidden spins are summed out exactly: :math:`E(s) = E(s, \cdot) - \sum_j \log 2 \cosh(c_j + \sum_i J_{ij} s_i)`;
- all other terms of the energy are multilinear in the spins, so their mean under a factorial posterior has a closed
  form. So does, nearly, that of the sum over hidden spins: the field on a hidden spin is a sum over many independent
  spins, and the mean over a normal field of equal mean and variance takes two points. Training uses this form, which
  has no variance; reported numbers use draws of ``s`` for that sum, which have no bias;
- a sampler sees only the Ising problem over visible and hidden spins (:meth:`BoltzmannPrior.to_ising`);
- the gradient of the prior, ``d log Z / d theta = -<dE/d theta>_p``, needs only moments of the spins. The caller sets
  them (:meth:`BoltzmannPrior.set_moments`); they are buffers of fixed shape.

The value of log Z does not follow from those moments; it is a buffer that an estimator fills.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints, register_kl

from qbmscvi.boltzmann.enumeration import log_2cosh
from qbmscvi.boltzmann.ising import IsingModel, SampleBatch, block_couplings, edge_fields, edge_products
from qbmscvi.boltzmann.posterior import FactorialPosterior

if TYPE_CHECKING:
    from qbmscvi.boltzmann.graphs import Graph

# Small enough for spins that start independent (paramagnetic: |J| * sqrt(degree) << 1), large enough to break their
# symmetry.
_INITIAL_J_SCALE = 0.01

# One chain in so many tracks log Z and does not enter the moments. An optimizer step raises the energy of the very
# states that gave the moments, so log Z tracked on these would drift down (0.1 nats per epoch on 2,500 cells).
_TRACKING_SHARE = 8


class BoltzmannPrior(nn.Module):
    """Learnable Boltzmann distribution over visible spins.

    Parameters
    ----------
    graph
        Interaction graph of visible and hidden spins, in this order.
    n_hidden
        Number of hidden spins, the last nodes of the graph. They interact with visible spins only.
    n_chains
        Number of persistent chain states kept for the sampler.
    """

    def __init__(self, graph: Graph, *, n_hidden: int = 0, n_chains: int = 512) -> None:
        super().__init__()
        if n_hidden and (graph.edges[:, 0] >= graph.n_nodes - n_hidden).any():
            msg = f"{n_hidden} hidden spins couple to visible spins only, but {graph} has couplings between them. "
            msg += "Use `qbmscvi.graphs.with_hidden`."
            raise ValueError(msg)
        self.graph = graph
        self.n_hidden = n_hidden
        n_spins, n_edges = graph.n_nodes, graph.n_edges
        self.h = nn.Parameter(torch.zeros(n_spins))
        self.J = nn.Parameter(_INITIAL_J_SCALE * torch.randn(n_edges))

        # Moments of the last samples. At the start the spins are independent and unbiased.
        self.register_buffer("spin_mean", torch.zeros(n_spins))
        self.register_buffer("edge_mean", torch.zeros(n_edges))
        self.register_buffer("chains", _random_chains(n_chains, n_spins))
        self.register_buffer("tracking_log_weights", torch.zeros(max(1, n_chains // _TRACKING_SHARE)))
        self.register_buffer("n_updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("log_z", torch.tensor(n_spins * math.log(2.0)))
        # Error and bounds of the last full estimate; the flag says whether it belongs to the current parameters.
        self.register_buffer("log_z_scale", torch.zeros(()))
        self.register_buffer("log_z_bounds", torch.zeros(2))
        self.register_buffer("is_log_z_estimated", torch.tensor(False))

    @property
    def n_spins(self) -> int:
        """Number of spins of the Ising problem, hidden ones included."""
        return self.graph.n_nodes

    @property
    def n_visible(self) -> int:
        """Number of spins that the decoder sees."""
        return self.n_spins - self.n_hidden

    def energy(self, s: Tensor) -> Tensor:
        """Energy of visible spins of shape ``(..., n_visible)``, with hidden spins summed out, in nats."""
        return self._energy_per_spin(s).sum(-1) - self._log_sum_over_hidden(s)

    def expected_energy(self, posterior: FactorialPosterior, *, n_draws: int = 0) -> Tensor:
        """Mean energy per visible spin under a factorial posterior, with hidden spins summed out.

        Two coupled spins share their term equally; all spins share the sum over hidden spins equally.

        Parameters
        ----------
        posterior
            Posterior of the visible spins.
        n_draws
            Draws of the spins for the sum over hidden spins, which is then unbiased. Zero takes the fields on hidden
            spins as normal, with their exact mean and variance. Without hidden spins the mean is exact and nothing is
            drawn.
        """
        if n_draws and self.n_hidden:
            of_hidden = self._log_sum_over_hidden(posterior.sample((n_draws,))).mean(0)
        else:
            of_hidden = self._mean_log_sum_over_hidden(posterior.mean)
        return self._energy_per_spin(posterior.mean) - (of_hidden / self.n_visible)[..., None]

    def _mean_log_sum_over_hidden(self, mean: Tensor) -> Tensor:
        r"""Mean of :meth:`_log_sum_over_hidden` under a factorial posterior with these mean spins, shape ``(...)``.

        A field is normal with mean :math:`\mu` and variance :math:`\sigma^2` in this approximation; its mean over
        :math:`\mu \pm \sigma` is Gauss-Hermite quadrature with two nodes, exact up to third order.
        """
        if not self.n_hidden:
            return mean.new_zeros(mean.shape[:-1])
        # On trained models within 0.1 nats of the mean over draws (tests/test_real_data.py), and no nearer with seven
        # nodes. The value at the mean spins, which bounds the energy from above, is some two nats off.
        couplings = self._hidden_couplings()
        center = self._hidden_biases() + mean @ couplings
        scale = ((1.0 - mean.square()) @ couplings.square() + torch.finfo(mean.dtype).tiny).sqrt()
        return 0.5 * (log_2cosh(center + scale) + log_2cosh(center - scale)).sum(-1)

    def _log_sum_over_hidden(self, s: Tensor) -> Tensor:
        """Log of the sum over hidden spins of their Boltzmann factors, shape ``(...)``."""
        if not self.n_hidden:
            return s.new_zeros(s.shape[:-1])
        return log_2cosh(self.hidden_fields(s)).sum(-1)

    def hidden_fields(self, s: Tensor) -> Tensor:
        """Fields on the hidden spins, shape ``(..., n_hidden)``; their mean given ``s`` is ``tanh(-fields)``."""
        return self._hidden_biases() + s @ self._hidden_couplings()

    @property
    def _hidden(self) -> slice:
        return slice(self.n_visible, self.n_visible + self.n_hidden)

    def _hidden_biases(self) -> Tensor:
        return self.h[self._hidden]

    def _hidden_couplings(self) -> Tensor:
        return block_couplings(self.J, self.graph, slice(0, self.n_visible), self._hidden)

    def _visible_fields(self, s: Tensor) -> Tensor:
        """Fields of visible spins on each other, shape ``(..., n_visible)``."""
        if self.n_visible == self.n_spins:
            return edge_fields(s, self.J, self.graph)
        visible = slice(0, self.n_visible)
        return s @ block_couplings(self.J, self.graph, visible, visible)

    @cached_property
    def _has_visible_edges(self) -> bool:
        return bool((self.graph.edges[:, 1] < self.n_visible).any())

    def _energy_per_spin(self, s: Tensor) -> Tensor:
        """Energy without hidden spins."""
        field = self.h[: self.n_visible]
        if self._has_visible_edges:
            field = field + 0.5 * self._visible_fields(s)
        return s * field

    def to_ising(self) -> IsingModel:
        """Return the Ising problem over the visible spins, then the hidden ones; a copy."""
        return IsingModel(self.h.detach().clone(), self.J.detach().clone(), self.graph)

    @torch.no_grad()
    def set_moments(self, batch: SampleBatch) -> None:
        """Set the moments from samples of :meth:`to_ising` at the current parameters.

        Hidden spins are replaced by their mean given the visible spins (Rao-Blackwell), which reduces the variance.
        """
        if self.n_hidden:
            spins = batch.spins.to(self.h)
            spins[:, self._hidden] = -torch.tanh(self.hidden_fields(spins[:, : self.n_visible]))
            mean, edge_mean = spins.mean(0), edge_products(spins, spins, self.graph) / len(spins)
        else:
            mean, edge_mean = batch.moments(self.graph)
        self.spin_mean.copy_(mean)
        self.edge_mean.copy_(edge_mean)
        self.n_updates.add_(1)

    @torch.no_grad()
    def start_chains(self, s: Tensor) -> None:
        """Continue the chains from draws of the visible spins, one row each; all other spins are drawn given these."""
        up = torch.sigmoid(-2.0 * self._other_fields(s))
        others = torch.where(torch.rand_like(up) < up, 1.0, -1.0)
        self.chains.copy_(torch.cat([s, others], dim=-1))
        self.set_moments(SampleBatch(self.chains, self.to_ising()))

    def _other_fields(self, s: Tensor) -> Tensor:
        """Fields on the spins that are not visible, shape ``(n, n_spins - n_visible)``."""
        return self.hidden_fields(s)

    @torch.no_grad()
    def set_log_z(self, value: float, lower: float, upper: float, scale: float) -> None:
        """Set an estimate of log Z at the current parameters, its bounds and its standard error, in nats."""
        self.log_z.fill_(value)
        self.log_z_bounds[0], self.log_z_bounds[1] = lower, upper
        self.log_z_scale.fill_(scale)
        self.is_log_z_estimated.fill_(True)

    def log_partition(self) -> Tensor:
        r"""Scalar with the value of the buffer ``log_z`` and the gradient of log Z at the current moments.

        This gradient is :math:`-\langle \partial E / \partial \theta \rangle_p`.
        """
        mean_energy = self.h @ self.spin_mean + self.J @ self.edge_mean
        return self.log_z + (mean_energy.detach() - mean_energy)

    def distribution(self, *, n_draws: int = 0) -> BoltzmannDistribution:
        """Return the prior as a torch distribution over visible spins; ``n_draws`` as in :meth:`expected_energy`."""
        return BoltzmannDistribution(self, n_draws)


class BoltzmannDistribution(Distribution):
    """Adapter of a :class:`BoltzmannPrior` for code that expects a torch distribution for ``p(z)``.

    It does not implement ``sample``; use a sampler.

    Parameters
    ----------
    prior
        The prior.
    n_draws
        Draws for the KL divergence; see :meth:`BoltzmannPrior.expected_energy`.
    """

    arg_constraints: ClassVar = {}
    support = constraints.real_vector

    def __init__(self, prior: BoltzmannPrior, n_draws: int = 0) -> None:
        self.prior = prior
        self.n_draws = n_draws
        super().__init__(torch.Size(()), torch.Size((prior.n_visible,)), validate_args=False)

    def expected_energy(self, posterior: FactorialPosterior) -> Tensor:
        """Mean energy per spin under a factorial posterior, shape ``(..., n_visible)``."""
        return self.prior.expected_energy(posterior, n_draws=self.n_draws)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability per visible spin, in nats; it has the error of the prior's ``log_z``."""
        return -self.prior.energy(value) - self.prior.log_partition()


@register_kl(FactorialPosterior, BoltzmannDistribution)
def _kl_factorial_boltzmann(q: FactorialPosterior, p: BoltzmannDistribution) -> Tensor:
    """KL per spin, shape ``(..., n_visible)``, with the error of log Z, which the spins share equally."""
    # Mixed precision would round products to bfloat16 or float16, too coarse for energies of hundreds of nats.
    with torch.autocast(q.logits.device.type, enabled=False):
        return p.expected_energy(q) - q.entropy() + p.prior.log_partition() / p.prior.n_visible


def _random_chains(n_chains: int, n_spins: int) -> Tensor:
    return torch.where(torch.rand(n_chains, n_spins) < 0.5, 1, -1).to(torch.int8)
