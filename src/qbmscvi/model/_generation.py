"""Generated cells: latent variables from the prior, counts from the decoder.

The prior does not contain a cell's batch, library size and covariates. They are given, or come from one cell of the
model's AnnData.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.data._constants import _SETUP_ARGS_KEY
from scvi.module._constants import MODULE_KEYS

from qbmscvi.boltzmann.labeled_prior import LabeledPrior
from qbmscvi.exceptions import require_integer
from qbmscvi.model._counts import totals_per_cell
from qbmscvi.model._input_checks import as_typed, suggest
from qbmscvi.samplers import BlockGibbsSampler, SamplingRequest, build_sampler

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from qbmscvi.samplers import Sampler

# Sweeps of a chain from random spins; `fit_prior` says after how many sweeps chains have mixed.
_BURN_IN = 1_000
_UNKNOWN = -1  # code of an unknown type


class GenerationMixin:
    """Methods of :class:`~qbmscvi.QBMSCVI` that draw from the prior."""

    @torch.inference_mode()
    def sample_prior(
        self, n_samples: int = 1_000, *, sampler: str | Sampler = "gibbs", seed: int | None = None
    ) -> np.ndarray:
        """Draw latent variables from the prior: spins in ``{-1, +1}``, shape ``(n_samples, n_latent)``.

        Parameters
        ----------
        n_samples
            Number of draws; with the default sampler each is the end of a separate chain of 1,000 sweeps.
        sampler
            Name or instance, as in :meth:`train`.
        seed
            Seed; None draws one from torch's global stream.

        Raises
        ------
        ValueError
            If the sampler is unknown or finds only ground states, or ``seed`` is negative.
        SamplerError
            If the sampler fails.
        """
        return self._draw_latent(n_samples, None, sampler, seed).numpy()

    @torch.inference_mode()
    def generate(
        self,
        n_cells: int = 1_000,
        *,
        batch: str | None = None,
        cell_type: str | None = None,
        covariates: Mapping[str, Any] | None = None,
        library_size: float | np.ndarray | None = None,
        sampler: str | Sampler = "gibbs",
        seed: int | None = None,
    ) -> AnnData:
        """Generate cells: latent variables from the prior, counts from the decoder.

        For each generated cell, missing values come together from one random cell with counts of the model's AnnData.
        The choice is the first of these that exists: the same batch and known type, that type in any batch, that batch,
        any cell.

        Parameters
        ----------
        n_cells
            Number of cells.
        batch
            Batch of the cells. None draws batches in the proportions of the model's AnnData, without it the first.
        cell_type
            Label of the cells. :class:`QBMSCANVI` draws latent variables of that type; None draws types in the
            proportions of the prior. With ``dispersion="gene-label"`` the label sets dispersion, library sizes and
            covariates, but not the prior; None draws labels like covariates. Other models refuse it.
        covariates
            Values by covariate column: one for all cells, or shape ``(n_cells,)``. Missing columns are drawn.
        library_size
            Total count, or size factor with ``size_factor_key``: a number, or shape ``(n_cells,)``. None draws it.
        sampler, seed
            As in :meth:`sample_prior`.

        Returns
        -------
        Counts in ``X``, latent variables in ``obsm["z"]``, and in ``obs`` the ``library_size`` and the columns of
        batch, covariates and, if the model uses labels, labels. Without ``cell_type``, a :class:`QBMSCANVI` gives each
        cell its most probable label.

        Raises
        ------
        ValueError
            If a batch, type, column or category is unknown, ``library_size`` is not positive, a number is not finite, a
            length is wrong, the model cannot draw cells of a type, or has no AnnData for missing values.
        TypeError
            If ``covariates`` is not a dictionary, or a continuous covariate has values that are not numbers.
        """
        module, genes = self._require_module(), self.get_var_names()
        prior = module.prior
        has_label_spins = isinstance(prior, LabeledPrior)
        batches = list(self.get_state_registry(REGISTRY_KEYS.BATCH_KEY).categorical_mapping)
        labels = list(self.get_state_registry(REGISTRY_KEYS.LABELS_KEY).categorical_mapping)
        labels = labels[: prior.n_labels] if has_label_spins else labels
        batch_code = None if batch is None else _code("batch", batch, batches)
        label = self._label_code(cell_type, labels)
        require_integer("n_cells", n_cells, 1)
        n_cells = int(n_cells)
        columns = self._covariate_columns()
        values = _as_covariates(covariates, columns, n_cells)
        missing = [column for column in columns if column not in values]
        if library_size is not None:
            library_size = _as_library_size(library_size, n_cells)
        draws_labels = module.dispersion == "gene-label" and label is None
        self._require_cells(library_size is None, missing, draws_labels)

        seed = split_seed(None, 1)[0] if seed is None else seed
        row_seed, count_seed = split_seed(seed, 3)[1:]  # the first is used for the latent variables
        z = self._draw_latent(n_cells, label if has_label_spins else None, sampler, seed)
        if has_label_spins and label is None:
            label = module.classify(None, z).argmax(-1).cpu().numpy()
        label_codes = np.full(n_cells, _UNKNOWN if label is None else label, dtype=np.int64)

        rng = np.random.default_rng(row_seed)
        if batch_code is None and len(batches) > 1 and self.adata is not None:
            batch_code = rng.choice(self._codes_of_cells(REGISTRY_KEYS.BATCH_KEY), n_cells)
        batch_codes = np.full(n_cells, 0 if batch_code is None else batch_code, dtype=np.int64)
        if library_size is None or missing or draws_labels:
            sizes = self._library_sizes() if library_size is None else np.ones(self.adata.n_obs)
            rows = self._draw_cells(batch_codes, label_codes, sizes > 0, rng)
            if library_size is None:
                library_size = sizes[rows].astype(np.float32)
            values |= {column: own[rows] for column, own in self._covariates_of_cells().items() if column in missing}
            if draws_labels:
                label_codes = self._codes_of_cells(REGISTRY_KEYS.LABELS_KEY)[rows]

        log_sizes = _as_column(np.log(library_size))
        given = {
            "library": log_sizes,
            "size_factor": log_sizes,  # the logarithm, as in `_get_generative_input`
            "batch_index": _as_column(batch_codes),
            "y": _as_column(np.maximum(label_codes, 0)),
            "cat_covs": _as_table([values[c] for c, categories in columns.items() if categories is not None]),
            "cont_covs": _as_table([values[c] for c, categories in columns.items() if categories is None]),
        }
        X = self._draw_counts(z, given, count_seed)
        obs = {}
        keys = self.registry[_SETUP_ARGS_KEY]
        if keys.get("batch_key") is not None:
            obs[keys["batch_key"]] = pd.Categorical.from_codes(batch_codes, batches)
        if keys.get("labels_key") is not None and (has_label_spins or module.dispersion == "gene-label"):
            obs[keys["labels_key"]] = pd.Categorical.from_codes(label_codes, labels)
        for column, categories in columns.items():
            own = values[column]
            obs[column] = own if categories is None else pd.Categorical.from_codes(own, categories)
        obs["library_size"] = library_size
        return AnnData(
            X=X,
            obs=pd.DataFrame(obs, index=[f"generated_{i}" for i in range(n_cells)]),
            var=pd.DataFrame(index=genes),
            obsm={"z": z.numpy()},
        )

    def _draw_latent(self, n_samples: int, label: int | None, sampler: str | Sampler, seed: int | None) -> Tensor:
        """Draws of the prior, or of its conditional distribution given a type; on the CPU."""
        prior = self._require_module().prior
        problem = prior.to_ising() if label is None else prior.clamped(label)
        if isinstance(sampler, str) and sampler == "gibbs":
            sampler = BlockGibbsSampler(burn_in=_BURN_IN)
        request = SamplingRequest(problem, n_samples, seed=split_seed(seed, 1)[0], purpose="generation")
        spins = build_prior_sampler(sampler).sample(request).spins
        spins = spins if label is None else prior.unclamped(spins, label)
        return spins[:, : prior.n_visible].to(prior.h).cpu()

    def _draw_counts(self, z: Tensor, given: dict[str, Tensor | None], seed: int) -> np.ndarray:
        """Counts of cells from their latent variables and the other inputs of the decoder; one row per cell."""
        module, device = self.module, self.device
        was_training = module.training
        module.eval()
        counts = []
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for rows in np.array_split(np.arange(len(z)), max(1, len(z) // 1024)):
                part = {name: values if values is None else values[rows].to(device) for name, values in given.items()}
                outputs = module.generative(z=module.z_encoder.z_transformation(z[rows].to(device)), **part)
                counts.append(outputs[MODULE_KEYS.PX_KEY].sample().cpu().numpy())
        module.train(was_training)
        return np.concatenate(counts)

    def _label_code(self, cell_type: Any, labels: Sequence[Any]) -> int | None:
        if cell_type is None:
            return None
        if isinstance(self.module.prior, LabeledPrior) or self.module.dispersion == "gene-label":
            return _code("cell_type", cell_type, labels)
        msg = (
            f"cell_type={cell_type!r} was given, but the prior of this {type(self).__name__} has no labels, so it "
            "draws cells of all types. Leave `cell_type` out, or add labels: "
            "`QBMSCANVI.from_qbmscvi_model(model, unlabeled_category, labels_key)`."
        )
        raise ValueError(msg)

    def _covariate_columns(self) -> dict[str, np.ndarray | None]:
        """Columns of the covariates in the order of the decoder's inputs, with their categories; None for numbers."""
        stats, columns = self.summary_stats, {}
        if stats.get("n_extra_categorical_covs", 0):
            state = self.get_state_registry(REGISTRY_KEYS.CAT_COVS_KEY)
            columns |= {column: state["mappings"][column] for column in state["field_keys"]}
        if stats.get("n_extra_continuous_covs", 0):
            columns |= dict.fromkeys(self.get_state_registry(REGISTRY_KEYS.CONT_COVS_KEY)["columns"])
        return columns

    def _require_cells(self, draws_sizes: bool, missing: Sequence[str], draws_labels: bool) -> None:
        """Raise if values have to be drawn from cells, but there are none."""
        wanted = {
            "library sizes": ("`library_size`", draws_sizes),
            f"the covariates {as_typed(missing)}": ("`covariates`", bool(missing)),
            "labels": ("`cell_type`", draws_labels),
        }
        wanted = {what: argument for what, (argument, is_drawn) in wanted.items() if is_drawn}
        if self.adata is None and wanted:
            msg = f"The model has no AnnData to draw {' and '.join(wanted)} from. Pass {' and '.join(wanted.values())}."
            raise ValueError(msg)

    def _draw_cells(
        self, batch_codes: np.ndarray, label_codes: np.ndarray, is_usable: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Rows of usable cells: of the same batch and type; or else of that type; or of that batch; or any."""
        own_batch, own_label = map(self._codes_of_cells, (REGISTRY_KEYS.BATCH_KEY, REGISTRY_KEYS.LABELS_KEY))
        rows = np.empty(len(batch_codes), dtype=np.int64)
        for batch, label in np.unique(np.stack([batch_codes, label_codes], axis=1), axis=0):
            is_batch, is_label = own_batch == batch, own_label == label
            choices = (is_usable & chosen for chosen in (is_batch & is_label, is_label, is_batch, True))
            candidates = next(np.flatnonzero(choice) for choice in choices if choice.any())
            is_wanted = (batch_codes == batch) & (label_codes == label)
            rows[is_wanted] = rng.choice(candidates, is_wanted.sum())
        return rows

    def _codes_of_cells(self, key: str) -> np.ndarray:
        return np.asarray(self.adata_manager.get_from_registry(key)).ravel().astype(np.int64)

    def _covariates_of_cells(self) -> dict[str, np.ndarray]:
        """Codes or numbers of the covariates of the model's cells."""
        columns = self._covariate_columns()
        values = {}
        for key, dtype in ((REGISTRY_KEYS.CAT_COVS_KEY, np.int64), (REGISTRY_KEYS.CONT_COVS_KEY, np.float32)):
            own = [column for column in columns if (columns[column] is None) == (dtype is np.float32)]
            if own:
                table = np.asarray(self.adata_manager.get_from_registry(key)).astype(dtype)
                values |= dict(zip(own, table.T, strict=True))
        return values

    def _library_sizes(self) -> np.ndarray:
        """Library sizes of the model's cells, as the decoder takes them."""
        key = REGISTRY_KEYS.X_KEY
        if self.module.use_size_factor_key:
            key = REGISTRY_KEYS.SIZE_FACTOR_KEY
        elif self.minified_data_type is not None:
            key = REGISTRY_KEYS.OBSERVED_LIB_SIZE
        return totals_per_cell(self.adata_manager.get_from_registry(key), self.adata.n_obs)


def build_prior_sampler(spec: str | Sampler) -> Sampler:
    """Build a sampler; raise if it finds ground states only."""
    sampler = build_sampler(spec)
    if sampler.traits.target == "ground_state":
        msg = (
            f"{sampler.name} finds ground states, but the prior needs samples of its Boltzmann distribution, or its "
            "couplings shrink to zero. Use sampler='gibbs' or another sampler whose `traits.target` is 'boltzmann' "
            "or 'approximate'."
        )
        raise ValueError(msg)
    return sampler


def _code(name: str, value: Any, categories: Sequence[Any]) -> int:
    """Number of a category."""
    if np.ndim(value) or value not in categories:
        msg = f"Unknown {name} {as_typed([value])}. Use one of {as_typed(categories)}."
        raise ValueError(msg)
    return categories.index(value)


def _as_covariates(
    covariates: Mapping[str, Any] | None, columns: Mapping[str, np.ndarray | None], n_cells: int
) -> dict[str, np.ndarray]:
    """Codes or numbers of the given covariates, each of shape ``(n_cells,)``."""
    if covariates is not None and not hasattr(covariates, "keys"):
        msg = (
            f"`covariates` is a {type(covariates).__name__}, but a dictionary from columns to values is needed, e.g. "
            "`covariates={'donor': 'A'}`."
        )
        raise TypeError(msg)
    given = {}
    for column, values in dict({} if covariates is None else covariates).items():
        if column not in columns:
            msg = f"`covariates` names {column!r}, which is no covariate of the model. {suggest(column, columns)}"
            raise ValueError(msg)
        values = np.asarray(values)
        if values.shape not in ((), (n_cells,)):
            msg = (
                f"The covariate {column!r} has shape {values.shape}; it must be one value for all cells or have shape "
                f"({n_cells},)."
            )
            raise ValueError(msg)
        categories = columns[column]
        read = _as_numbers(column, values) if categories is None else _as_codes(column, values, categories)
        given[column] = np.broadcast_to(read, (n_cells,))
    return given


def _as_numbers(column: str, values: np.ndarray) -> np.ndarray:
    try:
        numbers = values.astype(np.float32)
    except (TypeError, ValueError) as error:
        msg = f"The covariate {column!r} is continuous, but it has values that are no numbers. Pass numbers."
        raise TypeError(msg) from error
    if not np.isfinite(numbers).all():
        bad = values[~np.isfinite(numbers)].flat[0]
        msg = f"The covariate {column!r} has the value {bad}, but numbers must be finite. Leave it out to draw it."
        raise ValueError(msg)
    return numbers


def _as_codes(column: str, values: np.ndarray, categories: np.ndarray) -> np.ndarray:
    codes = pd.Index(categories).get_indexer(values.ravel()).reshape(values.shape)
    if (codes < 0).any():
        _code(f"value of the covariate {column!r}:", values[codes < 0].flat[0], list(categories))
    return codes.astype(np.int64)


def _as_library_size(library_size: Any, n_cells: int) -> np.ndarray:
    library_size = np.asarray(library_size, dtype=np.float32)
    if library_size.shape not in ((), (n_cells,)):
        msg = f"library_size has shape {library_size.shape}; it must be a number or have shape ({n_cells},)."
        raise ValueError(msg)
    if not (np.isfinite(library_size) & (library_size > 0)).all():
        msg = f"library_size must be positive and finite, got {library_size.min():g}. Leave it out to draw it."
        raise ValueError(msg)
    return np.broadcast_to(library_size, (n_cells,))


def _as_column(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values)[:, None]


def _as_table(columns: Sequence[np.ndarray]) -> Tensor | None:
    return torch.from_numpy(np.stack(columns, axis=1)) if columns else None


def split_seed(seed: int | None, n_seeds: int) -> list[int]:
    """Independent seeds from one; None draws from torch's global stream."""
    if seed is not None:
        require_integer("seed", seed, 0, "Leave it out for one from torch's global stream.")
    generator = None if seed is None else torch.Generator().manual_seed(int(seed))
    return torch.randint(2**31 - 1, (n_seeds,), generator=generator).tolist()
