"""Every public method and argument of SCVI, and what has become of it; this fails when scvi-tools adds one."""

from __future__ import annotations

import inspect
import subprocess
import sys

from scvi.model import SCVI

from qbmscvi import QBMSCVI
from qbmscvi.model._deferred import DeferredInitialization

# Method: inherited or overridden, and its arguments, of scvi-tools 1.4 and 1.5 together. All of them work but for those
# below: see test_model.py, test_training.py, test_likelihood.py, test_drop_in.py and, above all, scvi_suite.py.
SURFACE = {
    "__init__": (
        "overridden",
        "adata registry n_hidden n_latent n_layers dropout_rate dispersion gene_likelihood "
        "use_observed_lib_size latent_distribution",
    ),
    "convert_legacy_save": ("inherited", "dir_path output_dir_path overwrite prefix save_kwargs"),
    "data_registry": ("inherited", "registry_key"),
    "deregister_manager": ("inherited", "adata"),
    "differential_abundance": (
        "overridden",
        "adata sample_key batch_size num_cells_posterior dof adata_sub dataloader",
    ),
    "differential_expression": (
        "overridden",
        "adata groupby group1 group2 idx1 idx2 mode delta batch_size all_stats batch_correction batchid1 "
        "batchid2 fdr_target silent weights filter_outlier_cells importance_weighting_kwargs dataloader",
    ),
    "get_aggregated_posterior": ("overridden", "adata indices batch_size dof"),
    "get_anndata_manager": ("inherited", "adata required"),
    "get_batch_representation": ("inherited", "adata indices batch_size"),
    "get_elbo": ("overridden", "adata indices batch_size dataloader return_mean data_loader_kwargs"),
    "get_feature_correlation_matrix": (
        "inherited",
        "adata indices n_samples batch_size rna_size_factor transform_batch correlation_type silent",
    ),
    "get_from_registry": ("inherited", "adata registry_key"),
    "get_importance_weights": (
        "overridden",
        "adata indices qz px zs max_cells truncation n_mc_samples n_mc_samples_per_pass data_loader_kwargs",
    ),
    "get_latent_library_size": ("inherited", "adata indices give_mean batch_size dataloader data_loader_kwargs"),
    "get_latent_representation": (
        "overridden",
        "adata indices give_mean mc_samples batch_size return_dist dataloader data_loader_kwargs",
    ),
    "get_likelihood_parameters": (
        "overridden",
        "adata indices n_samples give_mean batch_size dataloader data_loader_kwargs",
    ),
    "get_marginal_ll": (
        "overridden",
        "adata indices n_mc_samples batch_size return_mean dataloader data_loader_kwargs",
    ),
    "get_normalized_expression": (
        "overridden",
        "adata indices transform_batch gene_list library_size n_samples n_samples_overall weights "
        "batch_size return_mean return_numpy silent dataloader data_loader_kwargs "
        "importance_weighting_kwargs",
    ),
    "get_reconstruction_error": ("inherited", "adata indices batch_size dataloader return_mean data_loader_kwargs"),
    "get_setup_arg": ("inherited", "setup_arg"),
    "get_state_registry": ("inherited", "registry_key"),
    "get_var_names": ("overridden", "legacy_mudata_format"),
    "load": ("inherited", "dir_path adata accelerator device prefix backup_url datamodule allowed_classes_names_list"),
    "load_query_data": (
        "overridden",
        "adata reference_model registry inplace_subset_query_vars accelerator device unfrozen "
        "freeze_dropout freeze_expression freeze_decoder_first_layer freeze_batchnorm_encoder "
        "freeze_batchnorm_decoder freeze_classifier transfer_batch datamodule",
    ),
    "load_registry": ("inherited", "dir_path prefix"),
    "minify_adata": ("overridden", "minified_data_type use_latent_qzm_key use_latent_qzv_key"),
    "posterior_predictive_sample": (
        "overridden",
        "adata indices transform_batch n_samples gene_list batch_size dataloader silent data_loader_kwargs",
    ),
    "prepare_query_anndata": ("inherited", "adata reference_model return_reference_var_names inplace"),
    "prepare_query_mudata": ("inherited", "mdata reference_model return_reference_var_names inplace"),
    "register_manager": ("inherited", "adata_manager"),
    "save": (
        "inherited",
        "dir_path prefix overwrite save_anndata save_kwargs legacy_mudata_format datamodule anndata_write_kwargs",
    ),
    "setup_annbatch": (
        "inherited",
        "collection_path paths batch_key labels_key sample_key unlabeled_category layer "
        "categorical_covariate_keys continuous_covariate_keys rebuild batch_size chunk_size "
        "preload_nchunks preload_to_gpu dataset_size shuffle var_subset merge adatas use_class_sampler "
        "class_sampler_key class_weights",
    ),
    "setup_anndata": (
        "overridden",
        "adata layer batch_key labels_key size_factor_key categorical_covariate_keys continuous_covariate_keys",
    ),
    "to_device": ("inherited", "device"),
    "train": (
        "overridden",
        "max_epochs accelerator devices train_size validation_size shuffle_set_split load_sparse_tensor "
        "batch_size early_stopping datasplitter_kwargs plan_config plan_kwargs datamodule trainer_config "
        "trainer_kwargs",
    ),
    "transfer_fields": ("inherited", "adata"),
    "update_setup_method_args": ("overridden", "setup_method_args"),
    "view_anndata_setup": ("inherited", "adata hide_state_registries"),
    "view_registry": ("overridden", "hide_state_registries"),
    "view_setup_args": ("inherited", "dir_path prefix"),
    "view_setup_method_args": ("inherited", ""),
}
EXCEPTIONS = {
    ("__init__", "n_latent"): "has another default: 64 spins",
    ("__init__", "latent_distribution"): "is refused unless 'normal' (test_bad_input.py)",
    ("get_latent_representation", "mc_samples"): "is ignored: every mean is closed form",
    ("get_importance_weights", "px"): "is ignored: each cell is decoded with its own covariates",
}


def methods_of(cls: type) -> set[str]:
    routines = {name for name, _ in inspect.getmembers(cls, inspect.isroutine) if not name.startswith("_")}
    return routines | {"__init__"}


def parameters_of(cls: type, method: str) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(getattr(cls, method)).parameters.items() if name != "self"}


def test_every_method_is_listed_as_what_it_is():
    """A new one: see what it assumes of the latent space, then list it."""
    own = QBMSCVI.__mro__[: QBMSCVI.__mro__.index(SCVI)] + (DeferredInitialization,)
    for method in methods_of(SCVI):
        status = "overridden" if any(method in vars(cls) for cls in own) else "inherited"
        assert SURFACE[method][0] == status, method


def mistakes(cls: type, method: str) -> list[str]:
    """Arguments of a method of scVI that are not listed, that a class does not take, or with another default."""
    listed = SURFACE[method][1].split()
    ours = parameters_of(cls, method)
    takes_others = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in ours.values())
    found = []
    for name, parameter in parameters_of(SCVI, method).items():
        if parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
            continue
        if name not in listed:
            found.append(f"{method}({name}=) is not listed")
        if name not in ours and not takes_others:
            found.append(f"{method}({name}=) is not taken")
        is_same = name not in ours or ours[name].default == parameter.default
        if not is_same and (method, name) != ("__init__", "n_latent"):
            found.append(f"{method}({name}=) has another default")
    return found


def test_every_argument_is_listed_and_taken():
    assert [found for method in methods_of(SCVI) for found in mistakes(QBMSCVI, method)] == []


def test_planted_mistakes_are_found(monkeypatch):
    class Planted(SCVI):
        def to_device(self, gpu): ...

        def get_elbo(self, adata=None, indices=None, batch_size=99, **kwargs): ...

    monkeypatch.setitem(
        SURFACE, "get_elbo", ("inherited", "indices batch_size dataloader return_mean data_loader_kwargs")
    )
    assert mistakes(Planted, "to_device") == ["to_device(device=) is not taken"]
    assert mistakes(Planted, "get_elbo") == [
        "get_elbo(adata=) is not listed",
        "get_elbo(batch_size=) has another default",
    ]


def test_exceptions_are_arguments_that_exist():
    for method, argument in EXCEPTIONS:
        assert argument in parameters_of(SCVI, method)


def test_importing_takes_no_detour_over_what_only_some_need():
    """It would double the time that the import adds to scvi's, whose 1.5 imports scanpy itself."""
    code = (
        "import sys, scvi; before = set(sys.modules); import qbmscvi; "
        "print(sorted({'dimod', 'dwave.samplers', 'networkx', 'scanpy'} & set(sys.modules) - before))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"
