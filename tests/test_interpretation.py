"""Spin programs against direct decoding and planted programs, prior modes against enumeration, confounders."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy.stats import spearmanr
from tables import over

from qbmscvi import QBMSCANVI, QBMSCVI
from qbmscvi.boltzmann.enumeration import all_states
from qbmscvi.datasets import synthetic_counts
from qbmscvi.diagnostics import partial_spearman

if TYPE_CHECKING:
    from anndata import AnnData


@pytest.fixture(scope="module")
def adata() -> AnnData:
    return synthetic_counts(n_cells=600, n_genes=120, mean_depth=300.0)


def trained(adata: AnnData, max_epochs: int = 1, **arguments) -> QBMSCVI:
    scvi.settings.seed = 0
    adata = adata.copy()
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    model = QBMSCVI(adata, **{"n_latent": 12, "gene_likelihood": "nb", **arguments})
    model.train(max_epochs=max_epochs, enable_progress_bar=False)
    return model


@pytest.fixture(scope="module")
def model(adata: AnnData) -> QBMSCVI:
    return trained(adata, max_epochs=30)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({}, id="spins"),
        pytest.param({"gene_likelihood": "zinb"}, id="zinb"),
        pytest.param({"gene_likelihood": "poisson"}, id="poisson"),
    ],
)
def test_effect_of_a_flip_is_the_difference_of_two_direct_decodings(adata: AnnData, arguments: dict) -> None:
    model = trained(adata, **arguments)
    cell, spin = 17, 3
    table = model.get_spin_programs(indices=[cell], spins=[spin], seed=5).set_index("gene")
    (tensors,) = model._make_data_loader(model.adata, indices=[cell])
    with torch.inference_mode():
        outputs = model.module.inference(**model.module._get_inference_input(tensors))
        torch.manual_seed(5)
        z = outputs["qz"].sample()
        scales = []
        for value in (1.0, -1.0):
            flipped = z.clone()
            flipped[:, spin] = value
            decoded = model.module.decoder("gene", flipped, outputs["library"], tensors["batch"], tensors["labels"])
            scales.append(decoded[0].squeeze(0).numpy())
    expected = pd.Series(np.log2(scales[0] / scales[1]), model.get_var_names())
    assert expected.abs().max() > 1e-3
    np.testing.assert_allclose(table["log2_fold_change"].reindex(expected.index), expected, atol=2e-6)


def test_effects_are_means_over_cells_whatever_is_decoded_at_once(model: QBMSCVI, monkeypatch) -> None:
    whole = model.get_spin_programs(indices=range(6), seed=1)
    monkeypatch.setattr("qbmscvi.model._interpretation._ENTRIES_PER_PASS", 1)
    parts = model.get_spin_programs(indices=range(6), seed=1)
    pd.testing.assert_frame_equal(whole, parts, atol=1e-6)
    other_draw = model.get_spin_programs(indices=range(6), seed=2)
    assert not np.allclose(whole["log2_fold_change"], other_draw["log2_fold_change"])


def test_programs_are_ranked_by_magnitude_and_cut(model: QBMSCVI) -> None:
    whole, cut = model.get_spin_programs(), model.get_spin_programs(n_genes=5, spins=[4, 2])
    assert len(whole) == 12 * 120
    assert list(whole["spin"].unique()) == list(range(12))
    assert list(cut["spin"]) == [4] * 5 + [2] * 5
    assert list(cut["rank"]) == [1, 2, 3, 4, 5] * 2
    for _, rows in whole.groupby("spin"):
        assert (np.diff(rows["log2_fold_change"].abs()) <= 0).all()
        assert sorted(rows["gene"]) == sorted(model.get_var_names())
    pd.testing.assert_frame_equal(
        cut[cut["spin"] == 2].reset_index(drop=True),
        whole[(whole["spin"] == 2) & (whole["rank"] <= 5)].reset_index(drop=True),
    )


def share_between(values: np.ndarray, groups: np.ndarray) -> float:
    """Share of the variance of values that lies between groups."""
    means = pd.Series(values).groupby(groups).transform("mean").to_numpy()
    return float(means.var() / values.var())


def test_spins_move_planted_programs(adata: AnnData, model: QBMSCVI) -> None:
    """Genes of one program move together: more of the variance lies between programs than in random order.

    One-sided permutation test over 199 orders, the mean over spins at the 1/200 level.
    """
    table = model.get_spin_programs().pivot(index="gene", columns="spin", values="log2_fold_change")
    program = adata.var["program"].astype(str).reindex(table.index).to_numpy()
    rng = np.random.default_rng(0)

    def statistic(groups: np.ndarray) -> float:
        return float(np.mean([share_between(table[spin].to_numpy(), groups) for spin in table]))

    null = [statistic(rng.permutation(program)) for _ in range(199)]
    assert statistic(program) > max(null)
    assert not statistic(rng.permutation(program)) > max(null)  # the gate holds a planted fault back


def test_reading_programs_and_modes_leaves_model_and_streams_as_they_were(model: QBMSCVI) -> None:
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    state = torch.get_rng_state()
    model.get_spin_programs(spins=[0], n_genes=1)
    model.get_prior_modes()
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.module.training
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_modes_are_the_local_minima_that_prior_and_cells_descend_into(model: QBMSCVI) -> None:
    modes = model.get_prior_modes(label_key="cell_type")
    problem = model.get_ising_model().to("cpu", torch.float64)
    # 2**24 states would take a minute: given the 12 visible spins, each hidden spin stands against its own field.
    matrix = torch.zeros(problem.n_spins, problem.n_spins, dtype=torch.float64)
    matrix[tuple(problem.graph.edges.T)] = problem.J
    visible, n = all_states(12).double(), 12
    assert not matrix[:n, :n].any()
    assert not matrix[n:, :].any()
    fields = problem.h[n:] + visible @ matrix[:n, n:]  # (2**12, n_hidden_spins)
    lowest = float((problem.offset + visible @ problem.h[:n] - fields.abs().sum(1)).min())
    table = modes.table
    assert (np.diff(table["energy"]) >= 0).all()
    assert table["prior_share"].sum() == pytest.approx(1.0)
    assert table["cell_share"].sum() == pytest.approx(1.0)
    assert len(np.unique(modes.spins, axis=0)) == len(modes.spins) == len(table) >= 2
    spins = torch.from_numpy(modes.spins).double()
    energies = problem.energy(spins)
    np.testing.assert_allclose(energies, table["energy"], rtol=0, atol=1e-6)
    for flip in 1.0 - 2.0 * torch.eye(problem.n_spins, dtype=torch.float64):
        assert (problem.energy(spins * flip) >= energies - 1e-9).all()
    assert lowest == pytest.approx(table["energy"].iloc[0], abs=1e-6)  # the lowest is found
    np.testing.assert_array_equal(
        np.bincount(modes.mode_of_cell, minlength=len(table)) / len(modes.mode_of_cell), table["cell_share"]
    )
    labels = model.adata.obs["cell_type"].to_numpy()
    for row, mode in table.iterrows():
        inside = pd.Series(labels[modes.mode_of_cell == row]).value_counts()
        assert (mode["label"] is None) == (len(inside) == 0)
        if len(inside):
            assert inside[mode["label"]] == inside.max()
            assert mode["label_share"] == pytest.approx(inside.max() / inside.sum())


def test_a_cell_descends_as_its_most_probable_spins_do(model: QBMSCVI) -> None:
    """Steepest descent by hand, one flip at a time."""
    modes = model.get_prior_modes(indices=range(40))
    problem = model.get_ising_model().to("cpu", torch.float64)
    bits = model.get_latent_representation(indices=range(40), representation="bits")
    for visible, mode in zip(torch.from_numpy(2.0 * bits - 1.0), modes.mode_of_cell, strict=True):
        # Hidden spins start at their most probable state: against their fields.
        fields = problem.h[len(visible) :] + problem.couplings()[len(visible) :, : len(visible)] @ visible.double()
        spins = torch.cat([visible.double(), -fields.sign()])
        while True:
            neighbors = spins * (1.0 - 2.0 * torch.eye(len(spins), dtype=torch.float64))
            gains = problem.energy(neighbors) - problem.energy(spins[None])
            if gains.min() >= 0:
                break
            spins = neighbors[gains.argmin()]
        np.testing.assert_array_equal(spins.numpy(), modes.spins[mode])


def test_modes_of_spins_without_couplings_are_one(adata: AnnData) -> None:
    model = trained(adata, prior_graph="independent", max_epochs=3)
    modes = model.get_prior_modes()
    assert len(modes.table) == 1
    np.testing.assert_array_equal(modes.spins[0], -np.sign(model.get_ising_model().h.numpy()))


def test_modes_of_an_annotation_model_hold_its_label_spins(adata: AnnData) -> None:
    adata = adata.copy()
    adata.obs["label"] = adata.obs["cell_type"].astype(str).where(adata.obs["batch"] == "batch_0", "Unknown")
    QBMSCANVI.setup_anndata(adata, "label", "Unknown", batch_key="batch")
    model = QBMSCANVI(adata, n_latent=6)
    model.train(max_epochs=1, enable_progress_bar=False)
    n_hidden = model.module.prior.n_hidden
    assert model.get_prior_modes().spins.shape[1] == 6 + n_hidden + 6
    assert model.get_spin_programs()["spin"].nunique() == 6
    (qz,) = model._get_posteriors(None, range(5), None, None)
    types = model._most_probable_spins(qz)[:, 6 + n_hidden :]
    assert (types.sum(1) == 1 - 5).all()  # one up, five down
    names = model.adata_manager.get_state_registry("labels").categorical_mapping
    assert [names[i] for i in types.argmax(1)] == list(model.predict(indices=range(5)))


def test_partial_rank_correlation_agrees_with_the_closed_form_for_one_confounder() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=80)
    x, y = z + rng.normal(size=80), 0.5 * z + rng.normal(size=80)
    xy, xz, yz = spearmanr(x, y)[0], spearmanr(x, z)[0], spearmanr(y, z)[0]
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert partial_spearman(x, y, z).value == pytest.approx(expected, abs=1e-12)
    assert partial_spearman(x, y, np.zeros(80)).value == pytest.approx(xy, abs=1e-12)
    assert partial_spearman(x, y, np.exp(z)).value == pytest.approx(expected, abs=1e-12)  # ranks only


def test_partial_rank_correlation_finds_what_is_planted_and_nothing_else() -> None:
    """p-values of no effect beyond two confounders are uniform: Kolmogorov-Smirnov at 1e-3, 300 repetitions."""
    from scipy.stats import kstest

    rng = np.random.default_rng(1)
    null, planted, blind = [], [], []
    for _ in range(300):
        z = rng.normal(size=(60, 2))
        x, y = z.sum(1) + rng.normal(size=60), z.sum(1) + rng.normal(size=60)
        null.append(partial_spearman(x, y, z).p_value)
        blind.append(partial_spearman(x, y, z[:, 0]).p_value)
        planted.append(partial_spearman(x, y + x, z).p_value)
    assert kstest(null, "uniform").pvalue > 1e-3
    assert kstest(blind, "uniform").pvalue < 1e-3  # a confounder left out is noticed by this gate
    assert np.mean(np.array(planted) < 0.01) > 0.9


def test_a_score_that_is_its_confounder_has_no_partial_correlation() -> None:
    x = np.arange(20.0)
    assert np.isnan(partial_spearman(x, x[::-1] ** 3 + (x % 3), x).value)


def partial(*shapes: tuple[int, ...]):
    return lambda model: partial_spearman(*(np.ones(shape) for shape in shapes))


@over(
    ("call", "message"),
    [
        pytest.param(lambda m: m.get_spin_programs(spins=[12]), r"`spins` is \[12\].* 0 to 11", id="spin"),
        pytest.param(lambda m: m.get_spin_programs(spins=[1, 1]), "different numbers", id="twice"),
        pytest.param(lambda m: m.get_spin_programs(indices=[]), "names no cell", id="no-cell"),
        pytest.param(lambda m: m.get_spin_programs(max_cells=0), "max_cells", id="max-cells"),
        pytest.param(lambda m: m.get_spin_programs(n_genes=0), "n_genes", id="n-genes"),
        pytest.param(lambda m: m.get_prior_modes(label_key="typ"), "'typ'.*batch", id="label-key"),
        pytest.param(lambda m: m.get_prior_modes(n_samples=0), "n_samples", id="n-samples"),
        pytest.param(partial((5,), (4,), (5, 1)), r"shapes are \[\(5,\), \(4,\), \(5, 1\)\]", id="lengths"),
        pytest.param(partial((4,), (4,), (4, 2)), "4 cells.*2 confounders.*5", id="few"),
        pytest.param(lambda m: partial_spearman([np.nan] * 9, range(9), range(9)), "NaN or infinite", id="nan"),
    ],
)
def test_bad_arguments_are_refused(model: QBMSCVI, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model)


def test_fold_changes_of_a_normal_likelihood_are_refused(adata: AnnData) -> None:
    normal = adata.copy()
    normal.X = np.log1p(normal.X.toarray())
    with pytest.raises(ValueError, match="gene_likelihood='normal'"):
        trained(normal, gene_likelihood="normal").get_spin_programs()
