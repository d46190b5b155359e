"""QBMSCANVI: cell types transferred to unlabeled cells through a Boltzmann prior."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data.fields import (
    CategoricalJointObsField,
    CategoricalObsField,
    LabelsWithUnlabeledObsField,
    LayerField,
    NumericalJointObsField,
    NumericalObsField,
)
from scvi.model._utils import get_max_epochs_heuristic
from scvi.module._constants import MODULE_KEYS

from qbmscvi.model._arguments import as_rows
from qbmscvi.model._input_checks import as_column_list, check_setup
from qbmscvi.model._qbmscvi import QBMSCVI, plan_arguments
from qbmscvi.module._qbmscanvae import QBMSCANVAE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from qbmscvi.boltzmann.posterior import FactorialPosterior


class QBMSCANVI(QBMSCVI):
    """Annotation of cells with a Boltzmann prior over latent variables and cell types.

    Used like :class:`scvi.model.SCANVI`: some cells have a label, the others the ``unlabeled_category``. Each label is
    an additional spin of the prior, as in a classification restricted Boltzmann machine :cite:p:`Larochelle08`. So
    samplers, log Z and the closed form of the KL divergence are the same as in :class:`QBMSCVI`, and so are the
    arguments. The classifier is the prior's ``p(label | z)``.

    Examples
    --------
    >>> import qbmscvi
    >>> adata = qbmscvi.datasets.synthetic_counts(n_cells=300, n_genes=100)
    >>> adata.obs["label"] = adata.obs["cell_type"].astype(str).where(adata.obs["batch"] == "batch_0", "Unknown")
    >>> qbmscvi.QBMSCANVI.setup_anndata(adata, "label", "Unknown", batch_key="batch")
    >>> model = qbmscvi.QBMSCANVI(adata)
    >>> model.train(max_epochs=2)
    >>> adata.obs["prediction"] = model.predict()
    """

    _module_cls = QBMSCANVAE

    def __init__(self, adata: AnnData | None = None, registry: dict | None = None, **kwargs: Any) -> None:
        super().__init__(adata, registry, **kwargs)
        self.was_pretrained = False
        self.init_params_ = self._get_init_params(locals())

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        labels_key: str,
        unlabeled_category: str,
        layer: str | None = None,
        batch_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Register an AnnData with raw counts, as :meth:`scvi.model.SCANVI.setup_anndata`.

        ``labels_key`` is the column with the cell types, ``unlabeled_category`` its value for cells of unknown type.
        Errors are those of :meth:`QBMSCVI.setup_anndata`.
        """
        categorical_covariate_keys = as_column_list("categorical_covariate_keys", categorical_covariate_keys)
        continuous_covariate_keys = as_column_list("continuous_covariate_keys", continuous_covariate_keys)
        arguments = {
            "labels_key": labels_key,
            "unlabeled_category": unlabeled_category,
            "layer": layer,
            "batch_key": batch_key,
            "size_factor_key": size_factor_key,
            "categorical_covariate_keys": categorical_covariate_keys,
            "continuous_covariate_keys": continuous_covariate_keys,
        }
        check_setup(adata, **arguments, **kwargs)
        setup_method_args = cls._get_setup_method_args(cls=cls, adata=adata, **arguments)
        fields = [
            LayerField(REGISTRY_KEYS.X_KEY, layer, is_count_data=True),
            CategoricalObsField(REGISTRY_KEYS.BATCH_KEY, batch_key),
            LabelsWithUnlabeledObsField(REGISTRY_KEYS.LABELS_KEY, labels_key, unlabeled_category),
            NumericalObsField(REGISTRY_KEYS.SIZE_FACTOR_KEY, size_factor_key, required=False),
            CategoricalJointObsField(REGISTRY_KEYS.CAT_COVS_KEY, categorical_covariate_keys),
            NumericalJointObsField(REGISTRY_KEYS.CONT_COVS_KEY, continuous_covariate_keys),
        ]
        manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
        manager.register_fields(adata, **kwargs)
        cls.register_manager(manager)

    @classmethod
    def from_qbmscvi_model(
        cls,
        model: QBMSCVI,
        unlabeled_category: str,
        labels_key: str | None = None,
        adata: AnnData | None = None,
    ) -> QBMSCANVI:
        """Start from a trained :class:`QBMSCVI`: its weights, its prior and its chains, with labels added.

        Parameters
        ----------
        model
            Trained model.
        unlabeled_category
            Value of cells of unknown type in the column ``labels_key``.
        labels_key
            Column of ``adata.obs`` with the cell types; None for the model's labels key.
        adata
            AnnData with the same genes, which is set up again; None for the model's.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If no ``labels_key`` is known.
        """
        model._check_if_trained(warn=False, message="The model has not been trained. Call `train()` first.")
        adata = model.adata if adata is None else model._validate_anndata(adata)
        setup = deepcopy(model.registry["setup_args"])
        setup["labels_key"] = labels_key or setup["labels_key"]
        if setup["labels_key"] is None:
            msg = "The model was set up without labels. Pass `labels_key`, the column of `adata.obs` with cell types."
            raise ValueError(msg)
        cls.setup_anndata(adata, unlabeled_category=unlabeled_category, **setup)
        arguments = model.init_params_["non_kwargs"] | {
            name: value for group in model.init_params_["kwargs"].values() for name, value in group.items()
        }
        annotated = cls(adata, **arguments)
        annotated.module.take_over(model.module)
        annotated.was_pretrained = True
        return annotated

    def train(self, max_epochs: int | None = None, *args: Any, plan_kwargs: Any | None = None, **kwargs: Any) -> None:
        """Train the model; arguments not listed here are those of :meth:`QBMSCVI.train`.

        Parameters
        ----------
        max_epochs
            None for scVI's number, which depends on the size of the data. After :meth:`from_qbmscvi_model` it is a
            third of that, between 2 and 10, as in :class:`scvi.model.SCANVI`.
        plan_kwargs
            ``classification_ratio`` (default 50) is the weight of the labels' cross-entropy relative to the ELBO. After
            :meth:`from_qbmscvi_model` there is no KL warm-up by default.
        """
        plan_kwargs = plan_arguments(plan_kwargs)
        if self.was_pretrained:
            plan_kwargs.setdefault("n_epochs_kl_warmup", None)
            if max_epochs is None:
                max_epochs = min(10, max(2, round(get_max_epochs_heuristic(self.adata.n_obs) / 3)))
        super().train(max_epochs, *args, plan_kwargs=plan_kwargs, **kwargs)

    @torch.inference_mode()
    def predict(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        soft: bool = False,
        batch_size: int | None = None,
    ) -> np.ndarray | pd.DataFrame:
        """Predict cell types: the prior's ``p(label | z)`` at the mean of each cell's posterior.

        Other arguments are those of :meth:`get_latent_representation`.

        Parameters
        ----------
        soft
            Whether to return probabilities.

        Returns
        -------
        Labels, shape ``(n_cells,)``; or with ``soft`` a table of probabilities, one column per label.
        """
        self._check_if_trained(warn=False)
        adata = self._validate_anndata(adata)
        logits = []
        for tensors in self._make_data_loader(adata, indices=indices, batch_size=batch_size):
            outputs = self.module.inference(**self.module._get_inference_input(tensors))
            logits.append(self.module.classify(outputs[MODULE_KEYS.QZ_KEY]).cpu())
        labels = np.asarray(self.adata_manager.get_state_registry(REGISTRY_KEYS.LABELS_KEY).categorical_mapping)[:-1]
        logits = torch.cat(logits) if logits else torch.zeros(0, len(labels))
        if not soft:
            return labels[logits.argmax(-1).numpy()]
        names = adata.obs_names if indices is None else adata.obs_names[as_rows(indices, adata)]
        return pd.DataFrame(torch.softmax(logits, -1).numpy(), columns=labels, index=names)

    def _most_probable_spins(self, qz: FactorialPosterior) -> torch.Tensor:
        logits = self.module.classify(qz)
        types = 2 * torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]) - 1
        return torch.cat([super()._most_probable_spins(qz), types], dim=-1)
