"""Conversion of arguments from numpy and pandas for scvi-tools, torch and Lightning."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scvi.dataloaders import AnnDataLoader

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from scvi.data import AnnDataManager


def as_rows(indices: Any, adata: AnnData) -> np.ndarray:
    """Return row numbers of cells.

    Parameters
    ----------
    indices
        One or more numbers, a slice, or a mask of all cells, of any type that numpy or pandas converts to an array. A
        Series with the names of all cells as its index is a mask by names, in any order.
    adata
        The cells.

    Raises
    ------
    TypeError
        If ``indices`` are neither integers nor a mask.
    ValueError
        If a mask does not cover all cells.
    IndexError
        If a number belongs to no cell.
    """
    if isinstance(indices, slice):
        return np.arange(adata.n_obs)[indices]
    if isinstance(indices, pd.Series) and pd.api.types.is_bool_dtype(indices):
        names = pd.Index(adata.obs_names)
        if names.is_unique and len(indices) == len(names) and indices.index.isin(names).all():
            indices = indices.reindex(names)
    rows = np.atleast_1d(np.asarray(indices)).ravel()
    if rows.dtype == object:  # of a nullable type
        rows = np.array(rows.tolist())
    if rows.dtype == bool:
        if len(rows) != adata.n_obs:
            msg = f"The mask has {len(rows)} values for {adata.n_obs} cells. Give one for each cell, or row numbers."
            raise ValueError(msg)
        return np.flatnonzero(rows)
    if rows.size and rows.dtype.kind not in "iu":
        msg = (
            f"`indices` are of the type {rows.dtype}; they must be row numbers or a mask with True or False for each "
            "cell. For names, use `adata.obs_names.get_indexer(names)`."
        )
        raise TypeError(msg)
    rows = rows.astype(np.int64)
    beyond = rows[(rows >= adata.n_obs) | (rows < -adata.n_obs)]
    if len(beyond):
        msg = f"`indices` names the row {beyond[0]}, but there are {adata.n_obs} cells. Count rows from 0."
        raise IndexError(msg)
    return rows


def as_list(names: Any) -> list:
    """Return one name, or several of any type, as a list; a single name would be read letter by letter."""
    return [names] if isinstance(names, str) else list(names)


def as_python(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with numpy's scalars converted to Python's, because Lightning and torch check the type."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in arguments.items()}


class CellLoader(AnnDataLoader):
    """scvi-tools' data loader for any ``indices`` that :func:`as_rows` takes.

    Parameters
    ----------
    adata_manager
        Manager of the AnnData.
    indices
        Cells; None for all.
    batch_size
        Cells at a time.
    """

    def __init__(
        self, adata_manager: AnnDataManager, indices: Any = None, batch_size: int = 128, *args: Any, **kwargs: Any
    ) -> None:
        rows = None if indices is None else as_rows(indices, adata_manager.adata)
        super().__init__(adata_manager, rows, operator.index(batch_size), *args, **kwargs)
