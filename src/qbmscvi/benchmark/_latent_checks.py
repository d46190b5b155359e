"""Checks of what :func:`~qbmscvi.benchmark.score_latent` is given, and the arrays that its scores are computed on."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

N_FOLDS = 5
_N_ROOTS = 5
_MIN_LINEAGE_CELLS = 20
_MIN_ORDERED_CELLS = 6  # scanpy wants at least three diffusion components, and the eigensolver fewer than cells


def as_latent(latent: ArrayLike) -> np.ndarray:
    """Finite table of cells by dimensions, in float64."""
    try:
        latent = np.asarray(latent, dtype=np.float64)
    except (TypeError, ValueError) as error:
        msg = (
            f"`latent` is not an array of numbers: got {type(latent).__name__}, but a dense table of cells by "
            "dimensions is needed. Convert it first."
        )
        raise ValueError(msg) from error
    if latent.ndim != 2 or 0 in latent.shape:
        msg = (
            f"`latent` has shape {latent.shape}, but it must have two axes, cells by dimensions, and neither empty. "
            "Pass what `get_latent_representation` returns."
        )
        raise ValueError(msg)
    is_finite = np.isfinite(latent).all(axis=1)
    if not is_finite.all():
        msg = (
            f"`latent` has non-finite values in {np.sum(~is_finite)} of {len(latent)} cells, but every value must be "
            "finite. Look for diverged training before scoring."
        )
        raise ValueError(msg)
    return latent


def _require_length(name: str, values: np.ndarray, n_cells: int) -> None:
    if values.shape != (n_cells,):
        msg = (
            f"`{name}` has shape {values.shape}, but `latent` has {n_cells} cells and needs one value for each. "
            f"Take `{name}` and `latent` from the same cells, in the same order."
        )
        raise ValueError(msg)


def as_codes(name: str, values: ArrayLike, n_cells: int) -> np.ndarray:
    """Turn category names into integers ``0 .. n_groups - 1``, every one of them in use."""
    if not hasattr(values, "shape"):
        values = np.array(values, dtype=object)  # a plain list of str and nan would turn nan into the text "nan"
    values = np.asarray(values)
    _require_length(name, values, n_cells)
    n_missing = int(pd.isna(values).sum())
    if n_missing:
        msg = (
            f"`{name}` is missing for {n_missing} of {n_cells} cells, but every cell needs a value. "
            "Score the annotated cells only."
        )
        raise ValueError(msg)
    return pd.factorize(values)[0]


def as_numbers(values: ArrayLike) -> np.ndarray:
    """Turn numbers of any type into floats, NaN for what is missing."""
    values = np.asarray(values)
    if values.dtype == object:
        values = np.where(pd.isna(values), np.nan, values)
    return values.astype(np.float64)


def as_order(order: ArrayLike, n_cells: int, n_neighbors: int, name: str = "order") -> np.ndarray:
    """Known order of the cells as floats, NaN for cells off the trajectory, of which enough are on it."""
    try:
        order = as_numbers(order)
    except (TypeError, ValueError) as error:
        msg = (
            f"`{name}` is not numeric, but it must hold one number per cell, NaN for cells off the trajectory. "
            "Map stages to integers first."
        )
        raise ValueError(msg) from error
    _require_length(name, order, n_cells)
    if np.isinf(order).any():
        msg = (
            f"`{name}` is infinite for {np.isinf(order).sum()} cells, but only finite numbers and NaN are allowed. "
            "Use NaN for cells off the trajectory."
        )
        raise ValueError(msg)
    known = order[~np.isnan(order)]
    n_needed = max(_MIN_ORDERED_CELLS, n_neighbors + 1)
    if len(known) < n_needed:
        msg = (
            f"`{name}` places {len(known)} cells on the trajectory, but a graph of {n_neighbors} neighbors needs at "
            f"least {n_needed}. Lower `n_neighbors`, or leave `{name}` out."
        )
        raise ValueError(msg)
    if known.min() == known.max():
        msg = (
            f"`{name}` has the single value {known[0]:g}, but a rank correlation needs at least two different ones. "
            f"Leave `{name}` out."
        )
        raise ValueError(msg)
    return order


def order_by_lineage(
    lineages: ArrayLike, order: np.ndarray, n_neighbors: int, name: str = "lineages"
) -> dict[str, np.ndarray]:
    """For each lineage that can be scored the order of its cells, NaN for all others."""
    lineages = pd.Series(np.array(lineages, dtype=object))
    _require_length(name, lineages.to_numpy(), len(order))
    n_needed = max(_MIN_LINEAGE_CELLS, n_neighbors + 1)
    orders, left_out = {}, []
    masks = {str(one): (lineages == one).to_numpy() for one in lineages.dropna().unique()}
    for lineage, is_own in sorted(masks.items()):
        own = np.where(is_own, order, np.nan)
        known = own[~np.isnan(own)]
        n_stages = len(np.unique(known))
        if len(known) < n_needed or n_stages < 2:
            left_out.append(f"{lineage!r} ({len(known)} cells with an order, {n_stages} different values)")
        else:
            orders[lineage] = own
    if not orders:
        msg = (
            f"`{name}` has no lineage that can be scored: {', '.join(left_out) or 'every value is missing'}. One "
            f"needs {n_needed} cells with an order, of two different values or more. Leave `{name}` out."
        )
        raise ValueError(msg)
    if left_out:
        warnings.warn(
            f"Lineages with fewer than {n_needed} cells with an order, or a single value of it, are left out: "
            f"{', '.join(left_out)}.",
            UserWarning,
            stacklevel=3,
        )
    return orders


def choose_roots(order: np.ndarray, root: int | Sequence[int] | None, seed: int) -> np.ndarray:
    """Positions of the cells from which pseudotime starts: the given ones, or the earliest."""
    if root is None:
        ties = np.random.default_rng(seed).random(len(order))
        return np.lexsort((ties, order))[:_N_ROOTS]  # NaN sorts last
    roots = np.atleast_1d(np.asarray(root))
    is_valid = roots.ndim == 1 and len(roots) > 0 and np.issubdtype(roots.dtype, np.integer)
    if not is_valid or roots.min() < 0 or roots.max() >= len(order) or np.isnan(order[roots]).any():
        msg = (
            f"`root` does not name cells on the trajectory: got {root!r}, but it must be a position, or several, from "
            f"0 to {len(order) - 1} where `order` is a number. Choose among `numpy.flatnonzero(~numpy.isnan(order))`."
        )
        raise ValueError(msg)
    return roots


def classifiable(
    name: str, latent: np.ndarray, codes: np.ndarray, n_neighbors: int, *, minimum_groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Points and codes of the groups that have as many cells as there are folds; warn of the others."""
    sizes = np.bincount(codes)
    is_large = sizes >= N_FOLDS
    if is_large.sum() < minimum_groups:
        msg = (
            f"`{name}` has {is_large.sum()} groups of {N_FOLDS} cells or more, but needs at least {minimum_groups}. "
            "Score more cells, or coarser groups."
        )
        raise ValueError(msg)
    keep = is_large[codes]
    n_train = keep.sum() - int(np.ceil(keep.sum() / N_FOLDS))
    if n_train < n_neighbors:
        msg = (
            f"`{name}` leaves {n_train} cells to learn from in each fold, but {n_neighbors} neighbors are requested. "
            "Lower `n_neighbors`, or score more cells."
        )
        raise ValueError(msg)
    if not is_large.all():
        warnings.warn(
            f"{np.sum(~is_large)} of {len(sizes)} groups in `{name}` have fewer than {N_FOLDS} cells "
            f"({np.sum(~keep)} cells in all) and are left out of the cross-validated accuracies.",
            UserWarning,
            stacklevel=3,
        )
    return latent[keep], codes[keep]
