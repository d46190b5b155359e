"""What the Boltzmann prior costs beside the rest of a training step."""

from __future__ import annotations

import time

import numpy as np
import pytest
import scvi
import torch
from lightning.pytorch.callbacks import Callback
from torch.distributions import kl_divergence

from qbmscvi import QBMSCVI, SamplingCallback
from qbmscvi.datasets import synthetic_counts
from qbmscvi.distributions import FactorialPosterior

pytestmark = pytest.mark.slow

N_WARM = 20  # steps left out: first calls of every kernel, burn-in of the chains
BATCH_SIZE = 128
N_CHAINS = 512
N_SPINS = 64


@pytest.fixture
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


class Meter(Callback):
    """CPU time of each step, of the KL term alone beside it, and what of the step was sampling.

    The KL term is measured after each step, on a copy of the posterior's shape, forward and backward; its time is not
    counted as the step's. So all three numbers see the machine in the same state.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self.sampling, self.kl = [], [], []
        self._started = None
        refresh = SamplingCallback.on_train_batch_start

        def timed(*args, **kwargs):
            started = time.process_time()
            refresh(*args, **kwargs)
            self.sampling.append(time.process_time() - started)

        monkeypatch.setattr(SamplingCallback, "on_train_batch_start", timed)

    def on_train_epoch_start(self, trainer, pl_module):
        self._started = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = time.process_time()
        # A step lasts from the end of the last one, so that it includes loading its batch.
        self.steps.append(np.nan if self._started is None else now - self._started)
        prior = pl_module.module.prior
        logits = torch.randn(BATCH_SIZE, prior.n_spins, requires_grad=True)
        loc = torch.randn(BATCH_SIZE, prior.n_gaussian, requires_grad=True)
        scale = torch.ones(BATCH_SIZE, prior.n_gaussian, requires_grad=True)
        leaves = [logits, *prior.parameters(), *([loc, scale] if prior.n_gaussian else [])]
        leaves = [leaf for leaf in leaves if leaf.requires_grad and leaf.numel()]
        started = time.process_time()
        with torch.enable_grad():
            qz = FactorialPosterior(loc, scale, logits)
            loss = kl_divergence(qz, prior.distribution()).sum(-1).mean()
            torch.autograd.grad(loss, leaves)
        self.kl.append(time.process_time() - started)
        self._started = time.process_time()


@pytest.mark.parametrize("latent", ["spins", "gaussian-spins"])
def test_prior_costs_less_than_a_tenth_of_a_training_step(latent, one_thread, monkeypatch):
    """Medians over some 160 steps of one run; 2,000 genes, 64 spins, 512 chains, batch 128, one thread."""
    adata = synthetic_counts(2560, 2000, mean_depth=1500.0, seed=0)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    sizes = {"n_latent": N_SPINS} if latent == "spins" else {"n_spins": N_SPINS}
    model = QBMSCVI(adata, latent=latent, n_chains=N_CHAINS, **sizes)
    meter = Meter(monkeypatch)
    started = time.process_time()
    model.train(
        max_epochs=10,
        train_size=1.0,
        batch_size=BATCH_SIZE,
        accelerator="cpu",
        enable_progress_bar=False,
        callbacks=[meter],
    )
    whole = time.process_time() - started

    assert len(meter.steps) == len(meter.sampling) == len(meter.kl) == 200
    step, sampling, kl = (np.nanmedian(values[N_WARM:]) for values in (meter.steps, meter.sampling, meter.kl))
    # What a median hides: requests that take long, the first of a model and the estimates of log Z.
    share_of_all = (sum(meter.sampling) + sum(meter.kl)) / (whole - sum(meter.kl))
    print(
        f"\n{latent}: step {1e3 * step:.1f} ms, of which sampling {1e3 * sampling:.2f} ms and KL {1e3 * kl:.2f} ms: "
        f"{100 * (sampling + kl) / step:.1f} % (sampling {100 * sampling / step:.1f} %); first request "
        f"{1e3 * meter.sampling[0]:.0f} ms; whole run {whole:.1f} s, share of all {100 * share_of_all:.1f} %"
    )
    assert (sampling + kl) / step < 0.10
