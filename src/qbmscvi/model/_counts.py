"""Checks of counts before a model computes on them.

The model reads single precision, so a value counts as the closest integer there. The size of other values tells their
kind. Corrected counts (ambient RNA removed, expectation maximization) are large and their totals differ between cells;
normalized values are small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from qbmscvi.module._sparse_likelihoods import ROUNDING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

_CHUNK_ROWS = 10_000
_LEAST_CORRECTED = 50.0  # normalized and log-transformed values stay below


def totals_per_cell(X: Any, n_cells: int) -> np.ndarray:
    """Return row sums, shape ``(n_cells,)``, of any matrix that :func:`check_counts` reads."""
    return np.concatenate([_totals(rows) for _, rows in _chunks(X, n_cells)])


def check_counts(
    adata: AnnData,
    X: Any = None,
    *,
    layer: str | None = None,
    is_count_likelihood: bool = True,
    needs_library_size: bool = True,
) -> None:
    """Raise unless a model can compute on the data, which are read in chunks of rows.

    Parameters
    ----------
    adata
        Names of cells and genes, and other layers that the message may suggest.
    X
        Matrix of cells by genes: dense, sparse, backed, or of an AnnCollection. None for the matrix of ``layer``.
    layer
        Layer that holds ``X``; None for ``adata.X``.
    is_count_likelihood
        Whether values must be non-negative integers, up to rounding error.
    needs_library_size
        Whether each cell needs a positive total.
    """
    if X is None:
        X = adata.X if layer is None else adata.layers[layer]
    empty = []
    for start, rows in _chunks(X, adata.n_obs):
        values = _values(rows)
        bad = ~np.isfinite(values) if values.dtype.kind == "f" else np.zeros(0, dtype=bool)
        if bad.any():
            raise ValueError(_describe_not_finite(adata, layer, start, rows, bad, values))
        if is_count_likelihood and values.size:
            if values.min() < 0:
                raise ValueError(_describe_negative(adata, layer, start, rows, values))
            fractional = _fractional(values)
            if fractional.any():
                raise ValueError(_describe_fractional(adata, layer, start, rows, fractional, values))
        if needs_library_size:
            totals = _totals(rows)
            if (totals < 0).any():
                row = int(np.flatnonzero(totals < 0)[0])
                msg = (
                    f"{_cell(adata, start + row)} has the negative total {totals[row]:g}, but scVI takes the "
                    "logarithm of this total. Use `use_observed_lib_size=False`, or set the data up with "
                    "`size_factor_key`."
                )
                raise ValueError(msg)
            empty.extend(start + np.flatnonzero(totals == 0))
    if empty:
        msg = (
            f"{len(empty)} of {adata.n_obs} cells have no counts, the first of them {_cell(adata, empty[0])}, "
            "but the model takes the logarithm of each total. Remove these cells after choosing genes: "
            f"`scanpy.pp.filter_cells(adata, min_counts=1)`{'' if layer is None else f' on layer {layer!r}'}."
        )
        raise ValueError(msg)


def _chunks(X: Any, n_cells: int) -> Iterator[tuple[int, Any]]:
    for start in range(0, n_cells, _CHUNK_ROWS):
        rows = X[start : start + _CHUNK_ROWS]
        if sparse.issparse(rows) and not rows.has_canonical_format:
            rows = rows.copy()  # it may be a view of the user's data
            rows.sum_duplicates()  # as does `toarray`, with which the model reads
        yield start, rows


def _values(rows: Any) -> np.ndarray:
    values = np.asarray(rows.data if sparse.issparse(rows) else rows)
    if values.dtype.kind not in "fiub":
        msg = (
            f"The counts have the type {values.dtype}, but numbers are needed. Convert them: "
            "`adata.X = adata.X.astype('float32')`."
        )
        raise ValueError(msg)
    return values.astype(np.float32, copy=False) if values.dtype.kind == "f" else values


def _totals(rows: Any) -> np.ndarray:
    return np.asarray(rows.sum(axis=1, dtype=np.float64)).ravel()


def _fractional(values: np.ndarray) -> np.ndarray:
    """Whether each value is farther from an integer than rounding explains."""
    if values.dtype.kind != "f":
        return np.zeros(0, dtype=bool)
    nearest = np.rint(values)
    if (values == nearest).all():
        return np.zeros(0, dtype=bool)
    if not nearest.any():  # shares of a cell's total are all close to zero
        return values != 0.0
    return np.abs(values - nearest) > ROUNDING * np.maximum(nearest, 1.0)


def _cell(adata: AnnData, row: int) -> str:
    return f"cell {str(adata.obs_names[row])!r} (row {row})"


def _entry(adata: AnnData, start: int, rows: Any, number: int) -> str:
    """Cell and gene of the stored value with this number."""
    if sparse.issparse(rows):
        coordinates = rows.tocoo()
        row, column = int(coordinates.row[number]), int(coordinates.col[number])
    else:
        row, column = np.unravel_index(number, rows.shape)
    return f"{_cell(adata, start + int(row))}, gene {str(adata.var_names[column])!r}"


def _describe_not_finite(
    adata: AnnData, layer: str | None, start: int, rows: Any, bad: np.ndarray, values: np.ndarray
) -> str:
    first = int(np.flatnonzero(bad)[0])
    return (
        f"{_place(layer)} has the value {values.ravel()[first]} ({_entry(adata, start, rows, first)}). "
        f"{int(bad.sum())} values of the first {min(start + _CHUNK_ROWS, adata.n_obs)} cells are NaN or infinite. Set "
        f"them to 0 if nothing was counted, or remove these cells. {_other_layers(adata, layer)}"
    ).rstrip()


def _describe_negative(adata: AnnData, layer: str | None, start: int, rows: Any, values: np.ndarray) -> str:
    first = int(values.argmin())
    return (
        f"{_place(layer)} has negative values, such as {values.ravel()[first]} ({_entry(adata, start, rows, first)}): "
        "it looks scaled or centered, but raw counts are needed. "
        f"{_other_layers(adata, layer) or 'Load the raw counts, or use `gene_likelihood=' + repr('normal') + '`.'}"
    )


def _describe_fractional(
    adata: AnnData, layer: str | None, start: int, rows: Any, fractional: np.ndarray, values: np.ndarray
) -> str:
    first = int(np.flatnonzero(fractional)[0])
    totals = _totals(rows)
    totals = totals[totals > 0]
    has_equal_totals = totals.std() < 0.01 * totals.mean()
    others = _other_layers(adata, layer)
    found = (
        f"{_place(layer)} holds values that are no integers, such as {values.ravel()[first]!s} "
        f"({_entry(adata, start, rows, first)}). "
    )
    if values.max() > _LEAST_CORRECTED and not has_equal_totals:
        target = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
        target += ".data" if sparse.issparse(rows) else ""
        advice = f"They look like corrected counts. Round them: `{target} = np.rint({target})`."
        return f"{found}{advice} {others}".rstrip()
    kind = "They look normalized, but raw counts are needed. "
    return f"{found}{kind}{others or 'Load the raw counts, or use `gene_likelihood=' + repr('normal') + '`.'}"


def _place(layer: str | None) -> str:
    return "`adata.X`" if layer is None else f"The layer {layer!r}"


def _other_layers(adata: AnnData, layer: str | None) -> str:
    """Sentence on other places with counts; empty if there are none."""
    found = []
    if layer is not None and _holds_counts(getattr(adata, "X", None), adata.n_obs):
        found.append("`adata.X`, without `layer`")
    for name in adata.layers.keys():
        if name != layer and _holds_counts(adata.layers[name], adata.n_obs):
            found.append(f"`layer={name!r}`")
    raw = getattr(adata, "raw", None)
    if raw is not None and _holds_counts(raw.X, adata.n_obs):
        found.append("`adata.raw.to_adata()`")
    return f"There are integers in {', in '.join(found)}." if found else ""


def _holds_counts(X: Any, n_cells: int) -> bool:
    try:
        parts = [_values(rows) for _, rows in _chunks(X, n_cells)]
    except (TypeError, ValueError):  # nothing there, or no numbers
        return False
    return all(np.isfinite(v).all() and (v >= 0).all() and not _fractional(v).any() for v in parts) and any(
        v.any() for v in parts
    )
