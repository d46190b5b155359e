"""Every method that QBMSCVI inherits from SCVI, on a model whose spins are decided, against values summed over codes.

The model has eight spins, so that every expectation over its latent space is a sum of 256 terms. The oracle takes
networks and parameters from the model, and nothing else: densities are written out anew, in numpy and float64.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from oracles import Distribution, binomial_p_value, state_table
from scipy import special, stats
from scvi import REGISTRY_KEYS
from scvi.criticism import PosteriorPredictiveCheck
from scvi.external import SOLO
from scvi.model import SCVI
from tables import over
from test_surface import SURFACE, methods_of

from qbmscvi import QBMSCANVI, QBMSCVI
from qbmscvi.datasets import synthetic_counts

FIT = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}
ROWS = np.arange(3, 1_000, 25)  # forty cells of both batches
N = len(ROWS)
SE = 4.5  # standard errors of a mean that a check allows; alpha 7e-6

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Oracle:
    """Densities of some cells at all codes; all logs are natural."""

    codes: np.ndarray  # (n_codes, n_spins)
    logits: np.ndarray  # (n_cells, n_spins)
    log_q: np.ndarray  # (n_cells, n_codes)
    log_p: np.ndarray  # (n_codes,)
    log_px: np.ndarray  # (n_cells, n_codes), of the counts given the code
    rate: np.ndarray  # (n_cells, n_codes, n_genes)
    scale: np.ndarray  # (n_cells, n_codes, n_genes)
    theta: np.ndarray  # (n_genes,)

    @classmethod
    @torch.no_grad()
    def of(cls, model, rows=ROWS):
        module, adata = model.module, model.adata
        x = torch.tensor(adata.X[rows].toarray(), dtype=torch.float32)
        batch = torch.tensor(adata.obs["_scvi_batch"].to_numpy()[rows].astype(int))[:, None]
        encoder = module.z_encoder
        logits = encoder.logit_encoder(encoder.encoder(torch.log1p(x))).double().numpy()
        distribution = Distribution.boltzmann(model.get_ising_model())
        codes = state_table(model.module.prior.n_visible)
        # Hidden spins come last and change fastest in the table of all states.
        log_p = np.log(distribution.probabilities.reshape(len(codes), -1).sum(1))
        library = x.sum(1, keepdim=True).log()
        z = torch.tensor(codes, dtype=torch.float32)
        scale, rate = [], []
        for b, size in zip(batch, library, strict=True):
            decoded = module.decoder("gene", z, size.expand(len(z), 1), b.expand(len(z), 1))
            scale.append(decoded[0].double().numpy())
            rate.append(decoded[2].double().numpy())
        theta = module.px_r.exp().double().numpy()
        scale, rate = np.stack(scale), np.stack(rate)
        counts = x.double().numpy()[:, None, :]
        return cls(
            codes,
            logits,
            special.log_expit(logits[:, None, :] * codes).sum(-1),
            log_p,
            stats.nbinom.logpmf(counts, theta, theta / (theta + rate)).sum(-1),
            rate,
            scale,
            theta,
        )

    @property
    def means(self):
        return np.tanh(self.logits / 2)

    @property
    def reconstruction(self):
        return (np.exp(self.log_q) * self.log_px).sum(1)

    @property
    def kl(self):
        return (np.exp(self.log_q) * (self.log_q - self.log_p)).sum(1)

    @property
    def log_likelihood(self):
        return special.logsumexp(self.log_px + self.log_p, axis=1)

    @property
    def log_posterior(self):
        return self.log_px + self.log_p - self.log_likelihood[:, None]

    def expect(self, values):
        """Mean over the posterior of each cell, of values of shape (n_cells, n_codes, ...)."""
        return np.einsum("nz,nz...->n...", np.exp(self.log_q), values)


@pytest.fixture(scope="module")
def oracle(trained):
    return Oracle.of(trained)


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "model"
    trained.save(folder, save_anndata=True)
    return folder


@pytest.fixture
def other(saved):
    """A copy of the model that a test may change."""
    return QBMSCVI.load(saved)


def assert_mean(draws, expected):
    """Assert that draws of shape (n_draws, n_cells, ...) have these means, to within their standard errors.

    Cells are summed with weights of their own: sums of many draws are normal, and cells that are mixed up are found.
    """
    weights = np.random.default_rng(0).normal(size=N)
    draws, expected = np.einsum("n,kn...->k...", weights, draws), np.einsum("n,n...->...", weights, expected)
    error = draws.std(0, ddof=1) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(0) - expected) < SE * error + 1e-4 * np.abs(expected) + 1e-6)


# The table -----------------------------------------------------------------------------------------------------------

CHECKS = {}


def check(function):
    """Enter a check of the method that its name says."""
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


def test_every_method_of_scvi_has_a_check():
    assert methods_of(SCVI) <= set(CHECKS)
    assert set(CHECKS) <= set(SURFACE)


@pytest.mark.parametrize("method", sorted(SURFACE))
def test_inherited_methods_on_a_trained_model(method, trained, oracle, other, tmp_path):
    if not hasattr(SCVI, method):
        pytest.skip("of another version of scvi-tools")
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - scvi-tools draws from it
    takes = CHECKS[method].__code__.co_varnames[: CHECKS[method].__code__.co_argcount]
    given = {"trained": trained, "oracle": oracle, "other": other, "tmp_path": tmp_path}
    CHECKS[method](**{name: given[name] for name in takes})


@check
def check___init__(trained):
    assert trained.is_trained
    adata = trained.adata.copy()
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    fresh = QBMSCVI(adata, n_latent=4)
    with pytest.raises(RuntimeError, match="untrained"):
        fresh.get_latent_representation()


# Densities


@check
def check_get_latent_representation(trained, oracle):
    by_hand = {
        "logits": oracle.logits,
        "mean": oracle.means,
        "angles": np.arcsin(oracle.means),
        "bits": (oracle.logits > 0).astype(float),
    }
    for representation, expected in by_hand.items():
        z = trained.get_latent_representation(indices=ROWS, representation=representation)
        np.testing.assert_allclose(z, expected, rtol=1e-4, atol=2e-3)  # arcsin has an infinite slope at one
    np.testing.assert_array_equal(
        trained.get_latent_representation(indices=ROWS), trained.get_latent_representation()[ROWS]
    )
    mean, variance = trained.get_latent_representation(indices=ROWS, return_dist=True)
    np.testing.assert_allclose(mean, oracle.means, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, 1 / np.cosh(oracle.logits / 2) ** 2, rtol=1e-3)
    draws = [trained.get_latent_representation(indices=ROWS, give_mean=False) for _ in range(100)]
    assert set(np.unique(draws)) == {-1.0, 1.0}
    ups = (np.array(draws) > 0).sum(0)
    assert binomial_p_value(ups, 100, special.expit(oracle.logits)).min() > 1e-6  # of 320


@check
def check_get_elbo(trained, oracle):
    values = np.stack([trained.get_elbo(indices=ROWS, return_mean=False).numpy() for _ in range(80)])
    assert_mean(values, oracle.reconstruction - oracle.kl)
    assert_mean(np.stack([trained.get_kl(indices=ROWS) for _ in range(80)]), oracle.kl)


@check
def check_get_reconstruction_error(trained, oracle):
    values = [trained.get_reconstruction_error(indices=ROWS, return_mean=False) for _ in range(80)]
    values = np.stack([value["reconstruction_loss"].numpy() for value in values])
    assert_mean(values, -oracle.reconstruction)


@check
def check_get_marginal_ll(trained, oracle):
    value, error = trained.get_marginal_ll(indices=ROWS, n_mc_samples=4_000, return_mean=False, return_error=True)
    assert (np.abs(value.numpy() - oracle.log_likelihood) < SE * error.numpy() + 1e-3).all()
    assert (value.numpy() > oracle.reconstruction - oracle.kl - 0.02).all()
    assert trained.get_marginal_ll(indices=ROWS, n_mc_samples=500) == pytest.approx(
        oracle.log_likelihood.mean(), abs=0.05
    )


@check
def check_get_aggregated_posterior(trained, oracle):
    mixture = trained.get_aggregated_posterior(indices=ROWS)
    found = mixture.log_prob(torch.tensor(oracle.codes, dtype=torch.float32)).numpy()
    np.testing.assert_allclose(found, special.logsumexp(oracle.log_q, axis=0) - np.log(N), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(mixture.mean, oracle.means.mean(0), atol=1e-5)
    assert trained.get_aggregated_posterior(indices=[]).component_distribution.batch_shape[0] == 1_000


def expected_masses(means, of_sample):
    """Log of the mass that the mixture of posteriors of these mean spins gives to spins of some means."""
    factors = 0.5 * (1.0 + means[:, None, :] * of_sample[None])
    return special.logsumexp(np.log(factors).sum(-1), axis=1) - np.log(len(of_sample))


@check
def check_differential_abundance(other):
    cells = other.adata[::4].copy()
    means = Oracle.of(other, np.arange(0, 1_000, 4)).means
    assert np.abs(means).max() > 0.9
    for arguments in ({}, {"batch_size": np.int64(77), "dof": 3.0}):
        other.differential_abundance(cells, sample_key="batch", **arguments)
        found = cells.obsm["da_log_probs"]
        assert list(found.index) == list(cells.obs_names)
        assert set(found.columns) == {"batch_0", "batch_1"}
        for sample in found.columns:
            rows = np.flatnonzero(cells.obs["batch"] == sample)
            np.testing.assert_allclose(found[sample], expected_masses(means, means[rows]), rtol=1e-3, atol=5e-3)
    # a subset is compared with whole samples, and cells of no sample belong to none
    part = cells[:9].copy()
    other.differential_abundance(cells, sample_key="batch", adata_sub=part)
    np.testing.assert_allclose(part.obsm["da_log_probs"], found.iloc[:9], rtol=1e-5)
    cells.obs["donor"] = cells.obs["batch"].astype(object)
    cells.obs.loc[cells.obs_names[:9], "donor"] = None
    other.differential_abundance(cells, sample_key="donor", num_cells_posterior=50)
    found = cells.obsm["da_log_probs"]
    assert set(found.columns) == {"batch_0", "batch_1"}
    assert np.isfinite(found.to_numpy()).all()
    with pytest.raises(ValueError, match="'patient'.*'batch'"):
        other.differential_abundance(sample_key="patient")
    with pytest.raises(ValueError, match="dataloader.*sample_key"):
        other.differential_abundance(sample_key="batch", dataloader=[])


def off_by(model, logits):
    """The same model with an encoder that is off in every logit: its posterior is not the true one."""
    with torch.no_grad():
        model.module.z_encoder.logit_encoder.bias += logits
    return model


ONE_BATCH = slice(0, 30)


@check
def check_get_importance_weights(other):
    rows = np.flatnonzero(other.adata.obs["batch"] == "batch_0")[ONE_BATCH]
    exact = Oracle.of(off_by(other, 1.0), rows)
    expected = special.logsumexp(exact.log_posterior, axis=0) - special.logsumexp(exact.log_q, axis=0)
    qz = other.module.inference(
        **other.module._get_inference_input(next(iter(other._make_data_loader(other.adata, rows))))
    )["qz"]
    mask = pd.Series(np.isin(np.arange(1_000), rows), index=other.adata.obs_names)
    found = other.get_importance_weights(
        None, mask, qz, None, torch.tensor(exact.codes, dtype=torch.float32), n_mc_samples=20_000
    )
    assert found.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(found, special.softmax(expected), rtol=0.1, atol=1e-4)


# Expression


@check
def check_get_normalized_expression(trained, oracle, other):
    genes = list(trained.adata.var_names)
    found = trained.get_normalized_expression(indices=ROWS, n_samples=400, return_mean=False)
    assert_mean(found, oracle.expect(oracle.scale))
    table = trained.get_normalized_expression(indices=ROWS[:1], library_size=np.float32(1e4), gene_list="gene_1")
    assert list(table.columns) == ["gene_1"]
    assert list(table.index) == [trained.adata.obs_names[ROWS[0]]]
    whole = trained.get_normalized_expression(indices=ROWS, library_size=1e4)
    np.testing.assert_allclose(whole.sum(1), 1e4, rtol=1e-4)
    latent = trained.get_normalized_expression(indices=ROWS, library_size="latent", n_samples=400, return_mean=False)
    assert_mean(latent, oracle.expect(oracle.rate))
    for batch in ("batch_0", pd.Series(["batch_0", "batch_1"])):
        moved = trained.get_normalized_expression(indices=ROWS, transform_batch=batch, n_samples=400, return_mean=False)
        of_batch = []
        for name in np.atleast_1d(batch):
            cell = np.flatnonzero(trained.adata.obs["batch"].to_numpy()[ROWS] == name)[0]
            of_batch.append(np.broadcast_to(oracle.scale[cell], oracle.scale.shape))
        assert_mean(moved, oracle.expect(np.mean(of_batch, axis=0)))
    check_draws_of_a_population(other)
    draws = trained.get_normalized_expression(indices=ROWS, n_samples_overall=7, gene_list=pd.Index(genes[:3]))
    assert draws.shape == (7, 3)
    assert list(draws.columns) == genes[:3]


def check_draws_of_a_population(model, n_draws=18_000):
    """Importance weights turn draws of posteriors into draws of true posteriors."""
    rows = np.flatnonzero(model.adata.obs["batch"] == "batch_0")[ONE_BATCH]
    exact = Oracle.of(off_by(model, 1.0), rows)
    proposal, target = (np.exp(log).mean(0) for log in (exact.log_q, exact.log_posterior))  # (n_codes,)
    direction = (target - proposal) @ exact.scale[0]
    score = exact.scale[0] @ direction / np.linalg.norm(direction)
    shift = (target - proposal) @ score
    arguments = {"indices": rows, "n_samples_overall": n_draws, "return_numpy": True}
    for weights, distribution in (("uniform", proposal), ("importance", target)):
        more = {"n_mc_samples": 20_000} if weights == "importance" else {}
        draws = model.get_normalized_expression(weights=weights, **arguments, **more) @ direction
        squares = (score - distribution @ score) ** 2
        # Draws are resampled from a pool of as many: variance of the weighted pool, and of resampling.
        error = np.sqrt(((distribution**2 / proposal) @ squares + distribution @ squares) / n_draws)
        if abs(shift) < 2 * SE * error:
            pytest.fail("there is no difference to be seen")  # no AssertionError: no fault was found
        assert abs(draws.mean() / np.linalg.norm(direction) - distribution @ score) < SE * error


@check
def check_get_likelihood_parameters(trained, oracle):
    found = trained.get_likelihood_parameters(indices=ROWS, n_samples=400)
    assert_mean(found["mean"], oracle.expect(oracle.rate))
    np.testing.assert_allclose(found["dispersions"][0, 0], oracle.theta, rtol=1e-4)
    averaged = trained.get_likelihood_parameters(indices=[int(ROWS[0])], n_samples=5, give_mean=True)
    assert averaged["mean"].shape == averaged["dispersions"].shape == (1, 40)


@check
def check_posterior_predictive_sample(trained, oracle):
    counts = trained.posterior_predictive_sample(indices=ROWS, n_samples=100).todense()
    assert (counts == np.rint(counts)).all()
    assert_mean(np.moveaxis(counts, -1, 0), oracle.expect(oracle.rate))
    few = trained.posterior_predictive_sample(indices=ROWS, gene_list=pd.Series(["gene_3", "gene_1"]))
    assert few.shape == (N, 2)
    assert trained.posterior_predictive_sample(indices=ROWS, gene_list="gene_1").shape == (N, 1)


@check
def check_get_feature_correlation_matrix(trained, oracle):
    """Of gamma draws of mean 1,000 times the normalized expression, whose variance is their squared mean by theta."""
    found = trained.get_feature_correlation_matrix(
        indices=pd.Series(ROWS), n_samples=np.int64(400), correlation_type="pearson"
    )
    weight = np.exp(oracle.log_q) / N
    mean = 1e3 * np.einsum("nz,nzg->g", weight, oracle.scale)
    second = 1e6 * np.einsum("nz,nzg,nzh->gh", weight, oracle.scale, oracle.scale)
    second += np.diag(1e6 * np.einsum("nz,nzg->g", weight, oracle.scale**2) / oracle.theta)
    covariance = second - np.outer(mean, mean)
    expected = covariance / np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert list(found.columns) == list(found.index) == list(trained.adata.var_names)
    np.testing.assert_allclose(found, expected, atol=0.06)
    ranks = trained.get_feature_correlation_matrix(transform_batch=["batch_0", "batch_1"], n_samples=2)
    np.testing.assert_allclose(np.diag(ranks), 1.0)


@check
def check_differential_expression(trained, oracle):
    cells = trained.adata.obs_names
    mask = pd.Series(np.isin(np.arange(1_000), ROWS[:20]), index=cells)
    shuffled = mask.sample(frac=1.0, random_state=0)
    for idx1 in (ROWS[:20], list(ROWS[:20]), mask, shuffled, list(mask), mask.astype("boolean")):
        table = trained.differential_expression(idx1=idx1, idx2=ROWS[20:], silent=True, n_samples_overall=4_000)
        table = table.loc[trained.adata.var_names]
        counts = trained.adata.X[ROWS].toarray()
        np.testing.assert_allclose(table["raw_mean1"], counts[:20].mean(0), rtol=1e-5)
        mean, square = oracle.expect(oracle.scale), oracle.expect(oracle.scale**2)
        for name, part in (("scale1", slice(0, 20)), ("scale2", slice(20, N))):
            expected = mean[part].mean(0)
            error = np.sqrt((square[part].mean(0) - expected**2) / 4_000)
            # resampled from one pool of as many draws: twice the variance
            assert (np.abs(table[name] - expected) < 1.5 * SE * error).all()
    types = list(trained.adata.obs["cell_type"].unique())
    for arguments in (
        {"group1": np.str_(types[0]), "mode": "change", "delta": np.float32(0.3)},
        {"group1": pd.Series(types[:1]), "filter_outlier_cells": True},
        {
            "group1": pd.Index(types[:1]),
            "batch_correction": True,
            "batchid1": "batch_0",
            "batchid2": np.str_("batch_0"),
        },
        {
            "group1": types[:1],
            "weights": "importance",
            "importance_weighting_kwargs": {"n_mc_samples": np.int64(10), "max_cells": np.int64(20)},
        },
    ):
        table = trained.differential_expression(groupby="cell_type", silent=True, **arguments)
        key = "lfc_mean" if "mode" in arguments else "bayes_factor"
        assert np.isfinite(table[key]).all()
        shares = trained.adata.to_df().apply(lambda row: row / row.sum(), axis=1)
        shares = shares.groupby(trained.adata.obs["cell_type"].to_numpy() == types[0]).mean()
        observed = np.log(shares.loc[True]) - np.log(shares.loc[False])
        agreement = stats.spearmanr(table[key].loc[trained.adata.var_names], observed)
        assert agreement.statistic > 0
        assert agreement.pvalue < 1e-3


@check
def check_get_latent_library_size(trained):
    found = trained.get_latent_library_size(indices=ROWS, give_mean=False)
    np.testing.assert_allclose(found.ravel(), trained.adata.X[ROWS].sum(1).A1, rtol=1e-5)
    with pytest.raises(RuntimeError, match="library size"):
        trained.get_latent_library_size()


@check
def check_get_batch_representation(trained):
    with pytest.raises(KeyError, match="Embedding batch not found"):
        trained.get_batch_representation()  # batches are one-hot
    model = small(batch_representation="embedding")
    found = model.get_batch_representation(indices=pd.Series(range(9)))
    weight = model.module.get_embedding(REGISTRY_KEYS.BATCH_KEY).weight.detach().numpy()
    np.testing.assert_array_equal(found, weight[model.adata.obs["_scvi_batch"].to_numpy()[:9].astype(int)])


# State


def assert_same_model(first, second):
    """Assert that two models are equal: parameters, chains, log Z, history, and what they give."""
    one, two = first.module.state_dict(), second.module.state_dict()
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name].cpu(), two[name].cpu())] == []
    assert first.is_trained == second.is_trained
    assert first.history.keys() == second.history.keys()
    pd.testing.assert_frame_equal(first.history["elbo_train"], second.history["elbo_train"])
    assert first.get_log_z() == second.get_log_z()
    np.testing.assert_array_equal(first.get_latent_representation(), second.get_latent_representation())
    elbos = []
    for model in (first, second):
        torch.manual_seed(0)
        elbos.append(float(model.get_elbo()))
    assert elbos[0] == elbos[1]


@check
def check_save(trained, tmp_path):
    trained.save(tmp_path / "m")
    assert_same_model(QBMSCVI.load(tmp_path / "m", adata=trained.adata), trained)


@check
def check_load(trained, other):
    assert_same_model(other, trained)


@check
def check_convert_legacy_save(trained, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    torch.save(trained.module.state_dict(), old / "model_params.pt")
    np.savetxt(old / "var_names.csv", trained.adata.var_names.to_numpy().astype(str), fmt="%s")
    trained.save(tmp_path / "m")
    attributes = torch.load(tmp_path / "m" / "model.pt", weights_only=False)["attr_dict"]
    (old / "attr.pkl").write_bytes(pickle.dumps(attributes))
    QBMSCVI.convert_legacy_save(old, new)
    assert_same_model(QBMSCVI.load(new, adata=trained.adata), trained)


@check
def check_to_device(trained, other):
    other.to_device("cpu")
    assert_same_model(other, trained)


@check
def check_train(other):
    before = other.get_latent_representation()
    n_epochs = len(other.history["train_loss"])
    other.train(**{**FIT, "max_epochs": np.int64(2)}, batch_size=np.int64(100), train_size=np.float32(0.8))
    assert len(other.history["train_loss"]) == n_epochs + 2
    assert np.abs(other.get_latent_representation() - before).max() > 0
    assert bool(other.module.prior.is_log_z_estimated)


@check
def check_minify_adata(other):
    representations = ("angles", "mean", "logits")
    before = [other.get_latent_representation(representation=name) for name in representations]
    expression = seeded(lambda: other.get_normalized_expression(n_samples=2))
    other.differential_abundance(sample_key="batch")
    abundance = other.adata.obsm["da_log_probs"]
    other.adata.obsm["X_latent_qzm"], other.adata.obsm["X_latent_qzv"] = other.get_latent_representation(
        return_dist=True
    )
    other.minify_adata()
    for name, expected in zip(representations, before, strict=True):
        np.testing.assert_allclose(other.get_latent_representation(representation=name), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(seeded(lambda: other.get_normalized_expression(n_samples=2)), expression, rtol=1e-3)
    other.differential_abundance(sample_key="batch")
    np.testing.assert_allclose(other.adata.obsm["da_log_probs"], abundance, rtol=1e-3, atol=1e-3)


def seeded(function):
    torch.manual_seed(5)
    return function()


@check
def check_load_query_data(trained):
    for n_cells in (1, 2, 129):
        data = trained.adata[:n_cells].copy()
        data.obs["batch"] = "new"
        query = QBMSCVI.load_query_data(data, trained)
        assert len(query.registry["field_registries"]["batch"]["state_registry"]["categorical_mapping"]) == 3
        if n_cells > 1:
            query.train(**FIT, plan_kwargs={"weight_decay": 0.0})
            assert query.get_latent_representation().shape == (n_cells, 8)
            query.differential_abundance(sample_key="cell_type")
        for name, value in trained.module.prior.state_dict().items():
            assert torch.equal(value, query.module.prior.state_dict()[name]), name
        # cells of the reference, as its own batches, stay where they were
        query.is_trained_ = True
        np.testing.assert_allclose(
            query.get_latent_representation(trained.adata[ROWS].copy()),
            trained.get_latent_representation(indices=ROWS),
            atol=0.05,
        )


@check
def check_prepare_query_anndata(trained):
    query = trained.adata[:20, trained.adata.var_names[::-1]][:, 5:].copy()
    QBMSCVI.prepare_query_anndata(query, trained)
    assert list(query.var_names) == list(trained.adata.var_names)
    assert query.X[:, -5:].sum() == 0
    assert list(QBMSCVI.prepare_query_anndata(query, trained, return_reference_var_names=True)) == list(query.var_names)
    assert np.isfinite(trained.get_latent_representation(query)).all()


@check
def check_prepare_query_mudata(trained):
    with pytest.raises(AttributeError):
        QBMSCVI.prepare_query_mudata(None, trained)  # has several modalities, and neither SCVI nor QBMSCVI has them


# Registration


@check
def check_setup_anndata(trained):
    adata = trained.adata.copy()
    QBMSCVI.setup_anndata(adata, batch_key="batch", labels_key="cell_type")
    np.testing.assert_array_equal(
        trained.get_latent_representation(adata, indices=ROWS), trained.get_latent_representation(indices=ROWS)
    )


@check
def check_register_manager(other):
    manager = other.adata_manager
    other.register_manager(manager)
    assert other.get_anndata_manager(other.adata) is manager


@check
def check_deregister_manager(other):
    copied = other.adata.copy()
    QBMSCVI.setup_anndata(copied, batch_key="batch")
    QBMSCVI(copied)
    other.deregister_manager(copied)
    with pytest.raises(ValueError, match="setup_anndata first"):
        QBMSCVI(copied)


@check
def check_get_anndata_manager(trained):
    assert trained.get_anndata_manager(trained.adata, required=True) is trained.adata_manager


@check
def check_transfer_fields(trained):
    adata = trained.adata[:50].copy()
    trained.transfer_fields(adata)
    assert trained.get_anndata_manager(adata) is not None


@check
def check_get_from_registry(trained):
    counts = trained.get_from_registry(trained.adata, REGISTRY_KEYS.X_KEY)
    assert (counts != trained.adata.X).nnz == 0


@check
def check_data_registry(trained):
    found = trained.data_registry(REGISTRY_KEYS.BATCH_KEY)
    np.testing.assert_array_equal(found.ravel(), trained.adata.obs["_scvi_batch"])


@check
def check_get_setup_arg(trained):
    assert trained.get_setup_arg("batch_key") == "batch"


@check
def check_get_state_registry(trained):
    mapping = trained.get_state_registry(REGISTRY_KEYS.BATCH_KEY).categorical_mapping
    assert list(mapping) == ["batch_0", "batch_1"]


@check
def check_get_var_names(trained):
    assert list(trained.get_var_names()) == list(trained.adata.var_names)


@check
def check_update_setup_method_args(other):
    other.update_setup_method_args({"layer": "counts"})
    assert other.get_setup_arg("layer") == "counts"


@check
def check_load_registry(trained, tmp_path):
    trained.save(tmp_path / "m")
    assert QBMSCVI.load_registry(tmp_path / "m")["model_name"] == "QBMSCVI"


@check
def check_view_anndata_setup(trained):
    trained.view_anndata_setup(hide_state_registries=True)


@check
def check_view_registry(trained):
    trained.view_registry(hide_state_registries=True)


@check
def check_view_setup_args(trained, tmp_path):
    trained.save(tmp_path / "m")
    QBMSCVI.view_setup_args(tmp_path / "m")


@check
def check_view_setup_method_args(trained):
    trained.view_setup_method_args()


@check
def check_setup_annbatch(trained):
    with pytest.raises((TypeError, ValueError, ImportError, FileNotFoundError)):
        QBMSCVI.setup_annbatch(collection_path="nowhere")  # reads collections on disk that annbatch writes


# Planted faults ------------------------------------------------------------------------------------------------------


def test_angles_in_place_of_means_are_found(other, monkeypatch):
    original = QBMSCVI.get_latent_representation

    def angles(self, *args, **kwargs):
        return np.clip(original(self, *args, **{**kwargs, "representation": "angles"}), -1.0, 1.0)

    monkeypatch.setattr(QBMSCVI, "get_latent_representation", angles)
    with pytest.raises(AssertionError):
        check_differential_abundance(other)


def test_importance_weights_that_are_ignored_are_found(other, monkeypatch):
    def uniform(self, adata, indices, qz, px, zs, **kwargs):
        return np.full(zs.numel() // zs.shape[-1], zs.shape[-1] / zs.numel())

    monkeypatch.setattr(QBMSCVI, "get_importance_weights", uniform)
    torch.manual_seed(1)
    with pytest.raises(AssertionError):
        check_draws_of_a_population(other)


LOST = {
    "chains": lambda model: model.module.prior.chains.neg_(),
    "couplings": lambda model: model.module.prior.J.data.zero_(),
    "log-z": lambda model: model.module.prior.log_z.add_(0.1),
    "log-z-error": lambda model: model.module.prior.log_z_scale.add_(0.1),
    "batch-statistics": lambda model: model.module.decoder.px_decoder.fc_layers[0][1].running_mean.zero_(),
    "history": lambda model: model.history_.pop("elbo_train"),
}


@pytest.mark.parametrize("part", LOST)
def test_state_that_is_lost_is_found(trained, other, part):
    LOST[part](other)
    with pytest.raises(AssertionError):
        assert_same_model(other, trained)


# Other models, other parts of scvi-tools ------------------------------------------------------------------------------


def small(cls=QBMSCVI, n_cells=150, **kwargs):
    adata = synthetic_counts(n_cells, 30, seed=3)
    adata.obs["group"] = np.where(np.arange(n_cells) % 2, "odd", "even")
    if cls is QBMSCANVI:
        cls.setup_anndata(adata, "cell_type", adata.obs["cell_type"].iloc[0], batch_key="batch")
    else:
        cls.setup_anndata(adata, batch_key="batch")
    torch.manual_seed(3)
    model = cls(adata, **{"n_hidden": 16, "n_latent": 6, "n_chains": 16, **kwargs})
    model.train(**FIT)
    return model


GENERIC = {  # methods that read cells: all of them take any kind of rows
    "get_latent_representation": lambda model, **kw: model.get_latent_representation(**kw),
    "get_elbo": lambda model, **kw: model.get_elbo(return_mean=False, **kw),
    "get_reconstruction_error": lambda model, **kw: model.get_reconstruction_error(return_mean=False, **kw)[
        "reconstruction_loss"
    ],
    "get_marginal_ll": lambda model, **kw: model.get_marginal_ll(return_mean=False, n_mc_samples=np.int64(4), **kw),
    "get_kl": lambda model, **kw: model.get_kl(**kw),
    "get_prior_energy": lambda model, **kw: model.get_prior_energy(**kw),
    "get_normalized_expression": lambda model, **kw: model.get_normalized_expression(**kw),
    "get_likelihood_parameters": lambda model, **kw: model.get_likelihood_parameters(**kw)["mean"],
    "posterior_predictive_sample": lambda model, **kw: model.posterior_predictive_sample(**kw).todense(),
    "get_latent_library_size": lambda model, **kw: model.get_latent_library_size(give_mean=False, **kw),
    "get_aggregated_posterior": lambda model, **kw: model.get_aggregated_posterior(**kw).component_distribution.mean,
    "get_prior_modes": lambda model, **kw: (
        model.get_prior_modes(label_key="group", seed=np.int64(2), **kw).mode_of_cell
    ),
    "get_spin_programs": lambda model, **kw: model.get_spin_programs(seed=np.int64(2), **kw)["log2_fold_change"],
}
CHOSEN = np.array([4, 7, 90, 33, 12])
AS_IN_ORDER = np.isin(np.arange(150), CHOSEN)


def kinds(adata):
    mask = pd.Series(AS_IN_ORDER, index=adata.obs_names)
    return {
        "array": CHOSEN,
        "list": CHOSEN.tolist(),
        "list-of-numpy": list(CHOSEN),
        "tuple": tuple(CHOSEN),
        "index": pd.Index(CHOSEN),
        "series": pd.Series(CHOSEN, index=list("abcde")),
        "nullable": pd.Series(CHOSEN).astype("Int64"),
        "unsigned": CHOSEN.astype(np.uint8),
        "tensor": torch.tensor(CHOSEN),
        "mask": AS_IN_ORDER,
        "mask-list": AS_IN_ORDER.tolist(),
        "mask-series": mask,
        "mask-series-shuffled": mask.sample(frac=1.0, random_state=1),
        "mask-series-of-numbers": pd.Series(AS_IN_ORDER),
        "mask-nullable": mask.astype("boolean"),
    }


@pytest.fixture(scope="module")
def latent_library():
    return small()


@over("method", GENERIC)
def test_rows_may_be_of_any_kind(latent_library, method):
    model = latent_library
    for name, indices in kinds(model.adata).items():
        rows = np.sort(CHOSEN) if name.startswith("mask") else CHOSEN
        torch.manual_seed(0)
        expected = np.asarray(GENERIC[method](model, indices=np.asarray(rows)))
        torch.manual_seed(0)
        found = np.asarray(GENERIC[method](model, indices=indices, batch_size=np.int64(128)))
        np.testing.assert_array_equal(found, expected, err_msg=name)


@over("method", GENERIC)
def test_one_cell_is_enough(latent_library, method):
    for indices in ([5], np.int64(5), 5, np.arange(150) == 5):
        found = np.asarray(GENERIC[method](latent_library, indices=indices))
        assert np.isfinite(found).all()


@over("method", GENERIC)
def test_rows_that_are_none_are_refused(latent_library, method):
    with pytest.raises(ValueError, match=r"7 values for 150 cells"):
        GENERIC[method](latent_library, indices=np.ones(7, dtype=bool))
    with pytest.raises(TypeError, match=r"row numbers|mask"):
        GENERIC[method](latent_library, indices=list(latent_library.adata.obs_names[:3]))


def test_settings_of_training_may_be_numpys(latent_library):
    model = QBMSCVI(
        latent_library.adata,
        n_latent=np.int64(8),
        n_hidden_spins=np.int32(5),
        n_hidden=np.int64(8),
        n_layers=np.int64(1),
        dropout_rate=np.float32(0.1),
        n_chains=np.int64(16),
    )
    model.train(
        max_epochs=np.int64(2),
        devices=np.int64(1),
        batch_size=np.int64(50),
        train_size=np.float32(0.8),
        validation_size=np.float32(0.1),
        early_stopping=np.bool_(True),
        early_stopping_patience=np.int64(1),
        check_val_every_n_epoch=np.int64(1),
        gradient_clip_val=np.float32(1.0),
        accumulate_grad_batches=np.int64(2),
        datasplitter_kwargs={"drop_last": np.bool_(True)},
        trainer_config={"log_every_n_steps": np.int64(1)},
        plan_kwargs={"lr": np.float32(1e-3), "prior_lr": np.float64(1e-4), "n_epochs_kl_warmup": np.int64(1)},
        accelerator="cpu",
        enable_progress_bar=np.bool_(False),
    )
    assert model.is_trained
    assert model.generate(np.uint8(5), seed=np.int64(3)).shape == (5, 30)
    np.testing.assert_array_equal(model.sample_prior(np.int64(4), seed=np.int64(3)), model.sample_prior(4, seed=3))
    estimate = model.update_log_z(method="ais", n_chains=np.int64(8), n_steps=np.int64(9), seed=np.int64(2))
    assert estimate == model.update_log_z(method="ais", n_chains=8, n_steps=9, seed=2)


def test_labels_are_predicted_for_rows_of_any_kind():
    model = small(QBMSCANVI)
    whole = model.predict(soft=True)
    for name, indices in kinds(model.adata).items():
        rows = np.sort(CHOSEN) if name.startswith("mask") else CHOSEN
        found = model.predict(indices=indices, soft=np.bool_(True), batch_size=np.int64(2))
        pd.testing.assert_frame_equal(found, whole.iloc[rows], obj=name, rtol=1e-4)


def test_a_model_of_labels_decodes_expression():
    model = small(QBMSCANVI)
    moved = model.get_normalized_expression(transform_batch="batch_0", n_samples=2)
    assert np.isfinite(moved.to_numpy()).all()
    table = model.differential_expression(groupby="group", group1="odd", silent=True)
    assert np.isfinite(table["bayes_factor"]).all()
    assert model.get_feature_correlation_matrix(n_samples=2).shape == (30, 30)


@pytest.mark.parametrize(
    ("gene_likelihood", "dispersion"),
    [("poisson", "gene"), ("normal", "gene-batch"), ("nb", "gene"), ("nb", "gene-cell"), ("zinb", "gene-batch")]
    + [("zinb", "gene-cell")],
)
def test_every_likelihood_has_parameters_and_correlations(gene_likelihood, dispersion):
    model = small(gene_likelihood=gene_likelihood, dispersion=dispersion)
    names = {"poisson": {"mean"}, "zinb": {"mean", "dispersions", "dropout"}}.get(
        gene_likelihood, {"mean", "dispersions"}
    )
    for n_samples in (1, 3):
        parameters = model.get_likelihood_parameters(indices=[4, 2], n_samples=n_samples)
        assert set(parameters) == names
        for values in parameters.values():
            assert values.shape[-2:] == (2, 30)
        matrix = model.get_feature_correlation_matrix(n_samples=n_samples, transform_batch=["batch_0", "batch_1"])
        np.testing.assert_allclose(np.diag(matrix), 1.0)
        assert np.isfinite(matrix.to_numpy()).all()
    averaged = model.get_likelihood_parameters(n_samples=3, give_mean=True)
    assert averaged["mean"].shape == (150, 30)
    torch.manual_seed(0)
    mean = model.get_likelihood_parameters()["mean"]
    torch.manual_seed(0)
    np.testing.assert_allclose(mean, model.get_normalized_expression(library_size="latent"), rtol=1e-5)
    draws = model.get_normalized_expression(n_samples_overall=9, weights="importance", n_mc_samples=5)
    assert draws.shape == (9, 30)


def test_poisson_expression_is_correlated_as_decoded():
    model = small(gene_likelihood="poisson")
    torch.manual_seed(0)
    found = model.get_feature_correlation_matrix(n_samples=3, correlation_type="pearson", batch_size=150)
    torch.manual_seed(0)
    draws = model.get_normalized_expression(n_samples=3, return_mean=False, batch_size=150)
    np.testing.assert_allclose(found, np.corrcoef(draws.reshape(-1, 30), rowvar=False), atol=1e-4)


def test_batch_embeddings_take_several_draws():
    model = small(batch_representation="embedding", gene_likelihood="nb", dispersion="gene-batch")
    many = model.get_normalized_expression(indices=[3, 9], n_samples=300, return_mean=False)
    single = [model.get_normalized_expression(indices=[3, 9]).to_numpy() for _ in range(300)]
    difference = many.mean(0) - np.mean(single, axis=0)
    error = np.sqrt((many.var(0) + np.var(single, axis=0)) / 300)
    assert (np.abs(difference) < SE * error + 1e-7).all()
    assert model.posterior_predictive_sample(n_samples=3).shape == (150, 30, 3)
    one = model.get_marginal_ll(n_mc_samples=200, n_mc_samples_per_pass=1, return_mean=False, return_error=True)
    ten = model.get_marginal_ll(n_mc_samples=200, n_mc_samples_per_pass=10, return_mean=False, return_error=True)
    assert ((one[0] - ten[0]).abs() < SE * (one[1] + ten[1]) + 1.0).all()


def test_doublets_and_predictive_checks_work_on_a_trained_model(trained):
    solo = SOLO.from_scvi_model(trained, restrict_to_batch="batch_0")
    solo.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    assert len(solo.predict()) == (trained.adata.obs["batch"] == "batch_0").sum()
    dense = trained.adata.copy()
    dense.X = dense.X.toarray()
    checks = PosteriorPredictiveCheck(dense, {"m": trained}, n_samples=2, indices=ROWS)
    checks.coefficient_of_variation("cells")
    (table,) = checks.metrics.values()
    assert np.isfinite(table["m"]).all()
