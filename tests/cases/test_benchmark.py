"""Comparisons on input as people have it: missing values, tiny batches, settings that change, clusters of any size."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from qbmscvi.benchmark import _compare, _scores, compare, read_records, write_report
from qbmscvi.benchmark._definitions import agree, define
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
    from scib_metrics import nmi_ari_cluster_labels_kmeans

    latent, labels = clean_clusters(sizes, seed)
    assert nmi_ari_cluster_labels_kmeans(latent.astype(np.float32), labels)["nmi"] < 0.9  # what scIB's totals had
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
    graph = _scores._neighbor_graph(latent, 0)
    every = [_scores._leiden_clusters(graph, resolution, 0) for resolution in _scores.LEIDEN_RESOLUTIONS]
    scores = [normalized_mutual_info_score(labels, clusters) for clusters in every]
    assert _scores._leiden(latent, labels, 0)["leiden_nmi"] == max(scores) > min(scores)


@pytest.mark.slow
def test_totals_are_those_of_scib_with_its_own_weights():
    """With the values that scib-metrics gives its own clusters, bio and total are the ones that it computes."""
    import pandas as pd
    from anndata import AnnData
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


def of_attribute(width):
    def own(task):
        return latent_of(task, own.settings["widths"][0])

    own.settings = {"widths": [width]}
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
    helper = of_body(width)

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


def of_class(width):
    class Encoder:
        def encode(self, task):
            return latent_of(task, width)

    def own(task):
        return Encoder().encode(task)

    return own


KINDS = [
    of_global,
    of_default,
    of_keyword_only_default,
    of_closure,
    of_inner_closure,
    of_attribute,
    of_partial,
    of_body,
]
KINDS += [of_helper, Settings, of_layers, Counting, of_method, of_array, of_class]


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


def test_what_a_run_changes_is_no_setting_and_equal_values_are_equal_in_any_order():
    one, other = Counting(2), Counting(2)
    assert agree(define(one), define(other))
    assert not agree(define(one), define(Counting(3)))

    def holding(value):
        return lambda task: value

    assert define(holding({"a": 1, "b": {2, 3}})) == define(holding({"b": {3, 2}, "a": 1}))
    assert define(holding((1, 2))) != define(holding((2, 1)))
    assert define(holding(True)) != define(holding(1))
    assert define(holding(holding(1))) != define(holding(holding(2)))
    recursive = []
    recursive.append(recursive)
    define(holding(recursive))


def test_definitions_are_the_same_in_every_process(tmp_path):
    """The order of sets and the addresses of objects differ between processes."""
    source = (
        "from qbmscvi.benchmark._definitions import define\n"
        "class Helper:\n    kinds = {'a', 'b', 'c'}\n    def call(self): return self.kinds\n"
        "def own(task, names=frozenset('xyz'), helper=Helper()):\n"
        "    return task if task in {'one', 'two'} else helper.call()\n"
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
    with pytest.raises(ValueError, match="batch_key.*do not compare"):
        compare(adata, label_key="cell_type", **given)
