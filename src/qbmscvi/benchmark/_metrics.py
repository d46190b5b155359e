"""Scores of a latent representation for types, order and batches.

Every number is computed on the representation itself, by scikit-learn and scanpy, so models of different latent spaces
are scored alike. Higher is better, except for ``batch_knn_accuracy``. The scores do not use counts or the model, and
are not averaged into one, because types, order and mixing conflict.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from qbmscvi.benchmark._latent_checks import (
    N_FOLDS,
    as_codes,
    as_latent,
    as_order,
    choose_roots,
    classifiable,
    order_by_lineage,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import ArrayLike

__all__ = ["score_latent"]

_N_KMEANS_SEEDS = 3
_MAX_SILHOUETTE_CELLS = 2000
_SLOW_EIGENVALUE = 0.9994  # scanpy.neighbors.Neighbors._get_dpt_row takes such components for the stationary state


def score_latent(
    latent: ArrayLike,
    labels: ArrayLike,
    batches: ArrayLike | None = None,
    *,
    order: ArrayLike | None = None,
    lineages: ArrayLike | None = None,
    root: int | Sequence[int] | None = None,
    n_neighbors: int = 15,
    seed: int = 0,
) -> dict[str, float]:
    """Score a latent representation against known labels, batches and order.

    Parameters
    ----------
    latent
        Representation of shape ``(n_cells, n_dimensions)``.
    labels
        Type of each cell; at least two types with five cells or more.
    batches
        Batch of each cell.
    order
        Known position of each cell along a trajectory (a stage, a day, a true pseudotime); NaN for cells off it.
    lineages
        Lineage of each cell, where ``order`` holds within a lineage only; missing for cells of none. Pseudotime then
        has a graph and roots for each lineage.
    root
        Position in ``latent`` of the cell, or cells, from which pseudotime starts. By default the five cells with the
        smallest ``order``, ties broken at random.
    n_neighbors
        Neighbors of the two nearest-neighbor classifiers and of the graph under the pseudotime.
    seed
        Seed of folds, k-means, subsamples and roots. The global random state is neither read nor changed.

    Returns
    -------
    By name:

    - ``knn_accuracy``, ``knn_macro_f1``: accuracy of a nearest-neighbor classifier of the labels, and its F1 averaged
      over labels, rare ones as heavy as frequent ones; mean over five stratified folds.
    - ``logistic_accuracy``, ``logistic_macro_f1``: the same for logistic regression on the standardized latent.
    - ``kmeans_ari``: adjusted Rand index of k-means, as many clusters as labels; mean over three seeds.
    - ``silhouette``: ``(s + 1) / 2`` for the mean silhouette width ``s`` of the labels, on at most 2000 cells; NaN if
      these happen to carry a single label.
    - ``batch_knn_accuracy``, with ``batches``: accuracy of a nearest-neighbor classifier of the batch; lower is better
      mixed.
    - ``batch_chance``, with ``batches``: share of the largest batch, what that classifier reaches without information.
    - ``pseudotime_tau``, with ``order``: Kendall's tau-b between diffusion pseudotime and ``order``, mean over roots.
      The graph holds only the cells on the trajectory. Cells without a finite pseudotime (no path leads to them) stay
      in, tied behind all others.
    - ``pseudotime_finite``, with ``order``: share of these cells with finite pseudotime, mean over roots. Always read a
      tau together with it: below one, the neighbor graph has several pieces.
    - ``pseudotime_slow_components``, with ``order``: number of diffusion components with an eigenvalue of 0.9994 or
      more, beyond the one that belongs to each piece of the graph. scanpy gives these the smallest weight in the
      pseudotime, although they carry the longest paths: above zero, ``pseudotime_tau`` may miss an order that is there.
    - ``lineage_tau_<name>``, with ``lineages``: tau within each lineage. ``pseudotime_tau`` and ``pseudotime_finite``
      are then means over lineages, ``pseudotime_slow_components`` is the sum.

    Raises
    ------
    ValueError
        If ``latent`` is not a finite, non-empty table; a length differs from ``n_cells``; a label or batch is missing;
        fewer than two labels, or no batch, have five cells; ``order`` is not numeric, has an infinite value or fewer
        than two different ones; ``root`` is given without ``order``, with ``lineages`` or is not on the trajectory;
        ``lineages`` are given without ``order`` or none can be scored; or there are too few cells for ``n_neighbors``,
        or it is below two.

    Warns
    -----
    UserWarning
        If a label or batch has fewer than five cells: it is left out of the classifiers, not of the other numbers. If
        ``pseudotime_slow_components`` is above zero. If a lineage has fewer than 20 cells with an order, or a single
        stage: it is left out.

    Examples
    --------
    >>> import numpy as np
    >>> latent = np.repeat([[0.0, 0.0], [9.0, 9.0]], 50, axis=0) + np.random.default_rng(0).normal(size=(100, 2))
    >>> score_latent(latent, ["B cell"] * 50 + ["T cell"] * 50)["knn_accuracy"]
    1.0
    """
    latent = as_latent(latent)
    labels = as_codes("labels", labels, len(latent))
    if isinstance(n_neighbors, bool) or not isinstance(n_neighbors, int | np.integer) or n_neighbors < 2:
        msg = (
            f"`n_neighbors` is out of range: got {n_neighbors!r}, but it must be an integer of at least 2. "
            "The default of 15 suits most data."
        )
        raise ValueError(msg)
    if root is not None and order is None:
        msg = f"`root` is given ({root!r}) but `order` is not. Pass the known order too, or leave `root` out."
        raise ValueError(msg)
    if lineages is not None and (order is None or root is not None):
        msg = (
            f"`lineages` are given {'without `order`' if order is None else f'with root={root!r}'}, but pseudotime "
            "within each lineage needs an order, and starts at the earliest cells of each. Pass `order` and no `root`."
        )
        raise ValueError(msg)
    batches = None if batches is None else as_codes("batches", batches, len(latent))
    if order is not None:
        order = as_order(order, len(latent), n_neighbors)
        roots = choose_roots(order, root, seed)
    orders = {} if lineages is None else order_by_lineage(lineages, order, n_neighbors)

    x, y = classifiable("labels", latent, labels, n_neighbors, minimum_groups=2)
    scores = {
        **cross_validate(knn_classifier(n_neighbors), x, y, seed, "knn"),
        **cross_validate(logistic_classifier(), x, y, seed, "logistic"),
        **_cluster_scores(latent, labels, seed),
    }
    if batches is not None:
        x, y = classifiable("batches", latent, batches, n_neighbors, minimum_groups=1)
        scores["batch_knn_accuracy"] = cross_validate(knn_classifier(n_neighbors), x, y, seed, "knn")["knn_accuracy"]
        scores["batch_chance"] = float(np.bincount(y).max() / len(y))
    if orders:
        scores |= _lineage_scores(latent, orders, n_neighbors, seed)
    elif order is not None:
        scores |= pseudotime_scores(latent, order, roots, n_neighbors, seed)
    return scores


def cross_validate(classifier: object, x: np.ndarray, y: np.ndarray, seed: int, name: str) -> dict[str, float]:
    """Accuracy and macro-F1 over five stratified folds, as ``{name}_accuracy`` and ``{name}_macro_f1``."""
    from sklearn.metrics import f1_score, make_scorer
    from sklearn.model_selection import StratifiedKFold
    from sklearn.model_selection import cross_validate as run_folds

    scoring = {"accuracy": "accuracy", "macro_f1": make_scorer(f1_score, average="macro", zero_division=0.0)}
    folds = StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed)
    results = run_folds(classifier, x, y, cv=folds, scoring=scoring, error_score="raise")
    return {f"{name}_{metric}": float(results[f"test_{metric}"].mean()) for metric in scoring}


def knn_classifier(n_neighbors: int) -> object:
    """Nearest-neighbor classifier of the scores."""
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(n_neighbors)


def logistic_classifier() -> object:
    """Logistic regression of the scores, on the standardized latent."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def _cluster_scores(latent: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, float]:
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, silhouette_score

    n_clusters = int(labels.max()) + 1
    ari = [
        adjusted_rand_score(labels, KMeans(n_clusters, n_init=10, random_state=seed + i).fit_predict(latent))
        for i in range(_N_KMEANS_SEEDS)
    ]
    sample = np.arange(len(latent))
    if len(latent) > _MAX_SILHOUETTE_CELLS:
        sample = np.random.default_rng(seed).choice(len(latent), size=_MAX_SILHOUETTE_CELLS, replace=False)
    has_two_labels = len(np.unique(labels[sample])) > 1
    width = silhouette_score(latent[sample], labels[sample]) if has_two_labels else np.nan
    return {"kmeans_ari": float(np.mean(ari)), "silhouette": float((width + 1) / 2)}


def _lineage_scores(latent: np.ndarray, orders: dict[str, np.ndarray], n_neighbors: int, seed: int) -> dict[str, float]:
    """Pseudotime within each lineage: means over lineages, the sum of slow components, and each tau."""
    by_lineage = {
        name: pseudotime_scores(latent, order, choose_roots(order, None, seed), n_neighbors, seed)
        for name, order in orders.items()
    }
    table = pd.DataFrame(by_lineage)
    return {
        "pseudotime_tau": float(table.loc["pseudotime_tau"].mean()),
        "pseudotime_finite": float(table.loc["pseudotime_finite"].mean()),
        "pseudotime_slow_components": float(table.loc["pseudotime_slow_components"].sum()),
        **{f"lineage_tau_{name}": scores["pseudotime_tau"] for name, scores in by_lineage.items()},
    }


def neighbor_graph(latent: np.ndarray, n_neighbors: int, seed: int) -> AnnData:
    """Neighbors of each cell by scanpy, in an AnnData without genes."""
    import scanpy as sc
    from anndata import AnnData

    adata = AnnData(obsm={"latent": latent}, shape=(len(latent), 0))
    sc.pp.neighbors(adata, n_neighbors=n_neighbors, use_rep="latent", random_state=seed)
    return adata


def pseudotime_scores(
    latent: np.ndarray, order: np.ndarray, roots: np.ndarray, n_neighbors: int, seed: int
) -> dict[str, float]:
    """Agreement of diffusion pseudotime from each root with the order, as :func:`score_latent` describes it."""
    import scanpy as sc
    from scipy.sparse.csgraph import connected_components
    from scipy.stats import kendalltau

    is_ordered = ~np.isnan(order)
    adata = neighbor_graph(latent[is_ordered], n_neighbors, seed)
    # 15 components and 10 of them in the distance are scanpy's defaults
    sc.tl.diffmap(adata, n_comps=min(15, adata.n_obs - 2), random_state=seed)
    n_pieces = connected_components(adata.obsp["connectivities"], directed=False, return_labels=False)
    n_slow = max(0, int(np.sum(adata.uns["diffmap_evals"] >= _SLOW_EIGENVALUE)) - n_pieces)
    if n_slow:
        warnings.warn(
            f"{n_slow} diffusion components have an eigenvalue of {_SLOW_EIGENVALUE} or more, to which scanpy gives "
            "hardly any weight in the pseudotime: `pseudotime_tau` may miss an order that is there. "
            "A larger `n_neighbors` connects the graph better.",
            UserWarning,
            stacklevel=3,
        )
    taus, finite = [], []
    for root in np.cumsum(is_ordered)[roots] - 1:  # positions among the cells on the trajectory
        adata.uns["iroot"] = int(root)
        sc.tl.dpt(adata, n_dcs=min(10, adata.obsm["X_diffmap"].shape[1]))
        pseudotime = adata.obs["dpt_pseudotime"].to_numpy(dtype=np.float64)
        is_finite = np.isfinite(pseudotime)
        taus.append(kendalltau(np.where(is_finite, pseudotime, np.inf), order[is_ordered]).statistic)
        finite.append(is_finite.mean())
    return {
        "pseudotime_tau": float(np.mean(taus)),
        "pseudotime_finite": float(np.mean(finite)),
        "pseudotime_slow_components": float(n_slow),
    }
