"""What is logged once an epoch is what Lightning would make of it at every step."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import scvi
from lightning.pytorch.callbacks import Callback
from scvi.train import TrainingPlan

from qbmscvi import QBMSCANVI, QBMSCVI
from qbmscvi.datasets import synthetic_counts
from qbmscvi.train._logging import LoggedOncePerEpoch

N_EPOCHS = 3


@pytest.fixture(scope="module")
def counts():
    adata = synthetic_counts(240, 40, seed=0)  # the last batch is smaller than the others
    adata.obs["label"] = np.where(np.arange(adata.n_obs) % 4 == 0, "unknown", (np.arange(adata.n_obs) % 3).astype(str))
    return adata


class Watcher(Callback):
    """What other callbacks can see, and how often Lightning was asked to log."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def _train(counts, cls, plan_kwargs, **kwargs):
    scvi.settings.seed = 0
    if cls is QBMSCANVI:
        QBMSCANVI.setup_anndata(counts, labels_key="label", unlabeled_category="unknown", batch_key="batch")
    else:
        cls.setup_anndata(counts, batch_key="batch")
    model, watcher = cls(counts, n_latent=4), Watcher()
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "batch_size": 32, "callbacks": [watcher]}
    model.train(max_epochs=N_EPOCHS, plan_kwargs=plan_kwargs, **settings, **kwargs)
    history = {name: table.to_numpy(float) for name, table in model.history.items() if "seconds" not in name}
    indices = {name: list(table.index) for name, table in model.history.items()}
    seen = [{name: value for name, value in row.items() if "seconds" not in name} for row in watcher.seen]
    return history, indices, seen


def _plain_log(self, *args, **kwargs):
    super(LoggedOncePerEpoch, self).log(*args, **kwargs)


@pytest.mark.parametrize(
    ("cls", "plan_kwargs", "kwargs"),
    [
        pytest.param(QBMSCVI, {}, {}, id="defaults"),
        pytest.param(QBMSCVI, {}, {"check_val_every_n_epoch": 1, "train_size": 0.7}, id="validation"),
        pytest.param(QBMSCVI, {"n_steps_kl_warmup": 11}, {"log_every_n_steps": 1}, id="weight of each step"),
        pytest.param(QBMSCVI, {"n_epochs_kl_warmup": 2}, {"log_every_n_steps": 1}, id="weight of each epoch"),
        pytest.param(
            QBMSCVI, {}, {"val_check_interval": 2, "check_val_every_n_epoch": 1, "train_size": 0.7}, id="mid-epoch"
        ),
        pytest.param(QBMSCVI, {"on_step": True}, {"check_val_every_n_epoch": 1, "train_size": 0.7}, id="every step"),
        pytest.param(QBMSCANVI, {}, {"check_val_every_n_epoch": 1, "train_size": 0.7}, id="labels"),
    ],
)
def test_history_and_metrics_are_bit_equal_to_those_logged_at_every_step(counts, cls, plan_kwargs, kwargs):
    got = _train(counts, cls, plan_kwargs, **kwargs)
    with patch.object(LoggedOncePerEpoch, "log", _plain_log):
        expected = _train(counts, cls, plan_kwargs, **kwargs)
    for own, plain in zip(got[:2], expected[:2], strict=True):
        assert own.keys() == plain.keys()
        for name, values in plain.items():
            np.testing.assert_array_equal(own[name], values, err_msg=name)
    assert len(got[2]) == len(expected[2])
    for row, (own, plain) in enumerate(zip(got[2], expected[2], strict=True)):
        np.testing.assert_equal(own, plain, err_msg=str(row))
    assert {"train_loss_epoch" if plan_kwargs.get("on_step") else "train_loss", "elbo_train"} <= set(got[2][-1])


def test_lightning_is_asked_once_an_epoch(counts):
    names = []

    def note(self, name, value, *args, **kwargs):
        names.append(name)
        return lightning_log(self, name, value, *args, **kwargs)

    lightning_log = TrainingPlan.log
    with patch.object(TrainingPlan, "log", note):
        _train(counts, QBMSCVI, {"n_epochs_kl_warmup": 2})  # a weight that changes with the steps is recorded at each
    for name in ("train_loss", "kl_weight", "elbo_train", "reconstruction_loss_train"):
        assert names.count(name) == N_EPOCHS, name
