"""Likelihood numbers against sums over all spin states (and grids over what is continuous), written out here.

The decoder is taken as it is; the prior's energy, log Z, posterior masses and all sums are formed anew in float64.
Estimates are judged by their own standard error: at 4 of them one of the fifty or so in this file fails by chance in
one suite in 300 (seeds are fixed: in truth never or always).
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np
import pytest
import scvi
import torch
from lightning.pytorch.callbacks import Callback
from scipy import special, stats
from scvi.module import VAE
from tables import over
from torch.distributions import kl_divergence

from qbmscvi import QBMSCANVI, QBMSCVI
from qbmscvi.boltzmann.enumeration import exact_log_z
from qbmscvi.boltzmann.smoothing import SpikeExponential
from qbmscvi.datasets import synthetic_counts

N_GENES, ROWS = 8, list(range(6))
MAX_Z = 4.0
SPINS = {"n_latent": 6, "prior_graph": "complete"}
CASES = {
    "spins": SPINS,
    "spins-covariates-poisson": SPINS | {"gene_likelihood": "poisson", "covariates": True},
    "spins-gene-batch-normal": SPINS | {"gene_likelihood": "normal", "dispersion": "gene-batch"},
    "spins-size-factor-gene-cell": SPINS | {"dispersion": "gene-cell", "size_factor": True},
    "latent-library": SPINS | {"n_latent": 4, "use_observed_lib_size": False},
    "gumbel": SPINS | {"smoothing": "gumbel"},
    "spike-exponential": SPINS | {"n_latent": 2, "smoothing": "spike-exponential"},
}
each_case = pytest.mark.parametrize("name", CASES)


@lru_cache
def counts():
    adata = synthetic_counts(80, 24, seed=3)[:, :N_GENES].copy()
    adata.X = adata.X.toarray() + 1.0  # few genes: no empty cell
    rng = np.random.default_rng(0)
    adata.obs["size_factor"] = np.asarray(adata.X.sum(1)).ravel() * rng.uniform(0.5, 1.0, 80)
    adata.obs["donor"] = np.resize(["d0", "d1", "d2"], 80)
    adata.obs["age"] = np.linspace(-1.0, 1.0, 80)
    return adata


def register(**case):
    adata = counts().copy()
    setup = {"batch_key": "batch"}
    if case.get("covariates"):
        setup |= {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]}
    if case.get("size_factor"):
        setup["size_factor_key"] = "size_factor"
    QBMSCVI.setup_anndata(adata, **setup)
    return adata


@lru_cache
def trained(name: str) -> QBMSCVI:
    """Trained for a moment, then moved to where posterior and prior differ visibly; not to be changed."""
    case = {"gene_likelihood": "nb", **CASES[name]}
    adata = register(**case)
    scvi.settings.seed = 0
    arguments = {key: value for key, value in case.items() if key not in ("covariates", "size_factor")}
    model = QBMSCVI(adata, n_hidden=8, n_chains=64, **arguments)
    model.train(max_epochs=40, accelerator="cpu", enable_progress_bar=False, plan_kwargs={"lr": 0.01})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.module.prior.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        if not model.module.use_observed_lib_size:  # trained for longer, the posterior would cover; here it is made to
            for layer in (model.module.l_encoder.mean_encoder, model.module.l_encoder.var_encoder):
                layer.weight.zero_()
            model.module.l_encoder.mean_encoder.bias.fill_(float(model.module.library_log_means.mean()))
            model.module.l_encoder.var_encoder.bias.fill_(math.log(1.5 * float(model.module.library_log_vars.max())))
    model.update_log_z()
    return model


def batch_of(model: QBMSCVI, rows=ROWS) -> dict[str, torch.Tensor]:
    (tensors,) = model._make_data_loader(adata=model.adata, indices=rows, batch_size=len(rows))
    return tensors


def posterior_of(model: QBMSCVI, tensors):
    with torch.no_grad():
        outputs = model.module.inference(**model.module._get_inference_input(tensors))
    return outputs["qz"], outputs["ql"], outputs["library"]


def spin_states(n: int) -> np.ndarray:
    return np.array(list(itertools.product((-1.0, 1.0), repeat=n))).reshape(-1, n)


def log_prior(model: QBMSCVI, s: np.ndarray) -> np.ndarray:
    """Log probability of spins, log Z by a sum over all states."""
    prior = model.module.prior
    h, J = (p.detach().double().numpy() for p in (prior.h, prior.J))

    def energy(s):
        return s @ h + sum(c * s[:, i] * s[:, j] for c, (i, j) in zip(J, prior.graph.edges, strict=True))

    return -energy(s) - special.logsumexp(-energy(spin_states(prior.n_spins)))


def codes_of(model: QBMSCVI) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All latent states: hard spins, what the decoder sees, log of the width that each stands for."""
    prior, smoothing = model.module.prior, model.module.z_encoder.smoothing
    states = spin_states(prior.n_spins)
    if not isinstance(smoothing, SpikeExponential):
        return states, states, np.zeros(len(states))
    # zeta given s = +1 at the midpoints of 80 equal shares of its distribution; one value given s = -1.
    shares = torch.linspace(0.0, 1.0, 161, dtype=torch.float64)[1::2]
    up = smoothing.emit(torch.ones_like(shares), shares).numpy()
    choices = [(-1.0, -1.0, 0.0), *((1.0, zeta, -math.log(len(up))) for zeta in up)]
    rows = list(itertools.product(choices, repeat=prior.n_spins))
    hard, zeta, log_width = (np.array([[unit[k] for unit in row] for row in rows]) for k in range(3))
    return hard, zeta, log_width.sum(1)


def log_likelihood(model: QBMSCVI, tensors, zeta: np.ndarray) -> np.ndarray:
    """``log p(x | zeta)``, shape ``(n_codes, n_cells)``, a latent library size summed over a grid."""
    module, n_cells = model.module, len(tensors["X"])
    _, ql, library = posterior_of(model, tensors)
    repeated = {key: value.repeat(len(zeta), 1) for key, value in tensors.items() if isinstance(value, torch.Tensor)}
    z = torch.from_numpy(zeta).float().repeat_interleave(n_cells, dim=0)

    def decode(log_library):
        inputs = module._get_generative_input(repeated, {"z": z, "library": log_library.repeat(len(zeta), 1)})
        with torch.no_grad():
            outputs = module.generative(**inputs)
        return outputs["px"].log_prob(repeated["X"]).double().sum(1).view(-1, n_cells).numpy(), outputs["pl"]

    if ql is None:
        return decode(library)[0]
    values = []
    grid, width = np.linspace(-6, 6, 121, retstep=True)
    for node in grid:
        log_library = ql.loc + node * ql.scale
        log_px, pl = decode(log_library)
        log_pl = stats.norm(pl.loc[:n_cells], pl.scale[:n_cells]).logpdf(log_library).ravel()
        values.append(log_px + log_pl + np.log(width * ql.scale.numpy()).ravel())
    return special.logsumexp(values, axis=0)


def log_posterior(qz, s: np.ndarray) -> np.ndarray:
    """``log q(s | x)`` of hard codes, shape ``(n_codes, n_cells)``."""
    return -np.logaddexp(0.0, -s[:, None] * qz.logits.double().numpy()).sum(-1)


@lru_cache
def oracle(name: str):
    """Log likelihood and ELBO of each cell, and its exact log posterior over all codes."""
    model = trained(name)
    tensors = batch_of(model)
    qz, ql, _ = posterior_of(model, tensors)
    hard, zeta, log_width = codes_of(model)
    log_px = log_likelihood(model, tensors, zeta)
    log_joint = log_px + (log_prior(model, hard) + log_width)[:, None]
    evidence = special.logsumexp(log_joint, axis=0)
    log_q = log_posterior(qz, hard) + log_width[:, None]
    elbo = None
    if ql is None:
        elbo = (np.exp(log_q) * (log_joint - log_q)).sum(0)
        np.testing.assert_allclose(np.exp(log_q).sum(0), 1.0, atol=1e-5)
    return evidence, elbo, log_joint - evidence


def judge(values, errors, exact) -> float:
    """Largest |z|, rounding of float32 sums (1e-3 nats at most) granted."""
    return float(np.max((np.abs(np.asarray(values) - exact) - 1e-3).clip(0) / np.asarray(errors)))


@each_case
def test_marginal_likelihood_is_the_sum_over_all_states(name):
    model = trained(name)
    exact, _, _ = oracle(name)
    scvi.settings.seed = 1
    values, errors = model.get_marginal_ll(
        indices=ROWS, n_mc_samples=16_000, n_mc_samples_per_pass=2000, return_mean=False, return_error=True
    )
    assert float(errors.max()) < 0.15
    assert judge(values, errors, exact) < MAX_Z


def test_mean_of_the_marginal_likelihood_weighs_cells_and_not_batches():
    model = trained("spins")
    exact, _, _ = oracle("spins")
    arguments = {"indices": ROWS, "n_mc_samples": 4000, "n_mc_samples_per_pass": 1500, "batch_size": 4}
    mean, error = model.get_marginal_ll(**arguments, return_error=True)
    assert abs(mean - exact.mean()) < MAX_Z * error
    assert abs(model.module.marginal_ll(batch_of(model), 4000, return_mean=True) - exact.mean()) < MAX_Z * error
    loader = [batch_of(model, ROWS[:4]), batch_of(model, ROWS[4:])]
    assert abs(model.get_marginal_ll(dataloader=loader, n_mc_samples=4000) - exact.mean()) < MAX_Z * error
    of_batches = 0.5 * (exact[:4].mean() + exact[4:].mean())
    assert abs(of_batches - exact.mean()) > MAX_Z * error


def test_marginal_likelihood_of_a_labeled_model_sums_over_the_cell_types():
    adata = register()
    QBMSCANVI.setup_anndata(adata, "cell_type", "unknown", batch_key="batch")
    scvi.settings.seed = 0
    model = QBMSCANVI(adata, n_latent=4, n_hidden_spins=0, n_hidden=8, n_chains=64, gene_likelihood="nb")
    model.train(max_epochs=10, accelerator="cpu", enable_progress_bar=False, plan_kwargs={"lr": 0.01})
    prior, tensors = model.module.prior, batch_of(model)
    with torch.no_grad():
        prior.J.copy_(0.5 * torch.randn(prior.J.shape, generator=torch.Generator().manual_seed(5)))
    problem, states = prior.to_ising(), spin_states(4)
    assert model.update_log_z().method == "exact"
    types = 2 * torch.eye(prior.n_labels) - 1
    energies = [
        problem.energy(torch.cat([s.expand(len(types), -1), types], 1)) for s in torch.from_numpy(states).float()
    ]
    log_p = np.array([float(torch.logsumexp(-e, 0)) for e in energies]) - exact_log_z(problem)
    exact = special.logsumexp(log_likelihood(model, tensors, states) + log_p[:, None], axis=0)
    values, errors = model.get_marginal_ll(indices=ROWS, n_mc_samples=2000, return_mean=False, return_error=True)
    assert float(errors.max()) < 0.15
    assert judge(values, errors, exact) < MAX_Z
    assert len(model.get_active_units()) == 4
    assert np.isfinite(model.get_kl()).all()


@over(
    ("arguments", "error", "match"),
    [
        pytest.param({"n_mc_samples": 0}, ValueError, "n_mc_samples=0", id="no-samples"),
        pytest.param({"n_mc_samples": 1, "return_error": True}, ValueError, "at least 2", id="one-has-no-error"),
        pytest.param({"n_mc_samples_per_pass": 2.5}, TypeError, "must be an integer", id="fraction"),
        pytest.param({"dataloader": []}, ValueError, "Both `adata` and `dataloader`", id="two-sources"),
    ],
)
def test_marginal_likelihood_refuses(arguments, error, match):
    model = trained("spins")
    with pytest.raises(error, match=match):
        model.get_marginal_ll(model.adata, **arguments)


def test_scvis_own_formula_and_a_wrong_log_z_miss_the_sum():
    """The gate has power."""
    model = trained("spins")
    exact, _, _ = oracle("spins")
    _, errors = model.get_marginal_ll(indices=ROWS, n_mc_samples=4000, return_mean=False, return_error=True)
    assert judge(exact + 0.2, errors, exact) > MAX_Z
    inherited = VAE.marginal_ll(model.module, batch_of(model), 4000, n_mc_samples_per_pass=500)
    assert judge(inherited, errors, exact) > MAX_Z


@each_case
def test_elbo_is_that_of_enumeration_and_below_the_likelihood(name):
    model = trained(name)
    evidence, exact, _ = oracle(name)
    scvi.settings.seed = 2
    draws = model.get_elbo(indices=ROWS * 150, return_mean=False).double().numpy().reshape(150, -1)
    mean, error = draws.mean(0), draws.std(0, ddof=1) / math.sqrt(len(draws)) + 1e-9
    if exact is None:  # a latent library size: sum over spins, quadrature over its posterior
        exact = enumerated_elbo_with_library(model)
    assert judge(mean, error, exact) < MAX_Z
    assert (exact <= evidence + 1e-6).all()
    assert (mean <= evidence + MAX_Z * error).all()
    assert (evidence - exact).max() > 0.01  # the two differ: the distribution above is no identity


def enumerated_elbo_with_library(model):
    tensors = batch_of(model)
    qz, ql, _ = posterior_of(model, tensors)
    states = spin_states(model.module.prior.n_spins)
    q = np.exp(log_posterior(qz, states))
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    n_cells = len(ROWS)
    repeated = {key: value.repeat(len(states), 1) for key, value in tensors.items() if isinstance(value, torch.Tensor)}
    z = torch.from_numpy(states).float().repeat_interleave(n_cells, dim=0)
    total = np.zeros(n_cells)
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        log_library = (ql.loc + node * ql.scale).repeat(len(states), 1)
        with torch.no_grad():
            out = model.module.generative(
                **model.module._get_generative_input(repeated, {"z": z, "library": log_library})
            )
        log_px = out["px"].log_prob(repeated["X"]).double().sum(1).view(-1, n_cells).numpy()
        total += weight * (q * log_px).sum(0)
    pl = torch.distributions.Normal(out["pl"].loc[:n_cells], out["pl"].scale[:n_cells])
    kl_spins = (q * (np.log(q) - log_prior(model, states)[:, None])).sum(0)
    return total - kl_spins - kl_divergence(ql, pl).sum(-1).numpy()


def test_kl_is_the_sum_over_all_states_and_its_shares_add_up():
    model = trained("spins")
    qz, _, _ = posterior_of(model, batch_of(model))
    states = spin_states(6)
    log_q = log_posterior(qz, states)
    exact = (np.exp(log_q) * (log_q - log_prior(model, states)[:, None])).sum(0)
    np.testing.assert_allclose(model.get_kl(indices=ROWS), exact, atol=1e-3)
    shares = model.get_kl(indices=ROWS, per_unit=True)
    assert shares.shape == (len(ROWS), 6)
    np.testing.assert_allclose(shares.sum(1), exact, atol=1e-3)


def test_minified_cells_have_the_same_kl():
    """The posterior rebuilt from stored means and variances is the posterior."""
    model = trained("spins")
    tensors = batch_of(model)
    mean, variance = (torch.from_numpy(a) for a in model.get_latent_representation(indices=ROWS, return_dist=True))
    qz = model.module._cached_inference(mean, variance, tensors["X"].sum(1, keepdim=True))["qz"]
    with torch.no_grad():
        kl = kl_divergence(qz, model.module.prior.distribution()).sum(-1)
    np.testing.assert_allclose(kl, model.get_kl(indices=ROWS), atol=1e-4)


def test_units_without_information_are_reported():
    adata = register()
    model = QBMSCVI(adata, n_latent=3, n_hidden=8, n_chains=16)
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    with torch.no_grad():
        weight = model.module.z_encoder.logit_encoder.weight
        weight[1:] *= 20.0
        weight[0] = 0.0
    table = model.get_active_units()
    mean = model.get_latent_representation(representation="mean")
    np.testing.assert_allclose(table["mean_var"], mean.astype(float).var(0), rtol=1e-5, atol=1e-9)
    assert table.index.tolist() == ["s0", "s1", "s2"]
    assert table["is_active"].tolist() == (table["mean_var"] > 0.01).tolist()
    assert not table.loc["s0", "is_active"]
    assert table.loc[["s1", "s2"], "is_active"].any()
    assert not model.get_active_units(threshold=np.inf)["is_active"].any()


# Importance weights --------------------------------------------------------------------------------------------------


def draw_codes(model, n_draws):
    tensors = batch_of(model)
    qz, _, _ = posterior_of(model, tensors)
    torch.manual_seed(3)
    hard = qz.sample((n_draws,))
    return qz, hard, model.module.z_encoder.z_transformation(hard)


def exact_log_weights(name, qz, hard, zeta):
    """log of sum_n p(z | x_n) / sum_n q(z | x_n), normalized over the draws."""
    model = trained(name)
    evidence, _, _ = oracle(name)
    hard, zeta = (a.reshape(-1, a.shape[-1]).double().numpy() for a in (hard, zeta))
    log_joint = log_likelihood(model, batch_of(model), zeta) + log_prior(model, hard)[:, None]
    log_weights = special.logsumexp(log_joint - evidence, axis=1) - special.logsumexp(log_posterior(qz, hard), axis=1)
    return log_weights - special.logsumexp(log_weights)


@pytest.mark.parametrize("name", ["spins", "spins-covariates-poisson", "latent-library", "spike-exponential"])
def test_importance_weights_are_ratios_of_enumerated_posteriors(name):
    """Errors of the estimated p(x_n), 0.02 at most here, are all that is granted; cells are of both batches."""
    model = trained(name)
    assert len(set(model.adata.obs["batch"].iloc[ROWS])) == 2
    qz, hard, zeta = draw_codes(model, 50)
    weights = model.get_importance_weights(
        model.adata, np.array(ROWS), qz, None, zeta, n_mc_samples=20_000, n_mc_samples_per_pass=2000
    )
    exact = exact_log_weights(name, qz, hard, zeta)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert np.ptp(exact) > 0.5  # uniform weights would fail
    np.testing.assert_allclose(np.log(weights), exact, atol=0.06)


def test_truncated_weights_lose_their_peaks_only():
    model = trained("spins")
    qz, _, zeta = draw_codes(model, 50)
    arguments = {"n_mc_samples": 2000, "n_mc_samples_per_pass": 2000}
    zeta[:, 1:] = zeta[:1, :1]  # copies of one code share the bulk; the draws of one cell stand out
    scvi.settings.seed = 4
    plain = model.get_importance_weights(model.adata, ROWS, qz, None, zeta, **arguments)
    scvi.settings.seed = 4
    truncated = model.get_importance_weights(model.adata, ROWS, qz, None, zeta, truncation=True, **arguments)
    limit = plain.mean() * math.sqrt(len(plain))
    expected = np.minimum(plain, limit)
    np.testing.assert_allclose(truncated, expected / expected.sum(), rtol=1e-6)


def test_importance_weights_use_at_most_the_anchors_asked_for(monkeypatch):
    model = trained("spins")
    qz, _, zeta = draw_codes(model, 2)
    seen = []

    def marginal_ll(adata, indices, *args, **kwargs):
        seen.append(indices)
        return torch.zeros(len(indices))

    monkeypatch.setattr(model, "get_marginal_ll", marginal_ll)
    model.get_importance_weights(model.adata, ROWS, qz, None, zeta, max_cells=4)
    (anchors,) = seen
    assert len(set(anchors.tolist())) == 4
    assert set(anchors.tolist()) <= set(ROWS)


def exact_expression(model, rows):
    """Mean of the normalized expression over the exact posteriors of the population."""
    _, _, log_p = oracle("spins")
    tensors = batch_of(model)
    states, _, _ = codes_of(model)
    repeated = {key: value.repeat(len(states), 1) for key, value in tensors.items() if isinstance(value, torch.Tensor)}
    z = torch.from_numpy(states).float().repeat_interleave(len(rows), dim=0)
    library = tensors["X"].sum(1, keepdim=True).log().repeat(len(states), 1)
    with torch.no_grad():
        px = model.module.generative(**model.module._get_generative_input(repeated, {"z": z, "library": library}))["px"]
    scale = px.scale.double().view(len(states), len(rows), N_GENES).numpy()
    return np.einsum("kn,kng->g", np.exp(log_p), scale) / len(rows)


def test_importance_weighted_expression_is_that_of_the_true_posterior():
    """Off by less than a fifth of what uniform weights are off by."""
    model = trained("spins")
    exact = exact_expression(model, ROWS)
    scvi.settings.seed = 5
    arguments = {"indices": ROWS, "n_samples_overall": 24_000, "return_numpy": True}
    weighted = model.get_normalized_expression(weights="importance", n_mc_samples=4000, **arguments).mean(0)
    uniform = model.get_normalized_expression(weights="uniform", **arguments).mean(0)

    assert np.abs(weighted - exact).max() < 0.2 * np.abs(uniform - exact).max()


def test_importance_weighted_differential_expression_compares_true_posteriors():
    model = trained("spins")
    exact = exact_expression(model, ROWS)
    scvi.settings.seed = 6
    table = model.differential_expression(
        idx1=ROWS,
        idx2=list(range(20, 26)),
        weights="importance",
        importance_weighting_kwargs={"n_mc_samples": 1000, "max_cells": 6},
        n_samples_overall=3000,
        mode="change",
        silent=True,
    ).loc[model.adata.var_names]
    uniform = model.get_normalized_expression(indices=ROWS, n_samples_overall=5000, return_numpy=True).mean(0)

    assert np.abs(table["scale1"] - exact).max() < 0.3 * np.abs(uniform - exact).max()


# Aggregated posterior ------------------------------------------------------------------------------------------------


def explicit_mixture(qz, m):
    """Log mass of the equal mixture of the cells' posteriors, at hard or mean spins."""
    means = torch.tanh(0.5 * qz.logits).double().numpy()
    return special.logsumexp(np.log(0.5 * (1.0 + m[:, None] * means)).sum(-1), axis=1) - math.log(len(means))


@pytest.mark.parametrize("dof", [None, 3.0])
def test_aggregated_posterior_is_the_mixture_of_the_cells(dof):
    model = trained("spins")
    qz, _, _ = posterior_of(model, batch_of(model))
    states = spin_states(6)
    mixture = model.get_aggregated_posterior(indices=np.array(ROWS), dof=dof)
    log_mass = mixture.log_prob(torch.from_numpy(states).float())
    np.testing.assert_allclose(log_mass, explicit_mixture(qz, states), atol=1e-3)
    torch.manual_seed(7)
    draws = mixture.sample((20_000,)).double()
    z = (draws.mean(0) - mixture.mean) / (mixture.variance / len(draws)).sqrt()
    assert float(z.abs().max()) < MAX_Z
    np.testing.assert_allclose(draws.var(0), mixture.variance, rtol=0.05)


def test_aggregated_posterior_sums_to_one_and_is_an_expected_mass_at_mean_spins(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)  # as after torch.compile
    model = trained("spins")
    states = spin_states(model.module.prior.n_spins)
    mixture = model.get_aggregated_posterior()
    log_mass = mixture.log_prob(torch.from_numpy(states).float()).double().numpy()
    assert np.exp(log_mass).sum() == pytest.approx(1.0, abs=1e-5)
    means = model.get_latent_representation(indices=ROWS)
    q = np.prod(0.5 * (1.0 + states[:, None] * means.astype(float)), axis=2)
    np.testing.assert_allclose(mixture.log_prob(torch.from_numpy(means)), np.log(np.exp(log_mass) @ q), atol=1e-4)
    for nobody in (None, np.array([], dtype=int)):
        assert torch.equal(model.get_aggregated_posterior(indices=nobody).mean, mixture.mean)
    with pytest.raises(ValueError, match="within the support"):
        mixture.log_prob(torch.full((6,), 1.5))


def test_differential_abundance_holds_the_mixture_of_each_sample_at_each_cell():
    model = trained("spins")
    model.differential_abundance(sample_key="batch")
    table = model.adata.obsm["da_log_probs"]
    m = model.get_latent_representation(representation="mean").astype(float)
    for sample in ("batch_0", "batch_1"):
        rows = np.flatnonzero(model.adata.obs["batch"] == sample).tolist()
        qz, _, _ = posterior_of(model, batch_of(model, rows))
        np.testing.assert_allclose(table[sample], explicit_mixture(qz, m), atol=1e-3)


# log Z of a model ----------------------------------------------------------------------------------------------------


def small_model(**arguments) -> QBMSCVI:
    adata = register()
    scvi.settings.seed = 0
    return QBMSCVI(adata, n_hidden=8, **{"n_chains": 64, **SPINS, **arguments})


def test_log_z_is_estimated_where_training_did_not_and_kept_where_it_did(tmp_path):
    model = small_model()
    assert not model.module.prior.is_log_z_estimated
    before = exact_log_z(model.module.prior.to_ising())
    assert model.get_log_z().interval == pytest.approx((before, before), abs=1e-4)
    model.train(max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    exact = exact_log_z(model.module.prior.to_ising())
    estimate = model.get_log_z()
    assert estimate.method == "exact"
    assert (estimate.value, estimate.lower, estimate.upper) == pytest.approx((exact,) * 3, abs=1e-4)
    annealed = model.update_log_z(method="ais", n_chains=32, n_steps=20)
    assert model.get_log_z() == annealed
    assert annealed.method == "ais"
    assert annealed.interval[0] < exact < annealed.interval[1]
    model.save(tmp_path / "model")
    assert QBMSCVI.load(tmp_path / "model", model.adata).get_log_z() == model.get_log_z()


def test_interrupted_training_leaves_no_stale_error():
    model = small_model()
    model.get_log_z()

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.train(max_epochs=3, accelerator="cpu", enable_progress_bar=False, callbacks=[Stop()])
    assert not model.module.prior.is_log_z_estimated
    assert model.get_log_z().value == pytest.approx(exact_log_z(model.module.prior.to_ising()), abs=1e-4)


class Watch(Callback):
    """log Z at every batch of validation, beside the exact one of the parameters of then."""

    def __init__(self):
        self.passes, self.exact = [], []

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.passes.append([])
            self.exact.append(exact_log_z(pl_module.module.prior.to_ising()))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not trainer.sanity_checking:
            self.passes[-1].append(float(pl_module.module.prior.log_z))


def test_validation_sees_one_log_z_and_its_elbo_is_get_elbo():
    """The ELBO of the last pass is that of the trained model, of which log Z is exact: within 4 standard errors."""
    model, watch = small_model(n_latent=8, n_chains=1024), Watch()
    options = {"check_val_every_n_epoch": 1, "train_size": 0.5, "validation_size": 0.5, "batch_size": 16}
    model.train(max_epochs=8, accelerator="cpu", enable_progress_bar=False, callbacks=[watch], **options)
    assert [len(set(batches)) for batches in watch.passes] == [1] * 8
    assert {len(batches) for batches in watch.passes} == {3}
    np.testing.assert_allclose([batches[0] for batches in watch.passes], watch.exact, atol=0.02)
    rows = list(model.validation_indices)
    elbo = -model.get_elbo(indices=rows * 50, return_mean=False).double().reshape(50, -1)
    error = float(elbo.std(0).norm()) / len(rows)
    logged = float(model.history["elbo_validation"].iloc[-1, 0])
    assert abs(logged - float(elbo.mean())) < MAX_Z * error + 0.02
