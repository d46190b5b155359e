"""Train several models on one data set, with several seeds each, and keep one record per run.

A record is a dictionary, one line of a JSON-lines file. ``data``, ``model``, ``seed`` and ``schedule`` name the run,
and ``scores`` has the numbers. ``settings``, ``versions`` and ``commit`` specify the run; ``cpu_s`` and ``fit_cpu_s``
are the costs of training and of the fit of the prior. A run in the file is not repeated, so a comparison continues
where it stopped. A run with other settings of its model stays in the file and is not used.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import re
import subprocess
import time
import warnings
from collections import Counter
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import scvi
import torch

from qbmscvi.benchmark._definitions import define
from qbmscvi.benchmark._metrics import as_codes, as_numbers, as_order, order_by_lineage
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
from qbmscvi.benchmark._scores import N_NEIGHBORS, require_extra, score_all
from qbmscvi.exceptions import require_integer
from qbmscvi.model._counts import check_counts
from qbmscvi.model._input_checks import check_categories, check_matrix, get_column

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from anndata import AnnData

    Definition = dict[str, Any]
    Model = Callable[[Task], Fit | np.ndarray]
    Record = dict[str, Any]

_PACKAGES = ("qbmscvi", "scvi-tools", "torch", "numpy", "scanpy", "scikit-learn", "scib-metrics")
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
    adata = check_data(adata, label_key, batch_key, order_key, lineage_key, layer)
    if max_epochs is None:
        from scvi.model._utils import get_max_epochs_heuristic

        max_epochs = get_max_epochs_heuristic(adata.n_obs)
    require_integer("max_epochs", max_epochs, 1)
    facts = {"n_cells": adata.n_obs, "n_genes": adata.n_vars, "max_epochs": int(max_epochs)}
    keys = {"label_key": label_key, "batch_key": batch_key, "order_key": order_key, "lineage_key": lineage_key}
    first = Task(adata, batch_key, first_seed, int(max_epochs), schedule, accelerator)
    definitions = cache(lambda model: _define(model, chosen[model], first))
    done = _read_done(records, name, schedule, {**facts, **keys}, chosen, definitions)

    labels = np.asarray(adata.obs[label_key], dtype=str)
    batches = None if batch_key is None else np.asarray(adata.obs[batch_key], dtype=str)
    order = None if order_key is None else as_numbers(adata.obs[order_key])
    lineages = None if lineage_key is None else adata.obs[lineage_key].to_numpy(dtype=object)
    seeds = range(first_seed, first_seed + n_seeds)
    runs = [(seed, model) for seed in seeds for model in chosen]
    open_runs = [(seed, model) for seed, model in runs if (model, seed) not in done]
    if not open_runs:
        return [done[model, seed] for seed, model in runs]
    provenance = {"versions": _versions(), "commit": _commit()}
    unintegrated = principal_components(log_normalize(adata))
    for seed, model in _with_progress(open_runs, name, progress):
        if (model, seed) in done:  # came with another run
            continue
        trained = _trained(model)
        with_it = {control: other for other, (parent, control) in CONTROLS.items() if parent == trained}
        wanted = tuple(c for c, other in with_it.items() if other in chosen and (other, seed) not in done)
        task = Task(adata, batch_key, seed, int(max_epochs), schedule, accelerator, label_key, wanted)
        own = {} if model in MODEL_NAMES else {"definition": definitions(model)["function"]}
        with _quiet():
            scvi.settings.seed = seed
            torch.set_num_threads(n_threads)  # numba, under scanpy, resets the threads of torch's OpenMP
            started = time.process_time()
            fit = chosen[model](task)
            seconds = time.process_time() - started
            fit = _check_fit(fit, model, adata.n_obs)
            learning = seconds if fit.cpu_s is None else fit.cpu_s
            started = time.process_time() - (seconds - learning - (fit.fit_cpu_s or 0.0))
            scores = score_all(fit.latent, labels, batches, order, unintegrated, seed, lineages) | fit.scores
        key = {"data": name, "model": trained, "seed": seed, "schedule": schedule}
        record = {
            **key,
            "n_latent": fit.latent.shape[1],
            "cpu_s": round(learning, 2),
            "fit_cpu_s": fit.fit_cpu_s,
            "scoring_cpu_s": round(time.process_time() - started, 2),
            "scores": scores,
            **facts,
            **keys,
            **own,
            "settings": {**fit.settings, "accelerator": accelerator, "n_threads": n_threads},
            **provenance,
        }
        new = [record, *({**record, "model": with_it.get(c), **own._asdict()} for c, own in fit.controls.items())]
        new = [_plain(r) for r in new if r["model"] in chosen and (r["model"], seed) not in done]
        if save_latents:
            _save_latent(Path(records), key, fit.latent, labels, batches)
        _append(records, new)
        done |= {(r["model"], seed): r for r in new}
    return [done[model, seed] for seed, model in runs]


def latent_path(records: Path, record: Record) -> Path:
    """File of the representation of a record, in the folder next to the records."""
    parts = (record["data"], record["model"], record["seed"], record["schedule"])
    return records.with_suffix(".latents") / ("__".join(re.sub(r"[^\w.=-]+", "-", str(p)) for p in parts) + ".npz")


def read_records(path: str | Path) -> list[Record]:
    """Read the valid records of a JSON-lines file.

    For each model and data set these are the runs with the settings of its latest run, and the latest run of each seed.

    Raises
    ------
    ValueError
        If a line is no record.
    """
    found = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            msg = f"Line {number} of {path} is no record; it may have been cut off. Remove it: its run will be redone."
            raise ValueError(msg) from error
    latest = {(r["data"], r["schedule"], r["model"]): _recorded_definition(r) for r in found}
    in_force = {}
    for r in found:
        key = (r["data"], r["schedule"], r["model"])
        if _agree(_recorded_definition(r), latest[key]):
            in_force[*key, r["seed"]] = r
    return list(in_force.values())


def _define(model: str, function: Model, task: Task) -> Definition:
    """Definition of a model; for a built-in model these are the package's version and the model's arguments."""
    if model not in MODEL_NAMES:
        return {"function": define(function)}
    with _quiet():
        given = _plain(function.arguments(task)) if isinstance(function, NeuralModel) else None
    return {"qbmscvi": version("qbmscvi"), "given": given}


def _recorded_definition(record: Record) -> Definition:
    if record["model"] in MODEL_NAMES:
        return {"qbmscvi": record["versions"].get("qbmscvi"), "given": record["settings"].get("given")}
    return {"function": record.get("definition")}  # None of models that were built in


def _agree(one: Definition, other: Definition) -> bool:
    """Whether two definitions have no different values; older records lack some."""
    return all(None in (value, other[name]) or value == other[name] for name, value in one.items())


def _trained(model: str) -> str:
    """The model that is trained for this name."""
    return CONTROLS[model][0] if model in CONTROLS else model


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


def check_data(
    adata: AnnData,
    label_key: str,
    batch_key: str | None,
    order_key: str | None,
    lineage_key: str | None,
    layer: str | None,
) -> AnnData:
    """Check everything that would fail after training; return a copy with the counts in ``X``."""
    keys = {"label_key": label_key, "batch_key": batch_key, "order_key": order_key, "lineage_key": lineage_key}
    for what, key in keys.items():
        if what == "order_key" and key is not None:
            get_column(adata.obs, what, key)
        elif key is not None or what == "label_key":
            check_categories(adata.obs, what, key, may_miss=what == "lineage_key")
    check_matrix(adata, layer)
    if adata.n_obs < _MIN_CELLS:
        msg = f"The data have {adata.n_obs} cells, but the scores need at least {_MIN_CELLS}. Compare on more cells."
        raise ValueError(msg)
    sizes = np.bincount(as_codes(label_key, adata.obs[label_key].to_numpy(), adata.n_obs))
    if (sizes >= _MIN_GROUP).sum() < 2:
        msg = (
            f"`adata.obs[{label_key!r}]` has {len(sizes)} labels, {(sizes >= _MIN_GROUP).sum()} of them with "
            f"{_MIN_GROUP} cells or more, but at least two are needed. Choose another `label_key`."
        )
        raise ValueError(msg)
    if batch_key is not None:
        n_batches = len(np.bincount(as_codes(batch_key, adata.obs[batch_key].to_numpy(), adata.n_obs)))
        if n_batches < 2:
            msg = (
                f"`adata.obs[{batch_key!r}]` has a single batch, but two are needed to score mixing. Leave out "
                "`batch_key`."
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
    columns = list(dict.fromkeys(key for key in keys.values() if key is not None))
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


def _read_done(
    path: str | Path | None,
    name: str,
    schedule: str,
    facts: dict[str, Any],
    models: Iterable[str],
    definitions: Callable[[str], Definition],
) -> dict[tuple[str, int], Record]:
    """Finished runs of these models on this data set, with the settings that they have now, by model and seed."""
    if path is None or not Path(path).exists():
        return {}
    done, others = {}, Counter()
    for record in read_records(path):
        if (record["data"], record["schedule"]) != (name, schedule):
            continue
        found = {key: record.get(key, value) for key, value in facts.items()}  # older records lack the columns
        if found != facts:
            msg = (
                f"{path} has runs of {name!r} with {found}, but now there are {facts}: they do not compare. "
                "Name another place with `records`, or give the data another `name`."
            )
            raise ValueError(msg)
        if record["model"] not in models:
            continue
        if _agree(_recorded_definition(record), definitions(record["model"])):
            done[record["model"], record["seed"]] = record
        else:
            others[record["model"]] += 1
    for model, n_runs in others.items():
        warnings.warn(
            f"{path} has {n_runs} runs of {model!r} on {name!r} with other settings of the model, or of another "
            "version of qbmscvi. They stay in the file and are not used.",
            UserWarning,
            stacklevel=3,
        )
    return done


def _append(path: str | Path | None, new: list[Record]) -> None:
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in new))


def _save_latent(
    records: Path, key: Record, latent: np.ndarray, labels: np.ndarray, batches: np.ndarray | None
) -> None:
    path = latent_path(records, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"labels": labels} | ({} if batches is None else {"batches": batches})
    np.savez_compressed(path, latent=latent.astype(np.float32), **columns)


def _with_progress(runs: list[tuple[int, str]], name: str, progress: bool) -> Iterator[tuple[int, str]]:
    from tqdm.auto import tqdm

    with tqdm(runs, desc=name, disable=not progress, unit="run") as bar:
        for seed, model in runs:
            bar.set_postfix_str(f"{model}, seed {seed}")
            yield seed, model
            bar.update()


class _quiet(warnings.catch_warnings):
    """Suppress messages of other packages about every run."""

    _LOGGERS = ("lightning.fabric", "lightning.fabric.utilities.seed", "lightning.pytorch", "scib_metrics", "scvi")

    def __enter__(self) -> None:
        import scib_metrics  # noqa: F401 - sets its level when it is first imported

        super().__enter__()
        warnings.simplefilter("ignore")
        self._levels = [logging.getLogger(name).level for name in self._LOGGERS]
        for name in self._LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *error: object) -> None:
        for name, level in zip(self._LOGGERS, self._levels, strict=True):
            logging.getLogger(name).setLevel(level)
        super().__exit__(*error)


def _plain(value: Any) -> Any:
    """Convert to JSON; values that are no numbers become None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def _commit() -> str | None:
    """Commit of the checkout that the package is run from; None for an installed one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
