"""Cells from the prior of a trained model, and from other densities over its codes in place of the prior.

The networks stay the same; only the source of codes changes: the model's own prior, codes of training cells (the limit
of the decoder), and controls. For each held-out cell the same number of cells is generated, some 2,000 in total, with
library size, batch and covariates of training cells of the same batch. All models of a seed use the same training cells
for this. Counts are drawn, and scored by :func:`~qbmscvi.benchmark.score_generated` against the held-out cells.

All KL divergences of one model use the same draws of its held-out posteriors, so that the error of the draws largely
cancels from differences. The ELBO of a control is the model's ELBO with another KL divergence.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.module._constants import MODULE_KEYS
from threadpoolctl import threadpool_limits
from torch.distributions import Normal

from qbmscvi.benchmark._autoregressive import AutoregressiveDensity
from qbmscvi.benchmark._densities import (
    BernoulliMixture,
    Density,
    FittedDensity,
    GaussianMixture,
    IndependentSpins,
    divergence,
    draw,
)
from qbmscvi.benchmark._generation import can_score, score_generated, score_real
from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.diagnostics import estimate_log_z
from qbmscvi.model._qbmscvi import QBMSCVI
from qbmscvi.samplers import BlockGibbsSampler, SamplingRequest

if TYPE_CHECKING:
    from collections.abc import Collection

    from scvi.model import SCVI
    from torch import Tensor

    from qbmscvi.boltzmann.prior import BoltzmannPrior
    from qbmscvi.diagnostics import LogPartition

REAL_CELLS = "real cells"
OWN_CODES, SHUFFLED, OF_TRAINING = "own codes", "J shuffled", "prior of training"
GAUSSIAN_RIVALS: dict[str, type[FittedDensity]] = {"mixture of Gaussians": GaussianMixture}
SPIN_RIVALS: dict[str, type[FittedDensity]] = {
    "independent spins fitted": IndependentSpins,
    "mixture of Bernoulli products": BernoulliMixture,
    "autoregressive density": AutoregressiveDensity,
}
_RIVALS = GAUSSIAN_RIVALS | SPIN_RIVALS
PREFIX = "cells_"  # of scores of generated cells

_MAX_CELLS = 2_000  # distances are computed for no more
_LEAST_GENERATED = 2_000  # shares of types take so many
_MAX_CODES = 20_000
_N_DRAWS = 20  # of each held-out code
_N_SHUFFLED_CHAINS = 256


class Control(NamedTuple):
    """Scores of a trained model with something else in place of its prior, and the CPU seconds to fit that."""

    scores: dict[str, float]
    fit_cpu_s: float | None = None


@dataclass(frozen=True)
class StandardNormal(Density):
    """The prior of scVI."""

    n_units: int

    def log_prob(self, z: Tensor) -> Tensor:
        """See :meth:`Density.log_prob`."""
        return Normal(0.0, 1.0).log_prob(z).sum(1)

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Density.sample`."""
        return torch.randn(n_samples, self.n_units, generator=generator)


@dataclass(frozen=True)
class BoltzmannDensity(Density):
    """Copy of a Boltzmann prior, which later changes of the model do not affect.

    Parameters
    ----------
    prior
        The prior, on the CPU, with ``log_z`` as its log partition function.
    log_z
        The same with its interval.
    """

    prior: BoltzmannPrior
    log_z: LogPartition

    @classmethod
    def of(cls, model: QBMSCVI) -> BoltzmannDensity:
        """Copy the current prior of a model."""
        log_z = model.get_log_z()
        return cls(copy.deepcopy(model.module.prior).cpu(), log_z)

    def shuffled(self, seed: int) -> BoltzmannDensity:
        """The same couplings in random order, log Z to match."""
        prior, generator = copy.deepcopy(self.prior), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            prior.J.copy_(prior.J[torch.randperm(len(prior.J), generator=generator)])
        # The persistent chains are samples of the prior as it was trained, so the reverse runs need others.
        problem = prior.to_ising()
        spins = BlockGibbsSampler().sample(SamplingRequest(problem, _N_SHUFFLED_CHAINS, seed=seed)).spins
        log_z = estimate_log_z(problem, samples=spins, seed=seed)
        prior.set_log_z(log_z.value, log_z.lower, log_z.upper, log_z.scale)
        return BoltzmannDensity(prior, log_z)

    @torch.no_grad()
    def log_prob(self, z: Tensor) -> Tensor:
        """See :meth:`Density.log_prob`; it has the error of log Z."""
        return self.prior.distribution().log_prob(z)

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Ends of separate chains, as in :meth:`qbmscvi.QBMSCVI.generate` by default."""
        seed = int(torch.randint(2**31 - 1, (), generator=generator))
        request = SamplingRequest(self.prior.to_ising(), n_samples, seed=seed, purpose="generation")
        return BlockGibbsSampler().sample(request).spins[:, : self.prior.n_visible].float()

    def bounds(self, elbo: float) -> dict[str, float]:
        """An ELBO at both ends of the interval of log Z."""
        low, high = self.log_z.interval
        return {"elbo_low": elbo + self.log_z.value - high, "elbo_high": elbo + self.log_z.value - low}


def draw_rows(batches: np.ndarray, wanted: np.ndarray, known: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each wanted row one of the known rows, of the same batch; of any, if the batch has none."""
    rows = rng.choice(known, len(wanted))
    for batch in np.unique(batches[wanted]):
        candidates, is_here = known[batches[known] == batch], batches[wanted] == batch
        if len(candidates):
            rows[is_here] = rng.choice(candidates, is_here.sum())
    return rows


@torch.inference_mode()
def posteriors(model: SCVI, rows: np.ndarray) -> FactorialPosterior | Normal:
    """Codes of cells, on the CPU."""
    model.module.eval()
    parts = []
    for tensors in model._make_data_loader(adata=model.adata, indices=rows):
        parts.append(model.module.inference(**model.module._get_inference_input(tensors))[MODULE_KEYS.QZ_KEY])
    if isinstance(model, QBMSCVI):
        return FactorialPosterior(torch.cat([qz.logits for qz in parts]).cpu())
    return Normal(*(torch.cat([getattr(qz, name) for qz in parts]).cpu() for name in ("loc", "scale")))


@torch.inference_mode()
def decode(model: SCVI, z: Tensor, rows: np.ndarray, seed: int) -> np.ndarray:
    """Draw counts of cells at codes, by the model's own decoder.

    Parameters
    ----------
    model
        SCVI or QBMSCVI.
    z
        Codes, shape ``(n, n_units)``, spins in ``{-1, +1}``.
    rows
        Cell of the model's AnnData for each code; the decoder gets its library size, batch and covariates.
    seed
        Seed of the counts. The global random state is not changed.

    Returns
    -------
    Shape ``(n, n_genes)``.
    """
    module, counts, start = model.module, [], 0
    module.eval()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for tensors in model._make_data_loader(adata=model.adata, indices=rows):
            stop = start + len(tensors[REGISTRY_KEYS.X_KEY])
            outputs = module.inference(**module._get_inference_input(tensors))
            outputs[MODULE_KEYS.Z_KEY] = module.z_encoder.z_transformation(z[start:stop].to(model.device))
            decoded = module.generative(**module._get_generative_input(tensors, outputs))
            counts.append(decoded[MODULE_KEYS.PX_KEY].sample().cpu().numpy())
            start = stop
    return np.concatenate(counts)


@dataclass
class Bench:
    """Held-out cells of a trained model, and a comparison of other cells with them.

    Parameters
    ----------
    model
        SCVI or QBMSCVI, trained on a part of its AnnData with raw counts in ``X``.
    label_key
        Column with the types, or None.
    seed
        Seed of all draws.
    """

    model: SCVI
    label_key: str | None
    seed: int
    held_out: np.ndarray = field(init=False)
    rows: np.ndarray = field(init=False)
    others: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        batches = np.asarray(self.model.adata_manager.get_from_registry(REGISTRY_KEYS.BATCH_KEY)).ravel()
        known = np.sort(self.model.train_indices)
        self.held_out = np.sort(rng.permutation(np.sort(self.model.validation_indices))[:_MAX_CELLS])
        wanted = np.repeat(self.held_out, -(-_LEAST_GENERATED // len(self.held_out)))
        self.rows = draw_rows(batches, wanted, known, rng)
        # Codes of other cells than those with the library sizes: no prior over codes knows the library size either.
        self.others = draw_rows(batches, wanted, known, rng)
        real, reference = (self.model.adata[rows] for rows in (self.held_out, known))
        self.label_key = self.label_key if can_score(real, reference, self.label_key, self.seed) else None
        self.can_score_cells = can_score(real, reference, None, self.seed)
        if self.can_score_cells:
            self.real, self.reference = real.copy(), reference.copy()

    def score_codes(self, z: Tensor) -> dict[str, float]:
        """Scores of the cells decoded at these codes, one for each of :attr:`rows`."""
        if not self.can_score_cells:
            return {}
        generated = AnnData(decode(self.model, z, self.rows, self.seed), var=self.real.var[[]].copy())
        scores = score_generated(self.real, generated, self.reference, label_key=self.label_key, seed=self.seed)
        return {PREFIX + name: value for name, value in scores.items()}

    def score_density(self, density: Density) -> dict[str, float]:
        """Scores of cells from a density."""
        generator = torch.Generator().manual_seed(self.seed)
        return self.score_codes(density.sample(len(self.rows), generator))

    def score_own_codes(self) -> dict[str, float]:
        """Scores of cells decoded at draws of the posteriors of training cells of the same batches."""
        return self.score_codes(draw(posteriors(self.model, self.others), torch.Generator().manual_seed(self.seed)))

    def score_real_cells(self) -> dict[str, float]:
        """Scores of training cells in place of generated ones; they do not depend on the model."""
        if not self.can_score_cells:
            return {}
        scores = score_real(self.real, self.reference, label_key=self.label_key, seed=self.seed)
        return {PREFIX + name: value for name, value in scores.items()}

    def training_codes(self) -> FactorialPosterior | Normal:
        """Codes to fit densities to."""
        rows = np.random.default_rng(self.seed).permutation(np.sort(self.model.train_indices))[:_MAX_CODES]
        return posteriors(self.model, np.sort(rows))


def score_priors(
    model: SCVI,
    elbo: float,
    controls: Collection[str] = (),
    *,
    label_key: str | None = None,
    of_training: BoltzmannDensity | None = None,
    seed: int = 0,
) -> tuple[dict[str, float], dict[str, Control]]:
    """Score the prior of a trained model, and controls in place of it.

    Parameters
    ----------
    model
        SCVI or QBMSCVI.
    elbo
        Its ELBO of the validation cells, in nats per cell.
    controls
        Which controls to score: ``"real cells"``, ``"own codes"``, ``"J shuffled"``, ``"prior of training"``, or a name
        of a density that is fitted to the codes of the training cells.
    label_key
        Column of the model's AnnData with the types, or None.
    of_training
        Prior before its second stage of learning.
    seed
        Seed of all draws.

    Returns
    -------
    Scores of the model, and scores of the controls by name. ``kl`` is the KL divergence of validation cells from the
    prior or its replacement, in nats per cell; ``kl_before`` is the one from ``of_training``. With fewer than 50
    validation cells, or at most 20 genes, there are no scores of cells.
    """
    with threadpool_limits(1):
        bench = Bench(model, label_key, seed)
        held_out = posteriors(model, np.sort(model.validation_indices))

        def kl(density: Density) -> float:
            return divergence(held_out, density, n_draws=_N_DRAWS, seed=seed).kl

        is_boltzmann = isinstance(model, QBMSCVI)
        own = BoltzmannDensity.of(model) if is_boltzmann else StandardNormal(model.module.n_latent)
        own_kl = kl(own)
        scores = {"kl": own_kl, **bench.score_density(own)}
        if of_training is not None:
            scores["kl_before"] = kl(of_training)

        def score_control(density: Density) -> dict[str, float]:
            of_control = kl(density)
            own_elbo = elbo + own_kl - of_control
            bounds = density.bounds(own_elbo) if isinstance(density, BoltzmannDensity) else {}
            return {"elbo": own_elbo, **bounds, "kl": of_control, **bench.score_density(density)}

        found = {}
        for name in controls:
            if name == REAL_CELLS:
                found[name] = Control(bench.score_real_cells())
            elif name == OWN_CODES:
                found[name] = Control(bench.score_own_codes())
            elif name == SHUFFLED:
                found[name] = Control(score_control(own.shuffled(seed)))
            elif name == OF_TRAINING:
                found[name] = Control(score_control(own if of_training is None else of_training))
            else:
                codes, started = bench.training_codes(), time.process_time()
                density = _RIVALS[name].fit(codes, seed)
                seconds = time.process_time() - started
                found[name] = Control(score_control(density), round(seconds, 2))
        return scores, found
