"""Cells on demand: the conditional prior against enumeration, and where batch, type, covariates and size come from.

Models are not trained: what is generated has to follow whatever prior and decoder there are. Each cell of the data has
a total of its own, so that a library size names the cell that it was drawn from.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from oracles import ALPHA, Distribution, assert_follows, binomial_p_value, energy_table, judge, state_table
from tables import over

from qbmscvi import QBMSCANVI, QBMSCVI
from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.labeled_prior import LabeledPrior
from qbmscvi.datasets import synthetic_counts

N_CELLS, N_GENES, N_SPINS = 240, 30, 5
TYPES = ("B", "NK", "T")
DONORS = ("d0", "d1", "d2")
COVARIATES = {"categorical_covariate_keys": ["donor", "plate"], "continuous_covariate_keys": ["age", "dose"]}
MAX_Z = 5.0  # exceeded by one standard normal once in 1.7 million


@pytest.fixture(scope="module")
def counts():
    """Not registered. A third of the cells is in batch b1, which has no T cells."""
    rng = np.random.default_rng(0)
    adata = synthetic_counts(N_CELLS, N_GENES, seed=3)
    X = np.zeros((N_CELLS, N_GENES), dtype=np.float32)
    X[:, 0] = 100 + np.arange(N_CELLS)
    adata.X = X
    adata.obs = pd.DataFrame(index=adata.obs_names)
    adata.obs["run"] = np.where(np.arange(N_CELLS) % 3 == 0, "b1", "b0")
    adata.obs["type"] = np.where(adata.obs["run"] == "b1", rng.choice(TYPES[:2], N_CELLS), rng.choice(TYPES, N_CELLS))
    adata.obs["known"] = np.where(rng.random(N_CELLS) < 0.7, adata.obs["type"], "Unknown")
    adata.obs["donor"] = rng.choice(DONORS, N_CELLS)
    adata.obs["plate"] = rng.choice([3, 7], N_CELLS)
    adata.obs["age"] = rng.normal(size=N_CELLS).astype(np.float32)
    adata.obs["dose"] = rng.normal(size=N_CELLS).astype(np.float32)
    return adata


def build(counts, setup=None, model_class=QBMSCVI, **arguments):
    """Model with every parameter of prior and decoder away from its start."""
    adata = counts.copy()
    labels = {"labels_key": "known", "unlabeled_category": "Unknown"} if model_class is QBMSCANVI else {}
    model_class.setup_anndata(adata, **{"batch_key": "run", **labels, **(setup or {})})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = model_class(adata, n_latent=N_SPINS, n_hidden=16, n_chains=16, gene_likelihood="poisson", **arguments)
        for parameter in model.module.prior.parameters():
            parameter.copy_(0.6 * torch.randn_like(parameter))
        for parameter in model.module.decoder.px_decoder.parameters():
            parameter.mul_(3.0)
    return model


@pytest.fixture(scope="module")
def plain(counts):
    return build(counts)


@pytest.fixture(scope="module")
def covered(counts):
    """With two covariates of either kind."""
    return build(counts, COVARIATES)


@pytest.fixture(scope="module")
def annotated(counts):
    return build(counts, model_class=QBMSCANVI)


# ---------------------------------------------------------------------------------------------------------------------
# Latent variables of a type
# ---------------------------------------------------------------------------------------------------------------------


def labels_up(label: int) -> np.ndarray:
    return np.where(np.arange(len(TYPES)) == label, 1, -1)


def distribution_of_latent_spins(prior, label: int | None) -> Distribution:
    """Distribution of the latent spins given a type, or of all states: all else is summed out."""
    h, J = (p.detach().double().numpy() for p in (prior.h, prior.J))
    states = state_table(prior.n_spins)
    pairs = states[:, prior.graph.edges[:, 0]] * states[:, prior.graph.edges[:, 1]] @ J
    weights = np.exp(-states @ h - pairs)
    if label is not None:
        weights = weights * (states[:, -len(TYPES) :] == labels_up(label)).all(1)
    weights = weights.reshape(2**N_SPINS, -1).sum(1)  # the latent spins change slowest
    return Distribution(state_table(N_SPINS), -np.log(weights), weights / weights.sum())


def test_clamped_prior_has_the_energies_of_the_joint_problem():
    """Exact, the constant included, for the labels alone and for what `unclamped` makes of the states."""
    torch.manual_seed(2)
    prior = LabeledPrior(graphs.bipartite(2, 3), len(TYPES), n_chains=16).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(0.6 * torch.randn_like(parameter))
    joint, all_states = prior.to_ising(), state_table(prior.n_spins)
    for label in range(len(TYPES)):
        problem = prior.clamped(label)
        rows = (all_states[:, N_SPINS:] == labels_up(label)).all(1)
        np.testing.assert_allclose(energy_table(problem), energy_table(joint)[rows], atol=1e-12)
        whole = prior.unclamped(torch.from_numpy(state_table(N_SPINS)), label)
        np.testing.assert_array_equal(whole, all_states[rows])


@pytest.mark.parametrize("sampler", ["gibbs", "exact"])
def test_cells_of_a_type_follow_the_conditional_distribution(annotated, sampler):
    """Chi-square, moments and energy at alpha = 1e-4; the gate sees another type, and no type."""
    prior = annotated.module.prior
    for label, cell_type in enumerate(TYPES):
        z = annotated.generate(8_000, cell_type=cell_type, library_size=10, sampler=sampler, seed=label).obsm["z"]
        spins = torch.from_numpy(z)
        assert_follows(spins, distribution_of_latent_spins(prior, label))
        for other in {0, 1, 2, None} - {label}:
            assert judge(spins, distribution_of_latent_spins(prior, other)).p_value < ALPHA


def test_type_of_a_cell_that_was_not_asked_for_is_the_most_probable_one(annotated):
    """By the energies of the joint distribution, written out; and the latent variables are those of `sample_prior`."""
    generated = annotated.generate(200, seed=4)
    prior = annotated.module.prior
    z = generated.obsm["z"]
    np.testing.assert_array_equal(z, annotated.sample_prior(200, seed=4))
    h, J = (p.detach().numpy() for p in (prior.h, prior.J))
    others = np.zeros((len(z), prior.n_spins - N_SPINS - len(TYPES)))  # hidden ones, which labels do not see
    energies = []
    for label in range(len(TYPES)):
        spins = np.hstack([z, others, np.tile(labels_up(label), (len(z), 1))])
        pairs = spins[:, prior.graph.edges[:, 0]] * spins[:, prior.graph.edges[:, 1]] @ J
        energies.append(spins @ h + pairs)
    expected = np.array(TYPES)[np.argmin(energies, axis=0)]
    assert len(set(expected)) > 1
    np.testing.assert_array_equal(generated.obs["known"].astype(str), expected)
    assert set(annotated.generate(5, cell_type="NK", seed=0).obs["known"]) == {"NK"}


# ---------------------------------------------------------------------------------------------------------------------
# The cells that the rest is drawn from
# ---------------------------------------------------------------------------------------------------------------------


def sources(model, generated) -> pd.DataFrame:
    """Columns of the cells that the library sizes were drawn from."""
    totals = np.asarray(model.adata.X.sum(1)).ravel()
    assert len(set(totals)) == len(totals)
    rows = pd.Series(np.arange(len(totals)), index=totals)[generated.obs["library_size"].to_numpy()]
    return model.adata.obs.iloc[rows.to_numpy()].set_axis(generated.obs_names)


def test_batches_come_in_the_proportions_of_the_cells(plain):
    """Exact binomial test at alpha = 1e-4; the gate sees equal shares. A batch that is asked for is all there is."""
    batches = plain.generate(3_000, seed=0).obs["run"]
    n, share = (batches == "b1").sum(), (plain.adata.obs["run"] == "b1").mean()
    assert binomial_p_value(n, len(batches), share) > ALPHA
    assert binomial_p_value(n, len(batches), 0.5) < ALPHA
    assert set(plain.generate(50, batch="b1", seed=0).obs["run"]) == {"b1"}


def test_batches_of_generated_cells_are_decoded(plain):
    """Counts against the decoder called by hand; the gate sees the batches swapped."""
    generated = plain.generate(3_000, library_size=500, seed=1)
    codes = (generated.obs["run"] == "b1").to_numpy().astype(int)
    assert misfit(plain, generated, codes) < MAX_Z < misfit(plain, generated, 1 - codes)


def test_library_size_and_covariates_are_those_of_one_cell_of_the_batch(covered):
    for batch in (None, "b0", "b1"):
        generated = covered.generate(400, batch=batch, seed=2)
        columns = ["run", "donor", "plate", "age", "dose"]
        source = sources(covered, generated)
        for column in columns:
            assert (generated.obs[column].to_numpy() == source[column].to_numpy()).all(), column
    assert set(covered.generate(2_000, batch="b1", seed=2).obs["library_size"]) == set(
        np.asarray(covered.adata.X.sum(1)).ravel()[(covered.adata.obs["run"] == "b1").to_numpy()]
    )


def test_covariates_that_are_not_given_come_from_the_cell_of_the_library_size(covered):
    generated = covered.generate(100, covariates={"donor": "d1", "age": np.arange(100)}, seed=2)
    source = sources(covered, generated)
    assert (generated.obs["donor"] == "d1").all()
    np.testing.assert_array_equal(generated.obs["age"], np.arange(100))
    for column in ("run", "plate", "dose"):
        np.testing.assert_array_equal(generated.obs[column].to_numpy(), source[column].to_numpy())
    assert (source["donor"] != "d1").any()


def test_library_sizes_are_those_of_batch_and_type(annotated):
    """Known labels only. No T cell is in batch b1: those of the other batch stand in."""
    for generated in (annotated.generate(300, cell_type=t, batch=b, seed=5) for t in TYPES for b in ("b0", "b1")):
        source = sources(annotated, generated)
        assert (source["known"].to_numpy() == generated.obs["known"].to_numpy()).all()
        of_source = "b0" if "T" in set(generated.obs["known"]) else generated.obs["run"].iloc[0]
        assert set(source["run"]) == {of_source}
    generated = annotated.generate(300, seed=6)
    source = sources(annotated, generated)
    assert (source["known"].to_numpy() == generated.obs["known"].to_numpy()).all()
    is_elsewhere = source["run"].to_numpy() != generated.obs["run"].to_numpy()
    np.testing.assert_array_equal(
        is_elsewhere, ((generated.obs["known"] == "T") & (generated.obs["run"] == "b1")).to_numpy()
    )


def test_where_no_cell_of_a_type_has_counts_those_of_the_batch_stand_in_and_then_any(counts):
    model = build(counts, model_class=QBMSCANVI)
    X, obs = model.adata.X, model.adata.obs
    totals = X.sum(1)

    def drawn(batch):
        return set(model.generate(2_000, cell_type="T", batch=batch, seed=0).obs["library_size"])

    X[(obs["known"] == "T").to_numpy()] = 0
    is_left = (obs["known"] != "T").to_numpy()
    for batch in ("b0", "b1"):
        assert drawn(batch) == set(totals[is_left & (obs["run"] == batch).to_numpy()])
    X[(obs["run"] == "b1").to_numpy()] = 0
    assert drawn("b1") == set(totals[is_left & (obs["run"] == "b0").to_numpy()])


def test_model_without_a_batch_key_has_no_batches(counts):
    model = build(counts, {"batch_key": None})
    generated = model.generate(50, seed=0)
    assert list(generated.obs) == ["library_size"]
    assert len(set(generated.obs["library_size"])) > 20


# ---------------------------------------------------------------------------------------------------------------------
# What the decoder gets
# ---------------------------------------------------------------------------------------------------------------------


def decode(model, generated, batch=0, donor=0, plate=0, age=None, dose=None, y=0):
    """Distribution of the counts, by the decoder called by hand, with codes instead of values."""
    n = generated.n_obs

    def column(values, dtype=torch.long):
        return torch.from_numpy(np.broadcast_to(values, n).copy()).to(dtype)[:, None]

    covariates = {}
    if age is not None:
        covariates["cat_covs"] = torch.cat([column(donor), column(plate)], dim=1)
        covariates["cont_covs"] = torch.cat([column(age, torch.float32), column(dose, torch.float32)], dim=1)
    model.module.eval()
    with torch.inference_mode():
        return model.module.generative(
            z=torch.from_numpy(generated.obsm["z"]),
            library=column(np.log(generated.obs["library_size"].to_numpy()), torch.float32),
            batch_index=column(batch),
            y=column(y),
            **covariates,
        )["px"]


def misfit(model, generated, batch=0, **given) -> float:
    """|z| of Pearson's chi-square of all counts that expect more than one; of a Poisson count it has mean 1."""
    mean = decode(model, generated, batch, **given).mean.double().numpy()
    mean, counts = mean[mean > 1], generated.X[mean > 1]
    return abs(((counts - mean) ** 2 / mean - 1).sum()) / np.sqrt((2 + 1 / mean).sum())


def test_covariates_are_decoded_by_value(covered):
    """Misfit below 5 with codes by hand; above with any one of them changed."""
    donors = np.resize(["d2", "d0", "d1", "d2"], 2_000)
    ages = np.linspace(-2, 1, 2_000)
    generated = covered.generate(
        2_000,
        batch="b1",
        covariates={"plate": 7, "age": ages, "donor": donors, "dose": 1.5},
        library_size=500,
        seed=3,
    )
    right = {
        "batch": 1,
        "donor": np.array([DONORS.index(d) for d in donors]),
        "plate": 1,
        "age": ages,
        "dose": 1.5,
    }
    assert misfit(covered, generated, **right) < MAX_Z
    faults = {"batch": 0, "donor": 0, "plate": 0, "age": ages[::-1], "dose": 0.0}
    for name, wrong in faults.items():
        assert misfit(covered, generated, **{**right, name: wrong}) > MAX_Z, name
    assert list(generated.obs["donor"]) == list(donors)
    assert set(generated.obs["plate"]) == {7}


def test_drawn_covariates_are_decoded(covered):
    generated = covered.generate(2_000, library_size=500, seed=3)
    obs = generated.obs
    right = {
        "batch": (obs["run"] == "b1").to_numpy().astype(int),
        "donor": obs["donor"].map(DONORS.index).to_numpy().astype(int),
        "plate": (obs["plate"] == 7).to_numpy().astype(int),
        "age": obs["age"].to_numpy(),
        "dose": obs["dose"].to_numpy(),
    }
    assert misfit(covered, generated, **right) < MAX_Z
    for name, values in right.items():
        assert misfit(covered, generated, **{**right, name: np.roll(values, 1)}) > MAX_Z, name


def test_dispersion_is_that_of_the_label(counts):
    """Labels of the drawn cells, or the one asked for: the likelihood of the counts is highest with these labels."""
    adata = counts.copy()
    QBMSCVI.setup_anndata(adata, batch_key="run", labels_key="type")
    model = QBMSCVI(adata, n_hidden=16, n_latent=N_SPINS, n_chains=16, gene_likelihood="nb", dispersion="gene-label")
    with torch.no_grad():
        model.module.px_r.copy_(torch.tensor([-2.0, 1.0, 4.0]).expand(N_GENES, 3))
    for cell_type in (None, *TYPES):
        generated = model.generate(500, batch="b0", cell_type=cell_type, seed=0)
        labels = generated.obs["type"].map(TYPES.index).to_numpy().astype(int)
        assert set(labels) == ({0, 1, 2} if cell_type is None else {TYPES.index(cell_type)})
        source = sources(model, generated)
        np.testing.assert_array_equal(source["type"].to_numpy(), generated.obs["type"].to_numpy())
        X = torch.from_numpy(generated.X)
        right, *wrong = (float(decode(model, generated, y=(labels + k) % 3).log_prob(X).sum()) for k in range(3))
        assert right > max(wrong) + 100.0


# ---------------------------------------------------------------------------------------------------------------------
# Seeds, data that are not there, bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell_type", [None, "B"])
def test_equal_seeds_give_equal_cells_and_leave_global_streams_alone(counts, cell_type):
    model = build(counts, COVARIATES, model_class=QBMSCANVI)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = (model.generate(60, cell_type=cell_type, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    np.testing.assert_array_equal(first.X, again.X)
    pd.testing.assert_frame_equal(first.obs, again.obs)
    for a, b in ((first.X, other.X), *((first.obs[c].to_numpy(), other.obs[c].to_numpy()) for c in ("run", "age"))):
        assert (a != b).any()


def test_generated_cells_can_be_read_by_the_model(covered):
    """Columns have the names and categories that the model was set up with."""
    generated = covered.generate(30, library_size=500, seed=0)
    assert np.isfinite(covered.get_elbo(generated, return_mean=False)).all()


def test_minified_data_give_the_same_cells(counts):
    model = build(counts, COVARIATES)
    model.is_trained_ = True
    before = model.generate(60, seed=1)
    mean, variance = model.get_latent_representation(return_dist=True)
    model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = mean, variance
    model.minify_adata()
    after = model.generate(60, seed=1)
    np.testing.assert_array_equal(before.X, after.X)
    pd.testing.assert_frame_equal(before.obs, after.obs)


def test_model_without_data_needs_what_it_cannot_draw(covered, tmp_path):
    covered.save(tmp_path / "model", save_anndata=False)
    loaded = QBMSCVI.load(tmp_path / "model")
    arguments = {"batch": "b1", "library_size": 50, "covariates": {"donor": "d1", "plate": 3, "age": 0.0, "dose": 1.0}}
    np.testing.assert_array_equal(
        loaded.generate(20, seed=0, **arguments).X, covered.generate(20, seed=0, **arguments).X
    )
    del arguments["covariates"]["plate"], arguments["library_size"]
    message = "no AnnData to draw library sizes and the covariates 'plate' from. Pass `library_size` and `covariates`"
    with pytest.raises(ValueError, match=message):
        loaded.generate(20, seed=0, **arguments)


@over(
    ("arguments", "error", "message"),
    [
        pytest.param({"cell_type": "B"}, ValueError, "cell_type='B'.*from_qbmscvi_model", id="type"),
        pytest.param(
            {"covariates": {"doner": "d1"}}, ValueError, "'doner'.*mean 'donor'.*There are: 'donor'", id="column"
        ),
        pytest.param(
            {"covariates": {"donor": "d7"}}, ValueError, "'donor': 'd7'. Use one of 'd0', 'd1'", id="category"
        ),
        pytest.param(
            {"covariates": {"plate": "3"}}, ValueError, "'plate': '3'. Use one of 3, 7", id="kind-of-category"
        ),
        pytest.param({"covariates": {"age": [1.0, 2.0]}}, ValueError, r"'age'.*\(2,\).*\(10,\)", id="length"),
        pytest.param(
            {"covariates": {"donor": ["d1"] * 9}}, ValueError, r"'donor'.*\(9,\).*\(10,\)", id="length-categories"
        ),
        pytest.param({"covariates": {"age": [0.0] * 9 + [np.nan]}}, ValueError, "'age'.*nan", id="nan"),
        pytest.param({"covariates": {"age": np.inf}}, ValueError, "'age'.*inf", id="infinite"),
        pytest.param({"covariates": {"age": "old"}}, TypeError, "'age'.*no numbers", id="text"),
        pytest.param({"covariates": ["donor"]}, TypeError, "list.*dictionary", id="no-mapping"),
        pytest.param({"batch": ["b0"]}, ValueError, "Unknown batch .*'b0', 'b1'", id="several-batches"),
    ],
)
def test_impossible_cells_are_refused(covered, arguments, error, message):
    with pytest.raises(error, match=message):
        covered.generate(10, **arguments)


@over("cell_type", ["Unknown", "b cell", 0])
def test_unknown_types_are_refused(annotated, cell_type):
    with pytest.raises(ValueError, match=f"{cell_type!r}.*'B', 'NK', 'T'"):
        annotated.generate(10, cell_type=cell_type)
