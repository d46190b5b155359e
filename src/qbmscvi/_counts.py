"""Checks of count data before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK_ROWS = 10_000


def totals_per_cell(X: Any, n_cells: int) -> np.ndarray:
    """Return row sums, shape ``(n_cells,)``, of whatever :func:`check_counts` reads."""
    return np.concatenate([np.asarray(rows.sum(axis=1)).ravel() for _, rows in _chunks(X, n_cells)])


def _chunks(X: Any, n_cells: int) -> Iterator[tuple[int, Any]]:
    for start in range(0, n_cells, _CHUNK_ROWS):
        yield start, X[start : start + _CHUNK_ROWS]


def check_counts(X: Any, n_cells: int, *, is_count_likelihood: bool = True, needs_library_size: bool = True) -> None:
    """Raise unless ``X`` is something scVI can be trained on; reads it in chunks of rows.

    Parameters
    ----------
    X
        Rows are cells, columns genes: dense, sparse, backed, or the matrix of an AnnCollection.
    n_cells
        Number of rows; the matrix of an AnnCollection has no shape.
    is_count_likelihood
        Whether values must be non-negative integers.
    needs_library_size
        Whether each cell needs a positive total.

    Raises
    ------
    ValueError
        For values that are not finite, negative or fractional, or a cell without counts.
    """
    for start, rows in _chunks(X, n_cells):
        values = np.asarray(rows.data if sparse.issparse(rows) else rows)
        if not np.isfinite(values).all():
            msg = (
                "The data contain NaN or infinite values. Raw counts are needed: set the affected entries to 0, or "
                "choose the layer that holds counts with `setup_anndata(..., layer=...)`."
            )
            raise ValueError(msg)
        if is_count_likelihood and values.size and values.min() < 0:
            msg = (
                f"The data contain negative values (minimum {values.min():g}); they look scaled or centered. Raw "
                "counts are needed: choose their layer with `setup_anndata(..., layer='counts')`."
            )
            raise ValueError(msg)
        if is_count_likelihood and (fractional := values[values != np.floor(values)]).size:
            msg = (
                f"The data are not counts: they contain values such as {fractional.flat[0]:g}, so they look "
                "normalized. Choose the layer with raw counts with `setup_anndata(..., layer='counts')`, or use "
                "`gene_likelihood='normal'` for continuous data."
            )
            raise ValueError(msg)
        if needs_library_size:
            totals = np.asarray(rows.sum(axis=1)).ravel()
            negative = np.flatnonzero(totals < 0)
            if negative.size:
                msg = (
                    f"Cell {start + negative[0]} has the negative total {totals[negative[0]]:g}, of which scVI takes "
                    "the logarithm as its library size. Use `use_observed_lib_size=False`, or set the data up with "
                    "`size_factor_key`."
                )
                raise ValueError(msg)
            empty = np.flatnonzero(totals == 0)
            if empty.size:
                msg = (
                    f"Cell {start + empty[0]} has no counts, so its library size has no logarithm. Remove empty cells, "
                    "e.g. with `scanpy.pp.filter_cells(adata, min_counts=1)`, after choosing genes."
                )
                raise ValueError(msg)
