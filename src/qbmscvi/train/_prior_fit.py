r"""The second stage of learning a prior: the networks stay fixed while the prior is fitted to the codes of cells.

Codes are the posteriors of the latent variables. They move during training, and the prior follows with a lag. With
fixed networks, fitting the prior removes this lag. Networks and representations of cells stay the same, bit for bit.

Each step compares draws of some codes with chains of the prior. The chains start as draws of codes, so each mode has
its share of them. The fit keeps a running mean of the parameters, because single steps follow the noise of the chains.
A sampler that continues chains moves them at every step. Any other sampler gets at most a hundred requests; if it is
remote, local chains continue from its answers.

Chains rarely leave a mode, so the weights of distant modes are known least. With block Gibbs, the default, a long fit
ends with chains that exchange states with replicas at higher temperatures and so move between modes.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch.distributions import kl_divergence

from qbmscvi.boltzmann.ising import SampleBatch
from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.diagnostics import MIXED, chain_diagnostics, estimate_log_z
from qbmscvi.samplers import BlockGibbsSampler, ParallelTemperingSampler, SamplingRequest
from qbmscvi.train._sampling import SamplingCallback
from qbmscvi.train._schedule import SamplingSchedule

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from qbmscvi.boltzmann.prior import BoltzmannPrior
    from qbmscvi.diagnostics import ChainDiagnostics, LogPartition
    from qbmscvi.samplers import Sampler


_LEARNING_RATE = 0.01
_BETAS = (0.5, 0.999)  # gradients from chains are noisy, and old ones mislead
_COUPLING_DECAY = 1e-4
_BATCH_SIZE = 512
_N_SWEEPS = 2
# Share of tempered steps at the end of a long fit. In trials on four sets shares of types had a smaller error at equal
# time; `benchmarks/mixing.py` measures it.
_TEMPERED_SHARE, _N_STEPS_OF_LONG_FIT = 0.12, 1_000
_N_RUNGS, _LOWEST, _BURN_IN = 6, 0.2, 50
_N_ANSWERS = 100  # at most, from a sampler that cannot continue chains
_N_LOOKS = 3  # at held-out codes, in the second half, in which the learning rate falls
_N_DRAWS = 20  # of each held-out code
_N_SETTLING_SWEEPS = 100
_N_FOLLOWED, _N_ROUNDS = 64, 50  # chains and their draws, to judge whether they mix
_SWEEPS_A_ROUND = (10, 50, 200)  # between draws: more if they have not mixed
_N_DIRECTIONS = 5  # of the largest variance of the chains


@dataclass(frozen=True)
class Codes:
    """Posteriors of cells, and their types where the prior has labels.

    Parameters
    ----------
    posterior
        Posteriors, batch shape ``(n_cells,)``.
    labels
        Cell types as numbers, shape ``(n_cells,)``, for a prior with labels; None otherwise.
    """

    posterior: FactorialPosterior
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.posterior.logits)

    def __getitem__(self, rows: Tensor) -> Codes:
        return Codes(
            FactorialPosterior(self.posterior.logits[rows]), None if self.labels is None else self.labels[rows]
        )

    @property
    def known(self) -> dict[str, Tensor]:
        """Labels as keyword arguments of the prior's methods; empty without labels."""
        return {} if self.labels is None else {"labels": self.labels}


@dataclass(frozen=True)
class PriorFit:
    """Result of fitting the prior to codes.

    Parameters
    ----------
    history
        One row per evaluation on held-out codes: ``step``, ``held_out_kl`` in nats per cell, ``log_z``, its bounds
        ``log_z_lower`` and ``log_z_upper`` and its standard error ``log_z_scale``. The first row is before any step.
        The last row belongs to the parameters that were kept, with ``log_z`` below.
    log_z
        Log partition function of the fitted prior.
    chains
        Whether the prior's chains have mixed: rank-normalized R-hat and effective sample size.
    n_steps
        Optimizer steps that were made.
    best_step
        Step of the parameters that were kept: the latest with a held-out KL not above the lowest by more than the error
        of log Z.
    n_requests, n_samples, n_failures
        Requests to the sampler, samples that it returned, and failed requests, for which local chains stood in.
    seconds
        Time taken.
    """

    history: pd.DataFrame
    log_z: LogPartition
    chains: ChainDiagnostics
    n_steps: int
    best_step: int
    n_requests: int
    n_samples: int
    n_failures: int
    seconds: float

    @property
    def kl_before(self) -> float:
        """KL divergence of held-out codes from the prior before the fit, in nats per cell."""
        return float(self.history["held_out_kl"].iloc[0])

    @property
    def kl(self) -> float:
        """KL divergence of held-out codes from the fitted prior, in nats per cell."""
        return float(self.history["held_out_kl"].iloc[-1])

    def __repr__(self) -> str:
        return (
            f"PriorFit(held-out KL {self.kl_before:.2f} -> {self.kl:.2f} nats in {self.best_step} steps, "
            f"log Z {self.log_z.value:.2f} +- {self.log_z.scale:.2f}, R-hat {self.chains.r_hat:.2f}, "
            f"{self.n_requests} requests)"
        )


def fit_to_codes(
    prior: BoltzmannPrior,
    codes: Codes,
    held_out: Codes,
    *,
    sampler: Sampler,
    schedule: SamplingSchedule | None = None,
    n_steps: int,
    seed: int = 0,
    memory: float = 0.99,
    on_step: Callable[[int], None] | None = None,
) -> PriorFit:
    """Fit a prior to codes; it is changed in place.

    Parameters
    ----------
    prior
        The prior.
    codes, held_out
        Codes to learn from, and codes that decide which parameters are kept.
    sampler
        Sampler of the prior.
    schedule
        When to request samples. None requests them at every step if the sampler continues chains, and otherwise at most
        100 times. With block Gibbs, None also means tempered chains at the end of a fit of 1,000 steps or more.
    n_steps
        Optimizer steps.
    seed
        Seed of all random numbers. The global random state is not changed.
    memory
        Weight of the past in the running mean of the parameters, per step; zero keeps the parameters of the last step.
    on_step
        Called with the number of each completed step.
    """
    started = time.perf_counter()
    is_long = isinstance(sampler, BlockGibbsSampler) and schedule is None and n_steps >= _N_STEPS_OF_LONG_FIT
    first_tempered = 1 + n_steps - (round(_TEMPERED_SHARE * n_steps) if is_long else 0)
    if schedule is None:
        every = 1 if sampler.traits.is_persistent else math.ceil(n_steps / _N_ANSWERS)
        schedule = SamplingSchedule(every_n_steps=every, n_sweeps=_N_SWEEPS, latency=0)
    was_learned = {parameter: parameter.requires_grad for parameter in prior.parameters()}
    device = prior.h.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        looks, best = [_look(prior, held_out, 0, seed)], _copy(prior)
        best_look = looks[0]
        prior.requires_grad_(True)
        prior.start_chains(codes[_choose(len(codes), len(prior.chains), device)].posterior.sample())
        stages = [SamplingCallback(prior, sampler, schedule)]
        stages[0].start(seed)
        learned = [parameter for parameter in prior.parameters() if parameter.requires_grad and parameter.numel()]
        optimizer, mean = torch.optim.Adam(learned, lr=_LEARNING_RATE, betas=_BETAS), _copy(prior)
        due = {n_steps - k * n_steps // (2 * _N_LOOKS) for k in range(_N_LOOKS)}
        for step in range(1, n_steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * min(1.0, 2.0 * (1.0 - (step - 1) / n_steps))
            if step == first_tempered:
                tempering = ParallelTemperingSampler(_N_RUNGS, lowest=_LOWEST, burn_in=_BURN_IN)
                stages.append(SamplingCallback(prior, tempering, schedule))
                stages[-1].start(seed)
            stages[-1].refresh(step - 1)
            batch = codes[_choose(len(codes), _BATCH_SIZE, device)]
            energy = prior.expected_energy(batch.posterior, n_draws=1, **batch.known).sum(-1).mean()
            optimizer.zero_grad(set_to_none=True)
            decay = 0.5 * _COUPLING_DECAY * prior.J.square().sum()
            loss = energy + prior.log_partition() + decay
            if batch.labels is not None:
                loss = loss + prior.classification_error(batch.posterior.mean, batch.labels)
            loss.backward()
            optimizer.step()
            _average(mean, prior, max(1.0 - memory, 10.0 / (step + 10.0)) if memory else 1.0)
            if on_step is not None:
                on_step(step)
            if step in due:
                current = _copy(prior)
                prior.load_state_dict(mean)
                looks.append(_look(prior, held_out, step, seed))
                if _is_no_worse(looks[-1], best_look):
                    best, best_look = _copy(prior), looks[-1]
                prior.load_state_dict(current)
        for stage in stages:
            stage.broker.close()
        prior.load_state_dict(best)
        for parameter, is_learned in was_learned.items():
            parameter.requires_grad_(is_learned)
            parameter.grad = None
        log_z, chains = _settle(prior, seed)
        looks.append({"step": best_look["step"], **_judge(prior, held_out, log_z)})
    ledgers = [stage.broker.ledger for stage in stages]
    return PriorFit(
        history=pd.DataFrame(looks),
        log_z=log_z,
        chains=chains,
        n_steps=n_steps,
        best_step=best_look["step"],
        n_requests=sum(ledger.n_requests for ledger in ledgers),
        n_samples=sum(ledger.n_samples for ledger in ledgers),
        n_failures=sum(stage.n_fallbacks for stage in stages),
        seconds=time.perf_counter() - started,
    )


def _choose(n_codes: int, n: int, device: torch.device) -> Tensor:
    """Rows of codes, each as often as any other, or once more."""
    return torch.cat([torch.randperm(n_codes) for _ in range(-(-n // n_codes))])[:n].to(device)


def _copy(prior: BoltzmannPrior) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in prior.state_dict().items()}


@torch.no_grad()
def _average(mean: dict[str, Tensor], prior: BoltzmannPrior, weight: float) -> None:
    """Move the running mean of the parameters towards their current values; buffers are copied."""
    parameters = dict(prior.named_parameters())
    for name, value in prior.state_dict().items():
        mean[name].lerp_(value, weight) if name in parameters else mean[name].copy_(value)


@torch.no_grad()
def _look(prior: BoltzmannPrior, held_out: Codes, step: int, seed: int) -> dict[str, float]:
    """Judge the current parameters with a quick estimate of log Z."""
    log_z = estimate_log_z(prior.to_ising(), samples=prior.chains, n_chains=64, n_steps=200, seed=seed)
    return {"step": step, **_judge(prior, held_out, log_z)}


@torch.no_grad()
def _judge(prior: BoltzmannPrior, held_out: Codes, log_z: LogPartition) -> dict[str, float]:
    """KL divergence of held-out codes from the prior, in nats per cell, at a value of log Z."""
    prior.set_log_z(log_z.value, log_z.lower, log_z.upper, log_z.scale)
    distribution = prior.distribution(**held_out.known, n_draws=_N_DRAWS)
    kl = float(kl_divergence(held_out.posterior, distribution).sum(-1).mean())
    bounds = {"log_z_lower": log_z.lower, "log_z_upper": log_z.upper, "log_z_scale": log_z.scale}
    return {"held_out_kl": kl, "log_z": log_z.value, **bounds}


def _is_no_worse(look: dict[str, float], other: dict[str, float]) -> bool:
    """Whether the held-out KL of an evaluation exceeds that of an earlier one by at most two errors of log Z."""
    error = 2.0 * math.hypot(look["log_z_scale"], other["log_z_scale"])
    return look["held_out_kl"] <= other["held_out_kl"] + error


@torch.no_grad()
def _settle(prior: BoltzmannPrior, seed: int) -> tuple[LogPartition, ChainDiagnostics]:
    """Run the chains at the fitted parameters, judge some of them, and estimate log Z."""
    problem = prior.to_ising()

    def run(spins: Tensor, n_sweeps: int, number: int) -> Tensor:
        request = SamplingRequest(problem, len(spins), initial_spins=spins, n_sweeps=n_sweeps, seed=seed + number)
        return BlockGibbsSampler().sample(request).spins

    spins = run(prior.chains, _N_SETTLING_SWEEPS, 0)
    prior.chains.copy_(spins)
    prior.set_moments(SampleBatch(spins, problem))
    log_z = estimate_log_z(problem, samples=spins, n_chains=128, n_steps=300, seed=seed)
    prior.set_log_z(log_z.value, log_z.lower, log_z.upper, log_z.scale)

    visible = spins[:, : prior.n_visible].to(prior.h)
    directions = torch.linalg.svd(visible - visible.mean(0), full_matrices=False)[2][:_N_DIRECTIONS]
    spins = spins[:_N_FOLLOWED]
    for n_sweeps in _SWEEPS_A_ROUND:
        followed = []
        for k in range(_N_ROUNDS):
            spins = run(spins, n_sweeps, n_sweeps + k)
            along = spins[:, : prior.n_visible].to(directions) @ directions.T
            followed.append(torch.cat([problem.energy(spins)[:, None], along], dim=-1))
        chains = chain_diagnostics(torch.stack(followed, dim=1), n_sweeps=n_sweeps * _N_ROUNDS)
        if chains.r_hat <= MIXED:
            break
    return log_z, chains
