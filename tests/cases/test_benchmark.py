"""Comparisons on input as people have it: missing values, tiny batches, settings that change, clusters of any size."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from tables import corners, over

from qbmscvi import demo
from qbmscvi.benchmark import __main__ as command_line
from qbmscvi.benchmark import (
    _compare,
    _definitions,
    _scores,
    compare,
    prepare,
    read_records,
    score_latent,
    write_report,
)
from qbmscvi.datasets import synthetic_counts

KEYS = {"label_key": "cell_type", "batch_key": "batch"}
RUNS = []  # one entry for every training; models of the tests write to it, which is no setting of theirs


@pytest.fixture(scope="module")
def adata():
    return synthetic_counts(n_cells=160, n_genes=60, seed=0)


@pytest.fixture
def quick_scores(monkeypatch):
    """What the scores are is not the matter, and scIB compiles for half a minute."""

    def score(latent, *args):
        return {"knn_accuracy": float(np.abs(latent).mean())}

    monkeypatch.setattr(_compare, "score_all", score)


def clean_clusters(sizes, seed, n_dimensions=10):
    """Unit Gaussians around centers some forty standard deviations apart."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(len(sizes)), sizes)
    centers = 10 * rng.normal(size=(len(sizes), n_dimensions))
    return centers[codes] + rng.normal(size=(len(codes), n_dimensions)), np.array([f"type {code}" for code in codes])


@pytest.mark.parametrize(
    ("sizes", "seed"),
    [
        pytest.param((300, 40, 30, 20, 10), 1, id="one-large"),
        pytest.param((500, 300, 120, 60, 20), 0, id="falling", marks=pytest.mark.slow),
        pytest.param((700, 200, 60, 30, 10), 0, id="steep", marks=pytest.mark.slow),
    ],
)
def test_clean_clusters_of_unequal_size_are_found_whatever_one_start_of_kmeans_does(sizes, seed):
    latent, labels = clean_clusters(sizes, seed)
    one_start = KMeans(len(sizes), init="random", n_init=1, random_state=0).fit_predict(latent)  # as in scIB's totals
    assert normalized_mutual_info_score(labels, one_start) < 0.9
    clusters = _scores._leiden(latent, labels, seed=0)
    scores = _scores._scib(latent, labels, None, latent, clusters)
    assert clusters["leiden_nmi"] > 0.98
    assert clusters["leiden_ari"] > 0.98
    parts = [scores[f"scib_{name}"] for name in ("isolated_labels", "silhouette_label", "clisi_knn")]
    assert scores["scib_bio"] == pytest.approx(np.mean([*parts, *clusters.values()]), abs=1e-12)
    assert not [name for name in scores if "kmeans" in name]


def test_leiden_scores_are_the_best_over_resolutions():
    """Cells without clusters: many small ones agree best by chance, and every resolution is looked at."""
    rng = np.random.default_rng(0)
    latent, labels = rng.normal(size=(200, 5)), rng.choice(["a", "b", "c"], size=200)
    graph = _scores.neighbor_graph(latent, _scores.N_NEIGHBORS, 0)
    every = [_scores._leiden_clusters(graph, resolution, 0) for resolution in _scores.LEIDEN_RESOLUTIONS]
    scores = [normalized_mutual_info_score(labels, clusters) for clusters in every]
    assert _scores._leiden(latent, labels, 0)["leiden_nmi"] == max(scores) > min(scores)


@pytest.mark.slow
def test_totals_are_those_of_scib_with_its_own_weights():
    """With the values that scib-metrics gives its own clusters, bio and total are the ones that it computes."""
    from scib_metrics.benchmark import Benchmarker

    latent, labels = clean_clusters((60, 40, 30), 0)
    batches = np.where(np.arange(len(labels)) % 2, "x", "y")
    index = [str(i) for i in range(len(labels))]
    adata = AnnData(obs=pd.DataFrame({"label": labels, "batch": batches}, index=index, dtype="category"))
    adata.obsm["latent"] = adata.obsm["before"] = latent.astype(np.float32)
    given = {"pre_integrated_embedding_obsm_key": "before", "progress_bar": False}
    benchmarker = Benchmarker(adata, "batch", "label", ["latent"], **given)
    benchmarker.prepare(neighbor_computer=_scores._exact_neighbors)
    benchmarker.benchmark()
    expected = benchmarker.get_results(min_max_scale=False, clean_names=False).loc["latent"]
    kmeans = {name: expected[f"nmi_ari_cluster_labels_kmeans_{name}"] for name in ("nmi", "ari")}
    scores = _scores._scib(latent, labels, batches, latent, kmeans)
    names = {"scib_bio": "Bio conservation", "scib_batch": "Batch correction", "scib_total": "Total"}
    assert {key: scores[key] for key in names} == pytest.approx({k: expected[v] for k, v in names.items()}, abs=1e-6)


def latent_of(task, width):
    RUNS.append(width)
    return np.random.default_rng([task.seed, width]).normal(size=(task.adata.n_obs, width))


WIDTH = 2


def of_global(width):
    def own(task):
        return latent_of(task, WIDTH)

    globals()["WIDTH"] = width
    return own


def of_default(width):
    def own(task, width=width):
        return latent_of(task, width)

    return own


def of_keyword_only_default(width):
    def own(task, *, width=width):
        return latent_of(task, width)

    return own


def of_closure(width):
    def own(task):
        return latent_of(task, width)

    return own


def of_inner_closure(width):
    def own(task):
        return [latent_of(task, width + i) for i in range(1)][0]

    return own


def of_partial(width):
    model = functools.partial(latent_of, width=width)
    model.__name__ = "own"
    return model


def of_body(width):
    namespace = {"latent_of": latent_of}
    exec(f"def own(task):\n    return latent_of(task, {width})", namespace)
    return namespace["own"]


def of_helper(width):
    helper = of_closure(width)

    def own(task):
        return helper(task)

    return own


@dataclass(frozen=True, slots=True)
class Settings:
    """Models of people are often like that: fields, a name, a call."""

    width: int
    layers: tuple[int, ...] = (8, 8)

    def __call__(self, task):
        return latent_of(task, self.width)


@dataclass
class Counting:
    """Settings beside what the run itself changes."""

    width: int
    seeds: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.lock = threading.Lock()
        self.__name__ = "own"
        self.rng = np.random.default_rng(0)

    def __call__(self, task):
        with self.lock:
            self.seeds.append(task.seed)
            self.last = self.rng.normal()
        return latent_of(task, self.width)

    def own(self, task):
        return self(task)


def of_layers(width):
    return Settings(2, layers=(width,))


def of_method(width):
    return Counting(width).own


def of_array(width):
    weights = np.full(50, width)

    def own(task):
        return latent_of(task, int(weights[-1]))

    return own


KINDS = [
    of_global,
    of_default,
    of_keyword_only_default,
    of_closure,
    of_inner_closure,
    of_partial,
    of_body,
]
KINDS += [of_helper, Settings, of_layers, Counting, of_method, of_array]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_changed_setting_is_trained_again_and_an_equal_one_is_not(adata, quick_scores, tmp_path, make):
    file = tmp_path / "records.jsonl"

    def run(width, n_seeds):
        RUNS.clear()
        found = compare(
            adata, models=[make(width)], n_seeds=n_seeds, max_epochs=1, records=file, progress=False, **KEYS
        )
        return len(RUNS), found

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert run(2, 2)[0] == 2
        assert run(2, 2)[0] == 0
        assert run(2, 3)[0] == 1
    with pytest.warns(UserWarning, match=r"3 runs of .* not used"):
        n_trained, found = run(3, 2)
    assert n_trained == 2
    assert run(3, 2) == (0, found)
    assert read_records(file) == found  # in force, and the others stay in the file
    assert len(file.read_text().splitlines()) == 5
    text = write_report(file, tmp_path / "out").read_text()
    assert "1 epochs, 2 seeds" in text
    assert run(2, 2)[0] == 2  # the last settings are in force: those before are run again


def test_definitions_are_the_same_in_every_process(tmp_path):
    """Addresses of objects differ between processes, and there is no source of a command."""
    source = (  # the file alone: the package takes seconds to import
        f"import runpy\ndefine = runpy.run_path({_definitions.__file__!r})['define']\n"
        "class Helper:\n    def call(self): return 1\n"
        "def own(task, helper=Helper()):\n"
        "    return helper.call()\n"
        "print(define(own))\n"
    )
    environments = [{**os.environ, "PYTHONHASHSEED": seed} for seed in ("1", "2")]
    outputs = [
        subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, check=True).stdout
        for env in environments
    ]
    assert outputs[0] == outputs[1] != ""


def test_records_of_a_built_in_model_count_for_the_version_that_made_them(adata, quick_scores, tmp_path):
    file = tmp_path / "records.jsonl"
    given = {
        "models": ["PCA", "QBMSCVI, J = 0"],
        "n_seeds": 1,
        "max_epochs": 1,
        "records": file,
        "progress": False,
        **KEYS,
    }
    first = compare(adata, **given)
    bare = [{k: v for k, v in r.items() if not k.endswith("_key")} for r in first]  # as records were before
    file.write_text("".join(json.dumps(r) + "\n" for r in bare))
    bare = read_records(file)
    assert compare(adata, **given) == bare
    bare[0]["versions"]["qbmscvi"] = "0.0.1"
    bare[1]["settings"]["given"] = {"prior_graph": "complete"}
    file.write_text("".join(json.dumps(r) + "\n" for r in bare))
    with pytest.warns(UserWarning, match="another version"):
        second = compare(adata, **given)
    assert [r["versions"]["qbmscvi"] for r in second] == [first[0]["versions"]["qbmscvi"]] * 2
    assert second[1]["settings"]["given"] == {"prior_graph": "independent"}
    assert read_records(file) == second


def test_records_of_other_columns_do_not_compare(adata, quick_scores, tmp_path):
    given = {"models": ["PCA"], "n_seeds": 1, "max_epochs": 1, "records": tmp_path / "r.jsonl", "progress": False}
    compare(adata, **given, **KEYS)
    with pytest.raises(ValueError, match="batch_key"):
        compare(adata, label_key="cell_type", **given)


def sparse_counts(sizes, n_genes, mean):
    """Cells of three types in batches of given sizes, most genes hardly ever seen."""
    rng = np.random.default_rng(0)
    n_cells, types = sum(sizes), rng.integers(3, size=sum(sizes))
    rates = rng.gamma(0.3, size=n_genes)
    rates *= mean / rates.mean()
    counts = rng.poisson(rates * rng.lognormal(0.0, 0.5, size=(3, n_genes))[types])
    batches = np.repeat([f"batch {i}" for i in range(len(sizes))], sizes)
    obs = pd.DataFrame({"cell_type": [f"type {i}" for i in types], "batch": batches}, dtype="category")
    obs.index = [str(i) for i in range(n_cells)]
    return AnnData(csr_matrix(counts.astype(np.float32)), obs=obs)


@pytest.mark.parametrize(
    ("sizes", "n_genes", "mean", "message"),
    [
        pytest.param([69, 461, 120, 90, 200, 150, 300], 4000, 0.05, r"span=0\.6", id="near-singular"),
        pytest.param([69, 461, 120, 90, 200, 150, 300], 4000, 0.02, r"span=1\.0", id="sparser"),
        pytest.param([1, 2, 5, 29, 200, 300], 2000, 0.5, "'batch 0', 'batch 1', 'batch 2', 'batch 3'", id="tiny"),
        pytest.param([10] * 30, 1000, 0.1, "Pearson residuals", id="all-tiny"),
        pytest.param([300, 200], 8, 1.0, "Pearson residuals", id="few-genes"),
    ],
)
def test_genes_are_chosen_whatever_the_batches_and_the_way_is_said(sizes, n_genes, mean, message):
    """A batch of one cell ended the process, others an error of loess that names neither genes nor batch."""
    data = sparse_counts(sizes, n_genes, mean)
    with pytest.warns(UserWarning, match=f"Genes are chosen .*{message}"):
        kept = prepare(data, label_key="cell_type", batch_key="batch", n_genes=n_genes // 2)
    assert kept.n_vars == n_genes // 2
    assert kept.n_obs > 0.9 * data.n_obs * (n_genes > 100)


def test_genes_of_easy_data_are_those_of_scanpys_default_and_nothing_is_said():
    data = sparse_counts([200, 300], 1000, 3.0)
    expected = sc.pp.highly_variable_genes(data, flavor="seurat_v3", n_top_genes=300, batch_key="batch", inplace=False)[
        "highly_variable"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kept = prepare(data, label_key="cell_type", batch_key="batch", n_genes=300)
    assert list(kept.var_names) == list(data.var_names[expected.to_numpy()])


HALF = np.arange(160) % 2
COLUMNS = {
    "boolean": HALF.astype(bool),
    "integer": HALF,
    "float": HALF * 1.5,
    "unused-categories": pd.Categorical(np.array(["a", "b"])[HALF], categories=["z", "a", "b"]),
    "nullable-string": pd.array(np.array(["a", "b"])[HALF], dtype="string"),
    "nullable-integer": pd.array(HALF, dtype="Int64"),
    "nullable-boolean": pd.array(HALF.astype(bool), dtype="boolean"),
    "categories-of-integers": pd.Categorical(HALF),
}
GAPS = {
    "None": np.array(["a", None], dtype=object)[HALF],
    "NaN": np.where(HALF, np.nan, 1.0),
    "NA": pd.array(np.array(["a", pd.NA], dtype=object)[HALF], dtype="string"),
    "missing-category": pd.Categorical(np.array(["a", None], dtype=object)[HALF]),
    "all-missing": np.full(160, None, dtype=object),
}
MIXED = {
    "mixed": np.array(["a", 1], dtype=object)[HALF],
    "mixed-categories": pd.Categorical(np.array(["a", 1], dtype=object)[HALF]),
}
AS_NUMPY = {"n_seeds": np.int64(1), "first_seed": np.int64(0), "n_threads": np.int64(1), "max_epochs": np.int64(1)}


def with_column(adata, values):
    adata = adata.copy()
    adata.obs["column"] = values
    return adata


@pytest.mark.parametrize(("values", "role"), corners(COLUMNS, ["label_key", "batch_key"]))
def test_columns_of_any_single_type_group_cells(adata, quick_scores, values, role):
    keys, data = {**KEYS, role: "column"}, with_column(adata, values)
    kept = prepare(data, n_genes=np.int64(30), max_cells=np.int64(150), **keys)
    assert kept.n_vars == 30
    assert set(kept.obs["column"]) == set(data.obs["column"])
    (record,) = compare(kept, models=["SCVI"], records=None, progress=False, **AS_NUMPY, **keys)
    assert record["seed"] == 0
    json.dumps(record, allow_nan=False)


@over("values", [pytest.param(values, id=name) for name, values in GAPS.items()])
def test_cells_without_a_label_are_left_out_and_without_a_batch_refused(adata, values):
    data, n_missing = with_column(adata, values), int(pd.isna(values).sum())
    for role in KEYS:
        with pytest.raises(ValueError, match=rf"'column'.*{role}.*({n_missing}|any) of 160"):
            compare(data, models=["PCA"], records=None, **{**KEYS, role: "column"})
    with pytest.raises(ValueError, match=rf"batch_key.*({n_missing}|any) of 160"):
        prepare(data, label_key="cell_type", batch_key="column")
    if n_missing < 160:
        assert prepare(data, label_key="column", batch_key="batch").n_obs == 160 - n_missing
    else:
        with pytest.raises(ValueError, match=r"'column'.*none of 160.*label_key"):
            prepare(data, label_key="column")


@over("role", ["label_key", "batch_key"])
@over("values", [pytest.param(values, id=name) for name, values in MIXED.items()])
def test_text_beside_other_values_is_refused(adata, values, role):
    data, keys = with_column(adata, values), {**KEYS, role: "column"}
    for function in (prepare, functools.partial(compare, models=["PCA"], records=None)):
        with pytest.raises(TypeError, match=rf"'column'.*{role}.*number, str.*astype\(str\)"):
            function(data, **keys)


def test_a_missing_batch_of_a_cell_without_a_label_does_not_matter(adata):
    data = with_column(adata, np.where(HALF, "x", None))
    data.obs["label"] = np.where(HALF, "a", None)
    assert prepare(data, label_key="label", batch_key="column").n_obs == 80


def test_unlabeled_is_found_in_labels_that_are_no_text(adata):
    data = with_column(adata, np.where(HALF, -1, 3))
    assert prepare(data, label_key="column", unlabeled="-1").n_obs == 80


@over(
    ("change", "error", "message"),
    [
        pytest.param({"n_genes": 0}, ValueError, "n_genes=0", id="no-genes"),
        pytest.param({"n_genes": 30.0}, TypeError, r"n_genes=30\.0", id="float-genes"),
        pytest.param({"max_cells": 0}, ValueError, "max_cells=0", id="no-cells"),
        pytest.param({"layer": "scaled"}, ValueError, "no integers", id="scaled"),
        pytest.param({"layer": "gaps"}, ValueError, "value nan", id="nan"),
    ],
)
def test_prepare_refuses_what_no_genes_can_be_chosen_from(adata, change, error, message):
    data = adata.copy()
    data.layers["scaled"], data.layers["gaps"] = data.X * 0.5, data.X.toarray()
    data.layers["gaps"][0, 0] = np.nan
    with pytest.raises(error, match=message):
        prepare(data, label_key="cell_type", **{"n_genes": 30, **change})


@over("missing", [None, pd.NA, np.nan], ids=["None", "NA", "NaN"])
def test_an_order_may_be_missing_in_any_way(adata, quick_scores, missing):
    values = np.where(HALF, adata.obs["stage"].astype(object), missing)
    given = {"models": ["PCA"], "records": None, "progress": False, **AS_NUMPY}
    for column in (values, pd.array(pd.Series(values), dtype="Float64")):
        assert compare(with_column(adata, column), label_key="cell_type", order_key="column", **given)


def run_command(module, arguments):
    with pytest.raises(SystemExit) as error:
        module.main(arguments)
    return str(error.value)


@pytest.fixture(scope="module")
def file(adata, tmp_path_factory):
    data = adata.copy()
    data.obs["gaps"] = pd.Categorical(np.where(HALF, "x", None))
    data.obs["nothing"] = pd.Categorical(np.full(160, None, dtype=object))
    data.obs["same"] = "x"
    data.layers["scaled"] = data.X * 0.5
    path = tmp_path_factory.mktemp("data") / "cells.h5ad"
    data.write_h5ad(path)
    return str(path)


FILE_ERRORS = [
    pytest.param(["--label-key", "type"], "--label-key 'type' is no column.*'cell_type'", id="no-column"),
    pytest.param(["--label-key", "nothing"], "'nothing'.*none of 160.*--label-key", id="no-label"),
    pytest.param(["--label-key", "same"], "'same'.*at least two.*--label-key", id="one-label"),
    pytest.param(["--batch-key", "gaps"], "'gaps'.*--batch-key. has no value for 80 of 160", id="missing-batch"),
    pytest.param(["--batch-key", "same"], "'same'.*single batch.*--batch-key", id="one-batch"),
    pytest.param(["--order-key", "cell_type"], "--order-key. is not numeric", id="text-order"),
    pytest.param(["--layer", "raw"], "--layer 'raw'.*'scaled'", id="no-layer"),
    pytest.param(["--layer", "scaled"], "'scaled' holds.*no integers.*without `--layer`", id="scaled"),
    pytest.param(["--n-genes", "0"], "--n-genes 0 is too small", id="no-genes"),
]


@over(("arguments", "message"), FILE_ERRORS)
def test_errors_of_the_comparison_name_its_options(file, tmp_path, arguments, message):
    text = run_command(command_line, [file, "--label-key", "cell_type", "--out", str(tmp_path), *arguments])
    assert re.search(message, text), text
    assert not re.search(r"(label|batch|order)_key|n_genes|setup_anndata", text)


def test_the_demo_names_what_is_wrong_and_the_variables_of_make(file, tmp_path, capsys):
    broken = tmp_path / "broken.h5ad"
    broken.write_text("no")
    for path in (tmp_path / "none.h5ad", broken):
        assert run_command(demo, ["--data", str(path), "--label-key", "cell_type"]) == "2"
        found = capsys.readouterr().err
        assert path.name in found
        assert "DATA=" in found
    assert run_command(demo, ["--data", file]) == "2"
    assert re.search("--label-key.*LABEL_KEY=", capsys.readouterr().err, re.DOTALL)
    assert "'type' is no column" in run_command(demo, ["--data", file, "--label-key", "type", "--out", str(tmp_path)])


def test_the_demo_compares_two_models_on_generated_cells(quick_scores, tmp_path, monkeypatch):
    monkeypatch.setattr("qbmscvi.datasets.synthetic_counts", lambda: synthetic_counts(150, 40))
    demo.main(["--out", str(tmp_path), "--epochs", "1"])
    records = read_records(tmp_path / "comparison.jsonl")
    assert [(record["model"], record["order_key"]) for record in records] == [
        (m, "pseudotime") for m in ("SCVI", "QBMSCVI")
    ]
    assert {"RESULTS.md", "results.csv", "umap_synthetic_native.png"} <= {path.name for path in tmp_path.iterdir()}


def two_lines(n_cells=120):
    """Two lineages, each in order along a line of its own, the second one running the other way in time."""
    order = np.tile(np.linspace(0, 1, n_cells), 2)
    lineages = np.repeat(["a", "b"], n_cells)
    latent = 0.05 * np.random.default_rng(0).normal(size=(2 * n_cells, 3))
    latent[:, 0] += 24 * np.where(lineages == "a", order, 1 - order)
    latent[:, 1] += 2 * (lineages == "b")
    return latent, order, lineages


def test_an_order_within_lineages_is_scored_within_each():
    latent, order, lineages = two_lines()
    labels = np.where(order > 0.5, "late", "early")
    across = score_latent(latent, labels, order=order)
    scores = score_latent(latent, labels, order=order, lineages=lineages)
    assert scores["lineage_tau_a"] > 0.95
    assert scores["lineage_tau_b"] > 0.95
    assert across["pseudotime_tau"] < 0.6  # as if the two were one
    assert scores["pseudotime_tau"] == pytest.approx((scores["lineage_tau_a"] + scores["lineage_tau_b"]) / 2)
    assert scores["pseudotime_finite"] == 1.0
    assert set(scores) - set(across) == {"lineage_tau_a", "lineage_tau_b"}


def test_each_lineage_scores_what_it_scores_alone():
    latent, order, lineages = two_lines()
    labels = np.where(order > 0.5, "late", "early")
    for name in ("a", "b"):
        alone = score_latent(latent, labels, order=np.where(lineages == name, order, np.nan), seed=3)
        only = np.where(lineages == name, lineages, None)
        scores = score_latent(latent, labels, order=order, lineages=only, seed=3)
        assert scores == {**alone, f"lineage_tau_{name}": alone["pseudotime_tau"]}


@over("missing", [None, np.nan, pd.NA], ids=["None", "NaN", "NA"])
def test_small_lineages_and_those_of_one_stage_are_left_out_and_named(missing):
    latent, order, lineages = two_lines()
    lineages = lineages.astype(object)
    lineages[:19], lineages[19:50], lineages[50:60] = "small", "one stage", missing
    order[19:50] = 0.5
    with pytest.warns(UserWarning, match=r"'one stage' \(31 .* 1 different.*'small' \(19 "):
        scores = score_latent(latent, np.where(np.arange(240) % 2, "x", "y"), order=order, lineages=lineages)
    assert {name for name in scores if name.startswith("lineage")} == {"lineage_tau_a", "lineage_tau_b"}


@over(
    ("changes", "message"),
    [
        pytest.param({"order": None}, "`lineages` are given without `order`", id="no-order"),
        pytest.param({"root": 0}, "lineages.*root=0", id="root"),
        pytest.param({"lineages": ["a"] * 3}, r"`lineages` has shape \(3,\)", id="length"),
        pytest.param({"lineages": [None] * 240}, "every value is missing", id="all-missing"),
        pytest.param({"lineages": [str(i) for i in range(240)]}, "lineage.*20 cells", id="small"),
    ],
)
def test_lineages_that_cannot_be_scored_are_refused(changes, message):
    latent, order, lineages = two_lines()
    given = {"order": order, "lineages": lineages} | changes
    with pytest.raises(ValueError, match=message):
        score_latent(latent, lineages, **given)


def test_a_comparison_scores_lineages_and_says_which_are_left_out(adata, tmp_path):
    data = with_column(adata, np.where(HALF, "a", "b").astype(object))
    data.obs["column"] = data.obs["column"].where(np.arange(160) > 10, "few")
    given = {"label_key": "cell_type", "order_key": "pseudotime", "lineage_key": "column", **AS_NUMPY}
    given |= {"models": ["PCA"], "progress": False, "records": tmp_path / "r.jsonl"}
    with pytest.warns(UserWarning, match="'few'"):
        (record,) = compare(data, **given)
    assert {name for name in record["scores"] if name.startswith("lineage")} == {"lineage_tau_a", "lineage_tau_b"}
    assert record["lineage_key"] == "column"
    with pytest.raises(ValueError, match="lineage_key"):
        compare(data, **{**given, "lineage_key": None})
    with pytest.raises(ValueError, match="lineage_key='column'.*order_key"):
        compare(data, **{**given, "order_key": None})


@pytest.mark.slow
def test_tiny_batches_do_not_stop_the_command(tmp_path):
    path = tmp_path / "tiny.h5ad"
    sparse_counts([1, 2, 5, 30, 80, 100], 1000, 0.3).write_h5ad(path)
    given = ["--label-key", "cell_type", "--batch-key", "batch", "--models", "PCA", "QBMSCVI", "--seeds", "1"]
    command_line.main([str(path), *given, "--epochs", "1", "--n-genes", "200", "--out", str(tmp_path)])
    records = read_records(tmp_path / "comparison.jsonl")
    assert [record["scores"]["scib_total"] is not None for record in records] == [True, True]
