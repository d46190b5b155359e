"""Script of ``test_distributed.py``: trains in two processes and writes down what each of them did.

Started once; Lightning starts the second process. Every case is a training run of its own; the process group stays.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path

import scvi
import torch
from lightning.pytorch.callbacks import Callback

from qbmscvi import QBMSCVI, SamplingSchedule
from qbmscvi.datasets import synthetic_counts
from qbmscvi.exceptions import TrainingDivergedError
from qbmscvi.samplers import BlockGibbsSampler
from qbmscvi.train import _guards
from qbmscvi.train import _sampling as _callbacks

BATCH_SIZE = 32
FLAGS = {
    "strategy": "ddp_find_unused_parameters_true",
    "accelerator": "cpu",
    "devices": 2,
    "batch_size": BATCH_SIZE,
    "datasplitter_kwargs": {"drop_dataset_tail": True},
    "enable_progress_bar": False,
}


class PerProcess(BlockGibbsSampler):
    """Block Gibbs whose answers differ between processes, as those of a device do."""

    def __init__(self, *, is_remote: bool, fails: bool = False) -> None:
        super().__init__()
        self.traits = replace(self.traits, is_remote=is_remote)
        self.fails, self.salt, self.n_calls = fails, None, 0

    def _sample_batch(self, requests, seeds):
        self.n_calls += 1
        if self.fails:
            raise OSError("the line is down")
        return super()._sample_batch(requests, [seed + self.salt for seed in seeds])


class Watch(Callback):
    """Keeps the cells seen; spoils the counts of one batch on rank 1; saves the run half-way."""

    def __init__(self, salted: PerProcess, spoil: float | None, path: Path) -> None:
        self.salted, self.spoil, self.path, self.cells, self.steps = salted, spoil, path, [], 0

    def on_train_start(self, trainer, pl_module):
        self.salted.salt = 1000 * trainer.global_rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        names = batch["X"].double() @ torch.arange(2.0, 2.0 + batch["X"].shape[1], dtype=torch.double).sqrt()
        self.cells.append(names)  # a number of its own for each cell
        self.steps += 1
        if self.spoil is not None and trainer.global_rank == 1 and trainer.global_step == 4:
            batch["X"][0] = self.spoil

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def run(
    name: str,
    out: Path,
    *,
    is_remote=False,
    fails=False,
    spoil=None,
    likelihood="nb",
    fit_prior=False,
    **trainer_kwargs,
) -> None:
    scvi.settings.seed = 0
    adata = synthetic_counts(240, 40, seed=1)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    model = QBMSCVI(adata, n_latent=8, n_chains=64, gene_likelihood=likelihood)
    sampler, error = PerProcess(is_remote=is_remote, fails=fails), None
    watch = Watch(sampler, spoil, out / f"{name}.ckpt")
    schedule = SamplingSchedule(every_n_steps=1, latency=0, n_sweeps=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model.train(
                max_epochs=2,
                sampler=sampler,
                schedule=schedule,
                callbacks=[watch],
                fit_prior=fit_prior,
                **FLAGS,
                **trainer_kwargs,
            )
        except TrainingDivergedError as raised:
            error = str(raised)
    rank = torch.distributed.get_rank()
    dump = {
        "state": model.module.state_dict(),
        "cells": torch.cat(watch.cells),
        "n_steps": watch.steps,
        "n_calls": sampler.n_calls,
        "advice": [str(w.message) for w in caught if "sync_dist" in str(w.message)],
        "warnings": [str(w.message) for w in caught if "Block Gibbs answers in its place" in str(w.message)],
        "error": error,
        "history": {key: table.iloc[:, 0].tolist() for key, table in (model.history or {}).items()},
    }
    torch.save(dump, out / f"{name}-{rank}.pt")


def main(out: Path) -> None:
    torch.set_num_threads(1)
    run("local", out)
    run("resumed", out, ckpt_path=out / "local.ckpt")
    run("remote", out, is_remote=True, check_val_every_n_epoch=1)
    run("failing", out, is_remote=True, fails=True)
    run("fitted", out, fit_prior=True)
    # torch's normal distribution refuses a mean that is not a number, scvi-tools' distributions of counts do not
    run("refused-on-one-rank", out, spoil=float("nan"), likelihood="normal")
    run("nan-on-one-rank", out, spoil=float("nan"))
    run("infinite-on-one-rank", out, spoil=1e38)
    _callbacks.share_buffers = _guards.share_buffers = lambda trainer, module: None
    run("unshared", out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
