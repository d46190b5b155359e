"""The prior fitted to codes: what it gains, what it leaves alone, and how it asks its sampler."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import scvi
import torch

from qbmscvi import QBMSCANVI, QBMSCVI, SamplingSchedule
from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.enumeration import all_states, draw_exact
from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.boltzmann.prior import BoltzmannPrior
from qbmscvi.datasets import synthetic_counts
from qbmscvi.diagnostics import chain_diagnostics
from qbmscvi.exceptions import SamplerError
from qbmscvi.samplers import BlockGibbsSampler, Draw, ExactSampler, ParallelTemperingSampler, Sampler, SamplerTraits
from qbmscvi.train._prior_fit import Codes, fit_to_codes

N_VISIBLE = 6


def codes_of(states: torch.Tensor, sharpness: float = 40.0) -> Codes:
    """Codes that are sure of their spins."""
    logits = sharpness * states.float()
    return Codes(FactorialPosterior(logits))


@pytest.fixture(scope="module")
def target() -> BoltzmannPrior:
    """Machine with two far-apart modes of unequal weight."""
    torch.manual_seed(0)
    prior = BoltzmannPrior(graphs.bipartite(N_VISIBLE, 2), n_hidden=2, n_chains=512)
    with torch.no_grad():
        prior.J.view(N_VISIBLE, 2)[:, 0] = -1.2
        prior.J.view(N_VISIBLE, 2)[:, 1] = 0.4 * torch.randn(N_VISIBLE)
        prior.h[N_VISIBLE:] = torch.tensor([-0.6, 0.2])
    return prior


def draw_codes(target: BoltzmannPrior, n: int, seed: int) -> Codes:
    spins = draw_exact(target.to_ising(), n, 1.0, torch.Generator().manual_seed(seed))
    return codes_of(spins[:, :N_VISIBLE])


def distribution(prior: BoltzmannPrior) -> torch.Tensor:
    return torch.softmax(-prior.energy(all_states(N_VISIBLE).float()).detach().double(), 0)


def divergence(target: BoltzmannPrior, prior: BoltzmannPrior) -> float:
    p, q = distribution(target), distribution(prior)
    return float((p * (p / q).log()).sum())


def test_a_long_fit_ends_with_tempered_chains(target, monkeypatch):
    """Only where the sampler is block Gibbs and no schedule is given."""
    steps, sample = [], ParallelTemperingSampler._sample

    def counted(self, request, seed):
        steps.append(request.n_sweeps)
        return sample(self, request, seed)

    monkeypatch.setattr(ParallelTemperingSampler, "_sample", counted)
    prior, codes = copy.deepcopy(target), draw_codes(target, 200, 2)
    fit = fit_to_codes(prior, codes, codes, sampler=BlockGibbsSampler(), n_steps=1_000)
    assert (len(steps), fit.n_requests) == (120, 1_000)
    schedule = SamplingSchedule(every_n_steps=1, latency=0)
    fit_to_codes(prior, codes, codes, sampler=BlockGibbsSampler(), schedule=schedule, n_steps=1_000)
    assert len(steps) == 120


@pytest.mark.parametrize(
    ("sampler", "n_steps"),
    [
        pytest.param(BlockGibbsSampler(), 400, id="chains"),
        pytest.param(BlockGibbsSampler(), 1_000, id="tempered-chains-at-the-end"),
        pytest.param(ExactSampler(), 200, id="fresh-samples"),
    ],
)
def test_a_machine_is_found_again_from_its_samples(target, sampler, n_steps):
    """Within .02 nats of 4,000 samples; a fit to other codes is farther away than half a nat."""
    torch.manual_seed(1)
    prior = BoltzmannPrior(graphs.bipartite(N_VISIBLE, 2), n_hidden=2, n_chains=512)
    before = divergence(target, prior)
    fit = fit_to_codes(
        prior, draw_codes(target, 4_000, 2), draw_codes(target, 1_000, 3), sampler=sampler, n_steps=n_steps
    )
    found = divergence(target, prior)
    print(f"{before:.3f} -> {found:.4f} nats; {fit}")
    assert before > 0.5
    assert found < 0.02
    # Held-out codes that are sure of their spins: KL is minus the log likelihood, here with log Z by enumeration.
    entropy = float(-(distribution(target) * distribution(target).log()).sum())
    assert fit.kl == pytest.approx(entropy + found, abs=4 * 1.5 / 1_000**0.5)
    assert fit.log_z.method == "exact"
    assert fit.kl < fit.kl_before - 0.5


def build(n_cells: int = 500, **kwargs) -> QBMSCVI:
    adata = synthetic_counts(n_cells, 40, seed=0)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    model = QBMSCVI(adata, n_latent=8, n_hidden=16, gene_likelihood="nb", **kwargs)
    model.train(max_epochs=15, accelerator="cpu", enable_progress_bar=False, fit_prior=False, plan_kwargs={"lr": 0.02})
    return model


@pytest.fixture(scope="module")
def trained_model() -> QBMSCVI:
    return build()


def state_of(model: QBMSCVI) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def restore(model: QBMSCVI, state: dict[str, torch.Tensor]) -> None:
    model.module.load_state_dict(state)


@pytest.mark.parametrize("arguments", [{}, {"n_hidden_spins": 0}])
def test_networks_and_representations_stay_bit_equal(arguments):
    model = build(300, **arguments)
    before, latent = state_of(model), model.get_latent_representation()
    kl = model.get_kl().mean()
    rng = torch.get_rng_state()
    fit = model.fit_prior(n_steps=200, seed=0, progress=False)
    assert torch.equal(torch.get_rng_state(), rng)
    np.testing.assert_array_equal(model.get_latent_representation(), latent)
    after = model.module.state_dict()
    for name, value in before.items():
        if not name.startswith("prior."):
            assert torch.equal(after[name], value), name
    assert not torch.equal(after["prior.h"], before["prior.h"])
    assert fit.kl < fit.kl_before
    assert model.get_kl().mean() < kl
    assert model.get_log_z().value == pytest.approx(fit.log_z.value, abs=1e-5)


def test_equal_seeds_give_equal_priors(trained_model):
    before = state_of(trained_model)
    priors = []
    for seed in (0, 0, 1):
        restore(trained_model, before)
        trained_model.fit_prior(n_steps=30, seed=seed, progress=False)
        priors.append(trained_model.module.prior.J.detach().clone())
    restore(trained_model, before)
    assert torch.equal(priors[0], priors[1])
    assert not torch.equal(priors[0], priors[2])


def test_training_ends_with_a_fit_unless_the_prior_is_frozen_or_it_is_refused(monkeypatch):
    calls = []
    monkeypatch.setattr(QBMSCVI, "fit_prior", lambda self, **kwargs: calls.append(kwargs))
    adata = synthetic_counts(200, 40, seed=0)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    model = QBMSCVI(adata, n_latent=4, n_hidden=8)
    settings = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False}
    model.train(**settings, fit_prior=False)
    assert not calls
    model.train(**settings)
    assert [call["n_steps"] for call in calls] == [model.trainer.global_step]  # no longer than training
    model.train(**settings, plan_kwargs={"prior_lr": 0.0})
    for parameter in model.module.prior.parameters():
        parameter.requires_grad_(False)
    model.train(**settings)
    assert len(calls) == 1


class Device(Sampler):
    """Remote sampler of exact samples that counts its requests and fails at some of them."""

    traits = SamplerTraits(is_remote=True)

    def __init__(self, failing: range = range(0)) -> None:
        self.n_asked, self.failing, self.sizes = 0, failing, []

    def _sample(self, request, seed):
        self.n_asked += 1
        self.sizes.append(request.n_samples)
        if self.n_asked in self.failing:
            msg = "the device is being calibrated"
            raise SamplerError(msg)
        return Draw(draw_exact(request.problem, request.n_samples, 1.0, torch.Generator().manual_seed(seed)))


def test_a_device_is_asked_a_hundred_times(trained_model):
    before, device = state_of(trained_model), Device()
    fit = trained_model.fit_prior(sampler=device, n_steps=300, seed=0, progress=False)
    restore(trained_model, before)
    assert device.n_asked == fit.n_requests == 100
    assert fit.n_samples == sum(device.sizes) == 100 * 512
    assert fit.n_failures == 0
    assert fit.kl < fit.kl_before - 0.05


@pytest.mark.parametrize("n_steps", [7, 150])
def test_a_device_is_never_asked_more_often_than_a_hundred_times(trained_model, n_steps):
    before, device = state_of(trained_model), Device()
    trained_model.fit_prior(sampler=device, n_steps=n_steps, seed=0, progress=False)
    restore(trained_model, before)
    assert min(n_steps, 50) <= device.n_asked <= 100


def test_a_failing_device_costs_a_warning_and_a_count(trained_model):
    before, device = state_of(trained_model), Device(failing=range(3, 50))
    with pytest.warns(RuntimeWarning, match="being calibrated") as caught:
        fit = trained_model.fit_prior(sampler=device, n_steps=300, seed=0, progress=False)
    restore(trained_model, before)
    assert sum("being calibrated" in str(warning.message) for warning in caught) == 1
    assert fit.n_failures == 47
    assert fit.n_requests == 100
    assert fit.kl < fit.kl_before


def test_training_with_a_device_does_not_ask_it_for_the_fit():
    device = Device()
    adata = synthetic_counts(200, 40, seed=0)
    QBMSCVI.setup_anndata(adata)
    model = QBMSCVI(adata, n_latent=4, n_hidden=8)
    settings = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the device had no time to answer
        model.train(**settings, sampler=device, fit_prior=False)
        n_asked = device.n_asked
        model.train(**settings, sampler=device)
    assert device.n_asked <= 2 * n_asked


def test_cells_of_a_rare_type_are_learned_and_predictions_stay_right():
    """The rarest type is 9 % of cells; a fit that freezes the label spins, or none, draws other cells for it."""
    adata = synthetic_counts(1_000, 100, n_types=5, seed=0)
    adata.obs["label"] = adata.obs["cell_type"].astype(str).where(np.arange(1_000) % 3 > 0, "unknown")
    types = adata.obs["cell_type"].astype(str).to_numpy()
    QBMSCANVI.setup_anndata(adata, "label", "unknown", batch_key="batch")
    scvi.settings.seed = 0  # with it Lightning draws cells in the same order
    model = QBMSCANVI(adata, n_latent=24, n_hidden=32, gene_likelihood="nb")
    model.train(max_epochs=40, accelerator="cpu", enable_progress_bar=False, fit_prior=False)
    names, counts = np.unique(types, return_counts=True)
    rare = names[counts.argmin()]

    def right() -> tuple[float, float]:
        cells = model.generate(500, cell_type=rare, seed=0)
        return (model.predict() == types).mean(), (model.predict(cells) == rare).mean()

    before = right()
    fit = model.fit_prior(n_steps=1_000, seed=0, progress=False)
    after = right()
    print(f"accuracy {before[0]:.3f} -> {after[0]:.3f}, cells asked for {before[1]:.2f} -> {after[1]:.2f}; {fit}")
    assert fit.kl < fit.kl_before - 0.4
    assert after[0] > before[0] - 0.02
    assert before[1] < 0.3
    assert after[1] > 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        pytest.param({"n_steps": 0}, ValueError, "n_steps=0", id="no-steps"),
        pytest.param({"indices": range(10)}, ValueError, "There are 10 cells", id="few-cells"),
        pytest.param({"sampler": "nature"}, ValueError, "Unknown sampler", id="sampler"),
        pytest.param({"seed": -1}, ValueError, "seed=-1", id="seed"),
    ],
)
def test_a_fit_that_cannot_be_made_is_refused(trained_model, arguments, error, match):
    before = state_of(trained_model)
    with pytest.raises(error, match=match):
        trained_model.fit_prior(**arguments, progress=False)
    for name, value in trained_model.module.state_dict().items():
        assert torch.equal(before[name], value), name


def test_an_untrained_model_is_refused():
    adata = synthetic_counts(100, 40, seed=0)
    QBMSCVI.setup_anndata(adata)
    with pytest.raises(RuntimeError, match="trained"):
        QBMSCVI(adata).fit_prior()


# Diagnostics of chains ---------------------------------------------------------------------------------------------


def test_r_hat_and_ess_of_independent_draws():
    """R-hat of 64 chains of 200 independent draws is one within .01, and every draw counts, within a quarter."""
    values = torch.randn(64, 200, 3, generator=torch.Generator().manual_seed(0))
    found = chain_diagnostics(values, n_sweeps=200)
    assert found.r_hat == pytest.approx(1.0, abs=0.01)
    assert found.ess == pytest.approx(64 * 200, rel=0.25)


def test_chains_that_stay_apart_are_found_out():
    values = torch.randn(64, 200, 1, generator=torch.Generator().manual_seed(0))
    values[:8] += 3.0
    assert chain_diagnostics(values, n_sweeps=200).r_hat > 1.2


def test_ess_of_a_correlated_chain_is_that_of_its_autocorrelation():
    """AR(1) with coefficient .8: (1 - .8) / (1 + .8) of the draws, within a fifth."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 500, generator=generator)
    values = noise.clone()
    for t in range(1, 500):
        values[:, t] = 0.8 * values[:, t - 1] + 0.6 * noise[:, t]
    found = chain_diagnostics(values[:, 50:, None], n_sweeps=450)
    assert found.ess == pytest.approx(64 * 450 * 0.2 / 1.8, rel=0.2)


def test_quantities_that_do_not_vary_say_nothing():
    values = torch.ones(4, 10, 2)
    assert chain_diagnostics(values, n_sweeps=10).r_hat == 1.0


def test_chains_that_have_not_mixed_are_a_warning(trained_model, monkeypatch):
    import qbmscvi.model._prior_fit as module

    monkeypatch.setattr(module, "MIXED", 0.5)
    before = state_of(trained_model)
    with pytest.warns(RuntimeWarning, match="not mixed"):
        trained_model.fit_prior(n_steps=5, seed=0, progress=False)
    restore(trained_model, before)
