"""scVI's methods of decoded expression, for every likelihood and type of argument."""

from __future__ import annotations

import warnings
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS
from scvi.module._constants import MODULE_KEYS

from qbmscvi.exceptions import require_integer
from qbmscvi.model._arguments import as_list, as_rows
from qbmscvi.model._input_checks import as_typed, check_groups, suggest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from anndata import AnnData
    from torch import Tensor
    from torch.distributions import Distribution

_WITHOUT_GAMMA = ("poisson", "normal")  # scVI expects the negative binomial's here


class ExpressionMixin:
    """Methods of scVI for :class:`~qbmscvi.QBMSCVI`, with fixes."""

    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        transform_batch: Sequence[float | str] | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        n_samples: int = 1,
        n_samples_overall: int | None = None,
        weights: Literal["uniform", "importance"] | None = None,
        batch_size: int | None = None,
        return_mean: bool = True,
        return_numpy: bool | None = None,
        silent: bool = True,
        dataloader: Iterator[dict[str, Tensor | None]] | None = None,
        data_loader_kwargs: dict | None = None,
        **importance_weighting_kwargs: Any,
    ) -> np.ndarray | pd.DataFrame:
        """Normalized expression from the decoder, as :meth:`scvi.model.SCVI.get_normalized_expression`.

        With ``n_samples_overall``, draws come from all cells together, and rows are draws, not cells.

        Raises
        ------
        ValueError
            If there are no cells for ``n_samples_overall``, the model has none of the genes or no such batch, or
            ``library_size`` is neither positive nor ``"latent"``.

        Warns
        -----
        UserWarning
            If the model lacks some of the genes, or ``weights="importance"`` has no effect without
            ``n_samples_overall``.
        """
        if library_size != "latent" and not (isinstance(library_size, Real) and 0 < library_size < np.inf):
            msg = f"library_size={library_size!r} must be a positive number, or 'latent' for each cell's own."
            raise ValueError(msg)
        require_integer("n_samples", n_samples, 1)
        if weights == "importance" and n_samples_overall is None:
            msg = (
                "weights='importance' has no effect without `n_samples_overall`, because it weighs draws from all "
                "cells together. Pass `n_samples_overall`."
            )
            warnings.warn(msg, UserWarning, stacklevel=2)
        self._check_batches("transform_batch", transform_batch)
        arguments = {
            "transform_batch": transform_batch,
            "gene_list": self._known_genes(gene_list),
            "library_size": library_size,
            "weights": weights,
            "batch_size": batch_size,
            "return_mean": return_mean,
            "silent": silent,
            "dataloader": dataloader,
            "data_loader_kwargs": data_loader_kwargs,
            **importance_weighting_kwargs,
        }
        if dataloader is None:
            adata = self._validate_anndata(adata)
            indices = None if indices is None else as_rows(indices, adata)
        if n_samples_overall is None or dataloader is not None:
            return super().get_normalized_expression(
                adata, indices, n_samples=n_samples, return_numpy=return_numpy, **arguments
            )
        if indices is not None and len(indices) == 0:
            msg = (
                "There is no cell to draw `n_samples_overall` samples from. Name at least one in `indices`, or in each "
                "of the groups compared."
            )
            raise ValueError(msg)
        draws = super().get_normalized_expression(
            adata, indices, n_samples_overall=n_samples_overall, return_numpy=True, **arguments
        )
        if return_numpy:
            return draws
        genes = adata.var_names
        return pd.DataFrame(draws, columns=genes if gene_list is None else genes[genes.isin(arguments["gene_list"])])

    def differential_expression(
        self,
        adata: AnnData | None = None,
        groupby: str | None = None,
        group1: Sequence[str] | None = None,
        group2: str | None = None,
        idx1: Sequence[int] | Sequence[bool] | str | None = None,
        idx2: Sequence[int] | Sequence[bool] | str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> pd.DataFrame:
        """Compare the expression of groups of cells, as :meth:`scvi.model.SCVI.differential_expression`.

        Groups without cells are left out. ``idx1`` and ``idx2`` may be row numbers, a mask or a query of ``adata.obs``.
        A mask that is a Series with the names of the cells as its index may be in any order.

        Raises
        ------
        ValueError
            If there is no such column or group, or a group has no cells.
        """
        adata = self._validate_anndata(adata)
        cells = {"idx1": idx1, "idx2": idx2, "subset_idx": kwargs.pop("subset_idx", None)}
        for name, value in cells.items():
            if value is not None:
                rows = np.flatnonzero(adata.obs.eval(value)) if isinstance(value, str) else as_rows(value, adata)
                if not len(rows):
                    msg = f"`{name}` names no cell of {adata.n_obs}, but each group needs at least one."
                    raise ValueError(msg)
                if name == "idx1" and idx2 is None and len(np.unique(rows)) == adata.n_obs:
                    msg = "`idx1` names all cells, so none are left to compare them with. Pass `idx2`, or fewer cells."
                    raise ValueError(msg)
                kwargs[name] = rows
        if groupby is not None:
            group1 = check_groups(adata, groupby, group1, group2)
        for name in ("batchid1", "batchid2"):
            if kwargs.get(name) is not None:
                kwargs[name] = as_list(kwargs[name])
                self._check_batches(name, kwargs[name])
        return super().differential_expression(adata, groupby, group1, group2, *args, **kwargs)

    def posterior_predictive_sample(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        transform_batch: Sequence[float | str] | None = None,
        n_samples: int = 1,
        gene_list: Sequence[str] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Draw counts from the posterior predictive, as :meth:`scvi.model.SCVI.posterior_predictive_sample`."""
        self._check_batches("transform_batch", transform_batch)
        genes = self._known_genes(gene_list)
        return super().posterior_predictive_sample(adata, indices, transform_batch, n_samples, genes, *args, **kwargs)

    def _check_batches(self, argument: str, batches: Any) -> None:
        """Raise unless the model knows each batch, one or several."""
        known = list(self.get_state_registry(REGISTRY_KEYS.BATCH_KEY).categorical_mapping)
        for batch in [batches] if batches is None or np.ndim(batches) == 0 else batches:
            if batch is not None and batch not in known:
                msg = f"{argument}={batch!r} is no batch of the model. {suggest(batch, known)}"
                raise ValueError(msg)

    def _known_genes(self, gene_list: Sequence[str] | None) -> list[str] | None:
        """Names of the genes that the model has; None for all."""
        if gene_list is None:
            return None
        asked, known = as_list(gene_list), self.get_var_names()
        missing = sorted(set(map(str, asked)) - set(known))
        if missing and len(missing) == len(set(asked)):
            msg = f"The model has none of the genes {as_typed(missing, 3)}. {suggest(missing[0], known)}"
            raise ValueError(msg)
        if missing:
            msg = f"The model has not all genes of `gene_list`: {as_typed(missing, 10)} are left out."
            warnings.warn(msg, UserWarning, stacklevel=3)
        return asked

    @torch.inference_mode()
    def get_likelihood_parameters(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int | None = 1,
        give_mean: bool | None = False,
        batch_size: int | None = None,
        dataloader: Iterable[dict[str, Tensor | None]] | None = None,
        **data_loader_kwargs: Any,
    ) -> dict[str, np.ndarray]:
        """Parameters of the likelihood of each cell, as :meth:`scvi.model.SCVI.get_likelihood_parameters`.

        In addition, ``"poisson"`` has a ``"mean"``, and ``"normal"`` a ``"mean"`` and standard deviations
        ``"dispersions"``.
        """
        if self.module.gene_likelihood not in _WITHOUT_GAMMA:
            return super().get_likelihood_parameters(
                adata, indices, n_samples, give_mean, batch_size, dataloader, **data_loader_kwargs
            )
        data = (adata, indices, batch_size, dataloader)
        likelihoods = list(self._decode(n_samples, None, *data, **data_loader_kwargs))
        names = {"mean": "mean"} | ({"dispersions": "stddev"} if self.module.gene_likelihood == "normal" else {})
        parameters = {
            key: torch.cat([getattr(px, name).cpu() for px in likelihoods], dim=-2).numpy()
            for key, name in names.items()
        }
        if give_mean and n_samples > 1:
            parameters = {key: values.mean(0) for key, values in parameters.items()}
        return parameters

    @torch.inference_mode()
    def _get_denoised_samples(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 25,
        batch_size: int = 64,
        rna_size_factor: int = 1000,
        transform_batch: int | None = None,
        dataloader: Iterable[dict[str, Tensor | None]] | None = None,
        **data_loader_kwargs: Any,
    ) -> np.ndarray:
        """Expression as ``get_feature_correlation_matrix`` correlates it, shape ``(n_cells, n_genes[, n_samples])``.

        scVI draws it from the gamma distribution inside the negative binomial. A Poisson or normal likelihood has none;
        its expression is the decoder's at each draw of the latent variables.
        """
        if self.module.gene_likelihood not in _WITHOUT_GAMMA:
            settings = (n_samples, batch_size, rna_size_factor, transform_batch)
            return super()._get_denoised_samples(adata, indices, *settings, dataloader, **data_loader_kwargs)
        data = (adata, indices, batch_size, dataloader)
        likelihoods = self._decode(n_samples, transform_batch, *data, **data_loader_kwargs)
        scale = torch.cat([px.get_normalized("scale").cpu() for px in likelihoods], dim=-2)
        draws = rna_size_factor * scale.numpy()
        return draws if draws.ndim == 2 else draws.transpose(1, 2, 0)

    def _decode(
        self, n_samples: int, transform_batch: int | None, *data: Any, **data_loader_kwargs: Any
    ) -> Iterator[Distribution]:
        """Likelihood of each batch of cells, at draws of its posterior."""
        for tensors in self._get_batches(*data, **data_loader_kwargs):
            _, outputs = self.module.forward(
                tensors,
                inference_kwargs={"n_samples": n_samples},
                generative_kwargs={"transform_batch": transform_batch},
                compute_loss=False,
            )
            yield outputs[MODULE_KEYS.PX_KEY]
