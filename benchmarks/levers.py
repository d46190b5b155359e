"""Settings other than the defaults, on the same cells and with the same scores: what was tried, and what it gave.

    python benchmarks/levers.py --data ../shared/data --epochs 100 --max-cells 4000
    python benchmarks/levers.py --table-only

Each setting changes one thing of QBMSCVI. Runs are added to ``levers.jsonl`` and not repeated. ``LEVERS.md`` has the
difference of each to the default, seed by seed, from the runs in ``results.jsonl``; that of the prior's learning rates
to the setting beside which they were tried.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from results import DATA_SETS, load

from qbmscvi import QBMSCVI, SamplingSchedule
from qbmscvi.benchmark import METRICS, compare, paired_difference, read_records
from qbmscvi.benchmark.__main__ import add_options, arguments
from qbmscvi.benchmark._models import NeuralModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from qbmscvi.benchmark import Fit, Task

HERE = Path(__file__).parent
AT_EVERY_STEP = "chains at every step"


def every_step(task: Task) -> dict:
    """Persistent chains that move on by two sweeps at each step, not by four at every eighth."""
    return {"schedule": SamplingSchedule(every_n_steps=1, n_sweeps=2)}


LEVERS = {
    "32 spins": NeuralModel(QBMSCVI, lambda task: {"n_latent": 32}),
    "128 spins": NeuralModel(QBMSCVI, lambda task: {"n_latent": 128}),
    "complete graph": NeuralModel(QBMSCVI, lambda task: {"prior_graph": "complete"}),
    "Gumbel": NeuralModel(QBMSCVI, lambda task: {"smoothing": "gumbel"}),
    "scVI's epsilon": NeuralModel(QBMSCVI, plan=lambda task: {"eps": 0.01}),
    AT_EVERY_STEP: NeuralModel(QBMSCVI, training=every_step),
    "prior as fast as the networks": NeuralModel(QBMSCVI, plan=lambda task: {"prior_lr": 1e-3}, training=every_step),
    "prior at a tenth of their rate": NeuralModel(QBMSCVI, plan=lambda task: {"prior_lr": 1e-4}, training=every_step),
    "prior at a fiftieth": NeuralModel(QBMSCVI, plan=lambda task: {"prior_lr": 2e-5}, training=every_step),
}
REFERENCES = {name: AT_EVERY_STEP for name in LEVERS if name.startswith("prior")}  # the default for all others
SHOWN = ("scib_bio", "scib_batch", "scib_total", "knn_macro_f1", "boosting_macro_f1", "pseudotime_tau", "elbo")


def named(name: str) -> Callable[[Task], Fit]:
    """The setting as a model of :func:`~qbmscvi.benchmark.compare`, which tells functions apart by their names."""

    def lever(task: Task) -> Fit:
        return LEVERS[name](task)

    lever.__name__ = name
    return lever


def to_markdown(records: list[dict], defaults: list[dict]) -> str:
    """Text of ``LEVERS.md``."""
    scores = {(r["data"], r["model"], r["seed"]): r["scores"] for r in defaults + records if r["schedule"] == "native"}
    lines = [
        "# What else was tried",
        "",
        "Written by `levers.py`. Each setting minus the default, or minus what is named: mean of paired differences "
        "over seeds, Student's 95 % interval in brackets. The settings were tried on the data sets that judge them, "
        "and many scores are shown: one interval in twenty misses zero by chance alone. Held-out ELBO in nats per "
        "cell.",
        "",
        f"Commits {', '.join(sorted({r['commit'] or 'none' for r in records}))}.",
    ]
    for data in dict.fromkeys(r["data"] for r in records):
        if not any(
            (data, REFERENCES.get(r["model"], "QBMSCVI"), r["seed"]) in scores for r in records if r["data"] == data
        ):
            continue
        shown = [metric for metric in SHOWN if any(metric in r["scores"] for r in records if r["data"] == data)]
        titles = ["setting", "minus", "seeds", *(METRICS[metric].title for metric in shown)]
        lines += ["", f"## {data}", "", _row(titles), _row(["---"] * len(titles))]
        for name in LEVERS:
            runs = [r for r in records if (r["data"], r["model"]) == (data, name)]
            reference = REFERENCES.get(name, "QBMSCVI")
            pairs = [
                (r["scores"], scores[data, reference, r["seed"]])
                for r in runs
                if (data, reference, r["seed"]) in scores
            ]
            if pairs:
                what = [name, REFERENCES.get(name, "the default"), str(len(pairs))]
                lines.append(_row(what + [_difference(pairs, metric) for metric in shown]))
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _difference(pairs: list[tuple[dict, dict]], metric: str) -> str:
    both = [(one.get(metric), other.get(metric)) for one, other in pairs]
    if any(value is None for pair in both for value in pair):
        return ""
    one, other = np.array(both).T
    result = paired_difference(one, other)
    digits = 1 if metric == "elbo" else 3
    interval = f" ({result.t_low:+.{digits}f} to {result.t_high:+.{digits}f})" if len(both) > 1 else ""
    return f"{result.mean:+.{digits}f}{interval}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of the .h5ad")
    parser.add_argument("--sets", nargs="+", choices=DATA_SETS, default=list(DATA_SETS))
    add_options(parser)
    parser.add_argument("--records", type=Path, default=HERE / "levers.jsonl")
    parser.add_argument("--defaults", type=Path, default=HERE / "results.jsonl", help="records of the defaults")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of LEVERS.md")
    parser.add_argument("--table-only", action="store_true", help="write the table from existing records")
    options = parser.parse_args()
    for name in [] if options.table_only else options.sets:
        given = {**DATA_SETS[name], "name": name, **arguments(options)}
        given["models"] = [named(lever) for lever in options.models or LEVERS]
        compare(load(name, options.data, options.n_genes, options.max_cells), records=options.records, **given)
    text = to_markdown(read_records(options.records), read_records(options.defaults))
    (options.out / "LEVERS.md").write_text(text)
    print(f"wrote {options.out / 'LEVERS.md'}")


if __name__ == "__main__":
    main()
