"""Fewer calls of Lightning's ``log``: once per epoch for metrics and constant numbers.

Each call of ``log`` moves the whole record to the device of the value and looks up the signature of the hook. This
takes longer than an optimizer step of a small network. Lightning records a :class:`torchmetrics.Metric` by reference,
and has already recorded a number that has not changed. The reported values, times and names stay the same. Values that
are logged at every step pass through.
"""

from __future__ import annotations

from typing import Any

import torch
from scvi import REGISTRY_KEYS
from torch import Tensor
from torch.nn import ModuleDict
from torchmetrics import Metric


class MeanLoss(Metric):
    """Mean loss of batches, each weighted by its number of cells, as in Lightning."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("n_cells", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, loss: Tensor, n_cells: int) -> None:
        """Add one batch."""
        self.total = self.total + loss * n_cells
        self.n_cells = self.n_cells + n_cells

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.n_cells


class LoggedOncePerEpoch:
    """Mixin of scVI's training plans that skips calls of ``log`` without effect."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recorded: dict[str, float | int | None] = {}
        self._mean_losses = ModuleDict({name: MeanLoss() for name in ("train_loss", "validation_loss")})
        self._n_cells = 0

    def on_train_epoch_start(self) -> None:
        """Forget what was recorded."""
        super().on_train_epoch_start()
        self._recorded = {}

    def on_validation_epoch_start(self) -> None:
        """Forget what was recorded."""
        super().on_validation_epoch_start()
        self._recorded = {}

    def on_validation_epoch_end(self) -> None:
        """Forget what was recorded: validation may come in the middle of an epoch of training."""
        super().on_validation_epoch_end()
        self._recorded = {}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss."""
        self._n_cells = len(batch[REGISTRY_KEYS.X_KEY])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Compute the loss."""
        self._n_cells = len(batch[REGISTRY_KEYS.X_KEY])
        super().validation_step(batch, batch_idx)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log a value unless it is recorded in this epoch; see :meth:`lightning.pytorch.LightningModule.log`."""
        on_step, on_epoch = kwargs.get("on_step"), kwargs.get("on_epoch")
        record = None
        if on_epoch and not on_step:
            if name in self._mean_losses:
                self._mean_losses[name].update(value.detach(), self._n_cells)
                value = self._mean_losses[name]
            record = id(value) if isinstance(value, Metric) else None
        elif on_step and not on_epoch and not (isinstance(value, Tensor) and value.is_cuda):
            record = float(value)  # for a tensor on a GPU the host would wait
        if record is None or self._recorded.get(name) != record:
            super().log(name, value, *args, **kwargs)
            self._recorded[name] = record
