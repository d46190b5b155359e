"""Data of the methods: checks at setup and whenever a method gets an AnnData, and batches of the cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.data._constants import _ADATA_MINIFY_TYPE_UNS_KEY, _SETUP_ARGS_KEY
from scvi.model.base import BaseModelClass
from scvi.module._constants import MODULE_KEYS

from qbmscvi.model._counts import check_counts
from qbmscvi.model._input_checks import as_column_list, check_finite, check_setup, require_anndata

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData
    from torch import Tensor

    from qbmscvi.boltzmann.posterior import FactorialPosterior

    Batches = Iterable[dict[str, Tensor | None]]

_OF_MINIFIED_DATA = {"_scvi_latent_qzm", "_scvi_latent_qzv"}


class CheckedDataMixin(BaseModelClass):
    """Data of :class:`~qbmscvi.QBMSCVI`, checked before scvi-tools sees them."""

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Register an AnnData with raw counts, as :meth:`scvi.model.SCVI.setup_anndata`.

        Set ``labels_key``, the column with the cell type, for ``dispersion="gene-label"`` and for scores. Size factors
        must be positive. Covariates are lists of columns.

        Raises
        ------
        TypeError
            If scvi-tools cannot read the matrix, a column holds values of the wrong type, or covariates are not a list.
        ValueError
            If a layer or column does not exist, or has missing or non-finite values.
        """
        arguments = {
            "layer": layer,
            "batch_key": batch_key,
            "labels_key": labels_key,
            "size_factor_key": size_factor_key,
            "categorical_covariate_keys": as_column_list("categorical_covariate_keys", categorical_covariate_keys),
            "continuous_covariate_keys": as_column_list("continuous_covariate_keys", continuous_covariate_keys),
        }
        check_setup(adata, **arguments, **kwargs)
        super().setup_anndata(adata, **arguments, **kwargs)

    def _validate_anndata(self, adata: AnnData | None = None, copy_if_view: bool = True) -> AnnData:
        """Validate as scvi-tools does, after a check of genes and columns, and before one of the numbers."""
        if adata is None and self.adata is None:
            msg = (
                f"This {type(self).__name__} has no AnnData. Pass `adata` here, or when the model is loaded: "
                f"`{type(self).__name__}.load(folder, adata)`."
            )
            raise ValueError(msg)
        adata = self.adata if adata is None else adata
        require_anndata(adata)
        if self.adata_manager is not None and adata is not self.adata:
            check_setup(adata, source_registry=self.registry, **self.registry[_SETUP_ARGS_KEY])
        adata = super()._validate_anndata(adata, copy_if_view=copy_if_view)
        if getattr(self, "module", None) is not None:  # not yet in the constructor
            self._check_numbers(adata)
        return adata

    def _check_numbers(self, adata: AnnData) -> None:
        """Raise unless the module can compute on the counts, size factors and continuous covariates."""
        manager, arguments = self.get_anndata_manager(adata, required=True), self.registry[_SETUP_ARGS_KEY]
        has_size_factor = arguments["size_factor_key"] is not None
        if has_size_factor:
            size_factor = manager.get_from_registry(REGISTRY_KEYS.SIZE_FACTOR_KEY)
            size_factor = pd.Series(size_factor.ravel(), name=arguments["size_factor_key"])
            check_finite(adata, size_factor, "size_factor_key", must_be_positive=True)
        if arguments["continuous_covariate_keys"]:
            covariates = manager.get_from_registry(REGISTRY_KEYS.CONT_COVS_KEY)
            check_finite(adata, covariates, "continuous_covariate_keys")
        X = manager.get_from_registry(REGISTRY_KEYS.X_KEY)
        # Posteriors have replaced the counts; scvi-tools loads such data before `minify_adata`.
        is_to_be_minified = _OF_MINIFIED_DATA <= set(adata.obsm or ()) and sparse.issparse(X) and X.nnz == 0
        if adata.uns.get(_ADATA_MINIFY_TYPE_UNS_KEY) is None and not is_to_be_minified:
            check_counts(
                adata,
                X,
                layer=arguments["layer"],
                is_count_likelihood=self.module.gene_likelihood != "normal",
                needs_library_size=self.module.use_observed_lib_size and not has_size_factor,
            )

    def _get_batches(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        batch_size: int | None,
        dataloader: Batches | None,
        **kwargs: Any,
    ) -> Batches:
        if dataloader is None:
            adata = self._validate_anndata(adata)
            return self._make_data_loader(adata=adata, indices=indices, batch_size=batch_size, **kwargs)
        if adata is not None:
            msg = "Both `adata` and `dataloader` are given. Pass one of them."
            raise ValueError(msg)
        return dataloader

    def _get_posteriors(self, *data: Any) -> Iterable[FactorialPosterior]:
        for tensors in self._get_batches(*data):
            yield self.module.inference(**self.module._get_inference_input(tensors))[MODULE_KEYS.QZ_KEY]
