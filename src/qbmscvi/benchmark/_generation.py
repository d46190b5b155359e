r"""Scores of the distance between generated and real cells.

Cells are compared in 20 principal components of log-normalized counts. A random half of the reference (the cells that a
model was trained on) fits the components and the classifier of types; the other half serves as the anchor "real against
real" (:func:`score_real`), because components tell the cells that they were fitted on from all others. The scores do
not use the model, and no number is clipped. Read each number between its two anchors: real cells, and cells decoded
from the model's own codes.

The scores ignore batches, so generate cells in the proportions of batches of the real ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from qbmscvi.benchmark._cell_metrics import (
    N_COMPONENTS,
    copy_scores,
    forest_auc,
    gene_gene_correlation,
    gene_scores,
    log_normalized,
    mmd_squared,
    neighbor_scores,
    subsample,
    type_change_slope,
    type_scores,
    variance,
    wasserstein2,
)
from qbmscvi.benchmark._metrics import logistic_classifier
from qbmscvi.exceptions import require_integer
from qbmscvi.model._counts import check_counts
from qbmscvi.model._input_checks import as_typed, check_categories, check_matrix, require_anndata

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["gap_closed", "score_generated", "score_real"]

_MIN_CELLS = 50
_MAX_CELLS = 2000  # memory and time grow with the square of it
_MAX_ASSIGNED_CELLS = 1000  # time grows with the cube of it
_N_VARIABLE_GENES = 200
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
    given = {"real": real, "reference": reference, "generated": generated}
    counts, types = _read(given, label_key, layer, seed)
    return _score(**counts, types=types, fitted=_halves(reference.n_obs, seed)[0], seed=seed)


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
    counts, types = _read({"real": real, "reference": reference}, label_key, layer, seed)
    fitted, others = _halves(reference.n_obs, seed)
    chosen, originals = others[: real.n_obs], np.concatenate([fitted, others[real.n_obs :]])
    generated = counts["reference"][chosen]
    return _score(**counts, generated=generated, types=types, fitted=fitted, seed=seed, originals=originals)


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


def _score(
    *,
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

    reference_logs = log_normalized(reference)
    components = PCA(N_COMPONENTS, svd_solver="arpack", random_state=seed).fit(reference_logs[fitted])
    variable = np.argsort(-variance(reference_logs), kind="stable")[:_N_VARIABLE_GENES]
    # Pairs of real and generated cells: equally many, in random order.
    rng = np.random.default_rng(seed)
    n_equal = min(real.shape[0], generated.shape[0])
    counts = [subsample(cells, n_equal, rng) for cells in (real, generated)]
    logs = [log_normalized(cells) for cells in counts]
    points = [components.transform(cells) for cells in logs]
    near = [cells[:_MAX_CELLS] for cells in points]
    scores = {
        "forest_auc": forest_auc(*near, seed),
        "mmd2": mmd_squared(*near),
        "wasserstein2": wasserstein2(*(cells[:_MAX_ASSIGNED_CELLS] for cells in points)),
        **neighbor_scores(*near),
        **copy_scores(logs[0], logs[1][:_MAX_CELLS], reference_logs[originals], seed),
        **gene_scores(*counts),
        "gene_gene_correlation": gene_gene_correlation(*(cells[:, variable].toarray() for cells in logs)),
    }
    if types is None:
        return scores
    classifier = logistic_classifier().fit(components.transform(reference_logs[fitted]), types[fitted])

    def predict(cells: sparse.csr_matrix) -> np.ndarray:
        return classifier.predict(components.transform(log_normalized(cells)))

    unseen = np.setdiff1d(np.arange(reference.shape[0])[originals], fitted)
    all_real = sparse.vstack([real, reference[unseen]])
    scores |= type_scores(predict(all_real), predict(generated), classifier.classes_, types)
    scores["type_change_slope"] = type_change_slope(*logs, *(classifier.predict(cells) for cells in points))
    return scores


def can_score(real: AnnData, reference: AnnData, label_key: str | None, seed: int) -> bool:
    """Whether :func:`score_generated` takes real and reference cells of one AnnData; types are those of the column."""
    if min(real.n_obs, reference.n_obs // 2) < _MIN_CELLS or real.n_vars <= N_COMPONENTS:
        return False
    return label_key is None or reference.obs[label_key].iloc[_halves(reference.n_obs, seed)[0]].nunique() > 1


def _read(
    given: dict[str, AnnData], label_key: str | None, layer: str | None, seed: int
) -> tuple[dict[str, sparse.csr_matrix], np.ndarray | None]:
    """Counts by name and types of the reference; raise unless these can be compared."""
    require_integer("seed", seed, 0)
    counts = {}
    for name, cells in given.items():
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
        matrix = cells.X if own_layer is None else cells.layers[own_layer]
        counts[name] = sparse.csr_matrix(matrix, dtype=np.float64)
    real, reference = given["real"], given["reference"]
    if real.n_vars <= N_COMPONENTS:
        msg = f"`real` has {real.n_vars} genes, but {N_COMPONENTS} components need more. Keep more genes."
        raise ValueError(msg)
    for name, cells in given.items():
        if not cells.var_names.equals(real.var_names):
            is_same_set = sorted(cells.var_names) == sorted(real.var_names)
            msg = (
                f"`{name}` has {'the genes of `real` in another order' if is_same_set else 'other genes than `real`'}: "
                f"the first are {as_typed(cells.var_names, _N_SHOWN)} in place of "
                f"{as_typed(real.var_names, _N_SHOWN)}. All three need the same genes in the same order: "
                f"`{name} = {name}[:, real.var_names].copy()`."
            )
            raise ValueError(msg)
    if label_key is None:
        return counts, None
    check_categories(reference.obs, "label_key", label_key)
    types = reference.obs[label_key]
    found = types.iloc[_halves(reference.n_obs, seed)[0]].unique()
    if len(found) < 2:
        msg = (
            f"`reference.obs[{label_key!r}]` (label_key) has the single type {as_typed(found)} in the half that "
            "the classifier learns from, but two are needed at least. Leave `label_key` out, or pass more cells."
        )
        raise ValueError(msg)
    return counts, types.astype(str).to_numpy(dtype=object)


def _halves(n_cells: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(n_cells)
    return order[: n_cells // 2], order[n_cells // 2 :]
