"""Is the prior learned, and what is it worth? Records in ``prior.jsonl``, tables in ``PRIOR.md``, and a figure.

    python benchmarks/prior.py --data ../shared/data --seeds 5
    python benchmarks/prior.py --table-only
    python benchmarks/results.py --records benchmarks/prior.jsonl --max-cells 4000 --epochs 100 --cell kang_ifnb SCVI 0

Runs that the records have are not repeated; the last command runs one again and compares.

Every model has a prior that is fitted to its codes: QBMSCVI and J = 0 their own, scVI a mixture of Gaussians.
``QBMSCVI 0.1.0`` is the earlier default, without hidden spins and without ``fit_prior``; its records are those of
``results.jsonl``, on the same cells and splits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from results import DATA_SETS, load

from qbmscvi import pl
from qbmscvi.benchmark import MODEL_NAMES, compare, paired_difference, pooled_difference, read_records

HERE = Path(__file__).parent
MODEL, BEFORE = "QBMSCVI", "QBMSCVI 0.1.0"
SCVI_VARIANTS = ["SCVI", "SCVI, same optimizer and width"]
MIXTURES = [f"{name}, mixture of Gaussians" for name in SCVI_VARIANTS]
J_ZERO, BERNOULLI, AUTOREGRESSIVE, OWN_CODES, OF_TRAINING = (
    f"{MODEL}, {name}"
    for name in ("J = 0", "mixture of Bernoulli products", "autoregressive density", "own codes", "prior of training")
)
REPRESENTATION = {
    "knn_macro_f1": "kNN macro-F1",
    "boosting_macro_f1": "boosting macro-F1",
    "scib_bio": "scIB bio",
    "scib_batch": "scIB batch",
    "silhouette": "silhouette",
    "transfer_macro_f1": "transfer macro-F1",
    "pseudotime_tau": "pseudotime tau",
}
COMPARED = REPRESENTATION | {"elbo": "held-out ELBO, nats"}
ALL = "all sets"


class Scores:
    """Scores by data set, model and seed; costs are scores, too."""

    def __init__(self, records: list[dict]) -> None:
        costs = ("cpu_s", "fit_cpu_s")
        rows = {
            (r["data"], r["model"], r["seed"]): r["scores"] | {cost: r.get(cost) for cost in costs}
            for r in records
            if r["schedule"] == "native"
        }
        self.table = pd.DataFrame.from_dict(rows, orient="index").astype(float).sort_index()
        self.sets = [name for name in dict.fromkeys(key[0] for key in rows) if self.has(name, MODEL)]
        self.n_seeds = [self.table.loc[(name, MODEL)].shape[0] for name in self.sets]

    def has(self, data: str, model: str) -> bool:
        return (data, model) in {key[:2] for key in self.table.index}

    def of(self, data: str, model: str, score: str) -> pd.Series:
        """By seed; empty where the model was not run."""
        return self.table.loc[(data, model)][score].dropna() if self.has(data, model) else pd.Series(dtype=float)

    def best(self, data: str, models: list[str], score: str) -> str:
        """The model with the highest mean, of those that were run."""
        return max(models, key=lambda model: self.of(data, model, score).mean() if self.has(data, model) else -np.inf)

    def differences(self, score: str, reference: str | list[str], sign: int = 1) -> dict[str, np.ndarray]:
        """Of each data set, the model minus the reference, or minus the best of several; seeds that both have."""
        found = {}
        for data in self.sets:
            one = reference if isinstance(reference, str) else self.best(data, reference, score)
            ours, theirs = sign * self.of(data, MODEL, score), sign * self.of(data, one, score)
            seeds = ours.index.intersection(theirs.index)
            if len(seeds):
                found[data] = (ours[seeds] - theirs[seeds]).to_numpy()
        return found


def row_of(differences: dict[str, np.ndarray], sets: list[str], digits: int, scale: float = 1.0) -> list[str]:
    """Mean and interval of each set, and over sets."""
    cells = []
    for data in [*sets, ALL]:
        if data == ALL and differences:
            result = pooled_difference(differences)
        elif data in differences:
            result = paired_difference(differences[data], np.zeros(len(differences[data])))
        else:
            cells.append("")
            continue
        numbers = [f"{scale * value:+.{digits}f}" for value in (result.mean, result.low, result.high)]
        text = numbers[0] + (f" ({numbers[1]} to {numbers[2]})" if np.isfinite(result.low) else "")
        cells.append(f"**{text}**" if result.low > 0 or result.high < 0 else text)
    return cells


def means_of(scores: Scores, model: str, score: str, digits: int, scale: float = 1.0) -> list[str]:
    means = scale * np.array([scores.of(data, model, score).mean() for data in scores.sets])
    return [f"{value:.{digits}f}" if np.isfinite(value) else "" for value in [*means, np.nanmean(means)]]


def ratios_of(scores: Scores, one: tuple[str, str], other: tuple[str, str]) -> list[str]:
    """Ratio of the means of two scores, each of a model, by data set; and the mean over sets."""
    ratios = [scores.of(data, *one).mean() / scores.of(data, *other).mean() for data in scores.sets]
    return [f"{value:.2f}" for value in [*ratios, np.mean(ratios)]]


def shares_closed(scores: Scores, score: str) -> dict[str, np.ndarray]:
    """Of each data set and seed: 0 for scVI with N(0, I), 1 for the model's own codes."""
    found = {}
    for data in scores.sets:
        three = [scores.of(data, model, score) for model in (SCVI_VARIANTS[0], MODEL, OWN_CODES)]
        normal, ours, own = pd.concat(three, axis=1, join="inner").to_numpy().T
        if len(normal) and normal.mean() > own.mean():
            found[data] = np.array([(normal.mean() - ours.mean()) / (normal.mean() - own.mean())])
    return found


def table(title: str, text: str, scores: Scores, rows: dict[str, list[str]]) -> list[str]:
    columns = [*scores.sets, ALL]
    lines = ["", f"## {title}", "", text, "", "| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    return [*lines, *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items())]


def over_sets(scores: Scores) -> list[str]:
    """Table of scores by reference: differences over the means of sets."""
    references = {"scVI": SCVI_VARIANTS[0], "scVI, same optimizer and width": SCVI_VARIANTS[1], "`J = 0`": J_ZERO}
    lines = [
        "",
        "## Over data sets",
        "",
        "QBMSCVI minus the model of the column; higher is better. ELBO of scVI is with N(0, I), of `J = 0` with fitted "
        "fields.",
        "",
        "| score | sets | " + " | ".join(f"minus {name}" for name in references) + " |",
        "|---|---|" + "---|" * len(references),
    ]
    for score, title in COMPARED.items():
        found = {name: scores.differences(score, reference) for name, reference in references.items()}
        cells = [row_of(differences, [], 1 if score == "elbo" else 3)[-1] for differences in found.values()]
        lines.append(f"| {title} | {max(map(len, found.values()))} | " + " | ".join(cells) + " |")
    return lines


def draw(scores: Scores, file: Path) -> None:
    """Differences to scVI, as it comes and at the same optimizer and width, on each set and over sets."""
    panels = [score for score in COMPARED if score not in ("pseudotime_tau", "transfer_macro_f1")]
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    names = dict(zip(("scVI", "scVI, same optimizer and width"), SCVI_VARIANTS, strict=True))
    for ax, score in zip(axes.flat, panels, strict=True):
        rows = {data: {} for data in [*scores.sets, ALL]}
        for name, reference in names.items():
            differences = scores.differences(score, reference)
            for data, values in differences.items():
                result = paired_difference(values, np.zeros(len(values)))
                rows[data][f"minus {name}"] = (result.mean, result.low, result.high)
            pooled = pooled_difference(differences)
            rows[ALL][f"minus {name}"] = (pooled.mean, pooled.low, pooled.high)
        rows = {data: row for data, row in rows.items() if row}
        pl.difference_forest(rows, xlabel=COMPARED[score], legend=ax is axes[0, -1], ax=ax)
    figure.savefig(file, dpi=130, bbox_inches="tight")
    plt.close(figure)


def report(scores: Scores) -> str:
    sets = scores.sets
    n_seeds = " to ".join(map(str, sorted({min(scores.n_seeds), max(scores.n_seeds)})))

    def rows(score: str, references: dict[str, str | list[str]], digits: int, sign: int = 1, scale: float = 1.0):
        return {
            title: row_of(scores.differences(score, reference, sign), sets, digits, scale)
            for title, reference in references.items()
        }

    lines = [
        "# The prior",
        "",
        "Written by `benchmarks/prior.py` from its records; defaults, 100 epochs, "
        f"{n_seeds} seeds, cells held out from training. Differences are QBMSCVI "
        "minus the model of the row: the mean over seeds with Student's interval of 95 %, and over the means of the "
        "sets. Bold where the interval does not hold zero. `QBMSCVI 0.1.0` is the earlier default, without hidden "
        "spins and without `fit_prior`.",
    ]
    lines += table(
        "Held-out ELBO, nats per cell",
        "For scVI the better of two variants with its fitted mixture of Gaussians: as it comes, and with QBMSCVI's "
        "optimizer, schedule and width. J = 0 has fitted fields.",
        scores,
        rows("elbo", {"minus best SCVI with mixture": MIXTURES, "minus `J = 0`": J_ZERO, f"minus {BEFORE}": BEFORE}, 1)
        | {"QBMSCVI": means_of(scores, MODEL, "elbo", 1)},
    )
    lines += table(
        "Held-out KL, nats per cell",
        "From codes of held-out cells to densities over the same codes. The autoregressive density is what any prior "
        "could reach.",
        scores,
        {
            "prior after training": means_of(scores, OF_TRAINING, "kl", 2),
            "prior after `fit_prior`": means_of(scores, MODEL, "kl", 2),
            "mixture of Bernoulli products": means_of(scores, BERNOULLI, "kl", 2),
            "autoregressive density": means_of(scores, AUTOREGRESSIVE, "kl", 2),
            "minus autoregressive density": row_of(scores.differences("kl", AUTOREGRESSIVE), sets, 2),
        },
    )
    rivals = {
        "minus SCVI with mixture": MIXTURES[0],
        "minus SCVI, same optimizer and width, with mixture": MIXTURES[1],
        "minus `J = 0`": J_ZERO,
        "minus mixture of Bernoulli products": BERNOULLI,
        "minus autoregressive density": AUTOREGRESSIVE,
        "minus own codes": OWN_CODES,
    }
    for score, title, digits, scale in (
        ("cells_forest_auc", "Generated cells: forest AUC", 3, 1.0),
        ("cells_mmd2", "Generated cells: MMD², thousandths", 1, 1e3),
        ("cells_type_total_variation", "Generated cells: total variation of shares of types", 3, 1.0),
    ):
        of_models = {"QBMSCVI": MODEL, "own codes": OWN_CODES, "real cells": "real cells"}
        lines += table(
            title,
            "Lower is better, so that a difference below zero is in favor of QBMSCVI. *Closed share*: 0 is scVI with "
            "N(0, I), 1 is the model's own codes, of the means over seeds.",
            scores,
            {name: means_of(scores, model, score, digits, scale) for name, model in of_models.items()}
            | {"closed share": row_of(shares_closed(scores, score), sets, 2)}
            | rows(score, rivals, digits, scale=scale),
        )
    lines += table(
        "Representation: QBMSCVI minus QBMSCVI 0.1.0",
        "Higher is better.",
        scores,
        {title: row_of(scores.differences(score, BEFORE), sets, 3) for score, title in REPRESENTATION.items()},
    )
    lines += over_sets(scores)
    lines += table(
        "CPU time",
        "Ratios of means, measured while another process worked on the same machine.",
        scores,
        {
            "training, of SCVI's": ratios_of(scores, (MODEL, "cpu_s"), ("SCVI", "cpu_s")),
            "`fit_prior`, of the training": ratios_of(scores, (MODEL, "fit_cpu_s"), (MODEL, "cpu_s")),
        },
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of the .h5ad")
    parser.add_argument("--sets", nargs="+", choices=DATA_SETS, default=list(DATA_SETS))
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default 5)")
    parser.add_argument("--table-only", action="store_true", help="write the tables from existing records")
    options = parser.parse_args()
    records = HERE / "prior.jsonl"
    trained = [MODEL, J_ZERO, *SCVI_VARIANTS]
    models = [
        name for name in MODEL_NAMES if name in trained or name == "real cells" or name.rpartition(", ")[0] in trained
    ]
    for seed in [] if options.table_only else range(options.seeds):
        for name in options.sets:
            adata = load(name, options.data, n_genes=2_000, max_cells=4_000)
            settings = {"n_seeds": 1, "first_seed": seed, "max_epochs": 100, "accelerator": "cpu"}
            compare(adata, **DATA_SETS[name], name=name, models=models, records=records, **settings)
    before = [
        record | {"model": BEFORE}
        for record in read_records(HERE / "results.jsonl")
        if record["model"] == MODEL and record["versions"]["qbmscvi"] == "0.1.0"
    ]
    scores = Scores(before + read_records(records))
    (HERE / "PRIOR.md").write_text(report(scores))
    draw(scores, HERE / "results" / "differences.png")


if __name__ == "__main__":
    main()
