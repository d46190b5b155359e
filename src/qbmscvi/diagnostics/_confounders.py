"""Partial rank correlation of a score and a target, given confounders."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.stats import rankdata
from scipy.stats import t as student

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class RankCorrelation(NamedTuple):
    """Partial rank correlation, and its two-sided p-value under no correlation."""

    value: float
    p_value: float


def partial_spearman(score: ArrayLike, target: ArrayLike, confounders: ArrayLike) -> RankCorrelation:
    r"""Rank correlation of two quantities of the same cells, with confounders held fixed.

    This is Pearson's correlation of the residuals of both ranks after linear regression on the ranks of the
    confounders. The p-value comes from Student's :math:`t` with :math:`n - 2 - k` degrees of freedom for :math:`k`
    confounders. It assumes independent cells, so it is too small for cells of few donors.

    A remaining correlation shows neither that the score causes anything, nor that no other confounder does.

    Parameters
    ----------
    score, target
        Shape ``(n_cells,)``.
    confounders
        Shape ``(n_cells,)`` or ``(n_cells, n_confounders)``; a constant column changes nothing.

    Returns
    -------
    Correlation in ``[-1, 1]`` and p-value; both NaN if the confounders determine the ranks of one of the two.

    Raises
    ------
    ValueError
        If lengths differ, a value is not finite, or there are too few cells.

    Examples
    --------
    >>> import numpy as np
    >>> depth = np.arange(100.0)
    >>> score, target = np.random.default_rng(0).normal(depth, 20, size=(2, 100))
    >>> bool(abs(partial_spearman(score, target, depth).value) < 0.3 < partial_spearman(score, target, 0 * depth).value)
    True
    """
    columns = [np.asarray(values, dtype=np.float64) for values in (score, target)]
    given = np.asarray(confounders, dtype=np.float64)
    given = given[:, None] if given.ndim == 1 else given
    shapes = [values.shape for values in (*columns, given)]
    n = len(columns[0])
    if shapes[0] != (n,) or shapes[1] != (n,) or given.ndim != 2 or len(given) != n:
        msg = f"The shapes are {shapes}, but each must have one value (or row of confounders) per cell. Align them."
        raise ValueError(msg)
    if not all(np.isfinite(values).all() for values in (*columns, given)):
        msg = "A value is NaN or infinite, which has no rank among cells. Leave these cells out of all arguments."
        raise ValueError(msg)
    n_free = n - 2 - given.shape[1]
    if n_free < 1:
        msg = f"{n} cells are too few for {given.shape[1]} confounders: at least {given.shape[1] + 3} are needed."
        raise ValueError(msg)
    design = np.column_stack([np.ones(n), rankdata(given, axis=0)])
    rest = []
    for values in columns:
        ranks = rankdata(values)
        left = ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0]
        if np.linalg.norm(left) < 1e-9 * np.linalg.norm(ranks):  # only rounding error remains
            return RankCorrelation(float("nan"), float("nan"))
        rest.append(left / np.linalg.norm(left))
    value = float(np.clip(rest[0] @ rest[1], -1.0, 1.0))
    statistic = value * np.sqrt(n_free / max(1.0 - value**2, np.finfo(np.float64).tiny))
    return RankCorrelation(value, float(2.0 * student.sf(abs(statistic), n_free)))
