"""Which reading of the latent space keeps both cell types and order?

Trains QBMSCVI and, for reference, SCVI on the same KL schedule, on real counts, over several
seeds, and scores every reading of the latent space. One record per run in a JSON-lines file, so the script
resumes where it stopped; the table is written from the records:

    python benchmarks/representation.py --data ../shared/data
    python benchmarks/representation.py --table-only
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scvi
import torch

import qbmscvi
from qbmscvi.benchmark import prepare, score_latent

HERE = Path(__file__).parent
DATA_SETS = {
    "kang_ifnb": {"batch_key": "batch", "order_key": None},
    "pbmc_facs": {"batch_key": None, "order_key": None},
    "pancreas_endo": {"batch_key": None, "order_key": "stage"},
}
MODELS = {
    "SCVI": scvi.model.SCVI,
    "spins": qbmscvi.QBMSCVI,
}
READINGS = {
    "SCVI": {"mean": {}},
    "spins": {"mean": {"representation": "mean"}, "logits": {"representation": "logits"}},
}
METRICS = {
    "knn_accuracy": "kNN accuracy",
    "kmeans_ari": "k-means ARI",
    "silhouette": "silhouette",
    "batch_knn_accuracy": "batch kNN (lower)",
    "pseudotime_tau": "pseudotime tau",
    "pseudotime_finite": "finite pseudotime",
}


def run(adata: anndata.AnnData, name: str, keys: dict, seed: int, epochs: int) -> list[dict]:
    model_class = MODELS[name]
    scvi.settings.seed = seed
    model_class.setup_anndata(adata, batch_key=keys["batch_key"])
    model = model_class(adata, gene_likelihood="nb")
    started = time.process_time()
    model.train(
        max_epochs=epochs,
        plan_kwargs={"n_epochs_kl_warmup": epochs // 2},
        enable_progress_bar=False,
        accelerator="cpu",
    )
    seconds = time.process_time() - started
    held_out = float(model.get_elbo(indices=model.validation_indices))
    records = []
    for reading, how in READINGS[name].items():
        scores = score_latent(
            model.get_latent_representation(**how),
            adata.obs["cell_type"].to_numpy(),
            None if keys["batch_key"] is None else adata.obs[keys["batch_key"]].to_numpy(),
            order=None if keys["order_key"] is None else adata.obs[keys["order_key"]].astype(float).to_numpy(),
            seed=seed,
        )
        records.append({"model": name, "reading": reading, "seed": seed, "cpu_s": seconds, "elbo": held_out, **scores})
    return records


def write_table(records_path: Path, table_path: Path) -> None:
    table = pd.DataFrame([json.loads(line) for line in records_path.read_text().splitlines()])
    sweeps = set(table["n_sweeps"]) if "n_sweeps" in table else {3}  # the default before it was recorded
    lines = [
        "# What the latent representation should be",
        "",
        f"Written by `{Path(__file__).name}` from its records: {table['epochs'].iloc[0]} epochs, "
        f"{table['n_genes'].iloc[0]} genes (or all), NB likelihood, KL weight reaching one half-way in every model, "
        f"{', '.join(map(str, sorted(sweeps)))} Gibbs sweeps a step, {table['seed'].nunique()} seeds; mean and "
        "standard deviation over seeds. "
        f"{table['versions'].iloc[0]}; commit {', '.join(sorted(table['commit'].unique()))}.",
        "",
    ]
    for data, part in table.groupby("data", sort=False):
        shown = [metric for metric in METRICS if metric in part and part[metric].notna().any()]
        lines += [f"## {data}", ""]
        lines += ["| model | read as | " + " | ".join(METRICS[m] for m in shown) + " | held-out ELBO |"]
        lines += ["|" + "---|" * (len(shown) + 3)]
        for (model, reading), rows in part.groupby(["model", "reading"], sort=False):
            cells = [f"{rows[m].mean():.3f} ± {rows[m].std(ddof=1):.3f}" for m in shown]
            cells.append(f"{rows['elbo'].mean():.1f} ± {rows['elbo'].std(ddof=1):.1f}")
            lines.append(f"| {model} | {reading} | " + " | ".join(cells) + " |")
        lines.append("")
    table_path.write_text("\n".join(lines))
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of the .h5ad")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--records", type=Path, default=HERE / "representation.jsonl")
    parser.add_argument("--table", type=Path, default=HERE / "REPRESENTATION.md")
    parser.add_argument("--table-only", action="store_true", help="write the table from existing records")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if not options.table_only:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        facts = {
            "epochs": options.epochs,
            "n_genes": options.genes,
            "n_sweeps": qbmscvi.SamplingSchedule().n_sweeps,
            "commit": commit,
            "versions": f"scvi-tools {scvi.__version__}, torch {torch.__version__}, numpy {np.__version__}",
        }
        done = set()
        if options.records.exists():
            records = [json.loads(line) for line in options.records.read_text().splitlines()]
            done = {(r["data"], r["model"], r["seed"]) for r in records}
        for seed in range(options.seeds):
            for data, keys in DATA_SETS.items():
                adata = prepare(
                    anndata.read_h5ad(options.data / f"{data}.h5ad"),
                    label_key="cell_type",
                    batch_key=keys["batch_key"],
                    n_genes=options.genes,
                    unlabeled="unassigned",
                )
                torch.set_num_threads(1)  # numba, under the choice of genes, has changed it
                for name in MODELS:
                    if (data, name, seed) in done:
                        continue
                    lines = [
                        json.dumps({"data": data, **facts, **r}) for r in run(adata, name, keys, seed, options.epochs)
                    ]
                    with options.records.open("a") as file:
                        file.write("\n".join(lines) + "\n")
                    print(data, name, seed, flush=True)
    write_table(options.records, options.table)


if __name__ == "__main__":
    main()
