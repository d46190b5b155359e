"""Checks of an AnnData before a model is set up with it or computes on it.

scvi-tools crashes on some of these inputs and computes silently on others. Each check raises before anything is
computed or changed. :mod:`qbmscvi.model._counts` checks counts.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scvi import REGISTRY_KEYS

from qbmscvi.exceptions import MissingColumnError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_N_SHOWN = 3
_HOW_TO_MINIFY = (
    "Store both arrays of `model.get_latent_representation(return_dist=True)`, mean and variance of all spins, in "
    "`adata.obsm['X_latent_qzm']` and `adata.obsm['X_latent_qzv']`."
)
_PREPARE = "`QBMSCVI.prepare_query_anndata(adata, model)` (a model, or the folder of a saved one)"


def as_typed(values: Iterable[Any], n_shown: int | None = None) -> str:
    """Values as a user would type them, e.g. ``'a', 'b'``; ``n_shown`` limits how many."""
    values = [value.item() if isinstance(value, np.number | np.bool_ | np.str_) else value for value in values]
    shown = ", ".join(map(repr, values[:n_shown]))
    return f"{shown}, ..." if n_shown is not None and len(values) > n_shown else shown


def suggest(name: Any, known: Iterable[Any]) -> str:
    """Sentence with the closest known value and all known values."""
    known = list(known)
    close = get_close_matches(str(name), list(map(str, known)), n=1)
    meant = f"Did you mean {close[0]!r}? " if close else ""
    return f"{meant}There are: {as_typed(known, 20) or 'none'}."


def require_anndata(adata: Any) -> None:
    """Raise unless it is an AnnData."""
    if not isinstance(adata, AnnData) and not hasattr(adata, "obs_names"):  # an AnnCollection has them, too
        msg = (
            f"`adata` is a {type(adata).__name__}, but an AnnData is needed. Read a file with "
            "`scanpy.read_h5ad(path)`, or wrap a table of cells by genes: `anndata.AnnData(table)`."
        )
        raise TypeError(msg)


def as_column_list(argument: str, keys: Any) -> list[str] | None:
    """Names of columns as a list, or None if there are none; raise for a single name or repeated names."""
    if keys is None:
        return None
    if not isinstance(keys, list | tuple | np.ndarray | pd.Index | pd.Series):
        remedy = f"Write {argument}=[{keys!r}]." if isinstance(keys, str) else "Pass a list of names."
        msg = (
            f"{argument}={keys!r} is a {type(keys).__name__}, but a list of columns of `adata.obs` is needed. {remedy}"
        )
        raise TypeError(msg)
    keys = [key.item() if isinstance(key, np.generic) else key for key in keys]
    repeated = [key for key in keys if keys.count(key) > 1]
    if repeated:
        msg = f"{argument}={keys!r} names the column {repeated[0]!r} more than once. Name each once."
        raise ValueError(msg)
    return keys or None


def check_matrix(adata: AnnData, layer: str | None) -> None:
    """Raise unless scvi-tools can read the matrix of counts."""
    layers = adata.layers.keys()  # those of an AnnCollection are no mapping
    if layer is not None and layer not in layers:
        msg = f"layer={layer!r} is no layer of the data. {suggest(layer, layers)} Leave it out for `adata.X`."
        raise ValueError(msg)
    X = getattr(adata, "X", None) if layer is None else adata.layers[layer]
    name = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    if X is None:
        msg = f"The data have no `X`. Name the layer with raw counts: `layer=...`. {suggest(layer, layers)}"
        raise ValueError(msg)
    if 0 in adata.shape:
        msg = f"The data have {adata.n_obs} cells and {adata.n_vars} genes, but one of each is needed at least."
        raise ValueError(msg)
    is_sparse_array = sparse.issparse(X) and not sparse.isspmatrix(X)
    remedy = None
    if is_sparse_array:
        remedy = f"{name} = scipy.sparse.csr_matrix({name})"
    elif sparse.issparse(X) and X.format not in ("csr", "csc"):
        remedy = f"{name} = {name}.tocsr()"
    elif hasattr(X, "compute") and hasattr(X, "dask"):
        remedy = f"{name} = {name}.compute()"
    if remedy is not None:
        kind = f"{X.format}_array" if is_sparse_array else type(X).__name__
        msg = f"`{name}` is a {type(X).__module__.split('.')[0]} {kind}, which scvi-tools cannot read. Use `{remedy}`."
        raise TypeError(msg)
    dtype = getattr(X, "dtype", None)
    if dtype is not None and np.dtype(dtype).kind not in "fiub":
        msg = f"`{name}` has the type {dtype}, but numbers are needed. Use `{name} = {name}.astype('float32')`."
        raise TypeError(msg)


def get_column(obs: pd.DataFrame, argument: str, key: Any) -> pd.Series:
    """Column of ``adata.obs`` that an argument names. Raise unless there is exactly one."""
    if isinstance(key, list | tuple | set | np.ndarray | pd.Series | pd.Index):
        remedy = f"Write {argument}={next(iter(key))!r}." if len(key) == 1 else ""
        msg = f"{argument} takes the name of one column of `adata.obs`, but it is a {type(key).__name__}. {remedy}"
        raise TypeError(msg.rstrip())
    if key not in obs:
        msg = f"{argument}={key!r} is no column of `adata.obs`. {suggest(key, obs)}"
        raise MissingColumnError(msg)
    column = obs[key]
    if isinstance(column, pd.DataFrame):
        msg = f"{argument}={key!r} names {column.shape[1]} columns of `adata.obs`. Rename or remove all but one."
        raise ValueError(msg)
    return column


def check_categories(
    obs: pd.DataFrame, argument: str, key: str, *, filler: str = "unknown", may_miss: bool = False
) -> None:
    """Raise unless each cell has a category, and all categories have one type.

    Parameters
    ----------
    obs
        Table of the cells, ``adata.obs``.
    argument, key
        Argument that names the column, and the name.
    filler
        Value that the message suggests for missing entries.
    may_miss
        Whether cells may have no value.
    """
    column = get_column(obs, argument, key)
    where = f"`adata.obs[{key!r}]` ({argument})"
    text = f"adata.obs[{key!r}] = adata.obs[{key!r}].astype(str)"
    missing = column.isna().to_numpy()
    if missing.all() and not may_miss:
        msg = (
            f"{where} has no value for any of {len(column)} cells, but each needs one. Fill it, or name another column."
        )
        raise ValueError(msg)
    if missing.any() and not may_miss:
        first = str(obs.index[np.flatnonzero(missing)[0]])
        msg = (
            f"{where} has no value for {missing.sum()} of {len(column)} cells, the first of them {first!r}. Fill it: "
            f"`adata.obs[{key!r}] = adata.obs[{key!r}].astype(object).fillna({filler!r}).astype(str)`; or leave these "
            f"cells out: `adata = adata[adata.obs[{key!r}].notna()].copy()`."
        )
        raise ValueError(msg)
    values = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column[~missing]
    if values.dtype == object:
        types = sorted({_kind(value) for value in values})
        if len(types) > 1:
            msg = f"{where} has values of the types {', '.join(types)}; one is needed. Make them text: `{text}`."
            raise TypeError(msg)


def _kind(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "bool"
    if isinstance(value, int | float | np.number):
        return "number"
    return "str" if isinstance(value, str) else type(value).__name__


def check_known_categories(obs: pd.DataFrame, argument: str, key: str, known: Sequence[Any]) -> None:
    """Raise unless the model was trained with each category."""
    unknown = [value for value in pd.unique(get_column(obs, argument, key)) if value not in set(known)]
    if unknown:
        msg = (
            f"`adata.obs[{key!r}]` has {as_typed(unknown, _N_SHOWN)}, which the model was not trained with. It knows: "
            f"{as_typed(known, 20)}. Rename the categories, or map new ones with `load_query_data` and train."
        )
        raise ValueError(msg)


def check_groups(adata: AnnData, groupby: str, group1: Any, group2: Any) -> list:
    """Return the groups to compare; raise unless they and their references have cells.

    ``group1`` are groups, each in a separate comparison; None means all that have cells. ``group2`` is the reference;
    None means all other cells.
    """
    column = get_column(adata.obs, "groupby", groupby)
    present = list(column.astype("category").cat.remove_unused_categories().cat.categories)
    chosen = present if group1 is None else [group1] if isinstance(group1, str) or np.isscalar(group1) else list(group1)
    for name, group in [*(("group1", group) for group in chosen), *([] if group2 is None else [("group2", group2)])]:
        if group not in present:
            msg = f"No cell has {groupby} = {as_typed([group])}, the value of `{name}`. {suggest(group, present)}"
            raise ValueError(msg)
    if not chosen or (group2 is None and len(present) < 2 and not column.isna().any()):
        msg = (
            f"`adata.obs[{groupby!r}]` has the groups {as_typed(present) or 'none'}, but two are needed to compare. "
            "Choose another `groupby`, or cells with `idx1` and `idx2`."
        )
        raise ValueError(msg)
    return chosen


def check_numeric(values: pd.Series | pd.DataFrame, argument: str) -> None:
    """Raise unless each column of ``adata.obs`` holds numbers."""
    for key, column in pd.DataFrame(values).items():
        if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_complex_dtype(column):
            msg = (
                f"`adata.obs[{key!r}]`, named by `{argument}`, has the type {column.dtype}, but numbers are needed. "
                f"Convert it, `adata.obs[{key!r}] = pandas.to_numeric(adata.obs[{key!r}].astype(str))`, or use "
                "`categorical_covariate_keys` for categories."
            )
            raise TypeError(msg)


def check_finite(
    adata: AnnData, values: pd.Series | pd.DataFrame, argument: str, *, must_be_positive: bool = False
) -> None:
    """Raise unless each cell has a finite number, or a positive one, in each column of ``values``."""
    check_numeric(values, argument)
    for key, column in pd.DataFrame(values).items():
        numbers = column.to_numpy(dtype=np.float64, na_value=np.nan)
        is_bad, what = ~np.isfinite(numbers), "is not finite"
        if must_be_positive and not is_bad.any():
            is_bad, what = numbers <= 0, "is not positive"
        if is_bad.any():
            first = np.flatnonzero(is_bad)[0]
            msg = (
                f"`adata.obs[{key!r}]`, named by `{argument}`, {what} for {is_bad.sum()} of {len(numbers)} cells: cell "
                f"{str(adata.obs_names[first])!r} (row {first}) has {numbers[first]}. Correct these values, or leave "
                "the cells out: `adata = adata[mask].copy()`."
            )
            raise ValueError(msg)


def check_genes(adata: AnnData, names: Sequence[str]) -> None:
    """Raise unless genes and their order are the model's."""
    own, names = pd.Index(adata.var_names.astype(str)), pd.Index(np.asarray(names).astype(str))
    if own.equals(names):
        return
    if len(own) == len(names) and sorted(own) == sorted(names):
        msg = (
            f"The genes are those of the model, but in another order: the first are {as_typed(own, _N_SHOWN)} in place "
            f"of {as_typed(names, _N_SHOWN)}. Put them in order: `adata = adata[:, model.get_var_names()].copy()`, or "
            f"{_PREPARE}."
        )
        raise ValueError(msg)
    missing = names.difference(own, sort=False)
    msg = (
        f"The data have {len(own)} genes, of which {own.isin(names).sum()} are among the {len(names)} of the model; "
        f"{len(missing)} of these are missing{f', such as {as_typed(missing, _N_SHOWN)}' if len(missing) else ''}. "
        f"Choose the same genes, and fill in missing ones with zeros: {_PREPARE}."
    )
    raise ValueError(msg)


def check_setup(
    adata: AnnData,
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    labels_key: str | None = None,
    unlabeled_category: str | None = None,
    size_factor_key: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    source_registry: Mapping[str, Any] | None = None,
    extend_categories: bool = False,
    allow_missing_labels: bool = False,
    **others: Any,
) -> None:
    """Raise unless an AnnData can be set up with these arguments of ``setup_anndata``.

    Parameters
    ----------
    unlabeled_category
        Label of cells of unknown type; None for models without it.
    source_registry
        Registry of the model that will compute on the data; None for new data.
    extend_categories
        Whether categories may be unknown to this model.
    allow_missing_labels
        Whether labels may be missing; ``unlabeled_category`` replaces them.
    others
        Arguments that scvi-tools checks.
    """
    require_anndata(adata)
    check_matrix(adata, layer)
    fields = {} if source_registry is None else source_registry["field_registries"]
    if source_registry is not None:
        check_genes(adata, fields[REGISTRY_KEYS.X_KEY]["state_registry"]["column_names"])
    if allow_missing_labels and unlabeled_category is not None and labels_key not in adata.obs:
        labels_key = None
    elif source_registry is not None and labels_key is not None and labels_key not in adata.obs:
        msg = f"labels_key={labels_key!r} is no column of `adata.obs`. "
        fill = "unknown" if unlabeled_category is None else unlabeled_category
        msg += f"If the labels are not known, write `adata.obs[{labels_key!r}] = {fill!r}`."
        raise MissingColumnError(msg)
    for argument, key, registry_key in (
        ("batch_key", batch_key, REGISTRY_KEYS.BATCH_KEY),
        ("labels_key", labels_key, REGISTRY_KEYS.LABELS_KEY),
    ):
        if key is None:
            continue
        is_label = argument == "labels_key" and unlabeled_category is not None
        check_categories(adata.obs, argument, key, filler=unlabeled_category if is_label else "unknown")
        if source_registry is not None and not extend_categories:
            known = fields[registry_key]["state_registry"]["categorical_mapping"]
            check_known_categories(adata.obs, argument, key, known)
    argument = "categorical_covariate_keys"
    known = fields.get(REGISTRY_KEYS.CAT_COVS_KEY, {}).get("state_registry", {}).get("mappings", {})
    for key in categorical_covariate_keys or ():
        check_categories(adata.obs, argument, key)
        if source_registry is not None and not extend_categories:
            check_known_categories(adata.obs, argument, key, known[key])
    for key in continuous_covariate_keys or ():
        check_numeric(get_column(adata.obs, "continuous_covariate_keys", key), "continuous_covariate_keys")
    if size_factor_key is not None:
        check_numeric(get_column(adata.obs, "size_factor_key", size_factor_key), "size_factor_key")


def check_moments(adata: AnnData, mean_key: str, variance_key: str, n_spins: int) -> None:
    """Raise unless two arrays of ``adata.obsm`` hold mean and variance of each cell's posterior."""
    moments = []
    for name, key in (("mean", mean_key), ("variance", variance_key)):
        if key not in adata.obsm:
            msg = f"`adata.obsm` has no {key!r}. {_HOW_TO_MINIFY}"
            raise ValueError(msg)
        values = np.asarray(adata.obsm[key])
        if values.ndim != 2 or values.shape[1] != n_spins:
            msg = f"The {name} of the posterior has shape {values.shape}, not (n_cells, {n_spins}). {_HOW_TO_MINIFY}"
            raise ValueError(msg)
        moments.append(values)
    mean, variance = moments
    # Rounding of single precision is 1e-7; logits or standard deviations deviate by orders of magnitude more.
    is_consistent = (
        np.isfinite(mean).all() and (variance >= 0).all() and np.allclose(1.0 - mean**2, variance, atol=1e-5)
    )
    if not is_consistent:
        msg = (
            f"`adata.obsm[{mean_key!r}]` and `adata.obsm[{variance_key!r}]` are not mean and variance of spins: means "
            f"are from -1 to 1, and each variance is 1 - mean^2. {_HOW_TO_MINIFY}"
        )
        raise ValueError(msg)
