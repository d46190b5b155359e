"""Sampling between training steps: the callback requests samples and sets the moments of the prior.

With several processes (Lightning's ranks), rank 0 samples and shares its buffers. Parameters are equal on all ranks, so
decisions from them alone agree. All other decisions need a collective call that every rank makes.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback

from qbmscvi.boltzmann.ising import SampleBatch
from qbmscvi.boltzmann.log_z import estimate_log_z
from qbmscvi.exceptions import SamplerError, TrainingDivergedError
from qbmscvi.samplers import BlockGibbsSampler, Broker, SamplingRequest, vet
from qbmscvi.samplers.wrappers._recordings import problem_fingerprint
from qbmscvi.train._guards import share_buffers
from qbmscvi.train._log_z import LogZTracker

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from qbmscvi.boltzmann.ising import IsingModel
    from qbmscvi.boltzmann.prior import BoltzmannPrior
    from qbmscvi.samplers import Sampler
    from qbmscvi.train._schedule import SamplingSchedule


_N_WAITS = 20  # that the warning suggests to a run without answers
_REPORTED_FACTS = ("staleness", "effective_beta", "effective_share", "exchange_rate")


class SamplingCallback(Callback):
    """Request samples of the prior between optimizer steps, and set its moments from them.

    The schedule counts optimizer steps (``trainer.global_step``), also with gradient accumulation. A local sampler
    answers at once. A remote sampler works while training continues. Its answer is used ``schedule.latency`` steps
    after the request, or when it arrives, as new states of chains. Local block Gibbs sweeps bring these from the
    requested parameters to the current ones. The loss uses only moments of these chains, at every step.

    If a sampler fails, the chains continue without it, with one warning and a count in the history. Answers that are no
    samples (such as ground states) count as failures; :func:`qbmscvi.samplers.vet` says which samplers are tested. One
    chain in eight tracks log Z and does not enter the moments. All validation batches see the log Z of the current
    parameters. At the end of training log Z is estimated again.

    In distributed training only rank 0 samples, and the other ranks copy the buffers of its prior. So a sampler is
    called once for all ranks, and need not give equal answers in two processes.

    Parameters
    ----------
    prior
        Prior to sample.
    sampler
        Sampler of the prior.
    schedule
        When to request samples.
    """

    def __init__(self, prior: BoltzmannPrior, sampler: Sampler, schedule: SamplingSchedule) -> None:
        self.prior = prior
        self.sampler = sampler
        self.schedule = schedule
        self.broker = Broker(vet(sampler), schedule.latency, schedule.oldest_answer(sampler))
        self.n_fallbacks = 0
        self._parameters = tuple(prior.parameters())  # walking the module at each step takes longer than all else
        self._local = BlockGibbsSampler()
        self._seeds = torch.Generator()
        self._last_step: int | None = None
        self._last_asked: int | None = None
        self.log_z = LogZTracker(prior, self._seeds)
        self._answer: SampleBatch | float = float("nan")  # a resumed run knows only the mean energy
        self._facts: dict[str, float] = {}
        self._epoch_seconds = 0.0
        self._resumed: dict[str, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take one seed from torch's global stream, so that equal ``scvi.settings.seed`` gives equal runs."""
        if not self._is_frozen:
            self.prior.is_log_z_estimated.fill_(False)
        state, self._resumed = self._resumed, None
        if state is None:
            self.start(int(torch.randint(2**31 - 1, ())))  # on all ranks: their streams stay equal
            return
        self._last_step, self._last_asked = state["steps"]
        if trainer.is_global_zero:
            self._resume(state)

    def start(self, seed: int) -> None:
        """Restart with a seed, at step zero, from the chains of the prior."""
        self._seeds.manual_seed(seed)
        self._last_step = self._last_asked = self.log_z.chains = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset the timer."""
        self._epoch_seconds = 0.0

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Renew the moments if the schedule requires it."""
        step = trainer.global_step
        if step == self._last_step or self._is_frozen:
            return
        self._last_step = step
        if trainer.world_size > 1 and not self.prior.to_ising().is_finite:
            msg = "The prior has become non-finite."
            raise TrainingDivergedError(msg)  # on every rank: none is left waiting for rank 0
        if trainer.is_global_zero:
            self.refresh(step)
        share_buffers(trainer, self.prior)

    def refresh(self, step: int) -> None:
        """Bring chains and moments of the prior to its current parameters, if the schedule requires it."""
        if self.sampler.traits.is_remote:
            self._refresh_beside_remote(step)
        elif self._is_time_to_ask(step):
            self._refresh(step)

    def _is_time_to_ask(self, step: int) -> bool:
        return self._last_asked is None or step >= self._last_asked + self.schedule.interval(self.sampler)

    @property
    def _is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self._parameters)

    @property
    def _mean_energy(self) -> float:
        return self._answer if isinstance(self._answer, float) else float(self._answer.energies.mean())

    @property
    def _is_first(self) -> bool:
        return int(self.prior.n_updates) == 0

    @torch.no_grad()
    def _refresh(self, step: int = 0) -> None:
        """Take the moments from a local sampler."""
        problem = self.prior.to_ising()
        self.log_z.follow(problem)
        self._last_asked = step
        continues = self.sampler.traits.is_persistent and not self._is_first
        self.broker.submit(self._request(problem, continues, self.schedule.n_sweeps))
        self.broker.dispatch(step)
        try:
            (answer,) = self.broker.collect(step)
        except SamplerError as error:
            self._note_failure(error, problem)
            self._move_chains(problem, self._local.n_sweeps)
        else:
            self._use(problem, answer if continues else self._shuffled(answer), continues)

    @torch.no_grad()
    def _refresh_beside_remote(self, step: int) -> None:
        """Take the moments from local chains, which get new states from each answer of the device."""
        problem = self.prior.to_ising()
        self.log_z.follow(problem)
        n_sweeps = self.schedule.n_sweeps
        answer = self._collect(step, problem)
        if answer is not None:
            self.prior.chains.copy_(self._shuffled(answer).spins)
            self.prior.tracking_log_weights.zero_()
            n_sweeps = max(n_sweeps, self._local.n_sweeps)  # to the current parameters
        if not self.broker.is_busy and self._is_time_to_ask(step):
            self._last_asked = step
            seed = self.draw_seed()
            # Names the problem, too: a run that resumes within an epoch sees other cells and has other parameters.
            name = f"refresh-{seed}-{step}-{problem_fingerprint(problem)[:16]}"
            n_samples = len(self.prior.chains)
            self.broker.submit(SamplingRequest(problem, n_samples, seed=seed, purpose="refresh", request_id=name))
            self.broker.dispatch(step)
        self._move_chains(problem, n_sweeps)

    def _collect(self, step: int, problem: IsingModel) -> SampleBatch | None:
        """Answer to use now, if there is one."""
        try:
            answers = self.broker.collect(step)
        except SamplerError as error:
            self._note_failure(error, problem)
            return None
        if answers is None:
            return None
        (answer,) = answers
        self._note_facts(answer)
        return answer

    def _move_chains(self, problem: IsingModel, n_sweeps: int) -> None:
        """Take the moments from local block Gibbs, which continues the chains if there are any."""
        continues = not self._is_first
        self._use(problem, self._local.sample(self._request(problem, continues, n_sweeps)), continues)

    def _request(self, problem: IsingModel, continues: bool, n_sweeps: int) -> SamplingRequest:
        return SamplingRequest(
            problem,
            n_samples=len(self.prior.chains),
            initial_spins=self.prior.chains if continues else None,
            n_sweeps=self.schedule.burn_in if self._is_first else n_sweeps,
            seed=self.draw_seed(),
            purpose="refresh",
        )

    def _shuffled(self, batch: SampleBatch) -> SampleBatch:
        """Shuffle the samples: some devices sort by energy, and the last chains track log Z."""
        return batch[torch.randperm(batch.n_samples, generator=self._seeds).to(batch.spins.device)]

    def _use(self, problem: IsingModel, answer: SampleBatch, continues: bool) -> None:
        """Pass samples of the current problem to the prior: most give the moments, the last ones track log Z."""
        if self._is_first:
            estimate = estimate_log_z(problem, n_chains=64, n_steps=50, seed=self.draw_seed())
            self.prior.log_z.fill_(estimate.value)
        n_tracking = self.log_z.n_chains
        self.log_z.go_on(answer[-n_tracking:], forget=not continues)
        self.prior.set_moments(answer[:-n_tracking])
        self.prior.chains.copy_(answer.spins)
        self._answer = answer
        self._note_facts(answer)
        self._epoch_seconds += answer.info["seconds"]

    def draw_seed(self) -> int:
        """Next seed of the run, the same on every rank."""
        return int(torch.randint(2**31 - 1, (), generator=self._seeds))

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

    @torch.no_grad()
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Update log Z after the last step, so that validation uses the value of its parameters."""
        if self.log_z.chains is not None:
            self.log_z.follow(self.prior.to_ising())
        share_buffers(trainer, self.prior)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log numbers about the samples, equal on every rank."""
        logged = {}
        if self.log_z.chains is not None:
            logged = {
                "prior_energy": self._mean_energy,
                "prior_log_z": float(self.prior.log_z),
                "sampling_seconds": self._epoch_seconds,
                "sampling_fallbacks": float(self.n_fallbacks),
                **{f"sampling_{key}": value for key, value in self._facts.items()},
            }
        # a mean of equal values; without it Lightning warns
        pl_module.log_dict(trainer.strategy.broadcast(logged), sync_dist=trainer.world_size > 1)

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Estimate log Z of the trained prior."""
        if self.log_z.chains is not None:
            estimate = estimate_log_z(
                self.prior.to_ising(), samples=self.prior.chains, n_chains=128, n_steps=300, seed=self.draw_seed()
            )
            self.prior.set_log_z(estimate.value, estimate.lower, estimate.upper, estimate.scale)
            self._warn_if_unanswered(trainer.global_step)
        share_buffers(trainer, self.prior)

    def _warn_if_unanswered(self, n_steps: int) -> None:
        """Warn if training ended before the device answered, because nothing else would show it."""
        if self.sampler.traits.is_remote and not self.broker.ledger.n_samples and not self.n_fallbacks:
            warnings.warn(
                f"{self.sampler.name} has not answered during these {n_steps} steps: the prior was trained on local "
                "block Gibbs alone. Train for longer, or let training wait for answers, e.g. for "
                f"{min(n_steps, _N_WAITS)} of them: schedule=SamplingSchedule(latency=0, "
                f"every_n_steps={math.ceil(n_steps / _N_WAITS)}).",
                RuntimeWarning,
                stacklevel=2,
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Drop a request that is still under way, because Lightning does not call ``teardown`` after an exception."""
        self.broker.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Drop a request that is still under way."""
        self.broker.close()

    def state_dict(self) -> dict[str, Any]:
        """State for a Lightning checkpoint, with which a resumed run continues as if it had not stopped."""
        return {
            "seeds": self._seeds.get_state(),
            "steps": (self._last_step, self._last_asked),
            "n_fallbacks": self.n_fallbacks,
            "log_z": self.log_z.state_dict(),
            "mean_energy": self._mean_energy,
            "facts": dict(self._facts),
            "broker": self.broker.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; a request to a remote sampler that was under way is sent again."""
        self._resumed = state_dict

    def _resume(self, state: dict[str, Any]) -> None:
        self._seeds.set_state(state["seeds"].cpu())
        self.n_fallbacks = state["n_fallbacks"]
        self._answer, self._facts = state["mean_energy"], state["facts"]
        self.log_z.load_state_dict(state["log_z"])
        self.broker.load_state_dict(state["broker"])
