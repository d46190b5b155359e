"""What happens between training steps: sampling the prior, and keeping the last finite state."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback

from qbmscvi.diagnostics import estimate_log_z
from qbmscvi.exceptions import SamplerError, TrainingDivergedError
from qbmscvi.samplers import BlockGibbsSampler, SamplingRequest

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch import Tensor

    from qbmscvi._prior import BoltzmannPrior
    from qbmscvi.ising import IsingModel, SampleBatch
    from qbmscvi.samplers import Sampler


_RESAMPLE_BELOW = 0.5  # effective share of the tracking chains


@dataclass(frozen=True)
class SamplingSchedule:
    """When and how much the prior is sampled during training.

    Parameters
    ----------
    every_n_steps
        Optimizer steps between two requests; the moments stay as they are in between.
    n_sweeps
        Sweeps of each persistent chain per request (the k of PCD-k).
    burn_in
        Sweeps of the first request of a model, whose chains start from random spins.

    Raises
    ------
    ValueError
        If a value is below one.
    """

    every_n_steps: int = 1
    n_sweeps: int = 3
    burn_in: int = 100

    def __post_init__(self) -> None:
        for name in ("every_n_steps", "n_sweeps", "burn_in"):
            if getattr(self, name) < 1:
                msg = f"SamplingSchedule.{name}={getattr(self, name)} must be at least 1."
                raise ValueError(msg)


class SamplingCallback(Callback):
    """Ask a sampler for samples of the prior before an optimizer step, and hand their moments to the prior.

    The cadence follows ``trainer.global_step``, so with gradient accumulation there is one request per optimizer
    step. If the sampler fails, block Gibbs answers in its place: one warning, and a count in the history.

    The value of log Z is carried along by the work that each parameter update does on one chain in eight (Jarzynski's
    equality, :cite:p:`Carbone23`); those chains take no part in the moments. At the end of training log Z is
    estimated anew.

    Parameters
    ----------
    prior
        Prior to be sampled.
    sampler
        Sampler to ask.
    schedule
        When to ask.
    """

    def __init__(self, prior: BoltzmannPrior, sampler: Sampler, schedule: SamplingSchedule) -> None:
        self.prior = prior
        self.sampler = sampler
        self.schedule = schedule
        self.n_requests = 0
        self.n_fallbacks = 0
        self._seeds = torch.Generator()
        self._last_step: int | None = None
        self._last_batch: SampleBatch | None = None
        self._epoch_seconds = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take one seed from torch's global stream, so that equal ``scvi.settings.seed`` gives equal runs."""
        self._seeds.manual_seed(int(torch.randint(2**31 - 1, ())))
        self._last_step, self._last_batch = None, None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset the timer."""
        self._epoch_seconds = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refresh the moments if the schedule says so."""
        step = trainer.global_step
        is_due = self._last_step is None or step >= self._last_step + self.schedule.every_n_steps
        if is_due and self.prior.h.requires_grad:
            self._last_step = step
            self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        prior = self.prior
        problem, is_first = prior.to_ising(), int(prior.n_updates) == 0
        if self._last_batch is not None:
            self._track_log_z(problem)
        continues = self.sampler.traits.is_persistent and not is_first
        request = SamplingRequest(
            problem,
            n_samples=len(prior.chains),
            initial_spins=prior.chains if continues else None,
            n_sweeps=self.schedule.burn_in if is_first else self.schedule.n_sweeps,
            seed=self._draw_seed(),
            purpose="negative_phase",
        )
        batch = self._ask(request)
        if is_first:
            prior.log_z.fill_(estimate_log_z(problem, n_chains=64, n_steps=50, seed=self._draw_seed()).value)
        if not continues:
            prior.tracking_log_weights.zero_()
        prior.set_moments(batch[: -len(prior.tracking_log_weights)])
        prior.chains.copy_(batch.spins)
        self._last_batch = batch
        self.n_requests += 1
        self._epoch_seconds += batch.info["seconds"]

    def _draw_seed(self) -> int:
        return int(torch.randint(2**31 - 1, (), generator=self._seeds))

    def _track_log_z(self, problem: IsingModel) -> None:
        """Charge the tracking chains the work of the last update; add its free energy to log Z."""
        prior, before = self.prior, self.prior.tracking_log_weights
        tracking = self._last_batch[-len(before) :]
        after = before + tracking.energies - problem.energy(tracking.spins)
        prior.log_z += torch.logsumexp(after, 0) - torch.logsumexp(before, 0)
        weights = torch.softmax(after, 0)
        if 1.0 / weights.square().sum() < _RESAMPLE_BELOW * len(weights):
            prior.chains[-len(weights) :] = tracking.spins[self._resample(weights)]
            after = torch.zeros_like(after)
        before.copy_(after)

    def _resample(self, weights: Tensor) -> Tensor:
        """Systematic resampling: indices of the chains that live on."""
        n_chains = len(weights)
        offset = float(torch.rand((), generator=self._seeds))
        positions = (torch.arange(n_chains, device=weights.device) + offset) / n_chains
        return torch.searchsorted(weights.cumsum(0), positions).clamp(max=n_chains - 1)

    def _ask(self, request: SamplingRequest) -> SampleBatch:
        try:
            return self.sampler.sample(request)
        except SamplerError as error:
            if not request.problem.is_finite:
                raise TrainingDivergedError(str(error)) from error
            if self.n_fallbacks == 0:
                warnings.warn(
                    f"{self.sampler.name} failed ({error}). Block Gibbs answers in its place, now and whenever it "
                    "fails again; `model.history['sampling_fallbacks']` counts.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self.n_fallbacks += 1
            chains = None if int(self.prior.n_updates) == 0 else self.prior.chains
            return BlockGibbsSampler().sample(replace(request, initial_spins=chains, n_sweeps=None))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was sampled."""
        if self._last_batch is None:
            return
        pl_module.log_dict(
            {
                "prior_energy": self._last_batch.energies.mean(),
                "prior_log_z": self.prior.log_z,
                "sampling_seconds": self._epoch_seconds,
                "sampling_fallbacks": float(self.n_fallbacks),
            }
        )

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Estimate log Z of the trained prior."""
        if self._last_batch is None:
            return
        seed = int(torch.randint(2**31 - 1, (), generator=self._seeds))
        estimate = estimate_log_z(
            self.prior.to_ising(), samples=self.prior.chains, n_chains=128, n_steps=300, seed=seed
        )
        self.prior.log_z.fill_(estimate.value)
        self.prior.log_z_scale.fill_(estimate.scale)


class FiniteStateGuard(Callback):
    """Stop a training run that has diverged, and give the module back in its last finite state.

    The loss of each step is inspected on its own device; it is read, and the state copied, every ``every_n_steps``
    steps and at the end of an epoch.

    Parameters
    ----------
    every_n_steps
        Steps between two copies.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        self.every_n_steps = every_n_steps
        self.diverged_at_step: int | None = None
        self._first_bad_step: Tensor | None = None
        self._good_state: dict[str, Tensor] = {}
        self._good_step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the state that training starts from."""
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
        """Check before validation and logging."""
        self._check(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the last finite state if the exception came from non-finite numbers."""
        if self.diverged_at_step is None and self._good_state and not _is_finite(pl_module):
            self._restore(trainer.global_step, pl_module)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        first_bad = int(self._first_bad_step)
        if first_bad >= 0 or not _is_finite(pl_module):
            step = first_bad if first_bad >= 0 else trainer.global_step
            self._restore(step, pl_module)
            raise TrainingDivergedError(self.message)
        self._keep(trainer, pl_module)

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._good_state = {name: value.detach().clone() for name, value in pl_module.module.state_dict().items()}
        self._good_step = trainer.global_step

    def _restore(self, step: int, pl_module: pl.LightningModule) -> None:
        pl_module.module.load_state_dict(self._good_state)
        self.diverged_at_step = step

    @property
    def message(self) -> str:
        """What happened, for the error."""
        return (
            f"The loss or a parameter became non-finite at step {self.diverged_at_step}. Training has stopped and the "
            f"model holds its state of step {self._good_step}. Lower the learning rate (`plan_kwargs={{'lr': 1e-4}}`), "
            "clip gradients (`gradient_clip_val=10`), or check the data for extreme counts."
        )


def _is_finite(pl_module: pl.LightningModule) -> bool:
    total = sum(parameter.detach().sum() for parameter in pl_module.module.parameters())
    return bool(torch.isfinite(total))
