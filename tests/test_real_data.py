"""QBMSCVI on real counts: every sampler trains, and couplings of the prior earn their keep."""

from __future__ import annotations

import numpy as np
import pytest
import scanpy as sc
import scvi
import torch

from qbmscvi import QBMSCVI, SamplingSchedule
from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.diagnostics import estimate_log_z

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kang(shared_data):
    """2,800 cells, 2,000 genes, two batches."""
    adata = sc.read_h5ad(shared_data / "kang_ifnb.h5ad")
    sc.pp.highly_variable_genes(adata, n_top_genes=2000, flavor="seurat_v3", batch_key="batch", subset=True)
    assert adata.X.sum(axis=1).min() > 0
    torch.set_num_threads(1)  # numba, which scanpy calls, sets the threads of torch's OpenMP anew
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    return adata


def train(model: QBMSCVI, **kwargs) -> QBMSCVI:
    model.train(accelerator="cpu", enable_progress_bar=False, **kwargs)
    return model


@pytest.mark.parametrize(
    ("n_spins", "arguments"),
    [
        pytest.param(32, {"sampler": "gibbs"}, id="gibbs"),
        pytest.param(
            32,
            {"sampler": "simulated_annealing", "schedule": SamplingSchedule(every_n_steps=4)},
            id="simulated_annealing",
        ),
        pytest.param(
            32,
            {"sampler": "parallel_tempering", "schedule": SamplingSchedule(every_n_steps=4)},
            id="parallel_tempering",
        ),
        pytest.param(
            32,
            {"sampler": "path_integral_annealing", "schedule": SamplingSchedule(every_n_steps=20)},
            id="path_integral_annealing",
        ),
        pytest.param(16, {"sampler": "tree_decomposition"}, id="tree_decomposition"),
        pytest.param(16, {"sampler": "exact"}, id="exact"),
    ],
)
def test_every_sampler_trains_on_real_counts(kang, n_spins, arguments):
    scvi.settings.seed = 0
    model = train(QBMSCVI(kang, n_latent=n_spins), max_epochs=15, **arguments)
    z = model.get_latent_representation()
    assert np.isfinite(z).all()
    history = {name: table.iloc[:, 0].to_numpy(dtype=float) for name, table in model.history.items()}
    for name, values in history.items():
        assert len(values) == 15, name
        assert np.isfinite(values).all(), name
    assert history["elbo_train"][-1] < history["elbo_train"][0]
    assert history["sampling_fallbacks"][-1] == 0
    assert np.isfinite(float(model.get_elbo(indices=model.validation_indices)))
    print(
        f"\n{arguments['sampler']}: ELBO of training, epochs 1 and 15: {-history['elbo_train'][0]:.1f} and "
        f"{-history['elbo_train'][-1]:.1f} nats; sampling {history['sampling_seconds'].sum():.2f} s"
    )


def test_couplings_raise_the_held_out_elbo_of_spins(kang):
    """The J = 0 control against the bipartite prior: same seed, same cells, paired.

    The difference per cell is averaged over ten draws of the posterior. Its mean has to exceed three standard errors,
    in which the errors of both estimates of log Z, common to all cells, are counted in.
    """
    elbo, log_z_scale, cells = {}, {}, {}
    for graph in ("bipartite", "independent"):
        scvi.settings.seed = 0
        model = train(QBMSCVI(kang, prior_graph=graph, gene_likelihood="nb"), max_epochs=60)
        cells[graph] = np.sort(model.validation_indices)
        scvi.settings.seed = 1
        draws = [np.asarray(model.get_elbo(indices=cells[graph], return_mean=False)) for _ in range(10)]
        elbo[graph] = np.mean(draws, axis=0, dtype=float)
        log_z_scale[graph] = float(model.module.prior.log_z_scale)
        kl = float(model.history["kl_local_train"].iloc[-1, 0])
        print(
            f"\n{graph}: held-out ELBO {elbo[graph].mean():.2f} nats over {len(cells[graph])} cells, KL in training "
            f"{kl:.2f}, log Z {float(model.module.prior.log_z):.3f} +- {log_z_scale[graph]:.3f}"
        )
    np.testing.assert_array_equal(cells["bipartite"], cells["independent"])
    assert log_z_scale["independent"] == 0.0  # exact
    difference = elbo["bipartite"] - elbo["independent"]
    error = np.hypot(difference.std(ddof=1) / np.sqrt(len(difference)), log_z_scale["bipartite"])
    print(f"couplings gain {difference.mean():.2f} +- {error:.2f} nats per cell ({difference.mean() / error:.1f} SE)")
    assert difference.mean() > 3 * error


def test_kl_of_training_is_that_of_draws_and_not_that_at_mean_spins(kang):
    """Within 0.1 nats, the number that README states; KL at mean spins, an upper bound, is more than 1 nat too high."""
    scvi.settings.seed = 0
    model = train(QBMSCVI(kang), max_epochs=60)
    prior = model.module.prior
    q = FactorialPosterior(torch.from_numpy(model.get_latent_representation(representation="logits")))
    with torch.no_grad():
        of_training, at_mean = prior._mean_log_sum_over_hidden(q.mean), prior._log_sum_over_hidden(q.mean)
        draws = torch.stack([prior._log_sum_over_hidden(q.sample()).mean() for _ in range(200)])
    error = float(of_training.mean() - draws.mean())
    bound = float(draws.mean() - at_mean.mean())
    print(f"\nKL of training {-error:+.3f} +- {float(draws.std()) / 200**0.5:.3f} nats, at mean spins {bound:+.2f}")
    assert abs(error) < 0.1
    assert bound > 1.0


@pytest.mark.parametrize("n_spins", [64, 256])
def test_log_z_of_a_trained_prior_is_known_within_its_error(kang, n_spins):
    """Two estimates from other seeds, one with four times the steps, differ by less than 4 of their standard errors."""
    scvi.settings.seed = 0
    model = train(QBMSCVI(kang, n_latent=n_spins), max_epochs=15)
    problem, samples = model.module.prior.to_ising(), model.module.prior.chains
    estimates = [
        estimate_log_z(problem, samples=samples, n_steps=n_steps, seed=n_steps, method="ais") for n_steps in (500, 2000)
    ]
    for estimate in (model.get_log_z(), *estimates):
        low, high = estimate.interval
        print(f"\n{n_spins} spins: log Z {estimate.value:.4f}, interval of width {high - low:.4f}")
    short, long = estimates
    assert abs(short.value - long.value) < 4 * np.hypot(short.scale, long.scale)
    assert long.scale < 0.5
