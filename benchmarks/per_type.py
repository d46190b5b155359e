"""Which cell types gain and which lose: F1 of each type, from the representations that ``results.py`` saved.

    python benchmarks/results.py --data ../shared/data --epochs 100 --max-cells 4000 --save-latents
    python benchmarks/per_type.py

Writes ``PER_TYPE.md``. The labels are predicted in the same five folds as in the records, by neighbors, logistic
regression and gradient boosting; F1 is that of all cells at once and the mean of the three.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from qbmscvi.benchmark import paired_difference, read_records
from qbmscvi.benchmark._metrics import knn_classifier, logistic_classifier
from qbmscvi.benchmark._records import latent_path
from qbmscvi.benchmark._scores import N_NEIGHBORS, boosting_classifier

HERE = Path(__file__).parent
MODEL = "QBMSCVI"
REFERENCES = ("QBMSCVI, J = 0", "SCVI, same schedule and width", "SCVI", "PCA")
MIN_CELLS = 5  # one in each fold, as in the comparison


def f1_per_type(latent: np.ndarray, labels: np.ndarray, types: np.ndarray, seed: int) -> np.ndarray:
    """Mean F1 over the classifiers, one number for each of ``types``."""
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    classifiers = [knn_classifier(N_NEIGHBORS), logistic_classifier(), boosting_classifier(seed)]
    predictions = [cross_val_predict(classifier, latent, labels, cv=folds) for classifier in classifiers]
    return np.mean([f1_score(labels, p, labels=types, average=None, zero_division=0.0) for p in predictions], axis=0)


def scores_of(records: Path) -> tuple[dict[tuple[str, str], dict[int, dict[str, tuple[int, float]]]], set[str]]:
    """Cells and F1 by data set and model, seed, and type; and the commits of the runs."""
    scores, commits = {}, set()
    for record in read_records(records):
        path = latent_path(records, record)
        if record["schedule"] != "native" or record["model"] not in (MODEL, *REFERENCES) or not path.exists():
            continue
        with np.load(path, allow_pickle=True) as saved:
            latent, labels = saved["latent"], saved["labels"].astype(str)
        types, sizes = np.unique(labels, return_counts=True)
        types, sizes = types[sizes >= MIN_CELLS], sizes[sizes >= MIN_CELLS]
        latent, labels = latent[np.isin(labels, types)], labels[np.isin(labels, types)]
        f1 = f1_per_type(latent, labels, types, record["seed"])
        by_type = dict(zip(types, zip(sizes.tolist(), f1.tolist(), strict=True), strict=True))
        scores.setdefault((record["data"], record["model"]), {})[record["seed"]] = by_type
        commits.add(record["commit"] or "none")
        print(record["data"], record["model"], record["seed"], f"{f1.mean():.3f}", flush=True)
    return scores, commits


def to_markdown(scores: dict, commits: set[str]) -> str:
    """Text of ``PER_TYPE.md``."""
    lines = [
        "# Which cell types gain and which lose",
        "",
        "Written by `per_type.py`. F1 of each type, mean of three classifiers (15 neighbors, logistic regression, "
        "gradient boosting) in five folds, and over seeds; then QBMSCVI minus the model named, mean of paired "
        "differences with Student's 95 % interval. Types of the same data set share cells and runs, and there are "
        "many: one interval in twenty misses zero by chance alone.",
        "",
        f"Commits {', '.join(sorted(commits))}.",
    ]
    for data in dict.fromkeys(data for data, _ in scores):
        ours = scores[data, MODEL]
        references = [name for name in REFERENCES if (data, name) in scores]
        sizes = {kind: n for kind, (n, _) in next(iter(ours.values())).items()}
        titles = ["type", "cells", MODEL, *(f"minus {name}" for name in references)]
        lines += ["", f"## {data}", "", f"{len(ours)} seeds.", "", _row(titles), _row(["---"] * len(titles))]
        for kind in sorted(sizes, key=sizes.get):
            cells = [kind, str(sizes[kind]), f"{np.mean([run[kind][1] for run in ours.values()]):.3f}"]
            cells += [_difference(ours, scores[data, name], kind) for name in references]
            lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _difference(ours: dict, theirs: dict, kind: str) -> str:
    seeds = sorted(set(ours) & set(theirs))
    result = paired_difference([ours[s][kind][1] for s in seeds], [theirs[s][kind][1] for s in seeds])
    return f"{result.mean:+.3f} ({result.low:+.3f} to {result.high:+.3f})"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of PER_TYPE.md")
    options = parser.parse_args()
    scores, commits = scores_of(options.records)
    if not scores:
        parser.error(f"no representations beside {options.records.name}: run results.py with --save-latents")
    (options.out / "PER_TYPE.md").write_text(to_markdown(scores, commits))
    print(f"wrote {options.out / 'PER_TYPE.md'}")


if __name__ == "__main__":
    main()
