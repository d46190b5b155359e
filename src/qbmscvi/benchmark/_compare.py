"""Train several models on one data set, with several seeds each, and keep one record per run.

A run in the file of records is not repeated, so a comparison continues where it stopped.
"""

from __future__ import annotations

import logging
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import scvi
import torch

from qbmscvi.benchmark._definitions import define
from qbmscvi.benchmark._latent_checks import as_numbers, as_order, order_by_lineage
from qbmscvi.benchmark._models import (
    CONTROLS,
    MODEL_NAMES,
    MODELS,
    Fit,
    NeuralModel,
    Schedule,
    Task,
    available_models,
    log_normalize,
    principal_components,
)
from qbmscvi.benchmark._records import append, plain, provenance, read_done, save_latent
from qbmscvi.benchmark._scores import N_NEIGHBORS, require_extra, score_all
from qbmscvi.exceptions import require_integer
from qbmscvi.model._counts import check_counts
from qbmscvi.model._input_checks import check_categories, check_matrix, get_column

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from anndata import AnnData

    from qbmscvi.benchmark._records import Definition, Record

    Model = Callable[[Task], Fit | np.ndarray]

_LOGGERS = ("lightning.fabric", "lightning.fabric.utilities.seed", "lightning.pytorch", "scib_metrics", "scvi")
_MIN_CELLS = 100  # scIB uses 90 neighbors
_MIN_GROUP = 5


def compare(
    adata: AnnData,
    *,
    label_key: str,
    batch_key: str | None = None,
    order_key: str | None = None,
    lineage_key: str | None = None,
    layer: str | None = None,
    name: str = "data",
    models: Sequence[str | Model] | None = None,
    n_seeds: int = 5,
    first_seed: int = 0,
    max_epochs: int | None = None,
    schedule: Schedule = "native",
    records: str | Path | None = "comparison.jsonl",
    save_latents: bool = False,
    accelerator: str = "auto",
    n_threads: int = 1,
    progress: bool = True,
) -> list[Record]:
    """Train models on the same cells, genes and split, score their representations, and record it all.

    Sets ``scvi.settings.seed`` and the number of torch's threads. Needs the extra ``benchmark``.

    Parameters
    ----------
    adata
        Raw counts of the cells and genes to compare on (:func:`~qbmscvi.benchmark.prepare` chooses them). Not changed.
    label_key
        Column of ``adata.obs`` with the cell type.
    batch_key
        Column with the batch; None for data without batches, which then have no scores of batches.
    order_key
        Numeric column with a known order, such as the day; NaN for cells off the trajectory.
    lineage_key
        Column with the lineage, if the order holds only within each lineage; missing for cells of none.
    layer
        Layer with the counts; None for ``X``.
    name
        Name of the data set in the records.
    models
        Names from :data:`~qbmscvi.benchmark.MODEL_NAMES`, or functions of your own, which take a
        :class:`~qbmscvi.benchmark.Task` and return a :class:`~qbmscvi.benchmark.Fit` or just the representation; their
        ``__name__`` names them in the records. None for all names that suit the data. A name such as
        ``"SCVI, own codes"`` belongs to a trained model, which is trained for it if necessary. A run of a function
        counts as done if its source, defaults, arguments of a partial, and the ``repr`` of the values that it names are
        the same; its attributes and other modules do not count.
    n_seeds, first_seed
        Number of seeds, and the first one; there is one run per model and seed.
    max_epochs
        Epochs of every neural model; None for scVI's choice.
    schedule
        KL warm-up. ``"native"``: each model's own default. ``"default"``: scVI's 400 epochs for all. ``"half"``: half
        of ``max_epochs`` for all.
    records
        JSON-lines file that gets each finished run, and provides runs to skip; None keeps no file.
    save_latents
        Whether to save each representation in a folder next to the records, for figures of
        :func:`~qbmscvi.benchmark.write_report`.
    accelerator
        Lightning's accelerator.
    n_threads
        Threads of torch in training; one suffices for small matrices. Scores always use one.
    progress
        Whether to show a progress bar.

    Returns
    -------
    The records of the requested runs, including those from the file, by seed and model.

    Raises
    ------
    ImportError
        If the extra ``benchmark`` is not installed.
    TypeError, ValueError
        If an argument does not fit, before any training.

    Warns
    -----
    UserWarning
        If the file has runs of a model with other settings, or of another version of this package. They stay in the
        file but are not used, and their seeds are run again.

    Examples
    --------
    >>> import qbmscvi
    >>> adata = qbmscvi.datasets.synthetic_counts(n_cells=300, n_genes=100)
    >>> records = qbmscvi.benchmark.compare(adata, label_key="cell_type", models=["PCA"], n_seeds=1, records=None)
    >>> records[0]["scores"]["knn_accuracy"] > 0.5
    True
    """
    require_extra()
    chosen = _check_models(models, batch_key)
    if schedule not in get_args(Schedule):
        msg = f"Unknown schedule {schedule!r}. Use 'native', 'default' or 'half'."
        raise ValueError(msg)
    require_integer("n_seeds", n_seeds, 1)
    require_integer("first_seed", first_seed, 0)
    require_integer("n_threads", n_threads, 1)
    if save_latents and records is None:
        msg = "save_latents=True needs a place next to the records, but records=None. Name a file for the records."
        raise ValueError(msg)
    keys = {"label_key": label_key, "batch_key": batch_key, "order_key": order_key, "lineage_key": lineage_key}
    adata = _check_data(adata, layer, **keys)
    if max_epochs is None:
        from scvi.model._utils import get_max_epochs_heuristic

        max_epochs = get_max_epochs_heuristic(adata.n_obs)
    require_integer("max_epochs", max_epochs, 1)
    facts = {"n_cells": adata.n_obs, "n_genes": adata.n_vars, "max_epochs": int(max_epochs)}
    first = Task(adata, batch_key, first_seed, int(max_epochs), schedule, accelerator)
    definitions = cache(lambda model: _define(model, chosen[model], first))
    done = read_done(records, name, schedule, {**facts, **keys}, chosen, definitions)

    labels = np.asarray(adata.obs[label_key], dtype=str)
    batches = None if batch_key is None else np.asarray(adata.obs[batch_key], dtype=str)
    order = None if order_key is None else as_numbers(adata.obs[order_key])
    lineages = None if lineage_key is None else adata.obs[lineage_key].to_numpy(dtype=object)
    seeds = range(first_seed, first_seed + n_seeds)
    runs = [(seed, model) for seed in seeds for model in chosen]
    open_runs = [(seed, model) for seed, model in runs if (model, seed) not in done]
    if not open_runs:
        return [done[model, seed] for seed, model in runs]
    made_by = provenance()
    unintegrated = principal_components(log_normalize(adata))

    def score(latent: np.ndarray, seed: int) -> dict[str, float]:
        return score_all(latent, labels, batches, order, unintegrated, seed, lineages)

    from tqdm.auto import tqdm

    bar = tqdm(open_runs, desc=name, disable=not progress, unit="run")
    for seed, model in bar:
        bar.set_postfix_str(f"{model}, seed {seed}")
        if (model, seed) in done:  # came with another run
            continue
        trained = _trained(model)
        with_it = {control: other for other, (parent, control) in CONTROLS.items() if parent == trained}
        wanted = tuple(c for c, other in with_it.items() if other in chosen and (other, seed) not in done)
        task = replace(first, seed=seed, label_key=label_key, controls=wanted)
        # Before the run, which may change what a function refers to.
        own = {} if model in MODEL_NAMES else {"definition": definitions(model)["function"]}
        fit, measured = _run(model, chosen[model], task, n_threads, score)
        key = {"data": name, "model": trained, "seed": seed, "schedule": schedule}
        record = {
            **key,
            **measured,
            **facts,
            **keys,
            **own,
            "settings": {**fit.settings, "accelerator": accelerator, "n_threads": n_threads},
            **made_by,
        }
        new = [record, *({**record, "model": with_it.get(c), **own._asdict()} for c, own in fit.controls.items())]
        new = [plain(r) for r in new if r["model"] in chosen and (r["model"], seed) not in done]
        if save_latents:
            save_latent(Path(records), key, fit.latent, labels, batches)
        append(records, new)
        done |= {(r["model"], seed): r for r in new}
    return [done[model, seed] for seed, model in runs]


def _run(
    name: str, model: Model, task: Task, n_threads: int, score: Callable[[np.ndarray, int], dict[str, float]]
) -> tuple[Fit, Record]:
    """Train and score a model; what the record of the run says of its size, costs and scores."""
    with _quiet():
        scvi.settings.seed = task.seed
        torch.set_num_threads(n_threads)  # numba, under scanpy, resets the threads of torch's OpenMP
        started = time.process_time()
        fit = model(task)
        seconds = time.process_time() - started
        fit = _check_fit(fit, name, task.adata.n_obs)
        learning = seconds if fit.cpu_s is None else fit.cpu_s
        started = time.process_time() - (seconds - learning - (fit.fit_cpu_s or 0.0))
        scores = score(fit.latent, task.seed) | fit.scores
    return fit, {
        "n_latent": fit.latent.shape[1],
        "cpu_s": round(learning, 2),
        "fit_cpu_s": fit.fit_cpu_s,
        "scoring_cpu_s": round(time.process_time() - started, 2),
        "scores": scores,
    }


def _define(model: str, function: Model, task: Task) -> Definition:
    """Definition of a model; for a built-in model these are the package's version and the model's arguments."""
    if model not in MODEL_NAMES:
        return {"function": define(function)}
    with _quiet():
        given = plain(function.arguments(task)) if isinstance(function, NeuralModel) else None
    return {"qbmscvi": version("qbmscvi"), "given": given}


def _trained(model: str) -> str:
    """The model that is trained for this name."""
    return CONTROLS.get(model, (model,))[0]


def _check_models(models: Sequence[str | Model] | None, batch_key: str | None) -> dict[str, Model]:
    """Functions by name."""
    if isinstance(models, str):
        msg = f"models={models!r} is a single name, but a list of names or functions is needed. Use [{models!r}]."
        raise TypeError(msg)
    available = available_models(batch_key)
    chosen: dict[str, Model] = {}
    for model in available if models is None else models:
        if callable(model):
            model_name, function = getattr(model, "__name__", type(model).__name__), model
            if model_name in MODEL_NAMES:
                msg = f"A function named {model_name!r} would pass for the built-in model. Give it another `__name__`."
                raise ValueError(msg)
        elif model in available:
            model_name, function = model, MODELS[_trained(model)]
        elif model in MODEL_NAMES:
            msg = f"{model!r} integrates batches, but batch_key=None. Pass `batch_key`, or leave this model out."
            raise ValueError(msg)
        else:
            msg = f"Unknown model {model!r}. Use a function of your own, or one of: {'; '.join(available)}."
            raise ValueError(msg)
        if model_name in chosen:
            msg = f"`models` has {model_name!r} twice, but the records tell models apart by name. Name each once."
            raise ValueError(msg)
        chosen[model_name] = function
    if not chosen:
        msg = f"`models` is empty. Use None for all, or some of: {'; '.join(available)}."
        raise ValueError(msg)
    return chosen


def _check_data(
    adata: AnnData,
    layer: str | None,
    *,
    label_key: str,
    batch_key: str | None,
    order_key: str | None,
    lineage_key: str | None,
) -> AnnData:
    """Check everything that would fail after training; return a copy with the counts in ``X``."""
    check_categories(adata.obs, "label_key", label_key)
    if batch_key is not None:
        check_categories(adata.obs, "batch_key", batch_key)
    if order_key is not None:
        get_column(adata.obs, "order_key", order_key)
    if lineage_key is not None:
        check_categories(adata.obs, "lineage_key", lineage_key, may_miss=True)
    check_matrix(adata, layer)
    if adata.n_obs < _MIN_CELLS:
        msg = f"The data have {adata.n_obs} cells, but the scores need at least {_MIN_CELLS}. Compare on more cells."
        raise ValueError(msg)
    sizes = np.unique(np.asarray(adata.obs[label_key], dtype=str), return_counts=True)[1]
    if (sizes >= _MIN_GROUP).sum() < 2:
        msg = (
            f"`adata.obs[{label_key!r}]` has {len(sizes)} labels, {(sizes >= _MIN_GROUP).sum()} of them with "
            f"{_MIN_GROUP} cells or more, but at least two are needed. Choose another `label_key`."
        )
        raise ValueError(msg)
    if batch_key is not None and adata.obs[batch_key].nunique() < 2:
        msg = (
            f"`adata.obs[{batch_key!r}]` has a single batch, but two are needed to score mixing. Leave out `batch_key`."
        )
        raise ValueError(msg)
    if order_key is not None:
        order = as_order(adata.obs[order_key], adata.n_obs, N_NEIGHBORS, "order_key")
    if lineage_key is not None:
        if order_key is None:
            msg = (
                f"lineage_key={lineage_key!r} is given but `order_key` is not. Pass the order that holds within these "
                "lineages too, or leave `lineage_key` out."
            )
            raise ValueError(msg)
        order_by_lineage(adata.obs[lineage_key], order, N_NEIGHBORS, "lineage_key")
    check_counts(adata, layer=layer)
    counts = adata.X if layer is None else adata.layers[layer]
    keys = (label_key, batch_key, order_key, lineage_key)
    columns = list(dict.fromkeys(key for key in keys if key is not None))
    return type(adata)(counts.copy(), obs=adata.obs[columns].copy(), var=adata.var[[]].copy())


def _check_fit(fit: Fit | np.ndarray, model: str, n_cells: int) -> Fit:
    if not isinstance(fit, Fit):
        fit = Fit(np.asarray(fit))
    if fit.latent.ndim != 2 or len(fit.latent) != n_cells:
        msg = (
            f"The representation of {model!r} has shape {fit.latent.shape}, but it must have one row for each of "
            f"{n_cells} cells. Return a table of cells by dimensions."
        )
        raise ValueError(msg)
    return fit


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages of other packages about every run."""
    import scib_metrics  # noqa: F401 - sets its level when it is first imported

    levels = {logger: logger.level for logger in map(logging.getLogger, _LOGGERS)}
    with warnings.catch_warnings(action="ignore"):
        for logger in levels:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)
