"""The module of :class:`~qbmscvi.QBMSCANVI`: cell types as spins of the prior."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scvi import REGISTRY_KEYS
from scvi.module._constants import MODULE_KEYS
from scvi.module.base import LossOutput, auto_move_data

from qbmscvi.boltzmann.labeled_prior import LabeledDistribution, LabeledPrior
from qbmscvi.module._qbmvae import QBMVAE

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributions import Distribution

    from qbmscvi.boltzmann.graphs import Graph


class QBMSCANVAE(QBMVAE):
    """Variational autoencoder of counts and, for some cells, their types, under one Boltzmann prior.

    Arguments are those of :class:`QBMVAE`; the last of the ``n_labels`` labels stands for an unknown type.

    Raises
    ------
    ValueError
        If there is no known type, or ``dispersion="gene-label"``, which would need the type of every cell.
    """

    def __init__(self, n_input: int, n_batch: int = 0, n_labels: int = 0, **kwargs: Any) -> None:
        if n_labels < 2:
            msg = "No cell has a label, but the model learns from labeled cells. Label some in the column `labels_key`."
            raise ValueError(msg)
        if kwargs.get("dispersion") == "gene-label":
            msg = "dispersion='gene-label' needs the label of every cell. Use 'gene' or 'gene-batch'."
            raise ValueError(msg)
        super().__init__(n_input, n_batch, n_labels, **kwargs)

    @staticmethod
    def _build_prior(graph: Graph, n_labels: int, **settings: Any) -> LabeledPrior:
        return LabeledPrior(graph, n_labels - 1, **settings)

    def _prior_given(self, y: Tensor | None) -> LabeledDistribution:
        """Return the prior of cells with labels ``y``, shape ``(n_cells, 1)``."""
        return self.prior.distribution(None if y is None else y.squeeze(-1).long(), n_draws=self.n_kl_draws)

    def take_over(self, module: QBMVAE) -> None:
        """Copy the weights and the prior of a module of the same sizes without labels."""
        own = {name: value for name, value in module.state_dict().items() if not name.startswith("prior.")}
        self.load_state_dict(own, strict=False)
        self.prior.take_over(module.prior)

    @auto_move_data
    def classify(self, qz: Distribution, z: Tensor | None = None) -> Tensor:
        """Log odds of the types up to a constant per cell, shape ``(..., n_types)``; at the mean, or at ``z``."""
        return self.prior.label_logits(qz.mean if z is None else z)

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Tensor | Distribution | None],
        generative_outputs: dict[str, Distribution | None],
        kl_weight: Tensor | float = 1.0,
        classification_ratio: float = 50.0,
    ) -> LossOutput:
        """Compute the loss of the autoencoder, and ``classification_ratio`` times the cross-entropy of the labels.

        The cross-entropy is the mean over the labeled cells of the batch. It uses a draw of the posterior in training,
        and its mean otherwise.
        """
        losses = super().loss(tensors, inference_outputs, generative_outputs, kl_weight)
        labels = tensors[REGISTRY_KEYS.LABELS_KEY].squeeze(-1).long()
        z = inference_outputs[MODULE_KEYS.Z_KEY] if self.training else inference_outputs[MODULE_KEYS.QZ_KEY].mean
        error = self.prior.classification_error(z, labels)
        losses.loss = losses.loss + classification_ratio * error
        losses.extra_metrics["classification_loss"] = error.detach()
        is_known = labels < self.prior.n_labels
        if is_known.any():
            predicted = self.prior.label_logits(z)[is_known].argmax(-1)
            losses.extra_metrics["accuracy"] = (predicted == labels[is_known]).to(torch.float32).mean()
        return losses
