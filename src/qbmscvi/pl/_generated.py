"""Generated and real cells: one embedding of both, and shares of types."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from ._figures import _COLORS, _finish, _strip, embedding

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes

_N_COMPONENTS = 20
_MAX_CELLS = 5000
_REAL, _GENERATED = "real", "generated"
# Blue and orange, which differ in lightness, too: a gray print keeps them apart.
_PALETTE = {_REAL: _COLORS[0], _GENERATED: _COLORS[1]}


def generated(
    real: AnnData,
    generated: AnnData,
    *,
    label_key: str | None = None,
    layer: str | None = None,
    size: float | None = None,
    seed: int = 0,
    title: str | None = None,
    axes: Sequence[Axes] | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> list[Axes]:
    """Draw real and generated cells in one embedding and, with ``label_key``, their shares of types.

    The embedding is scanpy's UMAP of 20 principal components of both kinds of cells together, log-normalized. Both
    panels show equal numbers of both, at most 5000, so that neither kind hides the other.

    Parameters
    ----------
    real
        Counts of real cells, preferably cells that the model was not trained on.
    generated
        Generated counts of the same genes, as :meth:`qbmscvi.QBMSCVI.generate` returns them.
    label_key
        Column of ``real.obs`` with the type of each cell. Types of generated cells are read from the same column of
        ``generated.obs``; if there is none, a logistic regression on the components of the real cells predicts them. It
        also gives cells far from all real ones a type, often a rare one: look at the embedding first.
    layer
        Layer with the counts; None for ``X``. Generated cells without this layer have their counts in ``X``.
    size
        Area of a point in square points. By default it falls with the number of cells.
    seed
        Seed of the subsample, the components and the UMAP.
    title
        Title of the embedding.
    axes
        Axes to draw on, two with ``label_key`` and one without; a new figure by default.
    show
        Whether to call ``matplotlib.pyplot.show``.
    save
        File to write the figure to.

    Returns
    -------
    The axes: the embedding and, with ``label_key``, the shares.

    Raises
    ------
    ValueError
        If the genes are not the same in the same order, ``label_key`` is no column of ``real.obs``, a real cell has no
        type, ``real`` has no such layer, or the number of ``axes`` is wrong.

    See Also
    --------
    qbmscvi.benchmark.score_generated : scores of generated cells.
    """
    _check(real, generated, label_key, layer, axes)
    rng = np.random.default_rng(seed)
    n_equal = min(real.n_obs, generated.n_obs, _MAX_CELLS)
    real, generated = (cells[np.sort(rng.permutation(cells.n_obs)[:n_equal])] for cells in (real, generated))
    cells = _embed(_counts(real, layer), _counts(generated, layer), seed)
    if label_key is not None:
        table = _shares(real, generated, label_key, cells.X, seed)

    if axes is None:
        axes = _figure(1, 0) if label_key is None else _figure(2, len(table))
    source = pd.Categorical(np.repeat(list(_PALETTE), n_equal), categories=list(_PALETTE))
    embedding(
        cells.obsm["X_umap"],
        source,
        palette=_PALETTE,
        size=size,
        axis_name="UMAP",
        legend=label_key is None,
        ax=axes[0],
    )
    if label_key is not None:
        _draw_shares(table, axes[1])
    _finish(axes[0], title, show, save)
    return list(axes)


def _check(
    real: AnnData, generated: AnnData, label_key: str | None, layer: str | None, axes: Sequence[Axes] | None
) -> None:
    if not real.var_names.equals(generated.var_names):
        msg = (
            f"`generated` has {generated.n_vars} genes that are not the {real.n_vars} of `real` in their order. "
            "Both need the same: `generated = generated[:, real.var_names].copy()`."
        )
        raise ValueError(msg)
    if label_key is not None and (label_key not in real.obs or real.obs[label_key].isna().any()):
        found = "is no column of `real.obs`" if label_key not in real.obs else "has no value for some cells of `real`"
        msg = f"label_key={label_key!r} {found}, but each real cell needs a type. Fill it, or leave `label_key` out."
        raise ValueError(msg)
    if layer is not None and layer not in real.layers:
        msg = f"layer={layer!r} is no layer of `real`, which has {list(real.layers)}. Leave it out for `X`."
        raise ValueError(msg)
    n_panels = 1 if label_key is None else 2
    if axes is not None and len(axes) != n_panels:
        msg = (
            f"`axes` has {len(axes)} axes, but {n_panels} are needed {'with' if n_panels == 2 else 'without'} "
            f"`label_key`. Pass `plt.subplots(1, {n_panels}, squeeze=False)[1][0]`."
        )
        raise ValueError(msg)


def _counts(cells: AnnData, layer: str | None) -> sparse.csr_matrix:
    return sparse.csr_matrix(cells.layers[layer] if layer in cells.layers else cells.X, dtype=np.float32)


def _embed(real: sparse.csr_matrix, generated: sparse.csr_matrix, seed: int) -> AnnData:
    """Real cells followed by generated ones, log-normalized, with their UMAP."""
    import scanpy as sc

    cells = sc.AnnData(sparse.vstack([real, generated], format="csr"))
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    sc.pp.pca(cells, n_comps=min(_N_COMPONENTS, min(cells.shape) - 1), random_state=seed)
    sc.pp.neighbors(cells, random_state=seed)
    sc.tl.umap(cells, random_state=seed)
    return cells


def _shares(
    real: AnnData, generated: AnnData, label_key: str, expression: sparse.csr_matrix, seed: int
) -> pd.DataFrame:
    """Share of each type, the most frequent one of the real cells first; ``expression`` as in :func:`_embed`."""
    types = {_REAL: real.obs[label_key].astype(str).to_numpy()}
    if label_key in generated.obs:
        types[_GENERATED] = generated.obs[label_key].astype(str).to_numpy()
    elif len(np.unique(types[_REAL])) == 1:
        types[_GENERATED] = types[_REAL]
    else:
        from sklearn.decomposition import PCA
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        # Components of real cells alone: directions in which only generated cells vary would get arbitrary weights.
        of_real, of_generated = expression[: real.n_obs], expression[real.n_obs :]
        components = PCA(min(_N_COMPONENTS, min(of_real.shape) - 1), svd_solver="arpack", random_state=seed)
        classifier = make_pipeline(components, StandardScaler(), LogisticRegression(max_iter=1000))
        types[_GENERATED] = classifier.fit(of_real, types[_REAL]).predict(of_generated)
    shares = {source: pd.Series(names).value_counts(normalize=True) for source, names in types.items()}
    return pd.DataFrame(shares).fillna(0.0).sort_values(_REAL, ascending=False, kind="stable")


def _draw_shares(shares: pd.DataFrame, ax: Axes) -> None:
    y = np.arange(len(shares))
    for i, (source, color) in enumerate(_PALETTE.items()):
        ax.barh(y + 0.38 * (i - 0.5), shares[source], height=0.36, color=color, label=source)
    ax.set_yticks(y, list(shares.index))
    ax.set_ylim(len(shares) - 0.4, -0.6)
    ax.set_xlabel("share of cells")
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
    _strip(ax)


def _figure(n_panels: int, n_types: int) -> Sequence[Axes]:
    import matplotlib.pyplot as plt

    figsize = (4.6 * n_panels + 1.2, max(4.4, 1.2 + 0.3 * n_types))
    return plt.subplots(1, n_panels, figsize=figsize, squeeze=False, layout="constrained")[1][0]
