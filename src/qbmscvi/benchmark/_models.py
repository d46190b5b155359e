"""Models that :func:`~qbmscvi.benchmark.compare` trains, by name, and what it hands to a model of the caller's own.

All neural models of scvi-tools get the same cells, genes, split, epochs, batch size and layers; :data:`MODELS` lists
all differences. Each is read by ``get_latent_representation()`` without arguments.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

import numpy as np
import scvi
import torch
from scvi.external import SysVI
from scvi.model import SCVI

from qbmscvi.benchmark._cells import (
    GAUSSIAN_RIVALS,
    OF_TRAINING,
    OWN_CODES,
    REAL_CELLS,
    SHUFFLED,
    SPIN_RIVALS,
    BoltzmannDensity,
    Control,
    score_priors,
)
from qbmscvi.model._qbmscvi import QBMSCVI
from qbmscvi.module._qbmvae import DEFAULT_N_LATENT
from qbmscvi.train._plan import QBMTrainingPlan, auto_kl_warmup, auto_weight_decay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from anndata import AnnData
    from scvi.model.base import BaseModelClass

Schedule = Literal["native", "default", "half"]

_TARGET_SUM = 1e4
_N_COMPONENTS = 50
_SCVI_WARMUP = 400
_TRAIN_SIZE, _BATCH_SIZE = 0.9, 128  # scVI's defaults, with which all are trained


@dataclass(frozen=True)
class Task:
    """One training run: the inputs of a model.

    Parameters
    ----------
    adata
        Cells and genes of the comparison, counts in ``X``. Shared by all models: take a copy before changing it.
    batch_key
        Column of ``adata.obs``, or None.
    seed
        Seed of the run; ``scvi.settings.seed`` has it when the model is called.
    max_epochs
        Epochs to train.
    schedule
        KL schedule: ``"native"``, ``"default"`` or ``"half"``.
    accelerator
        Lightning's accelerator.
    label_key
        Column of ``adata.obs`` with the cell type, for scores of generated cells; no model may learn from it.
    controls
        What to score in place of the trained model's prior, as keys of :attr:`Fit.controls`.
    """

    adata: AnnData
    batch_key: str | None
    seed: int
    max_epochs: int
    schedule: Schedule = "native"
    accelerator: str = "auto"
    label_key: str | None = None
    controls: tuple[str, ...] = ()

    @cached_property
    def normalized(self) -> AnnData:
        """Copy of the data, counts scaled to 10,000 a cell and ``log1p`` taken."""
        return log_normalize(self.adata)


@dataclass
class Fit:
    """Result of a model.

    Parameters
    ----------
    latent
        Representation, shape ``(n_cells, n_dimensions)``.
    settings
        Exact settings of the run, which become part of the record.
    scores
        Scores that need the model itself: ``elbo``, with ``elbo_low`` and ``elbo_high`` where log Z is estimated,
        ``kl`` and those of cells from the prior.
    controls
        Scores of the same trained model with something else in place of its prior, by what that is.
    cpu_s
        CPU seconds of training; None for all that the model took.
    fit_cpu_s
        CPU seconds of fitting the prior afterwards.
    """

    latent: np.ndarray
    settings: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    controls: dict[str, Control] = field(default_factory=dict)
    cpu_s: float | None = None
    fit_cpu_s: float | None = None


def log_normalize(adata: AnnData) -> AnnData:
    """Copy with counts scaled to 10,000 a cell and ``log1p`` taken."""
    import scanpy as sc

    normalized = adata.copy()
    sc.pp.normalize_total(normalized, target_sum=_TARGET_SUM)
    sc.pp.log1p(normalized)
    return normalized


def principal_components(normalized: AnnData, seed: int = 0) -> np.ndarray:
    """Principal components of log-normalized counts, at most 50; shape ``(n_cells, n_components)``."""
    import scanpy as sc

    n_components = min(_N_COMPONENTS, normalized.n_obs - 1, normalized.n_vars - 1)
    return sc.pp.pca(normalized, n_comps=n_components, random_state=seed, copy=True).obsm["X_pca"]


def _fit_pca(task: Task) -> Fit:
    latent = principal_components(task.normalized, task.seed)
    settings = {"model": "scanpy.pp.pca", "arguments": {"n_comps": latent.shape[1]}, "target_sum": _TARGET_SUM}
    return Fit(latent, settings)


@dataclass(frozen=True)
class NeuralModel:
    """A model of scvi-tools, with what differs from its defaults.

    Parameters
    ----------
    model_class
        Class of the model.
    arguments
        Arguments of its constructor.
    plan
        Arguments of its training plan.
    training
        Further arguments of its ``train``.
    is_normalized
        Whether it takes log-normalized values in place of counts; then it has no ELBO that compares with the others.
    takes_schedule
        Whether its KL warm-up can be set.
    """

    model_class: type[BaseModelClass]
    arguments: Callable[[Task], dict] = lambda task: {}
    plan: Callable[[Task], dict] = lambda task: {}
    training: Callable[[Task], dict] = lambda task: {}
    is_normalized: bool = False
    takes_schedule: bool = True

    def __call__(self, task: Task) -> Fit:
        """Train the model."""
        arguments, plan = self.arguments(task), self.plan(task)
        if self.takes_schedule and task.schedule != "native":
            plan["n_epochs_kl_warmup"] = _SCVI_WARMUP if task.schedule == "default" else task.max_epochs // 2
        scvi.settings.seed = task.seed
        started = time.process_time()
        model = self.build(task, arguments)
        training = self.training(task)
        is_boltzmann = isinstance(model, QBMSCVI)
        fits_prior = is_boltzmann and training.get("fit_prior", True)
        if is_boltzmann:
            training = {**training, "fit_prior": False}  # here instead, to see the prior before and count the seconds
        model.train(
            max_epochs=task.max_epochs,
            accelerator=task.accelerator,
            plan_kwargs=plan,
            enable_progress_bar=False,
            **training,
        )
        fit = Fit(model.get_latent_representation(), cpu_s=round(time.process_time() - started, 2))
        of_training = BoltzmannDensity.of(model) if is_boltzmann else None
        if fits_prior:
            started = time.process_time()
            model._fit_prior_after_training(None, False)
            fit.fit_cpu_s = round(time.process_time() - started, 2)
        fit.settings = {
            "model": f"{self.model_class.__module__}.{self.model_class.__qualname__}",
            "given": arguments,
            "arguments": model.init_params_,
            "training": _training_settings(model),
        }
        if not self.is_normalized:
            fit.scores = _held_out_fit(model, task.seed)
            of_prior, fit.controls = score_priors(
                model,
                fit.scores["elbo"],
                task.controls,
                label_key=task.label_key,
                of_training=of_training,
                seed=task.seed,
            )
            fit.scores |= of_prior
        return fit

    def build(self, task: Task, arguments: dict) -> BaseModelClass:
        """Set the data up and make the model, untrained."""
        adata = task.normalized if self.is_normalized else task.adata
        self.model_class.setup_anndata(adata, batch_key=task.batch_key)
        return self.model_class(adata, **arguments)


def _training_settings(model: BaseModelClass) -> dict[str, Any]:
    """Settings as the training plan had them at the end, defaults and warm-ups that were resolved included."""
    plan = model.trainer.lightning_module
    names = ("lr", "eps", "weight_decay", "optimizer_name", "n_epochs_kl_warmup", "n_steps_kl_warmup")
    settings = {name: getattr(plan, name) for name in names}
    if isinstance(plan, QBMTrainingPlan):
        settings["prior_lr"] = plan.prior_lr
        settings["sampler"] = plan.sampling.sampler.name
        settings["sampling_schedule"] = asdict(plan.sampling.schedule)
    indices = np.sort(model.validation_indices)
    return {
        **settings,
        "max_epochs": model.trainer.max_epochs,
        "n_validation": len(indices),
        "validation_crc32": crc32(indices.astype(np.int64).tobytes()),
    }


def _held_out_fit(model: SCVI, seed: int) -> dict[str, float]:
    """ELBO of the validation cells at draws of the posterior that only the seed decides, in nats per cell."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        elbo = float(model.get_elbo(indices=model.validation_indices))
    if not isinstance(model, QBMSCVI):
        return {"elbo": elbo}
    return {"elbo": elbo, **BoltzmannDensity.of(model).bounds(elbo)}


def same_width(task: Task) -> dict[str, int]:
    """Width of what QBMSCVI's ``get_latent_representation()`` returns, as ``n_latent``."""
    return {"n_latent": DEFAULT_N_LATENT}


def same_optimizer(task: Task) -> dict[str, Any]:
    """Arguments of scVI's training plan for the optimizer, learning rate, weight decay and KL warm-up of QBMSCVI."""
    lr, eps = _plan_default("lr"), _plan_default("eps")
    decay = auto_weight_decay(lr, _n_batches(task))

    def create(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        parameters = list(parameters)
        # With scVI's other defaults the only matrices are the weights of linear layers.
        groups = [
            {"params": [p for p in parameters if p.ndim == 2]},
            {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=lr, eps=eps, weight_decay=decay)

    return {
        "lr": lr,
        "eps": eps,
        "weight_decay": decay,
        "n_epochs_kl_warmup": None,
        "n_steps_kl_warmup": auto_kl_warmup(task.max_epochs * _n_batches(task)),
        "optimizer": "Custom",
        "optimizer_creator": create,
    }


def _n_batches(task: Task) -> int:
    return math.ceil(math.ceil(_TRAIN_SIZE * task.adata.n_obs) / _BATCH_SIZE)


def _plan_default(name: str) -> float:
    from inspect import signature

    return signature(QBMTrainingPlan.__init__).parameters[name].default


MODELS: dict[str, Callable[[Task], Fit]] = {
    "SCVI": NeuralModel(SCVI),
    "SCVI, same optimizer and width": NeuralModel(SCVI, same_width, same_optimizer),
    "PCA": _fit_pca,
    "QBMSCVI": NeuralModel(QBMSCVI),
    "QBMSCVI, J = 0": NeuralModel(QBMSCVI, lambda task: {"prior_graph": "independent"}),
    "SysVI, VampPrior": NeuralModel(SysVI, is_normalized=True, takes_schedule=False),
}
"""Built-in models that are trained."""

_OF_PRIOR = {
    **{name: (OWN_CODES, *GAUSSIAN_RIVALS) for name in MODELS if name.startswith("SCVI")},
    "QBMSCVI": (SHUFFLED, OF_TRAINING, OWN_CODES, *SPIN_RIVALS),
}

CONTROLS: dict[str, tuple[str, str]] = {
    REAL_CELLS: ("SCVI", REAL_CELLS),
    **{f"{name}, {control}": (name, control) for name, controls in _OF_PRIOR.items() for control in controls},
}
"""Names that come with a trained model: which model that is, and what stands in place of its prior."""

MODEL_NAMES = (*MODELS, *CONTROLS)


def available_models(batch_key: str | None) -> tuple[str, ...]:
    """Names of the built-in models for data with or without a batch."""
    return tuple(name for name in MODEL_NAMES if batch_key is not None or name != "SysVI, VampPrior")
