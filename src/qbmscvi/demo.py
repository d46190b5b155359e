"""The whole product in one command: train QBMSCVI and SCVI side by side, print a table, write figures.

Without arguments the cells are generated, with known types, batches and a branching order. With ``--data`` the same
runs on any ``.h5ad`` file of raw counts. Both models get the same cells, genes, split, likelihood, epochs and KL
schedule. The table is one run of each model on one data set: it shows that everything works, not which model is
better.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from scvi.model import SCVI

    from qbmscvi import QBMSCVI

_OPTIONS = {name: f"--{name.replace('_', '-')}" for name in ("label_key", "batch_key", "order_key", "layer", "n_genes")}
_OPTIONS |= {"max_epochs": "--max-epochs", "threads": "--threads", "sampler": "--sampler"}
_SAMPLERS = ("gibbs", "parallel_tempering", "simulated_annealing", "path_integral_annealing", "coherent_ising")
_MAX_SCORED_CELLS = 20_000
_COLUMNS = {
    "reconstruction": "held-out reconstruction, nats (lower)",
    "elbo": "held-out ELBO, nats (higher)",
    "knn_accuracy": "kNN label accuracy (higher)",
    "logistic_accuracy": "logistic label accuracy (higher)",
    "batch_knn_accuracy": "kNN batch accuracy (lower)",
    "batch_chance": "... without information",
    "pseudotime_tau": "Kendall tau of pseudotime (higher)",
    "pseudotime_finite": "... share of cells reached",
    "seconds": "training time, s",
}


def build_parser() -> argparse.ArgumentParser:
    """Command line of ``python -m qbmscvi.demo``."""
    parser = argparse.ArgumentParser(
        prog="python -m qbmscvi.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="an .h5ad file of raw counts; cells are generated without it")
    parser.add_argument("--layer", help="layer that holds the counts; X without it")
    parser.add_argument("--batch-key", help="column of obs with the batch")
    parser.add_argument("--label-key", help="column of obs with the cell type; needed with --data")
    parser.add_argument("--order-key", help="numeric column of obs with a known order, e.g. the day")
    parser.add_argument("--n-genes", type=int, default=2000, help="highly variable genes to keep (default 2000)")
    parser.add_argument("--max-epochs", type=int, help="epochs of either model (default: scVI's choice, at most 100)")
    parser.add_argument(
        "--latent", choices=["spins", "gaussian-spins"], default="spins", help="latent family of QBMSCVI"
    )
    parser.add_argument("--sampler", choices=_SAMPLERS, default="gibbs", help="sampler of QBMSCVI (default gibbs)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; the matrices are small (default 1)")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for table and figures")
    return parser


def load_counts(options: argparse.Namespace) -> AnnData:
    """Read or generate the cells, and keep highly variable genes.

    Raises
    ------
    ValueError
        If the file cannot be read, or a column or number does not fit.
    """
    from qbmscvi.benchmark._compare import check_data
    from qbmscvi.benchmark._data import labeled_cells
    from qbmscvi.datasets import synthetic_counts
    from qbmscvi.exceptions import require_integer

    require_integer("n_genes", options.n_genes, 1)
    require_integer("threads", options.threads, 1)
    if options.max_epochs is not None:
        require_integer("max_epochs", options.max_epochs, 1)

    if options.data is None:
        options.batch_key, options.label_key, options.order_key = "batch", "cell_type", "pseudotime"
        return synthetic_counts(seed=options.seed)
    import anndata
    import scanpy as sc

    if not options.data.is_file():
        msg = f"--data {options.data} is not a file. Pass the path of an .h5ad file."
        raise ValueError(msg)
    try:
        adata = anndata.read_h5ad(options.data)
    except OSError as error:
        msg = f"--data {options.data} cannot be read as an .h5ad file: {error}. Pass another file."
        raise ValueError(msg) from error
    if options.label_key is None:
        columns = ", ".join(map(repr, adata.obs)) or "none"
        msg = f"`label_key` is needed with --data: the column of obs with the cell type. There are: {columns}."
        raise ValueError(msg)
    adata = adata[labeled_cells(adata.obs, options.label_key)]
    adata = check_data(adata, options.label_key, options.batch_key, options.order_key, None, options.layer)
    if adata.n_vars > options.n_genes:
        # The pearson-residual flavor takes counts and needs no further package.
        sc.experimental.pp.highly_variable_genes(adata, n_top_genes=options.n_genes, batch_key=options.batch_key)
        adata = adata[:, adata.var["highly_variable"]].copy()
    n_before = adata.n_obs
    sc.pp.filter_cells(adata, min_counts=1)
    if adata.n_obs < n_before:
        print(f"{n_before - adata.n_obs} cells without counts in the chosen genes were left out.")
    return adata


def train(
    model_class: type[SCVI], adata: AnnData, options: argparse.Namespace, arguments: dict, train_arguments: dict
) -> tuple[SCVI, dict[str, float]]:
    """Train one model; return it with what it cost and how it fits the held-out cells."""
    import scvi
    import torch
    from scvi.model._utils import get_max_epochs_heuristic

    torch.set_num_threads(options.threads)  # numba, under scanpy, sets the threads of torch's OpenMP anew
    scvi.settings.seed = options.seed
    model_class.setup_anndata(adata, batch_key=options.batch_key)
    model = model_class(adata, gene_likelihood="nb", **arguments)
    max_epochs = options.max_epochs or min(100, get_max_epochs_heuristic(adata.n_obs))
    started = time.perf_counter()
    model.train(
        max_epochs=max_epochs,
        check_val_every_n_epoch=1,
        plan_kwargs={"n_epochs_kl_warmup": max(1, max_epochs // 2)},
        **train_arguments,
    )
    seconds = time.perf_counter() - started
    held_out = model.validation_indices
    return model, {
        "reconstruction": float(model.get_reconstruction_error(indices=held_out)["reconstruction_loss"]),
        "elbo": float(model.get_elbo(indices=held_out)),
        "seconds": seconds,
    }


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Run the demo; return its table, one column per model."""
    options = build_parser().parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    from qbmscvi.benchmark.__main__ import name_options

    try:
        adata = load_counts(options)
    except (TypeError, ValueError) as error:
        hint = "With `make demo` the options --data, --batch-key and --label-key are DATA=, BATCH_KEY= and LABEL_KEY=."
        sys.exit(f"error: {name_options(error, _OPTIONS)} {hint}")

    from scvi.model import SCVI

    from qbmscvi._model import QBMSCVI
    from qbmscvi.benchmark import score_latent
    from qbmscvi.benchmark._metrics import as_numbers

    options.out.mkdir(parents=True, exist_ok=True)
    zeros = 1.0 - np.count_nonzero(adata.X.data if hasattr(adata.X, "data") else adata.X) / np.prod(adata.shape)
    print(f"{adata.n_obs} cells, {adata.n_vars} genes, {zeros:.0%} zeros")
    order = None if options.order_key is None else as_numbers(adata.obs[options.order_key])
    scored = np.random.default_rng(options.seed).permutation(adata.n_obs)[:_MAX_SCORED_CELLS]
    runs = {
        "QBMSCVI": (QBMSCVI, {"latent": options.latent}, {"sampler": options.sampler}),
        "SCVI": (SCVI, {}, {}),
    }
    models, rows = {}, {}
    for name, (model_class, arguments, train_arguments) in runs.items():
        print(f"\nTraining {name}")
        models[name], fit = train(model_class, adata, options, arguments, train_arguments)
        adata.obsm[f"X_{name}"] = models[name].get_latent_representation()
        scores = score_latent(
            adata.obsm[f"X_{name}"][scored],
            adata.obs[options.label_key].to_numpy()[scored],
            None if options.batch_key is None else adata.obs[options.batch_key].to_numpy()[scored],
            order=None if order is None else order[scored],
            seed=options.seed,
        )
        rows[name] = {**scores, **fit}
    table = pd.DataFrame(rows).reindex([key for key in _COLUMNS if key in next(iter(rows.values()))])
    print("\n" + table.rename(_COLUMNS).to_string(float_format=lambda value: f"{value:.3f}") + "\n")
    table.to_csv(options.out / "table.csv")
    settings = {key: str(value) for key, value in vars(options).items()}
    packages = {name: version(name) for name in ("qbmscvi", "scvi-tools", "torch", "scanpy", "numpy")}
    (options.out / "settings.json").write_text(
        json.dumps({"settings": settings, "python": platform.python_version(), **packages}, indent=2) + "\n"
    )
    for path in write_figures(models, adata, options, scored):
        print(f"wrote {path}")
    return table


def write_figures(
    models: dict[str, SCVI], adata: AnnData, options: argparse.Namespace, scored: np.ndarray
) -> list[Path]:
    """Write the figures; return their paths."""
    import matplotlib.pyplot as plt
    import scanpy as sc

    from qbmscvi import pl

    paths = []
    keys = [key for key in (options.label_key, options.batch_key) if key is not None]
    figure, axes = plt.subplots(
        len(models), len(keys), figsize=(6.5 * len(keys), 4.8 * len(models)), squeeze=False, layout="constrained"
    )
    shown = adata[np.sort(scored)].copy()
    for row, name in zip(axes, models, strict=True):
        sc.pp.neighbors(shown, use_rep=f"X_{name}", random_state=options.seed)
        sc.tl.umap(shown, random_state=options.seed)
        for ax, key in zip(row, keys, strict=True):
            pl.embedding(shown.obsm["X_umap"], shown.obs[key], title=f"{name}: {key}", axis_name="UMAP", ax=ax)
    paths.append(_save(figure, options.out / "umap.png"))

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    histories = {name: model.history for name, model in models.items()}
    for ax, key, label in zip(
        axes, ("elbo_train", "elbo_validation"), ("negative ELBO, training", "negative ELBO, held out"), strict=True
    ):
        pl.training_curves(histories, key, ylabel=f"{label} (nats per cell)", skip=2, ax=ax)
    paths.append(_save(figure, options.out / "training_curves.png"))

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    _draw_couplings(models["QBMSCVI"], axes[0])
    _draw_energies(models["QBMSCVI"], options.seed, axes[1])
    paths.append(_save(figure, options.out / "prior.png"))
    return paths


def _draw_couplings(model: QBMSCVI, ax: Axes) -> None:
    from qbmscvi import pl

    prior = model.module.prior
    if prior.n_gaussian:
        matrix, labels = prior.W.detach().cpu().numpy(), {"ylabel": "Gaussian unit", "colorbar_label": "W"}
    else:
        matrix = model.get_ising_model().couplings().cpu().numpy()[: prior.n_visible, prior.n_visible :]
        labels = {"ylabel": "spin", "xlabel": "hidden spin"}
    pl.coupling_matrix(matrix, order="communities", title="couplings of the prior", ax=ax, **labels)


def _draw_energies(model: QBMSCVI, seed: int, ax: Axes) -> None:
    import torch

    from qbmscvi import pl

    prior = model.module.prior
    draws = {
        "cells (draws of the posterior)": model.get_latent_representation(give_mean=False, layer="both"),
        "draws of the prior": model.sample_prior(5_000, seed=seed),
    }
    with torch.inference_mode():
        energies = {name: prior.energy(torch.from_numpy(z).to(model.device)).cpu() for name, z in draws.items()}
    pl.energy_histogram(energies, title="energy under the prior", ax=ax)


def _save(figure: Figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


if __name__ == "__main__":
    main()
