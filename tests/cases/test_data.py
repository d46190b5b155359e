"""Data as users have them: each is put right, or refused with a sentence that names the place and says what to type."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from tables import corners, over

import qbmscvi
from qbmscvi import QBMSCANVI, QBMSCVI

N_CELLS, N_GENES = 120, 40
FIT = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not contain unnormalized count data")


@pytest.fixture(scope="module")
def counts() -> ad.AnnData:
    """Not registered: copies of registered data share their registration."""
    adata = qbmscvi.datasets.synthetic_counts(N_CELLS, N_GENES, seed=3)
    adata.obs["size"] = np.linspace(0.5, 2.0, N_CELLS)
    adata.obs["age"] = np.linspace(-1.0, 1.0, N_CELLS)
    return adata


def build(adata: ad.AnnData, *, model: dict | None = None, **setup) -> QBMSCVI:
    QBMSCVI.setup_anndata(adata, **setup)
    return QBMSCVI(adata, n_latent=8, n_chains=16, n_hidden=16, **(model or {}))


@pytest.fixture(scope="module")
def trained(counts) -> QBMSCVI:
    model = build(counts.copy(), batch_key="batch", size_factor_key="size", continuous_covariate_keys=["age"])
    model.train(**FIT)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Values that are not finite, or impossible, wherever data come in
# ---------------------------------------------------------------------------------------------------------------------

METHODS = {
    "get_latent_representation": lambda model, adata: model.get_latent_representation(adata),
    "get_normalized_expression": lambda model, adata: model.get_normalized_expression(adata, library_size=1e4),
    "get_elbo": lambda model, adata: model.get_elbo(adata),
    "get_kl": lambda model, adata: model.get_kl(adata),
    "get_marginal_ll": lambda model, adata: model.get_marginal_ll(adata, n_mc_samples=2),
    "get_reconstruction_error": lambda model, adata: model.get_reconstruction_error(adata),
    "get_latent_library_size": lambda model, adata: model.get_latent_library_size(adata, give_mean=False),
    "get_likelihood_parameters": lambda model, adata: model.get_likelihood_parameters(adata),
    "get_prior_energy": lambda model, adata: model.get_prior_energy(adata),
    "get_spin_programs": lambda model, adata: model.get_spin_programs(adata, spins=[0]),
    "get_prior_modes": lambda model, adata: model.get_prior_modes(adata, n_samples=4),
    "posterior_predictive_sample": lambda model, adata: model.posterior_predictive_sample(adata),
    "get_feature_correlation_matrix": lambda model, adata: model.get_feature_correlation_matrix(adata, n_samples=2),
    "differential_expression": lambda model, adata: model.differential_expression(adata, "cell_type", silent=True),
}


def _set_count(adata: ad.AnnData, value: float) -> None:
    X = adata.X.toarray()
    X[4, 7] = value
    adata.X = sparse.csr_matrix(X)


def _set_column(key: str):
    def change(adata: ad.AnnData, value: float) -> None:
        adata.obs[key] = adata.obs[key].to_numpy(copy=True)
        adata.obs.loc[adata.obs_names[4], key] = value

    return change


BAD_VALUES = [
    pytest.param(_set_count, np.nan, "gene_7", id="count-nan"),
    pytest.param(_set_count, np.inf, "gene_7", id="count-infinite"),
    pytest.param(_set_count, -3.0, "gene_7", id="count-negative"),
    pytest.param(_set_column("size"), np.nan, "size", id="size-factor-nan"),
    pytest.param(_set_column("size"), np.inf, "size", id="size-factor-infinite"),
    pytest.param(_set_column("size"), 0.0, "size", id="size-factor-zero"),
    pytest.param(_set_column("size"), -1.0, "size", id="size-factor-negative"),
    pytest.param(_set_column("age"), np.nan, "age", id="covariate-nan"),
    pytest.param(_set_column("age"), -np.inf, "age", id="covariate-infinite"),
]


@over(("change", "value", "where"), BAD_VALUES)
def test_training_refuses_what_is_not_finite_before_it_starts(counts, change, value, where):
    adata = counts.copy()
    change(adata, value)
    model = build(adata, batch_key="batch", size_factor_key="size", continuous_covariate_keys=["age"])
    with pytest.raises(ValueError, match=rf"(?s){where}.*cell_4|cell_4.*{where}") as error:
        model.train(**FIT)
    assert str(value).lstrip("-") in str(error.value)
    assert not model.is_trained
    with pytest.raises(RuntimeError, match="untrained"):
        model.get_latent_representation()


@over(("change", "value", "where"), BAD_VALUES)
def test_new_data_are_refused_where_they_are_not_finite(counts, trained, change, value, where):
    query = counts[:30].copy()
    change(query, value)
    with pytest.raises(ValueError, match=rf"(?s){where}.*cell_4|cell_4.*{where}"):
        trained.get_latent_representation(query)


@over("method", METHODS)
def test_every_method_refuses_nan_in_new_data(counts, trained, method):
    query = counts[:30].copy()
    METHODS[method](trained, query.copy())  # as it is, it is taken
    _set_count(query, np.nan)
    with pytest.raises(ValueError, match="cell_4.*gene_7"):
        METHODS[method](trained, query)


def test_nan_that_came_into_the_own_data_after_training_is_found(counts):
    model = build(counts.copy())
    model.train(**FIT)
    model.adata.X.data[5] = np.nan
    with pytest.raises(ValueError, match="nan"):
        model.get_normalized_expression(library_size=1e4)


def test_size_factors_that_changed_after_setup_are_looked_at(counts):
    model = build(counts.copy(), size_factor_key="size")
    model.adata.obs["size"] = 0.0
    with pytest.raises(ValueError, match=r"'size'.*120 of 120"):
        model.train(**FIT)


def test_a_query_with_nan_is_refused_before_it_is_mapped(counts, trained):
    query = counts[:30].copy()
    _set_count(query, np.nan)
    mapped = QBMSCVI.load_query_data(query, trained)
    with pytest.raises(ValueError, match="cell_4.*gene_7"):
        mapped.train(**FIT)


def test_annotation_refuses_nan(counts):
    QBMSCANVI.setup_anndata(labeled := counts.copy(), "cell_type", "unknown")
    model = QBMSCANVI(labeled, n_latent=8, n_chains=16)
    model.train(**FIT)
    query = counts[:30].copy()
    _set_count(query, np.nan)
    with pytest.raises(ValueError, match="cell_4.*gene_7"):
        model.predict(query)


def test_empty_cells_are_counted(counts):
    adata = counts.copy()
    X = adata.X.toarray()
    X[[7, 11, 90]] = 0
    adata.X = X
    with pytest.raises(ValueError, match=r"3 of 120.*cell_7.*filter_cells"):
        build(adata).train(**FIT)


# ---------------------------------------------------------------------------------------------------------------------
# Counts that are nearly counts
# ---------------------------------------------------------------------------------------------------------------------


def _recovered(counts: ad.AnnData, dtype: str) -> np.ndarray:
    """Counts after normalization, a logarithm, and back."""
    X = counts.X.toarray().astype(dtype)
    size = X.sum(1, keepdims=True)
    return np.expm1(np.log1p(X / size * 1e4)) * size / 1e4


@pytest.mark.parametrize(("dtype", "likelihood"), corners(["float32", "float64"], ["zinb", "nb", "poisson"]))
def test_rounding_error_is_no_fraction(counts, dtype, likelihood):
    adata = counts.copy()
    adata.X = _recovered(counts, dtype)
    assert (adata.X != np.rint(adata.X)).any()
    noisy = build(adata, model={"gene_likelihood": likelihood})
    noisy.train(**FIT)
    exact = counts.copy()
    QBMSCVI.setup_anndata(exact)
    # Each at one draw of the posterior: the spread of draws is the tolerance.
    errors = [float(noisy.get_reconstruction_error(data)["reconstruction_loss"]) for data in (adata, exact)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


@over("likelihood", ["zinb", "nb", "poisson"])
def test_likelihood_of_noisy_counts_is_that_of_the_integers(counts, likelihood):
    import torch

    model = build(counts.copy(), model={"gene_likelihood": likelihood})
    x = torch.from_numpy(counts.X[:8].toarray())
    noise = 4e-4 * torch.sin(torch.arange(x.numel())).view_as(x)
    noisy = torch.where(x > 0, x * (1 + noise), noise.abs())  # zeros, too
    column = torch.zeros(8, 1, dtype=torch.long)
    given = {"z": torch.ones(8, 8), "library": x.sum(1, keepdim=True).log(), "batch_index": column, "y": column}
    px = model.module.generative(**given)["px"]
    torch.testing.assert_close(px.log_prob(noisy), px.log_prob(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(px.log_prob(x + (x > 0)), px.log_prob(x), rtol=1e-5, atol=1e-5)


def test_large_counts_are_taken_within_their_precision(counts):
    adata = counts.copy()
    X = adata.X.toarray()
    X[0, 0] = 123456.06
    adata.X = X
    build(adata).train(**FIT)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda X: np.round(X * 0.93, 3) * 20, r"corrected counts.*np\.rint", id="ambient"),
        pytest.param(lambda X: X * 20 + 0.25 * (X > 0), r"corrected counts.*np\.rint", id="expectation-maximization"),
        pytest.param(np.log1p, "normalized", id="log"),
        pytest.param(lambda X: X / X.sum(1, keepdims=True) * 1e4, "normalized", id="per-ten-thousand"),
        pytest.param(lambda X: X / X.max(), "normalized", id="scaled-to-one"),
        pytest.param(lambda X: X / X.max() * 5e-4, "normalized", id="all-close-to-zero"),
        pytest.param(lambda X: X - X.mean(0), "scaled or centered", id="centered"),
    ],
)
@over("is_sparse", [False, True])
def test_advice_says_what_the_values_look_like(counts, change, words, is_sparse):
    adata = counts.copy()
    X = change(adata.X.toarray()).astype("float32")
    adata.X = sparse.csr_matrix(X) if is_sparse else X
    with pytest.raises(ValueError, match=f"(?s){words}") as error:
        build(adata).train(**FIT)
    assert "such as 1 " not in str(error.value)  # an integer would contradict the message
    assert "layer=" not in str(error.value)  # there is none
    if "rint" in words:
        exec(str(error.value).split("Round them: `")[1].split("`")[0], {"np": np, "adata": adata})
        QBMSCVI(adata, n_latent=8, n_chains=16).train(**FIT)


def test_advice_names_the_layers_that_hold_integers(counts):
    adata = counts.copy()
    adata.layers["raw_counts"] = adata.X.copy()
    adata.layers["scaled"] = adata.X.toarray() - 1.5
    adata.raw = adata.copy()
    adata.X = adata.X.log1p()
    with pytest.raises(ValueError, match="layer='raw_counts'") as error:
        build(adata).train(**FIT)
    assert "adata.raw.to_adata()" in str(error.value)
    assert "scaled'" not in str(error.value)
    adata.X = counts.X.copy()
    with pytest.raises(ValueError, match=r"integers in `adata\.X`, without `layer`"):
        build(adata, layer="scaled").train(**FIT)


def test_stored_duplicates_are_summed_before_they_are_judged(counts):
    whole = counts.X.tocsr()
    half = sparse.csr_matrix(
        (np.repeat(whole.data / 2, 2), np.repeat(whole.indices, 2), 2 * whole.indptr), shape=whole.shape
    )
    assert not half.has_canonical_format
    adata = counts.copy()
    adata.X = half
    before = half.copy()
    build(adata).train(**FIT)
    assert (adata.X.nnz, adata.X.has_canonical_format) == (before.nnz, False)  # the user's data stay as they are
    np.testing.assert_array_equal(adata.X.data, before.data)


# ---------------------------------------------------------------------------------------------------------------------
# Columns and keys
# ---------------------------------------------------------------------------------------------------------------------

KEYS = ["batch_key", "labels_key", "categorical_covariate_keys"]


def _setup_with(counts: ad.AnnData, values, key: str) -> ad.AnnData:
    adata = counts.copy()
    adata.obs["donor"] = pd.Series(values, index=adata.obs_names)
    QBMSCVI.setup_anndata(adata, **{key: ["donor"] if key.endswith("keys") else "donor"})
    return adata


@over("key", KEYS)
@over(
    "values",
    [
        pytest.param(["A", "B", None, "A"] * 30, id="object-none"),
        pytest.param(["A", "B", np.nan, "A"] * 30, id="object-nan"),
        pytest.param(pd.Categorical(["A", "B", None, "A"] * 30), id="categorical"),
        pytest.param(pd.array(["A", "B", None, "A"] * 30, dtype="string"), id="string"),
        pytest.param(pd.array([1, 2, None, 1] * 30, dtype="Int64"), id="integer"),
        pytest.param(pd.array([True, False, None, True] * 30, dtype="boolean"), id="boolean"),
        pytest.param([0.0, 1.0, np.nan, 0.0] * 30, id="float"),
    ],
)
def test_missing_values_are_counted_and_can_be_filled_as_the_message_says(counts, values, key):
    values = pd.Series(values).array
    with pytest.raises(ValueError, match=r"'donor'.*30 of 120 cells.*cell_2") as error:
        _setup_with(counts, values, key)
    adata = counts.copy()
    adata.obs["donor"] = pd.Series(values, index=adata.obs_names)
    exec(str(error.value).split("Fill it: `")[1].split("`")[0], {"adata": adata})
    QBMSCVI.setup_anndata(adata, **{key: ["donor"] if key.endswith("keys") else "donor"})


@over("key", KEYS)
def test_a_column_without_any_value_is_named(counts, key):
    with pytest.raises(ValueError, match=r"'donor'.*any of 120 cells"):
        _setup_with(counts, [np.nan] * N_CELLS, key)


@over("key", KEYS)
@over(
    "values",
    [
        pytest.param(["A", 1, 2.5, "A"] * 30, id="text-and-numbers"),
        pytest.param([True, "A", False, "B"] * 30, id="truth-and-text"),
        pytest.param([True, 1, False, 0] * 30, id="truth-and-numbers"),
    ],
)
def test_mixed_types_are_named_and_the_remedy_works(counts, values, key):
    values = pd.Series(values, dtype=object).array
    with pytest.raises(TypeError, match=r"'donor'.*types") as error:
        _setup_with(counts, values, key)
    adata = counts.copy()
    adata.obs["donor"] = pd.Series(values, index=adata.obs_names)
    exec(str(error.value).split("Make them text: `")[1].split("`")[0], {"adata": adata})
    QBMSCVI.setup_anndata(adata, **{key: ["donor"] if key.endswith("keys") else "donor"})


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(pd.array(["A", "B"] * 60, dtype="string"), id="string"),
        pytest.param(pd.array([0, 1] * 60, dtype="Int64"), id="nullable-integer"),
        pytest.param(pd.array([True, False] * 60, dtype="boolean"), id="nullable-boolean"),
        pytest.param(np.array([True, False] * 60), id="boolean"),
        pytest.param(np.array([0.5, 1.5] * 60), id="float"),
        pytest.param(pd.Categorical(["A", "B"] * 60, categories=["C", "B", "A"]), id="unused-category"),
        pytest.param(pd.to_datetime(["2026-01-01", "2026-02-01"] * 60), id="dates"),
    ],
)
def test_columns_of_every_type_are_taken_from_training_to_new_data(counts, values):
    adata = _setup_with(counts, values, "batch_key")
    model = QBMSCVI(adata, n_latent=8, n_chains=16)
    model.train(**FIT)
    query = counts[:30].copy()
    query.obs["donor"] = pd.Series(values, index=counts.obs_names)[:30]
    np.testing.assert_allclose(
        model.get_latent_representation(query), model.get_latent_representation(indices=np.arange(30)), atol=1e-5
    )


@over("argument", ["categorical_covariate_keys", "continuous_covariate_keys"])
def test_a_name_where_a_list_is_meant_is_told_so(counts, argument):
    with pytest.raises(TypeError, match=rf"{argument}=\['age'\]"):
        QBMSCVI.setup_anndata(counts.copy(), **{argument: "age"})
    with pytest.raises(TypeError, match=rf"{argument}=\['age'\]"):
        QBMSCANVI.setup_anndata(counts.copy(), "cell_type", "unknown", **{argument: "age"})


@over("kind", [tuple, np.array, pd.Index, pd.Series], ids=lambda kind: kind.__name__)
def test_lists_of_every_kind_name_columns(counts, kind):
    model = build(counts.copy(), continuous_covariate_keys=kind(["age", "size"]))
    assert model.summary_stats["n_extra_continuous_covs"] == 2


@over("argument", ["batch_key", "labels_key", "size_factor_key"])
def test_a_list_where_a_name_is_meant_is_told_so(counts, argument):
    with pytest.raises(TypeError, match=f"{argument}='size'"):
        QBMSCVI.setup_anndata(counts.copy(), **{argument: ["size"]})


@over("argument", ["batch_key", "labels_key", "size_factor_key", "layer"])
def test_a_misspelled_name_is_told_what_there_is(counts, argument):
    adata = counts.copy()
    adata.layers["batch"] = adata.X
    with pytest.raises(ValueError, match=f"(?s){argument}='batsh'.*'batch'"):
        QBMSCVI.setup_anndata(adata, **{argument: "batsh"})


@over(
    "values",
    [
        pytest.param([str(number) for number in range(N_CELLS)], id="text"),
        pytest.param(pd.Categorical([1, 2] * 60), id="categorical"),
    ],
)
@over("argument", ["continuous_covariate_keys", "size_factor_key"])
def test_numbers_are_needed_where_numbers_are_meant(counts, values, argument):
    adata = counts.copy()
    adata.obs["age"] = pd.Series(values, index=adata.obs_names)
    key = ["age"] if argument.endswith("keys") else "age"
    with pytest.raises(TypeError, match=r"'age'.*to_numeric") as error:
        QBMSCVI.setup_anndata(adata, **{argument: key})
    exec(str(error.value).split("Convert it, `")[1].split("`")[0], {"adata": adata, "pandas": pd})
    QBMSCVI.setup_anndata(adata, **{argument: key})


def test_nullable_numbers_are_taken(counts):
    adata = counts.copy()
    adata.obs["age"] = pd.array(np.linspace(0, 1, N_CELLS), dtype="Float64")
    build(adata, continuous_covariate_keys=["age"]).train(**FIT)
    adata = counts.copy()
    adata.obs["age"] = pd.array([None, *np.linspace(0, 1, N_CELLS - 1)], dtype="Float64")
    with pytest.raises(ValueError, match="'age'.*cell_0"):
        build(adata, continuous_covariate_keys=["age"]).train(**FIT)


def test_labels_that_are_all_missing_are_refused(counts):
    adata = counts.copy()
    adata.obs["type"] = "unknown"
    QBMSCANVI.setup_anndata(adata, "type", "unknown")
    with pytest.raises(ValueError, match="label"):
        QBMSCANVI(adata)
    adata.obs["type"] = np.nan
    with pytest.raises(ValueError, match=r"'type'.*any of 120"):
        QBMSCANVI.setup_anndata(adata, "type", "unknown")
    adata.obs["type"] = ["A", None] * 60
    with pytest.raises(ValueError, match=r"'type'.*60 of 120.*fillna\('unknown'\)"):
        QBMSCANVI.setup_anndata(adata, "type", "unknown")


def test_new_categories_are_named_as_a_user_types_them(counts, trained):
    query = counts[:30].copy()
    query.obs["batch"] = "donor_9"
    with pytest.raises(ValueError, match=r"'donor_9'.*'batch_0', 'batch_1'.*load_query_data") as error:
        trained.get_latent_representation(query)
    assert "np." not in str(error.value)


def test_a_column_that_new_data_lack_is_named(counts, trained):
    query = counts[:30].copy()
    del query.obs["batch"]
    with pytest.raises(ValueError, match="batch_key='batch'"):
        trained.get_latent_representation(query)


# ---------------------------------------------------------------------------------------------------------------------
# Genes
# ---------------------------------------------------------------------------------------------------------------------


@over("method", METHODS)
def test_no_method_computes_on_genes_in_another_order(counts, trained, method):
    with pytest.raises(ValueError, match=r"order.*model\.get_var_names"):
        METHODS[method](trained, counts[:30, ::-1].copy())


def test_copies_of_registered_data_are_looked_at_too(trained):
    reordered = trained.adata[:30, ::-1].copy()
    with pytest.raises(ValueError, match="another order"):
        trained.get_latent_representation(reordered)
    in_order = reordered[:, trained.get_var_names()].copy()
    expected = trained.get_latent_representation(indices=np.arange(30))
    np.testing.assert_allclose(trained.get_latent_representation(in_order), expected, atol=1e-6)


def test_genes_in_another_order_are_neither_loaded_nor_mapped(counts, trained, tmp_path):
    trained.save(tmp_path / "model")
    with pytest.raises(ValueError, match="another order"):
        QBMSCVI.load(tmp_path / "model", counts[:, ::-1].copy())
    with pytest.raises(ValueError, match="another order"):
        QBMSCVI.load_query_data(counts[:30, ::-1].copy(), trained)
    ordered = counts[:30, ::-1].copy()
    QBMSCVI.prepare_query_anndata(ordered, trained)
    QBMSCVI.load_query_data(ordered, trained)


def test_other_genes_are_counted_and_named(counts, trained):
    query = counts[:30].copy()
    query.var_names = [f"other_{i}" if i < 5 else name for i, name in enumerate(query.var_names)]
    with pytest.raises(ValueError, match=r"35.*40.*gene_0.*prepare_query_anndata"):
        trained.get_latent_representation(query)
    with pytest.raises(ValueError, match=r"39 genes.*'gene_39'"):
        trained.get_latent_representation(counts[:30, :39].copy())


# ---------------------------------------------------------------------------------------------------------------------
# Groups and genes that are named
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def grouped(trained) -> ad.AnnData:
    adata = trained.adata.copy()
    adata.obs["group"] = pd.Categorical(["T", "B"] * 60, categories=["T", "B", "NK"])
    adata.obs["number"] = [1, 2] * 60
    adata.obs["alone"] = "T"
    return adata


@over(
    ("arguments", "words"),
    [
        pytest.param({"groupby": "group", "group1": "t"}, r"group = 't'.*'T', 'B'\.", id="misspelled"),
        pytest.param({"groupby": "group", "group1": ["T", "NK"]}, r"group = 'NK'", id="without-cells"),
        pytest.param({"groupby": "group", "group1": "T", "group2": "b"}, r"group = 'b'.*`group2`", id="second"),
        pytest.param({"groupby": "number", "group1": "1"}, r"number = '1'.*1, 2\.", id="text-for-a-number"),
        pytest.param({"groupby": "grup"}, r"'grup'.*Did you mean 'group'", id="column"),
        pytest.param({"groupby": "alone"}, r"'T'.*two are needed", id="one-group"),
        pytest.param({"idx1": np.zeros(N_CELLS, dtype=bool)}, "`idx1` names no cell", id="empty-mask"),
        pytest.param({"idx1": "group == 'NK'"}, "`idx1` names no cell", id="empty-query"),
        pytest.param({"idx1": np.ones(N_CELLS, dtype=bool)}, "`idx1` names all cells", id="full-mask"),
    ],
)
def test_groups_without_cells_are_told_before_anything_is_computed(trained, grouped, arguments, words, monkeypatch):
    monkeypatch.setattr(trained.module, "inference", None)
    with pytest.raises(ValueError, match=words):
        trained.differential_expression(grouped, silent=True, **arguments)


def test_categories_without_cells_are_left_out(trained, grouped):
    table = trained.differential_expression(grouped, groupby="group", silent=True)
    assert set(table["comparison"]) == {"T vs Rest", "B vs Rest"}
    numbers = trained.differential_expression(grouped, groupby="number", group1=1, silent=True)
    assert set(numbers["comparison"]) == {"1 vs Rest"}


@over(
    "call",
    [
        pytest.param(lambda model, batch: model.get_normalized_expression(transform_batch=batch), id="expression"),
        pytest.param(lambda model, batch: model.get_normalized_expression(transform_batch=[batch]), id="several"),
        pytest.param(lambda model, batch: model.posterior_predictive_sample(transform_batch=batch), id="predictive"),
        pytest.param(
            lambda model, batch: model.differential_expression(
                groupby="cell_type", batch_correction=True, batchid1=[batch], batchid2=["batch_0"], silent=True
            ),
            id="differential",
        ),
    ],
)
def test_batches_that_the_model_lacks_are_named(trained, call):
    with pytest.raises(ValueError, match=r"'batch_9'.*'batch_0', 'batch_1'"):
        call(trained, "batch_9")


@over(
    ("arguments", "error", "words"),
    [
        pytest.param({"library_size": np.nan}, ValueError, "library_size=nan", id="library-nan"),
        pytest.param({"library_size": -1}, ValueError, "library_size=-1", id="library-negative"),
        pytest.param({"library_size": "latnt"}, ValueError, "library_size='latnt'", id="library-text"),
        pytest.param({"n_samples": 0}, ValueError, "n_samples=0", id="no-samples"),
        pytest.param({"indices": [500]}, IndexError, "row 500.*120 cells", id="row-beyond"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(trained, arguments, error, words):
    with pytest.raises(error, match=words):
        trained.get_normalized_expression(**arguments)


def test_weights_that_are_not_heeded_are_told(trained):
    with pytest.warns(UserWarning, match="n_samples_overall"):
        trained.get_normalized_expression(indices=[0, 1], weights="importance")


@over("spins", [["a"], [1.5], [8], [-1], [0, 0], []], ids=str)
def test_spins_that_do_not_exist_are_refused(trained, spins):
    with pytest.raises(ValueError, match="0 to 7"):
        trained.get_spin_programs(spins=spins)


@over(
    "method",
    [
        lambda model, genes: model.get_normalized_expression(gene_list=genes),
        lambda model, genes: model.posterior_predictive_sample(gene_list=genes),
    ],
    ids=["get_normalized_expression", "posterior_predictive_sample"],
)
def test_genes_that_the_model_lacks_are_named(trained, method):
    with pytest.warns(UserWarning, match="'CD3E'"):
        assert method(trained, ["gene_1", "CD3E"]).shape[1] == 1
    with pytest.raises(ValueError, match=r"'Gene_1'.*Did you mean 'gene_1'"):
        method(trained, ["Gene_1"])


# ---------------------------------------------------------------------------------------------------------------------
# Matrices, and models without data
# ---------------------------------------------------------------------------------------------------------------------


MATRICES = [
    pytest.param(sparse.csr_array, id="csr_array"),
    pytest.param(sparse.csc_array, id="csc_array"),
    pytest.param(lambda X: pytest.importorskip("dask.array").from_array(X.toarray()), id="dask"),
]


@pytest.mark.parametrize("convert", MATRICES)
@over("layer", [None, "counts"])
def test_a_matrix_that_cannot_be_read_is_refused_at_setup_and_the_remedy_works(counts, convert, layer):
    import scipy

    adata = counts.copy()
    if layer is None:
        adata = ad.AnnData(convert(counts.X), obs=counts.obs, var=counts.var)
    else:
        adata.layers[layer] = convert(counts.X)
    with pytest.raises(TypeError, match="scvi-tools") as error:
        QBMSCVI.setup_anndata(adata, layer=layer)
    exec(str(error.value).split("Use `")[1].split("`")[0], {"adata": adata, "scipy": scipy})
    build(adata, layer=layer).train(**FIT)


def test_what_is_no_anndata_is_told_so(counts, trained):
    with pytest.raises(TypeError, match=r"ndarray.*anndata\.AnnData"):
        QBMSCVI.setup_anndata(counts.X.toarray())
    with pytest.raises(TypeError, match="str.*read_h5ad"):
        trained.get_latent_representation("cells.h5ad")
    with pytest.raises(TypeError, match="str.*read_h5ad"):
        QBMSCVI.load_query_data("cells.h5ad", trained)


@over("method", METHODS)
def test_a_model_loaded_without_data_asks_for_them(trained, tmp_path, method):
    trained.save(tmp_path / "model", overwrite=True)
    loaded = QBMSCVI.load(tmp_path / "model")
    with pytest.raises(ValueError, match=r"no AnnData.*`adata`.*load"):
        METHODS[method](loaded, None)


# ---------------------------------------------------------------------------------------------------------------------
# Cells from the prior
# ---------------------------------------------------------------------------------------------------------------------


def test_library_sizes_of_generated_cells_are_those_of_their_batch(counts):
    """And of cells that have counts: an empty one is left out."""
    adata = counts.copy()
    X = adata.X.toarray()
    is_deep = np.arange(N_CELLS) % 2 == 0
    adata.obs["depth"] = np.where(is_deep, "deep", "shallow")
    X[is_deep] = X[is_deep] * 50 + 1
    X[1] = 0
    adata.X = X
    model = build(adata, batch_key="depth", model={"use_observed_lib_size": False})
    model.train(**FIT)
    totals = X.sum(1)
    assert not np.isin(totals[is_deep], totals[~is_deep]).any()
    for batch, chosen in (("deep", is_deep), ("shallow", ~is_deep)):
        drawn = model.generate(300, batch=batch, seed=0).obs["library_size"]
        assert drawn.isin(totals[chosen & (totals > 0)]).all()
        assert drawn.nunique() > 20


def test_words_of_a_model_are_those_that_a_user_types(counts):
    adata = counts.copy()
    adata.obs["donor"] = [3, 7] * 60
    QBMSCVI.setup_anndata(adata, batch_key="donor")
    model = QBMSCVI(adata)
    assert "n_latent: 64" in model._model_summary_string
    assert "None" not in model._model_summary_string
    model.train(**FIT)
    with pytest.raises(ValueError, match=r"Use one of 3, 7\."):
        model.generate(3, batch="3")
