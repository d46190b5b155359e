"""Figures of a prior and its chains: modes, activity of spins by group, energies of chains, effective temperature."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ._figures import _COLORS, _LINE_STYLES, _axes, _finish, _strip

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from numpy.typing import ArrayLike


def prior_modes(
    table: pd.DataFrame,
    *,
    n_modes: int = 12,
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Draw the modes of a prior: their shares of the prior and of the cells, and the label of these cells.

    Parameters
    ----------
    table
        Table of :meth:`qbmscvi.QBMSCVI.get_prior_modes`: columns ``energy`` in nats, ``prior_share`` and
        ``cell_share``; with ``label`` and ``label_share`` the most frequent label of the cells is named.
    n_modes
        Largest number of modes to draw: the largest shares of prior and cells together, lowest energy on top.
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
        If a column is missing, the table is empty, or ``n_modes`` is below one.
    """
    missing = [name for name in ("energy", "prior_share", "cell_share") if name not in table]
    if missing or len(table) == 0:
        msg = (
            f"`table` has {len(table)} rows and lacks {missing}, but it must be the table of modes. "
            "Pass `model.get_prior_modes().table`."
        )
        raise ValueError(msg)
    if n_modes < 1:
        msg = (
            f"`n_modes` is out of range: got {n_modes}, but it must be at least 1. The default of 12 suits most priors."
        )
        raise ValueError(msg)
    weight = table["prior_share"] + table["cell_share"]
    shown = table.loc[weight.sort_values(ascending=False, kind="stable").index[:n_modes]]
    shown = shown.sort_values("energy", kind="stable")
    y = np.arange(len(shown))
    ax = _axes(ax, figsize=(5.6, max(2.4, 1.4 + 0.36 * len(shown))))
    ax.barh(y - 0.19, shown["prior_share"], height=0.36, color=_COLORS[0], label="samples of the prior")
    ax.barh(y + 0.19, shown["cell_share"], height=0.36, color=_COLORS[1], label="cells")
    if "label" in shown:
        # Just behind the longer bar, so that the name belongs to the mode and not to one of the bars.
        for position, (_, row) in zip(y, shown.iterrows(), strict=True):
            if isinstance(row["label"], str):
                end = max(row["prior_share"], row["cell_share"])
                text = f"{row['label']} ({row['label_share']:.0%})"
                ax.annotate(text, (end, position), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    ax.set_yticks(y, [f"{energy:.1f}" for energy in shown["energy"]])
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlim(0.0, min(1.0, 1.35 * float(shown[["prior_share", "cell_share"]].to_numpy().max())) or 1.0)
    ax.set(xlabel="share that descends into the mode", ylabel="energy of the mode (nats)")
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, fontsize=9)
    _strip(ax)
    if title is not None:
        ax.set_title(title, pad=26)  # above the legend
    return _finish(ax, None, show, save)


def spin_activity(
    spins: ArrayLike,
    labels: ArrayLike,
    *,
    is_clustered: bool = True,
    cmap: str | Colormap = "RdBu_r",
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Draw the mean of each spin in each group of cells, from -1 (down) to +1 (up).

    Parameters
    ----------
    spins
        Spins or mean spins of the cells, shape ``(n_cells, n_spins)``, values in ``[-1, 1]``: for instance
        ``model.get_latent_representation(representation="mean")``.
    labels
        Group of each cell, shape ``(n_cells,)``. A pandas categorical keeps the order of its categories; cells without
        a group are left out.
    is_clustered
        Whether spins with similar activity are placed next to each other (average linkage), or in their own order.
    cmap
        Diverging color map.
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
        If ``spins`` is no table with values in ``[-1, 1]``, ``labels`` has another length, or no cell has a group.
    """
    values = np.asarray(spins, dtype=np.float64)
    if values.ndim != 2 or values.size == 0 or not (np.abs(values) <= 1.0 + 1e-6).all():
        msg = (
            f"`spins` has shape {values.shape} and values up to {np.abs(values).max(initial=0.0):.3g}, but it must be "
            "cells by spins with values in [-1, 1]. Use representation='mean'."
        )
        raise ValueError(msg)
    groups = pd.Categorical(labels).remove_unused_categories()
    if len(groups) != len(values) or len(groups.categories) == 0:
        msg = (
            f"`labels` has {len(groups)} values in {len(groups.categories)} groups, but there are {len(values)} cells. "
            "Pass one label per cell, in the same order."
        )
        raise ValueError(msg)
    means = pd.DataFrame(values).groupby(groups, observed=True).mean()  # (n_groups, n_spins)
    order = np.arange(values.shape[1])
    if is_clustered and values.shape[1] > 1:
        from scipy.cluster.hierarchy import leaves_list, linkage

        order = leaves_list(linkage(means.to_numpy().T, "average", optimal_ordering=True))
    n_groups, n_spins = means.shape
    ax = _axes(ax, figsize=(float(np.clip(2.0 + 0.13 * n_spins, 4.0, 8.0)), 1.4 + 0.28 * n_groups))
    image = ax.imshow(
        means.to_numpy()[:, order], cmap=cmap, vmin=-1.0, vmax=1.0, aspect="auto", interpolation="nearest"
    )
    bar = ax.figure.colorbar(image, cax=ax.inset_axes((1.02, 0.0, 0.025, 1.0)), label="mean spin", ticks=[-1, 0, 1])
    bar.outline.set_visible(False)
    ax.set_yticks(range(n_groups), [str(name) for name in means.index])
    step = -(-n_spins // 16)  # more numbers would touch
    ax.set_xticks(range(0, n_spins, step), [str(order[i]) for i in range(0, n_spins, step)], fontsize=8)
    ax.set_xlabel("spin")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return _finish(ax, title, show, save)


def cell_scores(
    coordinates: ArrayLike,
    scores: ArrayLike,
    *,
    label: str = "energy E (nats)",
    cmap: str | Colormap = "viridis",
    quantile: float = 0.01,
    size: float | None = None,
    axis_name: str = "embedding",
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Scatter cells in two dimensions, colored by a number, such as their energy under the prior.

    Parameters
    ----------
    coordinates
        Two-dimensional embedding, of shape ``(n_cells, 2)``.
    scores
        Number of each cell, shape ``(n_cells,)``, for instance ``model.get_prior_energy()`` in nats.
    label
        Label of the color bar.
    cmap
        Sequential color map.
    quantile
        Share of the cells at each end that get the color of that end, so that few cells do not stretch the scale.
    size
        Area of a point in square points. By default it falls with the number of cells.
    axis_name
        Name of the embedding, as in ``"UMAP"``.
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
        If shapes do not fit, a score is not finite, or ``quantile`` is not in ``[0, 0.5)``.
    """
    points, values = np.asarray(coordinates, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if points.ndim != 2 or points.shape[1:] != (2,) or values.shape != (len(points),) or len(points) == 0:
        msg = (
            f"`coordinates` has shape {points.shape} and `scores` {values.shape}, but they must be (n_cells, 2) and "
            "(n_cells,). Pass an embedding and one number per cell."
        )
        raise ValueError(msg)
    if not np.isfinite(values).all():
        n_bad = int(np.sum(~np.isfinite(values)))
        msg = f"`scores` has {n_bad} non-finite values, which have no color. Leave these cells out of both arguments."
        raise ValueError(msg)
    if not 0.0 <= quantile < 0.5:
        msg = f"`quantile` is out of range: got {quantile}, but it must be in [0, 0.5). Use 0 for the whole range."
        raise ValueError(msg)
    if size is None:
        size = float(np.clip(24_000 / len(points), 1.0, 16.0))
    low, high = np.quantile(values, [quantile, 1.0 - quantile])
    order = np.random.default_rng(0).permutation(len(points))
    ax = _axes(ax, figsize=(5.0, 4.0))
    drawn = ax.scatter(
        *points[order].T, s=size, c=values[order], cmap=cmap, vmin=low, vmax=high, linewidths=0, rasterized=True
    )
    bar = ax.figure.colorbar(drawn, cax=ax.inset_axes((1.03, 0.0, 0.04, 1.0)), label=label)
    bar.outline.set_visible(False)
    ax.set(xlabel=f"{axis_name} 1", ylabel=f"{axis_name} 2", xticks=[], yticks=[])
    _strip(ax)
    return _finish(ax, title, show, save)


def chain_energies(
    traces: Mapping[str, ArrayLike],
    *,
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Draw the energies of groups of chains over sweeps: median, and the middle half as a band.

    If groups from different starts overlap, their chains have forgotten the start.

    Parameters
    ----------
    traces
        Energies in nats by name of the group, each of shape ``(n_steps, n_chains)``.
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
        If there is no group, or one is not a finite table.
    """
    groups = {name: np.asarray(values, dtype=np.float64) for name, values in traces.items()}
    bad = {
        name: values.shape
        for name, values in groups.items()
        if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all()
    }
    if bad or not groups:
        msg = (
            f"`traces` has {len(groups)} groups, of which these are no finite tables: {bad}. "
            "Pass energies of shape (n_steps, n_chains) by name."
        )
        raise ValueError(msg)
    ax = _axes(ax, figsize=(4.8, 3.4))
    styles = zip(cycle(_COLORS), cycle(_LINE_STYLES), strict=False)
    for (name, values), (color, linestyle) in zip(groups.items(), styles, strict=False):
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], axis=1)
        steps = np.arange(len(values))
        ax.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        ax.plot(steps, middle, color=color, linestyle=linestyle, linewidth=1.5, label=name)
    _count_along(ax)
    ax.set(xlabel="sweeps", ylabel="energy E (nats)")
    ax.legend(frameon=False)
    _strip(ax)
    return _finish(ax, title, show, save)


def effective_beta(
    history: Mapping[str, pd.DataFrame | pd.Series],
    *,
    requested: float = 1.0,
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Draw the inverse temperature of a sampler's answers over epochs, and the requested one.

    Parameters
    ----------
    history
        History of a model trained with a sampler that measures it: ``model.history``.
    requested
        Requested inverse temperature; training requests 1.
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
        If the history has no ``sampling_effective_beta``.
    """
    key = "sampling_effective_beta"
    if key not in history:
        msg = (
            f"The history has no {key!r}: only samplers that measure their temperature write it. Train with a "
            "calibrated one, e.g. `sampler='coherent_ising'`."
        )
        raise ValueError(msg)
    values = pd.to_numeric(pd.DataFrame(history[key]).iloc[:, 0])
    ax = _axes(ax, figsize=(4.8, 3.4))
    ax.axhline(requested, color="#888888", linewidth=1.0, zorder=0)
    epochs = values.index.to_numpy(dtype=np.float64)
    ax.plot(epochs, values.to_numpy(dtype=np.float64), color=_COLORS[0], marker="o", markersize=3.5, linewidth=1.5)
    # The requested line stays in the middle third for any answers.
    reach = 1.5 * max(0.1, float(np.nanmax(np.abs(values - requested), initial=0.0)))
    ax.set_ylim(requested - reach, requested + reach)
    ax.text(1.01, requested, "requested", transform=ax.get_yaxis_transform(), va="center", color="#666666")
    _count_along(ax)
    ax.set(xlabel="epoch", ylabel="effective inverse temperature")
    _strip(ax)
    return _finish(ax, title, show, save)


def _count_along(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
