"""The comparison: one record per run, resumed where it stopped, refused before training where it cannot work."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from scvi.model import SCVI
from tables import over

from qbmscvi import benchmark
from qbmscvi.benchmark import Task, _compare, _report, compare, prepare, read_records, write_report
from qbmscvi.benchmark import __main__ as command_line
from qbmscvi.benchmark._models import same_optimizer
from qbmscvi.benchmark._report import compute_differences
from qbmscvi.datasets import synthetic_counts

KEYS = {"label_key": "cell_type", "batch_key": "batch"}


@pytest.fixture(scope="module")
def adata():
    return synthetic_counts(n_cells=160, n_genes=60, seed=0)


@pytest.fixture
def quick_scores(monkeypatch):
    """scIB compiles for half a minute; what the scores are is not the matter of most tests."""

    def score(latent, labels, batches, order, unintegrated, seed, lineages):
        assert len(latent) == len(labels) == len(unintegrated)
        return {"knn_accuracy": float(np.abs(latent).mean()), "none": np.nan}

    monkeypatch.setattr(_compare, "score_all", score)


class Counted:
    """A model of the caller's own that counts its runs."""

    def __init__(self, name="own"):
        self.__name__ = name
        self.seeds = []

    def __call__(self, task):
        self.seeds.append(task.seed)
        return np.random.default_rng(task.seed).normal(size=(task.adata.n_obs, 3))


def test_one_record_per_run_and_none_is_repeated(adata, quick_scores, tmp_path):
    own, file = Counted(), tmp_path / "records.jsonl"
    given = {"models": ["PCA", own], "records": file, "progress": False, "max_epochs": 1, **KEYS}
    first = compare(adata, n_seeds=2, **given)
    assert own.seeds == [0, 1]
    second = compare(adata, n_seeds=3, **given)
    assert own.seeds == [0, 1, 2]
    assert second[:4] == first
    assert read_records(file) == second
    assert [(r["model"], r["seed"]) for r in second] == [(m, s) for s in range(3) for m in ("PCA", "own")]
    assert {"versions", "commit", "settings", "cpu_s", "n_cells", "n_genes", "max_epochs"} <= set(second[0])
    assert second[0]["scores"]["none"] is None  # NaN is not JSON


def test_records_of_other_settings_are_not_taken_for_these(adata, quick_scores, tmp_path):
    given = {"models": ["PCA"], "n_seeds": 1, "records": tmp_path / "r.jsonl", "progress": False, **KEYS}
    compare(adata, max_epochs=1, **given)
    with pytest.raises(ValueError, match="not compare"):
        compare(adata, max_epochs=2, **given)
    (tmp_path / "r.jsonl").write_text('{"data": "da')
    with pytest.raises(ValueError, match=r"Line 1 .*cut off"):
        compare(adata, max_epochs=1, **given)


def test_neural_models_share_split_and_epochs_and_keep_their_schedules(adata, quick_scores):
    names = ["SCVI", "SCVI, same optimizer and width", "QBMSCVI", "QBMSCVI, J shuffled", "SysVI, VampPrior"]
    before = adata.copy()
    found = compare(adata, models=names, n_seeds=1, max_epochs=6, records=None, progress=False, **KEYS)
    by_name = {record["model"]: record for record in found}
    assert list(by_name) == names
    training = {name: record["settings"]["training"] for name, record in by_name.items()}
    assert len({(t["validation_crc32"], t["max_epochs"]) for t in training.values()}) == 1
    assert training["SCVI"]["n_epochs_kl_warmup"] == 400
    settings = ("n_epochs_kl_warmup", "n_steps_kl_warmup", "eps")
    compared = ("QBMSCVI", "SCVI, same optimizer and width")
    own, same = ([training[name][key] for key in settings] for name in compared)
    assert same == own
    assert [training[name]["lr"] for name in ("SCVI", *compared)] == [1e-3, 2e-3, 2e-3]
    decay, same_decay = (training[name]["weight_decay"] for name in compared)
    assert same_decay == pytest.approx(decay)
    assert (own[0], own[2]) == (None, 1e-8)
    assert own[1] > 0
    fit = {name: record["scores"] for name, record in by_name.items()}
    assert "elbo" in fit["SCVI"]
    assert "elbo" not in fit["SysVI, VampPrior"]
    for name in ("QBMSCVI", "QBMSCVI, J shuffled"):
        assert fit[name]["elbo_low"] <= fit[name]["elbo"] <= fit[name]["elbo_high"]
    assert fit["QBMSCVI, J shuffled"].keys() == {"elbo", "elbo_low", "elbo_high", "kl"}  # too few cells to generate
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert (adata.X != before.X).nnz == 0


def test_same_optimizer_decays_the_linear_layers_and_nothing_else(adata):
    SCVI.setup_anndata(adata, batch_key="batch")
    module = SCVI(adata).module
    plan = same_optimizer(Task(adata, "batch", 0, 6))
    linear, others = plan["optimizer_creator"](module.parameters()).param_groups
    of_linear = {id(layer.weight) for layer in module.modules() if isinstance(layer, torch.nn.Linear)}
    assert {id(parameter) for parameter in linear["params"]} == of_linear
    assert len(linear["params"]) + len(others["params"]) == len(list(module.parameters()))
    assert (linear["weight_decay"], others["weight_decay"]) == (plan["weight_decay"], 0.0)


@pytest.mark.parametrize(("schedule", "warmup"), [("default", 400), ("half", 3)])
def test_a_schedule_is_the_same_for_all(adata, quick_scores, schedule, warmup):
    given = {"n_seeds": 1, "max_epochs": 6, "records": None, "progress": False}
    found = compare(adata, models=["SCVI, same optimizer and width", "QBMSCVI"], schedule=schedule, **given, **KEYS)
    assert [record["settings"]["training"]["n_epochs_kl_warmup"] for record in found] == [warmup] * 2


@over(
    ("change", "message"),
    [
        ({"label_key": "type"}, "label_key='type'"),
        ({"batch_key": "donor"}, "batch_key='donor'"),
        ({"order_key": "day"}, "order_key='day'"),
        ({"layer": "raw"}, "layer='raw'"),
        ({"label_key": "one"}, "at least two"),
        ({"label_key": "gaps"}, "1 of 160"),
        ({"batch_key": "one"}, "a single batch"),
        ({"order_key": "cell_type"}, "not numeric"),
        ({"layer": "normalized"}, "no integers"),
        ({"models": ["scvi"]}, "Unknown model 'scvi'"),
        ({"models": []}, "empty"),
        ({"models": ["PCA", "PCA"]}, "twice"),
        ({"models": [Counted("SCVI")]}, "built-in"),
        ({"models": ["SysVI, VampPrior"], "batch_key": None}, "batch_key=None"),
        ({"schedule": "fast"}, "Unknown schedule"),
        ({"n_seeds": 0}, "n_seeds=0"),
        ({"max_epochs": 0}, "max_epochs=0"),
        ({"n_threads": 0}, "n_threads=0"),
        ({"save_latents": True}, "records=None"),
    ],
)
def test_bad_input_is_refused_before_training(adata, change, message):
    adata = adata.copy()
    adata.obs["one"] = "a"
    adata.obs["gaps"] = adata.obs["cell_type"].where(np.arange(adata.n_obs) > 0)
    adata.layers["normalized"] = adata.X * 0.5
    own = Counted()
    given = {**KEYS, "models": [own], "records": None, "progress": False} | change
    with pytest.raises((ValueError, TypeError), match=message):
        compare(adata, **given)
    assert own.seeds == []


def test_a_single_name_and_few_cells_are_refused(adata):
    with pytest.raises(TypeError, match="a single name"):
        compare(adata, models="PCA", **KEYS)
    with pytest.raises(ValueError, match="20 cells"):
        compare(adata[:20], models=["PCA"], **KEYS)


def test_missing_extra_is_named(adata, monkeypatch):
    monkeypatch.setattr("qbmscvi.benchmark._scores.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"qbmscvi\[benchmark\]"):
        compare(adata, **KEYS)


def test_every_score_without_a_batch_and_fates_that_part(adata):
    given = {"models": ["PCA"], "n_seeds": 1, "records": None, "progress": False, "max_epochs": 1}
    (record,) = compare(adata, label_key="cell_type", order_key="stage", **given)
    scores = record["scores"]
    expected = set(_report.METRICS) - {"scib_batch", "scib_total", "transfer_accuracy", "transfer_macro_f1", "elbo"}
    assert expected <= set(scores)
    assert {"fate_tau_branch_0", "fate_tau_branch_1"} <= set(scores)
    assert all(-1 <= scores[name] <= 1 for name in expected)


@pytest.mark.slow
def test_scib_weighs_types_and_batches(adata):
    (record,) = compare(adata, models=["PCA"], n_seeds=1, records=None, progress=False, **KEYS)
    scores = record["scores"]
    assert scores["scib_total"] == pytest.approx(0.6 * scores["scib_bio"] + 0.4 * scores["scib_batch"])
    assert {"scib_bras", "scib_ilisi_knn", "scib_kbet_per_label", "scib_pcr_comparison"} <= set(scores)


def test_transfer_scores_a_batch_by_the_others():
    from qbmscvi.benchmark._scores import _transfer

    labels = np.repeat(["a", "b", "only here"], [60, 60, 10])
    batches = np.where(np.arange(130) % 2, "x", "y")
    batches[labels == "only here"] = "x"
    latent = np.random.default_rng(0).normal(size=(130, 2)) + 20 * (labels == "b")[:, None]
    assert _transfer(latent, labels, batches) == {"transfer_accuracy": 1.0, "transfer_macro_f1": 1.0}
    flipped = latent.copy()  # the second batch has the types in each other's place
    flipped[batches == "x"] = 20 - flipped[batches == "x"]
    assert _transfer(flipped, labels, batches)["transfer_accuracy"] == 0.0


def fake_records():
    rng, records = np.random.default_rng(0), []
    offsets = {"SCVI": 0.8, "SCVI, same schedule": 0.82, "QBMSCVI": 0.9, "QBMSCVI, J = 0": 0.85, "PCA": 0.7}
    for data in ("first", "second"):
        for seed in range(3):
            split = 0.05 * rng.normal()
            for model, offset in offsets.items():
                scores = {
                    "knn_accuracy": offset + split + 0.001 * rng.normal(),
                    "elbo": None if model == "PCA" else -9.0,
                }
                facts = {"n_cells": 10, "n_genes": 5, "max_epochs": 2, "cpu_s": 1.0, "versions": {}, "settings": {}}
                facts["commit"] = "abc"
                key = {"data": data, "model": model, "seed": seed, "schedule": "native"}
                records.append({**key, **facts, "scores": scores})
            shuffled = {"model": "QBMSCVI, J shuffled", "scores": {"elbo": -9.5}}
            records.append({**records[-1], **shuffled})
    return records


def test_panels_share_colors_and_a_legend_that_names_every_model(monkeypatch, tmp_path):
    """One model has the first score only, and the panel with the legend is that of the last."""
    records = fake_records()
    for record in records:
        if record["model"] == "QBMSCVI, J = 0":
            del record["scores"]["elbo"]
    differences = compute_differences(_report.as_table(records))
    shown = differences[differences["reference"] == "best SCVI"]
    assert shown["metric"].unique().tolist() == ["knn_accuracy", "elbo"]
    drawn = []
    monkeypatch.setattr(_report, "_save", lambda ax, file: drawn.append(ax.figure))
    _report._draw_forests(shown, tmp_path / "forest.png")
    first, last = drawn[0].axes
    legend = last.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["QBMSCVI", "QBMSCVI, J = 0"]
    colors = [[bar.lines[0].get_color() for bar in ax.containers] for ax in (first, last)]
    assert colors[0] == colors[1]
    assert len(set(colors[0])) == 2
    has_points = [[bool(np.isfinite(bar.lines[0].get_xdata()).any()) for bar in ax.containers] for ax in (first, last)]
    assert has_points == [[True, True], [True, False]]


def test_report_compares_with_every_scvi_and_with_the_best(tmp_path):
    text = write_report(fake_records(), tmp_path).read_text()
    assert "## first, native schedule" in text
    assert "10 cells, 5 genes, 2 epochs, 3 seeds" in text
    differences = pd.read_csv(tmp_path / "differences.csv").set_index(["data", "metric", "model", "reference"])
    best = differences.loc["first", "knn_accuracy", "QBMSCVI", "best SCVI"]
    assert best["mean"] == pytest.approx(0.08, abs=0.005)
    assert best["mean"] == differences.loc["first", "knn_accuracy", "QBMSCVI", "SCVI, same schedule"]["mean"]
    assert best["low"] > 0.07  # the seeds spread by 0.05, and share it
    pooled = differences.loc["all", "knn_accuracy", "QBMSCVI", "best SCVI"]
    means = [differences.loc[data, "knn_accuracy", "QBMSCVI", "best SCVI"]["mean"] for data in ("first", "second")]
    student = stats.ttest_1samp(means, 0.0).confidence_interval(0.95)
    assert pooled[["low", "high", "n"]].tolist() == pytest.approx([student.low, student.high, 2])
    assert differences.loc["second", "elbo", "QBMSCVI", "QBMSCVI, J shuffled"]["mean"] == 0.5
    assert differences.loc["first", "knn_accuracy", "QBMSCVI", "QBMSCVI, J = 0"]["mean"] == pytest.approx(
        0.05, abs=0.005
    )
    assert "| QBMSCVI | best SCVI | +0.0" in text
    in_short = text.split("## In short")[1].split("## first")[0]
    assert "| held-out ELBO | QBMSCVI, J = 0 |" in in_short
    assert "| score | against | first | second | all |" in in_short
    by_variant = in_short.split("variant by variant")[1]
    assert [row.split(" | ")[0] for row in by_variant.splitlines() if row.startswith("| ")] == [
        "| against",
        "| ---",
        "| SCVI",
        "| SCVI, same schedule",
    ]
    summary = pd.read_csv(tmp_path / "results.csv").set_index(["data", "model", "metric"])
    assert summary.loc["first", "SCVI", "elbo"]["mean"] == -9.0
    assert summary.loc["first", "PCA", "knn_accuracy"]["count"] == 3
    assert {file.name for file in tmp_path.glob("*.png")} >= {"scores_first_native.png", "differences_types_native.png"}
    with pytest.raises(ValueError, match="no records"):
        write_report([], tmp_path)


def test_a_pooled_difference_says_over_how_many_sets_and_a_missing_score_leaves_its_cell_empty(tmp_path):
    records = fake_records()
    for record in records:
        if record["data"] == "first":
            record["scores"]["pseudotime_tau"] = 0.5 + 0.1 * record["seed"] * (record["model"] == "QBMSCVI")
    text = write_report(records, tmp_path).read_text()
    of_seeds = "+0.100 (-0.148 to +0.348)"  # as there is one set
    assert f"| pseudotime tau | SCVI | {of_seeds} |  | {of_seeds}, 1 set |" in text.split("## In short")[1]
    pooled = text.split("## All data sets")[1]
    assert re.search(rf"\| QBMSCVI \| SCVI \| .+\), 2 sets \| {re.escape(of_seeds)}, 1 set \|", pooled)
    one_set = [r for r in records if r["data"] == "first"]
    assert "all" not in set(compute_differences(_report.as_table(one_set))["data"])


def equal_models(rng, n_variants: int = 5, n_seeds: int = 5) -> pd.DataFrame:
    """Scores of models of which none is better than another."""
    names = ["QBMSCVI", *(f"SCVI, variant {k}" for k in range(n_variants))]
    key = {"data": "first", "schedule": "native", "metric": "knn_accuracy"}
    return pd.DataFrame([{**key, "model": m, "seed": s, "value": rng.normal()} for m in names for s in range(n_seeds)])


def test_the_best_of_equals_is_above_them_unless_it_is_chosen_on_other_seeds():
    rng, found = np.random.default_rng(0), []
    for _ in range(100):
        differences = compute_differences(equal_models(rng)).set_index("reference")
        found.append(differences.loc[["best SCVI", "best SCVI of other seeds"], "mean"].to_numpy())
    z_scores = np.mean(found, axis=0) / (np.std(found, axis=0) / np.sqrt(len(found)))
    assert z_scores[0] < -5  # by 1.16 / sqrt(5) standard deviations of a score
    assert abs(z_scores[1]) < 4


def test_the_best_of_other_seeds_is_chosen_for_each_seed_by_the_others():
    table = equal_models(np.random.default_rng(1))
    (row,) = compute_differences(table).query("reference == 'best SCVI of other seeds'").itertuples()
    scores = table.pivot(index="seed", columns="model", values="value")
    expected = []
    for seed in scores.index:
        others = scores.drop(index=seed).filter(like="SCVI, ").mean()
        expected.append(scores.loc[seed, "QBMSCVI"] - scores.loc[seed, others.idxmax()])
    assert row.n == 5
    assert row.mean == pytest.approx(np.mean(expected))
    one_seed = compute_differences(table[table["seed"] == 0])
    assert "best SCVI of other seeds" not in set(one_seed["reference"])


def test_report_pairs_the_seeds_that_both_models_have(tmp_path):
    records = [r for r in fake_records() if r["seed"] < 2 or r["model"].startswith("QBMSCVI")]
    text = write_report(records, tmp_path).read_text()
    assert "10 cells, 5 genes, 2 epochs, 2 to 3 seeds; differences are of those that both" in text
    differences = pd.read_csv(tmp_path / "differences.csv")
    is_of_first = (differences[["data", "metric", "model"]] == ["first", "knn_accuracy", "QBMSCVI"]).all(axis=1)
    of_first = differences[is_of_first].set_index("reference")
    assert of_first.loc["SCVI"]["n"] == of_first.loc["best SCVI"]["n"] == 2
    assert of_first.loc["QBMSCVI, J = 0"]["n"] == 3
    by_run = {(r["model"], r["seed"]): r["scores"].get("knn_accuracy") for r in records if r["data"] == "first"}
    expected = np.mean([by_run["QBMSCVI", seed] - by_run["SCVI", seed] for seed in range(2)])
    assert of_first.loc["SCVI"]["mean"] == pytest.approx(expected)


def test_command_line_writes_records_and_report_and_repeats_a_cell(adata, quick_scores, tmp_path, capsys):
    file, out = tmp_path / "cells.h5ad", tmp_path / "out"
    adata.write_h5ad(file)
    given = [str(file), "--label-key", "cell_type", "--batch-key", "batch", "--out", str(out)]
    given += ["--models", "SCVI", "PCA", "--epochs", "1", "--seeds", "2", "--n-genes", "50"]
    command_line.main([*given, "--save-latents"])
    records = read_records(out / "comparison.jsonl")
    assert [(r["model"], r["seed"], r["n_genes"]) for r in records] == [
        ("SCVI", 0, 50), ("PCA", 0, 50), ("SCVI", 1, 50), ("PCA", 1, 50)
    ]  # fmt: skip
    assert "cells, native schedule" in (out / "RESULTS.md").read_text()
    assert (out / "umap_cells_native.png").exists()
    capsys.readouterr()
    command_line.main([*given, "--cell", "SCVI", "1"])
    assert "largest distance to the record: 0\n" in capsys.readouterr().out
    assert read_records(out / "comparison.jsonl") == records
    shutil.rmtree(out / "comparison.latents")
    command_line.main(given)
    assert "](umap_cells_native.png)" in (out / "RESULTS.md").read_text()  # figures of cells stay
    with pytest.raises(SystemExit, match="Unknown model"):
        command_line.main([*given, "--models", "none"])
    with pytest.raises(SystemExit):
        command_line.main(["no.h5ad", "--label-key", "cell_type"])


def test_prepare_keeps_labeled_cells_and_variable_genes(adata):
    adata = adata.copy()
    adata.layers["counts"], adata.X = adata.X.copy(), adata.X * 0
    kept = prepare(adata, label_key="cell_type", layer="counts", n_genes=30, unlabeled="trunk")
    assert kept.n_vars == 30
    assert set(kept.obs["cell_type"]) == set(adata.obs["cell_type"]) - {"trunk"}
    assert kept.X.sum(axis=1).min() >= 1
    few = prepare(adata, label_key="cell_type", layer="counts", max_cells=50, seed=1)
    assert few.n_obs == 50
    assert list(few.obs_names) == list(
        prepare(adata, label_key="cell_type", layer="counts", max_cells=50, seed=1).obs_names
    )
    with pytest.raises(ValueError, match="'type'"):
        prepare(adata, label_key="type")
    with pytest.raises(ValueError, match="layer='raw'"):
        prepare(adata, label_key="cell_type", layer="raw")


def test_records_are_strict_json(adata, quick_scores, tmp_path):
    compare(adata, models=["PCA"], n_seeds=1, records=tmp_path / "r.jsonl", progress=False, **KEYS)
    json.loads((tmp_path / "r.jsonl").read_text(), parse_constant=pytest.fail)


def test_public_names_exist():
    assert all(hasattr(benchmark, name) for name in benchmark.__all__)
