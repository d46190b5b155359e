"""What goes wrong in ``train``: low precision, batches of one cell, divergence at the first step, Ctrl-C."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.distributions import kl_divergence

from qbmscvi import QBMSCANVI, QBMSCVI, SamplingSchedule
from qbmscvi.datasets import synthetic_counts
from qbmscvi.distributions import FactorialPosterior
from qbmscvi.exceptions import TrainingDivergedError
from qbmscvi.samplers import BlockGibbsSampler

FIT = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False}
MODELS = {
    "spins": (QBMSCVI, {}),
    "complete": (QBMSCVI, {"prior_graph": "complete"}),
    "hardware": (QBMSCVI, {"prior_graph": "chimera"}),
    "gaussian-spins": (QBMSCVI, {"latent": "gaussian-spins", "n_latent": 3, "n_spins": 8}),
    "gumbel": (QBMSCVI, {"smoothing": "gumbel"}),
    "spike-exponential": (QBMSCVI, {"smoothing": "spike-exponential"}),
    "poisson": (QBMSCVI, {"gene_likelihood": "poisson"}),
    "normal": (QBMSCVI, {"gene_likelihood": "normal"}),
    "latent-library": (QBMSCVI, {"use_observed_lib_size": False}),
    "labels": (QBMSCANVI, {}),
    "labels-gaussian-spins": (QBMSCANVI, {"latent": "gaussian-spins", "n_latent": 3, "n_spins": 8}),
}


def cells(n_cells, seed=1):
    return synthetic_counts(max(n_cells, 30), 30, seed=seed)[:n_cells].copy()


def build(name="spins", n_cells=140, **kwargs):
    cls, arguments = MODELS[name]
    torch.manual_seed(0)
    adata = cells(n_cells)
    if cls is QBMSCANVI:
        cls.setup_anndata(adata, "cell_type", adata.obs["cell_type"].iloc[0], batch_key="batch")
    else:
        cls.setup_anndata(adata, batch_key="batch")
    return cls(adata, **{"n_hidden": 16, "n_latent": 8, "n_chains": 16, **arguments, **kwargs})


def state_of(model):
    return {name: value.detach().clone() for name, value in model.module.state_dict().items()}


def assert_equal_states(first, second):
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


# Mixed precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_mixed_precision_trains(name, precision):
    model = build(name)
    model.train(**FIT, precision=precision, check_val_every_n_epoch=1)
    for key in ("elbo_train", "elbo_validation", "prior_log_z"):
        assert np.isfinite(model.history[key].to_numpy(float)).all(), key
    assert all(value.dtype == torch.float32 for value in model.module.parameters())
    assert model.get_latent_representation().dtype == np.float32
    assert np.isfinite(float(model.get_elbo()))


def test_gradients_that_a_scaler_scales_are_clipped():
    """As on a GPU; ``precision="16-mixed"`` alone is bfloat16 on a CPU. Lightning refuses a fused optimizer there."""
    model = build()
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    model.train(**FIT, plugins=[scaled], gradient_clip_val=1.0, check_val_every_n_epoch=1)
    assert np.isfinite(model.history["elbo_validation"].to_numpy(float)).all()


@pytest.mark.parametrize("name", ["spins", "complete", "hardware", "gaussian-spins", "labels"])
def test_the_divergence_is_computed_in_single_precision(name):
    """Energies of hundreds of nats: bfloat16 would round them to the nearest nat or two."""
    model = build(name)
    prior = model.module.prior
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(3.0 * torch.randn(parameter.shape))
    v, s = prior.split(torch.randn(5, prior.n_units))
    q = FactorialPosterior(v, v.exp(), 4.0 * s)
    kl = kl_divergence(q, prior.distribution())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kl_divergence(q, prior.distribution()), kl)
