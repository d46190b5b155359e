"""The section of a report on cells from the prior: scores of each data set, and over all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from qbmscvi.benchmark._cells import OWN_CODES, PREFIX, REAL_CELLS
from qbmscvi.benchmark._generation import gap_closed
from qbmscvi.benchmark._models import CONTROLS, MODELS
from qbmscvi.benchmark._statistics import paired_difference, pooled_difference
from qbmscvi.benchmark._tables import ALL_SETS, CELL_METRICS, METRICS, interval, markdown_table, spread

if TYPE_CHECKING:
    from collections.abc import Iterable

_MODEL, _NORMAL = "QBMSCVI", "SCVI"
_SHOWN = CELL_METRICS | {"elbo": METRICS["elbo"]}
_OF_GAP = [f"{PREFIX}{name}" for name in ("forest_auc", "mmd2", "type_total_variation", "coverage")]
_TEXT = (
    "Cells generated for the held-out ones, with library sizes and covariates of training cells of the same batches, "
    "the same for all. A model by its name alone draws codes from its prior: N(0, I) for SCVI. *Own codes* are those "
    "of training cells: what the decoder allows. All other names put another density in place of the prior of the "
    "same trained networks. Lower is better for forest AUC (0.5 is best), MMD², total variation, and KL in nats per "
    "cell, which compares priors of the same networks only."
)


def cell_lines(table: pd.DataFrame, differences: pd.DataFrame) -> list[str]:
    """Lines of the section, with a part for each schedule that has scores of cells or of the prior."""
    lines = []
    for schedule, part in table.groupby("schedule", sort=False):
        part = part.dropna(subset="value")
        of_prior = part.loc[part["metric"].isin(CELL_METRICS), "model"].unique()
        if not len(of_prior):
            continue
        part = part[part["model"].isin(of_prior) & part["metric"].isin(_SHOWN)]
        lines += ["", f"## Cells from the prior, {schedule} schedule", "", _TEXT]
        for data, of_data in part.groupby("data", sort=False):
            if not set(CELL_METRICS) & set(of_data["metric"]):
                continue
            shown = [metric for metric in _SHOWN if metric in set(of_data["metric"])]
            by_model = dict(list(of_data.groupby("model")))
            rows = [[name, *(spread(by_model[name], metric) for metric in shown)] for name in _in_order(by_model)]
            lines += ["", f"### {data}", "", *markdown_table(["cells", *(_SHOWN[m].title for m in shown)], rows)]
        lines += [*_gap_lines(closed_shares(part)), *_difference_lines(differences, schedule)]
    return lines


def closed_shares(table: pd.DataFrame) -> pd.DataFrame:
    """Share of the gap between N(0, I) and own codes that each prior closes, by data set; from means over seeds.

    0 is SCVI with N(0, I), for all models. 1 is own codes of the model's own family: of the very variant for SCVI, of
    QBMSCVI with default arguments for all of its variants. NaN where there is no gap: where the interval over seeds of
    the difference between both holds zero, or own codes are worse.

    Returns
    -------
    One row per ``model`` and ``data``, one column per score.
    """
    rows = {}
    for (metric, data), part in table[table["metric"].isin(_OF_GAP)].groupby(["metric", "data"], sort=False):
        wide = part.pivot(index="seed", columns="model", values="value")
        for model in wide.columns.drop([REAL_CELLS, _NORMAL], errors="ignore"):
            anchors = wide.reindex(columns=[_NORMAL, _own_codes(model)])
            if model in anchors or anchors.dropna().empty:
                continue
            gap = paired_difference(*(anchors.T.to_numpy() * (1 if CELL_METRICS[metric].lower_is_better else -1)))
            has_gap = gap.low > 0 or (gap.n == 1 and gap.mean > 0)
            share = gap_closed(wide[model].mean(), *anchors.mean()) if has_gap else np.nan
            rows.setdefault((model, data), {})[metric] = share
    return pd.DataFrame.from_dict(rows, orient="index", columns=_OF_GAP)


def _own_codes(model: str) -> str:
    trained = CONTROLS[model][0] if model in CONTROLS else model
    return f"{_MODEL if trained.startswith(_MODEL) else trained}, {OWN_CODES}"


def _gap_lines(shares: pd.DataFrame) -> list[str]:
    shares = shares.dropna(axis=1, how="all").dropna(how="all")
    if shares.empty:
        return []
    by_model = {name: shares.loc[[key for key in shares.index if key[0] == name]] for name, _ in shares.index}
    rows = [[name, *(_share(by_model[name][metric]) for metric in shares)] for name in _in_order(by_model)]
    return [
        "",
        "### Closed share of the gap",
        "",
        "0 is SCVI with N(0, I); 1 is own codes: of the same variant for SCVI, of QBMSCVI with default arguments for "
        "its variants. Mean over data sets, each from the means of its seeds, with the interval over sets. Sets on "
        "which own codes are not clearly better than N(0, I), by the interval over seeds, are left out.",
        "",
        *markdown_table(["cells", *(CELL_METRICS[metric].title for metric in shares)], rows),
    ]


def _share(values: pd.Series) -> str:
    values = values.dropna()
    if values.empty:
        return ""
    pooled = pooled_difference({data: [value] for (_, data), value in values.items()})
    return interval(pd.Series({**pooled._asdict(), "data": ALL_SETS}, name="share"))


def _difference_lines(differences: pd.DataFrame, schedule: str) -> list[str]:
    if differences.empty:
        return []
    part = differences[
        (differences["schedule"] == schedule)
        & (differences["model"] == _MODEL)
        & differences["metric"].isin(_SHOWN)
        & ~differences["reference"].str.startswith("best")
    ]
    part = part[part["data"] == ALL_SETS] if ALL_SETS in set(part["data"]) else part
    of_prior = part.loc[part["metric"].isin(CELL_METRICS), "reference"].unique()
    if not len(of_prior):
        return []
    shown = [metric for metric in _SHOWN if metric in set(part["metric"])]
    cells = {key: interval(row.set_index("metric").iloc[0]) for key, row in part.groupby(["reference", "metric"])}
    rows = [[name, *(cells.get((name, metric), "") for metric in shown)] for name in _in_order(of_prior)]
    return [
        "",
        "### Differences",
        "",
        f"{_MODEL} minus the row's cells. KL differs between networks by what they encode: compare ELBO there.",
        "",
        *markdown_table(["minus", *(_SHOWN[metric].title for metric in shown)], rows),
    ]


def _in_order(names: Iterable[str]) -> list[str]:
    """Real cells, then each trained model with its controls, then all others."""
    known = [REAL_CELLS]
    for trained in MODELS:
        known += [trained, *(name for name, (parent, _) in CONTROLS.items() if parent == trained)]
    known = list(dict.fromkeys(known))
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))
