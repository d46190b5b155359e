"""Scores of several models: a table of colored cells, and differences with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ._figures import _COLORS, _MARKERS, _axes, _finish, _strip

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap


def score_table(
    scores: pd.DataFrame,
    *,
    lower_is_better: tuple[str, ...] = (),
    cmap: str | Colormap = "Blues",
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Draw a table of scores, each column colored from its worst to its best model, the best in bold.

    Parameters
    ----------
    scores
        One row per model, one column per score; NaN where there is none.
    lower_is_better
        Columns in which the smallest value is best.
    cmap
        Sequential color map; the darker end is the better one.
    title
        Title of the axes.
    ax
        Axes to draw on; a new figure by default.
    show
        Whether to call ``matplotlib.pyplot.show``.
    save
        File to write the figure to.

    Returns
    -------
    The axes.

    Raises
    ------
    ValueError
        If the table is empty or not numeric.
    """
    values = scores.to_numpy()
    if values.size == 0 or not np.issubdtype(values.dtype, np.number):
        msg = (
            f"`scores` has shape {values.shape} and type {values.dtype}, but it must be a table of numbers, models by "
            "scores. Pivot the records first."
        )
        raise ValueError(msg)
    n_models, n_scores = values.shape
    sign = np.where([column in lower_is_better for column in scores.columns], -1.0, 1.0)
    better = np.ma.masked_invalid(values * sign)
    low, high = better.min(axis=0), better.max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    shade = np.ma.filled(0.1 + 0.7 * (better - low) / span, np.nan)  # neither white nor too dark for the text

    ax = _axes(ax, figsize=(2.2 + 0.95 * n_scores, 1.6 + 0.32 * n_models))
    ax.imshow(shade, cmap=cmap, vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    for row in range(n_models):
        for column in range(n_scores):
            value = values[row, column]
            is_best = np.isfinite(value) and better[row, column] == high[column]
            ax.text(
                column,
                row,
                f"{value:.{_digits(values[:, column])}f}" if np.isfinite(value) else "-",
                ha="center",
                va="center",
                fontsize=9,
                fontweight="bold" if is_best else "normal",
                color="white" if shade[row, column] > 0.6 else "black",
            )
    names = [f"{name}\n(lower)" if name in lower_is_better else str(name) for name in scores.columns]
    ax.set_xticks(range(n_scores), [name.replace(" ", "\n", 1) for name in names], fontsize=9)
    ax.set_yticks(range(n_models), [str(name) for name in scores.index], fontsize=9)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(n_scores - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(n_models - 1) + 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="minor", length=0)
    return _finish(ax, title, show, save)


def difference_forest(
    differences: Mapping[str, Mapping[str, tuple[float, float, float]]],
    *,
    xlabel: str = "difference",
    legend: bool = True,
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Draw differences with their intervals around a line at zero.

    Parameters
    ----------
    differences
        Mean, lower and upper end of the interval, by row (e.g. a data set) and by model. With an infinite interval only
        the point is drawn.
    xlabel
        Label of the horizontal axis.
    legend
        Whether to draw the legend, to the right of the axes.
    title
        Title of the axes.
    ax
        Axes to draw on; a new figure by default.
    show
        Whether to call ``matplotlib.pyplot.show``.
    save
        File to write the figure to.

    Returns
    -------
    The axes.

    Raises
    ------
    ValueError
        If there is no difference.
    """
    models = list(dict.fromkeys(name for row in differences.values() for name in row))
    if not models:
        msg = f"`differences` has {len(differences)} rows and no value, but it needs one. Pass the differences to draw."
        raise ValueError(msg)
    step = 0.8 / len(models)
    ax = _axes(ax, figsize=(6.4, 1.4 + 0.24 * len(models) * len(differences)))
    ax.axvline(0.0, color="#888888", linewidth=1.0, zorder=0)
    for i, model in enumerate(models):
        found = [(y, row[model]) for y, row in enumerate(differences.values()) if model in row]
        y = np.array([position - 0.4 + (i + 0.5) * step for position, _ in found])
        mean, low, high = np.array([value for _, value in found], dtype=float).T
        reach = np.where(np.isfinite([low, high]), np.abs([mean - low, high - mean]), 0.0)
        ax.errorbar(
            mean,
            y,
            xerr=reach,
            fmt=_MARKERS[i // len(_COLORS) % len(_MARKERS)],
            color=_COLORS[i % len(_COLORS)],
            markersize=4.5,
            linewidth=1.3,
            label=model,
        )
    ax.set_yticks(range(len(differences)), list(differences))
    ax.set_ylim(len(differences) - 0.5, -0.5)
    ax.set_xlabel(xlabel)
    if legend:
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
    ax.tick_params(axis="y", length=0)
    _strip(ax)
    return _finish(ax, title, show, save)


def _digits(values: np.ndarray) -> int:
    return 1 if np.nanmax(np.abs(values), initial=0.0) >= 100 else 3
