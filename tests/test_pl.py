"""Laws of the figures: what is drawn is what was given."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_hex

from qbmscvi import pl


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
CALLS = {
    "embedding": lambda **kwargs: pl.embedding(np.eye(2), ["a", "b"], **kwargs),
    "training_curves": lambda **kwargs: pl.training_curves({"run": history([3.0, 2.0])}, **kwargs),
    "coupling_matrix": lambda **kwargs: pl.coupling_matrix(MATRIX, **kwargs),
    "difference_forest": lambda **kwargs: pl.difference_forest({"set": {"model": (0.1, 0.0, 0.2)}}, **kwargs),
    "score_table": lambda **kwargs: pl.score_table(pd.DataFrame({"score": [0.1, 0.2]}), **kwargs),
    "energy_histogram": lambda **kwargs: pl.energy_histogram({"data": [0.0, 1.0]}, **kwargs),
}
each_function = pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in CALLS.items()])


def test_every_public_function_is_in_the_table():
    assert set(CALLS) == set(pl.__all__)


@each_function
def test_given_axes_are_drawn_on_and_returned(call):
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


@each_function
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
    ax = pl.coupling_matrix(MATRIX, ylabel="Gaussian layer", colorbar_label="W", order=[2, 1, 0])
    bar = ax.get_images()[0].colorbar
    assert (ax.get_xlabel(), ax.get_ylabel(), bar.ax.get_ylabel()) == ("spin (reordered)", "Gaussian layer", "W")


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
    pytest.param(lambda: pl.coupling_matrix(MATRIX, limit=0.0), r"`limit` is out of range: got 0\.0", id="limit"),
    pytest.param(lambda: pl.energy_histogram({}), "`energies` is empty", id="no-group"),
    pytest.param(lambda: pl.energy_histogram({"data": []}), r"`energies\['data'\]` has 0 values", id="empty-group"),
    pytest.param(
        lambda: pl.energy_histogram({"data": [np.inf, 0.0]}), "has 2 values, 1 of them non-finite", id="inf-energy"
    ),
    pytest.param(lambda: pl.energy_histogram({"data": [0.0]}, bins=0), "`bins` is out of range: got 0", id="bins"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
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
