"""Scores that a report shows, and how it writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qbmscvi.benchmark._cells import PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd

ALL_SETS = "all"  # the data set of pooled differences


class Metric(NamedTuple):
    """Name of a score, its subject, its better end, and its format."""

    title: str
    task: str
    lower_is_better: bool = False
    digits: int = 3
    scale: float = 1.0


METRICS = {
    "knn_accuracy": Metric("kNN accuracy", "types"),
    "knn_macro_f1": Metric("kNN macro-F1", "types"),
    "logistic_accuracy": Metric("logistic accuracy", "types"),
    "logistic_macro_f1": Metric("logistic macro-F1", "types"),
    "boosting_accuracy": Metric("boosting accuracy", "types"),
    "boosting_macro_f1": Metric("boosting macro-F1", "types"),
    "leiden_nmi": Metric("Leiden NMI", "clusters"),
    "leiden_ari": Metric("Leiden ARI", "clusters"),
    "silhouette": Metric("silhouette", "clusters"),
    "scib_bio": Metric("scIB bio", "integration"),
    "scib_batch": Metric("scIB batch", "integration"),
    "scib_total": Metric("scIB total", "integration"),
    "transfer_accuracy": Metric("transfer accuracy", "transfer"),
    "transfer_macro_f1": Metric("transfer macro-F1", "transfer"),
    "pseudotime_tau": Metric("pseudotime tau", "order"),
    "pseudotime_finite": Metric("finite pseudotime", "order"),
    "fate_tau_mean": Metric("tau per fate", "order"),
    "elbo": Metric("held-out ELBO", "fit", digits=1),
}
"""Scores that the report shows, by their name in the records; the CSV files have all."""

CELL_METRICS = {
    f"{PREFIX}forest_auc": Metric("forest AUC", "cells", lower_is_better=True),
    f"{PREFIX}mmd2": Metric("MMD², thousandths", "cells", lower_is_better=True, digits=1, scale=1e3),
    f"{PREFIX}type_total_variation": Metric("total variation of types", "cells", lower_is_better=True),
    f"{PREFIX}coverage": Metric("coverage", "cells"),
    f"{PREFIX}rare_types_found": Metric("rare types found", "cells"),
    "kl": Metric("held-out KL", "cells", lower_is_better=True, digits=2),
}
"""Scores of the prior that the report shows in a section of their own, by their name in the records."""


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table."""
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def spread(part: pd.DataFrame, metric: str) -> str:
    """Mean and standard deviation of the rows of a score; nothing if there are none."""
    values = part.loc[part["metric"] == metric, "value"].dropna() * _shown(metric).scale
    if values.empty:
        return ""
    digits = _shown(metric).digits
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def interval(row: pd.Series) -> str:
    """Mean difference of the score that is the row's name, with its interval and, if pooled, the number of sets."""
    digits, scale = _shown(row.name).digits, _shown(row.name).scale
    mean, low, high = (f"{scale * row[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    n_sets = f", {counted([row['n']], 'set')}" if row["data"] == ALL_SETS else ""
    return f"{mean}{f' ({low} to {high})' if np.isfinite(row['low']) else ''}{n_sets}"


def _shown(metric: str) -> Metric:
    return (METRICS | CELL_METRICS).get(metric, Metric(metric, "other"))


def counted(numbers: Iterable[int], noun: str) -> str:
    """Such as ``3 to 5 seeds``."""
    fewest, most = min(numbers), max(numbers)
    return f"{fewest}{'' if fewest == most else f' to {most}'} {noun}{'' if most == 1 else 's'}"
