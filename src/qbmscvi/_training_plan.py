"""The training plan and runner of :class:`~qbmscvi.QBMSCVI`."""

from __future__ import annotations

import math
from inspect import signature
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from scvi.train import TrainingPlan, TrainRunner
from torch.nn import Linear

from qbmscvi._callbacks import SamplingCallback, SamplingSchedule
from qbmscvi._guards import FiniteStateGuard, StreamKeeper, is_refusal
from qbmscvi._logging import LoggedOncePerEpoch
from qbmscvi.exceptions import TrainingDivergedError
from qbmscvi.samplers import build_sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch
    from lightning.pytorch.callbacks import Callback

    from qbmscvi._module import QBMVAE
    from qbmscvi._prior import BoltzmannPrior
    from qbmscvi.samplers import Sampler

_AUTO_WARMUP_SHARE = 0.1
_ASSUMED_STEPS = 10_000  # where the number of steps is not known
_PRIOR_LR_SHARE, _LATE_PRIOR_LR_SHARE = 0.025, 0.2
_EPOCHS_OF_MEMORY, _MAX_AUTO_DECAY = 50, 1.0


def auto_kl_warmup(n_steps: float) -> int:
    """Length of the KL warm-up, in steps of the optimizer, that ``n_epochs_kl_warmup="auto"`` stands for."""
    return round(_AUTO_WARMUP_SHARE * _or_assumed(n_steps))


def auto_weight_decay(lr: float, n_steps: float) -> float:
    """Weight decay of AdamW that ``weight_decay="auto"`` stands for, with so many steps an epoch."""
    if not (lr > 0 and 0 < n_steps < math.inf):
        return 0.0
    return min(1.0 / (_EPOCHS_OF_MEMORY * lr * n_steps), _MAX_AUTO_DECAY)


def _or_assumed(n_steps: float) -> float:
    return n_steps if 0 < n_steps < math.inf else _ASSUMED_STEPS


class QBMTrainingPlan(LoggedOncePerEpoch, TrainingPlan):
    """scVI's training plan with a sampled prior.

    All arguments are those of :class:`scvi.train.TrainingPlan`, but for the following.

    Parameters
    ----------
    module
        The module to train.
    sampler
        Sampler of the prior: ``"gibbs"``, ``"simulated_annealing"``, ``"exact"``, or an instance.
    schedule
        When to sample; None for :class:`~qbmscvi.SamplingSchedule` with its defaults.
    optimizer
        As in scVI, where it is ``"Adam"`` unless given.
    lr
        Learning rate of the networks, twice scVI's. Chosen among three rates in at most two runs on each data set
        that judges it. ``benchmarks/LEVERS.md`` has scVI's rate beside it, ``benchmarks/RESULTS.md`` scVI at this one.
    prior_lr
        Learning rate of the prior's parameters; None for a fortieth of ``lr``, for a fifth with ``coupling_warmup``,
        and for that of the rest with an optimizer of your own. A prior as fast as the networks may settle on the few
        directions in which cells differ at first, but reaches a higher held-out ELBO (``benchmarks/LEVERS.md``). Chosen
        among four rates in a few runs on the data sets that judge it. At a fortieth a run of 2,000 steps is over before
        the couplings are learned to the end (they move by some 0.1 at most), so results may change with the length of
        training.
    weight_decay
        Weight decay of the networks' linear layers; biases, normalization and dispersions have none. ``"auto"`` is,
        with ``"AdamW"``, ``1 / (50 lr n)`` at ``n`` steps an epoch, and at most 1: a weight that is not renewed fades
        within 50 epochs, whatever the number of cells. With ``"Adam"`` it is scVI's 1e-6. It is zero where a part of
        the networks is frozen, as after ``load_query_data``. Without it more held-out ELBO is lost in long training on
        a few thousand cells (400 epochs, one seed, ``benchmarks/LEVERS.md``). Chosen among three constants in runs of
        one or two seeds on the data sets that judge it. Biases and normalization have none because decay of them, too,
        mixes batches less, though it gains some two nats of held-out ELBO (``benchmarks/LEVERS.md``).
    prior_weight_decay
        Weight decay of the prior's parameters; none by default.
    n_epochs_kl_warmup
        Epochs until the KL weight is reached. ``"auto"`` takes ``n_steps_kl_warmup`` if that is given, and otherwise
        the first tenth of all steps. Half of them gave the same on four data sets (three seeds or five, both schedules
        in ``benchmarks/RESULTS.md``); scVI's 400 epochs would leave the weight below one in any shorter run.
    coupling_warmup
        Two shares of all steps, such as ``(0.5, 1.0)``. Before the first, cells feel of the prior its fields only: the
        couplings follow the cells and do not pull them. From the second on the gradient is that of the ELBO; between
        the two the weight of the couplings in it rises. The loss that is logged is that of the ELBO throughout. None:
        felt from the first step, and the only choice with labels. A prior that is not learned is felt from the first
        step in any case. In ten runs on each of the four data sets that judge it ``(0.5, 1.0)`` had the same
        held-out ELBO and classified as well as without couplings, but types were less compact and the order of
        development was kept less well than by couplings that are felt from the first step (``benchmarks/LEVERS.md``).
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
        coupling_warmup: tuple[float, float] | None = None,
        eps: float = 1e-8,
        **kwargs: Any,
    ) -> None:
        own = {"sampler", "schedule", "prior_lr", "prior_weight_decay", "coupling_warmup"}
        known = own | set(signature(TrainingPlan.__init__).parameters) | set(signature(module.loss).parameters)
        known -= {"self", "module", "tensors", "inference_outputs", "generative_outputs", "loss_kwargs"}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            msg = f"QBMTrainingPlan got an unexpected argument {unknown[0]!r}. It takes: {', '.join(sorted(known))}."
            raise TypeError(msg)
        if schedule is not None and not isinstance(schedule, SamplingSchedule):
            msg = f"`schedule` is a {type(schedule).__name__}; it must be a qbmscvi.SamplingSchedule."
            raise TypeError(msg)
        if isinstance(n_epochs_kl_warmup, str) and n_epochs_kl_warmup != "auto":
            msg = f"n_epochs_kl_warmup={n_epochs_kl_warmup!r} is no number of epochs. Use an integer, None or 'auto'."
            raise ValueError(msg)
        for name, value in (("prior_lr", prior_lr), ("prior_weight_decay", prior_weight_decay)):
            if value is not None and not isinstance(value, Real):
                msg = (
                    f"{name}={value!r} is a {type(value).__name__}; it must be a number, or None for that of the rest."
                )
                raise TypeError(msg)
            if value is not None and not value >= 0:
                msg = f"{name}={value} must not be negative. Leave it out for the usual one."
                raise ValueError(msg)
        is_number = isinstance(weight_decay, Real) and weight_decay >= 0
        if not is_number and weight_decay != "auto":
            msg = f"weight_decay={weight_decay!r} is no weight decay. Use a number of at least 0, or 'auto'."
            raise ValueError(msg)
        self.coupling_warmup = _resolve_coupling_warmup(coupling_warmup, module.prior)
        self._is_auto_warmup = n_epochs_kl_warmup == "auto" and kwargs.get("n_steps_kl_warmup") is None
        n_epochs = None if n_epochs_kl_warmup == "auto" else n_epochs_kl_warmup
        self._is_auto_decay = weight_decay == "auto"
        super().__init__(
            module,
            optimizer=optimizer,
            lr=lr,
            weight_decay=_scvis_decay() if self._is_auto_decay else weight_decay,
            n_epochs_kl_warmup=n_epochs,
            eps=eps,
            **kwargs,
        )
        if prior_lr is None and self.optimizer_name != "Custom":
            prior_lr = (_PRIOR_LR_SHARE if self.coupling_warmup is None else _LATE_PRIOR_LR_SHARE) * self.lr
        self.prior_lr = prior_lr
        self.prior_weight_decay = prior_weight_decay
        sampler = build_sampler(sampler)
        sampler.check(module.prior.to_ising())
        self.sampling = SamplingCallback(module.prior, sampler, schedule or SamplingSchedule())
        self.guard = FiniteStateGuard()

    def configure_callbacks(self) -> list[Callback]:
        """Callbacks that Lightning attaches beside the user's."""
        return [self.sampling, self.guard, StreamKeeper()]

    def on_fit_start(self) -> None:
        """Fix the length of the KL warm-up and the weight decay, now that the number of steps is known.

        Not earlier: asking for that number makes the data loaders, which would miss what a checkpoint restores.
        """
        super().on_fit_start()
        if self._is_auto_warmup:
            self.n_steps_kl_warmup = auto_kl_warmup(self.trainer.estimated_stepping_batches)
        if self._is_auto_decay and self.optimizer_name == "AdamW":
            of_prior = {id(parameter) for parameter in self.sampling.prior.parameters()}
            is_frozen = any(not p.requires_grad and id(p) not in of_prior for p in self.module.parameters())
            _ = self.trainer.estimated_stepping_batches  # makes the data loaders
            n_steps = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches  # also with `max_steps`
            self.weight_decay = 0.0 if is_frozen else auto_weight_decay(self.lr, n_steps)
            self.optimizers().param_groups[0]["weight_decay"] = self.weight_decay

    @property
    def coupling_weight(self) -> float:
        """Weight with which cells feel the couplings of the prior at this step, between 0 and 1."""
        prior = self.sampling.prior
        if self.coupling_warmup is None or not (prior.J.requires_grad or prior.W.requires_grad):
            return 1.0
        start, end = (share * _or_assumed(self.trainer.estimated_stepping_batches) for share in self.coupling_warmup)
        if self.global_step >= end:
            return 1.0
        return max(0.0, self.global_step - start) / (end - start) if end > start else 0.0

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Compute the loss; on several ranks, one that cannot be computed is NaN instead of an error.

        A rank that raised alone would leave the others waiting for its gradient. As NaN it reaches them all, and
        :class:`~qbmscvi._guards.FiniteStateGuard` stops them together.
        """
        prior = self.sampling.prior
        try:
            prior.coupling_weight = self.coupling_weight
            return super().training_step(batch, batch_idx)
        except ValueError as error:
            if self.trainer.world_size == 1 or not is_refusal(error):
                raise
            trained = [parameter.sum() for parameter in self.module.parameters() if parameter.requires_grad]
            return float("nan") * sum(trained)
        finally:
            prior.coupling_weight = 1.0  # for whoever else asks for a gradient; that of this step is decided

    def get_optimizer_creator(self) -> Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]:
        """Give the prior and what has no weight decay groups of their own, and Adam its fused kernel."""
        create = super().get_optimizer_creator()
        own = {"lr": self.prior_lr, "weight_decay": self.prior_weight_decay}
        own = {key: value for key, value in own.items() if value is not None}
        prior_ids = {id(parameter) for parameter in self.sampling.prior.parameters()}
        if self.optimizer_name == "Custom":

            def create_grouped(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
                parameters = list(parameters)
                rest, prior = _split(parameters, prior_ids)
                return create([{"params": rest}, {"params": prior, **own}] if own else [{"params": parameters}])

            return create_grouped

        is_wanted = getattr(self, "fused_optimizer", True)  # an argument since scvi-tools 1.5
        shared = {"fused": True} if is_wanted and self.device.type in ("cpu", "cuda") else {}
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


def _resolve_coupling_warmup(given: Any, prior: BoltzmannPrior) -> tuple[float, float] | None:
    """Shares of all steps between which the couplings come to be felt; None if they are from the first step."""
    if given is None:
        return None
    is_pair = isinstance(given, list | tuple) and len(given) == 2 and all(isinstance(share, Real) for share in given)
    if not (is_pair and 0.0 <= given[0] <= given[1] <= 1.0):
        msg = (
            f"coupling_warmup={given!r} is no pair of shares of all steps. Use two numbers from 0 to 1, the smaller "
            "one first, or None."
        )
        raise ValueError(msg)
    if not prior.has_coupling_weight:
        msg = (
            f"coupling_warmup={given!r}, but where labels are spins of the prior, cells feel its couplings from the "
            "first step. Leave it out."
        )
        raise ValueError(msg)
    return tuple(given)


def _scvis_decay() -> float:
    return signature(TrainingPlan.__init__).parameters["weight_decay"].default


def _split(parameters: Iterable[torch.Tensor], ids: set[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters whose identity is not in ``ids``, and those whose is."""
    parameters = list(parameters)  # scVI hands over an iterator
    return [p for p in parameters if id(p) not in ids], [p for p in parameters if id(p) in ids]


class QBMTrainRunner(TrainRunner):
    """scVI's train runner, for models trained before and for training that diverges."""

    def __call__(self) -> None:
        """Run training.

        Raises
        ------
        TrainingDivergedError
            If the loss or a parameter became non-finite; the model is in its last finite state.
        """
        # scVI leaves the module in evaluation mode and Lightning no longer changes that: training a second time would
        # go on without dropout, batch statistics and, here, without a gradient through the spins.
        self.model.module.train()
        try:
            super().__call__()
        except Exception as error:
            self.model.module.eval()
            guard: FiniteStateGuard = self.training_plan.guard
            if guard.diverged_at_step is None:
                raise
            self.model.is_trained_ = True
            self.model.train_indices = getattr(self.data_splitter, "train_idx", None)
            self.model.validation_indices = getattr(self.data_splitter, "val_idx", None)
            self.model.test_indices = getattr(self.data_splitter, "test_idx", None)
            self.model.trainer = self.trainer
            raise TrainingDivergedError(guard.message) from error

    def _update_history(self) -> None:
        """Extend the history; scVI's version needs one that is not empty, as after divergence in the first epoch.

        Learning rates have the names that they have in scVI, whose Adam lends its name to AdamW, with ``-prior`` for
        that of the prior; Lightning numbers the parameter groups.
        """
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


def _rename(history: Any, names: dict[str, str]) -> None:
    """Rename entries of a history and the columns that have their names; it need not have all of them."""
    if not isinstance(history, dict):  # None before the first training; another logger's
        return
    for old, new in names.items():
        if old in history:
            history[new] = history.pop(old).rename(columns={old: new})
