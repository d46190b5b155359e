"""Differences between two models that were run with the same seeds, with intervals.

Runs of one seed share their split and so are paired; differences are model minus reference. Intervals are 95 %
Student's t: for one data set over the differences of its seeds, for several data sets over the means of the sets. The
latter hold for new data sets. A bootstrap of two to ten numbers would be too narrow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike


class Difference(NamedTuple):
    """Mean difference with its interval, infinitely wide for a single seed.

    ``n`` is the number of seeds of one data set, or the number of data sets.
    """

    mean: float
    low: float
    high: float
    n: int


def paired_difference(model: ArrayLike, reference: ArrayLike) -> Difference:
    """Compare two models on one data set.

    Parameters
    ----------
    model, reference
        A score by seed, shape ``(n_seeds,)`` each, the same seeds in the same order. Pairs with a NaN are left out.

    Returns
    -------
    Mean over seeds with the interval of Student's t, ``n - 1`` degrees of freedom.

    Raises
    ------
    ValueError
        If the lengths differ or no pair is complete.
    """
    model, reference = np.asarray(model, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if model.ndim != 1 or model.shape != reference.shape:
        msg = (
            f"`model` has shape {model.shape} and `reference` {reference.shape}, but both must hold one score for each "
            "of the same seeds. Keep the seeds that both were run with."
        )
        raise ValueError(msg)
    difference = model - reference
    difference = difference[np.isfinite(difference)]
    if not len(difference):
        msg = f"None of {len(model)} pairs is finite, but one is needed. Check that both models have this score."
        raise ValueError(msg)
    return _student(difference)


def pooled_difference(differences: Mapping[str, ArrayLike]) -> Difference:
    """Compare two models over several data sets, each with the same weight.

    Parameters
    ----------
    differences
        Paired differences by data set, shape ``(n_seeds,)`` each; numbers of seeds may differ.

    Returns
    -------
    Mean of the means of the sets with the interval of Student's t, ``n - 1`` degrees of freedom. Of a single set the
    interval is that of :func:`paired_difference`, over its seeds.

    Raises
    ------
    ValueError
        If there is no data set, or one of them has no finite difference.
    """
    sets = {name: np.asarray(values, dtype=np.float64).ravel() for name, values in differences.items()}
    sets = {name: values[np.isfinite(values)] for name, values in sets.items()}
    empty = [name for name, values in sets.items() if not len(values)]
    if empty or not sets:
        msg = (
            f"`differences` has {len(sets)} data sets, of which {empty} have no finite difference, but each must have "
            "one. Leave out what was not run."
        )
        raise ValueError(msg)
    if len(sets) == 1:
        return _student(*sets.values())._replace(n=1)
    return _student(np.array([values.mean() for values in sets.values()]))


def _student(values: np.ndarray) -> Difference:
    mean, n = float(values.mean()), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else np.inf
    return Difference(mean, mean - half, mean + half, n)
