"""What happens between training steps: sampling the prior, and keeping the last finite state."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback

from qbmscvi.diagnostics import estimate_log_z
from qbmscvi.exceptions import SamplerError, TrainingDivergedError, require_integer
from qbmscvi.ising import SampleBatch
from qbmscvi.samplers import BlockGibbsSampler, Broker, SamplingRequest, Vetted

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch import Tensor

    from qbmscvi._prior import BoltzmannPrior
    from qbmscvi.ising import IsingModel
    from qbmscvi.samplers import Sampler


_RESAMPLE_BELOW = 0.5  # effective share of the tracking chains
_REPORTED_FACTS = ("staleness", "effective_beta", "effective_share", "exchange_rate")


@dataclass(frozen=True)
class SamplingSchedule:
    """When and how much the prior is sampled during training.

    Parameters
    ----------
    every_n_steps
        Optimizer steps between two questions to the sampler. The moments of a local sampler stay as they are in
        between; with a remote one, local chains renew them at every step.
    n_sweeps
        Sweeps of each persistent chain per step (the k of PCD-k).
    burn_in
        Sweeps of the first request of a model, whose chains start from random spins.
    latency
        Steps between a question to a remote sampler and the use of its answer; a late answer is used at the next
        multiple. Training never waits, and local samplers answer at once. Zero makes training wait for each answer.
    max_staleness
        Age in steps beyond which an answer of a remote sampler is not used.
    n_polish_sweeps
        Local Gibbs sweeps that carry the states of a remote answer to the parameters of now.

    Raises
    ------
    TypeError, ValueError
        If a value is not an integer, or is below one (``latency``: below zero; ``max_staleness``: below ``latency``).
    """

    every_n_steps: int = 1
    n_sweeps: int = 2
    burn_in: int = 100
    latency: int = 20
    max_staleness: int = 500
    n_polish_sweeps: int = 10

    def __post_init__(self) -> None:
        least_values = dict.fromkeys(["every_n_steps", "n_sweeps", "burn_in", "n_polish_sweeps"], 1)
        for name, least in {**least_values, "latency": 0, "max_staleness": self.latency}.items():
            require_integer(f"SamplingSchedule.{name}", getattr(self, name), least)


class SamplingCallback(Callback):
    """Ask for samples of the prior between optimizer steps, and hand their moments to the prior.

    The cadence follows ``trainer.global_step``, so with gradient accumulation there is one refresh per optimizer
    step. A local sampler answers on the spot. A remote one works while training goes on: its answer is used
    ``schedule.latency`` steps after the question, or when it comes, as new states of chains that local block Gibbs
    sweeps carry from the parameters of then to those of now; the loss only sees moments of these chains, at every step.

    If a sampler fails, the chains go on without it: one warning, and a count in the history. An answer whose
    temperature is far from the one asked for counts as a failure where the sampler is remote or does not claim to be
    a Boltzmann sampler: ground states, say, are no samples.

    The value of log Z is carried along by the work that each parameter update does on one chain in eight (Jarzynski's
    equality, :cite:p:`Carbone23`); those chains take no part in the moments. At the end of training log Z is
    estimated anew.

    Under distributed training all ranks run the same chains from the same seeds, and only rank 0 talks to a remote
    sampler and broadcasts its answer.

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
        is_trusted = sampler.traits.target == "boltzmann" and not sampler.traits.is_remote
        asked = sampler if is_trusted else Vetted(sampler)
        self.broker = Broker(asked, schedule.latency, schedule.max_staleness)
        self.n_fallbacks = 0
        self._local = BlockGibbsSampler()
        self._seeds = torch.Generator()
        self._last_step: int | None = None
        self._last_asked: int | None = None
        self._tracked: SampleBatch | None = None
        self._mean_energy: Tensor | float = float("nan")
        self._facts: dict[str, float] = {}
        self._epoch_seconds = 0.0
        self._resumed: dict[str, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take one seed from torch's global stream, so that equal ``scvi.settings.seed`` gives equal runs."""
        if self._resumed is not None:
            if trainer.is_global_zero:
                self.broker.load_state_dict(self._resumed)
            self._resumed = None
            return
        self._seeds.manual_seed(trainer.strategy.broadcast(int(torch.randint(2**31 - 1, ()))))
        self._last_step = self._last_asked = self._tracked = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset the timer."""
        self._epoch_seconds = 0.0

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refresh the moments if the schedule says so."""
        step = trainer.global_step
        if step == self._last_step or not any(p.requires_grad for p in self.prior.parameters()):
            return
        self._last_step = step
        if self.sampler.traits.is_remote:
            self._refresh_beside_remote(step, trainer)
        elif self._is_time_to_ask(step):
            self._refresh(step)

    def _is_time_to_ask(self, step: int) -> bool:
        return self._last_asked is None or step >= self._last_asked + self.schedule.every_n_steps

    @property
    def _is_first(self) -> bool:
        return int(self.prior.n_updates) == 0

    @torch.no_grad()
    def _refresh(self, step: int = 0) -> None:
        """Take the moments from a local sampler."""
        problem = self._begin()
        self._last_asked = step
        continues = self.sampler.traits.is_persistent and not self._is_first
        for request in self._questions(problem, continues):
            self.broker.submit(request)
        self.broker.dispatch(step)
        try:
            answers = self.broker.collect(step)
        except SamplerError as error:
            self._note_failure(error, problem)
            continues = not self._is_first
            answers = self._ask_locally(problem, self._local.n_sweeps)
        self._finish(problem, answers, continues)

    @torch.no_grad()
    def _refresh_beside_remote(self, step: int, trainer: pl.Trainer) -> None:
        """Take the moments from local chains, which get new states whenever an answer of the device is used."""
        problem = self._begin()
        n_sweeps = self.schedule.n_sweeps
        answer, is_free = trainer.strategy.broadcast(self._collect(step, problem) if trainer.is_global_zero else None)
        if answer is not None:
            self.prior.chains.copy_(self._shuffle(answer))
            self.prior.tracking_log_weights.zero_()
            n_sweeps = max(n_sweeps, self.schedule.n_polish_sweeps)
        if is_free and self._is_time_to_ask(step):
            self._last_asked = step
            seed = self._draw_seed()
            if trainer.is_global_zero:
                name = f"refresh-{seed}-{step}"
                n_samples = len(self.prior.chains)
                self.broker.submit(SamplingRequest(problem, n_samples, seed=seed, purpose="refresh", request_id=name))
                self.broker.dispatch(step)
        self._finish(problem, self._ask_locally(problem, n_sweeps), continues=True)

    def _collect(self, step: int, problem: IsingModel) -> tuple[SampleBatch | None, bool]:
        """Answer that is to be used now, if there is one, and whether the sampler is free for another question."""
        answer = None
        try:
            answers = self.broker.collect(step)
            if answers is not None:
                (answer,) = answers
                self._note_facts(answer)
        except SamplerError as error:
            self._note_failure(error, problem)
        return answer, not self.broker.is_busy

    def _shuffle(self, batch: SampleBatch) -> Tensor:
        """States in random order, as often as their weights say: devices sort by energy, and chains have roles."""
        spins = batch.spins if batch.weights is None else batch.spins[self._resample(batch.weights)]
        return spins[torch.randperm(len(spins), generator=self._seeds).to(spins.device)]

    def _begin(self) -> IsingModel:
        problem = self.prior.to_ising()
        if self._tracked is not None:
            self._track_log_z(problem)
        return problem

    def _questions(self, problem: IsingModel, continues: bool, n_sweeps: int | None = None) -> list[SamplingRequest]:
        """Two questions about one problem: for the moments, and for the chains that track log Z."""
        schedule, n_tracking = self.schedule, len(self.prior.tracking_log_weights)
        if self._is_first:
            n_sweeps = schedule.burn_in
        parts = {"negative_phase": self.prior.chains[:-n_tracking], "log_z": self.prior.chains[-n_tracking:]}
        return [
            SamplingRequest(
                problem,
                n_samples=len(chains),
                initial_spins=chains if continues else None,
                n_sweeps=n_sweeps or schedule.n_sweeps,
                seed=self._draw_seed(),
                purpose=purpose,
            )
            for purpose, chains in parts.items()
        ]

    def _ask_locally(self, problem: IsingModel, n_sweeps: int) -> list[SampleBatch]:
        return self._local.sample_batch(self._questions(problem, not self._is_first, n_sweeps))

    def _finish(self, problem: IsingModel, answers: list[SampleBatch], continues: bool) -> None:
        """Hand the answers to the prior."""
        prior, (batch, tracked) = self.prior, answers
        if self._is_first:
            prior.log_z.fill_(estimate_log_z(problem, n_chains=64, n_steps=50, seed=self._draw_seed()).value)
        if self._is_first or not continues:
            prior.tracking_log_weights.zero_()
        prior.set_moments(batch)
        torch.cat([batch.spins, tracked.spins], out=prior.chains)
        self._tracked, self._mean_energy = tracked, batch.energies.mean()
        self._note_facts(batch)
        self._epoch_seconds += batch.info["seconds"] + tracked.info["seconds"]

    def _draw_seed(self) -> int:
        return int(torch.randint(2**31 - 1, (), generator=self._seeds))

    def _track_log_z(self, problem: IsingModel) -> None:
        """Charge the tracking chains the work of the last update; add its free energy to log Z."""
        prior, before, tracked = self.prior, self.prior.tracking_log_weights, self._tracked
        after = before + tracked.energies - problem.energy(tracked.spins)
        prior.log_z += torch.logsumexp(after, 0) - torch.logsumexp(before, 0)
        weights = torch.softmax(after, 0)
        if 1.0 / weights.square().sum() < _RESAMPLE_BELOW * len(weights):
            prior.chains[-len(weights) :] = tracked.spins[self._resample(weights)]
            after = torch.zeros_like(after)
        before.copy_(after)

    def _resample(self, weights: Tensor) -> Tensor:
        """Systematic resampling: indices of the chains that live on."""
        n_chains = len(weights)
        offset = float(torch.rand((), generator=self._seeds))
        positions = (torch.arange(n_chains, device=weights.device) + offset) / n_chains
        return torch.searchsorted(weights.cumsum(0), positions).clamp(max=n_chains - 1)

    def _note_failure(self, error: SamplerError, problem: IsingModel) -> None:
        if not problem.is_finite:
            raise TrainingDivergedError(str(error)) from error
        if self.n_fallbacks == 0:
            warnings.warn(
                f"{self.sampler.name} failed ({error}). Block Gibbs answers in its place, now and whenever it fails "
                "again; `model.history['sampling_fallbacks']` counts.",
                RuntimeWarning,
                stacklevel=2,
            )
        self.n_fallbacks += 1

    def _note_facts(self, batch: SampleBatch) -> None:
        self._facts |= {key: float(batch.info[key]) for key in _REPORTED_FACTS if key in batch.info}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was sampled."""
        if self._tracked is None:
            return
        pl_module.log_dict(
            {
                "prior_energy": self._mean_energy,
                "prior_log_z": self.prior.log_z,
                "sampling_seconds": self._epoch_seconds,
                "sampling_fallbacks": float(self.n_fallbacks),
                **{f"sampling_{key}": value for key, value in self._facts.items()},
            }
        )

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Estimate log Z of the trained prior."""
        if self._tracked is None:
            return
        estimate = estimate_log_z(
            self.prior.to_ising(), samples=self.prior.chains, n_chains=128, n_steps=300, seed=self._draw_seed()
        )
        self.prior.log_z.fill_(estimate.value)
        self.prior.log_z_scale.fill_(estimate.scale)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Drop a question that is still under way."""
        self.broker.close()

    def state_dict(self) -> dict[str, Any]:
        """State for a Lightning checkpoint: a resumed run goes on as if it had not stopped."""
        tracked = None
        if self._tracked is not None:
            tracked = {"spins": self._tracked.spins, "energies": self._tracked.energies}
        return {
            "seeds": self._seeds.get_state(),
            "steps": (self._last_step, self._last_asked),
            "n_fallbacks": self.n_fallbacks,
            "tracked": tracked,
            "broker": self.broker.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; a question to a remote sampler that was under way is asked once more."""
        self._seeds.set_state(state_dict["seeds"].cpu())
        self._last_step, self._last_asked = state_dict["steps"]
        self.n_fallbacks = state_dict["n_fallbacks"]
        self._tracked = None if state_dict["tracked"] is None else SampleBatch(**state_dict["tracked"])
        self._resumed = state_dict["broker"]


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
        """Check at the end of the epoch."""
        self._check(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the last finite state if the exception came from non-finite numbers."""
        if self.diverged_at_step is not None or not self._good_state:
            return
        # torch's distributions refuse parameters that are not finite with these words; a finite network can make them.
        is_refused = isinstance(exception, ValueError) and "found invalid values" in str(exception)
        if is_refused or not _is_finite(pl_module):
            first_bad = int(self._first_bad_step)
            self._restore(first_bad if first_bad >= 0 else trainer.global_step, pl_module)

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
