"""Meaning of spins and prior: genes that follow a spin, and modes of the prior with the cells near them.

Both methods leave the trained model unchanged. Neither tests a hypothesis, so there are no p-values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from scvi.module._constants import MODULE_KEYS

from qbmscvi.exceptions import require_integer
from qbmscvi.model._arguments import as_rows
from qbmscvi.model._input_checks import get_column
from qbmscvi.samplers import BlockGibbsSampler, SamplingRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from torch import Tensor

    from qbmscvi.boltzmann.posterior import FactorialPosterior

# Decoded cells times genes in one pass through the decoder: 16 MB in single precision.
_ENTRIES_PER_PASS = 4_000_000


class PriorModes(NamedTuple):
    """Low-energy states of a prior, lowest first, and the mode of each cell."""

    table: pd.DataFrame
    """One row per mode: ``energy`` in nats, ``prior_share``, ``cell_share``; with labels ``label``, ``label_share``."""
    spins: np.ndarray
    """States, shape ``(n_modes, n_spins)``, int8, -1 or +1."""
    mode_of_cell: np.ndarray
    """Row of ``table`` that each cell descends into, shape ``(n_cells,)``."""


class InterpretationMixin:
    """Methods of :class:`~qbmscvi.QBMSCVI` that interpret spins and prior."""

    @torch.inference_mode()
    def get_spin_programs(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        spins: Sequence[int] | None = None,
        n_genes: int | None = None,
        max_cells: int = 500,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        r"""Genes that follow each spin: the effect of flipping it on the decoder's output.

        For cell :math:`n`, a draw :math:`z_n` of its posterior, and :math:`\rho_g` the decoder's normalized expression
        at the covariates of the cell,

        .. math:: \frac1N \sum_n \log_2 \frac{\rho_g(z_n, s_i = +1)}{\rho_g(z_n, s_i = -1)} .

        All other spins stay the same, including spins that the prior couples to this one. Zero inflation is left out,
        as in :meth:`get_normalized_expression`. For a spin that is not in use (:meth:`get_active_units`) the effect is
        an extrapolation of the decoder. ``adata`` and ``batch_size`` are those of :meth:`get_latent_representation`.

        Parameters
        ----------
        indices
            Cells to average over, e.g. of one type; None for all.
        spins
            Numbers of the spins; None for all.
        n_genes
            Number of genes with the largest magnitude to keep for each spin; None for all.
        max_cells
            Largest number of cells to average over, a random subset if there are more.
        seed
            Seed of the subset and of the posterior's draws.

        Returns
        -------
        One row per spin and gene: ``spin``, ``gene``, ``log2_fold_change`` (up over down) and ``rank``, from 1 by
        magnitude within the spin; ordered by spin and rank.

        Raises
        ------
        ValueError
            If a spin does not exist, a number is below one, there is no cell, or ``gene_likelihood="normal"``.
        """
        self._check_if_trained(warn=False)
        module = self.module
        n_spins = module.prior.n_visible
        if module.gene_likelihood == "normal":
            msg = (
                "Fold changes need positive expression, but this model has gene_likelihood='normal'. Train on counts "
                "with 'nb', 'zinb' or 'poisson'."
            )
            raise ValueError(msg)
        given = np.arange(n_spins) if spins is None else np.atleast_1d(spins)
        chosen = given.tolist()
        is_valid = given.dtype.kind in "iu" and set(chosen) <= set(range(n_spins))
        if not is_valid or not chosen or len(set(chosen)) < len(chosen):
            msg = (
                f"`spins` is {spins!r}, but it must hold different numbers from 0 to {n_spins - 1}. "
                "Leave it out for all."
            )
            raise ValueError(msg)
        require_integer("max_cells", max_cells, 1)
        require_integer("seed", seed, 0)
        adata = self._validate_anndata(adata)
        rows = np.arange(adata.n_obs) if indices is None else as_rows(indices, adata)
        if len(rows) == 0:
            msg = "`indices` names no cell, but the effect is a mean over cells. Name at least one."
            raise ValueError(msg)
        if len(rows) > max_cells:
            rows = np.sort(np.random.default_rng(seed).choice(rows, max_cells, replace=False))
        genes = np.asarray(self.get_var_names())
        if n_genes is not None:
            require_integer("n_genes", n_genes, 1)
        n_kept = len(genes) if n_genes is None else min(n_genes, len(genes))

        device = self.device
        effect = torch.zeros(len(chosen), len(genes), dtype=torch.float64)
        was_training = module.training
        module.eval()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for number, tensors in enumerate(self._make_data_loader(adata, indices=rows, batch_size=batch_size)):
                tensors = {name: value.to(device) for name, value in tensors.items() if value is not None}
                outputs = module.inference(**module._get_inference_input(tensors))
                torch.manual_seed(seed + number)  # the draws do not depend on the requested spins
                z = outputs[MODULE_KEYS.QZ_KEY].sample()
                given = module._get_generative_input(tensors, {**outputs, MODULE_KEYS.Z_KEY: z})
                n_at_once = max(1, _ENTRIES_PER_PASS // (2 * len(z) * len(genes)))
                for start in range(0, len(chosen), n_at_once):
                    flipped = chosen[start : start + n_at_once]
                    effect[start : start + len(flipped)] += self._flip(z, given, flipped).sum(1).cpu().double()
        module.train(was_training)

        effect = (effect / len(rows)).numpy()
        order = np.argsort(-np.abs(effect), axis=1, kind="stable")[:, :n_kept]  # (n_chosen, n_kept)
        return pd.DataFrame(
            {
                "spin": np.repeat(chosen, n_kept),
                "gene": genes[order].ravel(),
                "log2_fold_change": np.take_along_axis(effect, order, axis=1).ravel(),
                "rank": np.tile(np.arange(1, n_kept + 1), len(chosen)),
            }
        )

    def _flip(self, z: Tensor, given: dict[str, Tensor | None], spins: list[int]) -> Tensor:
        """Log fold change, to base 2, of each spin up compared with down, shape ``(n_spins, n_cells, n_genes)``."""
        both = z.repeat(len(spins), 2, 1, 1)  # (n_spins, 2, n_cells, n_latent)
        for i, spin in enumerate(spins):
            both[i, 0, :, spin], both[i, 1, :, spin] = 1.0, -1.0
        repeated = {
            name: value if value is None else value.repeat(2 * len(spins), *[1] * (value.dim() - 1))
            for name, value in given.items()
        }
        repeated[MODULE_KEYS.Z_KEY] = self.module.z_encoder.z_transformation(both.flatten(0, 2))
        scale = self.module.generative(**repeated)[MODULE_KEYS.PX_KEY].scale
        up, down = scale.clamp(min=torch.finfo(scale.dtype).tiny).log2().view(len(spins), 2, len(z), -1).unbind(1)
        return up - down

    @torch.inference_mode()
    def get_prior_modes(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        label_key: str | None = None,
        n_samples: int = 1_000,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> PriorModes:
        """Low-energy states of the prior, with their share of the prior and the cells near them.

        Each descent starts at a sample of the prior (block Gibbs) or at the most probable spins of a cell. It flips the
        spin that lowers the energy most, until no flip lowers it; the final states are the modes. States include hidden
        spins, for a cell at their most probable values, and label spins of :class:`~qbmscvi.QBMSCANVI`, for a cell at
        its predicted type.

        A mode's share is not its probability but the share of its basin, which may hold many states of higher energy.
        ``adata``, ``indices`` and ``batch_size`` are those of :meth:`get_latent_representation`.

        Parameters
        ----------
        label_key
            Column of ``adata.obs``; its most frequent value describes the cells of a mode.
        n_samples
            Number of samples of the prior.
        seed
            Seed of these samples.

        Returns
        -------
        Table, spins of the modes, and the mode of each cell. Modes that only cells reach have ``prior_share`` zero.

        Raises
        ------
        ValueError
            If ``adata.obs`` has no column ``label_key``, or ``n_samples`` is below one.
        """
        from dwave.samplers import SteepestDescentSolver  # dimod takes as long to import as qbmscvi

        self._check_if_trained(warn=False)
        adata = self._validate_anndata(adata)
        if label_key is not None:
            get_column(adata.obs, "label_key", label_key)
        require_integer("n_samples", n_samples, 1)
        problem = self.module.prior.to_ising()
        samples = BlockGibbsSampler().sample(SamplingRequest(problem, n_samples, seed=seed)).spins
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            cells = [
                self._most_probable_spins(qz).to(samples.dtype).cpu()
                for qz in self._get_posteriors(adata, indices, batch_size, None)
            ]
        start = torch.cat([samples.cpu(), *cells]).numpy()
        descended = SteepestDescentSolver().sample(
            problem.to_bqm(), num_reads=len(start), initial_states=(start, range(problem.n_spins))
        )
        ends = descended.record.sample[:, np.argsort(list(descended.variables))].astype(np.int8)
        states, basin = np.unique(ends, axis=0, return_inverse=True)
        energy = problem.to("cpu", torch.float64).energy(torch.from_numpy(states).double()).numpy()
        order = np.argsort(energy, kind="stable")
        basin = np.argsort(order, kind="stable")[basin.ravel()]  # from the number of a state to its rank in energy
        of_samples, of_cells = basin[:n_samples], basin[n_samples:]
        table = pd.DataFrame(
            {
                "energy": energy[order],
                "prior_share": np.bincount(of_samples, minlength=len(order)) / n_samples,
                "cell_share": np.bincount(of_cells, minlength=len(order)) / max(1, len(of_cells)),
            }
        )
        if label_key is not None:
            labels = adata.obs[label_key].astype(object)
            labels = (labels if indices is None else labels.iloc[as_rows(indices, adata)]).to_numpy()
            counts = pd.crosstab(of_cells, labels).reindex(range(len(order)), fill_value=0)
            n_labeled = counts.sum(axis=1)
            table["label"] = counts.idxmax(axis=1).astype(object).where(n_labeled > 0, None)
            table["label_share"] = counts.max(axis=1) / n_labeled.where(n_labeled > 0)
        return PriorModes(table, states[order], of_cells)

    def _most_probable_spins(self, qz: FactorialPosterior) -> Tensor:
        """Most probable visible spins, and hidden spins given these, shape ``(n_cells, n_spins)``."""
        visible = torch.where(qz.logits > 0, 1.0, -1.0).to(qz.logits)
        if not self.module.prior.n_hidden:
            return visible
        return torch.cat([visible, torch.where(self.module.prior.hidden_fields(visible) < 0, 1.0, -1.0)], dim=-1)
