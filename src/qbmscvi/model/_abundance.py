"""Differential abundance: how likely cells are in each sample, by mixtures of the posteriors of its cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily

from qbmscvi.boltzmann.posterior import MixtureComponent
from qbmscvi.model._input_checks import get_column

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from qbmscvi.model._checked_data import Batches


class AbundanceMixin:
    """Methods of :class:`~qbmscvi.QBMSCVI` that compare samples by the posteriors of their cells."""

    @torch.inference_mode()
    def get_aggregated_posterior(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dof: float | None = 3.0,
    ) -> MixtureSameFamily:
        """Mixture, with equal weights, of the posteriors of some cells; an empty ``indices`` means all.

        As :meth:`scvi.model.SCVI.get_aggregated_posterior`, but over spins, so that ``dof`` has no effect. At spins of
        -1 and +1, ``log_prob`` is the log probability under the mixture. At mean spins, from
        ``get_latent_representation(representation="mean")``, it is the log of the mean probability of spins with these
        means.
        """
        self._check_if_trained(warn=False)
        indices = None if indices is None or np.size(indices) == 0 else indices
        logits = torch.cat([qz.logits for qz in self._get_posteriors(adata, indices, batch_size, None)])
        # Explicit, because torch.compile turns off the default for the whole process.
        return MixtureSameFamily(
            Categorical(logits=torch.zeros(len(logits), device=logits.device)),
            Independent(MixtureComponent(logits), 1),
            validate_args=True,
        )

    @torch.inference_mode()
    def differential_abundance(
        self,
        adata: AnnData | None = None,
        sample_key: str | None = None,
        batch_size: int = 128,
        num_cells_posterior: int | None = None,
        dof: float | None = None,
        *,
        adata_sub: AnnData | None = None,
        dataloader: Batches | None = None,
    ) -> None:
        """Compare how likely cells are in each sample, by the aggregated posteriors of the samples.

        As :meth:`scvi.model.SCVI.differential_abundance`, but over spins, so that ``dof`` has no effect. Pass all
        arguments except ``adata`` by name; scvi-tools 1.5 has another order. ``obsm["da_log_probs"]``, shape
        ``(n_cells, n_samples)``, gets the ``log_prob`` of each cell's mean spins under :meth:`get_aggregated_posterior`
        of the sample.

        Parameters
        ----------
        sample_key
            Column of ``adata.obs`` with the samples. Cells without a value belong to none.
        num_cells_posterior
            Largest number of cells per sample, drawn from torch's global stream.
        adata_sub
            Cells to compare; None for ``adata``.

        Raises
        ------
        MissingColumnError
            If there is no such column.
        ValueError
            If a sample of ``adata_sub`` has no cell in ``adata``, or a ``dataloader`` is given, which has no samples.
        """
        if dataloader is not None:
            msg = "A `dataloader` has no `adata.obs` with a column of samples. Pass `adata` and `sample_key`."
            raise ValueError(msg)
        adata = self._validate_anndata(adata)
        adata_sub = adata if adata_sub is None else self._validate_anndata(adata_sub)
        for cells in (adata, adata_sub):
            get_column(cells.obs, "sample_key", sample_key)
        # The mixture is over spins, so it needs mean spins, not the default angles.
        means = self.get_latent_representation(adata_sub, batch_size=batch_size, representation="mean")
        parts = torch.from_numpy(means).split(int(batch_size))
        log_probs = {}
        for sample in adata_sub.obs[sample_key].dropna().unique():
            rows = np.flatnonzero(adata.obs[sample_key] == sample)
            if not len(rows):
                msg = (
                    f"No cell of `adata` has {sample_key}={sample!r}, but cells of `adata_sub` have. Pass `adata` with "
                    "cells of each sample."
                )
                raise ValueError(msg)
            if num_cells_posterior is not None and num_cells_posterior < len(rows):
                rows = rows[torch.randperm(len(rows))[: int(num_cells_posterior)].numpy()]
            mixture = self.get_aggregated_posterior(adata, rows, batch_size, dof)
            log_probs[sample] = torch.cat([mixture.log_prob(part.to(self.device)).cpu() for part in parts]).numpy()
        adata_sub.obsm["da_log_probs"] = pd.DataFrame(log_probs, index=adata_sub.obs_names)
