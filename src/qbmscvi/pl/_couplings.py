"""Couplings as an image, in the order of their communities or of the caller."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from ._figures import _axes, _finish

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from numpy.typing import ArrayLike

_MAX_NAMED_TICKS = 24


def coupling_matrix(
    matrix: ArrayLike,
    *,
    order: Sequence[int] | np.ndarray | Literal["communities"] | None = None,
    row_order: Sequence[int] | np.ndarray | None = None,
    xlabel: str = "spin",
    ylabel: str = "spin",
    colorbar_label: str = "J",
    limit: float | None = None,
    cmap: str | Colormap = "RdBu_r",
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Draw couplings as an image whose colors are centered at zero.

    Parameters
    ----------
    matrix
        Couplings, of shape ``(n_spins, n_spins)``, or ``(n_rows, n_spins)`` for couplings to another layer.
    order
        Order of the columns, a permutation; also of the rows if ``matrix`` is square and ``row_order`` is not given.
        ``"communities"`` orders both axes by groups with strong couplings of any sign, the largest first, with lines
        between them. The groups come from :func:`networkx.community.louvain_communities` on the magnitudes. In a
        symmetric matrix rows and columns are the same spins; otherwise they are two layers, and a group may hold units
        of both. Ticks then show the numbers of the units.
    row_order
        Order of the rows, a permutation.
    xlabel
        Label of the horizontal axis.
    ylabel
        Label of the vertical axis, for instance ``"hidden spin"``.
    colorbar_label
        Label of the color bar, for instance ``"W"``.
    limit
        Value at the ends of the color scale, which runs from ``-limit`` to ``limit``. By default the largest magnitude.
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
        If ``matrix`` is not a non-empty finite table, ``order`` or ``row_order`` is not a permutation of its axis,
        ``row_order`` is given with ``"communities"``, or ``limit`` is not positive.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0 or not np.isfinite(matrix).all():
        state = "non-finite values" if matrix.ndim == 2 and matrix.size else f"shape {matrix.shape}"
        msg = f"`matrix` has {state}, but it must be a finite, non-empty table of rows by spins. Check the couplings."
        raise ValueError(msg)
    borders = None
    if isinstance(order, str):
        if order != "communities" or row_order is not None:
            msg = (
                f"order={order!r} with row_order={row_order!r} is no order of both axes. "
                "Use order='communities' alone, or permutations."
            )
            raise ValueError(msg)
        row_groups, column_groups = _communities(matrix)
        row_order, order = np.concatenate(row_groups), np.concatenate(column_groups)
        borders = [np.cumsum([len(group) for group in groups])[:-1] - 0.5 for groups in (row_groups, column_groups)]
    elif row_order is None and matrix.shape[0] == matrix.shape[1]:
        row_order = order
    columns = _permutation("order", order, matrix.shape[1])
    rows = _permutation("row_order", row_order, matrix.shape[0])
    if limit is None:
        limit = float(np.abs(matrix).max()) or 1.0  # an all-zero matrix still needs a scale
    if not limit > 0:
        msg = f"`limit` is out of range: got {limit}, but it must be positive. Leave it out for the largest magnitude."
        raise ValueError(msg)

    n_rows, n_columns = matrix.shape
    ax = _axes(ax, figsize=(4.8, float(np.clip(4.0 * n_rows / n_columns, 1.8, 6.0))))
    image = ax.imshow(
        matrix[np.ix_(rows, columns)],
        cmap=cmap,
        vmin=-limit,
        vmax=limit,
        interpolation="nearest",
        aspect="equal" if n_rows == n_columns else "auto",
    )
    # An inset is as tall as an image of any shape.
    bar = ax.figure.colorbar(image, cax=ax.inset_axes((1.03, 0.0, 0.04, 1.0)), label=colorbar_label)
    bar.outline.set_visible(False)
    if borders:
        for position in np.unique(borders[0]):
            ax.axhline(position, color="#444444", linewidth=0.8)
        for position in np.unique(borders[1]):
            ax.axvline(position, color="#444444", linewidth=0.8)
    _name_ticks(ax.xaxis, order)
    _name_ticks(ax.yaxis, row_order)
    ax.set(xlabel=f"{xlabel} (reordered)" if order is not None else xlabel)
    ax.set(ylabel=f"{ylabel} (reordered)" if row_order is not None else ylabel)
    return _finish(ax, title, show, save)


def _communities(matrix: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows and columns of each community, the largest community first and the strongest unit of each first."""
    import networkx as nx

    n_rows, n_columns = matrix.shape
    weights = np.abs(matrix)
    is_one_layer = n_rows == n_columns and np.array_equal(matrix, matrix.T)
    if is_one_layer:
        np.fill_diagonal(weights, 0.0)
    offset = 0 if is_one_layer else n_rows  # columns are separate nodes after the rows
    graph = nx.Graph()
    graph.add_nodes_from(range(n_columns + offset))
    graph.add_weighted_edges_from((i, j + offset, weights[i, j]) for i, j in zip(*weights.nonzero(), strict=True))
    strength = dict(graph.degree(weight="weight"))
    found = nx.community.louvain_communities(graph, weight="weight", seed=0)
    # Equal communities keep the order of their first unit.
    groups = sorted(
        (sorted(group, key=lambda i: (-strength[i], i)) for group in found), key=lambda g: (-len(g), min(g))
    )
    rows = [np.array([i for i in group if i < n_rows], dtype=int) for group in groups]
    columns = [np.array([i - offset for i in group if i >= offset], dtype=int) for group in groups]
    return rows, columns


def _name_ticks(axis: Axis, order: Sequence[int] | np.ndarray | None) -> None:
    """Mark places by whole numbers; if units are reordered, by the numbers of the units."""
    if order is None:
        from matplotlib.ticker import MaxNLocator

        axis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        return
    places = range(0, len(order), -(-len(order) // _MAX_NAMED_TICKS))
    axis.set_ticks(places, [str(int(order[place])) for place in places], fontsize=7)


def _permutation(name: str, order: Sequence[int] | np.ndarray | None, length: int) -> np.ndarray:
    if order is None:
        return np.arange(length)
    order = np.asarray(order)
    if order.shape != (length,) or not np.array_equal(np.sort(order), np.arange(length)):
        msg = (
            f"`{name}` is not a permutation: got shape {order.shape}, but it must hold each of 0 to {length - 1} once. "
            "Use `numpy.argsort` of a value per spin to make one."
        )
        raise ValueError(msg)
    return order.astype(int)
