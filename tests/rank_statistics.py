"""Script of ``test_distributed_statistics.py``: trains the same cells many times, in one process or in two.

Networks start from the same weights in every run, so that the learned spins keep their names; the order of the cells,
dropout, chains and draws differ. Batch statistics are off: they are of each process's own cells, so that halves of a
batch are noisier than the whole. Nothing else depends on how a batch is divided.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import scvi
import torch
from lightning.pytorch.strategies import DDPStrategy

from qbmscvi import QBMSCVI, SamplingSchedule
from qbmscvi.datasets import synthetic_counts
from qbmscvi.samplers import ExactSampler, SamplingRequest
from qbmscvi.train import _guards
from qbmscvi.train import _sampling as _callbacks

N_TRAIN, N_CELLS, GLOBAL_BATCH, N_EPOCHS = 384, 640, 64, 25


def train(seed: int, devices: int, fault: str) -> np.ndarray:
    """First moments of the prior's spins, second moments on its edges, and the ELBO of cells left out."""
    scvi.settings.seed = 0
    adata = synthetic_counts(N_CELLS, 40, seed=1)
    train_cells, held_out = np.arange(N_TRAIN), np.arange(N_TRAIN, N_CELLS)
    QBMSCVI.setup_anndata(adata)
    model = QBMSCVI(
        adata, n_latent=8, n_chains=128, gene_likelihood="nb", use_batch_norm="none", prior_graph="bipartite"
    )
    splits = [train_cells, held_out]
    if fault == "one shard":  # a file in order of types, of which each process reads the first half
        order = np.argsort(adata.obs["cell_type"].cat.codes.to_numpy()[train_cells], kind="stable")
        splits = [order[: N_TRAIN // 2], held_out, order[N_TRAIN // 2 :]]
    scvi.settings.seed = seed + 1  # Lightning's DDP sets it anew
    strategy = "auto"
    if devices > 1:
        strategy = DDPStrategy(find_unused_parameters=True, broadcast_buffers=fault != "unshared chains")
    model.train(
        max_epochs=N_EPOCHS * (2 if fault == "one shard" else 1),  # as many steps
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        batch_size=GLOBAL_BATCH // devices,
        plan_kwargs={"lr": 4e-3, "prior_lr": 2e-2},
        schedule=SamplingSchedule(every_n_steps=1, n_sweeps=5),
        datasplitter_kwargs={"external_indexing": splits},
        enable_progress_bar=False,
    )
    problem = model.get_ising_model()
    draws = ExactSampler().sample(SamplingRequest(problem, 200_000, seed=0)).spins.double().numpy()
    edges = np.asarray(problem.graph.edges)
    second = (draws[:, edges[:, 0]] * draws[:, edges[:, 1]]).mean(axis=0)
    scvi.settings.seed = 0
    elbo = float(model.get_elbo(indices=held_out))
    return np.concatenate([draws.mean(axis=0), second, [elbo]])


def main(folder: Path, devices: int, n_seeds: int, *faults: str) -> None:
    torch.set_num_threads(1)
    share = _guards.share_buffers
    for fault in faults:
        shared = (lambda trainer, module: None) if fault == "unshared chains" else share
        _callbacks.share_buffers = _guards.share_buffers = shared
        rows = [train(seed, devices, fault) for seed in range(n_seeds)]
        if devices == 1 or torch.distributed.get_rank() == 0:
            np.save(folder / f"{devices}-{fault}.npy", np.array(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
