"""What the page on many cells says: its recipes keep their promises, its numbers are those of the report."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import qbmscvi
from qbmscvi.samplers import BlockGibbsSampler, SamplingRequest
from qbmscvi.samplers.testing import tiny_problems

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "scaling.md"
RECORDS = ROOT / "benchmarks" / "scale.jsonl"


def fence_with(text: str) -> str:
    (fence,) = [part for part in PAGE.read_text().split("```python\n")[1:] if text in part.split("```")[0]]
    return fence.split("```")[0]


def test_samplers_of_one_file_share_its_budget(tmp_path):
    """In turns, in one process; the slow test below has several at once."""
    namespace: dict = {}
    exec(fence_with("class SharedBudget"), namespace)
    problem = next(iter(tiny_problems().values()))
    samplers = [namespace["SharedBudget"](BlockGibbsSampler(), tmp_path / "ledger", n_calls=5) for _ in range(2)]
    for seed in range(5):
        samplers[seed % 2].sample(SamplingRequest(problem, 1, seed=seed, n_sweeps=1))
    for sampler in samplers:
        with pytest.raises(namespace["BudgetExceeded"]):
            sampler.sample(SamplingRequest(problem, 1, seed=9, n_sweeps=1))


@pytest.mark.slow
def test_processes_share_one_budget(tmp_path):
    """Four processes send 40 requests each at once: 25 are answered in all, each of them once."""
    (tmp_path / "shared.py").write_text(fence_with("class SharedBudget"))
    (tmp_path / "trial.py").write_text(
        textwrap.dedent("""
            from qbmscvi.exceptions import BudgetExceeded
            from qbmscvi.samplers import BlockGibbsSampler, SamplingRequest
            from qbmscvi.samplers.testing import tiny_problems
            from shared import SharedBudget

            problem, n_answers = next(iter(tiny_problems().values())), 0
            sampler = SharedBudget(BlockGibbsSampler(), "budget.sqlite", n_calls=25)
            for seed in range(40):
                try:
                    sampler.sample(SamplingRequest(problem, 1, seed=seed, n_sweeps=1))
                except BudgetExceeded:
                    continue
                n_answers += 1
            print(n_answers)
        """)
    )
    command = [sys.executable, "trial.py"]
    trials = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = [int(trial.communicate(timeout=240)[0].split()[-1]) for trial in trials]
    assert sum(answers) == 25


def test_rounded_numbers_of_the_page_are_those_of_the_report():
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    own = [r for r in records if r["model"] == "QBMSCVI"]
    namespace = {"qbmscvi": qbmscvi}
    exec(fence_with("kept_per_cell = "), namespace)
    from_memory = [r["n_cells"] / r["seconds_epoch"] for r in own if r["source"] == "memory"]
    assert namespace["cells_per_second"] == pytest.approx(np.median(from_memory), rel=0.3)
    peaks = {r["n_cells"]: r["peak_train"] * 2**20 for r in own if r["source"] == "backed"}
    if len(peaks) > 1:
        grown = (peaks[max(peaks)] - peaks[min(peaks)]) / (max(peaks) - min(peaks))
        assert grown < namespace["kept_per_cell"]


@pytest.mark.slow
def test_trials_of_autotune_share_one_budget(tmp_path):
    """Two trials of at least six requests each, five calls between them. Needs ``scvi-tools[autotune]``."""
    for package in ("hyperopt", "ray.tune", "scib_metrics"):
        pytest.importorskip(package)
    from ray import tune
    from scvi.autotune import run_autotune

    from qbmscvi import QBMSCVI, SamplingSchedule
    from qbmscvi.datasets import synthetic_counts
    from qbmscvi.samplers import SimulatedAnnealingSampler

    namespace = {"__name__": "__main__"}  # so that the class travels to other processes, as from a notebook
    exec(fence_with("class SharedBudget"), namespace)
    ledger = tmp_path / "budget.sqlite"
    adata = synthetic_counts(200, 50)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    experiment = run_autotune(
        QBMSCVI,
        data=adata,
        metrics="elbo_validation",
        mode="min",
        search_space={
            "model_params": {"n_latent": tune.grid_search([4, 6]), "n_chains": 32},
            "train_params": {
                "max_epochs": 3,
                "train_size": 0.7,
                "schedule": SamplingSchedule(every_n_steps=1),
                "sampler": namespace["SharedBudget"](SimulatedAnnealingSampler(), ledger, n_calls=5),
            },
        },
        num_samples=1,
        seed=0,
        scheduler="asha",
        searcher="random",
        logging_dir=str(tmp_path),
        resources={"cpu": 1},
        ignore_reinit_error=True,
    )
    trials = experiment.result_grid.get_dataframe()
    assert np.isfinite(trials["elbo_validation"]).all()
    assert len(trials) == 2
    with sqlite3.connect(ledger) as connection:
        assert connection.execute("SELECT COUNT(*) FROM calls").fetchone() == (5,)
