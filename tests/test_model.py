"""QBMSCVI as a user sees it: constructor, latent representation, prior samples, generated cells, inherited methods.

Numbers are checked against sums over all spin states, written out here in numpy, or against the decoder itself.
"""

from __future__ import annotations

import inspect
import itertools
from typing import get_args

import networkx as nx
import numpy as np
import pytest
import scvi
import torch
from scvi.model import SCVI
from scvi.module import VAE
from tables import corners, over

from qbmscvi import QBMSCVI, QBMVAE
from qbmscvi.boltzmann.smoothing import Gumbel, SmoothingName
from qbmscvi.datasets import synthetic_counts
from qbmscvi.samplers import ExactSampler

N_CELLS, N_GENES = 240, 60
SMOOTHINGS = get_args(SmoothingName)
REPRESENTATIONS = ("angles", "mean", "logits", "bits")

# Statistics are judged by their largest |z|. At 5 one standard normal is exceeded once in 1.7 million, so that a
# hundred of them raise a false alarm in one suite in 17,000 (seeds are fixed: in truth never or always).
MAX_Z = 5.0


def build(adata, **kwargs) -> QBMSCVI:
    return QBMSCVI(adata, **{"n_latent": 6, "n_chains": 64, **kwargs})


def train(model: QBMSCVI, **kwargs) -> QBMSCVI:
    defaults = {"max_epochs": 2, "batch_size": 64, "accelerator": "cpu", "enable_progress_bar": False}
    model.train(**{**defaults, **kwargs})
    return model


def plant_prior(model: QBMSCVI, scale: float = 0.5, seed: int = 1) -> QBMSCVI:
    """Give the prior parameters large enough that every term of the energy is seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.module.prior.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def spin_states(n_spins: int) -> np.ndarray:
    return np.array(list(itertools.product((-1.0, 1.0), repeat=n_spins)))


def parameters_of(prior) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy() for name, value in prior.named_parameters()}


def spin_energy(prior, s: np.ndarray) -> float:
    """Energy of one state, term by term from its definition."""
    p = parameters_of(prior)
    energy = p["h"] @ s
    for coupling, (i, j) in zip(p["J"], prior.graph.edges, strict=True):
        energy += coupling * s[i] * s[j]
    return float(energy)


def log_z_by_sum(prior) -> float:
    energies = np.array([spin_energy(prior, s) for s in spin_states(prior.n_spins)])
    return float(np.log(np.exp(-energies).sum()))


@pytest.fixture(scope="module")
def counts():
    """Not registered: copies of registered data share their registration."""
    adata = synthetic_counts(N_CELLS, N_GENES, seed=1)
    adata.obs["size_factor"] = np.asarray(adata.X.sum(axis=1)).ravel() / 130.0
    adata.obs["donor"] = np.resize(["d0", "d1", "d2"], N_CELLS)
    adata.obs["age"] = np.linspace(-1.0, 1.0, N_CELLS)
    adata.layers["counts"] = adata.X.copy()
    return adata


def register(counts, **setup):
    adata = counts.copy()
    QBMSCVI.setup_anndata(adata, **{"batch_key": "batch", **setup})
    return adata


@pytest.fixture(scope="module")
def adata(counts):
    """Registered with a batch key."""
    return register(counts)


@pytest.fixture(scope="module")
def model(adata):
    """Negative binomial, straight-through, complete graph, with a planted prior; not to be changed."""
    scvi.settings.seed = 0
    model = plant_prior(train(build(adata, gene_likelihood="nb", prior_graph="complete")))
    with torch.no_grad():
        model.module.z_encoder.logit_encoder.weight.mul_(4.0)  # after two epochs all mean spins are near zero
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Constructor
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_every_smoothing_trains_to_finite_deterministic_latents(adata, smoothing):
    model = train(build(adata, smoothing=smoothing))
    z = model.get_latent_representation()
    assert z.shape == (N_CELLS, 6)
    assert np.isfinite(z).all()
    assert len(np.unique(z, axis=0)) > 0.9 * N_CELLS  # cells differ
    np.testing.assert_array_equal(z, model.get_latent_representation())
    assert all(torch.isfinite(p).all() for p in model.module.parameters())
    assert np.isfinite(model.history["elbo_train"].to_numpy(dtype=float)).all()


def test_smoothing_instance_is_used_as_it_is(adata):
    smoothing = Gumbel(temperature=0.3)
    assert build(adata, smoothing=smoothing).module.z_encoder.smoothing == smoothing


@over(
    ("arguments", "n_visible", "n_hidden"),
    [
        pytest.param({}, 64, 64, id="defaults"),
        pytest.param({"n_latent": 12}, 12, 12, id="n_latent"),
        pytest.param({"n_latent": 5}, 5, 5, id="n_latent-odd"),
        pytest.param({"n_latent": 5, "n_hidden_spins": 3}, 5, 3, id="n_hidden_spins"),
        pytest.param({"n_latent": 5, "n_hidden_spins": 0}, 5, 0, id="no-hidden-spins"),
        pytest.param({"n_latent": 5, "prior_graph": "complete"}, 5, 0, id="complete"),
        pytest.param({"n_latent": 5, "prior_graph": "complete", "n_hidden_spins": 2}, 5, 2, id="complete-hidden"),
    ],
)
def test_latent_sizes_are_the_documented_ones(adata, arguments, n_visible, n_hidden):
    model = QBMSCVI(adata, **arguments)
    prior = model.module.prior
    assert (prior.n_visible, prior.n_hidden) == (n_visible, n_hidden)
    assert prior.chains.shape == (512, n_visible + n_hidden)
    model.is_trained_ = True
    assert model.get_latent_representation().shape == (N_CELLS, n_visible)


def _hidden_layers(module):
    return module.z_encoder.encoder.fc_layers


CONSTRUCTIONS = [
    *(
        pytest.param({"gene_likelihood": name}, {}, lambda module, px, cls=cls: type(px).__name__ == cls, id=name)
        for name, cls in [
            ("zinb", "SparseZeroInflatedNegativeBinomial"),
            ("nb", "SparseNegativeBinomial"),
            ("poisson", "SparsePoisson"),
            ("normal", "RebuildableNormal"),
        ]
    ),
    pytest.param({"dispersion": "gene"}, {}, lambda module, px: module.px_r.shape == (N_GENES,), id="dispersion-gene"),
    pytest.param(
        {"dispersion": "gene-batch"}, {}, lambda module, px: module.px_r.shape == (N_GENES, 2), id="dispersion-batch"
    ),
    pytest.param(
        {"dispersion": "gene-label"},
        {"labels_key": "cell_type"},
        lambda module, px: module.px_r.shape == (N_GENES, 6),
        id="dispersion-label",
    ),
    pytest.param(
        {"dispersion": "gene-cell"},
        {},
        lambda module, px: not hasattr(module, "px_r") and px.theta.std(0).min() > 0,
        id="dispersion-cell",
    ),
    pytest.param(
        {"n_layers": 2, "n_hidden": 24},
        {},
        lambda module, px: [layer[0].out_features for layer in _hidden_layers(module)] == [24, 24],
        id="two-layers",
    ),
    pytest.param(
        {"dropout_rate": 0.3}, {}, lambda module, px: _hidden_layers(module)[0][-1].p == 0.3, id="dropout_rate"
    ),
    pytest.param(
        {"batch_representation": "embedding", "batch_embedding_kwargs": {"embedding_dim": 3}},
        {},
        lambda module, px: module.get_embedding("batch").weight.shape == (2, 3),
        id="batch-embedding",
    ),
    pytest.param(
        {"batch_representation": "embedding", "encode_covariates": True},
        {},
        lambda module, px: _hidden_layers(module)[0][0].in_features > N_GENES,
        id="batch-embedding-encoded",
    ),
    pytest.param(
        {"use_observed_lib_size": False},
        {},
        lambda module, px: module.library_log_means.shape == (1, 2),
        id="modeled-library-size",
    ),
    pytest.param(
        {"encode_covariates": True},
        {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]},
        lambda module, px: _hidden_layers(module)[0][0].in_features == N_GENES + 1 + 2 + 3,
        id="covariates-encoded",
    ),
    pytest.param(
        {},
        {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]},
        lambda module, px: _hidden_layers(module)[0][0].in_features == N_GENES,
        id="covariates-decoded-only",
    ),
    pytest.param(
        {"deeply_inject_covariates": False, "n_layers": 2},
        {"categorical_covariate_keys": ["donor"]},
        lambda module, px: module.decoder.px_decoder.fc_layers[1][0].in_features == module.n_hidden,
        id="covariates-in-first-layer",
    ),
    pytest.param(
        {}, {"size_factor_key": "size_factor"}, lambda module, px: module.use_size_factor_key, id="size-factors"
    ),
    pytest.param({}, {"labels_key": "cell_type"}, lambda module, px: module.n_labels == 6, id="labels"),
    pytest.param({}, {"layer": "counts"}, lambda module, px: True, id="layer"),
    pytest.param(
        {"use_batch_norm": "none", "use_layer_norm": "both"},
        {},
        lambda module, px: not any("running_mean" in name for name, _ in module.decoder.named_buffers()),
        id="layer-norm",
    ),
    pytest.param(
        {"var_activation": torch.nn.Softplus(), "use_observed_lib_size": False},
        {},
        lambda module, px: isinstance(module.l_encoder.var_activation, torch.nn.Softplus),
        id="var_activation",
    ),
    pytest.param({"log_variational": False}, {}, lambda module, px: not module.log_variational, id="raw-input"),
    pytest.param(
        {"latent_distribution": "normal"}, {}, lambda module, px: module.prior.n_visible == 6, id="latent_distribution"
    ),
    pytest.param(
        {"extra_payload_autotune": True}, {}, lambda module, px: module.extra_payload_autotune, id="autotune-payload"
    ),
]


@pytest.mark.parametrize(("arguments", "setup", "claim"), CONSTRUCTIONS)
def test_constructor_arguments_of_scvi_keep_their_meaning(counts, arguments, setup, claim):
    own = register(counts, **setup)
    model = train(build(own, **arguments), max_epochs=1)
    assert np.isfinite(model.get_latent_representation()).all()
    assert np.isfinite(float(model.get_elbo()))
    assert np.isfinite(model.get_normalized_expression().to_numpy()).all()
    tensors = next(iter(model._make_data_loader(own, batch_size=32)))
    with torch.inference_mode():
        _, outputs = model.module(tensors, compute_loss=False)
    assert claim(model.module, outputs["px"])


# What differs from scVI in the signature: `n_latent` counts spins, not Gaussian units.
DOCUMENTED_DEFAULTS = {("__init__", "n_latent"): 64}


@over(
    "method",
    [
        "__init__",
        "setup_anndata",
        "train",
        "get_latent_representation",
        "get_elbo",
        "get_importance_weights",
        "minify_adata",
    ],
)
def test_signature_extends_that_of_scvi_by_keywords_only(method):
    theirs = inspect.signature(getattr(SCVI, method)).parameters
    ours = inspect.signature(getattr(QBMSCVI, method)).parameters
    named = [name for name, parameter in theirs.items() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    assert list(ours)[: len(named)] == named
    for name in named:
        default = DOCUMENTED_DEFAULTS.get((method, name), theirs[name].default)
        assert ours[name].default == default, name
        assert ours[name].kind == theirs[name].kind, name
    kinds = {parameter.kind for name, parameter in ours.items() if name not in theirs}
    assert kinds <= {inspect.Parameter.KEYWORD_ONLY}
    assert list(ours)[-1] == list(theirs)[-1]  # **kwargs, which passes on what is not listed


def test_module_lists_every_argument_of_scvis_module():
    # `load` and `load_query_data` rebuild modules from names of the signature; what hides in **kwargs is lost there.
    theirs = inspect.signature(VAE.__init__).parameters
    ours = inspect.signature(QBMVAE.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {name for name in theirs if ours[name].default != theirs[name].default} == {"n_latent"}
    assert not [p for p in ours.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


# ---------------------------------------------------------------------------------------------------------------------
# Graphs of the prior
# ---------------------------------------------------------------------------------------------------------------------


def test_independent_prior_has_no_couplings_before_and_after_training(adata):
    model = build(adata, prior_graph="independent")
    prior = model.module.prior
    states = {"before": [p.detach().clone() for p in prior.parameters()]}
    for moment in ("before", "after"):
        if moment == "after":
            train(model, max_epochs=3, plan_kwargs={"lr": 1e-2})
        assert prior.J.numel() == 0
        assert not model.get_ising_model().couplings().any()
        assert not any(model.get_ising_model().to_bqm().quadratic.values())
    assert not torch.equal(prior.h, states["before"][0])  # it was trained


def test_default_prior_has_couplings_that_are_trained(adata):
    model = build(adata)
    before = model.module.prior.J.detach().clone()
    train(model)
    assert before.numel() > 0
    assert bool((model.module.prior.J != before).all())


@pytest.mark.parametrize(
    ("spec", "edges"),
    [
        pytest.param("complete", list(itertools.combinations(range(4), 2)), id="complete"),
        pytest.param("bipartite", [(0, 2), (0, 3), (1, 2), (1, 3)], id="bipartite"),
        pytest.param(nx.cycle_graph(4), [(0, 1), (0, 3), (1, 2), (2, 3)], id="networkx"),
        pytest.param(nx.Graph([("d", "b"), ("b", "a"), ("a", "c")]), [(0, 1), (1, 2), (2, 3)], id="networkx-named"),
    ],
)
def test_prior_graph_decides_which_spins_are_coupled(adata, spec, edges):
    model = build(adata, prior_graph=spec, n_hidden_spins=0, n_latent=4)
    prior = model.module.prior
    assert prior.graph.edges.tolist() == [list(edge) for edge in edges]
    before = prior.J.detach().clone()
    train(model, max_epochs=1)
    assert bool((prior.J != before).all())
    expected = np.zeros((4, 4), dtype=bool)
    for i, j in edges:
        expected[i, j] = expected[j, i] = True
    np.testing.assert_array_equal(model.get_ising_model().couplings().numpy() != 0, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Latent representation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_representation_is_the_documented_reading_of_the_posterior(model, representation):
    with torch.inference_mode():
        tensors = next(iter(model._make_data_loader(model.adata, batch_size=N_CELLS)))
        qz = model.module.inference(**model.module._get_inference_input(tensors))["qz"]
    logits = qz.logits.double().numpy()
    mean = np.tanh(logits / 2)
    bits = (logits > 0).astype(float)
    expected = {"angles": np.arcsin(mean), "mean": mean, "logits": logits, "bits": bits}[representation]

    z = model.get_latent_representation(representation=representation)
    np.testing.assert_allclose(z, expected, atol=1e-6)  # float32 against float64
    np.testing.assert_array_equal(z, model.get_latent_representation(representation=representation), strict=True)
    assert z.min() >= {"angles": -np.pi / 2, "mean": -1, "logits": -np.inf, "bits": 0}[representation]
    assert z.max() <= {"angles": np.pi / 2, "mean": 1, "logits": np.inf, "bits": 1}[representation]
    assert representation != "bits" or set(np.unique(z)) <= {0.0, 1.0}
    assert z.std(axis=0).min() > 0 or representation == "bits"


def test_return_dist_gives_mean_and_variance(model):
    mean, variance = model.get_latent_representation(return_dist=True)
    np.testing.assert_array_equal(mean, model.get_latent_representation(representation="mean"))
    assert variance.shape == mean.shape
    assert variance.min() > 0
    np.testing.assert_allclose(variance, 1.0 - mean**2, atol=1e-6)


def test_draws_follow_the_posterior(adata):
    """Sums over cells and draws, per spin, against the posterior's mean and variance; |z| below 5."""
    scvi.settings.seed = 3
    model = train(build(adata), max_epochs=1)
    with torch.no_grad():  # away from the start, where the mean spins are near zero
        bias = model.module.z_encoder.logit_encoder.bias
        bias.copy_(torch.linspace(-1.5, 1.5, len(bias)))
    mean, variance = model.get_latent_representation(return_dist=True)
    n_draws = 40
    draws = np.stack([model.get_latent_representation(give_mean=False) for _ in range(n_draws)])
    assert set(np.unique(draws)) == {-1.0, 1.0}

    def largest_z(mean):
        return np.abs((draws - mean).sum((0, 1)) / np.sqrt(n_draws * variance.sum(0)))

    assert largest_z(mean).max() < MAX_Z
    assert largest_z(-mean).min() > MAX_Z  # the gate sees a wrong sign in every spin


def test_draws_are_random_and_reproducible_by_seed(model):
    def draw(seed):
        scvi.settings.seed = seed
        return model.get_latent_representation(give_mean=False)

    first = draw(0)
    np.testing.assert_array_equal(first, draw(0))
    assert (first != draw(1)).any()
    assert (first != model.get_latent_representation(give_mean=False)).any()


def test_rows_do_not_depend_on_how_cells_are_handed_over(model):
    z = model.get_latent_representation()
    rows = [7, 3, 200]
    loader = model._make_data_loader(model.adata, batch_size=50)
    # batches of another size sum in another order: equal to float32 rounding
    for name, other in {
        "indices": model.get_latent_representation(indices=rows),
        "adata": model.get_latent_representation(model.adata[rows].copy()),
        "batch_size": model.get_latent_representation(batch_size=17)[rows],
        "dataloader": model.get_latent_representation(dataloader=loader)[rows],
    }.items():
        np.testing.assert_allclose(other, z[rows], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("return_dist", [False, True])
def test_unknown_representation_is_refused(model, return_dist):
    with pytest.raises(ValueError, match="'codes'.*'angles', 'mean'"):
        model.get_latent_representation(return_dist=return_dist, representation="codes")


@pytest.mark.parametrize("method", ["get_latent_representation", "get_prior_energy"])
def test_untrained_model_is_refused(adata, method):
    with pytest.raises(RuntimeError, match="untrained"):
        getattr(build(adata), method)()


# ---------------------------------------------------------------------------------------------------------------------
# Prior: energies, Ising problem, samples
# ---------------------------------------------------------------------------------------------------------------------


def test_prior_energy_is_the_posterior_mean_of_the_energy(model):
    prior = model.module.prior
    rows = list(range(12))
    m = model.get_latent_representation(indices=rows, representation="mean").astype(float)
    expected = np.zeros(len(rows))
    for s in spin_states(prior.n_spins):
        expected += np.prod(0.5 * (1.0 + s * m), axis=1) * spin_energy(prior, s)
    energy = model.get_prior_energy(indices=rows)
    assert energy.shape == (len(rows),)
    np.testing.assert_allclose(energy, expected, rtol=1e-5, atol=1e-4)
    assert np.ptp(expected) > 0.1  # cells differ, so the comparison means something


def test_prior_energy_does_not_depend_on_how_cells_are_handed_over(model):
    whole = model.get_prior_energy()
    assert whole.shape == (N_CELLS,)
    np.testing.assert_allclose(model.get_prior_energy(batch_size=17), whole, atol=1e-4)
    np.testing.assert_allclose(model.get_prior_energy(model.adata[[5, 2]].copy()), whole[[5, 2]], atol=1e-4)


def test_bqm_energies_are_those_of_the_prior(model):
    prior = model.module.prior
    states = spin_states(prior.n_spins)
    bqm = model.get_ising_model().to_bqm()
    assert bqm.vartype.name == "SPIN"
    assert list(bqm.variables) == list(range(prior.n_spins))
    energies = bqm.energies((states.astype(np.int8), list(range(prior.n_spins))))
    expected = np.array([spin_energy(prior, s) for s in states])
    assert np.ptp(expected) > 1.0
    np.testing.assert_allclose(energies, expected, atol=1e-4)


def prior_moments(prior) -> np.ndarray:
    """Exact means of ``s_i`` and ``s_i s_j``."""
    states = spin_states(prior.n_spins)
    weights = np.exp([-spin_energy(prior, s) for s in states])
    return weights @ sample_features(states) / weights.sum()


def sample_features(s: np.ndarray) -> np.ndarray:
    i, j = np.triu_indices(s.shape[1], k=1)
    return np.hstack([s, s[:, i] * s[:, j]]).astype(float)


@pytest.mark.parametrize(
    "sampler", [pytest.param("gibbs", id="gibbs"), pytest.param(ExactSampler(), id="exact-instance")]
)
def test_prior_samples_have_the_exact_moments(model, sampler):
    """First and second moments, independent draws; |z| below 5."""
    prior = model.module.prior
    n_samples = 20_000
    z = model.sample_prior(n_samples, sampler=sampler, seed=5)
    assert z.shape == (n_samples, prior.n_visible)
    assert set(np.unique(z)) == {-1.0, 1.0}
    features, moments = sample_features(z), prior_moments(prior)
    deviation = np.abs(features.mean(0) - moments) / features.std(0) * np.sqrt(n_samples)
    assert deviation.max() < MAX_Z
    wrong = np.abs(features.mean(0) + moments) * np.sqrt(n_samples)  # the gate sees spins of the wrong sign
    assert wrong[: prior.n_spins].max() > MAX_Z


def test_prior_samples_are_reproducible_by_seed(model):
    first = model.sample_prior(50, seed=1)
    np.testing.assert_array_equal(first, model.sample_prior(50, seed=1))
    assert (first != model.sample_prior(50, seed=2)).any()
    # without a seed the global stream decides
    torch.manual_seed(0)
    unseeded = model.sample_prior(50), model.sample_prior(50)
    assert (unseeded[0] != unseeded[1]).any()
    torch.manual_seed(0)
    np.testing.assert_array_equal(unseeded[0], model.sample_prior(50))


@pytest.mark.parametrize(
    ("sampler", "method"), [("gibbs", "generate"), ("simulated_annealing", "sample_prior"), ("exact", "sample_prior")]
)
def test_global_random_state_is_untouched_when_a_seed_is_given(model, method, sampler):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    getattr(model, method)(30, sampler=sampler, seed=0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(numpy_state, after, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Generated cells
# ---------------------------------------------------------------------------------------------------------------------


def decode(model: QBMSCVI, generated, batch_code: int | np.ndarray | None = None, log_scale: np.ndarray | None = None):
    """Distribution of the counts of generated cells, from their latent variables, library sizes and batches."""
    n = generated.n_obs
    batch_code = generated.obs["batch"].cat.codes.to_numpy() if batch_code is None else batch_code
    library = np.log(generated.obs["library_size"].to_numpy()) if log_scale is None else log_scale
    library = torch.tensor(library, dtype=torch.float32)[:, None]
    column = torch.zeros(n, 1, dtype=torch.long)
    with torch.inference_mode():
        return model.module.generative(
            z=torch.tensor(generated.obsm["z"]),
            library=library,
            batch_index=column + torch.tensor(batch_code).view(-1, 1),
            y=column,
        )["px"]


def z_scores(counts: np.ndarray, px, scale: float = 1.0) -> tuple[float, float]:
    """|z| of the grand total, and the largest |z| over genes; ``scale`` plants an error in the means."""
    mean, variance = scale * px.mean.double().numpy(), px.variance.double().numpy()
    deviation = counts.astype(float) - mean
    total = abs(deviation.sum()) / np.sqrt(variance.sum())
    return total, np.abs(deviation.sum(0) / np.sqrt(variance.sum(0))).max()


@pytest.mark.parametrize("batch", [None, "batch_0", "batch_1"])
def test_generated_counts_have_the_decoders_means(model, batch):
    """Grand total and totals per gene against the negative binomial's mean and variance; |z| below 5."""
    generated = model.generate(5000, batch=batch, seed=2)  # more than one chunk
    assert generated.shape == (5000, N_GENES)
    assert list(generated.var_names) == list(model.adata.var_names)
    assert generated.obs_names.is_unique
    np.testing.assert_array_equal(generated.X, np.round(generated.X))
    assert generated.X.min() >= 0
    code = generated.obs["batch"].map({"batch_0": 0, "batch_1": 1}).to_numpy().astype(int)
    assert set(code) == ({0, 1} if batch is None else {int(batch[-1])})
    assert max(z_scores(generated.X, decode(model, generated, code))) < MAX_Z
    # The gate sees means that are 3 % off, and the other batch (swapped batches: `test_generation.py`).
    assert z_scores(generated.X, decode(model, generated, code), scale=1.03)[0] > MAX_Z
    assert batch is None or z_scores(generated.X, decode(model, generated, 1 - code))[1] > MAX_Z


def test_generated_totals_have_the_requested_mean(model):
    """The decoder's shares sum to one, so totals have mean ``library_size``; |z| below 5."""
    library_size = np.repeat([50.0, 500.0], 400)
    generated = model.generate(800, library_size=library_size, seed=4)
    np.testing.assert_array_equal(generated.obs["library_size"], library_size)
    variance = decode(model, generated).variance.double().numpy().sum(1)
    totals = generated.X.sum(1)
    for size in (50.0, 500.0):
        chosen = library_size == size
        z = (totals[chosen] - size).sum() / np.sqrt(variance[chosen].sum())
        assert abs(z) < MAX_Z
        assert (1.1 * totals[chosen] - size).sum() / np.sqrt(variance[chosen].sum()) > MAX_Z


def test_library_size_is_one_number_for_all_or_drawn_from_the_training_data(model):
    assert set(model.generate(20, library_size=123, seed=0).obs["library_size"]) == {123.0}
    observed = set(np.asarray(model.adata.X.sum(1)).ravel().tolist())
    drawn = model.generate(300, seed=0).obs["library_size"]
    assert set(drawn.tolist()) <= observed
    assert drawn.nunique() > 50


def test_generated_latents_are_prior_samples_of_the_same_seed(model):
    np.testing.assert_array_equal(model.generate(40, seed=9).obsm["z"], model.sample_prior(40, seed=9))


def test_generated_latents_have_the_exact_moments_of_the_prior(model):
    """As for `sample_prior`; |z| below 5."""
    features = sample_features(model.generate(5000, seed=9).obsm["z"])
    deviation = (features.mean(0) - prior_moments(model.module.prior)) / features.std(0)
    assert np.abs(deviation).max() * np.sqrt(5000) < MAX_Z


def test_generated_cells_are_reproducible_by_seed(model):
    first, again, other = (model.generate(40, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.X, again.X)
    assert first.obs.equals(again.obs)
    assert (first.X != other.X).any()
    torch.manual_seed(0)
    unseeded = model.generate(40)
    torch.manual_seed(0)
    np.testing.assert_array_equal(unseeded.X, model.generate(40).X)
    assert (unseeded.X != model.generate(40).X).any()


@pytest.mark.parametrize(("gene_likelihood", "smoothing"), corners(["zinb", "poisson", "normal"], SMOOTHINGS))
def test_every_likelihood_and_smoothing_generates(adata, gene_likelihood, smoothing):
    model = train(build(adata, gene_likelihood=gene_likelihood, smoothing=smoothing), max_epochs=1)
    counts = model.generate(50, seed=0).X
    assert np.isfinite(counts).all()
    assert gene_likelihood == "normal" or (counts >= 0).all()


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"use_observed_lib_size": False}, id="modeled-library-size"),
        pytest.param({"batch_representation": "embedding"}, id="batch-embedding"),
        pytest.param({"dispersion": "gene-batch"}, id="dispersion-batch"),
        pytest.param({"dispersion": "gene-cell"}, id="dispersion-cell"),
    ],
)
def test_generated_totals_are_right_in_every_decoder(adata, arguments):
    """Mean total over 400 cells against the library size; |z| below 5 by the spread of the totals themselves."""
    model = train(build(adata, gene_likelihood="nb", **arguments), max_epochs=1)
    totals = model.generate(400, library_size=200, seed=0).X.sum(1)
    assert abs(totals.mean() - 200) < MAX_Z * totals.std() / np.sqrt(400)


def test_size_factors_scale_generated_counts(counts):
    """Mean count against factor times the decoder's scale; |z| below 5."""
    own = register(counts, size_factor_key="size_factor")
    model = train(build(own, gene_likelihood="nb"))
    generated = model.generate(1000, batch="batch_0", library_size=3.0, seed=0)
    column = torch.zeros(1000, 1, dtype=torch.long)
    with torch.inference_mode():
        px = model.module.generative(
            z=torch.tensor(generated.obsm["z"]),
            library=None,
            size_factor=torch.full((1000, 1), np.log(3.0)),
            batch_index=column,
            y=column,
        )["px"]
    assert max(z_scores(generated.X, px)) < MAX_Z


def test_model_with_size_factors_generates_by_default(counts):
    own = register(counts, size_factor_key="size_factor")
    generated = train(build(own, gene_likelihood="nb")).generate(200, seed=0)
    assert np.isfinite(generated.X).all()
    factors = set(own.obs["size_factor"].astype(np.float32))
    assert set(generated.obs["library_size"]) <= factors


@over(
    ("arguments", "message"),
    [
        pytest.param({"batch": "batch_7"}, "'batch_7'.*'batch_0', 'batch_1'", id="batch"),
        pytest.param({"library_size": 0}, "library_size.*got 0", id="zero"),
        pytest.param({"library_size": -5.0}, "library_size.*got -5", id="negative"),
        pytest.param({"library_size": np.nan}, "library_size.*got nan", id="nan"),
        pytest.param(
            {"library_size": np.ones(7)},
            "library_size",
            id="length",
        ),
        pytest.param({"sampler": "annealer"}, "'annealer'.*'gibbs'", id="sampler"),
    ],
)
def test_impossible_cells_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(10, **arguments)


def test_generating_leaves_the_model_as_it_was(adata):
    model = build(adata)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    try:
        model.generate(20, seed=0)
    except RuntimeError:
        return  # refusing an untrained model would be as good
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Inherited methods
# ---------------------------------------------------------------------------------------------------------------------


def test_elbo_is_reconstruction_minus_the_exact_kl(model):
    """KL by a sum over all spin states; log Z likewise, and put where training puts its estimate."""
    prior = model.module.prior
    before = prior.log_z.clone()
    prior.log_z.fill_(log_z_by_sum(prior))
    try:
        rows = list(range(10))
        scvi.settings.seed = 7
        elbo = np.asarray(model.get_elbo(indices=rows, return_mean=False), dtype=float)
        scvi.settings.seed = 7
        errors = model.get_reconstruction_error(indices=rows, return_mean=False)["reconstruction_loss"]
        mean_elbo = float(model.get_elbo(indices=rows))
    finally:
        prior.log_z.copy_(before)
    m = model.get_latent_representation(indices=rows, representation="mean").astype(float)
    energy = model.get_prior_energy(indices=rows).astype(float)  # itself checked above
    entropy = np.zeros(len(rows))
    for sign in (-1.0, 1.0):
        p = np.clip(0.5 * (1.0 + sign * m), 1e-12, None)
        entropy -= (p * np.log(p)).sum(1)
    kl = energy - entropy + log_z_by_sum(prior)
    assert kl.min() > 0
    np.testing.assert_allclose(elbo, -np.asarray(errors, dtype=float) - kl, rtol=1e-5, atol=1e-3)
    assert np.isfinite(mean_elbo)


def test_normalized_expression_sums_to_the_library_size(model):
    expression = model.get_normalized_expression(library_size=1e4)
    assert expression.shape == (N_CELLS, N_GENES)
    np.testing.assert_allclose(expression.sum(axis=1), 1e4, rtol=1e-4)
    assert (expression.to_numpy() >= 0).all()
    other = model.get_normalized_expression(transform_batch="batch_1", n_samples=3)
    np.testing.assert_allclose(other.sum(axis=1), 1.0, rtol=1e-4)


def test_posterior_predictive_samples_are_counts(model):
    samples = model.posterior_predictive_sample(indices=list(range(30)), n_samples=4)
    assert samples.shape == (30, N_GENES, 4)
    values = samples.todense()
    np.testing.assert_array_equal(values, np.round(values))
    assert values.min() >= 0


def test_differential_expression_compares_every_group(model):
    table = model.differential_expression(groupby="cell_type", mode="change", silent=True)
    n_groups = model.adata.obs["cell_type"].nunique()
    assert len(table) == n_groups * N_GENES
    assert np.isfinite(table[["lfc_mean", "bayes_factor", "scale1", "scale2"]].to_numpy()).all()


def test_other_inherited_readings_run(model):
    rows = list(range(20))
    parameters = model.get_likelihood_parameters(indices=rows)
    assert parameters["mean"].shape == (20, N_GENES)
    matrix = model.get_feature_correlation_matrix(indices=rows, n_samples=2)
    assert np.isfinite(matrix.to_numpy()).all()
    library = model.get_latent_library_size(indices=rows, give_mean=False)
    np.testing.assert_allclose(library.ravel(), np.asarray(model.adata.X[:20].sum(1)).ravel(), rtol=1e-5)


def test_latent_of_a_module_that_returns_moments_only(model, monkeypatch):
    expected = {how: model.get_latent_representation(representation=how) for how in ("mean", "logits")}
    inference = model.module.inference

    def moments_only(*args, **kwargs):
        outputs = inference(*args, **kwargs)
        qz = outputs.pop("qz")
        return outputs | {"qzm": qz.mean, "qzv": qz.variance}

    monkeypatch.setattr(model.module, "inference", moments_only)
    for how, value in expected.items():
        found = model.get_latent_representation(representation=how)
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5)


def test_registry_can_be_viewed(model, capsys):
    # scvi-tools 1.4.2 needs rich.pretty, which rich 15 does not import on its own
    model.view_anndata_setup()
    model.adata_manager.view_registry()
    printed = capsys.readouterr().out
    assert "n_batch" in printed
    assert str(N_GENES) in printed


def test_summary_names_what_was_chosen(model):
    summary = model._model_summary_string
    for part in ("QBMSCVI", "n_latent: 6", "prior_graph: complete", "gene_likelihood: nb"):
        assert part in summary
