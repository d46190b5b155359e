"""Numbers that compare generated cells with real ones: points, distances, copies, genes, types.

Each function takes what it compares and computes one group of the scores that
:func:`~qbmscvi.benchmark.score_generated` describes. Points are cells in principal components.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

N_COMPONENTS = 20
_N_FOLDS = 5
_N_TREES = 200
_N_NEIGHBORS = 5
_KERNEL_WIDTHS = (0.25, 0.5, 1.0, 2.0)  # times the median distance
_RARE_SHARE = 0.02
_MIN_TYPE_CELLS = 10  # a mean of fewer says little about a fold change


def forest_auc(real: np.ndarray, generated: np.ndarray, seed: int) -> float:
    """Area under the ROC curve of a random forest that tells the points apart, cross-validated."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    points = np.concatenate([real, generated])
    is_generated = np.repeat([0, 1], [len(real), len(generated)])
    forest = RandomForestClassifier(_N_TREES, random_state=seed)
    folds = StratifiedKFold(_N_FOLDS, shuffle=True, random_state=seed)
    chance = cross_val_predict(forest, points, is_generated, cv=folds, method="predict_proba")[:, 1]
    return float(roc_auc_score(is_generated, chance))


def mmd_squared(real: np.ndarray, generated: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of points, shapes ``(n_real, n)`` and ``(n_generated, n)``."""
    from scipy.spatial.distance import cdist, pdist

    distances = [pdist(real), pdist(generated), cdist(real, generated)]  # each pair once: no cell with itself
    widths = np.array(_KERNEL_WIDTHS) * np.median(distances[0])
    within_real, within_generated, between = (
        np.mean([np.exp(-((d / width) ** 2) / 2.0).mean() for width in widths]) for d in distances
    )
    return float(within_real + within_generated - 2.0 * between)


def wasserstein2(real: np.ndarray, generated: np.ndarray) -> float:
    """Wasserstein-2 distance between equally many points: the best assignment of one to the other."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    cost = cdist(real, generated, "sqeuclidean")
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


def neighbor_scores(real: np.ndarray, generated: np.ndarray) -> dict[str, float]:
    """Accuracy of the nearest neighbor, coverage and density."""
    from scipy.spatial.distance import cdist

    within, between, among = cdist(real, real), cdist(real, generated), cdist(generated, generated)
    for own in (within, among):
        np.fill_diagonal(own, np.inf)
    own_is_nearer = np.concatenate([within.min(axis=1) < between.min(axis=1), among.min(axis=1) < between.min(axis=0)])
    reach = np.partition(within, _N_NEIGHBORS - 1, axis=1)[:, _N_NEIGHBORS - 1]
    is_within = between < reach[:, None]  # (n_real, n_generated)
    return {
        "neighbor_accuracy": float(own_is_nearer.mean()),
        "coverage": float(is_within.any(axis=1).mean()),
        "density": float(is_within.sum() / _N_NEIGHBORS / len(generated)),
    }


def copy_scores(
    real: sparse.csr_matrix, generated: sparse.csr_matrix, reference: sparse.csr_matrix, seed: int
) -> dict[str, float]:
    """Whether generated cells lie nearer to those of the reference than to unseen ones; log-normalized counts."""
    from sklearn.decomposition import PCA
    from sklearn.metrics import pairwise_distances_argmin_min

    # Components of reference cells would spread these, and not real ones, away from everything else: real cells in the
    # place of generated ones then had a ratio of 1.15 and a share of -0.7. Those of generated cells favor neither side.
    components = PCA(N_COMPONENTS, svd_solver="randomized", random_state=seed).fit(generated.toarray())
    real, generated, reference = (components.transform(cells) for cells in (real, generated, reference))

    def nearest(points: np.ndarray) -> np.ndarray:
        return pairwise_distances_argmin_min(generated, points)[1]

    rng = np.random.default_rng(seed)
    n_equal = min(len(real), len(reference))
    to_real, to_reference = (nearest(subsample(points, n_equal, rng)) for points in (real, reference))
    # If reference and real cells are of one distribution, each is as likely as any other to be the nearest.
    by_chance = len(reference) / (len(reference) + len(real))
    share = np.mean(nearest(reference) < nearest(real))
    with np.errstate(divide="ignore", invalid="ignore"):  # generated cells that are the real ones
        ratio = np.median(to_reference) / np.median(to_real)
    return {
        "copy_distance_ratio": float(ratio),
        "copy_share": float((share - by_chance) / (1.0 - by_chance)),
    }


def gene_scores(real: sparse.csr_matrix, generated: sparse.csr_matrix) -> dict[str, float]:
    """Correlation and slope of the log mean and the log variance of the counts of each gene."""
    is_counted = np.asarray(real.sum(axis=0)).ravel() > 0
    scores = {}
    for name, moment in (("mean", _mean), ("variance", variance)):
        logs = [
            np.log(np.maximum(moment(counts[:, is_counted]), 0.5 / counts.shape[0])) for counts in (real, generated)
        ]
        scores[f"gene_{name}_correlation"] = _correlation(*logs)
        scores[f"gene_{name}_slope"] = _slope(*logs)
    return scores


def gene_gene_correlation(real: np.ndarray, generated: np.ndarray) -> float:
    """Agreement of the correlations between genes; shapes ``(n_cells, n_genes)``."""
    upper = np.triu_indices(real.shape[1], k=1)
    return _correlation(*(_correlations(values)[upper] for values in (real, generated)))


def type_scores(real: np.ndarray, generated: np.ndarray, types: np.ndarray, known: np.ndarray) -> dict[str, float]:
    """Shares of types.

    Parameters
    ----------
    real, generated
        Predicted types.
    types
        Types that the classifier can predict.
    known
        Types of all reference cells.
    """
    shares = [np.array([np.mean(found == name) for name in types]) for found in (real, generated)]
    is_rare = np.array([np.mean(known == name) < _RARE_SHARE for name in types])
    return {
        "type_total_variation": float(np.abs(shares[0] - shares[1]).sum() / 2.0),
        "rare_types_found": float(np.mean(shares[1][is_rare] > 0)) if is_rare.any() else np.nan,
    }


def type_change_slope(
    real: sparse.csr_matrix, generated: sparse.csr_matrix, real_types: np.ndarray, generated_types: np.ndarray
) -> float:
    """Slope of the changes of mean expression between each type and all other cells."""
    sides = ((real, real_types), (generated, generated_types))
    shared = [
        name
        for name in np.unique(real_types)
        if all(_MIN_TYPE_CELLS <= np.sum(types == name) <= len(types) - _MIN_TYPE_CELLS for _, types in sides)
    ]
    if len(shared) < 2:
        return np.nan
    of_real, of_generated = (
        np.concatenate([_mean(cells[types == name]) - _mean(cells[types != name]) for name in shared])
        for cells, types in sides
    )
    return float(of_real @ of_generated / (of_real @ of_real))


def subsample(rows: Any, n: int, rng: np.random.Generator) -> Any:
    """At most ``n`` rows of a dense or sparse matrix, in random order."""
    return rows[rng.permutation(rows.shape[0])[:n]]


def log_normalized(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Counts scaled to 10,000 a cell and ``log1p`` taken; cells without counts stay zero."""
    totals = np.asarray(counts.sum(axis=1)).ravel()
    scaled = sparse.csr_matrix(sparse.diags(1e4 / np.maximum(totals, 1.0)) @ counts)
    return scaled.log1p()


def _mean(values: sparse.csr_matrix) -> np.ndarray:
    return np.asarray(values.mean(axis=0)).ravel()


def variance(values: sparse.csr_matrix) -> np.ndarray:
    """Variance of each column."""
    return _mean(values.multiply(values)) - _mean(values) ** 2


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    x = x - x.mean()
    return float(x @ y / (x @ x))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(_correlations(np.column_stack([x, y]))[0, 1])


def _correlations(values: np.ndarray) -> np.ndarray:
    """Pearson correlations between columns; a column that does not vary correlates with none."""
    centered = values - values.mean(axis=0)
    lengths = np.linalg.norm(centered, axis=0)
    scaled = centered / np.where(lengths > 0, lengths, 1.0)
    return scaled.T @ scaled
