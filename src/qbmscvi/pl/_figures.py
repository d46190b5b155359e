"""Cells, training and energies, and common helpers of all figures."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

# Okabe and Ito (2008), without yellow, which is too faint on white.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_MARKERS = ("o", "^", "s", "X", "P", "v", "D")
_LINE_STYLES = ("-", "--", "-.", ":")
_MISSING_COLOR = "#BBBBBB"
_LEGEND_ROWS = 14


def embedding(
    coordinates: ArrayLike,
    labels: ArrayLike,
    *,
    title: str | None = None,
    palette: Mapping[str, str] | None = None,
    size: float | None = None,
    axis_name: str = "embedding",
    legend: bool = True,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Scatter cells in two dimensions, colored by category.

    Cells are drawn in random (but fixed) order, so that no category hides another by being drawn last.

    Parameters
    ----------
    coordinates
        Two-dimensional embedding, of shape ``(n_cells, 2)``.
    labels
        Category of each cell. A pandas categorical keeps the order of its categories; missing values are drawn in gray.
    title
        Title of the axes.
    palette
        Color of each category, by name. By default color-blind safe colors, and another marker after every seven
        categories.
    size
        Area of a point in square points. By default it falls with the number of cells.
    axis_name
        Name of the embedding, as in ``"UMAP"``; the axes become ``UMAP 1`` and ``UMAP 2``.
    legend
        Whether to draw the legend, to the right of the axes.
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
        If ``coordinates`` is not of shape ``(n_cells, 2)``, ``labels`` has another length, or ``palette`` lacks a
        category.
    """
    coordinates = np.asarray(coordinates, dtype=np.float64)
    if coordinates.ndim != 2 or coordinates.shape[1] != 2:
        msg = (
            f"`coordinates` has shape {coordinates.shape}, but it must have two columns, one per axis of the plane. "
            "Reduce the representation first, for instance with `scanpy.tl.umap`."
        )
        raise ValueError(msg)
    categorical = pd.Categorical(labels).remove_unused_categories()
    if len(categorical) != len(coordinates):
        msg = (
            f"`labels` has {len(categorical)} values, but `coordinates` has {len(coordinates)} cells. "
            "Pass one label per cell, in the same order."
        )
        raise ValueError(msg)
    names = [str(name) for name in categorical.categories]
    if palette is None:
        colors = [_COLORS[i % len(_COLORS)] for i in range(len(names))]
        markers = [_MARKERS[i // len(_COLORS) % len(_MARKERS)] for i in range(len(names))]
    else:
        missing = [name for name in names if name not in palette]
        if missing:
            msg = f"`palette` has no color for {missing}, but it needs one for each of {names}. Add the missing ones."
            raise ValueError(msg)
        colors, markers = [palette[name] for name in names], [_MARKERS[0]] * len(names)
    if (categorical.codes < 0).any():  # the last code stands for missing values
        names, colors, markers = [*names, "missing"], [*colors, _MISSING_COLOR], [*markers, _MARKERS[0]]
    codes = categorical.codes.astype(int) % max(1, len(names))
    if size is None:
        size = float(np.clip(24_000 / max(1, len(coordinates)), 1.0, 16.0))

    n_legend_columns = -(-len(names) // _LEGEND_ROWS) if legend else 0
    # About 0.08 inches per letter, so that long names widen the figure and do not squeeze the cells.
    legend_width = n_legend_columns * (0.4 + 0.08 * max(map(len, names), default=0))
    ax = _axes(ax, figsize=(4.2 + legend_width, 4.0))
    order = np.random.default_rng(0).permutation(len(coordinates))
    cell_colors, cell_markers = np.array(colors, dtype=object)[codes], np.array(markers)[codes]
    for marker in dict.fromkeys(markers):
        cells = order[cell_markers[order] == marker]
        x, y = coordinates[cells].T
        ax.scatter(x, y, s=size, c=list(cell_colors[cells]), marker=marker, linewidths=0, rasterized=True)
    if legend and names:
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], linestyle="", marker=marker, markersize=6, color=color, markeredgewidth=0, label=name)
            for name, color, marker in zip(names, colors, markers, strict=True)
        ]
        ax.legend(
            handles=handles,
            loc="center left",
            bbox_to_anchor=(1.02, 0.5),
            frameon=False,
            handletextpad=0.2,
            ncols=n_legend_columns,
        )
    ax.set(xlabel=f"{axis_name} 1", ylabel=f"{axis_name} 2", xticks=[], yticks=[])
    _strip(ax)
    return _finish(ax, title, show, save)


def training_curves(
    histories: Mapping[str, Mapping[str, pd.DataFrame | pd.Series]],
    key: str = "elbo_validation",
    *,
    ylabel: str | None = None,
    title: str | None = None,
    skip: int = 0,
    errors: Mapping[str, tuple[float, float]] | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Draw one recorded quantity of several training runs over epochs.

    Parameters
    ----------
    histories
        Histories by name of the run, each as in ``model.history``: a mapping from keys to a series, or a table of one
        column, indexed by epoch. Non-finite values leave a gap in the curve.
    key
        Quantity to draw. Runs that did not record it are left out.
    ylabel
        Label of the vertical axis; by default ``key`` with spaces for underscores.
    title
        Title of the axes.
    skip
        Number of recorded values to leave out at the start, where the first epochs would dwarf the rest.
    errors
        Distances below and above the curve of a run, by its name; drawn as a band. For the negative ELBO they are the
        interval of log Z, ``low - value`` and ``high - value``, which shifts the whole curve, not each point.
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
        If no run has ``key``, an entry has more than one column, ``skip`` is negative, or ``errors`` names no run.
    """
    unknown = sorted(set(errors or {}) - set(histories))
    if unknown:
        msg = f"`errors` names {unknown}, but the runs are {sorted(histories)}. Use the names of the histories."
        raise ValueError(msg)
    if skip < 0:
        msg = f"`skip` is out of range: got {skip}, but it must not be negative. Use 0 to draw every recorded value."
        raise ValueError(msg)
    curves = {name: _curve(name, key, history[key]) for name, history in histories.items() if key in history}
    if not curves:
        available = sorted({str(other) for history in histories.values() for other in history})
        msg = (
            f"No history has {key!r}: the {len(histories)} runs given record {available}. "
            "Choose one of these as `key`, or train with validation (`check_val_every_n_epoch=1`)."
        )
        raise ValueError(msg)

    ax = _axes(ax, figsize=(4.8, 3.4))
    for i, (name, curve) in enumerate(curves.items()):
        values = curve.iloc[skip:]
        ax.plot(
            values.index.to_numpy(dtype=np.float64),
            values.to_numpy(dtype=np.float64),
            color=_COLORS[i % len(_COLORS)],
            linestyle=_LINE_STYLES[i // len(_COLORS) % len(_LINE_STYLES)],
            # a single recorded value has no line to show
            marker="o" if len(values) == 1 else None,
            linewidth=1.5,
            label=name,
        )
        if name in (errors or {}):
            below, above = errors[name]
            center = values.to_numpy(dtype=np.float64)
            ax.fill_between(
                values.index.to_numpy(dtype=np.float64),
                center - abs(below),
                center + abs(above),
                color=_COLORS[i % len(_COLORS)],
                alpha=0.2,
                linewidth=0,
            )
    ax.set(xlabel="epoch", ylabel=key.replace("_", " ") if ylabel is None else ylabel)
    ax.legend(frameon=False)
    _strip(ax)
    return _finish(ax, title, show, save)


def energy_histogram(
    energies: Mapping[str, ArrayLike],
    *,
    bins: int = 50,
    density: bool = True,
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Overlay histograms of energies on common bins.

    Parameters
    ----------
    energies
        Energies in nats by name of the group, for instance ``{"data": ..., "prior samples": ...}``.
    bins
        Number of bins, from the lowest to the highest energy of all groups.
    density
        Whether every histogram has area one, so that groups of different sizes compare; else counts.
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
        If there is no group, a group is empty or has non-finite energies, or ``bins`` is below one.
    """
    groups = {name: np.asarray(values, dtype=np.float64).ravel() for name, values in energies.items()}
    if not groups:
        msg = "`energies` is empty, but it must hold at least one group. Pass a mapping such as {'data': energies}."
        raise ValueError(msg)
    for name, values in groups.items():
        if len(values) == 0 or not np.isfinite(values).all():
            n_bad = int(np.sum(~np.isfinite(values)))
            msg = (
                f"`energies[{name!r}]` has {len(values)} values, {n_bad} of them non-finite, but every group must hold "
                "finite energies. Look for a diverged prior, or leave the group out."
            )
            raise ValueError(msg)
    if bins < 1:
        msg = f"`bins` is out of range: got {bins}, but it must be at least 1. The default of 50 suits most data."
        raise ValueError(msg)

    edges = np.histogram_bin_edges(np.concatenate(list(groups.values())), bins=bins)
    ax = _axes(ax, figsize=(4.8, 3.4))
    styles = zip(cycle(_COLORS), cycle(_LINE_STYLES), strict=False)
    for (name, values), (color, linestyle) in zip(groups.items(), styles, strict=False):
        ax.hist(
            values,
            bins=edges.tolist(),
            density=density,
            histtype="step",
            color=color,
            linestyle=linestyle,
            linewidth=1.5,
            label=name,
        )
    ax.set(xlabel="energy E (nats)", ylabel="density" if density else "count")
    ax.legend(frameon=False)
    _strip(ax)
    return _finish(ax, title, show, save)


def _curve(name: str, key: str, values: pd.DataFrame | pd.Series) -> pd.Series:
    if isinstance(values, pd.DataFrame):
        if values.shape[1] != 1:
            msg = (
                f"The history {key!r} of {name!r} has {values.shape[1]} columns, but exactly one is allowed. "
                "Select the column to draw."
            )
            raise ValueError(msg)
        values = values.iloc[:, 0]
    return pd.to_numeric(pd.Series(values))


def _axes(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=figsize, layout="constrained")[1]


def _strip(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)


def _finish(ax: Axes, title: str | None, show: bool | None, save: str | os.PathLike[str] | None) -> Axes:
    if title is not None:
        ax.set_title(title)
    if save is not None:
        # through the canvas, because the axes may be in a subfigure, which cannot be saved
        ax.figure.canvas.figure.savefig(save, dpi=150, bbox_inches="tight")
    if show:
        import matplotlib.pyplot as plt

        plt.show()
    return ax
