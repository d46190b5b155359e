"""Protection of a training run: its random streams, its last finite state, and equal buffers on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback

from qbmscvi.exceptions import TrainingDivergedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import lightning.pytorch as pl
    from torch import Tensor

_NEVER = 2**31 - 1  # a step that no run reaches


class StreamKeeper(Callback):
    """Put torch's random streams into checkpoints, so that shuffling, dropout and draws of the posterior continue.

    Lightning does not do this. If a checkpoint was made between two epochs, the order of the data continues as well;
    Lightning starts an interrupted epoch with a new order.
    """

    def __init__(self) -> None:
        self._resumed: dict[str, Tensor] | None = None

    def state_dict(self) -> dict[str, Tensor]:
        """States of torch's generators in use."""
        streams = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            streams["cuda"] = torch.cuda.get_rng_state()
        return streams

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Keep the states until training starts."""
        self._resumed = state_dict

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the generators, before the first cells are drawn and after all other draws."""
        self._restore(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set them again after Lightning has ended the epoch of a checkpoint that was made at its last step."""
        self._restore(pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forget the states, because training has started."""
        self._resumed = None

    def _restore(self, pl_module: pl.LightningModule) -> None:
        if self._resumed is None:
            return
        torch.set_rng_state(self._resumed["cpu"].cpu())
        if "cuda" in self._resumed and pl_module.device.type == "cuda":
            torch.cuda.set_rng_state(self._resumed["cuda"].cpu(), pl_module.device)


class FiniteStateGuard(Callback):
    """Stop a training run that has diverged, and restore the last finite state of the module.

    The loss of each step is checked on its device. Every ``every_n_steps`` steps, and at the end of an epoch, the
    result is read and the state copied.

    Parameters
    ----------
    every_n_steps
        Steps between two copies.

    Attributes
    ----------
    diverged_at_step
        Step at which the run diverged; None if it has not.
    good_step
        Step of the last copy.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        self.every_n_steps = every_n_steps
        self.diverged_at_step: int | None = None
        self._first_bad_step: Tensor | None = None
        self._good_state: dict[str, Tensor] = {}
        self.good_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the initial state of training, after a checkpoint has been read in full."""
        self._first_bad_step = torch.full((), -1, device=pl_module.device)
        self._keep(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Inspect the loss of the step."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        is_bad = ~torch.isfinite(loss.detach()) & (self._first_bad_step < 0)
        self._first_bad_step = torch.where(is_bad, trainer.global_step, self._first_bad_step)
        if trainer.global_step % self.every_n_steps == 0:
            self._check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check at the end of the epoch."""
        self._check(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the last finite state if the current one is not finite, for any exception."""
        if self.diverged_at_step is not None or not self._good_state:
            return
        first_bad = int(self._first_bad_step)
        if first_bad >= 0 or is_refusal(exception) or not _is_finite(pl_module):
            self._restore(first_bad if first_bad >= 0 else trainer.global_step, pl_module)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        bad_step = self._first_bad_step
        if bad_step < 0:
            bad_step = torch.full_like(bad_step, _NEVER if _is_finite(pl_module) else trainer.global_step)
        # Each rank has its own loss, and a rank that stopped alone would leave the others waiting.
        first_bad = int(trainer.strategy.reduce(bad_step, reduce_op="min"))
        if first_bad < _NEVER:
            self._restore(first_bad, pl_module)
            raise TrainingDivergedError(self.message)
        self._keep(trainer, pl_module)

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        share_buffers(trainer, pl_module.module)  # each rank has batch statistics of its own cells
        self._good_state = {name: value.detach().clone() for name, value in pl_module.module.state_dict().items()}
        self.good_step = trainer.global_step

    def _restore(self, step: int, pl_module: pl.LightningModule) -> None:
        pl_module.module.load_state_dict(self._good_state)
        self.diverged_at_step = step

    @property
    def message(self) -> str:
        """Message of the error."""
        what_to_do = (
            "Lower the learning rate (`plan_kwargs={'lr': 1e-4}`), clip gradients (`gradient_clip_val=10`), or check "
            "the data for extreme counts."
        )
        if self.diverged_at_step == 0 or int(self._first_bad_step) == 1:
            what_to_do = (
                "This was the first step, so no learning rate helps. Check counts, size factors and covariates for "
                "values that are missing or extreme."
            )
        return (
            f"The loss or a parameter became non-finite at step {self.diverged_at_step}. Training has stopped and the "
            f"model holds its state of step {self.good_step}. {what_to_do}"
        )


def is_refusal(exception: BaseException) -> bool:
    """Whether one of torch's distributions refused non-finite parameters, which a finite network can produce."""
    return isinstance(exception, ValueError) and "found invalid values" in str(exception)


def share_buffers(trainer: pl.Trainer, module: torch.nn.Module) -> None:
    """Give every rank the buffers of rank 0; all ranks must call this.

    By default DDP does the same before each forward pass, but not after the last one.
    """
    _share(trainer, module.buffers())


def share_state(trainer: pl.Trainer, module: torch.nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0; all ranks must call this."""
    _share(trainer, module.state_dict().values())


def _share(trainer: pl.Trainer, tensors: Iterable[Tensor]) -> None:
    if trainer.world_size > 1:
        for tensor in tensors:
            if tensor.numel():
                torch.distributed.broadcast(tensor, src=0)


def _is_finite(pl_module: pl.LightningModule) -> bool:
    state = pl_module.module.state_dict().values()
    return bool(torch.isfinite(sum(values.detach().sum() for values in state if values.is_floating_point())))
