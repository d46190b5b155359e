"""The scores, on latents whose right answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tables import over

from qbmscvi.benchmark import score_latent

N_CELLS = 400


def blobs(codes, distance=30.0, n_dimensions=4, seed=0):
    """Unit Gaussians around points ``distance`` apart along the first axis."""
    latent = np.random.default_rng(seed).normal(size=(len(codes), n_dimensions))
    latent[:, 0] += distance * np.asarray(codes)
    return latent


@pytest.fixture
def codes():
    return np.random.default_rng(1).permutation(np.arange(N_CELLS) % 4)


def make_line(n_cells):
    """Cells evenly along a line, slightly off it, in a known order."""
    order = np.linspace(0, 1, n_cells)
    latent = np.zeros((n_cells, 3))
    latent[:, 0] = 30 * order
    latent += 0.05 * np.random.default_rng(0).normal(size=latent.shape)
    return latent, order


@pytest.fixture
def line():
    return make_line(150)


def test_separated_labels_score_one(codes):
    scores = score_latent(blobs(codes), codes)
    expected = "knn_accuracy knn_macro_f1 logistic_accuracy logistic_macro_f1 kmeans_ari silhouette"
    assert set(scores) == set(expected.split())
    assert all(type(value) is float for value in scores.values())
    assert scores["knn_accuracy"] == scores["logistic_accuracy"] == scores["kmeans_ari"] == 1.0
    assert scores["silhouette"] > 0.9


def test_unrelated_labels_score_chance(codes):
    """Four equal labels: 4 binomial standard errors of 400 cells are 0.087."""
    scores = score_latent(blobs(np.random.default_rng(2).permutation(codes)), codes)
    assert abs(scores["knn_accuracy"] - 0.25) < 0.087
    assert abs(scores["logistic_accuracy"] - 0.25) < 0.087
    assert abs(scores["kmeans_ari"]) < 0.05
    assert abs(scores["silhouette"] - 0.5) < 0.1


def test_macro_f1_counts_a_lost_rare_label_as_much_as_a_frequent_one():
    """Twenty cells of a third label lie amid 280 of the first: accuracy loses 20 of 500, macro-F1 a third."""
    labels = np.repeat([0, 1, 2], [280, 200, 20])
    latent = blobs(np.where(labels == 2, 0, labels))
    scores = score_latent(latent, labels)
    assert scores["knn_accuracy"] == pytest.approx(0.96, abs=0.01)
    assert scores["knn_macro_f1"] == pytest.approx((2 * 280 / 580 + 2 * 200 / 400 + 0) / 3, abs=0.03)


def test_separated_batches_are_found(codes):
    batches = np.arange(N_CELLS) % 2
    scores = score_latent(blobs(codes + 10 * batches), codes, batches)
    assert scores["batch_knn_accuracy"] == 1.0
    assert scores["batch_chance"] == 0.5


def test_mixed_batches_score_the_share_of_the_largest(codes):
    """With batches of 75 and 25 percent, a blind majority vote is right for three in four."""
    batches = np.random.default_rng(3).permutation(np.repeat(["a", "b"], [300, 100]))
    scores = score_latent(blobs(codes), codes, batches)
    assert scores["batch_chance"] == 0.75
    assert abs(scores["batch_knn_accuracy"] - 0.75) < 0.087


def test_one_batch_is_always_right(codes):
    scores = score_latent(blobs(codes), codes, np.zeros(N_CELLS))
    assert scores["batch_knn_accuracy"] == scores["batch_chance"] == 1.0


def test_representation_of_labels_does_not_matter(codes):
    latent, codes = blobs(codes, distance=1.5)[:80], codes[:80]
    names = np.array(["d", "a", "c", "b"])[codes]
    expected = score_latent(latent, names)
    for labels in (list(names), pd.Categorical(names, categories=list("abcdef")), pd.Series(names)):
        assert score_latent(latent, labels) == expected
    assert score_latent(latent, codes) == expected


def test_line_has_its_order(line):
    latent, order = line
    scores = score_latent(latent, (order > 0.5).astype(int), order=order)
    assert scores["pseudotime_tau"] > 0.95
    assert scores["pseudotime_finite"] == 1.0
    assert scores["pseudotime_slow_components"] == 0.0


def test_long_line_is_reported_where_scanpy_loses_its_order():
    """The report holds the rule: the same line with twice the cells mixes four times as slowly."""
    latent, order = make_line(300)
    with pytest.warns(UserWarning, match="1 diffusion components"):
        scores = score_latent(latent, (order > 0.5).astype(int), order=order)
    assert scores["pseudotime_slow_components"] == 1.0
    assert scores["pseudotime_finite"] == 1.0
    assert scores["pseudotime_tau"] < 0.5
    assert score_latent(latent, (order > 0.5).astype(int), order=order, n_neighbors=30)["pseudotime_tau"] > 0.95


def test_pseudotime_runs_from_the_given_root(line):
    """From the other end of the line the order is reversed; from the middle it is lost."""
    latent, order = line
    labels = (order > 0.5).astype(int)
    assert score_latent(latent, labels, order=order, root=149)["pseudotime_tau"] < -0.95
    assert abs(score_latent(latent, labels, order=order, root=[74, 75])["pseudotime_tau"]) < 0.1


def test_unordered_cells_have_no_order(line):
    latent, order = line
    shuffled = np.random.default_rng(0).permutation(order)
    scores = score_latent(latent, (order > 0.5).astype(int), order=shuffled)
    # the standard error of tau without order is sqrt(2 (2n + 5) / (9 n (n - 1))), 0.055 for 150 cells
    assert abs(scores["pseudotime_tau"]) < 4 * 0.055


def test_cells_off_the_trajectory_do_not_count(line):
    latent, order = line
    labels = (order > 0.5).astype(int)
    expected = score_latent(latent, labels, order=order, root=3)
    far = 100 + np.random.default_rng(0).normal(size=(50, 3))
    scores = score_latent(
        np.concatenate([far, latent]),
        np.concatenate([np.full(50, 2), labels]),
        order=np.concatenate([np.full(50, np.nan), order]),
        root=53,
    )
    for name in ("pseudotime_tau", "pseudotime_finite"):
        assert scores[name] == pytest.approx(expected[name], abs=1e-6)


def test_unreachable_cells_are_reported_and_rank_last(line):
    """A break in the line makes the later part unreachable: one third of the cells, right behind the others."""
    latent, order = line
    late = order > 2 / 3
    scores = score_latent(latent + 1e3 * late[:, None], late.astype(int), order=order)
    assert scores["pseudotime_finite"] == pytest.approx(2 / 3, abs=0.01)
    n_late = late.sum()
    n_pairs, n_tied = len(order) * (len(order) - 1) / 2, n_late * (n_late - 1) / 2
    # tau-b with one block of ties and every other pair in order
    assert scores["pseudotime_tau"] == pytest.approx(np.sqrt((n_pairs - n_tied) / n_pairs), abs=0.02)


def test_scores_are_reproducible_by_seed_and_leave_global_random_state(line):
    latent, order = line
    labels = (order > 0.5).astype(int)
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()  # noqa: NPY002
    first = score_latent(latent, labels, labels, order=order, seed=1)
    after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert score_latent(latent, labels, labels, order=order, seed=1) == first


def test_arguments_are_not_changed(codes):
    latent = blobs(codes)
    copy = latent.copy()
    score_latent(latent, codes)
    np.testing.assert_array_equal(latent, copy)


@pytest.mark.parametrize("name", ["labels", "batches"])
def test_rare_groups_are_left_out_with_a_warning(codes, name):
    rare = codes.copy()
    rare[:3] = 9
    arguments = {"labels": codes, "batches": codes, name: rare}
    with pytest.warns(UserWarning, match=rf"1 of 5 .*`{name}`.*3 cells"):
        scores = score_latent(blobs(codes), **arguments)
    assert scores["knn_accuracy"] == 1.0


@over(
    ("changes", "message"),
    [
        pytest.param({"latent": np.zeros(40)}, r"`latent` has shape \(40,\)", id="flat-latent"),
        pytest.param({"latent": np.zeros((40, 0))}, r"`latent` has shape \(40, 0\)", id="no-dimensions"),
        pytest.param({"latent": [["a"]] * 40}, "`latent`.*list", id="text-latent"),
        pytest.param({"latent": np.full((40, 2), np.nan)}, "non-finite.*40 of 40", id="nan-latent"),
        pytest.param({"labels": np.zeros(39)}, r"`labels`.*\(39,\).*40", id="labels-length"),
        pytest.param({"labels": ["a", np.nan] * 20}, "`labels`.*20 of 40", id="missing-label"),
        pytest.param({"labels": np.zeros(40)}, "`labels`.*1 groups", id="one-label"),
        pytest.param({"batches": np.zeros(41)}, r"`batches` has shape \(41,\)", id="batches-length"),
        pytest.param({"batches": np.arange(40)}, "`batches`.*0 groups", id="single-batches"),
        pytest.param({"n_neighbors": 33}, "32 cells.*33 neighbors", id="many-neighbors"),
        pytest.param({"n_neighbors": 1}, "`n_neighbors`.*got 1", id="few-neighbors"),
        pytest.param({"n_neighbors": 5.0}, r"`n_neighbors`.*got 5\.0", id="float-neighbors"),
        pytest.param({"order": np.zeros(39)}, r"`order` has shape \(39,\)", id="order-length"),
        pytest.param({"order": ["early"] * 40}, "`order` is not numeric", id="text-order"),
        pytest.param({"order": np.full(40, np.inf)}, "`order`.*infinite.*40", id="infinite-order"),
        pytest.param({"order": np.ones(40)}, "`order`.*single value 1", id="constant-order"),
        pytest.param({"order": [0.0, 1.0] + [np.nan] * 38}, "`order` places 2 cells", id="few-ordered"),
        pytest.param({"root": 0}, r"`root`.*`order`", id="root-alone"),
        pytest.param({"order": np.arange(40), "root": 40}, "`root`", id="root-outside"),
        pytest.param({"order": np.arange(40), "root": -1}, "`root`", id="root-negative"),
        pytest.param({"order": np.arange(40), "root": []}, "`root`", id="no-root"),
        pytest.param({"order": np.arange(40), "root": 0.5}, "`root`", id="float-root"),
        pytest.param({"order": [np.nan, *range(39)], "root": 0}, "`root`", id="root-off"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    arguments = {"latent": np.random.default_rng(0).normal(size=(40, 2)), "labels": np.arange(40) % 2} | changes
    with pytest.raises(ValueError, match=message):
        score_latent(**arguments)
