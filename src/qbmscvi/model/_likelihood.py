r"""Likelihoods of a model: log Z, ELBO, marginal likelihood, KL, importance weights, aggregated posterior.

All numbers describe the generative model: hard spins, passed through
:meth:`~qbmscvi.boltzmann.smoothing.Smoothing.emit` before the decoder sees them. This is the identity for every
smoothing except spike-and-exponential, so training on relaxed spins (Gumbel) does not change the meaning of the
numbers. The spike-and-exponential smoothing belongs to the generative model. Its density given the spins is the same in
prior and posterior and cancels from every ratio.

Every number that contains log Z has the error of log Z, equal for all cells: see :meth:`LikelihoodMixin.get_log_z`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from scvi.data._constants import ADATA_MINIFY_TYPE
from scvi.module._constants import MODULE_KEYS
from scvi.utils import unsupported_if_adata_minified
from torch.distributions import Categorical, Independent, MixtureSameFamily, kl_divergence

from qbmscvi.boltzmann.posterior import FactorialPosterior, MixtureComponent
from qbmscvi.diagnostics import LogPartition, estimate_log_z, log_mean_exp
from qbmscvi.exceptions import require_integer
from qbmscvi.model._arguments import as_rows
from qbmscvi.model._input_checks import get_column

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData
    from torch import Tensor
    from torch.distributions import Distribution

    Batches = Iterable[dict[str, Tensor | None]]

_CODES_PER_PASS = 512


class LikelihoodMixin:
    """Methods of :class:`~qbmscvi.QBMSCVI` that use the density of the prior or of the posterior."""

    def get_log_z(self) -> LogPartition:
        """Log partition function of the prior, as the ELBO and the marginal likelihood use it.

        Training ends with an estimate. Without one for the current parameters (before training, or after interrupted
        training), this method makes and keeps one. If you change the prior's parameters by hand, call
        :meth:`update_log_z`.

        Returns
        -------
        Value, bounds, standard error and interval in nats, exact or by annealed importance sampling.
        """
        prior = self.module.prior
        if not bool(prior.is_log_z_estimated):
            return self.update_log_z()
        scale, (lower, upper) = float(prior.log_z_scale), prior.log_z_bounds.tolist()
        return LogPartition(float(prior.log_z), lower, upper, scale, "ais" if scale else "exact")

    def update_log_z(
        self,
        *,
        n_chains: int = 256,
        n_steps: int = 500,
        seed: int = 0,
        method: Literal["auto", "exact", "ais"] = "auto",
    ) -> LogPartition:
        """Estimate log Z again, for all later numbers; arguments of :func:`qbmscvi.diagnostics.estimate_log_z`.

        More steps give a narrower interval. The reverse runs start from the persistent chains of training.

        Returns
        -------
        The estimate.

        Raises
        ------
        ValueError
            If ``n_chains`` is below 2, ``n_steps`` below 1, or the method is unknown.
        GraphMismatchError
            If ``method="exact"`` and the prior is too large.
        """
        prior = self.module.prior
        samples = prior.chains if int(prior.n_updates) else None
        estimate = estimate_log_z(
            prior.to_ising(), samples=samples, n_chains=n_chains, n_steps=n_steps, seed=seed, method=method
        )
        prior.set_log_z(estimate.value, estimate.lower, estimate.upper, estimate.scale)
        return self.get_log_z()

    def get_elbo(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dataloader: Batches | None = None,
        return_mean: bool = True,
        data_loader_kwargs: dict | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Evidence lower bound of the log likelihood, in nats per cell; higher is better.

        Arguments, sign and reduction are those of :meth:`scvi.model.SCVI.get_elbo`. The reconstruction term uses one
        draw of the posterior, so only its expectation is a lower bound. :meth:`get_kl` gives the KL divergence of the
        latent variables; ``use_observed_lib_size=False`` adds the KL divergence of the library size.

        Returns
        -------
        The mean over cells, or shape ``(n_cells,)``.
        """
        self.get_log_z()
        return super().get_elbo(
            adata,
            indices,
            batch_size=batch_size,
            dataloader=dataloader,
            return_mean=return_mean,
            data_loader_kwargs=data_loader_kwargs,
            **kwargs,
        )

    @torch.inference_mode()
    def get_marginal_ll(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_mc_samples: int = 1_000,
        batch_size: int | None = None,
        return_mean: bool = True,
        dataloader: Batches | None = None,
        data_loader_kwargs: dict | None = None,
        *,
        n_mc_samples_per_pass: int = 10,
        return_error: bool = False,
    ) -> float | Tensor | tuple[float, float] | tuple[Tensor, Tensor]:
        r"""Log likelihood :math:`\log p(x)` by importance sampling, in nats per cell; higher is better.

        The estimate is the log of the mean of :math:`p(x, z, \ell) / q(z, \ell \mid x)` over draws of the posterior
        :cite:p:`Burda16`. Its expectation lies between the ELBO and the log likelihood and rises with ``n_mc_samples``.
        It describes the discrete model, also if training relaxes the spins (Gumbel). The spike-and-exponential
        smoothing belongs to the generative model, so the estimate describes the smoothed model.

        Parameters
        ----------
        n_mc_samples
            Number of draws per cell.
        n_mc_samples_per_pass
            Number of draws decoded at once; more are faster and need more memory.
        return_mean
            Whether to average over cells, each with the same weight.
        return_error
            Whether to return the Monte Carlo standard error (delta method), too. It is too small if a few draws have
            most of the weight, and does not include the error of log Z, common to all cells.

        Returns
        -------
        A number or shape ``(n_cells,)``; with ``return_error`` a pair of them.

        Raises
        ------
        TypeError, ValueError
            If a number of samples is not an integer of at least one (``n_mc_samples``: two with ``return_error``), the
            data are minified, or ``adata`` and ``dataloader`` are both given.
        """
        if self.minified_data_type == ADATA_MINIFY_TYPE.LATENT_POSTERIOR:
            return super().get_marginal_ll()  # refuses with scVI's message
        require_integer("n_mc_samples", n_mc_samples, 2 if return_error else 1)
        require_integer("n_mc_samples_per_pass", n_mc_samples_per_pass, 1)
        self.get_log_z()
        values, errors = [], []
        for tensors in self._get_batches(adata, indices, batch_size, dataloader, **(data_loader_kwargs or {})):
            log_weights = self.module.log_importance_weights(tensors, n_mc_samples, n_mc_samples_per_pass)
            value, error = log_mean_exp(log_weights)
            values.append(value.cpu())
            errors.append(error.cpu())
        value, error = torch.cat(values), torch.cat(errors)
        if return_mean:
            # Like scVI, return a numpy scalar, which is a float.
            value, error = np.float64(value.mean().item()), float(error.square().sum().sqrt()) / len(error)
        return (value, error) if return_error else value

    @torch.inference_mode()
    def get_kl(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dataloader: Batches | None = None,
        *,
        n_draws: int = 20,
        per_unit: bool = False,
        return_error: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        r"""KL divergence of the posterior of each cell from the prior, in nats.

        It has a closed form except for log Z. With hidden spins, their sum is a mean over draws of the posterior.

        Parameters
        ----------
        n_draws
            Draws of each posterior for the sum over hidden spins. Raise it to reduce the error.
        per_unit
            Whether to split the divergence between the spins. Coupled spins share their term equally, and all spins
            share log Z equally; a share can be negative. Use :meth:`get_active_units` to find the units in use.
        return_error
            Whether to return the Monte Carlo standard error of each value, too; it is zero without hidden spins, and
            does not include the error of log Z, common to all cells.

        Returns
        -------
        Shape ``(n_cells,)``, or ``(n_cells, n_latent)`` with the former as row sums; with ``return_error`` a pair. The
        KL divergence of a latent library size is not included.

        Raises
        ------
        TypeError, ValueError
            If ``n_draws`` is not an integer of at least one, or two with ``return_error``.
        """
        require_integer("n_draws", n_draws, 2 if return_error else 1)
        self.get_log_z()
        # All draws at once, or one at a time if their spread is requested.
        n_repeats, n_at_once = (int(n_draws), 1) if return_error else (1, int(n_draws))
        distribution = self.module.prior.distribution(n_draws=n_at_once)
        values, errors = [], []
        for qz in self._get_posteriors(adata, indices, batch_size, dataloader):
            draws = torch.stack([kl_divergence(qz, distribution) for _ in range(n_repeats)])
            draws = (draws if per_unit else draws.sum(-1)).cpu()
            values.append(draws.mean(0))
            errors.append(draws.std(0, correction=min(1, n_repeats - 1)) / math.sqrt(n_repeats))
        value, error = torch.cat(values).numpy(), torch.cat(errors).numpy()
        return (value, error) if return_error else value

    @torch.inference_mode()
    def get_active_units(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dataloader: Batches | None = None,
        *,
        threshold: float = 0.01,
    ) -> pd.DataFrame:
        """Which latent units carry information about the cells :cite:p:`Burda16`.

        A unit whose posterior mean hardly varies between cells is not in use.

        Parameters
        ----------
        threshold
            Least variance over cells of the posterior mean (spins are -1 and +1) for a unit in use.

        Returns
        -------
        One row per spin (``s0``, ...) with ``mean_var``, this variance, and ``is_active``.
        """
        means = torch.cat([qz.mean.cpu() for qz in self._get_posteriors(adata, indices, batch_size, dataloader)])
        variance = means.double().var(0, correction=0).numpy()
        return pd.DataFrame(
            {"mean_var": variance, "is_active": variance > threshold}, index=[f"s{i}" for i in range(len(variance))]
        )

    @torch.inference_mode()
    @unsupported_if_adata_minified
    def get_importance_weights(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        qz: FactorialPosterior,
        px: Distribution | None,
        zs: Tensor,
        max_cells: int = 1024,
        truncation: bool = False,
        n_mc_samples: int = 500,
        n_mc_samples_per_pass: int = 250,
        **data_loader_kwargs: Any,
    ) -> np.ndarray:
        r"""Weights that turn draws of the posteriors of a population into draws of its true posteriors.

        .. math::

            w(z) \propto \frac{\sum_n p(z \mid x_n)}{\sum_n q(z \mid x_n)},
            \qquad p(z \mid x_n) = \frac{p(z)\, p(x_n \mid z)}{p(x_n)},

        over anchor cells :math:`n` of the population. ``weights="importance"`` of ``get_normalized_expression`` and
        ``differential_expression`` uses them. Each :math:`p(x_n \mid z)` uses batch, covariates and library size of its
        anchor cell; a latent library size is integrated by Gauss-Hermite quadrature.

        Parameters
        ----------
        adata, indices
            Population.
        qz
            Posteriors of the cells, aligned with ``indices``.
        px
            Not used. scVI rescales it to the anchors' library sizes, but it keeps the batch of the cell of ``zs``.
        zs
            Draws as the decoder sees them, shape ``(..., n_latent)``.
        max_cells
            Largest number of anchor cells; drawn from torch's global stream.
        truncation
            Whether to truncate weights at their mean times the square root of their number :cite:p:`Ionides08`.
        n_mc_samples, n_mc_samples_per_pass
            Settings of :meth:`get_marginal_ll` for :math:`p(x_n)`.

        Returns
        -------
        Weights that sum to one, in the order of ``zs.reshape(-1, n_latent)``.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If the data are minified.
        """
        self._check_if_trained(warn=False)
        module, device = self.module, self.device
        adata = self._validate_anndata(adata)
        indices = np.arange(adata.n_obs) if indices is None else as_rows(indices, adata)
        anchors = torch.randperm(len(indices))[:max_cells].sort().values
        log_px = self.get_marginal_ll(
            adata,
            indices[anchors.numpy()],
            n_mc_samples,
            return_mean=False,
            n_mc_samples_per_pass=n_mc_samples_per_pass,
        )
        zs = zs.reshape(-1, zs.shape[-1]).to(device)
        hard = module.z_encoder.recover(zs)
        logits = qz.logits[anchors.to(qz.logits.device)].to(device)
        log_target = torch.full((len(zs),), -math.inf, device=device)
        log_proposal = log_target.clone()
        loader = self._get_batches(adata, indices[anchors.numpy()], 1, None, **data_loader_kwargs)
        for k, tensors in enumerate(loader):
            log_px_z = [module.log_likelihood(tensors, part) for part in zs.split(_CODES_PER_PASS)]
            log_target = torch.logaddexp(log_target, torch.cat(log_px_z) - log_px[k])
            log_qz = FactorialPosterior(logits[k]).log_prob(hard).sum(-1)
            log_proposal = torch.logaddexp(log_proposal, log_qz)
        # log Z cancels: it is in p(z) and in every p(x_n).
        log_weights = (log_target - log_proposal + module.prior.distribution().log_prob(hard)).cpu().double()
        if truncation:
            log_mean = torch.logsumexp(log_weights, 0) - math.log(len(log_weights))
            log_weights = log_weights.clamp(max=log_mean + 0.5 * math.log(len(log_weights)))
        return torch.softmax(log_weights, 0).numpy()

    @torch.inference_mode()
    def get_aggregated_posterior(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dof: float | None = 3.0,
    ) -> MixtureSameFamily:
        r"""Mixture of the posteriors of some cells, over hard or mean spins.

        At hard spins ``log_prob`` is the log mass of the mixture. At mean spins, from
        ``get_latent_representation(representation="mean")``, it is :math:`\log E_s[q(s)]`, the log of the mean mass of
        spins drawn with these means.

        Parameters
        ----------
        indices
            Cells; None or empty for all.
        dof
            Not used: spins have no tails.

        Returns
        -------
        A mixture with equal weights.
        """
        self._check_if_trained(warn=False)
        indices = None if indices is None or np.size(indices) == 0 else indices
        logits = torch.cat([qz.logits for qz in self._get_posteriors(adata, indices, batch_size, None)])
        # Explicit, because torch.compile turns off the default for the whole process.
        return MixtureSameFamily(
            Categorical(logits=torch.zeros(len(logits), device=logits.device)),
            Independent(MixtureComponent(logits), 1),
            validate_args=True,
        )

    @torch.inference_mode()
    def differential_abundance(
        self,
        adata: AnnData | None = None,
        sample_key: str | None = None,
        batch_size: int = 128,
        num_cells_posterior: int | None = None,
        dof: float | None = None,
        *,
        adata_sub: AnnData | None = None,
        dataloader: Batches | None = None,
    ) -> None:
        """Compare how likely cells are in each sample, by the aggregated posteriors of the samples.

        ``obsm["da_log_probs"]`` gets a column per sample: the ``log_prob`` of each cell's mean spins under
        :meth:`get_aggregated_posterior` of the sample. Pass all arguments except ``adata`` by name; scvi-tools 1.5 has
        another order.

        Parameters
        ----------
        adata
            Cells of the samples; None for the model's cells.
        sample_key
            Column of ``adata.obs`` with the samples. Cells without a value belong to none.
        batch_size
            Cells at a time.
        num_cells_posterior
            Largest number of cells per sample, drawn from torch's global stream.
        dof
            Not used: spins have no tails.
        adata_sub
            Cells to compare; None for ``adata``.
        dataloader
            Not supported: samples are a column of ``adata``.

        Raises
        ------
        MissingColumnError
            If there is no such column.
        ValueError
            If a sample of ``adata_sub`` has no cell in ``adata``, or ``dataloader`` is given.
        """
        if dataloader is not None:
            msg = "`dataloader` has no column of samples. Pass `adata` and `sample_key`."
            raise ValueError(msg)
        adata = self._validate_anndata(adata)
        adata_sub = adata if adata_sub is None else self._validate_anndata(adata_sub)
        for cells in (adata, adata_sub):
            get_column(cells.obs, "sample_key", sample_key)
        # The mixture is over spins, so it needs mean spins, not the default angles.
        means = torch.from_numpy(
            self.get_latent_representation(adata_sub, batch_size=batch_size, representation="mean")
        )
        log_probs = {}
        for sample in adata_sub.obs[sample_key].dropna().unique():
            rows = np.flatnonzero(adata.obs[sample_key] == sample)
            if not len(rows):
                msg = f"No cell of `adata` has {sample_key}={sample!r}, but cells of `adata_sub` have."
                raise ValueError(msg)
            if num_cells_posterior is not None and num_cells_posterior < len(rows):
                rows = rows[torch.randperm(len(rows))[: int(num_cells_posterior)].numpy()]
            mixture = self.get_aggregated_posterior(adata, rows, batch_size, dof)
            parts = [mixture.log_prob(part.to(self.device)).cpu() for part in means.split(int(batch_size))]
            log_probs[sample] = torch.cat(parts).numpy()
        adata_sub.obsm["da_log_probs"] = pd.DataFrame(log_probs, index=adata_sub.obs_names)

    def _get_batches(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        batch_size: int | None,
        dataloader: Batches | None,
        **kwargs: Any,
    ) -> Batches:
        if dataloader is None:
            adata = self._validate_anndata(adata)
            return self._make_data_loader(adata=adata, indices=indices, batch_size=batch_size, **kwargs)
        if adata is not None:
            msg = "Both `adata` and `dataloader` are given. Pass one of them."
            raise ValueError(msg)
        return dataloader

    def _get_posteriors(self, *data: Any) -> Iterable[FactorialPosterior]:
        for tensors in self._get_batches(*data):
            yield self.module.inference(**self.module._get_inference_input(tensors))[MODULE_KEYS.QZ_KEY]
