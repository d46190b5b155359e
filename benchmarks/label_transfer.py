"""Labels of a fifth of the cells, transferred to the others: QBMSCANVI beside SCANVI on real counts.

Each model is trained without labels for 100 epochs and then, with the labels of 20 % of the cells, for the number of
epochs that is its default. SCANVI runs as it is by default, with the KL schedule and the optimizer of QBMSCANVI (weight
one after a tenth of the first part, and in the second from the start; Adam's epsilon 1e-8), and so again with as many
latent units as QBMSCANVI has spins. One record per run in a JSON-lines file, so that the script resumes where it
stopped; several processes may share the work (``--seeds 0 2 4`` in one, ``--seeds 1 3`` in another):

    python benchmarks/label_transfer.py --data ../shared/data
    python benchmarks/label_transfer.py --table-only
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scvi
import torch
from sklearn.metrics import f1_score

import qbmscvi
from qbmscvi.benchmark import paired_difference, prepare

HERE = Path(__file__).parent
DATA_SETS = {"kang_ifnb": "batch", "pbmc_facs": None}
SHARE_KNOWN = 0.2
EPOCHS = 100
SAME = {"n_epochs_kl_warmup": EPOCHS // 10, "eps": 1e-8}, {"n_epochs_kl_warmup": None, "eps": 1e-8}
SCVIS_RATE = {"optimizer": "Adam", "lr": 1e-3, "prior_lr": 5e-5}
# Class, arguments of its constructor, of its training plan without labels, and with them.
MODELS = {
    "SCANVI": (scvi.model.SCVI, {}, {}, {}),
    "SCANVI, same schedule": (scvi.model.SCVI, {}, *SAME),
    "SCANVI, same schedule and width": (scvi.model.SCVI, {"n_latent": 64}, *SAME),
    "QBMSCANVI": (qbmscvi.QBMSCVI, {}, SCVIS_RATE, SCVIS_RATE),
}
REFERENCES = tuple(name for name in MODELS if name != "QBMSCANVI")
METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1"}


def run(adata: anndata.AnnData, name: str, batch_key: str | None, seed: int) -> dict:
    truth = adata.obs["cell_type"].astype(str).to_numpy()
    is_known = np.random.default_rng(seed).random(adata.n_obs) < SHARE_KNOWN
    adata.obs["label"] = np.where(is_known, truth, "Unknown")
    model_class, arguments, first, second = MODELS[name]
    quiet = {"enable_progress_bar": False, "accelerator": "cpu"}
    scvi.settings.seed = seed
    started = time.process_time()
    model_class.setup_anndata(adata, batch_key=batch_key)
    model = model_class(adata, **arguments)
    model.train(max_epochs=EPOCHS, plan_kwargs=first, **quiet)
    if model_class is qbmscvi.QBMSCVI:
        model = qbmscvi.QBMSCANVI.from_qbmscvi_model(model, "Unknown", "label")
    else:
        model = scvi.model.SCANVI.from_scvi_model(model, "Unknown", "label")
    model.train(plan_kwargs=second, **quiet)
    seconds = time.process_time() - started
    truth, predicted = truth[~is_known], model.predict()[~is_known]
    return {
        "model": name,
        "seed": seed,
        "accuracy": float((truth == predicted).mean()),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
        "cpu_s": seconds,
    }


def difference(table: pd.DataFrame, model: str, reference: str, metric: str) -> str:
    """Mean over seeds of model minus reference, with the 95 % interval of Student's t."""
    wide = table.pivot(index="seed", columns="model", values=metric)
    result = paired_difference(wide[model], wide[reference])
    return f"{result.mean:+.4f} ({result.low:+.4f} to {result.high:+.4f})"


def write_table(records_path: Path, table_path: Path) -> None:
    table = pd.DataFrame([json.loads(line) for line in records_path.read_text().splitlines()])
    lines = [
        "# Transfer of labels",
        "",
        f"Written by `{Path(__file__).name}` from its records. {SHARE_KNOWN:.0%} of the cells with labels, drawn anew "
        f"for each of {table['seed'].nunique()} seeds; scores over the other cells; 2,000 genes; {EPOCHS} epochs "
        "without labels, then the default number with them. SCANVI as it is by default, with the KL schedule and "
        "Adam's epsilon of QBMSCANVI, and so with its width; all with Adam at scVI's learning rate, which is not the "
        "default of QBMSCANVI. Mean ± standard deviation over seeds. "
        f"{table['versions'].iloc[0]}.",
        "",
    ]
    for data, part in table.groupby("data", sort=False):
        lines += [f"## {data}", "", "| model | " + " | ".join(METRICS.values()) + " | CPU, s |", "|---|---|---|---|"]
        for model in MODELS:
            rows = part[part["model"] == model]
            if rows.empty:
                continue
            cells = [f"{rows[metric].mean():.4f} ± {rows[metric].std(ddof=1):.4f}" for metric in METRICS]
            lines.append(f"| {model} | " + " | ".join(cells) + f" | {rows['cpu_s'].mean():.0f} |")
        lines += ["", "Paired differences over seeds (95 % interval, Student's t):", ""]
        lines += ["| | against | " + " | ".join(METRICS.values()) + " |", "|---|---|---|---|"]
        for reference in [name for name in REFERENCES if name in set(part["model"])]:
            cells = [difference(part, "QBMSCANVI", reference, metric) for metric in METRICS]
            lines.append(f"| QBMSCANVI | {reference} | " + " | ".join(cells) + " |")
        lines.append("")
    table_path.write_text("\n".join(lines))
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of the .h5ad")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--records", type=Path, default=HERE / "label_transfer.jsonl")
    parser.add_argument("--table", type=Path, default=HERE / "LABEL_TRANSFER.md")
    parser.add_argument("--table-only", action="store_true", help="write the table from existing records")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if options.table_only:
        write_table(options.records, options.table)
        return
    done = set()
    if options.records.exists():
        records = [json.loads(line) for line in options.records.read_text().splitlines()]
        done = {(record["data"], record["model"], record["seed"]) for record in records}
    versions = f"scvi-tools {scvi.__version__}, torch {torch.__version__}, numpy {np.__version__}"
    for data, batch_key in DATA_SETS.items():
        adata = anndata.read_h5ad(options.data / f"{data}.h5ad")
        adata = prepare(adata, label_key="cell_type", batch_key=batch_key, unlabeled="unassigned")
        torch.set_num_threads(1)  # numba, under the choice of genes, has changed it
        for seed in options.seeds:
            for name in MODELS:
                if (data, name, seed) in done:
                    continue
                record = {"data": data, **run(adata, name, batch_key, seed), "versions": versions}
                with options.records.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(record, flush=True)


if __name__ == "__main__":
    main()
