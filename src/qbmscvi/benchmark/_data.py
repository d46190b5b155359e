"""Choice of cells and genes, the same for every model of a comparison."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from qbmscvi.exceptions import require_integer
from qbmscvi.model._counts import check_counts
from qbmscvi.model._input_checks import check_categories, check_matrix

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

_SPANS = (0.3, 0.6, 1.0)  # scanpy's default first
_MIN_BATCH_CELLS, _MIN_BATCH_GENES = 30, 10  # with a handful of points scanpy's loess ends the process


def prepare(
    adata: AnnData,
    *,
    label_key: str,
    batch_key: str | None = None,
    layer: str | None = None,
    n_genes: int = 2000,
    max_cells: int | None = None,
    unlabeled: str | None = None,
    seed: int = 0,
) -> AnnData:
    """Keep labeled cells, a random subsample of them if there are many, and highly variable genes.

    Genes are those of scanpy's ``seurat_v3``, per batch of 30 cells or more; cells without counts in them are left out.

    Parameters
    ----------
    adata
        Raw counts.
    label_key, batch_key
        Columns of ``adata.obs``.
    layer
        Layer with the counts; None for ``X``.
    n_genes
        Number of genes to keep; all, if there are no more.
    max_cells
        Number of cells to keep; None for all.
    unlabeled
        Label of cells without one. Cells with a missing label are left out in any case.
    seed
        Seed of the subsample.

    Returns
    -------
    A copy with the counts in ``X``.

    Raises
    ------
    TypeError, ValueError
        If a column or the layer is missing, no cell has a label, a cell has no batch, values of a column are text and
        something else, the data are not counts, or a number is not a positive integer.

    Warns
    -----
    UserWarning
        If ``seurat_v3`` cannot be fitted as usual: genes are chosen with a wider span then, or by Pearson residuals.
    """
    import scanpy as sc

    require_integer("n_genes", n_genes, 1)
    if max_cells is not None:
        require_integer("max_cells", max_cells, 1)
    check_matrix(adata, layer)
    cells = labeled_cells(adata.obs, label_key, unlabeled)
    if batch_key is not None:
        check_categories(adata.obs.iloc[cells], "batch_key", batch_key)
    if max_cells is not None and len(cells) > max_cells:
        cells = np.sort(np.random.default_rng(seed).choice(cells, max_cells, replace=False))
    adata = adata[cells].copy()
    check_counts(adata, layer=layer, needs_library_size=False)
    if layer is not None:
        adata.X = adata.layers[layer].copy()
    if adata.n_vars > n_genes:
        adata = adata[:, _variable_genes(adata, int(n_genes), batch_key)].copy()
    sc.pp.filter_cells(adata, min_counts=1)
    return adata


def labeled_cells(obs: pd.DataFrame, label_key: str, unlabeled: str | None = None) -> np.ndarray:
    """Positions of the cells that have a label.

    Raises
    ------
    TypeError
        If labels are of several types.
    ValueError
        If there is no such column, or no cell has a label.
    """
    check_categories(obs, "label_key", label_key, may_miss=True)
    has_label = obs[label_key].notna().to_numpy()
    if unlabeled is not None:
        has_label &= (obs[label_key].astype(object).astype(str) != str(unlabeled)).to_numpy()
    if not has_label.any():
        msg = (
            f"`adata.obs[{label_key!r}]` has a label for none of {len(obs)} cells"
            f"{'' if unlabeled is None else f', {unlabeled!r} not counted'}, but labels are what models are scored by. "
            "Choose another `label_key`."
        )
        raise ValueError(msg)
    return np.flatnonzero(has_label)


def _variable_genes(adata: AnnData, n_genes: int, batch_key: str | None) -> np.ndarray:
    """Mask of highly variable genes, by the first way that can be fitted."""
    import scanpy as sc

    chosen_from = adata
    if batch_key is not None:
        batches = adata.obs[batch_key]
        names = list(batches.unique())
        small = [batch for batch in names if not _is_usable(adata.X[(batches == batch).to_numpy()])]
        if 0 < len(small) < len(names):
            chosen_from = adata[~batches.isin(small).to_numpy()]
            _warn(f"Genes are chosen without the batches {', '.join(map(repr, small))}, which have too few cells.")
    given = {"n_top_genes": n_genes, "batch_key": batch_key, "inplace": False}
    can_fit = batch_key is None or len(small) < len(names)
    for span in _SPANS if can_fit and _is_usable(chosen_from.X) else ():
        try:
            genes = sc.pp.highly_variable_genes(chosen_from, flavor="seurat_v3", span=span, **given)
        except ValueError:  # of loess, where many genes have the same mean
            continue
        if span != _SPANS[0]:
            _warn(f"Genes are chosen with span={span}, as scanpy's seurat_v3 cannot be fitted with {_SPANS[0]}.")
        return genes["highly_variable"].to_numpy()
    _warn("Genes are chosen by Pearson residuals, as scanpy's seurat_v3 cannot be fitted to so few counts.")
    return sc.experimental.pp.highly_variable_genes(adata, **given)["highly_variable"].to_numpy()


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)


def _is_usable(counts: object) -> bool:
    return counts.shape[0] >= _MIN_BATCH_CELLS and np.sum(np.asarray(counts.sum(axis=0)) > 0) >= _MIN_BATCH_GENES
