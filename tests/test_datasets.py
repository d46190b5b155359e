"""Generated counts: the stated truth is the truth, and the difficulty is the stated one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from tables import over

from qbmscvi import datasets
from qbmscvi.datasets import synthetic_counts

TRAJECTORY = ["root", "trunk", "branch_0", "branch_1"]


@pytest.fixture(scope="module")
def default_adata():
    return synthetic_counts()


def knn_accuracies(adata):
    """Return how well 15 neighbors among 30 uncorrected principal components tell types and batches."""
    counts = adata.X.toarray()
    normalized = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    components = PCA(30, random_state=0).fit_transform(normalized)
    return [
        cross_val_score(KNeighborsClassifier(15), components, adata.obs[column], cv=5).mean()
        for column in ("cell_type", "batch")
    ]


def test_counts_are_reproducible_by_seed():
    first, second, other = (synthetic_counts(300, 100, seed=seed) for seed in (7, 7, 8))
    assert (first.X != second.X).nnz == 0
    assert first.obs.equals(second.obs)
    assert first.var.equals(second.var)
    assert first.uns["synthetic"]["expected_expression"].equals(second.uns["synthetic"]["expected_expression"])
    assert (first.X != other.X).nnz > 0


def test_global_random_state_is_untouched():
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()  # noqa: NPY002
    synthetic_counts(100, 60)
    after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_counts_are_sparse_integers_and_not_duplicated(default_adata):
    counts = default_adata.X
    assert sparse.issparse(counts)
    assert counts.format == "csr"
    assert counts.dtype == np.float32
    assert np.all(counts.data == np.round(counts.data))
    assert counts.data.min() >= 1
    assert not default_adata.layers


def test_default_sparsity_is_that_of_single_cell_data():
    for seed in range(3):
        adata = synthetic_counts(seed=seed)
        assert 0.85 < 1 - adata.X.nnz / np.prod(adata.shape) < 0.95


@over("mean_depth", [1e-3, 1.0, 130.0])
def test_no_cell_is_empty(mean_depth):
    adata = synthetic_counts(500, 60, mean_depth=mean_depth)
    assert adata.X.sum(axis=1).min() >= 1


def test_every_type_and_batch_has_its_cells():
    adata = synthetic_counts(1000, 100, n_types=7, n_batches=3)
    sizes = adata.obs["cell_type"].value_counts(sort=False)
    assert list(sizes.index) == [*TRAJECTORY, "type_0", "type_1", "type_2"]
    assert sizes.is_monotonic_decreasing
    assert sizes.iloc[0] / sizes.iloc[-1] == pytest.approx(4, rel=0.05)
    assert adata.obs["batch"].value_counts().tolist() == [334, 333, 333]
    smallest = synthetic_counts(n_cells=5, n_genes=40, n_types=5)
    assert smallest.obs["cell_type"].nunique() == 5


def test_pseudotime_and_stage_exist_on_the_trajectory_only(default_adata):
    obs = default_adata.obs
    is_ordered = obs["cell_type"].isin(TRAJECTORY)
    assert obs.loc[~is_ordered, ["pseudotime", "stage"]].isna().all(axis=None)
    ordered = obs[is_ordered]
    assert ordered["pseudotime"].between(0, 1).all()
    assert (np.floor(3 * ordered["pseudotime"]) == ordered["stage"]).all()
    assert ordered.groupby("cell_type", observed=True)["stage"].unique().str[0].to_dict() == {
        "root": 0,
        "trunk": 1,
        "branch_0": 2,
        "branch_1": 2,
    }


def test_trajectory_is_one_path_until_it_branches():
    expected = synthetic_counts(n_cells=4000).uns["synthetic"]["expected_expression"]
    log_expected = np.log(expected)

    def distance(one, other):
        return np.linalg.norm(log_expected.loc[one] - log_expected.loc[other])

    for branch in ("branch_0", "branch_1"):
        assert distance("root", "trunk") < distance("root", branch)
        assert distance("trunk", branch) < distance("root", branch)
    assert distance("branch_0", "branch_1") > 0.5 * distance("trunk", "branch_0")
    assert distance("type_0", "type_1") < min(distance(name, "type_0") for name in TRAJECTORY)


def largest_z(adata, cell_types):
    """Return the largest deviation, in standard errors, of mean counts per expected total from the stated shares."""
    expected = adata.uns["synthetic"]["expected_expression"]
    share = adata.X.toarray() / adata.obs["library_size"].to_numpy()[:, None]
    z = []
    for name in expected.index:
        cells = share[cell_types == name]
        # an abundant gene's mean is close to normal; a rare gene's is not
        is_abundant = expected.loc[name] * adata.obs["library_size"].mean() > 1
        error = cells.std(axis=0, ddof=1) / np.sqrt(len(cells))
        z.append(np.abs((cells.mean(axis=0) - expected.loc[name]) / error)[is_abundant.to_numpy()].max())
    return max(z)


def test_stated_expression_is_the_mean_of_the_counts():
    """Gate: 5 standard errors over at most 600 comparisons, alpha about 3e-4; exchanged types must fail it."""
    adata = synthetic_counts(3000, 100, batch_effect=0, mean_depth=2000, seed=1)
    np.testing.assert_allclose(adata.uns["synthetic"]["expected_expression"].sum(axis=1), 1)
    cell_types = adata.obs["cell_type"].to_numpy(dtype=str)
    assert largest_z(adata, cell_types) < 5
    planted = np.array(["branch_0", "branch_1"])[(cell_types == "branch_0").astype(int)]
    assert largest_z(adata, np.where(np.isin(cell_types, planted), planted, cell_types)) > 10


def test_noise_has_the_stated_dispersion(monkeypatch):
    """Without spread of activities, cells of a discrete type share one mean, so the dispersion can be read off."""
    monkeypatch.setattr(datasets, "_ACTIVITY_SCALE", 0.0)
    adata = synthetic_counts(20_000, 60, batch_effect=0, mean_depth=3000)
    is_type = (adata.obs["cell_type"] == "type_0").to_numpy()
    counts = adata.X[is_type].toarray()
    share = adata.uns["synthetic"]["expected_expression"].loc["type_0"].to_numpy()
    mean = adata.obs["library_size"].to_numpy()[is_type, None] * share
    # Var(x) = mean + mean^2 / theta
    estimate = ((counts - mean) ** 2 - mean).sum(axis=0) / (mean**2).sum(axis=0)
    np.testing.assert_allclose(estimate * adata.var["inverse_dispersion"], 1, atol=0.35)  # about 5 standard errors
    assert np.mean(estimate * adata.var["inverse_dispersion"]) == pytest.approx(1, abs=0.05)


def test_library_size_is_the_expected_total():
    adata = synthetic_counts(5000, 200, mean_depth=400)
    ratio = np.asarray(adata.X.sum(axis=1)).ravel() / adata.obs["library_size"]
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(len(ratio))
    assert adata.obs["library_size"].mean() == pytest.approx(400, rel=0.03)
    depth = adata.obs.groupby("batch", observed=True)["library_size"].mean()
    stated = adata.uns["synthetic"]["batch_depth"]
    assert depth.iloc[1] / depth.iloc[0] == pytest.approx(stated[1] / stated[0], rel=0.05)
    assert stated[1] / stated[0] == pytest.approx(np.exp(0.6))


def test_background_genes_have_no_loading_and_every_program_has_genes(default_adata):
    sizes = default_adata.var["program"].value_counts()
    assert len(sizes) == 13
    assert sizes["background"] == 150
    assert sizes.min() >= 2
    is_background = default_adata.var["program"] == "background"
    assert (default_adata.var.loc[is_background, "loading"] == 0).all()
    assert (default_adata.var.loc[~is_background, "loading"] > 0).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_default_difficulty_is_neither_trivial_nor_hopeless(seed):
    type_accuracy, batch_accuracy = knn_accuracies(synthetic_counts(seed=seed))
    assert 0.75 < type_accuracy < 0.92
    assert 0.7 < batch_accuracy < 0.95  # chance is 0.5


def test_batches_do_not_differ_without_batch_effect():
    adata = synthetic_counts(batch_effect=0)
    assert (adata.uns["synthetic"]["batch_log_factor"] == 0).all(axis=None)
    assert (adata.uns["synthetic"]["batch_depth"] == 1).all()
    # 4 binomial standard errors of 2000 cells
    assert abs(knn_accuracies(adata)[1] - 0.5) < 0.045


def test_one_batch_has_no_batch_effect():
    truth = synthetic_counts(100, 60, n_batches=1, batch_effect=1.0).uns["synthetic"]
    assert (truth["batch_log_factor"] == 0).all(axis=None)
    assert truth["batch_depth"].tolist() == [1.0]


def test_chunks_change_neither_cells_nor_truth(monkeypatch):
    whole = synthetic_counts(301, 100)
    monkeypatch.setattr(datasets, "_CHUNK_ENTRIES", 1000)
    chunked = synthetic_counts(301, 100)
    assert chunked.shape == whole.shape
    assert chunked.obs.equals(whole.obs)
    np.testing.assert_allclose(
        chunked.uns["synthetic"]["expected_expression"], whole.uns["synthetic"]["expected_expression"], rtol=1e-12
    )
    assert chunked.X.sum() == pytest.approx(whole.X.sum(), rel=0.05)


def test_result_survives_writing(tmp_path, default_adata):
    from anndata import read_h5ad

    default_adata.write_h5ad(tmp_path / "synthetic.h5ad")
    read = read_h5ad(tmp_path / "synthetic.h5ad")
    assert (read.X != default_adata.X).nnz == 0
    assert list(read.obs["cell_type"].cat.categories) == list(default_adata.obs["cell_type"].cat.categories)
    expected = default_adata.uns["synthetic"]["expected_expression"]
    np.testing.assert_array_equal(read.uns["synthetic"]["expected_expression"].loc[expected.index], expected)
    assert read.uns["synthetic"]["seed"] == 0


@over(
    ("arguments", "message"),
    [
        pytest.param({"n_types": 3}, r"`n_types`.*got 3.*4.*trajectory", id="few-types"),
        pytest.param({"n_batches": 0}, r"`n_batches`.*got 0.*1", id="no-batch"),
        pytest.param({"n_cells": 5}, r"`n_cells`.*got 5.*6.*empty", id="few-cells"),
        pytest.param({"n_cells": 8, "n_batches": 9}, r"`n_cells` .* at least 9\.", id="fewer-cells-than-batches"),
        pytest.param({"n_cells": 100.0}, r"`n_cells`.*got 100\.0", id="float-cells"),
        pytest.param({"n_cells": True}, r"`n_cells`.*got True", id="bool-cells"),
        pytest.param({"n_genes": 23}, r"`n_genes`.*got 23.*24", id="few-genes"),
        pytest.param({"seed": -1}, r"`seed`.*got -1", id="negative-seed"),
        pytest.param({"seed": None}, r"`seed`.*got None", id="no-seed"),
        pytest.param({"batch_effect": -0.1}, r"`batch_effect`.*got -0\.1, .* \[0, 3\]", id="negative"),
        pytest.param({"batch_effect": 4}, r"`batch_effect`.*got 4", id="huge-batch-effect"),
        pytest.param({"batch_effect": "0.1"}, r"`batch_effect`.*got '0\.1'", id="text"),
        pytest.param({"mean_depth": 0}, r"`mean_depth`.*got 0, .* \(0, 100000\]", id="zero-depth"),
        pytest.param({"mean_depth": np.nan}, r"`mean_depth`.*got nan", id="nan-depth"),
        pytest.param({"mean_depth": np.inf}, r"`mean_depth`.*got inf", id="infinite-depth"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic_counts(**arguments)
