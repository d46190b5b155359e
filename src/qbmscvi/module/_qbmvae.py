"""scVI's module with a Boltzmann prior and a factorial posterior over spins."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.module import VAE
from scvi.module._constants import MODULE_KEYS
from scvi.module.base import auto_move_data
from torch import Tensor

from qbmscvi.boltzmann.graphs import Graph, GraphName, bipartite, build_graph, with_hidden
from qbmscvi.boltzmann.log_z import log_mean_exp
from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.boltzmann.prior import BoltzmannDistribution, BoltzmannPrior
from qbmscvi.boltzmann.smoothing import Smoothing, SmoothingName, build_smoothing
from qbmscvi.exceptions import require_integer
from qbmscvi.module._encoder import BoltzmannEncoder
from qbmscvi.module._sparse_likelihoods import with_sparse_log_prob

if TYPE_CHECKING:
    from collections.abc import Callable

    import networkx as nx
    from torch.distributions import Distribution

_LIKELIHOODS = ("zinb", "nb", "poisson", "normal")
DEFAULT_N_LATENT = 64  # spins
_N_LIBRARY_NODES = 15
_N_KL_DRAWS = 20  # per cell, outside training; the error of a mean over cells is far below the reconstruction's


def resolve_prior_graph(
    n_spins: int, prior_graph: GraphName | nx.Graph | Graph, n_hidden_spins: int | None = None
) -> tuple[Graph, int]:
    """Return the graph of all spins and the number of hidden spins, which are its last nodes.

    ``n_hidden_spins=None`` means as many hidden as visible spins for ``"bipartite"``, and zero otherwise. Hidden spins
    couple to every visible spin. Graphs other than ``"bipartite"`` add couplings between visible spins. ``"bipartite"``
    without hidden spins couples two halves of the spins. ``"independent"`` has no couplings, the J = 0 control.

    Raises
    ------
    ValueError
        If there are hidden spins with ``"independent"``, or their number is negative.
    """
    name = prior_graph if isinstance(prior_graph, str) else None
    if n_hidden_spins is None:
        n_hidden_spins = n_spins if name == "bipartite" else 0
    require_integer("n_hidden_spins", n_hidden_spins, 0, "Leave it out for the default.")
    n_hidden_spins = int(n_hidden_spins)
    if n_hidden_spins and name == "independent":
        msg = (
            f"n_hidden_spins={n_hidden_spins}, but prior_graph='independent' has no couplings. Leave `n_hidden_spins` "
            "out."
        )
        raise ValueError(msg)
    if n_hidden_spins and name == "bipartite":
        return bipartite(n_spins, n_hidden_spins), n_hidden_spins
    graph = build_graph(prior_graph, n_spins)
    return with_hidden(graph, n_hidden_spins) if n_hidden_spins else graph, n_hidden_spins


class QBMVAE(VAE):
    """Variational autoencoder of counts whose latent prior is a Boltzmann distribution.

    Arguments not listed here are those of :class:`scvi.module.VAE`.

    Parameters
    ----------
    n_latent
        Number of spins that the decoder sees.
    latent_distribution
        Exists for scVI's signature; must be ``"normal"``.
    prior_graph
        Interaction graph of the spins; see :func:`resolve_prior_graph`.
    n_hidden_spins
        Number of spins that only the prior has; see :func:`resolve_prior_graph`.
    smoothing
        Relaxation of the spins in training; see :mod:`qbmscvi.boltzmann.smoothing`.
    n_chains
        Number of persistent chains of the prior.
    """

    def __init__(
        self,
        n_input: int,
        n_batch: int = 0,
        n_labels: int = 0,
        n_hidden: int = 128,
        n_latent: int = DEFAULT_N_LATENT,
        n_layers: int = 1,
        n_continuous_cov: int = 0,
        n_cats_per_cov: list[int] | None = None,
        dropout_rate: float = 0.1,
        dispersion: Literal["gene", "gene-batch", "gene-label", "gene-cell"] = "gene",
        log_variational: bool = True,
        gene_likelihood: Literal["zinb", "nb", "poisson", "normal"] = "zinb",
        latent_distribution: Literal["normal"] = "normal",
        encode_covariates: bool = False,
        deeply_inject_covariates: bool = True,
        batch_representation: Literal["one-hot", "embedding"] = "one-hot",
        use_batch_norm: Literal["encoder", "decoder", "none", "both"] = "both",
        use_layer_norm: Literal["encoder", "decoder", "none", "both"] = "none",
        use_size_factor_key: bool = False,
        use_observed_lib_size: bool = True,
        extra_payload_autotune: bool = False,
        library_log_means: np.ndarray | None = None,
        library_log_vars: np.ndarray | None = None,
        var_activation: Callable[[Tensor], Tensor] | None = None,
        extra_encoder_kwargs: dict | None = None,
        extra_decoder_kwargs: dict | None = None,
        batch_embedding_kwargs: dict | None = None,
        *,
        prior_graph: GraphName | nx.Graph | Graph = "bipartite",
        n_hidden_spins: int | None = None,
        smoothing: SmoothingName | Smoothing = "straight-through",
        # 448 chains give the moments: sampling error at most 0.05, half of the error from the 128 cells of a batch.
        n_chains: int = 512,
    ) -> None:
        if latent_distribution != "normal":
            msg = (
                f"latent_distribution={latent_distribution!r} has no meaning under a Boltzmann prior; only 'normal' is "
                "accepted, for scVI's signature. Leave it out."
            )
            raise ValueError(msg)
        if gene_likelihood not in _LIKELIHOODS:
            msg = f"Unknown gene_likelihood {gene_likelihood!r}. Use one of {', '.join(map(repr, _LIKELIHOODS))}."
            raise ValueError(msg)
        require_integer("n_latent", n_latent, 1, "Leave it out for the default.")
        n_latent = int(n_latent)
        require_integer("n_chains", n_chains, 2, "Moments need several chains; 512 is usual.")
        graph, n_hidden_spins = resolve_prior_graph(n_latent, prior_graph, n_hidden_spins)
        prior = self._build_prior(graph, n_labels, n_hidden=n_hidden_spins, n_chains=n_chains)
        super().__init__(
            n_input=n_input,
            n_batch=n_batch,
            n_labels=n_labels,
            n_hidden=n_hidden,
            n_latent=n_latent,
            n_layers=n_layers,
            n_continuous_cov=n_continuous_cov,
            n_cats_per_cov=n_cats_per_cov,
            dropout_rate=dropout_rate,
            dispersion=dispersion,
            log_variational=log_variational,
            gene_likelihood=gene_likelihood,
            latent_distribution=latent_distribution,
            encode_covariates=encode_covariates,
            deeply_inject_covariates=deeply_inject_covariates,
            batch_representation=batch_representation,
            use_batch_norm=use_batch_norm,
            use_layer_norm=use_layer_norm,
            use_size_factor_key=use_size_factor_key,
            use_observed_lib_size=use_observed_lib_size,
            extra_payload_autotune=extra_payload_autotune,
            library_log_means=library_log_means,
            library_log_vars=library_log_vars,
            var_activation=var_activation,
            extra_encoder_kwargs=extra_encoder_kwargs,
            extra_decoder_kwargs=extra_decoder_kwargs,
            batch_embedding_kwargs=batch_embedding_kwargs,
        )
        self.prior = prior
        self.z_encoder = BoltzmannEncoder(self.z_encoder, n_latent, build_smoothing(smoothing))

    @staticmethod
    def _build_prior(graph: Graph, n_labels: int, **settings: Any) -> BoltzmannPrior:
        """Build the prior; it ignores labels here."""
        return BoltzmannPrior(graph, **settings)

    @auto_move_data
    def _cached_inference(
        self, qzm: Tensor, qzv: Tensor, observed_lib_size: Tensor, n_samples: int = 1
    ) -> dict[str, Tensor | Distribution | None]:
        """Rebuild the posterior of minified data from its stored mean and variance."""
        qz = FactorialPosterior.from_moments(qzm, qzv, self.z_encoder.smoothing)
        z = self.z_encoder.z_transformation(qz.sample())
        library = torch.log(observed_lib_size)
        if n_samples > 1:
            # The unused draw keeps the random stream equal to that for counts, so equal seeds give equal numbers.
            z = self.z_encoder.z_transformation(qz.sample((n_samples,)))
            library = library.unsqueeze(0).expand((n_samples, *library.shape))
        return {
            MODULE_KEYS.Z_KEY: z,
            MODULE_KEYS.QZ_KEY: qz,
            MODULE_KEYS.QL_KEY: None,
            MODULE_KEYS.LIBRARY_KEY: library,
        }

    def compute_embedding(self, key: str, indices: Tensor) -> Tensor:
        """Return the embeddings of categories of shape ``(..., 1)`` or ``(n,)``; shape ``(..., n_dimensions)``."""
        rows = super().compute_embedding(key, indices)
        return rows.view(*indices.shape[:-1], rows.shape[-1]) if indices.ndim > 1 else rows

    @auto_move_data
    def generative(
        self,
        z: Tensor,
        library: Tensor,
        batch_index: Tensor,
        cont_covs: Tensor | None = None,
        cat_covs: Tensor | None = None,
        size_factor: Tensor | None = None,
        y: Tensor | None = None,
        transform_batch: Tensor | None = None,
    ) -> dict[str, Distribution | None]:
        """Run scVI's generative process; the prior of ``z`` is the Boltzmann prior."""
        if self.batch_representation == "embedding" and z.ndim > batch_index.ndim:
            batch_index = batch_index.expand(*z.shape[:-1], 1)  # scVI does so only for one-hot batches
        outputs = super().generative(z, library, batch_index, cont_covs, cat_covs, size_factor, y, transform_batch)
        theta = self.px_r.exp() if self.dispersion == "gene" else None
        outputs[MODULE_KEYS.PX_KEY] = with_sparse_log_prob(outputs[MODULE_KEYS.PX_KEY], theta)
        outputs[MODULE_KEYS.PZ_KEY] = self._prior_given(y)
        return outputs

    def _prior_given(self, y: Tensor | None) -> BoltzmannDistribution:
        """Return the prior of cells with labels ``y``, which it ignores here."""
        return self.prior.distribution(n_draws=self.n_kl_draws)

    @property
    def n_kl_draws(self) -> int:
        """Number of draws for the KL divergence of a posterior: none in training, which has a closed form."""
        return 0 if self.training else _N_KL_DRAWS

    def _decode(self, tensors: dict[str, Tensor], z: Tensor, library: Tensor) -> tuple[Tensor, Distribution | None]:
        """Log likelihood per cell at ``z`` and log library size, and the prior of the latter."""
        outputs = {MODULE_KEYS.Z_KEY: z, MODULE_KEYS.LIBRARY_KEY: library}
        decoded = self.generative(**self._get_generative_input(tensors, outputs))
        log_px = decoded[MODULE_KEYS.PX_KEY].log_prob(tensors[REGISTRY_KEYS.X_KEY]).sum(-1)
        return log_px, decoded[MODULE_KEYS.PL_KEY]

    @torch.inference_mode()
    @auto_move_data
    def log_importance_weights(
        self, tensors: dict[str, Tensor], n_samples: int, n_samples_per_pass: int = 10
    ) -> Tensor:
        r"""Log of :math:`p(x, z, \ell) / q(z, \ell \mid x)` at draws of the posterior.

        Parameters
        ----------
        tensors
            One batch of a data loader.
        n_samples
            Number of draws.
        n_samples_per_pass
            Number of draws decoded at once.

        Returns
        -------
        Shape ``(n_samples, n_cells)``, in nats.
        """
        outputs = self.inference(**self._get_inference_input(tensors, full_forward_pass=True))
        qz, ql, library = (outputs[key] for key in (MODULE_KEYS.QZ_KEY, MODULE_KEYS.QL_KEY, MODULE_KEYS.LIBRARY_KEY))
        parts = []
        for start in range(0, n_samples, n_samples_per_pass):
            shape = (min(n_samples_per_pass, n_samples - start),)
            z = qz.sample(shape)
            library_draws = library.expand(*shape, *library.shape) if ql is None else ql.sample(shape)
            log_px, pl = self._decode(tensors, self.z_encoder.z_transformation(z), library_draws)
            log_weights = log_px + self.prior.distribution().log_prob(z) - qz.log_prob(z).sum(-1)
            if ql is not None:
                log_weights += (pl.log_prob(library_draws) - ql.log_prob(library_draws)).sum(-1)
            parts.append(log_weights)
        return torch.cat(parts)

    @torch.inference_mode()
    @auto_move_data
    def log_likelihood(self, tensors: dict[str, Tensor], z: Tensor) -> Tensor:
        r"""Log likelihood :math:`\log p(x \mid z)` of one cell at given codes.

        A latent library size is integrated out by Gauss-Hermite quadrature around its posterior.

        Parameters
        ----------
        tensors
            A batch of one cell from a data loader.
        z
            Codes as the decoder sees them, shape ``(n_codes, n_latent)``.

        Returns
        -------
        Shape ``(n_codes,)``, in nats.
        """
        outputs = self.inference(**self._get_inference_input(tensors, full_forward_pass=True))
        ql, library = outputs[MODULE_KEYS.QL_KEY], outputs[MODULE_KEYS.LIBRARY_KEY]
        # Codes are rows of the decoder's input; scVI's layers are much slower with a third dimension.
        covariates = {
            key: value.expand(len(z), -1)
            for key, value in tensors.items()
            if isinstance(value, Tensor) and key != REGISTRY_KEYS.X_KEY
        }
        rows = {**tensors, **covariates}
        if ql is None:
            return self._decode(rows, z, library.expand(len(z), -1))[0]
        total = z.new_full(z.shape[:1], -math.inf)
        for node, weight in zip(*np.polynomial.hermite_e.hermegauss(_N_LIBRARY_NODES), strict=True):
            library = (ql.mean + ql.stddev * node).expand(len(z), -1)
            log_px, pl = self._decode(rows, z, library)
            log_ratio = (pl.log_prob(library) - ql.log_prob(library)).sum(-1)
            total = torch.logaddexp(total, log_px + log_ratio + math.log(weight / math.sqrt(2.0 * math.pi)))
        return total

    def marginal_ll(
        self,
        tensors: dict[str, Tensor],
        n_mc_samples: int,
        return_mean: bool = False,
        n_mc_samples_per_pass: int = 10,
    ) -> Tensor | float:
        """Log likelihood of cells by importance sampling; see :meth:`qbmscvi.QBMSCVI.get_marginal_ll`.

        Returns
        -------
        Shape ``(n_cells,)``, or the mean.
        """
        value = log_mean_exp(self.log_importance_weights(tensors, n_mc_samples, n_mc_samples_per_pass))[0]
        return value.mean().item() if return_mean else value.cpu()
