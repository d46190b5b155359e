"""What the Boltzmann prior costs beside the rest of a training step: one way to measure it, for a test and a report."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import scvi
import torch
from lightning.pytorch.callbacks import Callback
from torch.distributions import kl_divergence

from qbmscvi import QBMSCVI, SamplingCallback
from qbmscvi._prior import BoltzmannPrior
from qbmscvi.datasets import synthetic_counts
from qbmscvi.distributions import FactorialPosterior
from qbmscvi.samplers import _gibbs

N_CELLS, N_GENES = 2560, 2000
N_WARM = 20  # steps left out: first calls of every kernel, burn-in of the chains
BATCH_SIZE = 128
FAMILIES = {
    "spins": {"latent": "spins", "n_latent": 64, "n_chains": 512},
    "gaussian-spins": {"latent": "gaussian-spins"},
    "gaussian-spins, K=64": {"latent": "gaussian-spins", "n_spins": 64, "n_chains": 512},
}
# What is timed inside a step. The rest of "sampling" is the layer: requests, checks, merging, bookkeeping.
PARTS = {
    "sampling": (SamplingCallback, "on_train_batch_start"),
    "tracking": (SamplingCallback, "_track_log_z"),
    "sweeps": (_gibbs, "gibbs_sweeps"),
    "moments": (BoltzmannPrior, "set_moments"),
}


class Meter(Callback):
    """CPU seconds of each step and its parts, and of the KL term alone beside it.

    The KL term is measured after each step, on a copy of the posterior's shape, forward and backward; its time is not
    counted as the step's. So all numbers of a step see the machine in the same state.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in ("step", "kl", *PARTS)}
        self._current = dict.fromkeys(PARTS, 0.0)
        self._started = None

    def timed(self, part: str, function):
        def call(*args, **kwargs):
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._current[part] += time.process_time() - started

        return call

    def on_train_epoch_start(self, trainer, pl_module):
        self._started = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = time.process_time()
        # A step lasts from the end of the last one, so that it includes loading its batch.
        self.seconds["step"].append(np.nan if self._started is None else now - self._started)
        for part, seconds in self._current.items():
            self.seconds[part].append(seconds)
            self._current[part] = 0.0
        self.seconds["kl"].append(_seconds_of_kl(pl_module.module.prior))
        self._started = time.process_time()


def _seconds_of_kl(prior: BoltzmannPrior) -> float:
    logits = torch.randn(BATCH_SIZE, prior.n_spins, requires_grad=True)
    loc = torch.randn(BATCH_SIZE, prior.n_gaussian, requires_grad=True)
    scale = torch.ones(BATCH_SIZE, prior.n_gaussian, requires_grad=True)
    leaves = [leaf for leaf in (logits, loc, scale, *prior.parameters()) if leaf.requires_grad and leaf.numel()]
    started = time.process_time()
    with torch.enable_grad():
        qz = FactorialPosterior(loc, scale, logits)
        loss = kl_divergence(qz, prior.distribution()).sum(-1).mean()
        torch.autograd.grad(loss, leaves)
    return time.process_time() - started


@dataclass(frozen=True)
class Cost:
    """CPU seconds per step, by part, one array each; and those of the whole run, without measuring the KL."""

    seconds: dict[str, np.ndarray]
    whole: float

    def median(self, part: str) -> float:
        return float(np.nanmedian(self.seconds[part][N_WARM:]))

    def share(self, *parts: str) -> tuple[float, float, float]:
        """Median of the parts of a step over the median step, and its 95 % interval by ranks (binomial)."""
        values = np.sort(sum(self.seconds[part] for part in parts)[N_WARM:])
        reach = 0.98 * np.sqrt(len(values))
        ranks = np.clip(np.round([0.5 * len(values) - reach, 0.5 * len(values) + reach]), 0, len(values) - 1)
        low, high = values[ranks.astype(int)] / self.median("step")
        return float(np.median(values)) / self.median("step"), float(low), float(high)

    @property
    def share_of_all(self) -> float:
        """What medians hide: requests that take long, the first of a model and the estimates of log Z."""
        return float((self.seconds["sampling"].sum() + self.seconds["kl"].sum()) / self.whole)


def measure(family: str, n_epochs: int = 10) -> Cost:
    """Train one of ``FAMILIES`` for ``20 * n_epochs`` steps; torch's threads are the caller's business."""
    adata = synthetic_counts(N_CELLS, N_GENES, mean_depth=1500.0, seed=0)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    model = QBMSCVI(adata, **FAMILIES[family])
    meter = Meter()
    with ExitStack() as stack:
        for part, (owner, name) in PARTS.items():
            stack.enter_context(patch.object(owner, name, meter.timed(part, getattr(owner, name))))
        started = time.process_time()
        model.train(
            max_epochs=n_epochs,
            train_size=1.0,
            batch_size=BATCH_SIZE,
            accelerator="cpu",
            enable_progress_bar=False,
            callbacks=[meter],
        )
        whole = time.process_time() - started
    seconds = {part: np.array(values) for part, values in meter.seconds.items()}
    seconds["layer"] = seconds["sampling"] - seconds["tracking"] - seconds["sweeps"] - seconds["moments"]
    return Cost(seconds, whole - seconds["kl"].sum())
