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
from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.boltzmann.prior import BoltzmannPrior
from qbmscvi.datasets import synthetic_counts
from qbmscvi.samplers.local import _gibbs
from qbmscvi.train._log_z import LogZTracker

N_CELLS, N_GENES, MEAN_DEPTH = 2560, 2000, 300.0  # 8 % of the counts are not zero
BATCH_SIZE = 128
N_STEPS = N_CELLS // BATCH_SIZE  # of an epoch
FAMILIES = {"spins, 64": {"n_latent": 64}}
# What is timed inside a step. The rest of "sampling" is the layer: requests, checks, merging, bookkeeping.
PARTS = {
    "sampling": (SamplingCallback, "on_train_batch_start"),
    "tracking": (LogZTracker, "follow"),
    "sweeps": (_gibbs, "gibbs_sweeps"),
    "moments": (BoltzmannPrior, "set_moments"),
}


class Meter(Callback):
    """CPU seconds of each step and its parts; those of the KL alone, as often as there are steps, after each epoch."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in ("step", "kl", *PARTS)}
        self._current = dict.fromkeys(PARTS, 0.0)
        self._started = 0.0

    def timed(self, part: str, function):
        def call(*args, **kwargs):
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._current[part] += time.process_time() - started

        return call

    def on_train_epoch_start(self, trainer, pl_module):
        self._started = time.process_time()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = time.process_time()
        # A step lasts from the end of the last one, so that it includes loading its batch.
        self.seconds["step"].append(now - self._started)
        for part, seconds in self._current.items():
            self.seconds[part].append(seconds)
            self._current[part] = 0.0
        self._started = now

    def on_train_epoch_end(self, trainer, pl_module):
        prior = pl_module.module.prior
        logits = torch.rand(BATCH_SIZE, prior.n_visible, requires_grad=True)
        inputs = [logits, *(p for p in prior.parameters() if p.requires_grad)]
        for _ in range(N_STEPS):
            started = time.process_time()
            kl = kl_divergence(FactorialPosterior(logits), prior.distribution())
            torch.autograd.grad(kl.sum(-1).mean(), inputs, allow_unused=True)
            self.seconds["kl"].append(time.process_time() - started)


@dataclass(frozen=True)
class Cost:
    """CPU seconds of each step after the first epoch, by part, shape ``(n_epochs - 1, n_steps)``.

    The first epoch meets every kernel for the first time, and the burn-in of the chains.
    """

    seconds: dict[str, np.ndarray]

    def median(self, part: str) -> float:
        """Median over the steps."""
        return float(np.median(self.seconds[part]))

    def share(self, *parts: str) -> tuple[float, float, float]:
        """Part of an epoch's steps that some parts take, median and quartiles over epochs.

        Sums of whole epochs, not medians of steps: the chains move on in one step of several.
        """
        shares = sum(self.seconds[part] for part in parts).sum(1) / self.seconds["step"].sum(1)
        low, middle, high = np.quantile(shares, [0.25, 0.5, 0.75])
        return float(middle), float(low), float(high)


def measure(family: str, n_epochs: int = 12) -> Cost:
    """Train one of ``FAMILIES``; torch's threads are the caller's business."""
    adata = synthetic_counts(N_CELLS, N_GENES, mean_depth=MEAN_DEPTH, seed=0)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    model = QBMSCVI(adata, **FAMILIES[family])
    meter = Meter()
    with ExitStack() as stack:
        for part, (owner, name) in PARTS.items():
            stack.enter_context(patch.object(owner, name, meter.timed(part, getattr(owner, name))))
        model.train(
            max_epochs=n_epochs,
            train_size=1.0,
            batch_size=BATCH_SIZE,
            accelerator="cpu",
            enable_progress_bar=False,
            callbacks=[meter],
        )
    seconds = {part: np.reshape(values, (n_epochs, N_STEPS)) for part, values in meter.seconds.items()}
    seconds["layer"] = seconds["sampling"] - seconds["tracking"] - seconds["sweeps"] - seconds["moments"]
    return Cost({part: values[1:] for part, values in seconds.items()})
