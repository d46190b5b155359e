"""QBMSCVI in the workflows of SCVI: minified data, query data, saving, data modules, other parts of scvi-tools.

``tests/scvi_suite.py`` runs scvi-tools' own tests of SCVI; here is what those do not test.
"""

from __future__ import annotations

import anndata
import numpy as np
import pytest
import scvi
import torch
from anndata.experimental import AnnCollection
from scvi.criticism import PosteriorPredictiveCheck
from scvi.dataloaders import CollectionAdapter, DataSplitter

from qbmscvi import QBMSCVI
from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.datasets import synthetic_counts
from qbmscvi.samplers import BlockGibbsSampler

N_CELLS, N_GENES = 100, 30
WITHOUT_COUNTS = "latent_posterior_parameters"
WITH_COUNTS = "latent_posterior_parameters_with_counts"


def fresh(batches=("batch_0", "batch_1"), **setup):
    adata = synthetic_counts(N_CELLS, N_GENES, seed=1)
    adata.obs["batch"] = np.resize(list(batches), N_CELLS)
    adata.obs["donor"] = np.resize(["d0", "d1", "d2"], N_CELLS)
    adata.obs["age"] = np.linspace(-1.0, 1.0, N_CELLS)
    adata.obs["size_factor"] = np.asarray(adata.X.sum(axis=1)).ravel() / 10.0
    adata.layers["counts"] = adata.X.copy()
    QBMSCVI.setup_anndata(adata, **{"batch_key": "batch", **setup})
    return adata


def train(model, **kwargs):
    model.train(**{"max_epochs": 1, "batch_size": 32, "accelerator": "cpu", "enable_progress_bar": False, **kwargs})
    return model


def build(adata=None, **kwargs):
    return QBMSCVI(adata, **{"n_latent": 6, "n_chains": 32, **kwargs})


def trained(setup=None, **kwargs):
    scvi.settings.seed = 0
    return train(build(fresh(**(setup or {})), **kwargs))


def saturate(model, scale=18.0):
    """Spread the logits far into saturation, where a mean spin in single precision no longer tells them."""
    with torch.no_grad():
        encoder = model.module.z_encoder.logit_encoder
        encoder.weight.mul_(scale)
        encoder.bias.copy_(torch.linspace(-scale, scale, len(encoder.bias)))
    return model


def minify(model, kind):
    mean, variance = model.get_latent_representation(return_dist=True)
    model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = mean, variance
    model.minify_adata(kind)
    return model


def seeded(read, seed=3):
    scvi.settings.seed = seed
    return np.asarray(read(), dtype=float)


def readings(model, kind):
    """What a model says about its cells, for one seed of the draws."""
    rows = {
        "mean": lambda: model.get_latent_representation(representation="mean"),
        "logits": lambda: model.get_latent_representation(representation="logits"),
        "draw": lambda: model.get_latent_representation(give_mean=False),
        "expression": lambda: model.get_normalized_expression(library_size=1e3),
        "draws of expression": lambda: model.get_normalized_expression(n_samples=3, return_mean=True),
        "energy": model.get_prior_energy,
        "generated": lambda: model.generate(20, seed=5).X,
        "predictive counts": lambda: model.posterior_predictive_sample(n_samples=2).todense(),
    }
    if kind == WITH_COUNTS:
        rows |= {
            "ELBO": lambda: model.get_elbo(return_mean=False),
            "reconstruction": lambda: model.get_reconstruction_error(return_mean=False)["reconstruction_loss"],
        }
    return {name: seeded(read) for name, read in rows.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Minified data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [WITHOUT_COUNTS, WITH_COUNTS])
def test_minified_model_says_what_it_said_before(kind):
    model = saturate(trained())
    before = readings(model, kind)
    assert np.abs(before["logits"]).max() > 18  # 1 - |m| is 3e-8 there: m is rounded to one
    after = readings(minify(model, kind), kind)
    assert model.minified_data_type == kind
    assert model.adata.X.sum() == 0 or kind == WITH_COUNTS
    np.testing.assert_array_equal(after.pop("mean"), before.pop("mean"))
    for name, value in after.items():
        np.testing.assert_allclose(value, before[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_posterior_is_determined_by_its_moments():
    """Logits from -80 to 80 in single precision; through the mean alone all beyond 17 would be infinite."""
    logits = torch.cat([torch.linspace(-80, 80, 641), torch.tensor([1e-6, -1e-6, 0.0])])[None]
    q = FactorialPosterior(logits)
    back = FactorialPosterior.from_moments(q.mean, q.variance)
    torch.testing.assert_close(back.logits, logits, rtol=1e-6, atol=1e-6)
    assert torch.equal(back.mean, q.mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda mean, var: (None, var), "no 'X_latent_qzm'.*return_dist=True", id="missing"),
        pytest.param(lambda mean, var: (mean[:, :3], var), r"\(100, 3\).*\(n_cells, 6\)", id="width"),
        pytest.param(lambda mean, var: (2 * mean, var), "mean and variance", id="logits"),
        pytest.param(lambda mean, var: (mean, np.sqrt(var)), "mean and variance", id="deviations"),
        pytest.param(lambda mean, var: (np.nan * mean, var), "mean and variance", id="nan"),
    ],
)
def test_wrong_moments_are_refused_at_minification(change, message):
    model = trained()
    moments = change(*model.get_latent_representation(return_dist=True))
    for key, value in zip(("X_latent_qzm", "X_latent_qzv"), moments, strict=True):
        if value is not None:
            model.adata.obsm[key] = value
    with pytest.raises(ValueError, match=message):
        model.minify_adata()
    assert model.minified_data_type is None


def test_refused_training_leaves_a_minified_model_as_it_was():
    model = minify(trained(), WITHOUT_COUNTS)
    before = seeded(model.get_normalized_expression)
    with pytest.raises(ValueError, match="minified"):
        train(model)
    assert not model.module.training
    np.testing.assert_array_equal(seeded(model.get_normalized_expression), before)


# ---------------------------------------------------------------------------------------------------------------------
# Query data (scArches)
# ---------------------------------------------------------------------------------------------------------------------


def prior_state(model):
    return {name: value.clone() for name, value in model.module.prior.state_dict().items()}


def equal_names(first, second):
    return {name for name in first if torch.equal(first[name], second[name])}


def query(reference, tmp_path=None, **kwargs):
    adata = fresh(("batch_2", "batch_3"))
    if tmp_path is not None:
        reference.save(str(tmp_path / "reference"))
        reference = str(tmp_path / "reference")
    return QBMSCVI.load_query_data(adata, reference, accelerator="cpu", **kwargs)


@pytest.mark.parametrize("from_file", [False, True], ids=["model", "file"])
def test_query_keeps_the_prior_with_chains_and_log_z(from_file, tmp_path):
    reference = trained()
    model = query(reference, tmp_path if from_file else None)
    before = prior_state(reference)
    assert equal_names(before, prior_state(model)) == set(before)
    weights = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    train(model, max_epochs=2, plan_kwargs={"weight_decay": 0.0})
    assert equal_names(before, prior_state(model)) == set(before)
    changed = {name for name, p in model.module.named_parameters() if not torch.equal(p, weights[name])}
    assert changed
    assert all("fc_layers" in name for name in changed)
    # the reference itself is untouched
    assert equal_names(before, prior_state(reference)) == set(before)


@pytest.mark.parametrize("options", [{"freeze_prior": False}, {"unfrozen": True}], ids=["freeze_prior", "unfrozen"])
def test_query_goes_on_learning_the_prior_if_asked(options):
    model = query(trained(), **options)
    before = prior_state(model)
    train(model, plan_kwargs={"prior_lr": 0.01})  # at the default three steps may leave log Z as it is, rounded
    unchanged = {name for name in equal_names(before, prior_state(model)) if before[name].numel()}
    assert not unchanged & {"h", "J", "chains", "log_z", "n_updates"}


def test_query_does_not_couple_an_independent_prior():
    model = query(trained(prior_graph="independent"), freeze_prior=False)
    train(model)
    assert not model.get_ising_model().couplings().any()
    assert model.module.prior.h.requires_grad


def test_query_of_reference_cells_is_their_reference():
    reference = trained()
    model = QBMSCVI.load_query_data(fresh(), reference, accelerator="cpu")
    model.is_trained = True
    np.testing.assert_array_equal(model.get_latent_representation(), reference.get_latent_representation())


# ---------------------------------------------------------------------------------------------------------------------
# Save, load, resume
# ---------------------------------------------------------------------------------------------------------------------

STATES = {
    "trained": trained,
    "trained twice": lambda: train(trained()),
    "with a sampler instance": lambda: train(build(fresh()), sampler=BlockGibbsSampler()),
    "query": lambda: train(query(trained())),
    "minified": lambda: minify(trained(), WITHOUT_COUNTS),
    "minified with counts": lambda: minify(trained(), WITH_COUNTS),
    "minified query": lambda: minify(train(query(trained())), WITH_COUNTS),
}


@pytest.mark.parametrize(("state", "prefix"), [*((state, None) for state in STATES), ("trained", "first_")])
def test_loaded_model_goes_on_as_the_saved_one(state, prefix, tmp_path):
    """Equal readings, equal history; and, where it can be trained, bit-equal weights after the same further epoch."""
    model, folder = STATES[state](), str(tmp_path / "model")
    (tmp_path / "model").mkdir()  # so that `overwrite` has something to do
    with pytest.raises(ValueError, match="already exists"):
        model.save(folder, prefix=prefix)
    model.save(folder, prefix=prefix, overwrite=True, save_anndata=True)
    loaded = QBMSCVI.load(folder, prefix=prefix, accelerator="cpu", backup_url=None)
    assert loaded.minified_data_type == model.minified_data_type
    kind = model.minified_data_type or WITH_COUNTS
    others = readings(loaded, kind)
    for name, value in readings(model, kind).items():
        np.testing.assert_array_equal(others[name], value, err_msg=name)
    weights, others = model.module.state_dict(), loaded.module.state_dict()
    assert equal_names(weights, others) == set(weights) == set(others)
    for key, table in model.history.items():
        np.testing.assert_array_equal(loaded.history[key].to_numpy(), table.to_numpy(), err_msg=key)
    if kind == WITHOUT_COUNTS:
        return
    for one in (model, loaded):
        scvi.settings.seed = 11
        train(one)
    # What scArches froze is not saved: a loaded query model learns everything.
    if "query" not in state:
        weights, others = model.module.state_dict(), loaded.module.state_dict()
        assert equal_names(weights, others) == set(weights)


def test_saved_scvi_is_no_qbmscvi(tmp_path):
    adata = fresh()
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(adata)
    model.save(str(tmp_path / "scvi"))
    with pytest.raises(ValueError, match="different class"):
        QBMSCVI.load(str(tmp_path / "scvi"), adata)


# ---------------------------------------------------------------------------------------------------------------------
# Without AnnData
# ---------------------------------------------------------------------------------------------------------------------


def data_module(adata):
    module = DataSplitter(QBMSCVI._get_most_recent_anndata_manager(adata), batch_size=32)
    module.n_vars, module.n_batch, module.n_obs = N_GENES, 2, N_CELLS
    return module


@pytest.mark.parametrize("has_registry", [True, False], ids=["registry", "nothing"])
@pytest.mark.filterwarnings("ignore:Model was initialized without `adata`")
def test_model_without_data_becomes_that_with_data(has_registry):
    """Same seed, same data: bit-equal weights, whether the networks are built from AnnData, a registry or later."""
    adata = fresh()
    scvi.settings.seed = 0
    # The fit of the prior learns from the same codes in another order.
    expected = train(build(fresh()), fit_prior=False)
    scvi.settings.seed = 0
    if has_registry:
        model = build(registry=expected.registry)
        assert model.module is not None
    else:
        model = build()
        assert model.module is None
    train(model, datamodule=data_module(adata), fit_prior=False)
    weights, others = expected.module.state_dict(), model.module.state_dict()
    if has_registry:  # the order of draws differs where the networks are built after the data are split
        assert equal_names(weights, others) == set(weights)
    loader = expected._make_data_loader(expected.adata, batch_size=N_CELLS)
    z = model.get_latent_representation(dataloader=loader)
    assert z.shape == expected.get_latent_representation().shape
    assert model.get_prior_energy(dataloader=loader).shape == (N_CELLS,)
    assert model.sample_prior(3).shape == (3, model.module.prior.n_visible)
    if has_registry:
        np.testing.assert_array_equal(model.generate(5, library_size=50, seed=1).var_names, adata.var_names)
        with pytest.raises(ValueError, match="library sizes"):
            model.generate(5)


@pytest.mark.filterwarnings("ignore:Model was initialized without `adata`")
def test_model_without_data_says_what_it_lacks(tmp_path):
    model = build()
    for read in (model.sample_prior, model.get_ising_model, model.generate):
        with pytest.raises(RuntimeError, match=r"registry.*train\(datamodule=...\)"):
            read()
    with pytest.raises(AttributeError, match="Pass `datamodule`"):
        train(model)
    with pytest.raises(RuntimeError, match="untrained model"):
        model.get_latent_representation()
    train(model, datamodule=data_module(fresh()))
    with pytest.raises(ValueError, match=r"QBMSCVI\(registry=datamodule.registry\)"):
        model.save(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="use_observed_lib_size=False"):
        build(use_observed_lib_size=False)


# ---------------------------------------------------------------------------------------------------------------------
# The rest of scvi-tools
# ---------------------------------------------------------------------------------------------------------------------


def test_posterior_predictive_check_compares_model_and_data():
    """Against the model's own predictive counts, drawn with the same seed; scvi-tools counts what is not zero."""
    model = trained(gene_likelihood="nb")
    scvi.settings.seed = 4
    model.adata.layers["dense"] = model.adata.X.toarray()  # what the check takes
    check = PosteriorPredictiveCheck(model.adata, {"ours": model}, n_samples=3, count_layer_key="dense")
    check.zero_fraction()
    table = check.metrics["zero_fraction"]
    scvi.settings.seed = 4
    counts = model.posterior_predictive_sample(n_samples=3, batch_size=32).todense()
    np.testing.assert_allclose(table["ours"], (counts != 0).mean(axis=(0, 2)), atol=1e-6)
    np.testing.assert_allclose(table["Raw"], (model.adata.X.toarray() != 0).mean(axis=0), atol=1e-6)


def test_backed_data_and_collections_give_equal_models(tmp_path):
    """Bit-equal: scvi-tools reads both in the same order, which is not that of data in memory."""
    adata = fresh()
    adata.write(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    parts = [adata[:60].copy(), adata[60:].copy()]
    collection = CollectionAdapter(AnnCollection(parts, join_vars="inner", join_obs="inner"))
    models = []
    for data in (backed, collection):
        QBMSCVI.setup_anndata(data, layer="counts", batch_key="batch")
        scvi.settings.seed = 0
        models.append(train(build(data)))
    first, second = models
    np.testing.assert_array_equal(first.get_latent_representation(), second.get_latent_representation())
    np.testing.assert_array_equal(first.generate(10, seed=1).X, second.generate(10, seed=1).X)
    # and a model reads them as it reads data in memory
    model = trained()
    np.testing.assert_array_equal(model.get_latent_representation(backed), model.get_latent_representation())


def test_sparse_loading_changes_nothing():
    scvi.settings.seed = 0
    model = train(build(fresh()), load_sparse_tensor=True)
    np.testing.assert_array_equal(model.get_latent_representation(), trained().get_latent_representation())


def test_batches_do_not_matter_to_a_model_without_them():
    """One batch: `transform_batch` has nothing to change. Two: it does, so the test could fail."""
    for batches, is_equal in [(("only",), True), (("batch_0", "batch_1"), False)]:
        model = trained(setup={"batches": batches})
        own = seeded(model.get_normalized_expression)
        moved = seeded(lambda model=model, batch=batches[-1]: model.get_normalized_expression(transform_batch=batch))
        assert np.array_equal(own, moved) == is_equal
        np.testing.assert_allclose(moved.sum(axis=1), 1.0, rtol=1e-5)


def test_size_factors_replace_library_sizes():
    """The decoder's mean is its normalized expression times the size factor, or times the total without one."""
    for setup in ({"size_factor_key": "size_factor"}, {}):
        model = trained(setup=setup, gene_likelihood="nb")
        scale = model.adata.obs["size_factor"].to_numpy() if setup else np.asarray(model.adata.X.sum(axis=1)).ravel()
        mean = seeded(lambda model=model: model.get_likelihood_parameters()["mean"])
        share = seeded(model.get_normalized_expression)
        np.testing.assert_allclose(mean, share * scale[:, None], rtol=1e-4)


@pytest.mark.slow
def test_compiled_plan_trains():
    scvi.settings.seed = 0
    model = train(build(fresh()), plan_kwargs={"compile": True, "compile_kwargs": {"backend": "eager"}})
    z, expected = model.get_latent_representation(), trained().get_latent_representation()
    np.testing.assert_allclose(z, expected, rtol=1e-4, atol=1e-5)
    assert int(model.module.prior.n_updates) > 0


def test_autotune_finds_what_it_inspects():
    """Ray hands the class a search space over its arguments, and reads metrics from the history by name."""
    model = trained(extra_payload_autotune=True)
    assert {"elbo_validation", "reconstruction_loss_validation"} <= set(train(build(fresh()), **VALIDATED).history)
    tensors = next(iter(model._make_data_loader(model.adata, batch_size=N_CELLS)))
    _, _, losses = model.module(tensors)
    assert losses.extra_metrics["z"].shape == (N_CELLS, model.module.prior.n_visible)
    assert set(losses.extra_metrics) >= {"z", "batch", "labels"}


VALIDATED = {"check_val_every_n_epoch": 1, "train_size": 0.7}


@pytest.mark.slow
def test_autotune_tunes_the_model(tmp_path):
    """Needs ``scvi-tools[autotune]``; trials run in processes of their own, so the model travels there and back."""
    for package in ("hyperopt", "ray.tune", "scib_metrics"):
        pytest.importorskip(package)
    from ray import tune
    from scvi.autotune import run_autotune

    experiment = run_autotune(
        QBMSCVI,
        data=fresh(),
        metrics="elbo_validation",
        mode="min",
        search_space={
            "model_params": {"n_latent": tune.grid_search([4, 6]), "n_chains": 32},
            "train_params": {"max_epochs": 2, "plan_kwargs": {"prior_lr": 1e-3}},
        },
        num_samples=1,
        seed=0,
        scheduler="asha",
        searcher="random",
        logging_dir=str(tmp_path),
        resources={"cpu": 1},
        ignore_reinit_error=True,
    )
    trials = experiment.result_grid.get_dataframe()
    assert sorted(trials["config/model_params/n_latent"]) == [4, 6]
    assert np.isfinite(trials["elbo_validation"]).all()


def test_hub_holds_and_loads_the_model(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    from scvi.hub import HubMetadata, HubModel

    model = trained()
    folder = str(tmp_path / "model")
    model.save(folder, save_anndata=True)
    metadata = HubMetadata.from_dir(folder, anndata_version=anndata.__version__, model_parent_module="qbmscvi")
    card = hub.ModelCard("---\nlibrary_name: qbmscvi\n---\nA model.")
    loaded = HubModel(folder, metadata=metadata, model_card=card).model
    assert type(loaded) is QBMSCVI
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
