"""Figures: what is drawn is what was given."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from tables import over

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.testing.compare import compare_images

from qbmscvi import pl

IMAGES = Path(__file__).parent / "images"


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def history(values, key="elbo_validation"):
    epochs = pd.RangeIndex(1, len(values) + 1, name="epoch")
    return {key: pd.DataFrame({key: values}, index=epochs)}


def legend_names(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def drawn_points(ax):
    """Map every drawn point to its color."""
    return {
        tuple(point): to_hex(color)
        for collection in ax.collections
        for point, color in zip(collection.get_offsets().tolist(), collection.get_facecolors(), strict=True)
    }


MATRIX = np.arange(6.0).reshape(2, 3) - 1
MODES = pd.DataFrame(
    {
        "energy": [-9.0, -7.5, -3.0],
        "prior_share": [0.6, 0.3, 0.1],
        "cell_share": [0.5, 0.5, 0.0],
        "label": ["root", "trunk", None],
        "label_share": [0.9, 0.6, np.nan],
    }
)
CALLS = {
    "embedding": lambda **kwargs: pl.embedding(np.eye(2), ["a", "b"], **kwargs),
    "training_curves": lambda **kwargs: pl.training_curves({"run": history([3.0, 2.0])}, **kwargs),
    "coupling_matrix": lambda **kwargs: pl.coupling_matrix(MATRIX, **kwargs),
    "difference_forest": lambda **kwargs: pl.difference_forest({"set": {"model": (0.1, 0.0, 0.2)}}, **kwargs),
    "score_table": lambda **kwargs: pl.score_table(pd.DataFrame({"score": [0.1, 0.2]}), **kwargs),
    "energy_histogram": lambda **kwargs: pl.energy_histogram({"data": [0.0, 1.0]}, **kwargs),
    "cell_scores": lambda **kwargs: pl.cell_scores(np.eye(2), [0.0, 1.0], **kwargs),
    "chain_energies": lambda **kwargs: pl.chain_energies({"group": [[1.0, 2.0], [0.0, 1.0]]}, **kwargs),
    "effective_beta": lambda **kwargs: pl.effective_beta(history([0.7, 1.1], "sampling_effective_beta"), **kwargs),
    "prior_modes": lambda **kwargs: pl.prior_modes(MODES, **kwargs),
    "spin_activity": lambda **kwargs: pl.spin_activity(np.eye(3), ["a", "b", "b"], **kwargs),
}
each_function = over("call", [pytest.param(call, id=name) for name, call in CALLS.items()])


def test_every_public_function_is_in_the_table():
    assert set(CALLS) | {"generated"} == set(pl.__all__)  # which has tests of its own: it draws on two axes


@each_function
def test_given_axes_are_drawn_on_and_returned(call):
    plt.close("all")
    figure, axes = plt.subplots(1, 2)
    assert call(ax=axes[1], title="a title") is axes[1]
    assert axes[1].get_title() == "a title"
    assert not axes[0].has_data()
    assert plt.get_fignums() == [figure.number]


@each_function
def test_figure_is_saved(call, tmp_path):
    call(save=tmp_path / "figure.png")
    image = plt.imread(tmp_path / "figure.png")
    assert image[..., :3].std() > 0


@over("call", list(CALLS.values())[:3], list(CALLS)[:3])
def test_whole_figure_is_saved_from_a_subfigure(call, tmp_path):
    ax = plt.figure().subfigures(1, 2)[0].subplots()
    assert call(ax=ax, save=tmp_path / "figure.png") is ax
    assert (tmp_path / "figure.png").stat().st_size > 0


@each_function
def test_window_opens_only_on_request(call, monkeypatch):
    calls = []
    monkeypatch.setattr(plt, "show", lambda: calls.append("show"))
    call()
    call(show=False)
    assert calls == []
    call(show=True)
    assert calls == ["show"]


def test_module_stands_alone_and_sets_no_backend():
    """Loaded by its path, so that the parent package is not imported either."""
    code = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("pl_alone", sys.argv[1])
sys.modules["pl_alone"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["pl_alone"])
forbidden = {"qbmscvi", "scanpy", "anndata", "scvi", "torch", "matplotlib.pyplot"}
print(sorted(forbidden & set(sys.modules)))
"""
    path = find_spec("qbmscvi.pl").origin
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_embedding_draws_every_cell_in_the_color_of_its_category():
    coordinates = np.random.default_rng(0).normal(size=(30, 2))
    labels = pd.Categorical(np.repeat(["b", "a", "c"], 10), categories=["c", "b", "a", "unused"])
    ax = pl.embedding(coordinates, labels, palette={"a": "#ff0000", "b": "#00ff00", "c": "#0000ff"}, axis_name="UMAP")
    points = drawn_points(ax)
    assert len(points) == 30
    expected = np.repeat(["#00ff00", "#ff0000", "#0000ff"], 10)
    assert [points[tuple(point)] for point in coordinates.tolist()] == list(expected)
    assert legend_names(ax) == ["c", "b", "a"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("UMAP 1", "UMAP 2")


def test_embedding_tells_many_categories_apart():
    names = [f"type {i:02d}" for i in range(20)]
    ax = pl.embedding(np.random.default_rng(0).normal(size=(200, 2)), names * 10)
    handles = ax.get_legend().legend_handles
    assert legend_names(ax) == names
    assert len({(handle.get_color(), handle.get_marker()) for handle in handles}) == 20
    assert sum(len(collection.get_offsets()) for collection in ax.collections) == 200


def test_embedding_draws_missing_labels_in_gray():
    coordinates = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    ax = pl.embedding(coordinates, ["a", None, np.nan])
    assert legend_names(ax) == ["a", "missing"]
    points = drawn_points(ax)
    assert points[1.0, 1.0] == points[2.0, 2.0] == "#bbbbbb"
    assert points[0.0, 0.0] != "#bbbbbb"


def test_embedding_can_go_without_a_legend():
    assert pl.embedding(np.eye(2), ["a", "b"], legend=False).get_legend() is None


def test_training_curves_draw_the_recorded_values():
    histories = {"SCVI": history([5.0, 3.0, 2.0]), "QBMSCVI": {"elbo_validation": pd.Series([4.0, np.nan, 1.0])}}
    ax = pl.training_curves(histories)
    first, second = ax.get_lines()
    np.testing.assert_array_equal(first.get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(first.get_ydata(), [5, 3, 2])
    np.testing.assert_array_equal(second.get_ydata(), [4, np.nan, 1])
    assert first.get_color() != second.get_color()
    assert legend_names(ax) == ["SCVI", "QBMSCVI"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "elbo validation")


def test_training_curves_leave_out_runs_and_values_on_request():
    histories = {"SCVI": history([5.0, 3.0], key="kl_local"), "QBMSCVI": history([9.0, 4.0, 3.0])}
    ax = pl.training_curves(histories, skip=1, ylabel="ELBO (nats)")
    (line,) = ax.get_lines()
    np.testing.assert_array_equal(line.get_xdata(), [2, 3])
    assert legend_names(ax) == ["QBMSCVI"]
    assert ax.get_ylabel() == "ELBO (nats)"


def test_training_curve_of_one_value_is_visible():
    (line,) = pl.training_curves({"run": history([2.0])}).get_lines()
    assert line.get_marker() == "o"


def test_coupling_colors_are_centered_at_zero():
    image = pl.coupling_matrix([[0.0, -3.0], [1.0, 0.0]]).get_images()[0]
    assert image.get_clim() == (-3.0, 3.0)
    np.testing.assert_allclose(image.cmap(image.norm(0.0)), image.cmap(0.5))
    assert pl.coupling_matrix(np.zeros((2, 2))).get_images()[0].get_clim() == (-1.0, 1.0)
    assert pl.coupling_matrix(MATRIX, limit=0.5).get_images()[0].get_clim() == (-0.5, 0.5)


def test_coupling_axes_are_named():
    ax = pl.coupling_matrix(np.eye(3))
    bar = ax.get_images()[0].colorbar
    assert (ax.get_xlabel(), ax.get_ylabel(), bar.ax.get_ylabel()) == ("spin", "spin", "J")
    ax = pl.coupling_matrix(MATRIX, ylabel="hidden spins", colorbar_label="W", order=[2, 1, 0])
    bar = ax.get_images()[0].colorbar
    assert (ax.get_xlabel(), ax.get_ylabel(), bar.ax.get_ylabel()) == ("spin (reordered)", "hidden spins", "W")


def test_order_permutes_both_axes_of_a_square_matrix_and_columns_otherwise():
    square, order = np.arange(9.0).reshape(3, 3), np.array([2, 0, 1])
    drawn = pl.coupling_matrix(square, order=order).get_images()[0].get_array()
    np.testing.assert_array_equal(drawn, square[order][:, order])
    drawn = pl.coupling_matrix(square, order=order, row_order=[0, 1, 2]).get_images()[0].get_array()
    np.testing.assert_array_equal(drawn, square[:, order])
    drawn = pl.coupling_matrix(MATRIX, order=order).get_images()[0].get_array()
    np.testing.assert_array_equal(drawn, MATRIX[:, order])
    drawn = pl.coupling_matrix(MATRIX, row_order=[1, 0]).get_images()[0].get_array()
    np.testing.assert_array_equal(drawn, MATRIX[::-1])


@pytest.mark.parametrize("n_rows", [pytest.param(None, id="one-layer"), pytest.param(9, id="two-layers")])
def test_communities_that_were_planted_stand_together(n_rows):
    """Three groups with couplings of either sign, weak noise between them, all units shuffled."""
    rng = np.random.default_rng(0)
    of_column = rng.permutation(np.repeat([0, 1, 2], [8, 5, 3]))
    of_row = of_column if n_rows is None else rng.permutation(np.repeat([0, 1, 2], [4, 3, 2]))
    shape = (len(of_row), len(of_column))
    strength = np.where(of_row[:, None] == of_column, 1.0, 0.05)
    matrix = strength * rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 1.0, shape)
    if n_rows is None:
        matrix = np.triu(matrix, 1) + np.triu(matrix, 1).T
    ax = pl.coupling_matrix(matrix, order="communities")
    columns, rows = ([int(label.get_text()) for label in axis.get_ticklabels()] for axis in (ax.xaxis, ax.yaxis))
    assert (sorted(columns), sorted(rows)) == (list(range(shape[1])), list(range(shape[0])))
    assert of_column[columns].tolist() == sorted(of_column)  # the largest first, and none in two pieces
    assert of_row[rows].tolist() == sorted(of_row)
    np.testing.assert_array_equal(ax.get_images()[0].get_array(), matrix[np.ix_(rows, columns)])
    across = sorted(line.get_ydata()[0] for line in ax.get_lines() if len(set(line.get_ydata())) == 1)
    down = sorted(line.get_xdata()[0] for line in ax.get_lines() if len(set(line.get_xdata())) == 1)
    assert across == [i + 0.5 for i in range(len(rows) - 1) if of_row[rows[i]] != of_row[rows[i + 1]]]
    assert down == [i + 0.5 for i in range(len(columns) - 1) if of_column[columns[i]] != of_column[columns[i + 1]]]


def test_communities_exist_without_couplings():
    assert len(pl.coupling_matrix(np.zeros((3, 4)), order="communities").get_images()) == 1


def test_histograms_share_their_bins_and_have_area_one():
    rng = np.random.default_rng(0)
    energies = {"data": rng.normal(-10, 2, size=500), "prior samples": rng.normal(-4, 1, size=(50, 2))}
    ax = pl.energy_histogram(energies, bins=20)
    outlines = [patch.get_xy() for patch in ax.patches]
    assert len(outlines) == 2
    edges = [np.unique(outline[:, 0]) for outline in outlines]
    np.testing.assert_allclose(edges[0], edges[1])
    assert edges[0][0] == min(values.min() for values in energies.values())
    assert edges[0][-1] == max(values.max() for values in energies.values())
    for outline in outlines:
        x, y = outline.T
        assert abs(np.trapezoid(y, x)) == pytest.approx(1)
    assert sorted(legend_names(ax)) == ["data", "prior samples"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("energy E (nats)", "density")


def test_histograms_count_on_request():
    ax = pl.energy_histogram({"data": [0.0, 0.0, 1.0]}, bins=2, density=False)
    assert ax.patches[0].get_xy()[:, 1].max() == 2
    assert ax.get_ylabel() == "count"


def test_modes_are_drawn_from_the_lowest_with_their_shares_and_labels():
    ax = pl.prior_modes(MODES.iloc[::-1], n_modes=2)
    prior, cells = (container.datavalues.tolist() for container in ax.containers)
    assert (prior, cells) == ([0.6, 0.3], [0.5, 0.5])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["-9.0", "-7.5"]
    assert ax.yaxis_inverted()
    assert {text.get_text(): text.xy for text in ax.texts} == {"root (90%)": (0.6, 0), "trunk (60%)": (0.5, 1)}
    assert legend_names(ax) == ["samples of the prior", "cells"]
    assert not pl.prior_modes(MODES[["energy", "prior_share", "cell_share"]]).texts


def test_activity_is_the_mean_spin_of_each_group_in_the_order_on_the_axis():
    rng = np.random.default_rng(0)
    spins = np.where(rng.random((40, 6)) < 0.5, 1.0, -1.0)
    labels = pd.Categorical(np.repeat(["b", "a", None, "b"], 10), categories=["b", "a", "unused"])
    for is_clustered in (True, False):
        ax = pl.spin_activity(spins, labels, is_clustered=is_clustered)
        order = [int(label.get_text()) for label in ax.get_xticklabels()]
        assert sorted(order) == list(range(6))
        assert is_clustered or order == list(range(6))
        expected = np.stack([spins[np.r_[0:10, 30:40]].mean(0), spins[10:20].mean(0)])
        np.testing.assert_allclose(ax.get_images()[0].get_array(), expected[:, order])
        assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a"]
        assert ax.get_images()[0].get_clim() == (-1.0, 1.0)


def test_scores_color_the_cells_they_belong_to():
    coordinates = np.random.default_rng(0).normal(size=(50, 2))
    scores = np.arange(50.0)
    (drawn,) = pl.cell_scores(coordinates, scores, quantile=0.0).collections
    by_point = dict(zip(map(tuple, drawn.get_offsets().tolist()), drawn.get_array(), strict=True))
    assert [by_point[tuple(point)] for point in coordinates.tolist()] == scores.tolist()
    assert drawn.get_clim() == (0.0, 49.0)
    assert pl.cell_scores(coordinates, scores, quantile=0.2).collections[0].get_clim() == pytest.approx((9.8, 39.2))


def test_chain_energies_draw_the_middle_half_of_each_group():
    values = np.random.default_rng(0).normal(size=(7, 41))
    ax = pl.chain_energies({"one": values, "two": values + 5})
    first, second = (line.get_ydata() for line in ax.get_lines())
    np.testing.assert_allclose(first, np.median(values, axis=1))
    np.testing.assert_allclose(second, first + 5)
    edges = ax.collections[0].get_paths()[0].vertices
    at_two = edges[edges[:, 0] == 2, 1]
    assert at_two.min() == pytest.approx(np.quantile(values[2], 0.25))
    assert at_two.max() == pytest.approx(np.quantile(values[2], 0.75))


def test_effective_beta_is_drawn_around_the_one_asked_for():
    ax = pl.effective_beta(history([0.7, 1.1], "sampling_effective_beta"))
    asked, line = ax.get_lines()
    assert set(asked.get_ydata()) == {1.0}
    np.testing.assert_array_equal(line.get_ydata(), [0.7, 1.1])
    assert np.mean(ax.get_ylim()) == pytest.approx(1.0)


def test_errors_of_a_curve_are_a_band_around_it():
    ax = pl.training_curves({"a": history([3.0, 2.0]), "b": history([4.0, 1.0])}, errors={"b": (-0.5, 1.0)})
    (band,) = ax.collections
    edges = band.get_paths()[0].vertices
    assert (edges[:, 1].min(), edges[:, 1].max()) == (0.5, 5.0)


@pytest.fixture
def kinds():
    """80 real cells of three types, and 60 generated ones: in place of `z` more of `x`."""
    from anndata import AnnData

    rng = np.random.default_rng(0)
    rates = np.kron(np.eye(3), np.full(8, 40.0)) + 1.0  # (3, 24)

    def draw(n_each):
        types = np.repeat(["x", "y", "z"], n_each)
        X = rng.poisson(np.repeat(rates, n_each, axis=0)).astype(np.float32)
        return AnnData(X, obs=pd.DataFrame({"type": types}, index=[f"cell_{i}" for i in range(len(X))]))

    real, generated = draw([40, 24, 16]), draw([48, 12, 0])
    del generated.obs["type"]
    return real, generated


def bars(ax):
    return [container.datavalues.tolist() for container in ax.containers]


def test_shares_of_generated_types_are_predicted_or_read(kinds):
    """60 of 80 real cells are drawn, as many as generated ones; types are far apart, so predictions are exact."""
    real, generated = kinds
    real.X = sparse.csr_matrix(real.X)
    cells, shares = pl.generated(real, generated, label_key="type", title="a title")
    assert [label.get_text() for label in shares.get_yticklabels()] == ["x", "y", "z"]
    of_real, of_generated = bars(shares)
    assert of_generated == pytest.approx([0.8, 0.2, 0.0])
    assert of_real == pytest.approx([0.5, 0.3, 0.2], abs=0.12)
    assert sum(of_real) == pytest.approx(1.0)
    assert legend_names(shares) == ["real", "generated"]
    assert cells.get_title() == "a title"
    colors = list(drawn_points(cells).values())
    assert sorted(colors.count(to_hex(container[0].get_facecolor())) for container in shares.containers) == [60, 60]
    generated.obs["type"] = ["z"] * 20 + ["new"] * 40
    _, shares = pl.generated(real, generated, label_key="type")
    assert [label.get_text() for label in shares.get_yticklabels()] == ["x", "y", "z", "new"]
    assert bars(shares)[1] == pytest.approx([0.0, 0.0, 1 / 3, 2 / 3])


def test_generated_cells_are_drawn_on_given_axes_or_alone_and_saved(kinds, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append("show"))
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    (alone,) = pl.generated(*kinds, save=tmp_path / "figure.png")
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert legend_names(alone) == ["real", "generated"]
    assert (tmp_path / "figure.png").stat().st_size > 0
    _, axes = plt.subplots(1, 2)
    assert pl.generated(*kinds, label_key="type", axes=axes, show=True) == list(axes)
    assert shown == ["show"]


def test_generated_cells_that_cannot_be_drawn_are_refused(kinds):
    real, generated = kinds
    for call, message in (
        (lambda: pl.generated(real, generated[:, ::-1]), "24 genes that are not the 24 of `real` in their order"),
        (lambda: pl.generated(real, generated, label_key="kind"), "label_key='kind' is no column"),
        (lambda: pl.generated(real, generated, layer="counts"), "layer='counts' is no layer of `real`"),
        (lambda: pl.generated(real, generated, axes=plt.figure().subplots(1, 2)), "`axes` has 2 axes, but 1 are"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def draw_modes():
    return pl.prior_modes(MODES, title="modes")


def draw_activity():
    rng = np.random.default_rng(0)
    centers = rng.choice([-0.8, 0.8], (3, 12))
    labels = np.repeat(["root", "trunk", "branch"], 20)
    return pl.spin_activity(np.clip(np.repeat(centers, 20, axis=0) + 0.1 * rng.normal(size=(60, 12)), -1, 1), labels)


def draw_chains():
    rng = np.random.default_rng(0)
    decay = np.exp(-np.arange(20) / 4)[:, None]
    return pl.chain_energies(
        {name: start * decay + rng.normal(size=(20, 60)) for name, start in [("up", 6), ("down", -4)]}
    )


def draw_communities():
    rng = np.random.default_rng(0)
    is_inside = rng.integers(0, 3, 8)[:, None] == rng.integers(0, 3, 12)
    return pl.coupling_matrix(np.where(is_inside, 1.0, 0.1) * rng.normal(size=(8, 12)), order="communities")


@pytest.mark.skipif(mpl.__version_info__[:2] < (3, 11), reason="letters were narrower before, and axes wider")
@pytest.mark.parametrize(
    "draw", [draw_modes, draw_activity, draw_chains, draw_communities], ids=lambda draw: draw.__name__
)
def test_picture_is_the_one_that_was_looked_at(draw, tmp_path):
    """Root mean square of the difference at most 8 of 255: other versions draw letters a little differently.

    To renew a reference after a change, save the figure over it, and look at it.
    """
    reference = IMAGES / f"{draw.__name__}.png"
    ax = draw()
    ax.figure.savefig(tmp_path / reference.name, dpi=60)
    assert compare_images(str(reference), str(tmp_path / reference.name), tol=8) is None
    ax.set_xlim(*(2 * np.array(ax.get_xlim())))  # half as large: the tolerance must not forgive that
    ax.figure.savefig(tmp_path / reference.name, dpi=60)
    assert compare_images(str(reference), str(tmp_path / reference.name), tol=8) is not None


BAD_CALLS = [
    pytest.param(lambda: pl.embedding(np.eye(3), list("abc")), r"`coordinates` has shape \(3, 3\)", id="3-d-embedding"),
    pytest.param(lambda: pl.embedding(np.eye(2), ["a"]), "`labels` has 1 values, .* 2 cells", id="labels-length"),
    pytest.param(
        lambda: pl.embedding(np.eye(2), ["a", "b"], palette={"a": "red"}),
        r"`palette` has no color for \['b'\]",
        id="palette",
    ),
    pytest.param(
        lambda: pl.training_curves({"run": history([1.0], key="kl_local")}),
        r"No history has 'elbo_validation': the 1 runs given record \['kl_local'\]",
        id="unknown-key",
    ),
    pytest.param(
        lambda: pl.training_curves({"run": {"elbo_validation": pd.DataFrame(np.eye(2))}}),
        "'elbo_validation' of 'run' has 2 columns",
        id="two-columns",
    ),
    pytest.param(lambda: pl.training_curves({"run": history([1.0])}, skip=-1), "`skip` is out of range", id="skip"),
    pytest.param(lambda: pl.coupling_matrix(np.ones(3)), r"`matrix` has shape \(3,\)", id="flat-matrix"),
    pytest.param(lambda: pl.coupling_matrix(np.ones((0, 3))), r"`matrix` has shape \(0, 3\)", id="empty-matrix"),
    pytest.param(lambda: pl.coupling_matrix([[np.nan]]), "`matrix` has non-finite values", id="nan-matrix"),
    pytest.param(lambda: pl.coupling_matrix(MATRIX, order=[0, 0, 1]), "`order` is not a permutation", id="order"),
    pytest.param(lambda: pl.coupling_matrix(MATRIX, row_order=[0]), "`row_order` is not a permutation", id="row-order"),
    pytest.param(lambda: pl.coupling_matrix(MATRIX, order="cluster"), "order='cluster' with", id="order-name"),
    pytest.param(
        lambda: pl.coupling_matrix(MATRIX, order="communities", row_order=[0, 1]),
        r"row_order=\[0, 1\] is no order of both axes",
        id="two-row-orders",
    ),
    pytest.param(lambda: pl.coupling_matrix(MATRIX, limit=0.0), r"`limit` is out of range: got 0\.0", id="limit"),
    pytest.param(lambda: pl.energy_histogram({}), "`energies` is empty", id="no-group"),
    pytest.param(lambda: pl.energy_histogram({"data": []}), r"`energies\['data'\]` has 0 values", id="empty-group"),
    pytest.param(
        lambda: pl.energy_histogram({"data": [np.inf, 0.0]}), "has 2 values, 1 of them non-finite", id="inf-energy"
    ),
    pytest.param(lambda: pl.energy_histogram({"data": [0.0]}, bins=0), "`bins` is out of range: got 0", id="bins"),
    pytest.param(lambda: pl.prior_modes(MODES[["energy"]]), r"lacks \['prior_share', 'cell_share'\]", id="no-shares"),
    pytest.param(lambda: pl.prior_modes(MODES[:0]), "has 0 rows", id="no-modes"),
    pytest.param(lambda: pl.prior_modes(MODES, n_modes=0), "`n_modes` is out of range: got 0", id="n-modes"),
    pytest.param(lambda: pl.spin_activity([[3.0]], ["a"]), "values up to 3", id="logits"),
    pytest.param(lambda: pl.spin_activity(np.eye(2), ["a"]), "1 values in 1 groups, .* 2 cells", id="activity-labels"),
    pytest.param(lambda: pl.spin_activity(np.eye(2), [None, None]), "in 0 groups", id="no-group-of-cells"),
    pytest.param(lambda: pl.cell_scores(np.eye(2), [1.0]), r"\(2, 2\) and `scores` \(1,\)", id="scores-length"),
    pytest.param(lambda: pl.cell_scores(np.eye(2), [1.0, np.nan]), "1 non-finite", id="nan-score"),
    pytest.param(lambda: pl.cell_scores(np.eye(2), [1.0, 2.0], quantile=0.5), "`quantile` is out of", id="quantile"),
    pytest.param(lambda: pl.chain_energies({}), "`traces` has 0 groups", id="no-traces"),
    pytest.param(lambda: pl.chain_energies({"a": [1.0]}), r"no finite tables: \{'a': \(1,\)\}", id="flat-trace"),
    pytest.param(lambda: pl.effective_beta({}), "has no 'sampling_effective_beta'", id="no-beta"),
    pytest.param(
        lambda: pl.training_curves({"run": history([1.0])}, errors={"other": (0, 0)}),
        r"`errors` names \['other'\], but the runs are \['run'\]",
        id="errors",
    ),
]


@over(("call", "message"), BAD_CALLS)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert plt.get_fignums() == []


def test_score_table_marks_the_best_of_each_column_and_leaves_gaps():
    scores = pd.DataFrame({"accuracy": [0.7, 0.9], "error": [0.2, np.nan], "time": [3.0, 1.0]}, index=["a", "b"])
    ax = pl.score_table(scores, lower_is_better=("time",))
    drawn = {text.get_position(): (text.get_text(), text.get_fontweight()) for text in ax.texts}
    assert drawn[0, 1] == ("0.900", "bold")
    assert drawn[0, 0] == ("0.700", "normal")
    assert drawn[1, 0] == ("0.200", "bold")
    assert drawn[1, 1] == ("-", "normal")
    assert drawn[2, 1] == ("1.000", "bold")
    with pytest.raises(ValueError, match="table of numbers"):
        pl.score_table(pd.DataFrame({"score": ["high"]}))


def test_forest_draws_each_interval_and_an_infinite_one_as_a_point():
    ax = pl.difference_forest({"x": {"m": (1.0, 0.5, 2.0)}, "y": {"m": (3.0, -np.inf, np.inf)}})
    (bars,) = (container for container in ax.containers)
    ends = [segment[:, 0].tolist() for segment in bars.lines[2][0].get_segments()]
    assert ends == [[0.5, 2.0], [3.0, 3.0]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["x", "y"]
    with pytest.raises(ValueError, match="no value"):
        pl.difference_forest({})
