"""Compare QBMSCVI with scVI and other models on your own counts.

The command trains every model with every seed, adds one record per run to OUT/comparison.jsonl, and writes tables and
figures to OUT. It skips runs that the file has, so it continues where it was stopped. ``--cell MODEL SEED`` repeats a
single run and compares its scores with those in the file.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qbmscvi.benchmark._compare import compare
from qbmscvi.benchmark._data import prepare
from qbmscvi.benchmark._models import MODEL_NAMES
from qbmscvi.benchmark._records import read_records
from qbmscvi.benchmark._report import write_report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

_OPTIONS = {
    "label_key": "--label-key",
    "batch_key": "--batch-key",
    "order_key": "--order-key",
    "lineage_key": "--lineage-key",
    "layer": "--layer",
    "models": "--models",
    "n_seeds": "--seeds",
    "first_seed": "--first-seed",
    "max_epochs": "--epochs",
    "schedule": "--schedule",
    "n_genes": "--n-genes",
    "max_cells": "--max-cells",
    "n_threads": "--threads",
    "records": "--out",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the comparison that do not depend on the data."""
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="; ".join(MODEL_NAMES) + " (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default 5)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="epochs of every neural model (default: scVI's choice)")
    parser.add_argument("--schedule", default="native", help="native, default or half (default native)")
    parser.add_argument("--n-genes", type=int, default=2000, help="highly variable genes (default 2000)")
    parser.add_argument("--max-cells", type=int, help="keep a random subsample of this many cells")
    parser.add_argument("--save-latents", action="store_true", help="keep the representations, for figures of cells")
    parser.add_argument("--accelerator", default="auto", help="Lightning's accelerator (default auto)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")


def arguments(options: argparse.Namespace) -> dict:
    """Arguments of :func:`~qbmscvi.benchmark.compare` in the options of :func:`add_options`."""
    return {
        "models": options.models,
        "n_seeds": options.seeds,
        "first_seed": options.first_seed,
        "max_epochs": options.epochs,
        "schedule": options.schedule,
        "save_latents": options.save_latents,
        "accelerator": options.accelerator,
        "n_threads": options.threads,
    }


def name_options(message: object, options: Mapping[str, str] = _OPTIONS) -> str:
    """Text of an error, with command-line options in place of Python arguments."""
    names = "|".join(options)
    pattern = rf"(?<=`)({names})(?=`)|(?<=\()({names})(?=\))|\b({names})="
    return re.sub(pattern, lambda found: options[found[0].rstrip("=")] + " " * found[0].endswith("="), str(message))


def rerun_cell(adata: AnnData, cell: Sequence[str], given: dict, records: Path) -> float | None:
    """Repeat one run; print its scores and those in the file, and return the largest distance."""
    model, seed = cell
    again = {"models": [model], "n_seeds": 1, "first_seed": int(seed), "records": None, "save_latents": False}
    (new,) = compare(adata, **{**given, **again})
    key = ("data", "model", "seed", "schedule")
    found = [r for r in (read_records(records) if records.exists() else []) if all(r[k] == new[k] for k in key)]
    old = found[-1]["scores"] if found else {}
    for name, value in new["scores"].items():
        print(f"{name:45} {value!s:25} {old.get(name, '')}")
    both = [(value, old[name]) for name, value in new["scores"].items() if None not in (value, old.get(name))]
    if not both:
        return None
    distance = max(abs(a - b) for a, b in both)
    print(f"largest distance to the record: {distance:g}")
    return distance


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m qbmscvi.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="an .h5ad file of raw counts")
    parser.add_argument("--label-key", required=True, help="column of obs with the cell type")
    parser.add_argument("--batch-key", help="column of obs with the batch")
    parser.add_argument("--order-key", help="numeric column of obs with a known order, such as the day")
    parser.add_argument("--lineage-key", help="column of obs with the lineage, if the order holds within each only")
    parser.add_argument("--layer", help="layer that holds the counts; X without it")
    parser.add_argument("--unlabeled", help="label of cells without one, which are left out")
    add_options(parser)
    parser.add_argument("--cell", nargs=2, metavar=("MODEL", "SEED"), help="run this one again and compare")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder (default comparison)")
    options = parser.parse_args(argv)
    if not options.data.is_file():
        parser.error(f"{options.data} is not a file. Pass the path of an .h5ad file.")
    import anndata

    keys = {"label_key": options.label_key, "batch_key": options.batch_key}
    records = options.out / "comparison.jsonl"
    try:
        adata = anndata.read_h5ad(options.data)
    except OSError as error:
        parser.error(f"{options.data} cannot be read as an .h5ad file: {error}. Pass another file.")
    try:
        adata = prepare(
            adata,
            **keys,
            layer=options.layer,
            n_genes=options.n_genes,
            max_cells=options.max_cells,
            unlabeled=options.unlabeled,
        )
        keys |= {"order_key": options.order_key, "lineage_key": options.lineage_key}
        given = {**keys, "name": options.data.stem, **arguments(options)}
        if options.cell:
            rerun_cell(adata, options.cell, given, records)
            return
        compare(adata, records=records, **given)
    except (TypeError, ValueError, ImportError) as error:
        sys.exit(f"error: {name_options(error)}")
    print(f"wrote {write_report(records, options.out, title=f'Comparison on {options.data.stem}')}")


if __name__ == "__main__":
    main()
