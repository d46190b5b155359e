"""The second stage of learning a prior: networks frozen, the prior fitted to the codes of cells until these are learned.

Codes are posteriors of the latent variables. Training learns prior and networks together, so that the prior runs after
codes that move. Once the networks stand still, so do the codes, and a prior fitted to them takes back the nats per cell
that training left. The networks, and with them every representation of cells, stay as they are, bit for bit.

Each step compares a draw of some codes with chains of the prior, which start as draws of codes, so that each mode has
its share of them. A sampler that continues chains moves these at each step. Any other sampler answers some hundred
questions with states from which local chains go on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch.distributions import kl_divergence

from qbmscvi._callbacks import SamplingCallback, SamplingSchedule
from qbmscvi.diagnostics import chain_diagnostics, estimate_log_z
from qbmscvi.distributions import FactorialPosterior
from qbmscvi.ising import SampleBatch
from qbmscvi.samplers import BlockGibbsSampler, SamplingRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from qbmscvi._prior import BoltzmannPrior
    from qbmscvi.diagnostics import ChainDiagnostics, LogPartition
    from qbmscvi.samplers import Sampler

_N_STEPS, _N_STEPS_OF_ANSWERS = 1_000, 300
_LEARNING_RATE = 0.01
_BETAS = (0.5, 0.999)  # gradients from chains are noisy, and old ones mislead
_COUPLING_DECAY = 1e-4
_BATCH_SIZE = 512
_N_SWEEPS = 3
_N_ANSWERS = 100  # of a sampler that cannot continue chains
_N_LOOKS = 5  # at held-out codes
_N_DRAWS = 20  # of each held-out code
_N_ROUNDS, _SWEEPS_A_ROUND = 20, 10  # of the chains, to judge them
_N_DIRECTIONS = 5  # in which most of the chains' variance lies


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
        q = self.posterior
        part = FactorialPosterior(q.gaussian_loc[rows], q.gaussian_scale[rows], q.logits[rows])
        return Codes(part, None if self.labels is None else self.labels[rows])

    @property
    def known(self) -> dict[str, Tensor]:
        """What the prior is told of these cells beside their posteriors."""
        return {} if self.labels is None else {"labels": self.labels}


@dataclass(frozen=True)
class PriorFit:
    """What fitting the prior to codes gave.

    Parameters
    ----------
    history
        One row per look at held-out codes, the first before any step: ``step``, ``held_out_kl`` in nats per cell,
        ``log_z`` and its ``log_z_lower`` and ``log_z_upper``.
    log_z
        Log partition function of the fitted prior.
    chains
        Whether the prior's chains have mixed: rank-normalized R-hat and effective sample size.
    n_steps
        Optimizer steps that were made.
    best_step
        Step whose parameters were kept: that of the lowest held-out KL.
    n_questions, n_samples, n_failures
        Requests to the sampler, samples that it returned, and requests that failed and were answered by local chains.
    seconds
        Time taken.
    """

    history: pd.DataFrame
    log_z: LogPartition
    chains: ChainDiagnostics
    n_steps: int
    best_step: int
    n_questions: int
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
        return float(self.history["held_out_kl"].min())

    def __repr__(self) -> str:
        return (
            f"PriorFit(held-out KL {self.kl_before:.2f} -> {self.kl:.2f} nats in {self.best_step} steps, "
            f"log Z {self.log_z.value:.2f} +- {self.log_z.scale:.2f}, R-hat {self.chains.r_hat:.2f}, "
            f"{self.n_questions} questions)"
        )


def fit_to_codes(
    prior: BoltzmannPrior,
    codes: Codes,
    held_out: Codes,
    *,
    sampler: Sampler,
    schedule: SamplingSchedule | None = None,
    n_steps: int | None = None,
    seed: int = 0,
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
        When to ask it; None for every step if it continues chains, and for 100 times otherwise.
    n_steps
        Optimizer steps at most; None for the sampler's usual number.
    seed
        Seed of all random numbers. The global random state is not changed.
    on_step
        Called with the number of each step that is done.
    """
    started = time.perf_counter()
    n_steps = usual_number_of_steps(sampler) if n_steps is None else n_steps
    if schedule is None:
        every = 1 if sampler.traits.is_persistent else max(1, n_steps // _N_ANSWERS)
        schedule = SamplingSchedule(every_n_steps=every, n_sweeps=_N_SWEEPS, latency=0)
    was_learned = {parameter: parameter.requires_grad for parameter in prior.parameters()}
    device = prior.h.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        prior.unfreeze()
        prior.start_chains(codes[_choose(len(codes), len(prior.chains), device)].posterior.sample())
        sampling = SamplingCallback(prior, sampler, schedule)
        sampling.start(seed)
        optimizer = _build_optimizer(prior)
        looks = [_look(prior, held_out, 0, seed)]
        best, best_state = looks[0]["held_out_kl"], _copy(prior)
        due = {round((k + 1) * n_steps / _N_LOOKS) for k in range(_N_LOOKS)}
        for step in range(1, n_steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * min(1.0, 2.0 * (1.0 - (step - 1) / n_steps))
            sampling.refresh(step - 1)
            batch = codes[_choose(len(codes), _BATCH_SIZE, device)]
            energy = prior.expected_energy(batch.posterior, n_draws=1, **batch.known).sum(-1).mean()
            optimizer.zero_grad(set_to_none=True)
            (energy + prior.log_partition()).backward()
            prior.keep_classifier()
            optimizer.step()
            if on_step is not None:
                on_step(step)
            if step in due:
                looks.append(_look(prior, held_out, step, seed))
                if looks[-1]["held_out_kl"] < best:
                    best, best_state = looks[-1]["held_out_kl"], _copy(prior)
        sampling.broker.close()
        prior.load_state_dict(best_state)
        for parameter, is_learned in was_learned.items():
            parameter.requires_grad_(is_learned)
            parameter.grad = None
        log_z, chains = _settle(prior, seed)
    ledger = sampling.broker.ledger
    history = pd.DataFrame(looks)
    return PriorFit(
        history=history,
        log_z=log_z,
        chains=chains,
        n_steps=step,
        best_step=int(history["step"][history["held_out_kl"].argmin()]),
        n_questions=ledger.n_requests,
        n_samples=ledger.n_samples,
        n_failures=sampling.n_fallbacks,
        seconds=time.perf_counter() - started,
    )


def usual_number_of_steps(sampler: Sampler) -> int:
    """Steps that a fit with this sampler takes unless told otherwise."""
    goes_on = sampler.traits.is_persistent or sampler.traits.is_remote  # chains move at every step
    return _N_STEPS if goes_on else _N_STEPS_OF_ANSWERS


def _build_optimizer(prior: BoltzmannPrior) -> torch.optim.Optimizer:
    learned = [parameter for parameter in prior.parameters() if parameter.requires_grad and parameter.numel()]
    couplings = [parameter for parameter in learned if parameter is prior.J]
    others = [parameter for parameter in learned if parameter is not prior.J]
    groups = [{"params": couplings, "weight_decay": _COUPLING_DECAY}, {"params": others}]
    return torch.optim.Adam(groups, lr=_LEARNING_RATE, betas=_BETAS)


def _choose(n_codes: int, n: int, device: torch.device) -> Tensor:
    """Rows of codes, each at most once more often than another."""
    return torch.cat([torch.randperm(n_codes) for _ in range(-(-n // n_codes))])[:n].to(device)


def _copy(prior: BoltzmannPrior) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in prior.state_dict().items()}


@torch.no_grad()
def _look(prior: BoltzmannPrior, held_out: Codes, step: int, seed: int) -> dict[str, float]:
    """KL divergence of held-out codes from the prior, in nats per cell, with log Z of its own."""
    log_z = estimate_log_z(prior.to_ising(), samples=prior.chains, n_chains=64, n_steps=200, seed=seed)
    prior.set_log_z(log_z.value, log_z.lower, log_z.upper, log_z.scale)
    distribution = prior.distribution(**held_out.known, n_draws=_N_DRAWS)
    kl = float(kl_divergence(held_out.posterior, distribution).sum(-1).mean())
    of_log_z = {"log_z": log_z.value, "log_z_lower": log_z.lower, "log_z_upper": log_z.upper}
    return {"step": step, "held_out_kl": kl, **of_log_z}


@torch.no_grad()
def _settle(prior: BoltzmannPrior, seed: int) -> tuple[LogPartition, ChainDiagnostics]:
    """Let the chains run at the fitted parameters, judge them, and estimate log Z with them."""
    problem, spins = prior.to_ising(), prior.chains
    rounds = []
    for k in range(_N_ROUNDS):
        question = SamplingRequest(problem, len(spins), initial_spins=spins, n_sweeps=_SWEEPS_A_ROUND, seed=seed + k)
        spins = BlockGibbsSampler().sample(question).spins
        rounds.append(spins)
    prior.chains.copy_(spins)
    prior.set_moments(SampleBatch(spins, problem))
    log_z = estimate_log_z(problem, samples=spins, n_chains=128, n_steps=300, seed=seed)
    prior.set_log_z(log_z.value, log_z.lower, log_z.upper, log_z.scale)
    states = torch.stack(rounds, dim=1)  # (n_chains, n_rounds, n_spins)
    visible = states[..., : prior.n_visible].float()
    directions = torch.linalg.svd(visible.flatten(0, 1) - visible.mean((0, 1)), full_matrices=False)[2][:_N_DIRECTIONS]
    followed = torch.cat([problem.energy(states)[..., None], visible @ directions.T], dim=-1)
    return log_z, chain_diagnostics(followed)
