"""Samplers of others, samples that count alike, and state that outlives a run."""

from __future__ import annotations

import numpy as np
import pytest
import scvi
from devices import OffTemperature
from laws import Law

from qbmscvi import QBMSCVI, SamplingSchedule
from qbmscvi.datasets import synthetic_counts
from qbmscvi.distributions import build_smoothing
from qbmscvi.samplers import Reweighted, SamplerTraits


@pytest.fixture(scope="module")
def adata():
    counts = synthetic_counts(n_cells=200, n_genes=60)
    QBMSCVI.setup_anndata(counts, batch_key="batch")
    return counts


def untrained(adata, **settings) -> QBMSCVI:
    scvi.settings.seed = 0
    return QBMSCVI(adata, **{"n_latent": 10, "n_chains": 256} | settings)


def train(model, sampler, **settings) -> QBMSCVI:
    arguments = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False}
    model.train(sampler=sampler, **arguments | settings)
    return model


def coupled(adata, **settings) -> QBMSCVI:
    """An untrained model whose prior has energies that depend on the temperature."""
    model, rng = untrained(adata, **settings), np.random.default_rng(4)
    for parameter in (model.module.prior.h, model.module.prior.J):
        parameter.data.copy_(parameter.new_tensor(0.5 * rng.normal(size=parameter.shape)))
    model.is_trained_ = True
    return model


def test_an_estimator_that_is_gone_is_an_unknown_name():
    with pytest.raises(ValueError, match=r"'disarm'.*straight-through.*spike-exponential"):
        build_smoothing("disarm")


# Rows of equal weight ----------------------------------------------------------------------------------------------


def mean_energy_z(law: Law, spins: np.ndarray) -> float:
    """Mean energy of rows less the exact one, over the standard error of so many independent rows."""
    code = ((spins.astype(int) + 1) // 2) @ (1 << np.arange(spins.shape[1] - 1, -1, -1))
    mean = law.probabilities @ law.energies
    scale = np.sqrt(law.probabilities @ (law.energies - mean) ** 2 / len(spins))
    return float((law.energies[code].mean() - mean) / scale)


@pytest.mark.parametrize("reports", [False, True], ids=["estimated", "reported"])
@pytest.mark.parametrize("latent", ["spins", "gaussian-spins"])
def test_resampled_draws_of_the_prior_have_the_exact_mean_energy(latent, reports, adata):
    """Drawn at half of beta, where their mean energy is wrong by many standard errors; within 5 of them after all.

    Copies leave fewer than 20,000 independent rows, but the energy has forgotten them after the sweeps.
    """
    model = coupled(adata, latent=latent) if latent == "spins" else coupled(adata, latent=latent, n_spins=10)
    law, n_spins = Law.boltzmann(model.get_ising_model()), model.module.prior.n_spins
    raw, resampled = (
        model.sample_prior(20_000, sampler=sampler, seed=5)[:, -n_spins:]
        for sampler in (OffTemperature(0.5), Reweighted(OffTemperature(0.5, reports=reports)))
    )
    assert mean_energy_z(law, raw) > 20
    assert abs(mean_energy_z(law, resampled)) < 5


class OfItsOwnTemperature(OffTemperature):
    """Remote or not, and no sampler of the package: its answers are looked at."""

    def __init__(self, gain, is_remote):
        super().__init__(gain, reports=True)
        self.traits = SamplerTraits(target="boltzmann", is_remote=is_remote)


@pytest.mark.parametrize("is_remote", [False, True], ids=["local", "remote"])
def test_resampled_answers_train_and_are_not_taken_for_repeats(is_remote, adata):
    model = coupled(adata)
    sampler = Reweighted(OfItsOwnTemperature(0.5, is_remote))
    train(model, sampler, schedule=SamplingSchedule(every_n_steps=1, latency=0))
    assert model.history["sampling_fallbacks"].to_numpy().max() == 0
    law = Law.boltzmann(model.get_ising_model())
    mean = law.probabilities @ law.energies
    error = np.sqrt(law.probabilities @ (law.energies - mean) ** 2 / 256)
    # Parameters move by little within an epoch: five standard errors of 256 chains, and the move of a few steps.
    assert abs(float(model.history["prior_energy"].iloc[-1, 0]) - mean) < 5 * error + 0.1


def test_history_and_chains_are_those_of_the_resampled_rows(adata):
    """Chains are what moments, energies in the history and log Z are made of."""
    model = coupled(adata)
    problem = model.get_ising_model()
    train(model, Reweighted(OffTemperature(0.5, reports=True)), plan_kwargs={"prior_lr": 0.0})
    law = Law.boltzmann(problem)
    assert abs(mean_energy_z(law, model.module.prior.chains.numpy())) < 5
    z = float(model.history["prior_energy"].iloc[-1, 0]) - law.probabilities @ law.energies
    assert abs(z) < 5 * np.sqrt(law.probabilities @ (law.energies - law.probabilities @ law.energies) ** 2 / 256)
