"""Cells from priors of a trained model: what each is decoded from, what a control shares with the model, the report."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scvi
import torch
from scvi.model import SCVI
from torch.distributions import Normal

from qbmscvi import QBMSCVI
from qbmscvi.benchmark import MODEL_NAMES, Task, _cell_metrics, _cells, _compare, compare, read_records, write_report
from qbmscvi.benchmark._cell_report import closed_shares
from qbmscvi.benchmark._cells import (
    Bench,
    BoltzmannDensity,
    Control,
    StandardNormal,
    decode,
    draw_rows,
    posteriors,
    score_priors,
)
from qbmscvi.benchmark._densities import GaussianMixture, draw
from qbmscvi.benchmark._models import CONTROLS, MODELS, NeuralModel
from qbmscvi.benchmark._report import as_table, compute_differences
from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.datasets import synthetic_counts

KEYS = {"label_key": "cell_type", "batch_key": "batch"}
SMALL = {"n_latent": 6}  # log Z by enumeration


@pytest.fixture(scope="module", autouse=True)
def _small_forest():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cell_metrics, "_N_TREES", 5)
        yield


@pytest.fixture(scope="module")
def adata():
    """Library sizes of half of the cells are a fifth, and batches differ much."""
    cells = synthetic_counts(n_cells=600, n_genes=60, batch_effect=1.0, seed=0)
    thin = np.random.default_rng(0).random(cells.n_obs) < 0.5
    X = cells.X.toarray()
    X[thin] = np.maximum(np.random.default_rng(1).binomial(X[thin].astype(int), 0.2), np.eye(60)[0])
    cells.X = type(cells.X)(X.astype(np.float32))
    return cells


@pytest.fixture(scope="module", params=[SCVI, QBMSCVI], ids=["SCVI", "QBMSCVI"])
def model(request, adata):
    scvi.settings.seed = 0
    own = adata.copy()
    request.param.setup_anndata(own, batch_key="batch")
    trained = request.param(own)
    trained.train(max_epochs=25, accelerator="cpu", enable_progress_bar=False, plan_kwargs={"lr": 5e-3})
    return trained


def totals(counts) -> np.ndarray:
    return np.log1p(np.asarray(counts.sum(axis=1)).ravel())


def rolled(model, patch: pytest.MonkeyPatch) -> None:
    """Plant the fault that each row gets the tensors of the next one."""
    load = type(model)._make_data_loader

    def wrong(self, adata, indices, **kwargs):
        return load(self, adata=adata, indices=np.roll(indices, 1), **kwargs)

    patch.setattr(type(model), "_make_data_loader", wrong)


def test_a_cell_has_the_library_size_of_its_row(model, monkeypatch):
    rows = np.random.default_rng(0).choice(model.adata.n_obs, 300)
    z = draw(posteriors(model, rows), torch.Generator().manual_seed(0))

    def agreement() -> float:
        return np.corrcoef(totals(decode(model, z, rows, 0)), totals(model.adata.X[rows]))[0, 1]

    assert agreement() > 0.9
    rolled(model, monkeypatch)
    assert abs(agreement()) < 0.3


def test_a_cell_has_the_batch_of_its_row(model, monkeypatch):
    rows = np.sort(np.random.default_rng(0).choice(model.adata.n_obs, 400))
    batches = model.adata.obs["batch"].to_numpy()
    z = draw(posteriors(model, rows), torch.Generator().manual_seed(0))

    def change(counts: np.ndarray, of: np.ndarray) -> np.ndarray:
        shares = [counts[of == batch].sum(axis=0) + 1.0 for batch in np.unique(of)[:2]]
        return np.log(shares[0] / shares[0].sum()) - np.log(shares[1] / shares[1].sum())

    real = change(model.adata.X.toarray(), batches)
    assert np.corrcoef(change(decode(model, z, rows, 0), batches[rows]), real)[0, 1] > 0.8
    wrong = np.array([np.flatnonzero(batches != batches[row])[0] for row in rows])
    assert np.corrcoef(change(decode(model, z, wrong, 0), batches[rows]), real)[0, 1] < 0.5


def test_rows_are_of_the_same_batch_and_known():
    rng = np.random.default_rng(0)
    batches = rng.choice(["a", "b", "c"], 400, p=[0.8, 0.19, 0.01])
    wanted, known = np.arange(100), np.arange(100, 400)
    known = known[batches[known] != "c"]
    wanted = np.append(wanted, np.flatnonzero(batches == "c"))
    rows = draw_rows(batches, wanted, known, rng)
    assert np.isin(rows, known).all()
    is_known = batches[wanted] != "c"  # of which no other cell is known
    assert (batches[rows] == batches[wanted])[is_known].all()
    others = draw_rows(np.roll(batches, 1), wanted, known, rng)  # a planted fault
    assert (batches[others] == batches[wanted])[is_known].mean() < 0.9
    assert len(np.unique(rows)) > 70  # of the 100 of a draw with replacement from 300


def test_models_of_a_seed_get_the_same_rows(adata):
    benches = []
    for model_class in (SCVI, QBMSCVI):
        scvi.settings.seed = 3
        own = adata.copy()
        model_class.setup_anndata(own, batch_key="batch")
        trained = model_class(own)
        trained.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
        benches.append(Bench(trained, "cell_type", 3))
    for name in ("held_out", "rows", "others"):
        np.testing.assert_array_equal(*(getattr(bench, name) for bench in benches))
    assert (benches[0].rows == benches[0].others).mean() < 0.1


def test_divergences_are_those_of_closed_forms(model):
    found, _ = score_priors(model, -100.0)
    held_out = np.sort(model.validation_indices)
    if isinstance(model, QBMSCVI):
        expected = float(model.get_kl(indices=held_out).mean())
    else:
        mean, var = model.get_latent_representation(indices=held_out, return_dist=True)
        expected = float((0.5 * (var + mean**2 - 1.0 - np.log(var))).sum(1).mean())
    assert found["kl"] == pytest.approx(expected, abs=0.1)  # 20 draws of 60 cells: an error of 0.03 at most


def test_a_control_that_is_the_prior_has_its_scores(model, monkeypatch):
    """The same draws, rows and seeds: only the density makes a difference."""

    class Own:
        @classmethod
        def fit(cls, codes, seed):
            return BoltzmannDensity.of(model) if isinstance(model, QBMSCVI) else StandardNormal(codes.mean.shape[1])

    monkeypatch.setitem(_cells._RIVALS, "own", Own)
    scores, controls = score_priors(model, -100.0, ["own"], label_key="cell_type")
    of_control = controls["own"].scores
    assert of_control["elbo"] == -100.0
    assert {key: value for key, value in of_control.items() if not key.startswith("elbo")} == pytest.approx(
        scores, nan_ok=True
    )
    assert scores["cells_coverage"] > 0
    monkeypatch.setattr(Bench, "score_density", lambda self, density: self.score_own_codes())  # a planted fault
    assert score_priors(model, -100.0, label_key="cell_type")[0] != pytest.approx(scores, nan_ok=True)


def test_a_density_of_wrong_codes_loses_elbo(model, monkeypatch):
    name = "independent spins fitted" if isinstance(model, QBMSCVI) else "mixture of Gaussians"
    if not isinstance(model, QBMSCVI):
        quick = type(
            "Quick", (GaussianMixture,), {"fit": lambda codes, seed: GaussianMixture.fit(codes, seed, n_components=[3])}
        )
        monkeypatch.setitem(_cells._RIVALS, name, quick)

    def fitted() -> dict[str, float]:
        return score_priors(model, -100.0, [name])[1][name].scores

    right, (own, _) = fitted(), score_priors(model, -100.0)
    assert right["elbo"] - -100.0 == pytest.approx(own["kl"] - right["kl"])
    codes_of = Bench.training_codes

    def wrong(self):
        codes = codes_of(self)
        if isinstance(codes, Normal):
            return Normal(-codes.loc - 1.0, codes.scale)
        return FactorialPosterior(codes.logits + 3.0)

    monkeypatch.setattr(Bench, "training_codes", wrong)
    assert fitted()["elbo"] < right["elbo"] - 0.3


def test_shuffling_leaves_the_model_as_it_is(adata):
    own = adata.copy()
    QBMSCVI.setup_anndata(own, batch_key="batch")
    trained = QBMSCVI(own, n_latent=6)
    trained.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    before = {name: value.clone() for name, value in trained.module.state_dict().items()}
    with torch.no_grad():
        trained.module.prior.J.copy_(torch.linspace(-0.5, 0.5, 36))  # chains mix
    trained.update_log_z()
    density = BoltzmannDensity.of(trained)
    shuffled = density.shuffled(0)
    assert not torch.equal(shuffled.prior.J, density.prior.J)
    torch.testing.assert_close(shuffled.prior.J.sort()[0], density.prior.J.sort()[0])
    states = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 6)
    for one in (density, shuffled):
        assert float(one.log_prob(states).exp().sum()) == pytest.approx(1.0, abs=0.02)
    trained.module.load_state_dict(before)
    drawn = density.sample(4000, torch.Generator().manual_seed(0))
    expected = (density.log_prob(states).exp()[:, None] * states).sum(0)
    torch.testing.assert_close(drawn.mean(0), expected, atol=0.07, rtol=0)  # four errors of a mean of 4000


def test_second_stage_is_that_of_train(adata):
    """`compare` calls it itself, to see the prior before and to count the seconds."""
    task = Task(adata.copy(), "batch", 0, 3, accelerator="cpu")
    small = replace(MODELS["QBMSCVI"], arguments=lambda task: SMALL)
    fit = small(task)
    assert fit.fit_cpu_s > 0
    assert fit.cpu_s > 0
    scvi.settings.seed = 0
    trained = small.build(task, SMALL)
    trained.train(max_epochs=3, accelerator="cpu", enable_progress_bar=False)
    torch.manual_seed(0)
    assert fit.scores["elbo"] == pytest.approx(float(trained.get_elbo(indices=trained.validation_indices)), abs=1e-4)
    without = replace(small, training=lambda task: {"fit_prior": False})(task)
    assert without.fit_cpu_s is None
    assert without.scores["kl"] == without.scores["kl_before"] == fit.scores["kl_before"]
    np.testing.assert_array_equal(without.latent, fit.latent)


def test_controls_come_with_one_training_and_alone_run_their_parent(adata, monkeypatch, tmp_path):
    monkeypatch.setattr(_compare, "score_all", lambda *args, **kwargs: {"knn_accuracy": 0.5})
    monkeypatch.setitem(MODELS, "QBMSCVI", replace(MODELS["QBMSCVI"], arguments=lambda task: SMALL))
    monkeypatch.setattr(_cells.AutoregressiveDensity, "fit", lambda codes, seed: pytest.fail("not asked for"))
    trainings = []
    call = NeuralModel.__call__
    monkeypatch.setattr(NeuralModel, "__call__", lambda self, task: trainings.append(task.controls) or call(self, task))
    file = tmp_path / "records.jsonl"
    given = {"n_seeds": 1, "max_epochs": 2, "records": file, "progress": False, "accelerator": "cpu", **KEYS}
    names = ["real cells", "QBMSCVI, prior of training", "QBMSCVI", "QBMSCVI, own codes", "SCVI, own codes"]
    found = {record["model"]: record for record in compare(adata, models=names, **given)}
    assert list(found) == names
    assert trainings == [("real cells", "own codes"), ("prior of training", "own codes")]
    assert {record["model"] for record in read_records(file)} == set(names)
    scores = {name: record["scores"] for name, record in found.items()}
    assert all("cells_forest_auc" in of_name for of_name in scores.values())
    assert {name for name in names if "knn_accuracy" in scores[name]} == {"QBMSCVI"}
    assert scores["QBMSCVI"]["kl_before"] == scores["QBMSCVI, prior of training"]["kl"]
    assert scores["real cells"]["cells_mmd2"] < scores["SCVI, own codes"]["cells_mmd2"]
    assert found["QBMSCVI"]["fit_cpu_s"] > 0
    assert "elbo" not in scores["QBMSCVI, own codes"]
    again = compare(adata, models=names, **given)
    assert len(trainings) == 2
    assert {record["model"]: record for record in again} == found
    (more,) = compare(adata, models=["QBMSCVI, J shuffled"], **given)
    assert trainings[2:] == [("J shuffled",)]
    assert more["model"] == "QBMSCVI, J shuffled"
    assert len(read_records(file)) == len(names) + 1


def test_every_control_is_one_that_can_be_scored():
    known = {"real cells", "own codes", "J shuffled", "prior of training", *_cells._RIVALS}
    assert {control for _, control in CONTROLS.values()} == known
    assert all(parent in MODELS for parent, _ in CONTROLS.values())
    assert len(set(MODEL_NAMES)) == len(MODEL_NAMES)
    assert Control({}).fit_cpu_s is None


def records_of_cells() -> list[dict]:
    """Two data sets; on the second all own codes are as N(0, I) but for noise."""
    scores = {"real cells": 0.5, "SCVI": 0.9, "SCVI, own codes": 0.6, "SCVI, mixture of Gaussians": 0.7}
    scores |= {"QBMSCVI": 0.6, "QBMSCVI, own codes": 0.5, "QBMSCVI, J = 0": 0.8, "QBMSCVI, J shuffled": 0.9}
    facts = {"n_cells": 10, "n_genes": 5, "max_epochs": 2, "cpu_s": 1.0, "versions": {}, "settings": {}, "commit": "a"}
    records = []
    for data in ("first", "second"):
        for seed in range(4):
            for model, value in scores.items():
                value = value if data == "first" else 0.9
                own = {
                    "cells_forest_auc": value + 0.001 * (-1) ** seed * ("own" in model),
                    "cells_rare_types_found": None,
                }
                own |= {"cells_coverage": 1.0 - own["cells_forest_auc"], "cells_mmd2": value / 100}
                own |= {} if "own" in model or "real" in model else {"elbo": -100 * value, "kl": 3 * value}
                key = {"data": data, "model": model, "seed": seed, "schedule": "native"}
                records.append({**key, **facts, "scores": own})
    return records


def test_closed_shares_are_between_the_anchors_of_the_family():
    shares = closed_shares(as_table(records_of_cells()))
    expected = {
        "SCVI, mixture of Gaussians": 2 / 3,
        "QBMSCVI": 0.75,
        "QBMSCVI, J = 0": 0.25,
        "QBMSCVI, J shuffled": 0.0,
    }
    for metric in ("cells_forest_auc", "cells_coverage"):
        assert shares.xs("first", level=1)[metric].to_dict() == pytest.approx(expected, abs=0.01)
        assert shares.xs("second", level=1)[metric].isna().all()  # there is no gap
    records = records_of_cells()
    for record in records:  # a planted fault: own codes of the other family
        record["model"] = {"SCVI, own codes": "QBMSCVI, own codes", "QBMSCVI, own codes": "SCVI, own codes"}.get(
            record["model"], record["model"]
        )
    assert closed_shares(as_table(records))["cells_forest_auc"]["QBMSCVI", "first"] == pytest.approx(1.0, abs=0.01)


def test_report_has_a_section_on_cells_and_keeps_controls_out_of_the_others(tmp_path):
    records = records_of_cells()
    for record in records:
        if record["data"] == "second":  # as it was recorded before there were such scores
            record["scores"] = {"elbo": -9.0}
    text = write_report(records, tmp_path).read_text()
    before, section = text.split("## Cells from the prior")
    assert "mixture of Gaussians" not in before
    assert "QBMSCVI, J shuffled" in before
    rows = [row.split(" | ") for row in section.split("### first")[1].splitlines() if row.startswith("| ")]
    assert [row[0].strip("| ") for row in rows[2:10]] == [
        "real cells", "SCVI", "SCVI, own codes", "SCVI, mixture of Gaussians",
        "QBMSCVI", "QBMSCVI, J shuffled", "QBMSCVI, own codes", "QBMSCVI, J = 0",
    ]  # fmt: skip
    assert "### second" not in section
    assert "| 9.0 ± 0.0 |" in " | ".join(rows[3])  # MMD² of SCVI, in thousandths
    assert "| QBMSCVI | +0.7" in section.split("### Closed share")[1]
    differences = compute_differences(as_table(records)).set_index(["data", "metric", "model", "reference"])
    of_mixture = differences.loc["first", "elbo", "QBMSCVI", "SCVI, mixture of Gaussians"]
    assert of_mixture["mean"] == pytest.approx(10.0)
    best = differences.loc["first", "elbo", "QBMSCVI", "best SCVI"]
    assert best["mean"] == pytest.approx(30.0)  # SCVI as it is, not a control of it
    assert differences.loc["first", "cells_forest_auc", "QBMSCVI", "best SCVI"]["mean"] == pytest.approx(-0.3, abs=0.01)


def test_no_section_on_cells_without_scores_of_them(tmp_path):
    records = [r | {"scores": {"elbo": -9.0}} for r in records_of_cells() if r["model"] in ("SCVI", "QBMSCVI")]
    assert "Cells from" not in write_report(records, tmp_path).read_text()
