"""What goes wrong in ``train``: low precision, batches of one cell, divergence at the first step, Ctrl-C."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from scvi.dataloaders import DataSplitter
from tables import corners, over
from torch.distributions import kl_divergence

from qbmscvi import QBMSCANVI, QBMSCVI, SamplingSchedule
from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.datasets import synthetic_counts
from qbmscvi.exceptions import TrainingDivergedError
from qbmscvi.samplers import BlockGibbsSampler
from qbmscvi.train._runner import _avoid_batches_of_one

FIT = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False}
MODELS = {
    "spins": (QBMSCVI, {}),
    "complete": (QBMSCVI, {"prior_graph": "complete"}),
    "hardware": (QBMSCVI, {"prior_graph": "chimera"}),
    "gumbel": (QBMSCVI, {"smoothing": "gumbel"}),
    "spike-exponential": (QBMSCVI, {"smoothing": "spike-exponential"}),
    "poisson": (QBMSCVI, {"gene_likelihood": "poisson"}),
    "normal": (QBMSCVI, {"gene_likelihood": "normal"}),
    "latent-library": (QBMSCVI, {"use_observed_lib_size": False}),
    "labels": (QBMSCANVI, {}),
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


@pytest.mark.parametrize(("name", "precision"), corners(list(MODELS), ["bf16-mixed"]) + [("spins", "16-mixed")])
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


@over("name", ["spins", "complete", "hardware", "labels"])
def test_the_divergence_is_computed_in_single_precision(name):
    """Energies of hundreds of nats: bfloat16 would round them to the nearest nat or two."""
    model = build(name)
    prior = model.module.prior
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(3.0 * torch.randn(parameter.shape))
    q = FactorialPosterior(4.0 * torch.randn(5, prior.n_visible))
    kl = kl_divergence(q, prior.distribution())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kl_divergence(q, prior.distribution()), kl)


# Batches of one cell -----------------------------------------------------------------------------------------------


class Seen(Callback):
    """Sizes of the batches of each epoch, and the library sizes of their cells, which tell cells apart."""

    def __init__(self):
        self.sizes, self.cells = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.sizes.append([])
        self.cells.append([])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.sizes[-1].append(len(batch["X"]))
        self.cells[-1].extend(map(tuple, batch["X"].tolist()))


@pytest.mark.parametrize(
    ("n_cells", "fit", "sizes"),
    [
        pytest.param(129, {"train_size": 1.0}, [128], id="129"),
        pytest.param(257, {"train_size": 1.0}, [128, 128], id="257"),
        pytest.param(65, {"train_size": 1.0, "batch_size": 64}, [64], id="batch-size"),
        pytest.param(145, {"train_size": 0.9, "batch_size": 13}, [13] * 10, id="of-a-split"),
        pytest.param(
            70,
            {"batch_size": 32, "datasplitter_kwargs": {"external_indexing": [np.arange(65), np.arange(65, 70)]}},
            [32, 32],
            id="external-indices",
        ),
        pytest.param(130, {"train_size": 1.0}, [128, 2], id="two-are-enough"),
        pytest.param(70, {"train_size": 1.0, "datasplitter_kwargs": {"drop_last": True}, "batch_size": 32}, [32] * 2),
    ],
)
@pytest.mark.filterwarnings("ignore:Last batch will have a small size")
def test_a_last_batch_of_one_cell_is_left_out_of_each_epoch(n_cells, fit, sizes, caplog):
    model, seen = build("labels" if n_cells in (129, 130) else "spins", n_cells), Seen()
    model.train(**FIT, **fit, callbacks=[seen])
    assert seen.sizes == [sizes, sizes]
    said = [record.getMessage() for record in caplog.records if "leave" in record.getMessage()]
    n_left_out = len(model.train_indices) - sum(sizes)
    assert len(said) == (n_left_out == 1)
    if said:
        assert str(len(model.train_indices)) in said[0]
        assert len(set(seen.cells[0]) ^ set(seen.cells[1])) == 2  # another one each time


@pytest.mark.parametrize("layers", ["encoder", "decoder", "none"])
def test_cells_are_left_out_only_for_batch_normalization(layers):
    model, seen = build(n_cells=129, use_batch_norm=layers), Seen()
    model.train(**FIT, train_size=1.0, callbacks=[seen])
    assert seen.sizes[0] == ([128, 1] if layers == "none" else [128])


@pytest.mark.parametrize(
    ("n_cells", "fit"),
    [(2, {}), (2, {"train_size": 1.0}), (3, {"train_size": 1.0}), (129, {"train_size": 1.0}), (130, {})],
    ids=str,
)
def test_a_query_of_few_cells_trains(n_cells, fit):
    reference = build()
    reference.train(**FIT)
    query = QBMSCVI.load_query_data(cells(n_cells, seed=2), reference)
    before, seen = state_of(query), Seen()
    query.train(**FIT, **fit, callbacks=[seen])
    assert sum(seen.sizes[0]) >= 2
    assert any(not torch.equal(value, before[name]) for name, value in state_of(query).items())
    assert query.get_latent_representation().shape == (n_cells, 8)


@pytest.mark.parametrize("fit", [{}, {"train_size": 1.0}], ids=["default-sizes", "train_size"])
def test_a_single_training_cell_is_refused_with_the_sizes(fit):
    model = build(n_cells=1)
    with pytest.raises(ValueError, match=r"\b1 cells.*128.*use_batch_norm='none'"):
        model.train(**FIT, **fit)
    with pytest.raises(ValueError, match=r"140 cells.*\b1\b.*batch_size"):
        build().train(**FIT, train_size=1.0, batch_size=1)
    free, seen = build(n_cells=1, use_batch_norm="none"), Seen()
    free.train(**FIT, **fit, callbacks=[seen])
    assert seen.sizes == [[1], [1]]


def test_validation_takes_one_cell():
    model = build(n_cells=11)
    model.train(**FIT, train_size=0.9, check_val_every_n_epoch=1)
    assert len(model.validation_indices) == 1
    assert np.isfinite(model.history["elbo_validation"].to_numpy(float)).all()


# Divergence at the first step, and Ctrl-C --------------------------------------------------------------------------


class At(Callback):
    """Plants NaN or raises, or both, before a step."""

    def __init__(self, step, plant=None, error=None):
        self.step, self.plant, self.error = step, plant, error
        self.state = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != self.step:
            return
        if self.plant:
            tensors = dict(pl_module.module.named_parameters()) | dict(pl_module.module.named_buffers())
            with torch.no_grad():
                tensors[self.plant].view(-1)[0] = float("nan")
        self.state = {name: value.detach().clone() for name, value in pl_module.module.state_dict().items()}
        if self.error:
            raise self.error


UNTRAINED = "untrained model"  # scVI's words
QUICK = {**FIT, "max_epochs": 4, "batch_size": 32, "schedule": SamplingSchedule(every_n_steps=1, n_sweeps=1)}
N_STEPS = 4  # of an epoch: 126 training cells


@pytest.mark.parametrize("plant", ["px_r", "prior.h", "z_encoder.logit_encoder.weight"])
def test_a_model_whose_first_step_failed_is_not_trained(plant):
    model = build()
    before = state_of(model)
    with pytest.raises(TrainingDivergedError, match="step 0.*size factors"):
        model.train(**QUICK, callbacks=[At(0, plant)])
    assert not model.is_trained
    assert_equal_states(before | {"prior.is_log_z_estimated": torch.tensor(False)}, state_of(model))
    with pytest.raises(RuntimeError, match=UNTRAINED):
        model.get_latent_representation()
    model.train(**QUICK)
    assert model.is_trained
    assert len(model.history["train_loss"]) == 4


def test_divergence_after_a_good_epoch_leaves_a_trained_model():
    model = build()
    with pytest.raises(TrainingDivergedError, match=rf"step {N_STEPS}\..*learning rate"):
        model.train(**QUICK, callbacks=[At(N_STEPS + 1, "px_r")])
    assert model.is_trained
    assert np.isfinite(model.get_latent_representation()).all()


def test_a_model_that_was_trained_stays_trained():
    model = build()
    model.train(**FIT)
    z = model.get_latent_representation()
    with pytest.raises(TrainingDivergedError):
        model.train(**QUICK, callbacks=[At(0, "px_r")])
    assert model.is_trained
    np.testing.assert_array_equal(model.get_latent_representation(), z)


@pytest.mark.parametrize("step", [1, N_STEPS + 1, 2 * N_STEPS])
def test_ctrl_c_keeps_the_state_of_that_moment(step):
    model, stop = build(), At(step, error=KeyboardInterrupt())
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        model.train(**QUICK, callbacks=[stop])
    assert signal.getsignal(signal.SIGINT) is handler
    assert model.is_trained
    assert not model.module.training
    assert_equal_states(stop.state, state_of(model))
    assert not bool(model.module.prior.is_log_z_estimated)
    assert len(model.history.get("train_loss", ())) == step // N_STEPS
    assert len(model.train_indices) + len(model.validation_indices) == model.adata.n_obs
    assert np.isfinite(model.get_latent_representation()).all()
    assert model.get_log_z().scale > 0 or model.get_log_z().method == "exact"
    assert np.isfinite(float(model.get_elbo()))
    model.train(**QUICK)
    assert len(model.history["train_loss"]) == step // N_STEPS + 4


@pytest.mark.parametrize(
    "plant", ["px_r", "prior.J", "prior.log_z", "z_encoder.encoder.fc_layers.Layer 0.1.running_var"]
)
def test_ctrl_c_gives_the_last_finite_state_back(plant):
    model, stop = build(), At(N_STEPS + 2, plant, KeyboardInterrupt())
    with pytest.raises(SystemExit):
        model.train(**QUICK, callbacks=[stop])
    assert model.is_trained
    assert all(torch.isfinite(value).all() for value in model.module.state_dict().values())
    assert np.isfinite(model.get_latent_representation()).all()
    assert np.isfinite(model.get_log_z().value)


@pytest.mark.parametrize("plant", [None, "px_r"])
def test_ctrl_c_before_the_first_step_leaves_an_untrained_model(plant):
    model = build()
    before = state_of(model)
    with pytest.raises(SystemExit):
        model.train(**QUICK, callbacks=[At(0, plant, KeyboardInterrupt())])
    with pytest.raises(RuntimeError, match=UNTRAINED):
        model.get_latent_representation()
    networks = {name: value for name, value in before.items() if not name.startswith("prior.")}
    assert_equal_states(networks, state_of(model))


def test_ctrl_c_while_training_is_set_up_leaves_an_untrained_model():
    class Early(Callback):
        def setup(self, trainer, pl_module, stage):
            raise KeyboardInterrupt

    model = build()
    with pytest.raises(SystemExit):
        model.train(**QUICK, callbacks=[Early()])
    assert not model.is_trained
    assert not model.module.training


def test_ctrl_c_closes_the_worker_of_a_remote_sampler():
    class Remote(BlockGibbsSampler):
        traits = BlockGibbsSampler.traits.__class__(**{**vars(BlockGibbsSampler.traits), "is_remote": True})

    plans = []

    class Stop(At):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            plans[:] = [pl_module]
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    model = build()
    with pytest.raises(SystemExit):
        model.train(**QUICK, sampler=Remote(), callbacks=[Stop(3, error=KeyboardInterrupt())])
    assert not plans[0].sampling.broker.is_busy
    assert np.isfinite(model.get_latent_representation()).all()


@over(
    ("n_cells", "drop_dataset_tail", "is_left_out"),
    [
        pytest.param(130, False, True, id="65-each"),
        pytest.param(129, False, True, id="65-each-one-twice"),
        pytest.param(129, True, False, id="64-each"),
        pytest.param(65, False, False, id="33-each"),
    ],
)
@pytest.mark.filterwarnings("ignore:Last batch will have a small size")
def test_batches_of_each_process_are_counted_where_several_train(n_cells, drop_dataset_tail, is_left_out):
    model = build(n_cells=n_cells)
    options = {"distributed_sampler": True, "drop_dataset_tail": drop_dataset_tail}
    splitter = DataSplitter(model.adata_manager, train_size=1.0, batch_size=64, **options)
    _avoid_batches_of_one(splitter, model.module, n_ranks=2)
    assert splitter.drop_last == is_left_out
