"""Tables and figures from the records of a comparison.

All numbers come from the records; figures of cells need the representations that ``save_latents=True`` saved next to
them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from qbmscvi.benchmark._cell_report import cell_lines
from qbmscvi.benchmark._models import CONTROLS
from qbmscvi.benchmark._records import latent_path, read_records
from qbmscvi.benchmark._statistics import paired_difference, pooled_difference
from qbmscvi.benchmark._tables import ALL_SETS, CELL_METRICS, METRICS, counted, interval, markdown_table, spread

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes

    Record = dict

_KEY = ["data", "schedule", "model", "seed"]
_MODEL = "QBMSCVI"
_UMAP_CELLS = 5_000
_SHUFFLED = f"{_MODEL}, J shuffled"
_OF_CELLS = [name for name in CONTROLS if name != _SHUFFLED]  # stand in the section on generated cells alone

_HEADLINES = ("scib_total", "knn_macro_f1", "boosting_macro_f1", "pseudotime_tau", "elbo")
_BEST, _BEST_ELSEWHERE = "best SCVI", "best SCVI of other seeds"
_HEADLINE_REFERENCES = ("SCVI", _BEST_ELSEWHERE, _BEST, f"{_MODEL}, J = 0")


def write_report(records: str | Path | Iterable[Record], folder: str | Path, *, title: str = "Comparison") -> Path:
    """Write tables and figures of a comparison.

    Parameters
    ----------
    records
        File of the records, or the records; figures of cells need a file, next to which their representations lie.
        Without these the report shows figures of cells that ``folder`` has from before.
    folder
        Where to write ``RESULTS.md``, ``results.csv`` (mean and standard deviation over seeds of every score),
        ``differences.csv`` (paired differences of every score) and the figures.
    title
        First line of ``RESULTS.md``.

    Returns
    -------
    Path of ``RESULTS.md``.

    Raises
    ------
    ValueError
        If there are no records.
    """
    folder = Path(folder)
    path = Path(records) if isinstance(records, str | Path) else None
    records = read_records(path) if path else list(records)
    table = as_table(records)
    differences = compute_differences(table)
    folder.mkdir(parents=True, exist_ok=True)
    summary = table.groupby(["data", "schedule", "model", "metric"], sort=False)["value"]
    summary.agg(["mean", "std", "count"]).to_csv(folder / "results.csv")
    differences.to_csv(folder / "differences.csv", index=False)
    figures = _draw(*_without_cells(table, differences), records, path, folder)
    text = to_markdown(table, differences, records, title)
    text += "".join(f"\n![{figure.stem}]({figure.name})\n" for figure in figures)
    (folder / "RESULTS.md").write_text(text)
    return folder / "RESULTS.md"


def as_table(records: Iterable[Record]) -> pd.DataFrame:
    """One row per score: ``data``, ``schedule``, ``model``, ``seed``, ``metric``, ``value``.

    Raises
    ------
    ValueError
        If there are no records.
    """
    rows = [
        {**{key: record[key] for key in _KEY}, "metric": metric, "value": value}
        for record in records
        for metric, value in record["scores"].items()
    ]
    if not rows:
        msg = "There are no records to report. Run `qbmscvi.benchmark.compare` first, or name its file."
        raise ValueError(msg)
    return pd.DataFrame(rows).astype({"value": float})


def compute_differences(table: pd.DataFrame, model: str = _MODEL) -> pd.DataFrame:
    """Paired differences over seeds, every QBMSCVI variant against every reference.

    References are each SCVI variant, the best of them by the mean of that very score (``"best SCVI"``; chosen after
    the fact, so that it flatters SCVI) and, seed by seed, the best in the mean of the other seeds (``"best SCVI of
    other seeds"``; what choosing a variant gives), and for ``model`` its controls.

    Parameters
    ----------
    table
        From :func:`as_table`.
    model
        The model that controls are controls of.

    Returns
    -------
    One row per ``data``, ``schedule``, ``metric``, ``model`` and ``reference``: fields of
    :class:`~qbmscvi.benchmark.Difference`. Where a schedule has several data sets, rows of the data set ``"all"`` pool
    those that have both models and the score; ``n`` is then their number.
    """
    rows = []
    n_sets = table.groupby("schedule")["data"].nunique()
    for (schedule, metric), part in table.groupby(["schedule", "metric"], sort=False):
        pooled: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        for data, of_data in part.groupby("data", sort=False):
            wide = of_data.pivot(index="seed", columns="model", values="value").dropna(axis=1, how="all")
            for one, reference, scores in _pairs(wide, model, metric):
                result = paired_difference(wide[one], scores)
                key = {"data": data, "schedule": schedule, "metric": metric, "model": one, "reference": reference}
                rows.append({**key, **result._asdict()})
                pooled.setdefault((one, reference), {})[data] = (wide[one] - scores).to_numpy()
        for (one, reference), values in pooled.items() if n_sets[schedule] > 1 else ():
            key = {"data": ALL_SETS, "schedule": schedule, "metric": metric, "model": one, "reference": reference}
            rows.append({**key, **pooled_difference(values)._asdict()})
    return pd.DataFrame(rows)


def _pairs(wide: pd.DataFrame, model: str, metric: str) -> Iterable[tuple[str, str, pd.Series]]:
    trained = [name for name in wide if name not in CONTROLS]
    variants = [name for name in trained if name.startswith("SCVI")]
    known = (METRICS | CELL_METRICS).get(metric)
    sign = -1 if known is not None and known.lower_is_better else 1
    best = max(variants, key=lambda name: sign * wide[name].mean(), default=None)
    for one in [name for name in trained if name.startswith(model)]:
        references = {name: wide[name] for name in variants}
        if best is not None:
            references |= {_BEST: wide[best], _BEST_ELSEWHERE: _chosen_elsewhere(wide[variants], sign)}
        if one == model:
            references |= {name: wide[name] for name in (f"{model}, J = 0", *CONTROLS) if name in wide}
        for reference, scores in references.items():
            if (wide[one].notna() & scores.notna()).any():
                yield one, reference, scores


def _chosen_elsewhere(scores: pd.DataFrame, sign: int) -> pd.Series:
    """For each seed the score of the column that is best in the mean of all other seeds; NaN where there is no other.

    Only seeds that all columns have are chosen by, and for.
    """
    complete = scores.dropna()
    chosen = pd.Series(np.nan, index=scores.index)
    for seed in complete.index if len(complete) > 1 else []:
        chosen[seed] = complete.loc[seed, (sign * complete.drop(index=seed)).mean().idxmax()]
    return chosen


def to_markdown(table: pd.DataFrame, differences: pd.DataFrame, records: list[Record], title: str) -> str:
    """Text of ``RESULTS.md`` but for the figures."""
    of_cells = cell_lines(table, differences)
    table, differences = _without_cells(table, differences)
    versions = "; ".join(sorted({_versions(record) for record in records}))
    commits = ", ".join(sorted({record["commit"] or "none" for record in records}))
    lines = [
        f"# {title}",
        "",
        "Written by `qbmscvi.benchmark.write_report` from the records of `qbmscvi.benchmark.compare`. Mean ± standard "
        "deviation over seeds; higher is better. Intervals are of 95 %, Student's t: of one data set over paired "
        "seeds, of all data sets over the means of the sets, which speaks of sets not seen. *best SCVI* is the variant "
        "with the best mean in that very score, chosen afterwards, which flatters it; *best SCVI of other seeds* is "
        "chosen for each seed by the others. Held-out ELBO in nats per cell, of models of counts only. scIB bio and "
        "total hold NMI and ARI of Leiden clusters, each at the best of ten resolutions, not those of scib-metrics' "
        "k-means, which starts only once.",
        "",
        f"{versions}. Commit {commits}.",
        *_summary_lines(differences),
    ]
    for (data, schedule), part in table.groupby(["data", "schedule"], sort=False):
        own = [record for record in records if (record["data"], record["schedule"]) == (data, schedule)]
        lines += ["", f"## {data}, {schedule} schedule", "", _facts(own), ""]
        shown = [metric for metric in METRICS if metric in set(part["metric"])]
        lines += markdown_table(
            ["model", *(METRICS[metric].title for metric in shown), "CPU, s"],
            [
                [model, *(spread(of_model, metric) for metric in shown), _cost(own, model)]
                for model, of_model in part.groupby("model", sort=False)
            ],
        )
        lines += _difference_lines(differences, data, schedule)
    for schedule in table["schedule"].unique():
        pooled = _difference_lines(differences, ALL_SETS, schedule)
        lines += ["", f"## All data sets, {schedule} schedule", *pooled] if pooled else []
    lines += of_cells
    return "\n".join(lines) + "\n"


def _without_cells(table: pd.DataFrame, differences: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both without the controls that concern only generated cells."""
    if not differences.empty:
        differences = differences[~differences["reference"].isin(_OF_CELLS)]
    return table[~table["model"].isin(_OF_CELLS)], differences


def _summary_lines(differences: pd.DataFrame) -> list[str]:
    """QBMSCVI against scVI and its own control in one score per task, each model with its own KL schedule."""
    if differences.empty:
        return []
    part = differences[
        (differences["model"] == _MODEL)
        & (differences["schedule"] == "native")
        & differences["metric"].isin(_HEADLINES)
    ]
    headlines = part[part["reference"].isin(_HEADLINE_REFERENCES)]
    if headlines.empty:
        return []
    sets = list(dict.fromkeys(headlines["data"]))
    cells = {
        key: interval(row.set_index("metric").iloc[0])
        for key, row in headlines.groupby(["metric", "reference", "data"], sort=False)
    }
    rows = [
        [METRICS[metric].title, reference, *(cells.get((metric, reference, data), "") for data in sets)]
        for metric in _HEADLINES
        for reference in _HEADLINE_REFERENCES
        if any((metric, reference, data) in cells for data in sets)
    ]
    lines = [
        "",
        "## In short",
        "",
        f"{_MODEL} minus the model named, with default arguments. Above zero is in favor of {_MODEL}; an interval that "
        "holds zero says that these runs cannot tell the two apart.",
        "",
        *markdown_table(["score", "against", *sets], rows),
    ]
    pooled = part[(part["data"] == ALL_SETS) & part["reference"].str.startswith("SCVI")]
    if pooled["reference"].nunique() > 1:
        shown, rows = _pair_rows(pooled)
        table = markdown_table(["against", *(METRICS[m].title for m in shown)], [row[1:] for row in rows])
        lines += ["", "The same over all data sets, variant by variant of scVI:", "", *table]
    return lines


def _difference_lines(differences: pd.DataFrame, data: str, schedule: str) -> list[str]:
    if differences.empty:
        return []
    part = differences[(differences["data"] == data) & (differences["schedule"] == schedule)]
    shown, rows = _pair_rows(part)
    if not shown:
        return []
    table = markdown_table(["model", "against", *(METRICS[m].title for m in shown)], rows)
    return ["", "Paired differences:", "", *table]


def _pair_rows(part: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Scores that have a difference, and a row per pair of models: both names and the differences."""
    shown = [metric for metric in METRICS if metric in set(part["metric"])]
    rows = []
    for (model, reference), of_pair in part.groupby(["model", "reference"], sort=False):
        by_metric = of_pair.set_index("metric")
        cells = [interval(by_metric.loc[metric]) if metric in by_metric.index else "" for metric in shown]
        rows.append([model, reference, *cells])
    return shown, rows


def _facts(records: list[Record]) -> str:
    first, n_seeds = records[0], Counter(record["model"] for record in records)
    seeds = counted(n_seeds.values(), "seed")
    if len(set(n_seeds.values())) > 1:
        seeds += "; differences are of those that both models have"
    return f"{first['n_cells']} cells, {first['n_genes']} genes, {first['max_epochs']} epochs, {seeds}."


def _cost(records: list[Record], model: str) -> str:
    own = [record for record in records if record["model"] == model]
    return f"{np.mean([record['cpu_s'] + (record.get('fit_cpu_s') or 0.0) for record in own]):.0f}"


def _versions(record: Record) -> str:
    return ", ".join(f"{name} {number}" for name, number in record["versions"].items())


def _draw(
    table: pd.DataFrame, differences: pd.DataFrame, records: list[Record], path: Path | None, folder: Path
) -> list[Path]:
    from qbmscvi import pl

    figures = []
    titles = {name: metric.title for name, metric in METRICS.items()}
    for (data, schedule), part in table[table["metric"].isin(METRICS)].groupby(["data", "schedule"], sort=False):
        means = part.groupby(["model", "metric"], sort=False)["value"].mean().unstack()
        means = means.reindex(columns=[metric for metric in METRICS if metric in means]).dropna(how="all")
        ax = pl.score_table(means.rename(columns=titles), title=f"{data}, {schedule} schedule")
        figures.append(_save(ax, folder / f"scores_{data}_{schedule}.png"))
        if path is not None:
            figures += _draw_cells(data, schedule, records, path, folder)
    if differences.empty:
        return figures
    against_best = differences[(differences["reference"] == _BEST) & differences["metric"].isin(METRICS)]
    tasks = against_best["metric"].map(lambda metric: METRICS[metric].task)
    for (schedule, task), part in against_best.groupby(["schedule", tasks], sort=False):
        figures.append(_draw_forests(part, folder / f"differences_{task}_{schedule}.png"))
    return figures


def _draw_forests(differences: pd.DataFrame, file: Path) -> Path:
    """One panel per score, with the differences to the best SCVI variant on each data set and on all."""
    import matplotlib.pyplot as plt

    from qbmscvi import pl

    metrics, models = (list(dict.fromkeys(differences[key])) for key in ("metric", "model"))
    n_rows = len(differences.groupby(["data", "model"]))
    size = (3.2 * len(metrics) + 2.0, 1.4 + 0.2 * n_rows)
    figure, axes = plt.subplots(1, len(metrics), figsize=size, squeeze=False, layout="constrained")
    for ax, metric in zip(axes[0], metrics, strict=True):
        rows: dict[str, dict] = {}
        of_metric = differences[differences["metric"] == metric]
        for _, row in of_metric.iterrows():
            # All models have a place in every panel: their colors are the same in all, and one legend has them.
            of_set = rows.setdefault(row["data"], dict.fromkeys(models, (np.nan, np.nan, np.nan)))
            of_set[row["model"]] = (row["mean"], row["low"], row["high"])
        if ALL_SETS in rows:
            rows[f"all, {counted(of_metric.loc[of_metric['data'] == ALL_SETS, 'n'], 'set')}"] = rows.pop(ALL_SETS)
        label = f"{METRICS[metric].title}:\ndifference to the best SCVI variant"
        pl.difference_forest(rows, xlabel=label, legend=ax is axes[0, -1], ax=ax)
        ax.locator_params(axis="x", nbins=3)  # more run into each other
    return _save(axes[0, 0], file)


def _draw_cells(data: str, schedule: str, records: list[Record], path: Path, folder: Path) -> list[Path]:
    """UMAPs of the first seed of every model, colored by label and by batch."""
    import matplotlib.pyplot as plt

    from qbmscvi import pl

    own = [record for record in records if (record["data"], record["schedule"]) == (data, schedule)]
    first = min(record["seed"] for record in own)
    files = {r["model"]: latent_path(path, r) for r in own if r["seed"] == first and r["model"] not in CONTROLS}
    files = {model: file for model, file in files.items() if file.exists()}
    figure_file = folder / f"umap_{data}_{schedule}.png"
    if not files:  # they take much room and may be gone, but a figure of them stays
        return [figure_file] if figure_file.exists() else []
    panels = {model: _umap(file) for model, file in files.items()}
    columns = [key for key in ("labels", "batches") if key in next(iter(panels.values()))]
    figure, axes = plt.subplots(
        len(columns),
        len(panels),
        figsize=(3.0 * len(panels) + 2.5, 3.0 * len(columns)),
        squeeze=False,
        layout="constrained",
    )
    for row, column in zip(axes, columns, strict=True):
        for ax, (model, cells) in zip(row, panels.items(), strict=True):
            is_last = ax is row[-1]
            pl.embedding(cells["umap"], cells[column], title=model, axis_name="UMAP", legend=is_last, ax=ax)
    return [_save(axes[0, 0], figure_file)]


def _umap(file: Path) -> dict[str, np.ndarray]:
    import scanpy as sc
    from anndata import AnnData

    with np.load(file) as saved:
        cells = dict(saved)
    chosen = np.random.default_rng(0).permutation(len(cells["latent"]))[:_UMAP_CELLS]
    cells = {key: values[chosen] for key, values in cells.items()}
    adata = AnnData(obsm={"latent": cells["latent"]}, shape=(len(chosen), 0))
    sc.pp.neighbors(adata, use_rep="latent", random_state=0)
    sc.tl.umap(adata, random_state=0)
    return {**cells, "umap": adata.obsm["X_umap"]}


def _save(ax: Axes, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure = ax.figure
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path
