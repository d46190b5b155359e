r"""Scores of the distance between generated and real cells.

Cells are compared in 20 principal components of log-normalized counts. A random half of the reference (the cells that a
model was trained on) fits the components and the classifier of types; the other half serves as the anchor "real against
real" (:func:`score_real`), because components tell the cells that they were fitted on from all others. The scores do
not use the model, and no number is clipped. Read each number between its two anchors: real cells, and cells decoded
from the model's own codes.

The scores ignore batches, so generate cells in the proportions of batches of the real ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from qbmscvi.exceptions import require_integer
from qbmscvi.model._counts import check_counts
from qbmscvi.model._input_checks import as_typed, check_categories, check_matrix, require_anndata

from ._metrics import logistic_classifier

if TYPE_CHECKING:
    from anndata import AnnData
    from sklearn.decomposition import PCA

__all__ = ["gap_closed", "score_generated", "score_real"]

_N_COMPONENTS = 20
_N_FOLDS = 5
_N_TREES = 200
_N_NEIGHBORS = 5
_KERNEL_WIDTHS = (0.25, 0.5, 1.0, 2.0)  # times the median distance
_MIN_CELLS = 50
_MAX_CELLS = 2000  # memory and time grow with the square of it
_MAX_ASSIGNED_CELLS = 1000  # time grows with the cube of it
_N_VARIABLE_GENES = 200
_RARE_SHARE = 0.02
_MIN_TYPE_CELLS = 10  # a mean of fewer says little about a fold change
_N_SHOWN = 3


def score_generated(
    real: AnnData,
    generated: AnnData,
    reference: AnnData,
    *,
    label_key: str | None = None,
    layer: str | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Score generated cells against held-out real ones.

    Parameters
    ----------
    real
        Counts of cells that the model was not trained on, a random part of the same data as ``reference``.
    generated
        Generated counts, as :meth:`qbmscvi.QBMSCVI.generate` returns them: draws, not means. As many cells as ``real``
        has, or more for shares of types with less noise; in the same proportions of batches.
    reference
        Counts of the cells that the model was trained on.
    label_key
        Column of ``reference.obs`` with the type of each cell. It adds the numbers about types. Types of all other
        cells are predicted, real and generated ones by the same classifier.
    layer
        Layer with the counts; None for ``X``. Generated cells without this layer have their counts in ``X``.
    seed
        Seed of the halves, subsamples, folds and trees. The global random state is neither read nor changed.

    Returns
    -------
    By name. Real and generated cells are compared in equal numbers, those of the smaller of the two, and distances are
    computed for 2000 cells at most; shares of types are those of all cells. "Anchor" is what :func:`score_real` gives.

    Told apart, in principal components:

    - ``forest_auc``: area under the ROC curve of a random forest that tells real from generated cells, five folds. 0.5
      is best, 1 is worst; below 0.5 by chance only.
    - ``neighbor_accuracy``: share of cells whose nearest other cell is of their own kind, real or generated. 0.5 is
      best, 1 is worst. Near 0, each generated cell lies on a real one.

    Distances between the two distributions, in principal components:

    - ``mmd2``: unbiased squared maximum mean discrepancy, the mean of four Gaussian kernels with widths of a quarter,
      half, one and two times the median distance of real cells. Lower is better; about 0 for equal distributions, and
      negative by chance; at most 2.
    - ``wasserstein2``: Wasserstein-2 distance in units of log-normalized expression, on 1000 cells at most. Lower is
      better, 0 or more. Two samples of one distribution are above 0, and the more the fewer cells there are: compare it
      at equal numbers of cells.
    - ``coverage``: share of real cells that have a generated cell nearer than their fifth real neighbor. Higher is
      better, 0 to 1; the anchor is slightly below 1.
    - ``density``: mean number of real cells that have a generated cell within the distance of their fifth neighbor,
      over five. Near 1 is best; 0 if all generated cells lie off the data, above 1 if they crowd where real cells are
      dense.

    Genes:

    - ``gene_mean_correlation``, ``gene_mean_slope``: Pearson correlation (-1 to 1, 1 is best) and slope of the log mean
      count of each gene in generated cells on that in real ones. 1 is best for the slope. Genes without counts in real
      cells are left out; no count among generated cells enters as half a count.
    - ``gene_variance_correlation``, ``gene_variance_slope``: the same for the variance of counts.
    - ``gene_gene_correlation``: Pearson correlation, -1 to 1, of the correlations between the 200 genes that vary most
      in the reference, generated against real. Higher is better; a gene that does not vary correlates with none.

    Copies of training cells, in 20 principal components of the generated cells, which favor neither reference nor real
    ones:

    - ``copy_distance_ratio``: median distance of a generated cell to its nearest reference cell, divided by that to its
      nearest real cell, with as many reference cells as real ones. About 1 is best. Below 1, generated cells are nearer
      to training cells than to unseen ones. A model that copies at random from a much larger reference passes, because
      few of the originals are among the subsample: see the next. Infinite if most generated cells are real ones.
    - ``copy_share``: share of generated cells whose nearest cell is one of the reference, from all reference and
      real cells, rescaled so that 0 is what chance gives and 1 that of a model that returns training cells. 0 is best.
      Its noise is large, about 0.1 with 560 real cells and a reference four times as large, more where a few cells are
      nearest to many generated ones; negative by chance.

    Types, with ``label_key``:

    - ``type_total_variation``: half the summed absolute difference between the shares of types in real and generated
      cells. The real ones are those of ``real`` and of the half of the reference that does not fit the classifier.
      Lower is better, 0 to 1; above 0 for the anchor, the more so the fewer cells there are.
    - ``rare_types_found``: share of the types below 2 % of the reference that have a generated cell at least. Higher is
      better, 0 to 1; NaN if there is no such type. Types that the half for the classifier lacks are left out. The
      classifier gives cells off the data a type, too: read it together with ``coverage``.
    - ``type_change_slope``: slope, through the origin, of the changes of log-normalized expression between each
      type and all other cells, in generated cells on real ones, over types with 10 cells or more in both. 1 is best;
      below 1, types differ less than they should. NaN if fewer than two types have these cells.

    Raises
    ------
    TypeError
        If one of the three is no AnnData, its matrix is of no type that scvi-tools reads, or ``seed`` is no integer.
    ValueError
        If one of the three has fewer than 50 cells, values that are no counts, or no such layer; genes differ or are
        in another order; there are 20 genes or fewer; ``label_key`` is no column of ``reference.obs``, a cell has no
        type, or there are fewer than two types; or ``seed`` is negative.

    See Also
    --------
    score_real : the same numbers for real cells in place of generated ones.
    gap_closed : what share of what the decoder allows a prior reaches.

    Examples
    --------
    >>> from qbmscvi.datasets import synthetic_counts
    >>> cells = synthetic_counts(n_cells=300, n_genes=60, seed=0)  # in random order
    >>> scores = score_generated(cells[:75], cells[75:150], cells[150:], label_key="cell_type")
    >>> abs(scores["mmd2"]) < 0.02 and scores["coverage"] > 0.8
    True
    """
    layers = _check(real, generated, reference, label_key, layer, seed)
    counts = [_counts(real, layer), _counts(generated, layers["generated"]), _counts(reference, layer)]
    return _score(*counts, _types(reference, label_key), _halves(reference.n_obs, seed)[0], seed)


def score_real(
    real: AnnData, reference: AnnData, *, label_key: str | None = None, layer: str | None = None, seed: int = 0
) -> dict[str, float]:
    """Score real cells of the reference as :func:`score_generated` scores generated ones: the best possible scores.

    The cells come from the half of the reference that fits neither components nor classifier, as many as there are
    ``real`` cells if there are so many. All other cells of the reference are those that could have been copied.

    Parameters
    ----------
    real, reference, label_key, layer, seed
        As for :func:`score_generated`.

    Returns
    -------
    The numbers of :func:`score_generated`.

    Raises
    ------
    TypeError, ValueError
        As :func:`score_generated`.

    Examples
    --------
    >>> from qbmscvi.datasets import synthetic_counts
    >>> cells = synthetic_counts(n_cells=300, n_genes=60, seed=0)
    >>> scores = score_real(cells[:75], cells[75:])
    >>> abs(scores["mmd2"]) < 0.02
    True
    """
    _check(real, reference, reference, label_key, layer, seed)
    known = _counts(reference, layer)
    fitted, others = _halves(reference.n_obs, seed)
    chosen, rest = others[: real.n_obs], others[real.n_obs :]
    types, originals = _types(reference, label_key), np.concatenate([fitted, rest])
    return _score(_counts(real, layer), known[chosen], known, types, fitted, seed, originals)


def gap_closed(score: float, of_normal: float, of_own_codes: float) -> float:
    """Share of the gap that a prior closes: 0 for a standard normal prior, 1 for the model's own codes.

    Own codes are codes of training cells and show the limit of the decoder. Below 0 a prior is worse than the normal
    one; above 1 its cells are better than those of the codes.

    Parameters
    ----------
    score
        Score of the model, whether lower or higher is better.
    of_normal
        The same score of cells decoded from draws of a standard normal distribution.
    of_own_codes
        The same score of cells decoded from codes of training cells.

    Returns
    -------
    The share; NaN if there is no gap.

    Examples
    --------
    >>> round(gap_closed(0.70, of_normal=0.95, of_own_codes=0.65), 3)
    0.833
    """
    gap = of_normal - of_own_codes
    return (of_normal - score) / gap if gap else float("nan")


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
    components = PCA(_N_COMPONENTS, svd_solver="randomized", random_state=seed).fit(generated.toarray())
    real, generated, reference = (_points(components, cells) for cells in (real, generated, reference))

    def nearest(points: np.ndarray) -> np.ndarray:
        return pairwise_distances_argmin_min(generated, points)[1]

    rng = np.random.default_rng(seed)
    n_equal = min(len(real), len(reference))
    to_real, to_reference = (nearest(_subsample(points, n_equal, rng)) for points in (real, reference))
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
    for name, moment in (("mean", _mean), ("variance", _variance)):
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


def _score(
    real: sparse.csr_matrix,
    generated: sparse.csr_matrix,
    reference: sparse.csr_matrix,
    types: np.ndarray | None,
    fitted: np.ndarray,
    seed: int,
    originals: np.ndarray | slice = slice(None),
) -> dict[str, float]:
    """All scores of counts; rows ``fitted`` of the reference fit, rows ``originals`` may have been copied."""
    from sklearn.decomposition import PCA

    reference_logs = _log_normalize(reference)
    components = PCA(_N_COMPONENTS, svd_solver="arpack", random_state=seed).fit(reference_logs[fitted])
    scores = {}
    if types is not None:
        unseen = np.setdiff1d(np.arange(reference.shape[0])[originals], fitted)
        classifier = logistic_classifier().fit(_points(components, reference_logs[fitted]), types[fitted])

        def predict(*cells: sparse.csr_matrix) -> np.ndarray:
            return classifier.predict(_points(components, sparse.vstack([_log_normalize(part) for part in cells])))

        scores = type_scores(predict(real, reference[unseen]), predict(generated), classifier.classes_, types)
    rng = np.random.default_rng(seed)
    n_equal = min(real.shape[0], generated.shape[0])
    real, generated = (_subsample(cells, n_equal, rng) for cells in (real, generated))
    real_logs, generated_logs = (_log_normalize(counts) for counts in (real, generated))
    real_points, generated_points = (_points(components, logs) for logs in (real_logs, generated_logs))

    near, made = real_points[:_MAX_CELLS], generated_points[:_MAX_CELLS]  # in random order
    scores |= {
        "forest_auc": forest_auc(near, made, seed),
        "mmd2": mmd_squared(near, made),
        "wasserstein2": wasserstein2(near[:_MAX_ASSIGNED_CELLS], made[:_MAX_ASSIGNED_CELLS]),
        **neighbor_scores(near, made),
        **copy_scores(real_logs, generated_logs[:_MAX_CELLS], reference_logs[originals], seed),
        **gene_scores(real, generated),
    }
    variable = np.argsort(-_variance(reference_logs), kind="stable")[:_N_VARIABLE_GENES]
    scores["gene_gene_correlation"] = gene_gene_correlation(
        real_logs[:, variable].toarray(), generated_logs[:, variable].toarray()
    )
    if types is not None:
        found = (classifier.predict(points) for points in (real_points, generated_points))
        scores["type_change_slope"] = type_change_slope(real_logs, generated_logs, *found)
    return scores


def can_score(real: AnnData, reference: AnnData, label_key: str | None, seed: int) -> bool:
    """Whether :func:`score_generated` takes real and reference cells of one AnnData; types are those of the column."""
    if min(real.n_obs, reference.n_obs // 2) < _MIN_CELLS or real.n_vars <= _N_COMPONENTS:
        return False
    return label_key is None or reference.obs[label_key].iloc[_halves(reference.n_obs, seed)[0]].nunique() > 1


def _check(
    real: AnnData, generated: AnnData, reference: AnnData, label_key: str | None, layer: str | None, seed: int
) -> dict[str, str | None]:
    """Raise unless the three can be compared; the layer of the counts of each."""
    require_integer("seed", seed, 0)
    three = {"real": real, "reference": reference, "generated": generated}
    layers = {}
    for name, cells in three.items():
        try:
            require_anndata(cells)
            own_layer = None if name == "generated" and layer not in cells.layers else layer
            check_matrix(cells, own_layer)
            check_counts(cells, layer=own_layer, needs_library_size=False)
        except (TypeError, ValueError) as error:
            msg = f"`{name}` cannot be scored. {error}"
            raise type(error)(msg) from error
        if cells.n_obs < _MIN_CELLS:
            msg = f"`{name}` has {cells.n_obs} cells, but {_MIN_CELLS} are needed at least. Pass more of them."
            raise ValueError(msg)
        layers[name] = own_layer
    if real.n_vars <= _N_COMPONENTS:
        msg = f"`real` has {real.n_vars} genes, but {_N_COMPONENTS} components need more. Keep more genes."
        raise ValueError(msg)
    for name, cells in three.items():
        if not cells.var_names.equals(real.var_names):
            is_same_set = sorted(cells.var_names) == sorted(real.var_names)
            msg = (
                f"`{name}` has {'the genes of `real` in another order' if is_same_set else 'other genes than `real`'}: "
                f"the first are {as_typed(cells.var_names, _N_SHOWN)} in place of "
                f"{as_typed(real.var_names, _N_SHOWN)}. All three need the same genes in the same order: "
                f"`{name} = {name}[:, real.var_names].copy()`."
            )
            raise ValueError(msg)
    if label_key is not None:
        check_categories(reference.obs, "label_key", label_key)
        found = reference.obs[label_key].iloc[_halves(reference.n_obs, seed)[0]].unique()
        if len(found) < 2:
            msg = (
                f"`reference.obs[{label_key!r}]` (label_key) has the single type {as_typed(found)} in the half that "
                "the classifier learns from, but two are needed at least. Leave `label_key` out, or pass more cells."
            )
            raise ValueError(msg)
    return layers


def _counts(cells: AnnData, layer: str | None) -> sparse.csr_matrix:
    return sparse.csr_matrix(cells.X if layer is None else cells.layers[layer], dtype=np.float64)


def _types(reference: AnnData, label_key: str | None) -> np.ndarray | None:
    return None if label_key is None else reference.obs[label_key].astype(str).to_numpy(dtype=object)


def _halves(n_cells: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(n_cells)
    return order[: n_cells // 2], order[n_cells // 2 :]


def _subsample(rows: Any, n: int, rng: np.random.Generator) -> Any:
    """At most ``n`` rows of a dense or sparse matrix, in random order."""
    return rows[rng.permutation(rows.shape[0])[:n]]


def _points(components: PCA, logs: sparse.csr_matrix) -> np.ndarray:
    return np.asarray(logs @ components.components_.T - components.mean_ @ components.components_.T)


def _log_normalize(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    totals = np.asarray(counts.sum(axis=1)).ravel()
    scaled = sparse.csr_matrix(sparse.diags(1e4 / np.maximum(totals, 1.0)) @ counts)
    return scaled.log1p()


def _mean(values: sparse.csr_matrix) -> np.ndarray:
    return np.asarray(values.mean(axis=0)).ravel()


def _variance(values: sparse.csr_matrix) -> np.ndarray:
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
