"""The runner of ``train``, around Lightning's trainer."""

from __future__ import annotations

import logging
import math
import signal
from typing import TYPE_CHECKING, Any

from scvi import settings
from scvi.dataloaders import DataSplitter
from scvi.train import TrainRunner
from torch.nn import BatchNorm1d, Module

from qbmscvi.exceptions import TrainingDivergedError

if TYPE_CHECKING:
    from qbmscvi.train._guards import FiniteStateGuard

_logger = logging.getLogger(__name__)


class QBMTrainRunner(TrainRunner):
    """scVI's train runner; it handles repeated, diverging and interrupted training, and batches of one cell."""

    def __call__(self) -> None:
        """Run training.

        Raises
        ------
        ValueError
            If batch normalization would get one cell at a time.
        TrainingDivergedError
            If the loss or a parameter became non-finite; the model is in its last finite state.
        SystemExit
            If Ctrl-C stopped training; the model is in its state at that moment, or its last finite one.
        """
        model, was_trained = self.model, self.model.is_trained_
        if isinstance(self.data_splitter, DataSplitter):
            _avoid_batches_of_one(self.data_splitter, model.module, self.trainer.world_size)
        # scVI leaves the module in evaluation mode and Lightning no longer changes it. A second training would run
        # without dropout, batch statistics and a gradient through the spins.
        model.module.train()
        on_interrupt = signal.getsignal(signal.SIGINT)
        try:
            super().__call__()
        except BaseException as error:
            model.module.eval()
            model.is_trained_ = was_trained
            guard: FiniteStateGuard = self.training_plan.guard
            has_diverged = guard.diverged_at_step is not None
            is_stopped = isinstance(error, SystemExit | KeyboardInterrupt)
            if signal.getsignal(signal.SIGINT) != on_interrupt:
                signal.signal(signal.SIGINT, on_interrupt)  # Lightning leaves it ignored
            if not (has_diverged or is_stopped):
                raise
            model.is_trained_ = was_trained or (guard.good_step if has_diverged else self.trainer.global_step) > 0
            model.train_indices = getattr(self.data_splitter, "train_idx", None)
            model.validation_indices = getattr(self.data_splitter, "val_idx", None)
            model.test_indices = getattr(self.data_splitter, "test_idx", None)
            model.trainer = self.trainer
            if is_stopped:
                raise
            raise TrainingDivergedError(guard.message) from error

    def _update_history(self) -> None:
        """Extend the history; scVI's version fails for an empty one, as after divergence in the first epoch.

        Learning rates keep scVI's names, also for AdamW, and the prior's ends in ``-prior``; Lightning would number the
        parameter groups.
        """
        if not self.trainer.optimizers:  # stopped before it began
            return
        optimizer = type(self.trainer.optimizers[0]).__name__
        ours = "lr-Adam" if optimizer == "AdamW" else f"lr-{optimizer}"
        linear, prior, others = (f"lr-{optimizer}/pg{group}" for group in (1, 2, 3))
        names = {linear: ours, prior: f"{ours}-prior"}
        _rename(self.model.history_, {new: old for old, new in names.items()})
        self.model.is_trained_ = self.model.is_trained_ and bool(self.model.history_)
        super()._update_history()
        _rename(self.model.history_, names)
        if isinstance(self.model.history_, dict):
            self.model.history_.pop(others, None)  # as for linear layers


def _avoid_batches_of_one(splitter: DataSplitter, module: Module, n_ranks: int) -> None:
    """Leave a cell out of each epoch if it would be alone in a batch, because one value has no variance.

    scVI avoids a last batch of one or two cells only if it chooses the number of training cells, and then also if all
    cells are in that batch.

    Raises
    ------
    ValueError
        If every batch would have one cell.
    """
    if splitter.n_train + splitter.n_val == 0:
        splitter.n_train = splitter.adata_manager.adata.n_obs
    if not any(isinstance(layer, BatchNorm1d) for layer in module.modules()):
        return
    loader, n_train = splitter.data_loader_kwargs, splitter.n_train
    batch_size = loader.get("batch_size") or settings.batch_size
    if loader.get("distributed_sampler"):
        divide = math.floor if loader.get("drop_dataset_tail") else math.ceil
        n_train = divide(n_train / n_ranks)
    if min(n_train, batch_size) < 2:
        msg = (
            f"There are {n_train} cells to train on, in batches of {batch_size}, but batch normalization needs two "
            "cells in a batch. Train on more cells, with a larger `batch_size`, or build the model with "
            "`use_batch_norm='none'`."
        )
        raise ValueError(msg)
    if n_train % batch_size == 1 and not splitter.drop_last:
        splitter.drop_last = True
        _logger.warning(
            "%d training cells leave a last batch of one, which batch normalization cannot use. Each epoch leaves out "
            "one cell, another one each time.",
            n_train,
        )


def _rename(history: Any, names: dict[str, str]) -> None:
    """Rename entries of a history and their columns; missing entries are skipped."""
    if not isinstance(history, dict):  # None before the first training; another logger's
        return
    for old, new in names.items():
        if old in history:
            history[new] = history.pop(old).rename(columns={old: new})
