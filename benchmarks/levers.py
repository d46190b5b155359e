"""Settings other than the defaults, on the same cells and with the same scores: what was tried, and what it gave.

    python benchmarks/levers.py --data ../shared/data --epochs 100 --max-cells 4000
    python benchmarks/levers.py --table-only

Each setting changes what its name says. Runs are added to ``levers.jsonl`` and not repeated. ``LEVERS.md`` has the
difference of each to the default, seed by seed, from the runs in ``results.jsonl``, or to the setting beside which it
was tried. *Other random numbers* are the default again: what they differ by, chance alone does. The runs recorded under
that name were made at commit 542d4f5 and on another machine, whose rounding is enough to make other runs of the same
seeds. ``levers.jsonl`` also has runs of settings that no longer exist. ``long.jsonl`` has runs of 400 epochs, scVI's
own number for so few cells: the default, SCVI, one setting.

    python benchmarks/levers.py --epochs 400 --max-cells 4000 --records benchmarks/long.jsonl \\
        --models QBMSCVI SCVI "Adam, without weight decay"
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from results import DATA_SETS, VARIANTS, load, named
from scvi.model import SCVI
from scvi.train import TrainingPlan

from qbmscvi import QBMSCVI, QBMTrainingPlan, SamplingSchedule
from qbmscvi.benchmark import METRICS, Difference, compare, pooled_difference, read_records
from qbmscvi.benchmark.__main__ import add_options, arguments
from qbmscvi.benchmark._models import MODELS, NeuralModel
from qbmscvi.benchmark._report import as_table, compute_differences

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor
    from torch.optim import Optimizer

    from qbmscvi.benchmark import Task
    from qbmscvi.model._qbmscvi import Representation

HERE = Path(__file__).parent
N_SEEDS = 5
ADAM, SCVIS_RATE = "Adam, without weight decay", "Adam at scVI's learning rate"
AT_EVERY_STEP = "chains at every step, scVI's rate"
OTHER_NUMBERS = "other random numbers"
FALLING = "learning rate falls to zero"
SAME = "SCVI, same optimizer"
SAME_AND_WIDTH = f"{SAME} and width"
FALLING_SCVIS = {f"{name}, learning rate falls": name for name in (SAME, SAME_AND_WIDTH)}
SLOW = {"optimizer": "Adam", "lr": 1e-3, "prior_lr": 5e-5}


def every_step(task: Task) -> dict:
    """Persistent chains that move on by two sweeps at each step, not by four at every eighth."""
    return {"schedule": SamplingSchedule(every_n_steps=1, n_sweeps=2)}


def other_numbers(task: Task) -> dict:
    """Nothing else, but a number is drawn after the networks have their first weights."""
    torch.rand(1)
    return {}


def with_arguments(**arguments: object) -> NeuralModel:
    """QBMSCVI with arguments of its constructor."""
    return NeuralModel(QBMSCVI, lambda task: dict(arguments))


def with_plan(**plan: Any) -> NeuralModel:
    """QBMSCVI with arguments of its training plan."""
    return NeuralModel(QBMSCVI, plan=lambda task: dict(plan))


def at_every_step(**plan: float) -> NeuralModel:
    """QBMSCVI with Adam at scVI's learning rate, its chains moved on at each step."""
    return NeuralModel(QBMSCVI, plan=lambda task: {**SLOW, **plan}, training=every_step)


def read_as(representation: Representation) -> NeuralModel:
    """QBMSCVI whose cells are represented in another way."""

    class Reading(QBMSCVI):
        def get_latent_representation(self, *args: Any, **kwargs: Any) -> np.ndarray:
            return super().get_latent_representation(*args, representation=representation, **kwargs)

    return NeuralModel(Reading)


class RepeatingPlan(QBMTrainingPlan):
    """Four draws of the spins of each cell in every step, and of dropout, in place of one."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """See :class:`~qbmscvi.QBMTrainingPlan`."""
        return super().training_step({key: torch.cat([values] * 4) for key, values in batch.items()}, batch_idx)


class RepeatingQBMSCVI(QBMSCVI):
    """QBMSCVI with that training plan."""

    _training_plan_cls = RepeatingPlan


class DecayingPlan(QBMTrainingPlan):
    """Weight decay of all that the networks have but the dispersions: of biases and normalization, too."""

    def get_optimizer_creator(self) -> Callable[[Iterable[Tensor]], Optimizer]:
        """See :class:`~qbmscvi.QBMTrainingPlan`."""
        create = super().get_optimizer_creator()

        def create_decaying(parameters: Iterable[Tensor]) -> Optimizer:
            optimizer = create(parameters)
            linear, _, others = optimizer.param_groups
            linear["params"] += [p for p in others["params"] if p is not self.module.px_r]
            others["params"] = [self.module.px_r]
            return optimizer

        return create_decaying


class DecayingQBMSCVI(QBMSCVI):
    """QBMSCVI with that training plan."""

    _training_plan_cls = DecayingPlan


class Falling:
    """The networks' learning rate falls to zero over the second half of the steps."""

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Set the learning rate of this step."""
        super().on_train_batch_start(batch, batch_idx)
        left = 1.0 - self.trainer.global_step / self.trainer.estimated_stepping_batches
        of_prior = {id(p) for p in self.sampling.prior.parameters()} if isinstance(self, QBMTrainingPlan) else set()
        for group in self.optimizers().param_groups:
            if not any(id(p) in of_prior for p in group["params"]):
                group["lr"] = self.lr * min(1.0, 2.0 * left)


class FallingPlan(Falling, QBMTrainingPlan):
    """QBMSCVI's training plan with that."""


class FallingQBMSCVI(QBMSCVI):
    """QBMSCVI with that training plan."""

    _training_plan_cls = FallingPlan


class FallingSCVIPlan(Falling, TrainingPlan):
    """scVI's training plan with that."""


class FallingSCVI(SCVI):
    """scVI with that training plan."""

    _training_plan_cls = FallingSCVIPlan


LEVERS: dict[str, NeuralModel] = {
    OTHER_NUMBERS: NeuralModel(QBMSCVI, training=other_numbers),
    "J = 0, other random numbers": NeuralModel(
        QBMSCVI, lambda task: {"prior_graph": "independent"}, training=other_numbers
    ),
    "32 spins": with_arguments(n_latent=32),
    "128 spins": with_arguments(n_latent=128),
    "complete graph": with_arguments(prior_graph="complete"),
    "Gumbel": with_arguments(smoothing="gumbel"),
    "spike and exponential": with_arguments(smoothing="spike-exponential"),
    "no dropout": with_arguments(dropout_rate=0.0),
    "KL weight one half": with_plan(max_kl_weight=0.5),
    "weight decay of biases and normalization, too": NeuralModel(DecayingQBMSCVI),
    "four draws of each cell": NeuralModel(RepeatingQBMSCVI),
    "represented by mean spins": read_as("mean"),
    "represented by logits": read_as("logits"),
    "J = 0, prior at a fifth of the networks' rate": NeuralModel(
        QBMSCVI, lambda task: {"prior_graph": "independent"}, lambda task: {"prior_lr": 4e-4}
    ),
    FALLING: NeuralModel(FallingQBMSCVI),
    "J = 0, learning rate falls": NeuralModel(FallingQBMSCVI, lambda task: {"prior_graph": "independent"}),
    **{
        name: NeuralModel(FallingSCVI, model.arguments, model.plan)
        for name, model in zip(FALLING_SCVIS, (VARIANTS[SAME], MODELS[SAME_AND_WIDTH]), strict=True)
    },
    ADAM: with_plan(optimizer="Adam"),
    SCVIS_RATE: with_plan(**SLOW),
    "128 spins, scVI's rate": NeuralModel(QBMSCVI, lambda task: {"n_latent": 128}, lambda task: dict(SLOW)),
    AT_EVERY_STEP: at_every_step(),
    "prior as fast as the networks": at_every_step(prior_lr=1e-3),
    "prior at a tenth of their rate": at_every_step(prior_lr=1e-4),
    "prior at a fiftieth": at_every_step(prior_lr=2e-5),
}
# What a setting was tried beside, where that is not the default.
REFERENCES = {
    "J = 0, other random numbers": OTHER_NUMBERS,
    SCVIS_RATE: ADAM,
    "128 spins, scVI's rate": SCVIS_RATE,
    AT_EVERY_STEP: SCVIS_RATE,
    "prior as fast as the networks": AT_EVERY_STEP,
    "prior at a tenth of their rate": AT_EVERY_STEP,
    "prior at a fiftieth": AT_EVERY_STEP,
    "J = 0, learning rate falls": FALLING,
    **FALLING_SCVIS,
}
SHOWN = (
    "scib_bio",
    "scib_batch",
    "scib_total",
    "silhouette",
    "knn_macro_f1",
    "boosting_macro_f1",
    "pseudotime_tau",
    "elbo",
)


def to_markdown(records: list[dict], defaults: list[dict], long: list[dict]) -> str:
    """Text of ``LEVERS.md``."""
    lines = [
        "# What else was tried",
        "",
        "Written by `levers.py`. Each setting minus the default, or minus what is named: mean of paired differences "
        "over seeds, Student's 95 % interval in brackets; over several data sets, the mean of their means, with "
        "Student's interval over these means, which is wide where they are few. The settings were tried on the data "
        "sets that judge them, and many scores are shown: one interval in twenty misses zero by chance alone. Held-out "
        "ELBO in nats per cell.",
        "",
        f"Commits {', '.join(sorted({r['commit'] or 'none' for r in records + long}))}.",
        *_section("Several data sets", records, defaults, n_sets=2),
        *_beside_scvi(records, defaults),
    ]
    for heading, tried, beside in (("", records, defaults), (", 400 epochs", long, long)):
        for data in dict.fromkeys(r["data"] for r in tried):
            lines += _section(f"{data}{heading}", [r for r in tried if r["data"] == data], beside)
    return "\n".join(lines) + "\n"


def _section(heading: str, tried: list[dict], beside: list[dict], n_sets: int = 1) -> list[str]:
    """A row for each setting that was tried on so many data sets or more."""
    shown = [metric for metric in SHOWN if any(metric in r["scores"] for r in tried)]
    rows = []
    for name in [*LEVERS, "SCVI"]:
        pairs = _pairs(name, tried, beside)
        if len(pairs) >= n_sets:
            n_runs = [str(n) for n in sorted({len(of_set) for of_set in pairs.values()})]
            what = [name, REFERENCES.get(name, "the default")]
            what += [str(len(pairs))] * (n_sets > 1) + [" to ".join(n_runs[:1] + n_runs[1:][-1:])]
            rows.append(_row(what + [_difference(pairs, metric) for metric in shown]))
    titles = ["setting", "minus", *["sets"] * (n_sets > 1), "seeds", *(METRICS[metric].title for metric in shown)]
    return ["", f"## {heading}", "", _row(titles), _row(["---"] * len(titles)), *rows] if rows else []


def _beside_scvi(tried: list[dict], beside: list[dict]) -> list[str]:
    """The settings that were tried on all data sets with the first seeds, against the best variant of scVI."""
    sets = {r["data"] for r in tried}
    native = [r for r in beside if r["schedule"] == "native" and r["data"] in sets]
    full = {(r["data"], r["seed"]) for r in native if r["model"] == "SCVI" and r["seed"] < N_SEEDS}
    names = [n for n in LEVERS if full <= {(r["data"], r["seed"]) for r in tried if r["model"] == n}]
    runs = [{**r, "model": f"QBMSCVI, {r['model']}"} for r in tried if r["model"] in names]
    differences = compute_differences(as_table(native + runs))
    pooled = differences[differences["data"] == "all"].set_index(["model", "reference", "metric"]).sort_index()
    pooled = pooled[[*Difference._fields]]
    shown = [metric for metric in SHOWN if metric in pooled.index.levels[2]]
    rows = []
    for name in ["QBMSCVI", *(f"QBMSCVI, {name}" for name in ["J = 0", *names])]:
        for reference in ("best SCVI of other seeds", "best SCVI"):
            cells = ["the default" if name == "QBMSCVI" else name.removeprefix("QBMSCVI, "), reference]
            cells += [_interval(metric, Difference(*pooled.loc[(name, reference, metric)])) for metric in shown]
            rows.append(_row(cells))
    titles = ["setting", "minus", *(METRICS[metric].title for metric in shown)]
    text = (
        f"Over all data sets, the {N_SEEDS} seeds or more that both have. *best SCVI* is the variant that is best in "
        "that very score, chosen afterwards, which flatters it; *best SCVI of other seeds* is chosen for each seed by "
        f"the others. Where the learning rate falls, that of scVI does not."
    )
    return ["", "## Beside the best variant of scVI", "", text, "", _row(titles), _row(["---"] * len(titles)), *rows]


def _pairs(name: str, tried: list[dict], beside: list[dict]) -> dict[str, list[tuple[dict, dict]]]:
    """Scores of a setting and of what it was tried beside, by data set."""
    known = {(r["data"], r["model"], r["seed"]): r["scores"] for r in beside + tried if r["schedule"] == "native"}
    pairs = {}
    for run in [r for r in tried if r["model"] == name]:
        reference = known.get((run["data"], REFERENCES.get(name, "QBMSCVI"), run["seed"]))
        if reference:
            pairs.setdefault(run["data"], []).append((run["scores"], reference))
    return pairs


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _difference(pairs: dict[str, list[tuple[dict, dict]]], metric: str) -> str:
    both = {data: [(one.get(metric), other.get(metric)) for one, other in of_set] for data, of_set in pairs.items()}
    known = {data: np.array(values).T for data, values in both.items() if None not in np.ravel(values)}
    if not known:
        return ""
    return _interval(metric, pooled_difference({data: one - other for data, (one, other) in known.items()}))


def _interval(metric: str, difference: Difference) -> str:
    mean, low, high, _ = difference
    digits = 1 if metric == "elbo" else 3
    interval = f" ({low:+.{digits}f} to {high:+.{digits}f})" if np.isfinite(low) else ""
    return f"{mean:+.{digits}f}{interval}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of the .h5ad")
    parser.add_argument("--sets", nargs="+", choices=DATA_SETS, default=list(DATA_SETS))
    add_options(parser)
    parser.add_argument("--records", type=Path, default=HERE / "levers.jsonl")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of LEVERS.md")
    parser.add_argument("--table-only", action="store_true", help="write the table from existing records")
    options = parser.parse_args()
    for name in [] if options.table_only else options.sets:
        given = {**DATA_SETS[name], "name": name, **arguments(options)}
        given["models"] = [m if m in MODELS else named(m, LEVERS[m]) for m in options.models or LEVERS]
        compare(load(name, options.data, options.n_genes, options.max_cells), records=options.records, **given)
    text = to_markdown(*(read_records(HERE / name) for name in ("levers.jsonl", "results.jsonl", "long.jsonl")))
    (options.out / "LEVERS.md").write_text(text)
    print(f"wrote {options.out / 'LEVERS.md'}")


if __name__ == "__main__":
    main()
