"""QBMSCVI: scVI with a Boltzmann prior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from scvi.data._constants import ADATA_MINIFY_TYPE
from scvi.model import SCVI
from scvi.module._constants import MODULE_KEYS

from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.exceptions import require_integer
from qbmscvi.model._abundance import AbundanceMixin
from qbmscvi.model._arguments import CellLoader, as_python
from qbmscvi.model._checked_data import CheckedDataMixin
from qbmscvi.model._deferred import DeferredInitialization
from qbmscvi.model._expression import ExpressionMixin
from qbmscvi.model._generation import GenerationMixin, build_prior_sampler
from qbmscvi.model._input_checks import as_typed, check_moments, require_anndata
from qbmscvi.model._interpretation import InterpretationMixin
from qbmscvi.model._likelihood import LikelihoodMixin
from qbmscvi.model._prior_fit import PriorFitMixin
from qbmscvi.module._qbmvae import DEFAULT_N_LATENT, QBMVAE, resolve_prior_graph
from qbmscvi.train._plan import QBMTrainingPlan
from qbmscvi.train._runner import QBMTrainRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import networkx as nx
    import numpy as np
    from anndata import AnnData
    from lightning import LightningDataModule

    from qbmscvi.boltzmann.graphs import Graph, GraphName
    from qbmscvi.boltzmann.ising import IsingModel
    from qbmscvi.boltzmann.smoothing import Smoothing, SmoothingName
    from qbmscvi.samplers import Sampler
    from qbmscvi.train._schedule import SamplingSchedule

Representation = Literal["angles", "mean", "logits", "bits"]
_REPRESENT: dict[Representation, Callable[[FactorialPosterior], torch.Tensor]] = {
    "angles": lambda qz: qz.mean.asin(),
    "mean": lambda qz: qz.mean,
    "logits": lambda qz: qz.logits,
    "bits": lambda qz: (qz.logits > 0).to(qz.logits),
}


class QBMSCVI(
    PriorFitMixin,
    LikelihoodMixin,
    AbundanceMixin,
    InterpretationMixin,
    GenerationMixin,
    ExpressionMixin,
    CheckedDataMixin,
    SCVI,
    DeferredInitialization,
):
    """scVI with a Boltzmann prior over its latent space :cite:p:`Wang25`.

    Used like :class:`scvi.model.SCVI`; arguments not listed here are scVI's.

    Parameters
    ----------
    adata
        AnnData registered with :meth:`setup_anndata`; None to train from a data module.
    registry
        Registry of the data module. Without it, ``train(datamodule=...)`` builds the networks.
    n_latent
        Number of spins that the decoder sees. Some may stay unused: see :meth:`get_active_units`.
    latent_distribution
        Exists for scVI's signature; must be ``"normal"``.
    prior_graph
        Couplings of the prior. ``"bipartite"``: a restricted Boltzmann machine of spins and hidden spins.
        ``"complete"``, ``"chimera"``, ``"pegasus"``, ``"zephyr"`` or any :class:`networkx.Graph`: couplings between the
        spins, for devices with that graph. ``"independent"``: none, as a control for the effect of couplings.
    n_hidden_spins
        Number of spins that only the prior has; each couples to all ``n_latent`` spins. None means ``n_latent`` with
        ``"bipartite"``, and zero with other graphs. ``"bipartite"`` with zero couples two halves of the spins.
    smoothing
        Relaxation of the spins in training: ``"straight-through"``, ``"gumbel"``, ``"spike-exponential"``, or an
        instance from :mod:`qbmscvi.boltzmann.smoothing`.
    n_chains
        Number of persistent chains of the prior. More chains reduce the sampling error of its gradient.

    Examples
    --------
    >>> import qbmscvi
    >>> adata = qbmscvi.datasets.synthetic_counts(n_cells=300, n_genes=100)
    >>> qbmscvi.QBMSCVI.setup_anndata(adata, batch_key="batch")
    >>> model = qbmscvi.QBMSCVI(adata)
    >>> model.train(max_epochs=2)
    >>> adata.obsm["X_qbmscvi"] = model.get_latent_representation()
    """

    _module_cls = QBMVAE
    _training_plan_cls = QBMTrainingPlan
    _train_runner_cls = QBMTrainRunner
    _data_loader_cls = CellLoader

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        n_hidden: int = 128,
        n_latent: int = DEFAULT_N_LATENT,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: Literal["gene", "gene-batch", "gene-label", "gene-cell"] = "gene",
        gene_likelihood: Literal["zinb", "nb", "poisson", "normal"] = "zinb",
        use_observed_lib_size: bool = True,
        latent_distribution: Literal["normal"] = "normal",
        *,
        prior_graph: GraphName | nx.Graph | Graph = "bipartite",
        n_hidden_spins: int | None = None,
        smoothing: SmoothingName | Smoothing = "straight-through",
        n_chains: int = 512,
        **kwargs: Any,
    ) -> None:
        if adata is None and registry is None and not use_observed_lib_size:
            msg = (
                "use_observed_lib_size=False needs the library size of each batch, but neither `adata` nor "
                "`registry` was given. Pass `adata`, or leave use_observed_lib_size=True."
            )
            raise ValueError(msg)
        super().__init__(
            adata,
            registry,
            n_hidden=n_hidden,
            n_latent=n_latent,
            n_layers=n_layers,
            dropout_rate=dropout_rate,
            dispersion=dispersion,
            gene_likelihood=gene_likelihood,
            use_observed_lib_size=use_observed_lib_size,
            latent_distribution=latent_distribution,
            prior_graph=prior_graph,
            n_hidden_spins=n_hidden_spins,
            smoothing=smoothing,
            n_chains=n_chains,
            **kwargs,
        )
        require_integer("n_latent", n_latent, 1, "Leave it out for the default.")
        n_of_prior = resolve_prior_graph(int(n_latent), prior_graph, n_hidden_spins)[1]
        sizes = f"n_latent: {n_latent}" + (f", n_hidden_spins: {n_of_prior}" if n_of_prior else "")
        graph = prior_graph if isinstance(prior_graph, str) else getattr(prior_graph, "name", "") or "custom"
        self._model_summary_string = (
            f"{type(self).__name__} model with the following parameters: \n"
            f"{sizes}, prior_graph: {graph}, smoothing: {smoothing}, n_hidden: {n_hidden}, "
            f"n_layers: {n_layers}, dropout_rate: {dropout_rate}, dispersion: {dispersion}, "
            f"gene_likelihood: {gene_likelihood}."
        )
        self.init_params_ = self._get_init_params(locals())

    def train(
        self,
        max_epochs: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        load_sparse_tensor: bool = False,
        batch_size: int = 128,
        early_stopping: bool = False,
        datasplitter_kwargs: dict | None = None,
        plan_config: Any | None = None,
        plan_kwargs: Any | None = None,
        datamodule: LightningDataModule | None = None,
        trainer_config: Any | None = None,
        *,
        sampler: str | Sampler = "gibbs",
        schedule: SamplingSchedule | None = None,
        fit_prior: bool = True,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model; arguments not listed here are those of :meth:`scvi.model.SCVI.train`.

        Parameters
        ----------
        plan_config, plan_kwargs
            Arguments of :class:`~qbmscvi.QBMTrainingPlan`, e.g. ``prior_lr``; ``plan_kwargs`` take precedence. Defaults
            in a :class:`scvi.train.TrainingPlanConfig` are ignored, because they would replace those of QBMSCVI.
        sampler
            Source of the prior's samples: a name for :func:`qbmscvi.samplers.build_sampler`, or an instance.
        schedule
            When the prior is sampled.
        fit_prior
            Whether to call :meth:`fit_prior` at the end, with at most as many steps as training had. It changes no
            representation and uses no remote sampler; for that, call :meth:`fit_prior` yourself.

        Raises
        ------
        ValueError
            If the data are minified or not counts, a cell is empty, a size factor or covariate is not finite, or the
            sampler is unknown or finds only ground states.
        AttributeError
            If the model has no AnnData and ``datamodule`` is missing.
        GraphMismatchError
            If the prior does not fit the sampler.
        TrainingDivergedError
            If the loss became non-finite; the model keeps its last finite state.
        """
        sampler = build_prior_sampler(sampler)
        if datamodule is None and self.adata is None:
            msg = "The model has no AnnData to be trained on. Pass `datamodule`, or build the model with `adata`."
            raise AttributeError(msg)  # the same class as scVI's accidental error
        if datamodule is None and self.minified_data_type == ADATA_MINIFY_TYPE.LATENT_POSTERIOR:
            # scVI refuses here, before a pass through the decoder has changed its batch statistics.
            self.module.loss({}, {}, {})
        if datamodule is None and self.minified_data_type is None:
            self._check_numbers(self.adata)
        plan_kwargs = {**plan_arguments(plan_config), **plan_arguments(plan_kwargs)}
        for name in ("sampler", "schedule"):
            if name in plan_kwargs:
                msg = f"`{name}` is an argument of `train`: use train({name}=...) instead of plan_kwargs."
                raise TypeError(msg)
        arguments = as_python(
            {
                "max_epochs": max_epochs,
                "accelerator": accelerator,
                "devices": devices,
                "train_size": train_size,
                "validation_size": validation_size,
                "shuffle_set_split": shuffle_set_split,
                "load_sparse_tensor": load_sparse_tensor,
                "batch_size": batch_size,
                "early_stopping": early_stopping,
                **trainer_kwargs,
            }
        )
        super().train(
            datasplitter_kwargs=as_python(datasplitter_kwargs or {}),
            plan_kwargs={**as_python(plan_kwargs), "sampler": sampler, "schedule": schedule},
            datamodule=datamodule,
            trainer_config=as_python(trainer_config) if isinstance(trainer_config, Mapping) else trainer_config,
            **arguments,
        )
        if fit_prior:
            self._fit_prior_after_training(datamodule, trainer_kwargs.get("enable_progress_bar", True))

    @torch.inference_mode()
    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        give_mean: bool = True,
        mc_samples: int = 5_000,
        batch_size: int | None = None,
        return_dist: bool = False,
        dataloader: Iterator[dict[str, torch.Tensor | None]] | None = None,
        *,
        representation: Representation = "angles",
        **data_loader_kwargs: Any,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        r"""Compute the latent representation of the cells, shape ``(n_cells, n_latent)``.

        Arguments not listed here are those of :meth:`scvi.model.SCVI.get_latent_representation`. ``mc_samples`` has no
        effect, because all means have a closed form.

        Parameters
        ----------
        give_mean
            If False, return one random draw of the posterior.
        return_dist
            If True, return mean and variance of the spins' posterior, a pair of arrays.
        representation
            ``"angles"`` :math:`\arcsin(m)` (Euclidean distances are Fisher-Rao distances between posteriors);
            ``"mean"`` spins :math:`m = \tanh(l / 2)`; ``"logits"`` :math:`l`; or most likely ``"bits"`` in ``{0, 1}``,
            which make many cells identical and so are unfit for neighbor graphs.

        Raises
        ------
        ValueError
            If ``representation`` is unknown.
        """
        self._check_if_trained(warn=False)
        if representation not in tuple(_REPRESENT):
            msg = f"Unknown representation {representation!r}. Use {as_typed(_REPRESENT)}."
            raise ValueError(msg)
        if return_dist:
            return super().get_latent_representation(
                adata, indices, batch_size=batch_size, return_dist=True, dataloader=dataloader, **data_loader_kwargs
            )
        if dataloader is None:
            adata = self._validate_anndata(adata)
            dataloader = self._make_data_loader(adata, indices=indices, batch_size=batch_size, **data_loader_kwargs)
        parts = []
        for tensors in dataloader:
            outputs = self.module.inference(**self.module._get_inference_input(tensors))
            z = outputs[MODULE_KEYS.Z_KEY]
            parts.append((_REPRESENT[representation](self._posterior(outputs)) if give_mean else z).cpu())
        return torch.cat(parts).numpy()

    def _posterior(self, outputs: dict[str, Any]) -> FactorialPosterior:
        """Posterior of a batch; the module may return only its moments, as scvi-tools allows."""
        if MODULE_KEYS.QZ_KEY in outputs:
            return outputs[MODULE_KEYS.QZ_KEY]
        mean, variance = outputs[MODULE_KEYS.QZM_KEY], outputs[MODULE_KEYS.QZV_KEY]
        return FactorialPosterior.from_moments(mean, variance)

    def get_ising_model(self) -> IsingModel:
        """Return the prior as an Ising problem, with hidden spins last.

        ``model.get_ising_model().to_bqm()`` is a :class:`dimod.BinaryQuadraticModel`.
        """
        return self._require_module().prior.to_ising()

    @classmethod
    def load_query_data(
        cls, adata: AnnData | None = None, *args: Any, freeze_prior: bool = True, **kwargs: Any
    ) -> QBMSCVI:
        """Map new data onto a trained model (scArches).

        Arguments not listed here are those of :meth:`scvi.model.SCVI.load_query_data`. The new model copies the prior
        with its chains and log Z.

        Parameters
        ----------
        freeze_prior
            Whether to keep the prior fixed, so that the latent space keeps its meaning. False, like ``unfrozen=True``,
            also trains the prior on the new data.

        Raises
        ------
        TypeError
            If ``adata`` is not an AnnData.
        ValueError
            If its columns or genes differ from the model's.
        """
        if adata is not None:
            require_anndata(adata)
        model = super().load_query_data(adata, *args, **kwargs)
        if not freeze_prior:
            model.module.prior.requires_grad_(True)
        return model

    def minify_adata(
        self,
        minified_data_type: str = "latent_posterior_parameters",
        use_latent_qzm_key: str = "X_latent_qzm",
        use_latent_qzv_key: str = "X_latent_qzv",
    ) -> None:
        """Replace the counts of each cell by its posterior, as :meth:`scvi.model.SCVI.minify_adata`.

        The keys of ``adata.obsm`` name mean and variance of the spins, from
        ``get_latent_representation(return_dist=True)``.

        Raises
        ------
        ValueError
            If a key is missing or does not hold these moments.
        """
        check_moments(self.adata, use_latent_qzm_key, use_latent_qzv_key, self.module.prior.n_visible)
        super().minify_adata(minified_data_type, use_latent_qzm_key, use_latent_qzv_key)


def plan_arguments(config: Any | None) -> dict[str, Any]:
    """Arguments in a mapping, or those in one of scVI's config objects that differ from its defaults."""
    if not hasattr(config, "to_kwargs"):
        return dict(config or {})
    defaults = type(config)().to_kwargs() if is_dataclass(config) else {}
    return {
        name: value for name, value in config.to_kwargs().items() if name not in defaults or value != defaults[name]
    }
