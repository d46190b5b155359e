"""Records of runs of a comparison: the file that keeps them, and which of them still hold.

A record is a dictionary, one line of a JSON-lines file. ``data``, ``model``, ``seed`` and ``schedule`` name the run,
and ``scores`` has the numbers. ``settings``, ``versions`` and ``commit`` specify the run; ``cpu_s`` and ``fit_cpu_s``
are the costs of training and of the fit of the prior. A run with other settings of its model, or of another version
of this package, stays in the file and is not used.
"""

from __future__ import annotations

import json
import math
import platform
import re
import subprocess
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qbmscvi.benchmark._models import MODEL_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Definition = dict[str, Any]
Record = dict[str, Any]

_PACKAGES = ("qbmscvi", "scvi-tools", "torch", "numpy", "scanpy", "scikit-learn", "scib-metrics")


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


def _recorded_definition(record: Record) -> Definition:
    if record["model"] in MODEL_NAMES:
        return {"qbmscvi": record["versions"].get("qbmscvi"), "given": record["settings"].get("given")}
    return {"function": record.get("definition")}  # None of models that were built in


def _agree(one: Definition, other: Definition) -> bool:
    """Whether two definitions have no different values; older records lack some."""
    return all(None in (value, other[name]) or value == other[name] for name, value in one.items())


def read_done(
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


def append(path: str | Path | None, new: list[Record]) -> None:
    """Add records to the file, if there is one."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in new))


def save_latent(records: Path, key: Record, latent: np.ndarray, labels: np.ndarray, batches: np.ndarray | None) -> None:
    """Save the representation of a record, with the types and batches of the cells."""
    path = latent_path(records, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"labels": labels} | ({} if batches is None else {"batches": batches})
    np.savez_compressed(path, latent=latent.astype(np.float32), **columns)


def plain(value: Any) -> Any:
    """Convert to JSON; values that are no numbers become None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def provenance() -> Record:
    """What the record of a run says of the programs that made it."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    return {"versions": versions, "commit": _commit()}


def _commit() -> str | None:
    """Commit of the checkout that the package is run from; None for an installed one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
