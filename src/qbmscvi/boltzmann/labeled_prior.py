r"""A Boltzmann prior over the latent variables and the cell type together.

Each cell type is a spin of the prior: up for the type of the cell, down for all others. This is a classification
restricted Boltzmann machine :cite:p:`Larochelle08` with spins as label units, so that every Ising sampler can sample
it. With :math:`t^{(y)}` for the label spins of type :math:`y`,

.. math:: p(z, y) = e^{-E(z, t^{(y)})} / Z, \qquad
          p(y \mid z) \propto e^{-E(z, t^{(y)})}: \text{ a softmax of functions linear in } z,

and Z sums over all states of the label spins, including states of no type; training moves the weight of these to the
types. The type of an unlabeled cell is summed out, with its best factorial posterior. Since the energy is linear in
each unit,

.. math:: \mathbb E_q[-\log p(z, y)] = E(\mathbb E_q[z], t^{(y)}) + \log Z, \qquad
          \min_{q(y)} \mathbb E_q[\log q(y) - \log p(z, y)] = -\log \sum_y e^{-E(\mathbb E_q[z], t^{(y)})} + \log Z .
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from qbmscvi.boltzmann.graphs import Graph
from qbmscvi.boltzmann.ising import SampleBatch, block_couplings
from qbmscvi.boltzmann.prior import BoltzmannDistribution, BoltzmannPrior

if TYPE_CHECKING:
    from torch import Tensor

    from qbmscvi.boltzmann.ising import IsingModel
    from qbmscvi.boltzmann.posterior import FactorialPosterior


class LabeledPrior(BoltzmannPrior):
    """Boltzmann distribution over visible spins and one label spin per cell type.

    The label spins are the last of the Ising problem. They couple to every visible spin.

    Parameters
    ----------
    graph
        Interaction graph of visible and hidden spins.
    n_labels
        Number of cell types.
    n_hidden, n_chains
        See :class:`BoltzmannPrior`.
    """

    def __init__(self, graph: Graph, n_labels: int, *, n_hidden: int = 0, n_chains: int = 512) -> None:
        super().__init__(_add_labels(graph, n_labels, n_hidden), n_hidden=n_hidden, n_chains=n_chains)
        self.n_labels = n_labels
        with torch.no_grad():
            # Types start equally likely and independent of other spins: on average one of n_labels spins is up.
            self.h[-n_labels:] = 0.5 * np.log(max(n_labels - 1, 1))
            self.J[torch.from_numpy(self.graph.edges[:, 1] >= graph.n_nodes)] = 0.0

    def clamped(self, label: int) -> IsingModel:
        """Return the Ising problem of the other spins, with the label spins held at one type."""
        n = self.n_spins - self.n_labels
        return self.to_ising().conditioned(range(n, self.n_spins), self._label_spins(label))

    def unclamped(self, spins: Tensor, label: int) -> Tensor:
        """Append the label spins to samples of :meth:`clamped`, shape ``(n, n_spins)``."""
        return torch.cat([spins, self._label_spins(label).to(spins).expand(len(spins), -1)], dim=-1)

    def _label_spins(self, label: int) -> Tensor:
        return torch.where(torch.arange(self.n_labels) == label, 1, -1)

    @torch.no_grad()
    def take_over(self, prior: BoltzmannPrior) -> None:
        """Copy a prior of the same latent variables without labels; label spins stay independent of all others.

        Raises
        ------
        ValueError
            If the sizes differ.
        """
        n = self.n_spins - self.n_labels
        if (prior.n_spins, len(prior.chains)) != (n, len(self.chains)):
            msg = (
                f"The priors differ: {prior.n_spins} spins and {len(prior.chains)} chains, against {n} and "
                f"{len(self.chains)}. Build both with the same arguments."
            )
            raise ValueError(msg)
        self.h[:n] = prior.h
        self.J[torch.from_numpy(self.graph.edges[:, 1] < n)] = prior.J
        h = self.h[n:]
        up = torch.rand(len(self.chains), self.n_labels, device=h.device) < torch.sigmoid(-2.0 * h)
        self.chains.copy_(torch.cat([prior.chains, torch.where(up, 1, -1).to(torch.int8)], dim=1))
        shift = torch.logaddexp(h, -h).sum()
        self.log_z.copy_(prior.log_z + shift)
        self.log_z_bounds.copy_(prior.log_z_bounds + shift)
        self.log_z_scale.copy_(prior.log_z_scale)
        self.is_log_z_estimated.copy_(prior.is_log_z_estimated)
        if int(prior.n_updates):
            self.set_moments(SampleBatch(self.chains, self.to_ising().energy(self.chains)))

    @property
    def n_visible(self) -> int:
        """Number of spins that the decoder sees."""
        return super().n_visible - self.n_labels

    def label_logits(self, s: Tensor) -> Tensor:
        r"""Return :math:`\log p(y \mid s)` up to a constant per row, shape ``(..., n_labels)``.

        It is linear in the spins, so mean spins give its mean.
        """
        return -2.0 * self._label_fields(s)

    def _label_fields(self, s: Tensor) -> Tensor:
        labels = slice(self.n_spins - self.n_labels, self.n_spins)
        couplings = block_couplings(self.J, self.graph, slice(0, self.n_visible), labels)
        return self.h[labels] + s @ couplings

    def _other_fields(self, s: Tensor) -> Tensor:
        return torch.cat([super()._other_fields(s), self._label_fields(s)], dim=-1)

    def classification_error(self, s: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the known types given drawn or mean spins, averaged over the labeled cells."""
        is_known = (labels >= 0) & (labels < self.n_labels)
        logits = self.label_logits(s)[is_known]
        # Without labeled cells the sum is a zero with a gradient; the mean would be NaN.
        return cross_entropy(logits, labels[is_known], reduction="sum") / max(len(logits), 1)

    def energy(self, s: Tensor) -> Tensor:
        """Energy of visible spins, with hidden spins and the cell type summed out; shape ``(...)``, in nats."""
        fields = self._label_fields(s)
        return super().energy(s) - fields.sum(-1) - (-2.0 * fields).logsumexp(-1)

    def expected_energy(
        self, posterior: FactorialPosterior, labels: Tensor | None = None, *, n_draws: int = 0
    ) -> Tensor:
        """Mean energy per spin under a factorial posterior, shape ``(..., n_visible)``.

        The terms of label spins are shared equally between the visible ones.

        Parameters
        ----------
        posterior
            Posterior of the visible spins.
        labels
            Cell types, shape ``(n_cells,)``; values outside ``0 .. n_labels - 1`` are unknown. None: all unknown.
        n_draws
            See :meth:`BoltzmannPrior.expected_energy`.
        """
        fields = self._label_fields(posterior.mean)
        logits = -2.0 * fields
        gain = logits.logsumexp(-1)
        if labels is not None:
            is_known = (labels >= 0) & (labels < self.n_labels)
            own = logits.gather(-1, torch.where(is_known, labels, 0).unsqueeze(-1)).squeeze(-1)
            gain = torch.where(is_known, own, gain)
        of_labels = -fields.sum(-1) - gain
        return super().expected_energy(posterior, n_draws=n_draws) + (of_labels / self.n_visible).unsqueeze(-1)

    def distribution(self, labels: Tensor | None = None, *, n_draws: int = 0) -> LabeledDistribution:
        """Return the prior as a torch distribution over visible spins, given the known types of the cells."""
        return LabeledDistribution(self, labels, n_draws)


class LabeledDistribution(BoltzmannDistribution):
    """Adapter of a :class:`LabeledPrior` with the types of the cells of a posterior."""

    def __init__(self, prior: LabeledPrior, labels: Tensor | None, n_draws: int = 0) -> None:
        super().__init__(prior, n_draws)
        self.labels = labels

    def expected_energy(self, posterior: FactorialPosterior) -> Tensor:
        """Mean energy per spin with unknown types summed out, shape ``(..., n_visible)``."""
        return self.prior.expected_energy(posterior, self.labels, n_draws=self.n_draws)


def _add_labels(graph: Graph, n_labels: int, n_hidden: int) -> Graph:
    """Append label spins, coupled to every visible spin."""
    n_nodes = graph.n_nodes + n_labels
    visible = range(graph.n_nodes - n_hidden)
    pairs = [(node, label) for node in visible for label in range(graph.n_nodes, n_nodes)]
    return Graph(n_nodes, np.concatenate([graph.edges, np.array(pairs)]), f"{graph.name} with {n_labels} labels")
