"""Comparisons on input as people have it: missing values, tiny batches, settings that change, clusters of any size."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from qbmscvi.benchmark import _scores


def clean_clusters(sizes, seed, n_dimensions=10):
    """Unit Gaussians around centers some forty standard deviations apart."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(len(sizes)), sizes)
    centers = 10 * rng.normal(size=(len(sizes), n_dimensions))
    return centers[codes] + rng.normal(size=(len(codes), n_dimensions)), np.array([f"type {code}" for code in codes])


@pytest.mark.parametrize(
    ("sizes", "seed"),
    [
        pytest.param((300, 40, 30, 20, 10), 1, id="one-large"),
        pytest.param((500, 300, 120, 60, 20), 0, id="falling", marks=pytest.mark.slow),
        pytest.param((700, 200, 60, 30, 10), 0, id="steep", marks=pytest.mark.slow),
    ],
)
def test_clean_clusters_of_unequal_size_are_found_whatever_one_start_of_kmeans_does(sizes, seed):
    from scib_metrics import nmi_ari_cluster_labels_kmeans

    latent, labels = clean_clusters(sizes, seed)
    assert nmi_ari_cluster_labels_kmeans(latent.astype(np.float32), labels)["nmi"] < 0.9  # what scIB's totals had
    clusters = _scores._leiden(latent, labels, seed=0)
    scores = _scores._scib(latent, labels, None, latent, clusters)
    assert clusters["leiden_nmi"] > 0.98
    assert clusters["leiden_ari"] > 0.98
    parts = [scores[f"scib_{name}"] for name in ("isolated_labels", "silhouette_label", "clisi_knn")]
    assert scores["scib_bio"] == pytest.approx(np.mean([*parts, *clusters.values()]), abs=1e-12)
    assert not [name for name in scores if "kmeans" in name]


def test_leiden_scores_are_the_best_over_resolutions():
    """Cells without clusters: many small ones agree best by chance, and every resolution is looked at."""
    rng = np.random.default_rng(0)
    latent, labels = rng.normal(size=(200, 5)), rng.choice(["a", "b", "c"], size=200)
    graph = _scores._neighbor_graph(latent, 0)
    every = [_scores._leiden_clusters(graph, resolution, 0) for resolution in _scores.LEIDEN_RESOLUTIONS]
    scores = [normalized_mutual_info_score(labels, clusters) for clusters in every]
    assert _scores._leiden(latent, labels, 0)["leiden_nmi"] == max(scores) > min(scores)


@pytest.mark.slow
def test_totals_are_those_of_scib_with_its_own_weights():
    """With the values that scib-metrics gives its own clusters, bio and total are the ones that it computes."""
    import pandas as pd
    from anndata import AnnData
    from scib_metrics.benchmark import Benchmarker

    latent, labels = clean_clusters((60, 40, 30), 0)
    batches = np.where(np.arange(len(labels)) % 2, "x", "y")
    index = [str(i) for i in range(len(labels))]
    adata = AnnData(obs=pd.DataFrame({"label": labels, "batch": batches}, index=index, dtype="category"))
    adata.obsm["latent"] = adata.obsm["before"] = latent.astype(np.float32)
    given = {"pre_integrated_embedding_obsm_key": "before", "progress_bar": False}
    benchmarker = Benchmarker(adata, "batch", "label", ["latent"], **given)
    benchmarker.prepare(neighbor_computer=_scores._exact_neighbors)
    benchmarker.benchmark()
    expected = benchmarker.get_results(min_max_scale=False, clean_names=False).loc["latent"]
    kmeans = {name: expected[f"nmi_ari_cluster_labels_kmeans_{name}"] for name in ("nmi", "ari")}
    scores = _scores._scib(latent, labels, batches, latent, kmeans)
    names = {"scib_bio": "Bio conservation", "scib_batch": "Batch correction", "scib_total": "Total"}
    assert {key: scores[key] for key in names} == pytest.approx({k: expected[v] for k, v in names.items()}, abs=1e-6)
