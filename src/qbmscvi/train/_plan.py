"""The training plan of :class:`~qbmscvi.QBMSCVI`."""

from __future__ import annotations

import math
from inspect import signature
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from scvi.train import TrainingPlan
from torch.nn import Linear, Module

from qbmscvi.samplers import build_sampler
from qbmscvi.train._guards import FiniteStateGuard, StreamKeeper, is_refusal
from qbmscvi.train._logging import LoggedOncePerEpoch
from qbmscvi.train._sampling import SamplingCallback
from qbmscvi.train._schedule import SamplingSchedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch
    from lightning.pytorch.callbacks import Callback

    from qbmscvi.module._qbmvae import QBMVAE
    from qbmscvi.samplers import Sampler

_AUTO_WARMUP_SHARE = 0.1
_ASSUMED_STEPS = 10_000  # if the number of steps is not known
_PRIOR_LR_SHARE = 0.1
_SCVIS_DECAY = 1e-6
_EPOCHS_OF_MEMORY, _MAX_AUTO_DECAY = 50, 1.0


def auto_kl_warmup(n_steps: float) -> int:
    """Length of the KL warm-up in optimizer steps for ``n_epochs_kl_warmup="auto"``."""
    return round(_AUTO_WARMUP_SHARE * (n_steps if 0 < n_steps < math.inf else _ASSUMED_STEPS))


def auto_weight_decay(lr: float, n_steps: float) -> float:
    """Weight decay of AdamW for ``weight_decay="auto"``, given the number of steps per epoch."""
    if not (lr > 0 and 0 < n_steps < math.inf):
        return 0.0
    return min(1.0 / (_EPOCHS_OF_MEMORY * lr * n_steps), _MAX_AUTO_DECAY)


class QBMTrainingPlan(LoggedOncePerEpoch, TrainingPlan):
    """scVI's training plan with a sampled prior.

    Arguments not listed here are those of :class:`scvi.train.TrainingPlan`.

    Parameters
    ----------
    module
        The module to train.
    sampler
        Sampler of the prior: ``"gibbs"``, ``"simulated_annealing"``, ``"exact"``, or an instance.
    schedule
        When to sample; None for :class:`~qbmscvi.SamplingSchedule` with its defaults.
    optimizer
        Name of the optimizer, as in scVI, which uses ``"Adam"``.
    lr
        Learning rate of the networks; the default is twice scVI's.
    prior_lr
        Learning rate of the prior's parameters. None means a tenth of ``lr``, or with ``optimizer="Custom"`` the
        learning rate of that optimizer. At the end of training :meth:`~qbmscvi.QBMSCVI.fit_prior` completes the fit of
        the prior.
    weight_decay
        Weight decay of the networks' linear layers; biases, normalization and dispersions have none. With ``"AdamW"``,
        ``"auto"`` is ``1 / (50 lr n)`` at ``n`` steps per epoch, and at most 1. A weight without gradient then decays
        within 50 epochs, for any number of cells. With ``"Adam"``, ``"auto"`` is scVI's 1e-6. It is zero if a part of
        the networks is frozen, as after ``load_query_data``.
    prior_weight_decay
        Weight decay of the prior's parameters; none by default.
    n_epochs_kl_warmup
        Epochs until the KL weight is reached. ``"auto"`` takes ``n_steps_kl_warmup`` if given, and otherwise the first
        tenth of all steps. scVI's 400 epochs would keep the weight below one in any shorter run.
    eps
        Adam's epsilon. scVI's 0.01 exceeds the gradients of the prior and would freeze them.
    """

    def __init__(
        self,
        module: QBMVAE,
        *,
        sampler: str | Sampler = "gibbs",
        schedule: SamplingSchedule | None = None,
        optimizer: Literal["Adam", "AdamW", "Custom"] = "AdamW",
        lr: float = 2e-3,
        weight_decay: float | Literal["auto"] = "auto",
        prior_lr: float | None = None,
        prior_weight_decay: float | None = None,
        n_epochs_kl_warmup: int | Literal["auto"] | None = "auto",
        eps: float = 1e-8,
        **kwargs: Any,
    ) -> None:
        known = signature(TrainingPlan).parameters.keys() | signature(module.loss).parameters.keys()
        if unknown := sorted(kwargs.keys() - known):
            msg = (
                f"QBMTrainingPlan got an unexpected argument {unknown[0]!r}. It takes those of its documentation, and "
                "those of scvi.train.TrainingPlan."
            )
            raise TypeError(msg)
        if schedule is not None and not isinstance(schedule, SamplingSchedule):
            msg = f"`schedule` is a {type(schedule).__name__}; it must be a qbmscvi.SamplingSchedule."
            raise TypeError(msg)
        if isinstance(n_epochs_kl_warmup, str) and n_epochs_kl_warmup != "auto":
            msg = f"n_epochs_kl_warmup={n_epochs_kl_warmup!r} is no number of epochs. Use an integer, None or 'auto'."
            raise ValueError(msg)
        for name, value, default in (
            ("prior_lr", prior_lr, None),
            ("prior_weight_decay", prior_weight_decay, None),
            ("weight_decay", weight_decay, "auto"),
        ):
            if value != default and not (isinstance(value, Real) and value >= 0):
                msg = f"{name}={value!r} is neither a number of at least 0 nor {default!r}. Use one of these."
                raise ValueError(msg)
        self._is_auto_warmup = n_epochs_kl_warmup == "auto" and kwargs.get("n_steps_kl_warmup") is None
        self._is_auto_decay = weight_decay == "auto"
        super().__init__(
            module,
            optimizer=optimizer,
            lr=lr,
            weight_decay=_SCVIS_DECAY if self._is_auto_decay else weight_decay,
            n_epochs_kl_warmup=None if n_epochs_kl_warmup == "auto" else n_epochs_kl_warmup,
            eps=eps,
            **kwargs,
        )
        is_custom = self.optimizer_name == "Custom"  # its learning rate is not known here
        self.prior_lr = _PRIOR_LR_SHARE * self.lr if prior_lr is None and not is_custom else prior_lr
        self.prior_weight_decay = prior_weight_decay
        sampler = build_sampler(sampler)
        sampler.check(module.prior.to_ising())
        self.sampling = SamplingCallback(module.prior, sampler, schedule or SamplingSchedule())
        self.guard = FiniteStateGuard()

    def configure_callbacks(self) -> list[Callback]:
        """Callbacks that Lightning attaches in addition to the user's."""
        return [self.sampling, self.guard, StreamKeeper()]

    def on_fit_start(self) -> None:
        """Set the length of the KL warm-up and the weight decay, which depend on the number of steps.

        This number is not available earlier: computing it makes the data loaders, which would miss the states of a
        checkpoint.
        """
        super().on_fit_start()
        if self._is_auto_warmup:
            self.n_steps_kl_warmup = auto_kl_warmup(self.trainer.estimated_stepping_batches)
        if self._is_auto_decay and self.optimizer_name == "AdamW":
            networks, _ = _split(self.module.parameters(), _ids(self.sampling.prior))
            is_frozen = not all(p.requires_grad for p in networks)
            _ = self.trainer.estimated_stepping_batches  # makes the data loaders
            n_steps = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches  # also with `max_steps`
            self.weight_decay = 0.0 if is_frozen else auto_weight_decay(self.lr, n_steps)
            self.optimizers().param_groups[0]["weight_decay"] = self.weight_decay

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Compute the loss; on several ranks a loss that cannot be computed is NaN instead of an error.

        A rank that raised alone would leave the others waiting for its gradient. A NaN reaches all ranks, and
        :class:`~qbmscvi.train._guards.FiniteStateGuard` stops them together.
        """
        try:
            return super().training_step(batch, batch_idx)
        except ValueError as error:
            if self.trainer.world_size == 1 or not is_refusal(error):
                raise
            trained = [parameter.sum() for parameter in self.module.parameters() if parameter.requires_grad]
            return float("nan") * sum(trained)

    def get_optimizer_creator(self) -> Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]:
        """Put the prior, and parameters without weight decay, into separate groups, and use Adam's fused kernel."""
        create = super().get_optimizer_creator()
        own = {"lr": self.prior_lr, "weight_decay": self.prior_weight_decay}
        own = {key: value for key, value in own.items() if value is not None}
        prior_ids = _ids(self.sampling.prior)
        if self.optimizer_name == "Custom":

            def create_grouped(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
                parameters = list(parameters)
                rest, prior = _split(parameters, prior_ids)
                return create([{"params": rest}, {"params": prior, **own}] if own else [{"params": parameters}])

            return create_grouped

        if self.trainer.precision == "16-mixed":  # Lightning cannot clip gradients that a fused kernel scales back
            self.fused_optimizer = False
        is_fused = getattr(self, "fused_optimizer", True)  # an argument of scvi-tools since 1.5
        shared = {"fused": True} if is_fused and self.device.type in ("cpu", "cuda") else {}
        linear_ids = {id(layer.weight) for layer in self.module.modules() if isinstance(layer, Linear)}

        def create_decayed(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
            rest, prior = _split(parameters, prior_ids)
            others, linear = _split(rest, linear_ids)
            groups = [
                {"params": linear, **shared},
                {"params": prior, "weight_decay": 0.0, **shared, **own},
                {"params": others, "weight_decay": 0.0, **shared},
            ]
            return create(groups)

        return create_decayed


def _ids(module: Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}


def _split(parameters: Iterable[torch.Tensor], ids: set[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters with an identity outside ``ids``, and parameters with an identity in it."""
    parameters = list(parameters)  # scVI passes an iterator
    return [p for p in parameters if id(p) not in ids], [p for p in parameters if id(p) in ids]
