"""The method of :class:`~qbmscvi.QBMSCVI` that fits its prior to the codes of its cells."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.module._constants import MODULE_KEYS
from tqdm.auto import tqdm

from qbmscvi.boltzmann.labeled_prior import LabeledPrior
from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.diagnostics import MIXED
from qbmscvi.exceptions import require_integer
from qbmscvi.model._arguments import as_rows
from qbmscvi.model._generation import build_prior_sampler, split_seed
from qbmscvi.train._guards import share_state
from qbmscvi.train._prior_fit import Codes, PriorFit, fit_to_codes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from anndata import AnnData
    from lightning import LightningDataModule
    from torch import Tensor

    from qbmscvi.samplers import Sampler
    from qbmscvi.train._schedule import SamplingSchedule

_N_STEPS, _N_STEPS_OF_ANSWERS = 1_700, 300
_MIN_CODES, _MAX_CODES = 20, 20_000
_MAX_HELD_OUT = 1_000


class PriorFitMixin:
    """The method of :class:`~qbmscvi.QBMSCVI` that fits its prior to the codes of its cells."""

    def fit_prior(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        sampler: str | Sampler = "gibbs",
        schedule: SamplingSchedule | None = None,
        n_steps: int | None = None,
        dataloader: Iterable[dict[str, Tensor | None]] | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        progress: bool = True,
    ) -> PriorFit:
        """Fit the prior to the codes of cells; networks and representations do not change.

        The code of a cell is the posterior of its spins. :meth:`train` ends with this method. Call it again with more
        steps, or with a slow or paid device, which gets at most a hundred requests instead of thousands in training.

        A tenth of the cells is held out; validation cells are not used. The fit keeps the latest parameters with the
        lowest held-out KL divergence, within the error of log Z. These may be the initial ones. With labels, their
        cross-entropy is part of the objective, so :meth:`QBMSCANVI.predict` may change.

        Parameters
        ----------
        adata, indices, dataloader, batch_size
            Cells to fit to, as in :meth:`get_latent_representation`; without them, the training cells.
        sampler, seed
            As in :meth:`sample_prior`.
        schedule
            When to request samples. None: at every step if the sampler continues chains, else at most 100 requests.
        n_steps
            Optimizer steps; None for 1,700, or 300 with a local sampler that cannot continue chains.
        progress
            Whether to show a progress bar.

        Returns
        -------
        Held-out KL before and after, log Z with its bounds, diagnostics of the chains, and counts of requests.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If there are fewer than 20 cells, ``n_steps`` is below one, or the sampler is unknown or finds only ground
            states.
        GraphMismatchError
            If the prior does not fit the sampler.

        Warns
        -----
        RuntimeWarning
            If the chains have not mixed, or the sampler fails.
        """
        self._check_if_trained(warn=False, message="The model has not been trained. Call `train()` first.")
        sampler = build_prior_sampler(sampler)
        sampler.check(self.module.prior.to_ising())
        if n_steps is None:
            goes_on = (
                sampler.traits.is_persistent or sampler.traits.is_remote
            )  # local chains continue a remote sampler's answers
            n_steps = _N_STEPS if goes_on else _N_STEPS_OF_ANSWERS
        require_integer("n_steps", n_steps, 1)
        seed = split_seed(seed, 1)[0]
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            codes, held_out = self._split_codes(adata, indices, batch_size, dataloader, seed)
        with tqdm(total=n_steps, desc="Fitting the prior", disable=not progress, leave=False) as bar:
            fit = fit_to_codes(
                self.module.prior,
                codes,
                held_out,
                sampler=sampler,
                schedule=schedule,
                n_steps=int(n_steps),
                seed=seed,
                on_step=lambda step: bar.update(),
            )
        if fit.chains.r_hat > MIXED:
            warnings.warn(
                f"The prior's chains have not mixed in {fit.chains.n_sweeps} sweeps (R-hat {fit.chains.r_hat:.2f}, "
                f"above {MIXED}). Its samples may have some types of cells too often or too rarely. Draw them with "
                "sampler='parallel_tempering'.",
                RuntimeWarning,
                stacklevel=2,
            )
        return fit

    def _fit_prior_after_training(self, datamodule: LightningDataModule | None, progress: bool) -> None:
        """Fit the prior to the codes of the training cells, unless it is frozen or they are too few."""
        prior, trainer = self.module.prior, self.trainer
        plan, sampling = trainer.lightning_module, trainer.lightning_module.sampling
        n_steps = min(_N_STEPS, trainer.global_step)
        is_frozen = plan.prior_lr == 0 or not any(parameter.requires_grad for parameter in prior.parameters())
        if is_frozen or not n_steps:
            return
        if datamodule is None and len(self.train_indices) < _MIN_CODES:
            return
        if (
            prior.h.dtype != torch.get_default_dtype()
        ):  # with precision="64-true" scVI cannot encode cells after training
            return
        if trainer.is_global_zero:
            self.fit_prior(
                sampler="gibbs" if sampling.sampler.traits.is_remote else sampling.sampler,
                n_steps=n_steps if sampling.sampler.traits.is_persistent else min(n_steps, _N_STEPS_OF_ANSWERS),
                dataloader=None if datamodule is None else datamodule.train_dataloader(),
                seed=sampling.draw_seed(),
                progress=progress,
            )
        share_state(trainer, prior)

    @torch.no_grad()
    def _split_codes(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        batch_size: int | None,
        dataloader: Iterable[dict[str, Tensor | None]] | None,
        seed: int,
    ) -> tuple[Codes, Codes]:
        """Codes to learn from, and codes held out."""
        generator = np.random.default_rng(seed)
        if adata is None and indices is None and dataloader is None:
            indices = self.train_indices
        if dataloader is not None:
            codes = self._get_codes(None, None, batch_size, dataloader)
        else:
            adata = self._validate_anndata(adata)
            rows = np.arange(adata.n_obs) if indices is None else as_rows(indices, adata)
            rows = generator.permutation(rows)[:_MAX_CODES]
            codes = self._get_codes(adata, np.sort(rows), batch_size, None)
        if len(codes) < _MIN_CODES:
            msg = f"There are {len(codes)} cells to fit the prior to, but it needs {_MIN_CODES}. Pass more cells."
            raise ValueError(msg)
        order = torch.from_numpy(generator.permutation(len(codes))).to(self.device)
        n_held_out = min(_MAX_HELD_OUT, len(codes) // 10)
        return codes[order[n_held_out:]], codes[order[:n_held_out]]

    def _get_codes(self, *data: Any) -> Codes:
        logits, labels = [], []
        adata, rows, batch_size, dataloader = data
        for tensors in self._get_batches(adata, rows, batch_size, dataloader):
            qz = self.module.inference(**self.module._get_inference_input(tensors))[MODULE_KEYS.QZ_KEY]
            logits.append(qz.logits)
            labels.append(tensors[REGISTRY_KEYS.LABELS_KEY].squeeze(-1).long())
            if sum(map(len, labels)) >= _MAX_CODES:
                break
        posterior = FactorialPosterior(torch.cat(logits))
        has_labels = isinstance(self.module.prior, LabeledPrior)
        return Codes(posterior, torch.cat(labels).to(self.device) if has_labels else None)
