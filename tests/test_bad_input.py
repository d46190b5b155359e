"""Bad input of QBMSCVI is refused before training starts, by a message that names the cause and the remedy."""

from __future__ import annotations

import re

import dimod
import networkx as nx
import numpy as np
import pytest
import scvi
import torch
from tables import over

from qbmscvi import QBMSCVI, SamplingSchedule
from qbmscvi.boltzmann.smoothing import Gumbel, SpikeExponential
from qbmscvi.datasets import synthetic_counts
from qbmscvi.exceptions import GraphMismatchError, QBMSCVIError
from qbmscvi.samplers import BlockGibbsSampler, DimodSampler, ExactSampler, SimulatedAnnealingSampler

N_CELLS, N_GENES = 200, 60


@pytest.fixture(scope="module")
def counts():
    """Not registered: copies of registered data share their registration."""
    return synthetic_counts(N_CELLS, N_GENES, seed=2)


@pytest.fixture(scope="module")
def adata(counts):
    adata = counts.copy()
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    return adata


def train(model: QBMSCVI, **kwargs) -> QBMSCVI:
    defaults = {"max_epochs": 1, "batch_size": 64, "accelerator": "cpu", "enable_progress_bar": False}
    model.train(**{**defaults, **kwargs})
    return model


def small(adata, **kwargs) -> QBMSCVI:
    return QBMSCVI(adata, **{"n_latent": 6, "n_chains": 16, **kwargs})


def assert_untrained(model: QBMSCVI) -> None:
    assert not model.is_trained
    assert model.history is None
    assert int(model.module.prior.n_updates) == 0


def message(cause: str, remedy: str) -> str:
    return f"(?s){cause}.*{remedy}"


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def _set(value):
    def change(X):
        X[3, 5] = value
        return X

    return change


def _empty(X):
    X[7] = 0.0
    return X


DATA = [
    pytest.param(np.log1p, r"no integers, such as 0\.69.*normalized", "Load the raw counts", id="log"),
    pytest.param(_set(2.5), r"such as 2\.5 \(cell 'cell_3'", r"np\.rint", id="fractional"),
    pytest.param(_set(-1.0), r"negative values, such as -1\.0 \(cell 'cell_3'", "Load the raw counts", id="negative"),
    pytest.param(lambda X: X - X.mean(0), "negative values", "scaled or centered", id="centered"),
    pytest.param(_set(np.nan), r"value nan \(cell 'cell_3'", "remove these cells", id="nan"),
    pytest.param(_set(np.inf), r"value inf \(cell 'cell_3'", "remove these cells", id="infinite"),
    pytest.param(_set(-np.inf), r"value -inf \(cell 'cell_3'", "remove these cells", id="minus-infinite"),
    pytest.param(
        _empty, "1 of 200 cells .*'cell_7'", r"scanpy\.pp\.filter_cells\(adata, min_counts=1\)", id="empty-cell"
    ),
]


@pytest.mark.filterwarnings("ignore:.*does not contain unnormalized count data")
@over("is_sparse", [False, True])
@over(("change", "cause", "remedy"), DATA)
def test_data_that_are_not_counts_are_refused(counts, change, cause, remedy, is_sparse):
    bad = counts.copy()
    X = change(bad.X.toarray())
    bad.X = type(counts.X)(X) if is_sparse else X
    QBMSCVI.setup_anndata(bad)
    model = small(bad)
    with pytest.raises(ValueError, match=message(cause, remedy)):
        train(model)
    assert_untrained(model)


def test_cells_are_numbered_through_all_chunks(counts, monkeypatch):
    monkeypatch.setattr("qbmscvi.model._counts._CHUNK_ROWS", 50)
    bad = counts.copy()
    X = bad.X.toarray()
    X[[120, 170]] = 0.0
    bad.X = X
    QBMSCVI.setup_anndata(bad)
    with pytest.raises(ValueError, match=r"2 of 200 cells .*'cell_120'"):
        train(small(bad))


@pytest.mark.filterwarnings("ignore:.*does not contain unnormalized count data")
def test_data_are_taken_from_the_registered_layer(counts):
    adata = counts.copy()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    QBMSCVI.setup_anndata(adata, layer="counts")
    assert train(small(adata)).is_trained
    swapped = counts.copy()
    swapped.layers["logs"] = swapped.X.log1p()
    QBMSCVI.setup_anndata(swapped, layer="logs")
    with pytest.raises(ValueError, match="'logs'.*no integers"):
        train(small(swapped))


@pytest.mark.parametrize("kind", ["int64", "float64", "csc"])
def test_counts_of_every_kind_are_taken(counts, kind):
    adata = counts.copy()
    adata.X = adata.X.tocsc() if kind == "csc" else adata.X.toarray().astype(kind)
    QBMSCVI.setup_anndata(adata)
    assert train(small(adata)).is_trained


@pytest.mark.filterwarnings("ignore:.*does not contain unnormalized count data")
def test_continuous_data_need_a_normal_likelihood(counts):
    adata = counts.copy()
    adata.X = adata.X.log1p()
    QBMSCVI.setup_anndata(adata)
    with pytest.raises(ValueError, match="gene_likelihood='normal'`"):
        train(small(adata))
    assert train(small(adata, gene_likelihood="normal")).is_trained


@pytest.mark.filterwarnings("ignore:.*does not contain unnormalized count data")
def test_negative_totals_are_not_called_empty_cells(counts):
    adata = counts.copy()
    X = adata.X.toarray()
    adata.X = X - X.mean(0)
    QBMSCVI.setup_anndata(adata)
    with pytest.raises(ValueError, match=r"negative total|use_observed_lib_size=False|size_factor_key"):
        train(small(adata, gene_likelihood="normal"))


def test_empty_cell_is_no_trouble_without_an_observed_library_size(counts):
    adata = counts.copy()
    X = adata.X.toarray()
    X[7] = 0.0
    adata.X = X
    adata.obs["size_factor"] = 1.0
    QBMSCVI.setup_anndata(adata, size_factor_key="size_factor")
    assert train(small(adata)).is_trained


# ---------------------------------------------------------------------------------------------------------------------
# Setup
# ---------------------------------------------------------------------------------------------------------------------


@over(
    ("setup", "error", "cause"),
    [
        pytest.param({"batch_key": "donor"}, ValueError, "='donor'", id="batch_key"),
        pytest.param({"labels_key": "kind"}, ValueError, "='kind'", id="labels_key"),
        pytest.param({"size_factor_key": "size"}, ValueError, "='size' is no column", id="size_factor_key"),
        pytest.param({"layer": "raw"}, ValueError, "='raw' is no layer", id="layer"),
        pytest.param({"categorical_covariate_keys": ["x"]}, ValueError, "='x' is no column", id="categorical"),
        pytest.param({"continuous_covariate_keys": ["y"]}, ValueError, "='y' is no column", id="continuous"),
        pytest.param({"batch": "batch"}, TypeError, "unexpected keyword arguments {'batch'", id="unknown-argument"),
    ],
)
def test_missing_keys_are_named_at_setup(counts, setup, error, cause):
    with pytest.raises(error, match=re.escape(cause)):
        QBMSCVI.setup_anndata(counts.copy(), **setup)


def test_data_set_up_with_scvi_must_be_set_up_again(counts):
    adata = counts.copy()
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    cause, remedy = "has been setup with a different model", r"QBMSCVI\.setup_anndata first"
    with pytest.raises(ValueError, match=f"(?s){remedy}.*{cause}"):
        QBMSCVI(adata)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    assert train(small(adata)).is_trained


def test_data_without_setup_are_refused(counts):
    with pytest.raises(ValueError, match=r"QBMSCVI\.setup_anndata"):
        QBMSCVI(counts.copy())


def test_copy_of_registered_data_is_refused(adata):
    with pytest.raises(ValueError, match="copy"):
        QBMSCVI(adata.copy())


# ---------------------------------------------------------------------------------------------------------------------
# Constructor
# ---------------------------------------------------------------------------------------------------------------------


def _with_self_loop():
    graph = nx.path_graph(6)
    graph.add_edge(2, 2)
    return graph


CONSTRUCTOR = [
    pytest.param(
        {"n_latent": 1, "n_hidden_spins": 0},
        ValueError,
        "two layers, but there are 1",
        "at least 2.*independent",
        id="one-spin",
    ),
    pytest.param({"n_latent": 0}, ValueError, "n_latent=0 is too small", "Leave it out", id="n_latent-0"),
    pytest.param({"n_latent": -3}, ValueError, "n_latent=-3 is too small", "Leave it out", id="n_latent-negative"),
    pytest.param(
        {"prior_graph": _with_self_loop()},
        ValueError,
        "Node 2 has a self-loop",
        r"Remove it.*selfloop_edges",
        id="self-loop",
    ),
    pytest.param(
        {"prior_graph": nx.path_graph(9)},
        ValueError,
        "prior graph has 9 nodes, but the model has 6 spins",
        "Set the number of spins to 9",
        id="graph-size",
    ),
    pytest.param(
        {"prior_graph": nx.DiGraph([(i, i + 1) for i in range(5)])},
        TypeError,
        "graph is a DiGraph",
        r"Convert it first.*to_undirected",
        id="directed-graph",
    ),
    pytest.param(
        {"prior_graph": nx.MultiGraph([(i, i + 1) for i in range(5)])},
        TypeError,
        "graph is a MultiGraph",
        "Convert it first",
        id="multigraph",
    ),
    pytest.param(
        {"prior_graph": nx.Graph()}, ValueError, "at least one node", "Raise the number of spins", id="empty-graph"
    ),
    pytest.param(
        {"prior_graph": "lattice"},
        ValueError,
        "Unknown prior graph 'lattice'",
        "Use one of bipartite, complete, independent, .* or pass a networkx.Graph",
        id="graph-name",
    ),
    pytest.param(
        {"prior_graph": np.eye(6)},
        TypeError,
        "must be a name, a networkx.Graph or a qbmscvi.graphs.Graph, got ndarray",
        "Use e.g. 'bipartite'",
        id="graph-type",
    ),
    pytest.param(
        {"smoothing": "sharp"},
        ValueError,
        "Unknown smoothing 'sharp'",
        r"Use one of 'straight-through', .*Gumbel\(temperature=0\.3\)",
        id="smoothing",
    ),
    pytest.param(
        {"smoothing": 0.3},
        TypeError,
        "must be a name or a qbmscvi.boltzmann.smoothing.Smoothing, got float",
        "",
        id="smoothing-type",
    ),
    pytest.param(
        {"smoothing": Gumbel}, TypeError, "must be a name or a .*Smoothing, got ABCMeta", "", id="smoothing-class"
    ),
    pytest.param(
        {"n_chains": 1}, ValueError, "n_chains=1 is too small; it must be at least 2", "512 is usual", id="n_chains"
    ),
    pytest.param(
        {"latent_distribution": "ln"},
        ValueError,
        "latent_distribution='ln' has no meaning under a Boltzmann prior",
        "Leave it out",
        id="logistic-normal",
    ),
    pytest.param(
        {"dispersion": "cell"}, ValueError, "`dispersion` must be one of", "'gene', 'gene-batch'", id="dispersion"
    ),
    pytest.param(
        {"batch_representation": "hashed"},
        ValueError,
        "`batch_representation` must be one of",
        "'one-hot', 'embedding'",
        id="batch_representation",
    ),
    pytest.param({"n_latents": 4}, TypeError, "unexpected keyword argument 'n_latents'", "", id="unknown-argument"),
    pytest.param({"n_latent": "4"}, TypeError, "n_latent", "integer", id="n_latent-text"),
    pytest.param({"n_latent": 4.5}, TypeError, "n_latent", "integer", id="n_latent-float"),
    pytest.param({"n_latent": True}, TypeError, "n_latent=True is a bool", "integer", id="n_latent-bool"),
    pytest.param({"n_chains": "64"}, TypeError, "n_chains", "integer", id="n_chains-text"),
    pytest.param({"n_chains": 64.0}, TypeError, "n_chains", "integer", id="n_chains-float"),
    pytest.param(
        {"gene_likelihood": "gamma"},
        ValueError,
        "gene_likelihood",
        "'zinb'",
        id="gene_likelihood",
    ),
]


@over(("arguments", "error", "cause", "remedy"), CONSTRUCTOR)
def test_impossible_models_are_refused(adata, arguments, error, cause, remedy):
    with pytest.raises(error, match=message(cause, remedy)):
        small(adata, **arguments)


@over(
    ("build", "cause", "remedy"),
    [
        pytest.param(lambda: Gumbel(temperature=0.0), "temperature=0.0", "0.3 to 1", id="gumbel"),
        pytest.param(lambda: Gumbel(temperature=np.nan), "temperature=nan", "", id="gumbel-nan"),
        pytest.param(lambda: SpikeExponential(sharpness=-1), "sharpness=-1", "3 to 6", id="spike"),
        pytest.param(lambda: BlockGibbsSampler(n_sweeps=0), "n_sweeps=0", "at least 1", id="gibbs"),
        pytest.param(lambda: SimulatedAnnealingSampler(n_hold=0), "n_hold=0", "at least 1", id="annealing"),
        pytest.param(lambda: SamplingSchedule(every_n_steps=0), "every_n_steps=0", "at least 1", id="every"),
        pytest.param(lambda: SamplingSchedule(n_sweeps=-2), "n_sweeps=-2", "at least 1", id="sweeps"),
        pytest.param(lambda: SamplingSchedule(burn_in=0), "burn_in=0", "at least 1", id="burn_in"),
        pytest.param(
            lambda: SamplingSchedule(every_n_steps=1.5),
            "every_n_steps=1.5",
            "integer",
            id="every-float",
        ),
        pytest.param(
            lambda: SamplingSchedule(burn_in="100"),
            "burn_in='100'",
            "integer",
            id="burn_in-text",
        ),
    ],
)
def test_impossible_settings_are_refused(build, cause, remedy):
    with pytest.raises((TypeError, ValueError), match=message(cause, remedy)):
        build()


# ---------------------------------------------------------------------------------------------------------------------
# train
# ---------------------------------------------------------------------------------------------------------------------

TRAIN = [
    pytest.param(
        {}, {"sampler": "annealer"}, ValueError, "Unknown sampler 'annealer'", "Use one of 'gibbs'", id="sampler-name"
    ),
    pytest.param(
        {},
        {"sampler": 3},
        TypeError,
        "must be a name, a qbmscvi.samplers.Sampler or a dimod sampler, got int",
        r"Pass e.g. `qbmscvi\.samplers\.BlockGibbsSampler\(\)`",
        id="sampler-type",
    ),
    pytest.param(
        {},
        {"sampler": ExactSampler},
        TypeError,
        "ExactSampler is a class",
        r"pass `ExactSampler\(\)`",
        id="sampler-class",
    ),
    pytest.param(
        {},
        {"sampler": DimodSampler(dimod.RandomSampler(), max_spins=4)},
        GraphMismatchError,
        r"problem has 12 spins, but DimodSampler\[RandomSampler\] accepts at most 4",
        "Lower `n_latent`, or .*sampler='gibbs'",
        id="max_spins",
    ),
    pytest.param(
        {"n_latent": 64},
        {"sampler": "exact"},
        GraphMismatchError,
        "enumerate 64 of the 128 spins, but at most 20",
        "Lower `n_latent`, or use sampler='gibbs'",
        id="exact-64-spins",
    ),
    pytest.param(
        {},
        {"sampler": DimodSampler(dimod.ExactSolver(), target="ground_state")},
        ValueError,
        r"DimodSampler\[ExactSolver\] finds ground states",
        "Use sampler='gibbs' or another sampler",
        id="ground-states",
    ),
    pytest.param({}, {"samplers": "gibbs"}, TypeError, "unexpected keyword argument 'samplers'", "", id="unknown"),
    pytest.param(
        {},
        {"plan_kwargs": {"prior_rate": 1}},
        TypeError,
        "argument 'prior_rate'",
        "",
        id="unknown-plan-argument",
    ),
    pytest.param(
        {},
        {"plan_kwargs": {"sampler": "exact"}},
        (TypeError, ValueError),
        "sampler",
        r"train\(",
        id="sampler-in-plan_kwargs",
    ),
    pytest.param(
        {},
        {"schedule": {"every_n_steps": 2}},
        TypeError,
        "schedule",
        "SamplingSchedule",
        id="schedule-type",
    ),
    pytest.param(
        {},
        {"plan_kwargs": {"n_epochs_kl_warmup": "half"}},
        ValueError,
        "n_epochs_kl_warmup='half'",
        "'auto'",
        id="warmup",
    ),
    pytest.param(
        {},
        {"plan_kwargs": {"prior_lr": -1.0}},
        ValueError,
        "prior_lr=-1.0 is neither",
        "at least 0 nor None",
        id="negative-prior_lr",
    ),
    pytest.param(
        {}, {"plan_kwargs": {"prior_lr": "a"}}, ValueError, "prior_lr='a' is neither", "a number", id="prior_lr-text"
    ),
    pytest.param(
        {}, {"plan_kwargs": {"rate": 1}}, TypeError, "unexpected argument 'rate'", "scvi.train.TrainingPlan", id="rate"
    ),
]


@over(("model_arguments", "arguments", "error", "cause", "remedy"), TRAIN)
def test_impossible_training_is_refused_before_it_starts(adata, model_arguments, arguments, error, cause, remedy):
    model = small(adata, **model_arguments)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    with pytest.raises(error, match=message(cause, remedy)):
        train(model, **arguments)
    assert_untrained(model)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())


def test_own_errors_are_also_those_of_python():
    # `except ValueError` of code that knows nothing of this package keeps working
    assert issubclass(GraphMismatchError, (QBMSCVIError, ValueError))


# ---------------------------------------------------------------------------------------------------------------------
# Reading the model
# ---------------------------------------------------------------------------------------------------------------------


@over(
    ("arguments", "error", "cause", "remedy"),
    [
        pytest.param({"n_samples": 0}, ValueError, "n_(samples|cells)=0", "at least 1", id="none"),
        pytest.param({"sampler": "mcmc"}, ValueError, "Unknown sampler 'mcmc'", "Use one of", id="sampler"),
        pytest.param(
            {"sampler": DimodSampler(dimod.RandomSampler(), max_spins=2)},
            GraphMismatchError,
            "accepts at most 2",
            "sampler='gibbs'",
            id="max_spins",
        ),
        pytest.param(
            {"n_samples": 2.5},
            (TypeError, ValueError),
            "n_(samples|cells)=2.5",
            "integer",
            id="fraction",
        ),
        pytest.param({"seed": -1}, ValueError, "seed=-1", "Leave it out", id="negative-seed"),
        pytest.param({"seed": "7"}, TypeError, "seed='7' is a str", "Leave it out", id="seed-text"),
        pytest.param(
            {"sampler": DimodSampler(dimod.ExactSolver(), target="ground_state")},
            ValueError,
            "finds ground states",
            "Use sampler='gibbs'",
            id="ground-states",
        ),
    ],
)
@over("method", ["sample_prior", "generate"])
def test_impossible_samples_are_refused(adata, method, arguments, error, cause, remedy):
    arguments = dict(arguments)
    if method == "generate" and "n_samples" in arguments:
        arguments["n_cells"] = arguments.pop("n_samples")
    with pytest.raises(error, match=message(cause, remedy)):
        getattr(small(adata), method)(**arguments)
