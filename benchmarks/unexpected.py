"""Does the prior know which cells are unexpected? A type is left out of training and looked for among held-out cells.

    python benchmarks/unexpected.py --data ../shared/data
    python benchmarks/unexpected.py --table-only

For each data set, seed and type of at least 30 cells, SCVI and QBMSCVI are trained on four fifths of the cells of the
other types. Held-out cells of these and all cells of the type are then scored, and AUROC says how well the score tells
the type from the rest (.5: not at all). Scores: the energy of the cell's posterior under the fitted prior, its KL
divergence, and the mean distance to the 15 nearest training cells in the latent space of QBMSCVI (angles) and of SCVI
(means), which is the base line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scvi
import torch
from results import DATA_SETS, load
from scvi.model import SCVI
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from study import run_study

from qbmscvi import QBMSCVI
from qbmscvi.benchmark import pooled_difference

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from pathlib import Path

    from anndata import AnnData

LEAST_CELLS = 30
SCORES = ["energy", "KL", "distance, QBMSCVI", "distance, SCVI"]


def measure(name: str, seed: int, options: argparse.Namespace, done: list[dict]) -> Iterator[dict]:
    adata = load(name, options.data, options.n_genes, options.max_cells)
    counts = adata.obs[DATA_SETS[name]["label_key"]].astype(str).value_counts()
    for label in sorted(set(counts.index[counts >= LEAST_CELLS]) - {record["type"] for record in done}):
        yield measure_type(adata, name, seed, label, options.epochs)


def measure_type(adata: AnnData, name: str, seed: int, label: str, epochs: int) -> dict:
    """AUROC of each score after training without this type."""
    labels = adata.obs[DATA_SETS[name]["label_key"]].astype(str).to_numpy()
    rng = np.random.default_rng(seed)
    known = rng.permutation(np.flatnonzero(labels != label))
    n_held_out = len(known) // 5
    held_out, training = np.sort(known[:n_held_out]), np.sort(known[n_held_out:])
    cells = np.concatenate([held_out, np.flatnonzero(labels == label)])
    is_new = labels[cells] == label
    record = {"type": label, "n_cells": int(is_new.sum())}
    for model_class in (QBMSCVI, SCVI):
        scvi.settings.seed = seed
        train = adata[training].copy()
        batch_key = DATA_SETS[name].get("batch_key")
        model_class.setup_anndata(train, batch_key=batch_key)
        model = model_class(train)
        model.train(max_epochs=epochs, accelerator="cpu", enable_progress_bar=False)
        both = adata[np.concatenate([cells, training])].copy()
        own, reference = np.arange(len(cells)), np.arange(len(cells), both.n_obs)
        latent = model.get_latent_representation(both)
        neighbors = NearestNeighbors(n_neighbors=15).fit(latent[reference])
        scores = {f"distance, {model_class.__name__}": neighbors.kneighbors(latent[own])[0].mean(1)}
        if model_class is QBMSCVI:
            torch.manual_seed(seed)
            scores |= {"energy": model.get_prior_energy(both)[own], "KL": model.get_kl(both)[own]}
        record |= {score: float(roc_auc_score(is_new, values)) for score, values in scores.items()}
    return record


def write_table(records: pd.DataFrame, path: Path) -> None:
    of_types = records.groupby(["data", "type"])[SCORES].mean()
    of_sets = of_types.groupby("data").mean()
    lines = [
        "# Unexpected cells",
        "",
        "AUROC of a score that is to tell a type that training did not see from held-out cells of the others. See",
        "`benchmarks/unexpected.py`, which wrote this page. Means over types, then over data sets. The last line has",
        "differences to the distance in SCVI's latent space, with Student's t interval (95 %) over data sets.",
        "",
        "| data set | types | " + " | ".join(SCORES) + " |",
        "|---|---|" + "---|" * len(SCORES),
    ]
    for name, row in of_sets.iterrows():
        n_types = len(of_types.loc[name])
        lines.append(f"| {name} | {n_types} | " + " | ".join(f"{row[score]:.3f}" for score in SCORES) + " |")
    lines.append("| mean | | " + " | ".join(f"{of_sets[score].mean():.3f}" for score in SCORES) + " |")
    cells = []
    for score in SCORES:
        gain = (of_sets[score] - of_sets["distance, SCVI"]).to_numpy()
        found = pooled_difference({name: [value] for name, value in zip(of_sets.index, gain, strict=True)})
        cells.append(f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})" if gain.any() else "")
    lines += ["| minus distance, SCVI | | " + " | ".join(cells) + " |", "", "Each type:", ""]
    lines += ["| data set | type | cells | " + " | ".join(SCORES) + " |", "|---|---|---|" + "---|" * len(SCORES)]
    n_cells = records.groupby(["data", "type"])["n_cells"].first()
    for (name, label), row in of_types.iterrows():
        numbers = " | ".join(f"{row[score]:.3f}" for score in SCORES)
        lines.append(f"| {name} | {label} | {n_cells[name, label]} | {numbers} |")
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run_study("unexpected", __doc__, measure, write_table, epochs=100, n_genes=2_000, max_cells=4_000)
