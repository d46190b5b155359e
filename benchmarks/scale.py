"""What does a million cells cost? Memory and CPU time of an epoch and of the embedding, beside scVI.

    python benchmarks/scale.py --folder /somewhere/with/4/GB
    python benchmarks/scale.py --folder /somewhere/with/4/GB --sizes 10000 100000 --models QBMSCVI
    python benchmarks/scale.py --table-only

Generated counts lie in a sparse .h5ad file per size; the smaller ones are the first cells of the largest. Each
measurement is a process of its own, and its record a line of ``scale.jsonl``; what the records have is not measured
again. The table is SCALE.md.

"memory" reads the file whole, "backed" opens it with ``backed="r"``, and "annbatch" reads a zarr collection made of it
through scvi-tools' data module (Python >= 3.12, scvi-tools >= 1.5, ``pip install annbatch``; left out elsewhere). The
latent representation is computed for blocks of cells and streamed to an .h5 file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from operator import itemgetter
from pathlib import Path

import anndata
import h5py
import numpy as np
import scvi
import torch
from lightning.pytorch.callbacks import Callback

from qbmscvi import QBMSCVI
from qbmscvi.datasets import synthetic_counts

HERE = Path(__file__).parent
SIZES = (10_000, 100_000, 1_000_000)
N_GENES, MEAN_DEPTH, BATCH_SIZE = 2000, 190.0, 512  # 5 % of the counts are not zero
BLOCK = 20_000  # cells of one call for their representation
MODELS = {"SCVI": scvi.model.SCVI, "QBMSCVI": QBMSCVI}
SOURCES = ("memory", "backed", "annbatch")
MIB = 2**20
EXCESS_LIMIT, DISK_LIMIT = 1536, 3072  # MiB: in memory beyond the matrix, from disk in all


class Epoch(Callback):
    """CPU seconds of the steps of an epoch, loading included; what comes before and after is left out."""

    def on_train_epoch_start(self, trainer, pl_module):
        self._started = time.process_time()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seconds = time.process_time() - self._started


def peak() -> float:
    """Peak of this process in MiB. Not `ru_maxrss`, which a process takes over from the one that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def file_of(folder: Path, n_cells: int) -> Path:
    return folder / f"cells_{n_cells}_{N_GENES}_{MEAN_DEPTH:g}.h5ad"


def generate(folder: Path, sizes: list[int]) -> None:
    """Write the files, uncompressed; dense counts exist for a few thousand cells at a time."""
    adata = synthetic_counts(max(SIZES), N_GENES, mean_depth=MEAN_DEPTH, seed=0)
    for n_cells in sizes:
        (adata if n_cells == adata.n_obs else adata[:n_cells].copy()).write_h5ad(file_of(folder, n_cells))


def open_collection(model_class, folder: Path, n_cells: int, paths: list[str] | None = None):
    """Data module of scvi-tools over a zarr collection, which is made of ``paths`` if they are given."""
    return model_class.setup_annbatch(
        collection_path=str(file_of(folder, n_cells).with_suffix(".zarr")),
        paths=paths,
        rebuild=paths is not None,
        batch_key="batch",
        batch_size=BATCH_SIZE,
        preload_to_gpu=False,
        shuffle=True,
    )


def open_data(model_class, folder: Path, source: str, n_cells: int):
    """AnnData, set up, or a data module."""
    if source == "annbatch":
        return open_collection(model_class, folder, n_cells)
    adata = anndata.read_h5ad(file_of(folder, n_cells), backed="r" if source == "backed" else None)
    model_class.setup_anndata(adata, batch_key="batch")
    return adata


def measure(name: str, source: str, n_cells: int, folder: Path) -> dict:
    """Train one epoch and embed all cells; MiB and CPU seconds."""
    model_class = MODELS[name]
    record = {"peak_start": peak()}
    data = open_data(model_class, folder, source, n_cells)
    is_module = source == "annbatch"
    if source == "memory":
        X = data.X
        record["density"] = X.nnz / np.prod(X.shape)
        record["matrix"] = (X.data.nbytes + X.indices.nbytes + X.indptr.nbytes) / MIB
    model = model_class(registry=data.registry) if is_module else model_class(data)
    record["peak_setup"] = peak()
    epoch = Epoch()
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "batch_size": BATCH_SIZE, "callbacks": [epoch]}
    settings |= {"datamodule": data} if is_module else {"train_size": 1.0}
    started = time.process_time()
    model.train(max_epochs=1, **settings)
    record |= {"seconds_train": time.process_time() - started, "seconds_epoch": epoch.seconds, "peak_train": peak()}
    forget_peak()
    started = time.process_time()
    out = folder / f"latent_{name}_{source}_{n_cells}.h5"
    embed(model, data if is_module else None, n_cells, out)
    record |= {"seconds_embed": time.process_time() - started, "peak_embed": peak(), "latent": out.stat().st_size / MIB}
    out.unlink()
    return record


def embed(model, datamodule, n_cells: int, out: Path) -> None:
    n_latent = model.module.n_latent
    with h5py.File(out, "w") as file:
        latent = file.create_dataset("latent", (n_cells, n_latent), "f4", chunks=(BLOCK // 20, n_latent))
        start = 0
        for part in blocks(model, datamodule, n_cells):
            latent[start : start + len(part)] = part
            start += len(part)
    if start != n_cells:
        raise RuntimeError(f"{start} of {n_cells} cells were embedded")


def blocks(model, datamodule, n_cells: int):
    if datamodule is None:
        for start in range(0, n_cells, BLOCK):
            yield model.get_latent_representation(indices=np.arange(start, min(start + BLOCK, n_cells)))
        return
    for tensors in datamodule.inference_dataloader():
        yield model.get_latent_representation(dataloader=[tensors])


def key_of(record: dict) -> tuple:
    return record["model"], record["source"], record["n_cells"]


def read_records(path: Path) -> dict[tuple, dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {key_of(record): record for record in map(json.loads, lines)}


def in_a_process(arguments: list[str], folder: Path) -> dict:
    command = [sys.executable, __file__, "--folder", str(folder), *arguments]
    load, started = os.getloadavg()[0], time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1]) | {
        "load": round(load, 1),
        "wall_seconds": round(time.perf_counter() - started),
        "versions": describe_versions(),
    }


def describe_versions() -> str:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE)
    return (
        f"Python {platform.python_version()}, scvi-tools {scvi.__version__}, anndata {anndata.__version__}, torch "
        f"{torch.__version__}, numpy {np.__version__}; commit {commit.stdout.strip()}"
    )


def describe_machine() -> str:
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, torch on 1 thread"


def run_all(options: argparse.Namespace) -> None:
    folder, records = options.folder, read_records(options.records)
    folder.mkdir(parents=True, exist_ok=True)

    def keep(record: dict) -> None:
        with options.records.open("a") as file:
            file.write(json.dumps(record) + "\n")
        write_report(read_records(options.records), options.out)

    missing = [n_cells for n_cells in options.sizes if not file_of(folder, n_cells).exists()]
    if missing:
        in_a_process(["--generate", *map(str, missing)], folder)
    for n_cells in options.sizes:
        for source in options.sources:
            if source == "annbatch" and not file_of(folder, n_cells).with_suffix(".zarr").exists():
                in_a_process(["--convert", str(n_cells)], folder)
            for model in options.models:
                key = {"model": model, "source": source, "n_cells": n_cells}
                if key_of(key) in records:
                    continue
                measured = in_a_process(["--measure", model, source, str(n_cells)], folder)
                keep(key | {"batch_size": BATCH_SIZE, "machine": describe_machine()} | measured)
                print(key | measured, flush=True)


def write_report(records: dict[tuple, dict], out: Path) -> None:
    """Tables of all records."""
    measured = sorted(
        records.values(),
        key=lambda r: (r["n_cells"], SOURCES.index(r["source"]), list(MODELS).index(r["model"])),
    )
    density = max(r.get("density", 0) for r in measured)
    lines = ["# Scale", "", f"Written by `{Path(__file__).name}` from `scale.jsonl`.", ""]
    for description in sorted({f"{r['machine']}; {r['versions']}." for r in measured}):
        lines += [description, ""]
    lines += [
        f"Generated counts (`qbmscvi.datasets.synthetic_counts`, seed 0): {N_GENES} genes, "
        f"{100 * density:.1f} % of the counts not zero, two batches.",
        f"Default models, one epoch in batches of {BATCH_SIZE} on all cells, then the representation of all cells, "
        f"streamed to a file in blocks of {BLOCK:,}. Each row is one process, measured once while other work ran (load "
        "average in the last column): CPU times of one row scatter by some ten percent.",
        "",
        "## Cost",
        "",
        "CPU microseconds per cell. What is left out of an epoch is what training does once: checks of the counts, and "
        "the last estimate of log Z.",
        "",
        "| cells | data | model | epoch, µs per cell | cells per s | once, s | embedding, µs per cell | load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in measured:
        once = r["seconds_train"] - r["seconds_epoch"]
        lines.append(
            f"| {r['n_cells']:,} | {r['source']} | {r['model']} | {1e6 * r['seconds_epoch'] / r['n_cells']:.0f} | "
            f"{r['n_cells'] / r['seconds_epoch']:.0f} | {once:.1f} | "
            f"{1e6 * r['seconds_embed'] / r['n_cells']:.0f} | {r['load']} |"
        )
    lines += [
        "",
        "## Memory",
        "",
        "MiB. A process that has imported everything and read nothing is in the first column; the matrix is what the "
        "CSR arrays take; peaks are those of the process up to the end of training, and during the embedding, whose "
        "process holds the trained model and the data.",
        "",
        "| cells | data | model | start | matrix | peak, training | beyond the matrix | peak, embedding |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in measured:
        beyond = [f"{r['matrix']:.0f}", f"{r['peak_train'] - r['matrix']:.0f}"] if "matrix" in r else ["", ""]
        lines.append(
            f"| {r['n_cells']:,} | {r['source']} | {r['model']} | {r['peak_start']:.0f} | {beyond[0]} | "
            f"{r['peak_train']:.0f} | {beyond[1]} | {r['peak_embed']:.0f} |"
        )
    lines += ["", *verdicts(measured)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "SCALE.md").write_text("\n".join(lines).rstrip() + "\n")


def verdicts(measured: list[dict]) -> list[str]:
    """What the limits say, and how the cost grows."""
    lines = ["## Limits", ""]
    for model in MODELS:
        own = [r for r in measured if r["model"] == model]
        peaks = [(r, max(r["peak_train"], r["peak_embed"])) for r in own]
        inside = {r["n_cells"]: value - r["matrix"] for r, value in peaks if r["source"] == "memory"}
        disk = {r["n_cells"]: value for r, value in sorted(peaks, key=itemgetter(1)) if r["source"] != "memory"}
        for values, limit, what in (
            (inside, EXCESS_LIMIT, "in memory, beyond the matrix"),
            (disk, DISK_LIMIT, "from disk, in all"),
        ):
            if values:
                most = max(values)
                says = "holds" if values[most] <= limit else "**is missed**"
                lines.append(
                    f"- {model}, {what}: {values[most]:.0f} MiB with {most:,} cells; the limit of {limit} MiB {says}."
                )
        for source in SOURCES:
            rows = {r["n_cells"]: r for r in own if r["source"] == source}
            if len(rows) < 2:
                continue
            few, many = rows[min(rows)], rows[max(rows)]
            cost = (many["seconds_epoch"] / many["n_cells"]) / (few["seconds_epoch"] / few["n_cells"])
            kept = (many["peak_train"] - many.get("matrix", 0)) - (few["peak_train"] - few.get("matrix", 0))
            lines.append(
                f"- {model}, {source}: an epoch of {many['n_cells']:,} cells costs {cost:.2f} times as much per cell "
                f"as one of {few['n_cells']:,}, and the peak of training grows by "
                f"{MIB * kept / (many['n_cells'] - few['n_cells']):.0f} bytes per cell (counts in memory apart)."
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "qbmscvi-scale", help="of the files"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="N")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    can_annbatch = importlib.util.find_spec("annbatch") is not None
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES if can_annbatch else SOURCES[:2]))
    parser.add_argument("--records", type=Path, default=HERE / "scale.jsonl")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of SCALE.md")
    parser.add_argument("--table-only", action="store_true", help="write the table from existing records")
    parser.add_argument("--generate", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--convert", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    scvi.settings.verbosity, scvi.settings.seed = logging.ERROR, 0
    torch.set_num_threads(1)
    if options.generate:
        generate(options.folder, options.generate)
        print("{}")
    elif options.convert:
        open_collection(
            MODELS["SCVI"], options.folder, options.convert, [str(file_of(options.folder, options.convert))]
        )
        print("{}")
    elif options.measure:
        model, source, n_cells = options.measure
        print(json.dumps(measure(model, source, int(n_cells), options.folder)))
    elif options.table_only:
        write_report(read_records(options.records), options.out)
    else:
        run_all(options)


if __name__ == "__main__":
    main()
