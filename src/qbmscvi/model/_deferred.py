"""Models without data, with networks built when training gets a data module.

scvi-tools allows this by the name of the class: ``BaseModelClass.__init__`` tests for ``"SCVI"``. Here a base class
does it, which comes after :class:`~scvi.model.SCVI` in the order of inheritance and passes on an empty registry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scvi.model.base import BaseModelClass

if TYPE_CHECKING:
    from anndata import AnnData
    from torch import nn

_FIELDS = "field_registries"  # key of every registry of scvi-tools


class DeferredInitialization(BaseModelClass):
    """Accept ``adata=None`` and ``registry=None``; the module then exists from training on.

    Parameters
    ----------
    adata
        Registered AnnData.
    registry
        Registry of a data module.
    """

    def __init__(self, adata: AnnData | None = None, registry: dict | None = None) -> None:
        is_deferred = adata is None and registry is None
        super().__init__(adata, {_FIELDS: {}} if is_deferred else registry)
        self._module_init_on_train = is_deferred

    def get_var_names(self, *args: Any, **kwargs: Any) -> Any:
        """Names of the genes, as in scvi-tools; ValueError if the model was built without data."""
        if not self.registry[_FIELDS]:
            msg = (
                f"This {type(self).__name__} was built with neither `adata` nor `registry`, so it has no names of "
                "genes and batches and cannot be saved. Build it with the registry of the data module: "
                f"{type(self).__name__}(registry=datamodule.registry)."
            )
            raise ValueError(msg)
        return super().get_var_names(*args, **kwargs)

    # Both fail in scvi-tools 1.4, which reads the registry under a name that it never sets.

    def view_registry(self, hide_state_registries: bool = False) -> None:
        """Print a summary of the registry, as in scvi-tools."""
        self.view_anndata_setup(hide_state_registries=hide_state_registries)

    def update_setup_method_args(self, setup_method_args: dict) -> None:
        """Update the arguments of ``setup_anndata`` in the registry, as in scvi-tools."""
        self.registry_["setup_args"].update(setup_method_args)

    def _require_module(self) -> nn.Module:
        if self.module is None:
            msg = (
                f"This {type(self).__name__} was built with neither `adata` nor `registry`, so it has no prior and no "
                "networks yet. Call `train(datamodule=...)` first."
            )
            raise RuntimeError(msg)
        return self.module
