"""Resuming from a Lightning checkpoint: the run goes on as if it had not stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import scvi
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from scvi.train import SaveCheckpoint

from qbmscvi import QBMSCVI, SamplingSchedule
from qbmscvi.datasets import synthetic_counts
from qbmscvi.samplers import BlockGibbsSampler

N_STEPS = 4  # steps of an epoch: 216 of 240 cells in batches of 64
N_EPOCHS = 6


class Remembering(BlockGibbsSampler):
    """Block Gibbs that keeps what it was asked; "remote" requests wait until the gate opens."""

    def __init__(self, *, is_remote: bool = False) -> None:
        super().__init__()
        self.traits = replace(self.traits, is_remote=is_remote)
        self.asked = []

    def _sample(self, request, seed):
        self.asked.append((request.request_id, seed, request.n_sweeps))
        return super()._sample(request, seed)


class Saver(Callback):
    """Writes a checkpoint at the end of an epoch or of a step; keeps chains, KL weights and cells."""

    def __init__(self, path: Path | None = None, epoch: int = -1, step: int = -1) -> None:
        self.path, self.epoch, self.step = path, epoch, step
        self.chains, self.kl_weights, self.cells = {}, {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        self.chains[step] = pl_module.module.prior.chains.clone()
        self.kl_weights[step] = float(pl_module.loss_kwargs["kl_weight"])
        self.cells[step] = batch["X"].clone()
        if step == self.step:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def build(adata) -> QBMSCVI:
    return QBMSCVI(adata, n_latent=8, n_chains=64, gene_likelihood="nb")


def train(adata, callbacks, sampler="gibbs", seed=0, **kwargs) -> QBMSCVI:
    scvi.settings.seed = 0  # the split into training and validation cells
    model = build(adata)
    torch.manual_seed(seed)
    model.train(
        max_epochs=N_EPOCHS,
        batch_size=64,
        accelerator="cpu",
        enable_progress_bar=False,
        sampler=sampler,
        callbacks=callbacks,
        **kwargs,
    )
    return model


def assert_equal_models(first: QBMSCVI, second: QBMSCVI) -> None:
    other = second.module.state_dict()
    assert [name for name, value in first.module.state_dict().items() if not torch.equal(value, other[name])] == []


@pytest.fixture(scope="module")
def adata():
    adata = synthetic_counts(240, 60, seed=1)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    return adata


@pytest.mark.parametrize("on_epoch_end", [True, False], ids=["at-epoch-end", "after-validation"])
@pytest.mark.parametrize(
    "schedule",
    [SamplingSchedule(every_n_steps=1), SamplingSchedule(every_n_steps=9)],
    ids=["every-step", "every-ninth"],
)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(adata, tmp_path, schedule, on_epoch_end):
    """Another model object, and torch's stream elsewhere: weights, chains, moments, log Z, cells, seeds, history."""
    first, second = Saver(), Saver()
    # Lightning's callback is refused without `enable_checkpointing`, which makes scvi-tools add its own, too.
    keep = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=3, save_top_k=-1, save_on_train_epoch_end=on_epoch_end)
    checkpoints = {"enable_checkpointing": True, "check_val_every_n_epoch": 1}
    whole_sampler, half_sampler = Remembering(), Remembering()
    whole = train(
        adata, [first, keep, SaveCheckpoint(tmp_path / "scvi")], whole_sampler, schedule=schedule, **checkpoints
    )
    stream = torch.get_rng_state()
    half = {"ckpt_path": tmp_path / "epoch=2.ckpt", "check_val_every_n_epoch": 1}
    resumed = train(adata, [second], half_sampler, seed=99, schedule=schedule, **half)
    assert_equal_models(whole, resumed)
    assert torch.equal(torch.get_rng_state(), stream)
    assert list(second.chains) == list(range(3 * N_STEPS + 1, N_EPOCHS * N_STEPS + 1))
    for step, chains in second.chains.items():
        assert torch.equal(chains, first.chains[step])
        assert torch.equal(second.cells[step], first.cells[step])
        assert second.kl_weights[step] == first.kl_weights[step]
    assert half_sampler.asked == whole_sampler.asked[-len(half_sampler.asked) :]
    for key in ("prior_energy", "prior_log_z", "elbo_train", "elbo_validation"):
        assert resumed.history[key].iloc[-3:, 0].tolist() == whole.history[key].iloc[-3:, 0].tolist(), key


def test_resuming_within_an_epoch_continues_the_sampling_exactly(adata, tmp_path):
    """Lightning draws a new order of the cells there; chains are equal until parameters differ, seeds throughout."""
    first, second = Saver(tmp_path / "step.ckpt", step=10), Saver()
    whole_sampler, half_sampler = Remembering(), Remembering()
    every_step = SamplingSchedule(every_n_steps=1)
    only = {"schedule": every_step, "fit_prior": False}
    whole = train(adata, [first], whole_sampler, **only)
    resumed = train(adata, [second], half_sampler, seed=99, ckpt_path=tmp_path / "step.ckpt", **only)
    assert list(second.chains) == list(range(11, N_EPOCHS * N_STEPS + 1))
    assert torch.equal(second.chains[11], first.chains[11])
    assert half_sampler.asked == whole_sampler.asked[10:]
    assert second.kl_weights == {step: first.kl_weights[step] for step in second.kl_weights}
    assert int(resumed.module.prior.n_updates) == int(whole.module.prior.n_updates) == N_EPOCHS * N_STEPS


SCHEDULE = SamplingSchedule(latency=4, every_n_steps=10)  # asks at 0, uses at 4, asks at 10, uses at 14, asks at 20


class Remote(Remembering):
    """Device that answers the first ``n_answers`` requests and writes down all of them."""

    def __init__(self, path: Path, n_answers: float) -> None:
        super().__init__(is_remote=True)
        self.path, self.n_answers, self.answered = path, n_answers, threading.Event()

    def _sample_batch(self, requests, seeds):
        with self.path.open("a") as file:
            file.writelines(f"{request.request_id}\n" for request in requests)
        if len(self.path.read_text().split()) > self.n_answers:
            threading.Event().wait(60)
        answers = super()._sample_batch(requests, seeds)
        self.answered.set()
        return answers


class Patience(Callback):
    """Waits, before the step at which an answer is due, for the answer."""

    def __init__(self, sampler: Remote, due: tuple[int, ...]) -> None:
        self.sampler, self.due = sampler, due

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.due:
            assert self.sampler.answered.wait(20)
            time.sleep(0.05)  # until the thread has handed it over
            self.sampler.answered.clear()


class Interrupted(Exception):
    pass


class End(Callback):
    """Ends the run at step 13, or the process, without a chance to clean up."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 13:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise Interrupted


def train_to_an_end(folder: Path, how: str) -> None:
    """Part of the test below that runs in a process of its own if it is killed."""
    adata = synthetic_counts(240, 60, seed=1)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    sampler = Remote(folder / "asked", n_answers=1)
    savers = [Saver(folder / f"{epoch}.ckpt", epoch=epoch) for epoch in (1, 2)]
    train(adata, [*savers, Patience(sampler, due=(4,)), End(how)], sampler, schedule=SCHEDULE)


@pytest.fixture(scope="module", params=["interrupted", pytest.param("killed", marks=pytest.mark.slow)])
def remains(request, tmp_path_factory) -> Path:
    """Folder of a run that ended at step 13."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "interrupted":
        with pytest.raises(Interrupted):
            train_to_an_end(folder, request.param)
        return folder
    code = f"import test_resume, pathlib; test_resume.train_to_an_end(pathlib.Path({str(folder)!r}), 'killed')"
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | paths, timeout=100, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    return folder


@pytest.mark.parametrize("epoch", [1, 2], ids=["checkpoint-before-the-request", "checkpoint-after-the-request"])
def test_request_under_way_when_a_run_ended_is_sent_once_more_by_its_name(adata, remains, tmp_path, epoch):
    before = (remains / "asked").read_text().split()
    assert len(before) == 2
    sampler = Remote(tmp_path / "again", n_answers=9)
    resumed = {"schedule": SCHEDULE, "ckpt_path": remains / f"{epoch}.ckpt"}
    model = train(adata, [Patience(sampler, due=(14,))], sampler, seed=99, **resumed)
    asked_at_10, asked_at_20 = (tmp_path / "again").read_text().split()
    assert asked_at_10 == before[1]
    assert asked_at_20 not in before
    ledger = model.trainer.lightning_module.sampling.broker.ledger
    assert (ledger.n_requests, ledger.n_samples, ledger.n_late, ledger.n_failures) == (3, 2 * 64, 0, 0)


def test_a_run_resumed_with_a_local_sampler_does_not_send_the_old_request(adata, tmp_path):
    remote = Remote(tmp_path / "asked", n_answers=0)
    train(adata, [Saver(tmp_path / "run.ckpt", step=4)], remote, schedule=SCHEDULE)
    local = Remembering()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        train(adata, [], local, ckpt_path=tmp_path / "run.ckpt", schedule=SCHEDULE)
    assert {name for name, *_ in local.asked} == {None}


def test_a_request_that_was_given_up_is_not_sent_again(adata, tmp_path):
    schedule = SamplingSchedule(every_n_steps=1, latency=2, max_staleness=4)
    remote = Remote(tmp_path / "asked", n_answers=0)
    with pytest.warns(RuntimeWarning, match="max_staleness=4"):
        train(adata, [Saver(tmp_path / "run.ckpt", epoch=1)], remote, schedule=schedule)
    again = Remote(tmp_path / "again", n_answers=99)
    train(adata, [], again, ckpt_path=tmp_path / "run.ckpt", schedule=schedule)
    assert not set((tmp_path / "asked").read_text().split()) & set((tmp_path / "again").read_text().split())
