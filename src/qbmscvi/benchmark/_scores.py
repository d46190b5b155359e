"""All scores of one latent representation, as :func:`~qbmscvi.benchmark.compare` records them.

In addition to :func:`~qbmscvi.benchmark.score_latent` these are the metrics of scIB :cite:p:`Luecken22` by
scib-metrics, Leiden clusters by scanpy, gradient boosting by scikit-learn, labels transferred to a batch that was left
out, and pseudotime towards each fate. No metric is computed here; this file chooses the settings, the same for all
models. The totals of scIB have NMI and ARI of the Leiden clusters, as in the study; those of scib-metrics come from a
single start of k-means, which can miss clusters that are plain.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from qbmscvi.benchmark._latent_checks import choose_roots, classifiable
from qbmscvi.benchmark._metrics import cross_validate, neighbor_graph, pseudotime_scores, score_latent

if TYPE_CHECKING:
    from anndata import AnnData
    from scib_metrics.nearest_neighbors import NeighborsResults
    from sklearn.ensemble import HistGradientBoostingClassifier

N_NEIGHBORS = 15
LEIDEN_RESOLUTIONS = tuple(round(0.2 * i, 1) for i in range(1, 11))  # 0.2 to 2.0
_MIN_CELLS_PER_FATE = 5


def require_extra() -> None:
    """Raise unless the packages of the extra ``benchmark`` are installed.

    Raises
    ------
    ImportError
        If one is missing.
    """
    missing = [name for name in ("scib_metrics", "igraph") if find_spec(name) is None]
    if missing:
        msg = (
            f"The comparison needs {' and '.join(missing)}, which this environment lacks. Both come with the extra "
            "`benchmark`: pip install 'qbmscvi[benchmark]'."
        )
        raise ImportError(msg)


def score_all(
    latent: np.ndarray,
    labels: np.ndarray,
    batches: np.ndarray | None,
    order: np.ndarray | None,
    unintegrated: np.ndarray,
    seed: int,
    lineages: np.ndarray | None = None,
) -> dict[str, float]:
    """Compute all scores of a latent representation.

    Parameters
    ----------
    latent
        Shape ``(n_cells, n_dimensions)``.
    labels, batches, order
        One value per cell, none missing but in ``order``.
    unintegrated
        Principal components before integration, shape ``(n_cells, n_components)``; scIB measures against them how much
        of the batch is left.
    seed
        Seed of folds and clusters.
    lineages
        Lineage of each cell, where ``order`` holds within each only; missing for cells of none.

    Returns
    -------
    Scores by name; :data:`qbmscvi.benchmark.METRICS` says what the main ones mean.
    """
    from threadpoolctl import threadpool_limits

    # One thread: a second one gains little here, and where another program wants the core it costs a hundredfold.
    with warnings.catch_warnings(), threadpool_limits(1):
        # Small groups and slow components are in the records; scIB and scanpy warn of their own future.
        warnings.simplefilter("ignore")
        clusters = _leiden(latent, labels, seed)
        return {
            **score_latent(latent, labels, batches, order=order, lineages=lineages, n_neighbors=N_NEIGHBORS, seed=seed),
            **_scib(latent, labels, batches, unintegrated, clusters),
            **clusters,
            **_boosting(latent, labels, seed),
            **({} if batches is None else _transfer(latent, labels, batches)),
            **({} if order is None else _fates(latent, labels, order, seed)),
        }


def _scib(
    latent: np.ndarray,
    labels: np.ndarray,
    batches: np.ndarray | None,
    unintegrated: np.ndarray,
    clusters: dict[str, float],
) -> dict[str, float]:
    """Scores of scib-metrics and its totals, with Leiden clusters in place of a k-means that it starts only once."""
    import pandas as pd
    from anndata import AnnData
    from scib_metrics.benchmark import BatchCorrection, Benchmarker, BioConservation

    obs = {"label": labels.astype(str), "batch": "all" if batches is None else batches.astype(str)}
    adata = AnnData(obs=pd.DataFrame(obs, index=[str(i) for i in range(len(latent))]).astype("category"))
    adata.obsm["latent"] = np.ascontiguousarray(latent, dtype=np.float32)
    adata.obsm["unintegrated"] = unintegrated
    benchmarker = Benchmarker(
        adata,
        "batch",
        "label",
        ["latent"],
        bio_conservation_metrics=BioConservation(nmi_ari_cluster_labels_kmeans=False),
        batch_correction_metrics=None if batches is None else BatchCorrection(),
        pre_integrated_embedding_obsm_key="unintegrated",
        progress_bar=False,
    )
    benchmarker.prepare(neighbor_computer=_exact_neighbors)
    benchmarker.benchmark()
    results = benchmarker.get_results(min_max_scale=False, clean_names=False)
    kinds, row = results.loc["Metric Type"], results.loc["latent"].astype(float)
    scores = {f"scib_{name}": float(value) for name, value in row[kinds != "Aggregate score"].items()}
    # As `get_results` has it: each total is the mean of its scores, the last one 0.6 and 0.4 of the two.
    scores["scib_bio"] = float(np.nanmean([*row[kinds == "Bio conservation"], *clusters.values()]))
    if batches is not None:
        scores["scib_batch"] = float(row["Batch correction"])
        scores["scib_total"] = 0.6 * scores["scib_bio"] + 0.4 * scores["scib_batch"]
    return scores


def _exact_neighbors(latent: np.ndarray, n_neighbors: int) -> NeighborsResults:
    """In place of scIB's approximate ones: quicker for some ten thousand cells, and the same on every machine."""
    from scib_metrics.nearest_neighbors import NeighborsResults
    from sklearn.neighbors import NearestNeighbors

    distances, indices = NearestNeighbors(n_neighbors=n_neighbors).fit(latent).kneighbors(latent)
    return NeighborsResults(indices=indices, distances=distances)


def _leiden(latent: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, float]:
    """NMI and ARI of Leiden clusters, each at the best of the resolutions."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    adata = neighbor_graph(latent, N_NEIGHBORS, seed)
    nmi, ari = [], []
    for resolution in LEIDEN_RESOLUTIONS:
        clusters = _leiden_clusters(adata, resolution, seed)
        nmi.append(normalized_mutual_info_score(labels, clusters))
        ari.append(adjusted_rand_score(labels, clusters))
    return {"leiden_nmi": float(max(nmi)), "leiden_ari": float(max(ari))}


def _leiden_clusters(adata: AnnData, resolution: float, seed: int) -> np.ndarray:
    import scanpy as sc

    sc.tl.leiden(adata, resolution, flavor="igraph", n_iterations=2, directed=False, random_state=seed)
    return adata.obs["leiden"].to_numpy()


def boosting_classifier(seed: int) -> HistGradientBoostingClassifier:
    """Gradient boosting of the scores: small trees and few of them, as it is fitted five times."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    # Without the penalty labels of a dozen cells make it diverge.
    return HistGradientBoostingClassifier(
        max_iter=50, max_leaf_nodes=8, l2_regularization=1.0, early_stopping=False, random_state=seed
    )


def _boosting(latent: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, float]:
    codes = np.unique(labels, return_inverse=True)[1]
    x, y = classifiable("labels", latent, codes, N_NEIGHBORS, minimum_groups=2)
    return cross_validate(boosting_classifier(seed), x, y, seed, "boosting")


def _transfer(latent: np.ndarray, labels: np.ndarray, batches: np.ndarray) -> dict[str, float]:
    """Labels of each batch predicted from the other batches; a label that no other batch has is left out."""
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.neighbors import KNeighborsClassifier

    scores = []
    for batch in np.unique(batches):
        is_train = batches != batch
        is_test = ~is_train & np.isin(labels, labels[is_train])
        if is_train.sum() < N_NEIGHBORS or not is_test.any():
            continue
        classifier = KNeighborsClassifier(N_NEIGHBORS).fit(latent[is_train], labels[is_train])
        truth, predicted = labels[is_test], classifier.predict(latent[is_test])
        macro_f1 = f1_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0.0)
        scores.append((accuracy_score(truth, predicted), macro_f1))
    accuracy, macro_f1 = np.mean(scores, axis=0) if scores else (np.nan, np.nan)
    return {"transfer_accuracy": float(accuracy), "transfer_macro_f1": float(macro_f1)}


def _fates(latent: np.ndarray, labels: np.ndarray, order: np.ndarray, seed: int) -> dict[str, float]:
    """Pseudotime towards each label of the latest stage, if there are several: cells of the other ends left out."""
    is_last = order == np.nanmax(order)
    names, sizes = np.unique(labels[is_last], return_counts=True)
    names = names[sizes >= _MIN_CELLS_PER_FATE]
    if len(names) < 2:
        return {}
    taus = {}
    for name in names:
        branch = np.where(is_last & (labels != name), np.nan, order)
        roots = choose_roots(branch, None, seed)
        taus[f"fate_tau_{name}"] = pseudotime_scores(latent, branch, roots, N_NEIGHBORS, seed)["pseudotime_tau"]
    return {**taus, "fate_tau_mean": float(np.mean(list(taus.values())))}
