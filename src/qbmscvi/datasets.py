"""Generated single-cell counts with known truth.

A cell has activities ``a``, one per gene program; a gene ``g`` belongs to one program ``p(g)`` or to the background.
The gene's expected share of the counts is ``softmax_g(baseline_g + a_p(g) * loading_g + batch_log_factor_bg)``, the
expected total of the cell is a log-normal library size, and counts are negative binomial with a gene-specific inverse
dispersion ``theta_g`` (variance ``mean + mean^2 / theta_g``). Types are points in the space of activities, or, on the
trajectory, pieces of a line, so related types share programs. Doublets, ambient RNA and differences of composition
between batches are not generated.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import norm

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["synthetic_counts"]

# The trajectory: each piece covers a third of the pseudotime, both branches the last one.
_TRAJECTORY = ("root", "trunk", "branch_0", "branch_1")
_STAGES = np.array([0, 1, 2, 2])
_N_STAGES = 3

# Tuned together at the default sizes, so that types are neither trivial nor hopeless: a 15-nearest-neighbor classifier
# on 30 principal components finds the type of four cells in five, and the batch clearly above chance.
_PROGRAMS_PER_TYPE = 2
_BACKGROUND_SHARE = 0.3
_SEPARATION = 3.0
_STEP = 5.0
_FAMILY_WEIGHT = 0.8
_ACTIVITY_SCALE = 0.25
_BASELINE_SCALE = 1.2
_LIBRARY_SCALE = 0.35
_RAREST_TO_MOST_FREQUENT = 0.25

# Entries of one dense chunk: about 32 MB in float64. Part of the stream of random numbers, so a constant.
_CHUNK_ENTRIES = 4_000_000
# Float32 holds integers exactly up to 2**24: the limit leaves a factor of more than 100 between mean total and a count.
_MAX_MEAN_DEPTH = 1e5
_MAX_BATCH_EFFECT = 3.0


class _Genes(NamedTuple):
    """What is fixed per gene: arrays of shape ``(n_genes,)``, and ``batch_log_factor`` ``(n_batches, n_genes)``."""

    program: np.ndarray
    loading: np.ndarray
    baseline: np.ndarray
    inverse_dispersion: np.ndarray
    batch_log_factor: np.ndarray


def synthetic_counts(
    n_cells: int = 2000,
    n_genes: int = 500,
    n_types: int = 6,
    n_batches: int = 2,
    *,
    batch_effect: float = 0.3,
    mean_depth: float = 130.0,
    seed: int = 0,
) -> AnnData:
    r"""Generate counts with known cell types, batches and a branching order.

    Four of the types (``root``, ``trunk``, ``branch_0``, ``branch_1``) are the pieces of a trajectory that branches
    once: cells lie on it continuously, so neighboring pieces touch. The other types (``type_0``, ``type_1``, ...) are
    discrete and come in pairs of relatives. The most frequent type (``root``) has four times the cells of the rarest.
    Batches have equal sizes, are independent of the types, and differ in every gene and in depth.

    Parameters
    ----------
    n_cells
        Number of cells, at least ``n_types`` and ``n_batches``.
    n_genes
        Number of genes, at least ``4 * n_types`` so that every program has genes.
    n_types
        Number of cell types, at least 4: the four on the trajectory come first.
    n_batches
        Number of batches.
    batch_effect
        Standard deviation, over genes, of the natural logarithm of a batch's factor; the log depths of the batches are
        spread evenly over ``[-batch_effect, batch_effect]``. Zero means that batches do not differ.
    mean_depth
        Mean over cells of the expected number of counts of a cell.
    seed
        Seed of the random numbers. The global random state is neither read nor changed.

    Returns
    -------
    Annotated data with

    - ``X``: counts, CSR of ``float32`` with integer values. Every cell has at least one count: a cell that would have
      none gets one, in a gene drawn from its expected expression.
    - ``obs``: ``batch`` and ``cell_type`` (categorical); ``pseudotime`` in ``[0, 1]`` and ``stage`` (0 root, 1 trunk, 2
      both branches), both NaN off the trajectory; ``library_size``, the expected total of the cell, depth of its batch
      included.
    - ``var``: ``program`` (categorical, ``"background"`` for genes that no program moves), ``loading`` (log fold change
      per unit of activity) and ``inverse_dispersion``.
    - ``uns["synthetic"]``: ``seed``; ``expected_expression``, a table of types by genes with the expected share of each
      gene before batch effects, averaged over the cells of the type (rows sum to one); ``batch_log_factor``, a table
      of batches by genes; ``batch_depth``, the depth factor of each batch.

    Raises
    ------
    ValueError
        If a number has another type or range than stated above, ``mean_depth`` is not in ``(0, 1e5]``, or
        ``batch_effect`` is not in ``[0, 3]``.

    Examples
    --------
    >>> adata = synthetic_counts(n_cells=300, n_genes=100, seed=1)
    >>> adata.shape
    (300, 100)
    >>> list(adata.obs["cell_type"].cat.categories)
    ['root', 'trunk', 'branch_0', 'branch_1', 'type_0', 'type_1']
    """
    from anndata import AnnData

    _require_integer("n_types", n_types, len(_TRAJECTORY), "Raise it: four of the types make up the trajectory.")
    _require_integer("n_batches", n_batches, 1, "Use 1 for counts without a batch effect.")
    _require_integer(
        "n_cells", n_cells, max(n_types, n_batches), "Raise it, or lower `n_types` or `n_batches`: none may be empty."
    )
    n_programs = _PROGRAMS_PER_TYPE * n_types
    _require_integer("n_genes", n_genes, 2 * n_programs, "Raise it, or lower `n_types`: every program needs genes.")
    _require_integer("seed", seed, 0, "Pass a fixed number; equal numbers give equal counts.")
    _require_real("batch_effect", batch_effect, high=_MAX_BATCH_EFFECT, is_zero_allowed=True)
    _require_real("mean_depth", mean_depth, high=_MAX_MEAN_DEPTH, is_zero_allowed=False)

    rng = np.random.default_rng(int(seed))
    type_names = [*_TRAJECTORY, *(f"type_{i}" for i in range(n_types - len(_TRAJECTORY)))]
    gene_names = [f"gene_{i}" for i in range(n_genes)]
    batch_names = [f"batch_{i}" for i in range(n_batches)]

    genes = _draw_genes(n_genes, n_programs, n_batches, batch_effect, rng)
    cell_type = _draw_types(n_cells, n_types, rng)
    batch = rng.permutation(np.arange(n_cells) % n_batches)
    activity, pseudotime, stage = _draw_activities(cell_type, n_types, n_programs, rng)
    depth = np.exp(batch_effect * np.linspace(-1, 1, n_batches)) if n_batches > 1 else np.ones(1)
    depth /= depth.mean()
    # exp(-scale^2 / 2) makes the mean of the log-normal factor one
    spread = np.exp(_LIBRARY_SCALE * rng.standard_normal(n_cells) - _LIBRARY_SCALE**2 / 2)
    library_size = mean_depth * depth[batch] * spread

    counts, expected_expression = _draw_counts(genes, cell_type, batch, activity, library_size, n_types, rng)

    obs = pd.DataFrame(
        {
            "batch": pd.Categorical.from_codes(batch, batch_names),
            "cell_type": pd.Categorical.from_codes(cell_type, type_names),
            "pseudotime": pseudotime,
            "stage": stage,
            "library_size": library_size,
        },
        index=[f"cell_{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(
        {
            "program": pd.Categorical.from_codes(
                genes.program, [*(f"program_{i}" for i in range(n_programs)), "background"]
            ),
            "loading": genes.loading,
            "inverse_dispersion": genes.inverse_dispersion,
        },
        index=gene_names,
    )
    truth = {
        "seed": int(seed),
        "expected_expression": pd.DataFrame(expected_expression, index=type_names, columns=gene_names),
        "batch_log_factor": pd.DataFrame(genes.batch_log_factor, index=batch_names, columns=gene_names),
        "batch_depth": depth,
    }
    return AnnData(X=counts, obs=obs, var=var, uns={"synthetic": truth})


def _draw_genes(n_genes: int, n_programs: int, n_batches: int, batch_effect: float, rng: np.random.Generator) -> _Genes:
    """Draw programs, loadings, baselines, dispersions and batch factors; code ``n_programs`` is the background."""
    n_moved = max(n_programs, n_genes - round(_BACKGROUND_SHARE * n_genes))
    program = np.full(n_genes, n_programs)
    program[:n_moved] = np.arange(n_moved) % n_programs
    program = rng.permutation(program)
    loading = np.where(program < n_programs, rng.gamma(10.0, 0.1, size=n_genes), 0.0)  # positive, mean one
    # normal quantiles in random order: a few very abundant genes, the same for every seed
    baseline = _BASELINE_SCALE * rng.permutation(norm.ppf((np.arange(n_genes) + 0.5) / n_genes))
    inverse_dispersion = np.exp(math.log(2.0) + 0.5 * rng.standard_normal(n_genes))
    batch_log_factor = batch_effect * rng.standard_normal((n_batches, n_genes))
    if n_batches == 1:
        batch_log_factor[:] = 0.0
    return _Genes(program, loading, baseline, inverse_dispersion, batch_log_factor)


def _draw_types(n_cells: int, n_types: int, rng: np.random.Generator) -> np.ndarray:
    """Draw type codes whose frequencies fall geometrically; every type has a cell."""
    weights = _RAREST_TO_MOST_FREQUENT ** (np.arange(n_types) / (n_types - 1))
    bounds = np.round(np.cumsum(weights) / weights.sum() * (n_cells - n_types)).astype(int)
    sizes = np.diff(bounds, prepend=0) + 1
    return rng.permutation(np.repeat(np.arange(n_types), sizes))


def _draw_activities(
    cell_type: np.ndarray, n_types: int, n_programs: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place the cells in the space of program activities.

    Orthogonal directions keep the distances between types, and so the difficulty, the same for every seed.

    Returns
    -------
    Activities of shape ``(n_cells, n_programs)``, pseudotime and stage of shape ``(n_cells,)``.
    """
    n_cells, n_pieces = len(cell_type), len(_TRAJECTORY)
    directions = np.linalg.qr(rng.standard_normal((n_programs, n_programs)))[0].T  # rows are orthonormal
    start = np.zeros((n_types, n_programs))
    step = np.zeros((n_types, n_programs))
    step[:n_pieces] = _STEP * directions[1 : 1 + n_pieces]
    start[0] = _SEPARATION * directions[0]
    start[1] = start[0] + step[0]
    start[2] = start[3] = start[1] + step[1]
    n_discrete = n_types - n_pieces
    own = directions[1 + n_pieces : 1 + n_pieces + n_discrete]
    family = directions[1 + n_pieces + n_discrete :]
    for i in range(n_discrete):
        direction = _FAMILY_WEIGHT * family[i // 2] + math.sqrt(1 - _FAMILY_WEIGHT**2) * own[i]  # of unit length
        start[n_pieces + i] = _SEPARATION * direction

    # Place within the piece, densest in its middle; without effect off the trajectory, where the step is zero.
    fraction = rng.beta(2.0, 2.0, size=n_cells)
    activity = start[cell_type] + fraction[:, None] * step[cell_type]
    activity += _ACTIVITY_SCALE * rng.standard_normal((n_cells, n_programs))

    stage = np.full(n_cells, np.nan)
    is_ordered = cell_type < n_pieces
    stage[is_ordered] = _STAGES[cell_type[is_ordered]]
    return activity, (stage + fraction) / _N_STAGES, stage


def _draw_counts(
    genes: _Genes,
    cell_type: np.ndarray,
    batch: np.ndarray,
    activity: np.ndarray,
    library_size: np.ndarray,
    n_types: int,
    rng: np.random.Generator,
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Draw the counts chunk by chunk.

    Returns
    -------
    Counts, and the mean expected share of each gene by type, of shape ``(n_types, n_genes)``.
    """
    n_cells, n_genes = len(cell_type), len(genes.program)
    activity = np.column_stack([activity, np.zeros(n_cells)])  # the background has an activity of zero
    batch_factor = np.exp(genes.batch_log_factor)
    share_sum = np.zeros((n_types, n_genes))
    n_rows = max(1, _CHUNK_ENTRIES // n_genes)
    chunks = []
    for first in range(0, n_cells, n_rows):
        rows = slice(first, min(first + n_rows, n_cells))
        logits = genes.baseline + activity[rows][:, genes.program] * genes.loading  # (n_rows, n_genes)
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        for code in range(n_types):
            share_sum[code] += share[cell_type[rows] == code].sum(axis=0)
        share *= batch_factor[batch[rows]]
        share /= share.sum(axis=1, keepdims=True)

        # negative binomial as a Poisson whose rate is gamma with mean one
        rate = rng.standard_gamma(np.broadcast_to(genes.inverse_dispersion, share.shape)) / genes.inverse_dispersion
        rate *= share
        rate *= library_size[rows, None]
        dense = rng.poisson(rate)
        for row in np.flatnonzero(dense.sum(axis=1) == 0):
            # a single count drawn from the shares is the limit, at low depth, of redrawing the cell until it has counts
            dense[row, rng.choice(n_genes, p=share[row])] = 1
        chunks.append(sparse.csr_matrix(dense.astype(np.float32)))
    counts = sparse.vstack(chunks, format="csr")
    return counts, share_sum / np.bincount(cell_type, minlength=n_types)[:, None]


def _require_integer(name: str, value: object, minimum: int, remedy: str) -> None:
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= minimum:
        return
    msg = f"`{name}` is out of range: got {value!r}, but it must be an integer of at least {minimum}. {remedy}"
    raise ValueError(msg)


def _require_real(name: str, value: object, *, high: float, is_zero_allowed: bool) -> None:
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        if 0 < value <= high or (is_zero_allowed and value == 0):
            return
    interval = f"{'[' if is_zero_allowed else '('}0, {high:g}]"
    msg = (
        f"`{name}` is out of range: got {value!r}, but it must be a finite number in {interval}. "
        "Choose a value inside the interval; the default is a good start."
    )
    raise ValueError(msg)
