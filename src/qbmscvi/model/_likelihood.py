"""Likelihoods of a model: log Z, energy, ELBO, marginal likelihood, KL, importance weights.

All numbers describe the generative model with hard spins, also after training on relaxed spins (Gumbel). The decoder
sees them through :meth:`~qbmscvi.boltzmann.smoothing.Smoothing.emit`. Only the spike-and-exponential smoothing changes
them there; its density given the spins is equal in prior and posterior and cancels from every ratio.

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
from torch.distributions import kl_divergence

from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.diagnostics import LogPartition, estimate_log_z, log_mean_exp
from qbmscvi.exceptions import require_integer
from qbmscvi.model._arguments import as_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from torch import Tensor
    from torch.distributions import Distribution

    from qbmscvi.model._checked_data import Batches

_CODES_PER_PASS = 512


class LikelihoodMixin:
    """Methods of :class:`~qbmscvi.QBMSCVI` that use the density of the prior or of the posterior."""

    def get_log_z(self) -> LogPartition:
        """Log partition function of the prior, as the ELBO and the marginal likelihood use it.

        Training ends with an estimate. Without one for the current parameters, this method makes and keeps one. After a
        change of the prior's parameters by hand, call :meth:`update_log_z`.

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
        """Estimate log Z again, for all later numbers.

        Arguments and errors are those of :func:`qbmscvi.diagnostics.estimate_log_z`; more steps give a narrower
        interval. The reverse runs start from the persistent chains of training. Returns as :meth:`get_log_z`.
        """
        prior = self.module.prior
        samples = prior.chains if int(prior.n_updates) else None
        estimate = estimate_log_z(
            prior.to_ising(), samples=samples, n_chains=n_chains, n_steps=n_steps, seed=seed, method=method
        )
        prior.set_log_z(estimate.value, estimate.lower, estimate.upper, estimate.scale)
        return self.get_log_z()

    @torch.inference_mode()
    def get_prior_energy(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dataloader: Batches | None = None,
    ) -> np.ndarray:
        """Mean energy of each cell's posterior under the prior, in nats, shape ``(n_cells,)``.

        It is low where the prior expects cells. Hidden spins are summed out, and the mean is then over draws of the
        posterior; otherwise it is exact. Compare with energies of prior samples, ``model.module.prior.energy``.
        Arguments are those of :meth:`get_latent_representation`.
        """
        self._check_if_trained(warn=False)
        if dataloader is None:
            adata = self._validate_anndata(adata)
            dataloader = self._make_data_loader(adata, indices=indices, batch_size=batch_size)
        energies = []
        for tensors in dataloader:
            outputs = self.module.inference(**self.module._get_inference_input(tensors))
            qz = outputs[MODULE_KEYS.QZ_KEY]
            energies.append(self.module.prior.expected_energy(qz, n_draws=self.module.n_kl_draws).sum(-1).cpu())
        return torch.cat(energies).numpy()

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

        As :meth:`scvi.model.SCVI.get_elbo`, with the KL divergence of :meth:`get_kl` and, for
        ``use_observed_lib_size=False``, that of the library size. The reconstruction term uses one draw of the
        posterior, so only its expectation is a lower bound. Returns the mean over cells, or shape ``(n_cells,)``.
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

        The log of the mean of :math:`p(x, z, \ell) / q(z, \ell \mid x)` over draws of the posterior :cite:p:`Burda16`.
        Its expectation lies between the ELBO and the log likelihood and rises with ``n_mc_samples``. It describes the
        model with hard spins, or with smoothed ones for ``smoothing="spike-exponential"``. Other arguments are those of
        :meth:`scvi.model.SCVI.get_marginal_ll`.

        Parameters
        ----------
        n_mc_samples
            Number of draws per cell.
        n_mc_samples_per_pass
            Number of draws decoded at once; more are faster and need more memory.
        return_error
            Whether to return the Monte Carlo standard error (delta method), too. It is too small if a few draws have
            most of the weight, and leaves out the error of log Z, which all cells share.

        Returns
        -------
        The mean over cells, each with the same weight, or shape ``(n_cells,)``; with ``return_error`` a pair.

        Raises
        ------
        TypeError, ValueError
            If a number of draws is not an integer of at least one (``n_mc_samples``: two with ``return_error``), the
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
        """KL divergence of the posterior of each cell from the prior, in nats.

        It has a closed form except for log Z. With hidden spins it is a mean over draws of the posterior. The KL
        divergence of a latent library size is not included. Other arguments are those of
        :meth:`get_latent_representation`.

        Parameters
        ----------
        n_draws
            Number of draws with hidden spins. Raise it to reduce the error.
        per_unit
            Whether to split the divergence between the spins. Coupled spins share their term equally, and all spins
            share log Z equally; a share can be negative. Use :meth:`get_active_units` to find the units in use.
        return_error
            Whether to return the Monte Carlo standard error of each value, too, without the error of log Z, which all
            cells share. It is zero without hidden spins.

        Returns
        -------
        Shape ``(n_cells,)``, or with ``per_unit`` ``(n_cells, n_latent)``; with ``return_error`` a pair.

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

        The posterior mean of a unit that is not in use hardly varies between cells. Other arguments are those of
        :meth:`get_latent_representation`.

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

        over anchor cells :math:`n` of the population, which ``adata`` and ``indices`` name. Both
        :meth:`get_normalized_expression` and :meth:`differential_expression` use them with ``weights="importance"``.
        Other arguments are those of :meth:`scvi.model.SCVI.get_importance_weights`.

        Parameters
        ----------
        px
            Not used: each anchor cell has its own batch, covariates and library size. Gauss-Hermite quadrature
            integrates over a latent library size.
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
        RuntimeError, ValueError
            If the model is not trained, or the data are minified.
        """
        self._check_if_trained(warn=False)
        module, device = self.module, self.device
        adata = self._validate_anndata(adata)
        indices = np.arange(adata.n_obs) if indices is None else as_rows(indices, adata)
        anchors = torch.randperm(len(indices))[:max_cells].sort().values
        rows = indices[anchors.numpy()]
        log_px = self.get_marginal_ll(
            adata, rows, n_mc_samples, return_mean=False, n_mc_samples_per_pass=n_mc_samples_per_pass
        )
        zs = zs.reshape(-1, zs.shape[-1]).to(device)
        hard = module.z_encoder.recover(zs)
        logits = qz.logits[anchors.to(qz.logits.device)].to(device)
        log_target = torch.full((len(zs),), -math.inf, device=device)
        log_proposal = log_target.clone()
        for k, tensors in enumerate(self._get_batches(adata, rows, 1, None, **data_loader_kwargs)):
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
