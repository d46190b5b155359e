"""The picture of real cells in README: blood of kang_ifnb, untreated and stimulated, with default arguments.

    python benchmarks/picture.py --data ../shared/data

Writes ``docs/_static/kang_ifnb.png``: cells in the latent space by type and by batch, and generated cells beside them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import scanpy as sc
import scvi
from results import load

from qbmscvi import QBMSCVI, pl

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of the .h5ad")
    options = parser.parse_args()
    adata = load("kang_ifnb", options.data, n_genes=2_000, max_cells=4_000)
    scvi.settings.seed = 0
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    model = QBMSCVI(adata)
    model.train(max_epochs=100, accelerator="cpu")
    generated = model.generate(adata.n_obs, seed=0)
    joint = sc.concat({"real": adata, "generated": generated}, label="source", join="inner")
    joint.obsm["X_qbmscvi"] = model.get_latent_representation(joint)
    sc.pp.neighbors(joint, use_rep="X_qbmscvi", random_state=0)
    sc.tl.umap(joint, random_state=0)
    umap, n_real = joint.obsm["X_umap"], adata.n_obs
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for ax, key, title in ((axes[0], "cell_type", "cell type"), (axes[1], "batch", "batch")):
        pl.embedding(umap[:n_real], adata.obs[key], title=title, axis_name="UMAP", ax=ax)
    pl.embedding(umap, joint.obs["source"], title="real and generated cells", axis_name="UMAP", ax=axes[2])
    figure.savefig(HERE.parent / "docs" / "_static" / "kang_ifnb.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
