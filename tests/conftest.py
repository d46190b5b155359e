"""Fixtures that every test may use. Plain functions (oracles, gates, problems) are in ``oracles.py``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

# Test modules are imported one by one (importlib mode), so the folder of the shared ones has to be named.
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("oracles")


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _single_threaded():
    """One torch thread: the problems are tiny, and sums do not depend on the machine. Numba may have changed it."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained():
    """Model of 1,000 cells and eight spins, trained until mean spins come near to one; leave it as it is.

    Angles, logits and rounded means of such spins are far from their means: what confuses them fails here only.
    """
    from qbmscvi import QBMSCVI
    from qbmscvi.datasets import synthetic_counts

    torch.set_num_threads(1)
    adata = synthetic_counts(1_000, 40, seed=0)
    QBMSCVI.setup_anndata(adata, batch_key="batch", labels_key="cell_type")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = QBMSCVI(adata, n_hidden=32, n_latent=8, n_chains=64, gene_likelihood="nb")
        # scvi-tools would shuffle by a seed of its own.
        settings = {"shuffle_set_split": False, "accelerator": "cpu", "enable_progress_bar": False}
        model.train(max_epochs=25, plan_kwargs={"lr": 2e-2}, **settings)
        largest = np.abs(model.get_latent_representation(representation="mean")).max(0)
    assert (largest > 0.9).sum() >= 4
    return model


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets, beside the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data sets are not on this machine ({folder})")
    return folder
