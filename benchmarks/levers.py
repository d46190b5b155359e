"""Settings other than the defaults, on the same cells and with the same scores: what was tried, and what it gave.

    python benchmarks/levers.py --data ../shared/data --epochs 100 --max-cells 4000
    python benchmarks/levers.py --table-only

Each setting changes one thing of QBMSCVI. Runs are added to ``levers.jsonl`` and not repeated. ``LEVERS.md`` has the
difference of each to the default, seed by seed, from the runs in ``results.jsonl``, or to the setting beside which it
was tried. *Other random numbers* are the default again: what they differ by, chance alone does. The runs recorded under
that name were made at commit 542d4f5 and on another machine, whose rounding is enough to make other runs of the same
seeds. ``long.jsonl`` has runs of 400 epochs, scVI's own number for so few cells: the default, SCVI, one setting.

    python benchmarks/levers.py --epochs 400 --max-cells 4000 --records benchmarks/long.jsonl \\
        --models QBMSCVI SCVI "Adam, without weight decay"
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from results import DATA_SETS, load
from scvi.module._constants import MODULE_KEYS

from qbmscvi import QBMSCVI, QBMTrainingPlan, SamplingSchedule
from qbmscvi._module import QBMVAE
from qbmscvi.benchmark import METRICS, compare, paired_difference, pooled_difference, read_records
from qbmscvi.benchmark.__main__ import add_options, arguments
from qbmscvi.benchmark._models import MODELS, NeuralModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor
    from torch.optim import Optimizer

    from qbmscvi._model import Representation
    from qbmscvi.benchmark import Fit, Task

HERE = Path(__file__).parent
ADAM, SCVIS_RATE = "Adam, without weight decay", "Adam at scVI's learning rate"
AT_EVERY_STEP = "chains at every step, scVI's rate"
OTHER_NUMBERS = "other random numbers"
FALLING = "learning rate falls to zero"
EARLIER, OFTEN = "couplings felt from the first step", "half as fast, chains at every other step"
SLOW = {"optimizer": "Adam", "lr": 1e-3}


def every_step(task: Task) -> dict:
    """Persistent chains that move on by two sweeps at each step, not by four at every eighth."""
    return {"schedule": SamplingSchedule(every_n_steps=1, n_sweeps=2)}


def every_other_step(task: Task) -> dict:
    """Chains that move on by two sweeps at every other step."""
    return {"schedule": SamplingSchedule(every_n_steps=2, n_sweeps=2)}


def other_numbers(task: Task) -> dict:
    """Nothing else, but a number is drawn after the networks have their first weights."""
    torch.rand(1)
    return {}


def earlier(**plan: Any) -> Callable[[Task], dict]:
    """Arguments of the training plan with which the couplings were felt from the first step, the default before."""
    return lambda task: {"coupling_warmup": None, "prior_lr": 5e-5, **plan}


def with_arguments(**arguments: object) -> NeuralModel:
    """The earlier default with arguments of the constructor."""
    return NeuralModel(QBMSCVI, lambda task: dict(arguments), earlier())


def with_plan(**plan: Any) -> NeuralModel:
    """The earlier default with arguments of the training plan."""
    return NeuralModel(QBMSCVI, plan=earlier(**plan))


def with_late(training: Callable[[Task], dict] = lambda task: {}, **plan: Any) -> NeuralModel:
    """QBMSCVI with arguments of the training plan, whose couplings are felt late unless they say otherwise."""
    return NeuralModel(QBMSCVI, plan=lambda task: dict(plan), training=training)


def at_every_step(**plan: float) -> NeuralModel:
    """The earlier default with Adam at scVI's learning rate, its chains moved on at each step."""
    return NeuralModel(QBMSCVI, plan=earlier(**SLOW, **plan), training=every_step)


def read_as(representation: Representation) -> NeuralModel:
    """The earlier default, its cells represented in another way."""

    class Reading(QBMSCVI):
        def get_latent_representation(self, *args: Any, **kwargs: Any) -> np.ndarray:
            return super().get_latent_representation(*args, representation=representation, **kwargs)

    return NeuralModel(Reading, plan=earlier())


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


class FallingPlan(QBMTrainingPlan):
    """The networks' learning rate falls to zero over the second half of the steps."""

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Set the learning rate of this step."""
        super().on_train_batch_start(batch, batch_idx)
        left = 1.0 - self.trainer.global_step / self.trainer.estimated_stepping_batches
        linear, _, others = self.optimizers().param_groups
        linear["lr"] = others["lr"] = self.lr * min(1.0, 2.0 * left)


class FallingQBMSCVI(QBMSCVI):
    """QBMSCVI with that training plan."""

    _training_plan_cls = FallingPlan


class FieldlessVAE(QBMVAE):
    """The fields of the prior follow the cells and do not pull them."""

    def loss(self, tensors: dict, inference_outputs: dict, *args: Any, kl_weight: float = 1.0, **kwargs: Any) -> Any:
        """See :class:`~qbmscvi._module.QBMVAE`; in training the energy of the fields has no gradient for the cells."""
        losses = super().loss(tensors, inference_outputs, *args, kl_weight=kl_weight, **kwargs)
        if self.training:
            energy = inference_outputs[MODULE_KEYS.QZ_KEY].spin_mean @ self.prior.h.detach()
            losses.loss = losses.loss - (kl_weight * (energy - energy.detach())).mean()
        return losses


class FieldlessQBMSCVI(QBMSCVI):
    """QBMSCVI with that module."""

    _module_cls = FieldlessVAE


class HalfFeltPlan(QBMTrainingPlan):
    """Couplings that are half felt, from the first step to the last."""

    coupling_weight = 0.5


class HalfFeltQBMSCVI(QBMSCVI):
    """QBMSCVI with that training plan."""

    _training_plan_cls = HalfFeltPlan


class FallingHalfFeltPlan(FallingPlan, HalfFeltPlan):
    """Both."""


class FallingHalfFeltQBMSCVI(QBMSCVI):
    """QBMSCVI with that training plan."""

    _training_plan_cls = FallingHalfFeltPlan


# Tried beside the earlier default.
OF_EARLIER = {
    OTHER_NUMBERS: NeuralModel(QBMSCVI, plan=earlier(), training=other_numbers),
    "J = 0, slow prior": with_arguments(prior_graph="independent"),
    "J = 0, other random numbers": NeuralModel(
        QBMSCVI, lambda task: {"prior_graph": "independent"}, earlier(), training=other_numbers
    ),
    "32 spins": with_arguments(n_latent=32),
    "128 spins": with_arguments(n_latent=128),
    "complete graph": with_arguments(prior_graph="complete"),
    "ReinMax": with_arguments(smoothing="reinmax"),
    "Gumbel": with_arguments(smoothing="gumbel"),
    "spike and exponential": with_arguments(smoothing="spike-exponential"),
    "no dropout": with_arguments(dropout_rate=0.0),
    "scVI's epsilon": with_plan(eps=0.01),
    "KL weight one half": with_plan(max_kl_weight=0.5),
    "prior twice as fast": with_plan(prior_lr=1e-4),
    "three times scVI's learning rate": with_plan(lr=3e-3),
    "weight decay of biases and normalization, too": NeuralModel(DecayingQBMSCVI, plan=earlier()),
    "represented by mean spins": read_as("mean"),
    "represented by logits": read_as("logits"),
    "couplings half felt": NeuralModel(HalfFeltQBMSCVI, plan=earlier()),
    "couplings never felt": with_plan(coupling_warmup=(1.0, 1.0)),
    FALLING: NeuralModel(FallingQBMSCVI, plan=earlier()),
    "couplings half felt, learning rate falls": NeuralModel(FallingHalfFeltQBMSCVI, plan=earlier()),
    "late couplings, learning rate falls": NeuralModel(FallingQBMSCVI, plan=earlier(coupling_warmup=(0.5, 1.0))),
    ADAM: with_plan(optimizer="Adam"),
    SCVIS_RATE: with_plan(**SLOW),
    "128 spins, scVI's rate": NeuralModel(QBMSCVI, lambda task: {"n_latent": 128}, earlier(**SLOW)),
    AT_EVERY_STEP: at_every_step(),
    "prior as fast as the networks": at_every_step(prior_lr=1e-3),
    "prior at a tenth of their rate": at_every_step(prior_lr=1e-4),
    "prior at a fiftieth": at_every_step(prior_lr=2e-5),
}
# Tried beside the default.
OF_DEFAULT = {
    EARLIER: with_plan(),
    "felt more and more from the first step": with_late(coupling_warmup=(0.0, 1.0)),
    "prior at a twentieth of the networks' rate": with_late(prior_lr=1e-4),
    "prior at a fortieth of the networks' rate": with_late(prior_lr=5e-5),
    "prior half as fast as the networks": with_late(prior_lr=1e-3),
    OFTEN: with_late(every_other_step, prior_lr=1e-3),
    "half as fast, fully felt in the last quarter": with_late(
        every_other_step, prior_lr=1e-3, coupling_warmup=(0.5, 0.75)
    ),
    "half as fast, learning rate falls": NeuralModel(
        FallingQBMSCVI, plan=lambda task: {"prior_lr": 1e-3}, training=every_other_step
    ),
    "half as fast, couplings never felt": with_late(prior_lr=1e-3, coupling_warmup=(1.0, 1.0)),
    "half as fast, neither couplings nor fields felt": NeuralModel(
        FieldlessQBMSCVI,
        plan=lambda task: {"prior_lr": 1e-3, "coupling_warmup": (1.0, 1.0)},
        training=every_other_step,
    ),
    "DisARM": NeuralModel(QBMSCVI, lambda task: {"smoothing": "disarm"}),
    "four draws of each cell": NeuralModel(RepeatingQBMSCVI),
}
LEVERS = OF_DEFAULT | OF_EARLIER
# What a setting was tried beside, where that is not the default.
REFERENCES = dict.fromkeys(OF_EARLIER, EARLIER) | {
    "J = 0, other random numbers": OTHER_NUMBERS,
    SCVIS_RATE: ADAM,
    "128 spins, scVI's rate": SCVIS_RATE,
    AT_EVERY_STEP: SCVIS_RATE,
    "prior as fast as the networks": AT_EVERY_STEP,
    "prior at a tenth of their rate": AT_EVERY_STEP,
    "prior at a fiftieth": AT_EVERY_STEP,
    "couplings half felt, learning rate falls": FALLING,
    "late couplings, learning rate falls": FALLING,
    "half as fast, fully felt in the last quarter": OFTEN,
    "half as fast, learning rate falls": OFTEN,
    "half as fast, couplings never felt": "prior half as fast as the networks",
    "half as fast, neither couplings nor fields felt": OFTEN,
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


def named(name: str) -> Callable[[Task], Fit]:
    """The setting as a model of :func:`~qbmscvi.benchmark.compare`, which tells functions apart by their names."""

    def lever(task: Task) -> Fit:
        return LEVERS[name](task)

    lever.__name__ = name
    return lever


def to_markdown(records: list[dict], defaults: list[dict], long: list[dict]) -> str:
    """Text of ``LEVERS.md``."""
    lines = [
        "# What else was tried",
        "",
        "Written by `levers.py`. Each setting minus the default, or minus what is named: mean of paired differences "
        "over seeds, Student's 95 % interval in brackets; over several data sets, the mean of their means, with the "
        "interval of a bootstrap of data sets and seeds, which is too narrow where these are few. The settings were "
        "tried on the data sets that judge them, and many scores are shown: one interval in twenty misses zero by "
        "chance alone. Held-out ELBO in nats per cell.",
        "",
        f"Commits {', '.join(sorted({r['commit'] or 'none' for r in records + long}))}.",
        *_section("Several data sets", records, defaults, n_sets=2),
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
    if len(known) > 1:
        pooled = pooled_difference({data: one - other for data, (one, other) in known.items()})
        is_spread_known = min(len(one) for one, _ in known.values()) > 1
        mean, low, high = pooled.mean, pooled.low if is_spread_known else np.nan, pooled.high
    else:
        ((one, other),) = known.values()
        paired = paired_difference(one, other)
        mean, low, high = paired.mean, paired.t_low, paired.t_high
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
        given["models"] = [m if m in MODELS else named(m) for m in options.models or LEVERS]
        compare(load(name, options.data, options.n_genes, options.max_cells), records=options.records, **given)
    text = to_markdown(*(read_records(HERE / name) for name in ("levers.jsonl", "results.jsonl", "long.jsonl")))
    (options.out / "LEVERS.md").write_text(text)
    print(f"wrote {options.out / 'LEVERS.md'}")


if __name__ == "__main__":
    main()
