"""Twenty thousand steps beside a device that is late and wrong all the time."""

from __future__ import annotations

import itertools
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scvi
import torch
from faulty import FAULTS, Honesty, SteppedClock, SteppedDevice
from lightning.pytorch.callbacks import Callback

from qbmscvi import QBMSCVI, SamplingSchedule
from qbmscvi.datasets import synthetic_counts
from qbmscvi.samplers import BlockGibbsSampler

pytestmark = pytest.mark.slow

N_STEPS = 20_000
N_CHAINS = 512  # of which 448 make the moments
WARM = 4_000  # steps after which memory is measured: allocator pools, caches and code that is imported late are there
# Between then and the end Lightning's history grows by some 15 numbers for each of 280 epochs, in pandas tables that
# are copied when they grow: below 5 MB. A batch of chains kept for each of 16,000 steps would be 65 MB, a thread kept
# for each of the trips 10 MB of stacks at the least.
MAX_GROWTH = 25e6
# Largest of the 24 moments of 448 chains in each of 220 checks, some 5,000 normal deviates: false alarm 2e-4.
MAX_Z = 5.5
MAX_ENERGY = 50.0  # nats; eight spins with |h| and |J| below 2


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("the resident memory is read from /proc")
    return int(statm.read_text().split()[1]) * 4096


def flaky(names=tuple(FAULTS), seed: int = 0) -> SteppedDevice:
    """The faults in turn at three calls in ten; latencies from 10 to 500 steps; one job in fifty never ends."""
    rng = np.random.default_rng(seed)
    faults = itertools.cycle([FAULTS[name] for name in names])

    def latencies():
        while True:
            yield None if rng.random() < 0.02 else int(np.exp(rng.uniform(np.log(10), np.log(500))))

    def spoil(sampler, request, draw):
        return next(faults).spoil(sampler, request, draw)

    is_due = np.random.default_rng(seed + 1).permutation(10) < 3
    return SteppedDevice(spoil, lambda call: call > 0 and is_due[call % 10], latencies())


class Watch(Callback):
    """Memory, threads and energies on the way."""

    def __init__(self) -> None:
        self.memory, self.n_threads, self.energies = {}, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        if step % 1000 == 0:
            self.memory[step] = resident_bytes()
            self.n_threads.append(threading.active_count())
            self.energies.append(float(pl_module.sampling._mean_energy))
        self.is_busy = pl_module.sampling.broker.is_busy


def run(device, n_steps: int, schedule=SamplingSchedule(every_n_steps=1, n_sweeps=2), every_n_steps: int = 100):
    adata = synthetic_counts(900, 30, seed=1)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    model = QBMSCVI(adata, n_latent=8, n_hidden=8, n_chains=N_CHAINS, gene_likelihood="poisson")
    watch, honesty = Watch(), Honesty(every_n_steps)
    clock = [] if device is None else [SteppedClock(device)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train(
            max_steps=n_steps,
            max_epochs=n_steps,
            batch_size=16,
            train_size=1.0,
            accelerator="cpu",
            enable_progress_bar=False,
            plan_kwargs={"n_epochs_kl_warmup": 1, "prior_lr": 5e-3},
            callbacks=[*clock, watch, honesty],
            schedule=schedule,
            **({} if device is None else {"sampler": device}),
        )
    ours = [str(w.message) for w in caught if "Block Gibbs answers" in str(w.message)]
    return model, watch, honesty, ours


def test_training_survives_a_device_that_fails_all_the_time():
    """Moments as near to the enumerated ones, in exact standard errors, with faults as without them."""
    device, n_threads, started = flaky(), threading.active_count(), time.perf_counter()
    model, watch, honesty, ours = run(device, N_STEPS)
    seconds = time.perf_counter() - started
    _, _, control, none = run(None, 2_000)  # local block Gibbs without a device

    sampling = model.trainer.lightning_module.sampling
    ledger, prior = sampling.broker.ledger, model.module.prior
    growth = watch.memory[N_STEPS] - watch.memory[WARM]
    print(
        f"\n{N_STEPS} steps in {seconds:.0f} s; {ledger}; fallbacks {sampling.n_fallbacks}, cancelled "
        f"{device.n_cancelled}; memory {watch.memory[WARM] / 1e6:.1f} MB at step {WARM}, {growth / 1e6:+.1f} MB after; "
        f"threads {n_threads} before, {max(watch.n_threads)} at most; energies {min(watch.energies):.2f} to "
        f"{max(watch.energies):.2f}; |h| <= {prior.h.detach().abs().max():.2f}, "
        f"|J| <= {prior.J.detach().abs().max():.2f}; "
        f"worst moment {honesty.worst[-1]:.2f} SE at the end, {max(honesty.worst):.2f} in {len(honesty.worst)} checks "
        f"(without faults, 2,000 steps: {control.worst[-1]:.2f} and {max(control.worst):.2f} in {len(control.worst)})"
    )
    assert len(ours) == 1
    assert not none
    assert model.trainer.global_step == int(prior.n_updates) == N_STEPS
    assert sampling.n_fallbacks == ledger.n_failures == model.history["sampling_fallbacks"].iloc[-1, 0]
    # Every trip fails, or is used, or is under way at the end.
    n_used = ledger.n_samples // N_CHAINS
    assert ledger.n_trips == n_used + ledger.n_failures + watch.is_busy
    assert ledger.n_failures > len(FAULTS)  # each fault was there
    assert n_used > 0.5 * ledger.n_trips
    assert all(bool(torch.isfinite(value).all()) for value in model.module.state_dict().values())
    assert max(map(abs, watch.energies)) < MAX_ENERGY
    assert growth < MAX_GROWTH
    assert max(watch.n_threads) <= n_threads + 1
    assert len(honesty.worst) == N_STEPS // 100
    assert max(honesty.worst) < MAX_Z
    assert max(control.worst) < MAX_Z


def test_the_moments_tell_when_wrong_answers_are_taken(monkeypatch):
    """The same device, its answers neither vetted nor followed by more than one sweep: the gate of the soak fails."""
    monkeypatch.setattr("qbmscvi.train._sampling.BlockGibbsSampler", partial(BlockGibbsSampler, 1))
    monkeypatch.setattr("qbmscvi.train._sampling.vet", lambda sampler: sampler)
    _, _, honesty, _ = run(flaky(["ground-states"]), 2_000, SamplingSchedule(every_n_steps=1, n_sweeps=1), 1)
    assert max(honesty.worst) > MAX_Z
