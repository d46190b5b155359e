"""Choice of cells and genes, the same for every model of a comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData


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

    Genes are those of scanpy's ``seurat_v3``, per batch; cells without counts in them are left out.

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
    ValueError
        If a column or the layer is missing.
    """
    import scanpy as sc

    for key in filter(None, (label_key, batch_key)):
        if key not in adata.obs:
            msg = f"There is no column {key!r} in `adata.obs`. There are: {', '.join(map(repr, adata.obs))}."
            raise ValueError(msg)
    if layer is not None and layer not in adata.layers:
        msg = f"There is no layer {layer!r}. There are: {', '.join(map(repr, adata.layers)) or 'none'}."
        raise ValueError(msg)
    labels = adata.obs[label_key]
    cells = np.flatnonzero(labels.notna() & (labels != unlabeled))
    if max_cells is not None and len(cells) > max_cells:
        cells = np.sort(np.random.default_rng(seed).choice(cells, max_cells, replace=False))
    adata = adata[cells].copy()
    if layer is not None:
        adata.X = adata.layers[layer].copy()
    if adata.n_vars > n_genes:
        sc.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=n_genes, batch_key=batch_key)
        adata = adata[:, adata.var["highly_variable"]].copy()
    sc.pp.filter_cells(adata, min_counts=1)
    return adata
