"""The comparison on seven real data sets: records in ``results.jsonl``, tables and figures from them.

    python benchmarks/results.py --data ../shared/data
    python benchmarks/results.py --table-only
    python benchmarks/results.py --cell pancreas_endo QBMSCVI 3

Runs that the records have are not repeated. Several processes may share the work (``--sets``, ``--first-seed``).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

import anndata
from scvi.model import SCVI

from qbmscvi.benchmark import MODEL_NAMES, Fit, Task, available_models, compare, prepare, write_report
from qbmscvi.benchmark.__main__ import add_options, arguments, rerun_cell
from qbmscvi.benchmark._models import NeuralModel, same_optimizer, same_width

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
DATA_SETS = {
    "kang_ifnb": {"label_key": "cell_type", "batch_key": "batch"},
    "pbmc_cite_2batch": {"label_key": "cell_type", "batch_key": "batch"},
    "pbmc_facs": {"label_key": "cell_type"},
    "pancreas_endo": {"label_key": "cell_type", "order_key": "stage"},
    "paul15_batches": {"label_key": "cell_type", "batch_key": "batch", "order_key": "ery"},
    "cellline_mix5": {"label_key": "cell_type", "batch_key": "batch"},
    "marques_oligo": {"label_key": "cell_type", "batch_key": "batch", "order_key": "stage"},
}


def same_schedule(task: Task) -> dict:
    """QBMSCVI's KL warm-up and Adam's epsilon."""
    return {key: same_optimizer(task)[key] for key in ("n_epochs_kl_warmup", "n_steps_kl_warmup", "eps")}


class NormalVAE(NeuralModel):
    """scVI's networks on log-normalized values, with a size factor of one in place of the library size."""

    def build(self, task: Task, arguments: dict) -> SCVI:
        """Set the data up and make the model, untrained."""
        task.normalized.obs["unit"] = 1.0
        SCVI.setup_anndata(task.normalized, batch_key=task.batch_key, size_factor_key="unit")
        return SCVI(task.normalized, **arguments)


VARIANTS = {
    "SCVI, same schedule": NeuralModel(SCVI, plan=same_schedule),
    "SCVI, same schedule and width": NeuralModel(SCVI, same_width, same_schedule),
    "SCVI, same optimizer": NeuralModel(SCVI, plan=same_optimizer),
    "VAE, normal": NormalVAE(
        SCVI, lambda task: {"gene_likelihood": "normal", "log_variational": False}, is_normalized=True
    ),
}


def named(name: str, model: NeuralModel) -> Callable[[Task], Fit]:
    """The model as a function for :func:`~qbmscvi.benchmark.compare`, which tells functions apart by their names."""

    def run(task: Task) -> Fit:
        return model(task)

    run.__name__ = name
    return run


def load(name: str, folder: Path, n_genes: int, max_cells: int | None) -> anndata.AnnData:
    """Cells and genes of the comparison."""
    keys = DATA_SETS[name]
    return prepare(
        anndata.read_h5ad(folder / f"{name}.h5ad"),
        label_key=keys["label_key"],
        batch_key=keys.get("batch_key"),
        n_genes=n_genes,
        max_cells=max_cells,
        unlabeled="unassigned",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of the .h5ad")
    parser.add_argument("--sets", nargs="+", choices=DATA_SETS, default=list(DATA_SETS))
    add_options(parser)
    parser.add_argument("--cell", nargs=3, metavar=("SET", "MODEL", "SEED"), help="run this one again and compare")
    parser.add_argument("--records", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of RESULTS.md, and of results/ beside it")
    parser.add_argument("--table-only", action="store_true", help="write tables and figures from existing records")
    options = parser.parse_args()
    sets = [options.cell[0]] if options.cell else options.sets
    for name in [] if options.table_only else sets:
        keys = DATA_SETS[name]
        adata = load(name, options.data, options.n_genes, options.max_cells)
        given = {**keys, "name": name, **arguments(options)}
        models = {m: m for m in available_models(keys.get("batch_key"))} | {m: named(m, VARIANTS[m]) for m in VARIANTS}
        if options.cell:
            _, model, seed = options.cell
            rerun_cell(adata, (models.get(model, model), seed), given, options.records)
            return
        given["models"] = [models[m] for m in options.models or [*MODEL_NAMES, *VARIANTS] if m in models]
        compare(adata, records=options.records, **given)
    report = write_report(options.records, options.out / "results", title="QBMSCVI beside scVI")
    text = re.sub(r"^(!\[.*\]\()", r"\1results/", report.read_text(), flags=re.MULTILINE)
    report.unlink()
    (options.out / "RESULTS.md").write_text(text)
    print(f"wrote {options.out / 'RESULTS.md'} and, in {options.out / 'results'}, CSV and figures")


if __name__ == "__main__":
    main()
