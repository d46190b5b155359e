"""Cell types as spins of the prior: numbers by enumeration, then annotation as a user would do it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from oracles import energy_table, set_exact_moments, state_table
from torch.distributions import kl_divergence

from qbmscvi import QBMSCANVI, QBMSCVI
from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.labeled_prior import LabeledPrior
from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.boltzmann.prior import BoltzmannPrior
from qbmscvi.datasets import synthetic_counts
from qbmscvi.samplers import ExactSampler, SamplingRequest

N_LABELS = 3


@pytest.fixture
def prior() -> LabeledPrior:
    """Five latent spins (a 2 x 3 bipartite graph), three labels, every parameter away from zero."""
    torch.manual_seed(3)
    prior = LabeledPrior(graphs.bipartite(2, 3), N_LABELS, n_chains=16).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(0.6 * torch.randn_like(parameter))
    return prior


def labels_up(y: int) -> np.ndarray:
    return np.where(np.arange(N_LABELS) == y, 1.0, -1.0)


def joint_energy(prior: LabeledPrior, s: np.ndarray, y: int) -> float:
    """E(s, t) of one state and type, from the definition."""
    spins = np.concatenate([s, labels_up(y)])
    h, J = (p.detach().numpy() for p in (prior.h, prior.J))
    return h @ spins + sum(value * spins[i] * spins[j] for (i, j), value in zip(prior.graph.edges, J, strict=True))


def joint_energies(prior, states) -> np.ndarray:
    """Shape ``(n_states, n_labels)``."""
    return np.array([[joint_energy(prior, s, y) for y in range(N_LABELS)] for s in states])


STATES = state_table(5).astype(float)


def test_classifier_is_the_conditional_of_the_joint_distribution(prior):
    expected = torch.softmax(torch.from_numpy(-joint_energies(prior, STATES)), dim=1)
    torch.testing.assert_close(torch.softmax(prior.label_logits(torch.from_numpy(STATES)), dim=1), expected)


def test_energy_sums_the_types_out(prior):
    expected = -np.logaddexp.reduce(-joint_energies(prior, STATES), axis=1)
    np.testing.assert_allclose(prior.energy(torch.from_numpy(STATES)).detach().numpy(), expected, atol=1e-12)


def test_ising_problem_is_the_joint_distribution(prior):
    energies = energy_table(prior.to_ising()).reshape(len(STATES), -1)  # label spins change fastest
    of_types = [int((state_table(N_LABELS) == labels_up(y)).all(1).argmax()) for y in range(N_LABELS)]
    np.testing.assert_allclose(energies[:, of_types], joint_energies(prior, STATES), atol=1e-12)


def a_posterior() -> FactorialPosterior:
    return FactorialPosterior(1.5 * torch.randn(1, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64))


def exact_terms(prior: LabeledPrior, q: FactorialPosterior) -> tuple[np.ndarray, float, np.ndarray]:
    """``E(s, t_y)`` of each state and y, ``H(q)`` and the probability of each state, all from sums over states."""
    up = torch.sigmoid(q.logits[0]).numpy()
    distribution = np.prod(np.where(STATES > 0, up, 1 - up), axis=1)
    return joint_energies(prior, STATES), -(distribution * np.log(distribution)).sum(), distribution


def test_term_of_a_labeled_cell_is_exact(prior):
    q = a_posterior()
    energies, entropy, distribution = exact_terms(prior, q)
    for y in range(N_LABELS):
        value = kl_divergence(q, prior.distribution(torch.tensor([y]))).sum()
        expected = distribution @ energies[:, y] - entropy + float(prior.log_z)
        assert float(value.detach()) == pytest.approx(expected, abs=1e-10)


def test_term_of_an_unlabeled_cell_has_the_best_factorial_type(prior):
    """Minimal over q(y), found here by its stationarity, and no lower than with q(y | s) for every s."""
    q = a_posterior()
    energies, entropy, distribution = exact_terms(prior, q)
    mean = distribution @ energies
    choice = np.exp(-mean) / np.exp(-mean).sum()
    expected = choice @ (mean + np.log(choice)) - entropy + float(prior.log_z)
    for labels in (None, torch.tensor([N_LABELS]), torch.tensor([-1])):
        value = float(kl_divergence(q, prior.distribution(labels)).sum().detach())
        assert value == pytest.approx(expected, abs=1e-10)
    others = np.random.default_rng(0).dirichlet(np.ones(N_LABELS), 50)
    assert (others @ mean + (others * np.log(others)).sum(1) - entropy + float(prior.log_z) > expected).all()
    exact = distribution @ -np.logaddexp.reduce(-energies, axis=1) - entropy + float(prior.log_z)
    assert exact < expected


def test_gradients_of_the_joint_distribution_are_those_of_enumeration(prior):
    """Of -log p(z, y) with exact moments, against autograd through the sum over all states."""
    states = torch.from_numpy(state_table(8)).double()
    set_exact_moments(prior)
    q = a_posterior()
    kl_divergence(q, prior.distribution(torch.tensor([1]))).sum().backward()
    learned = dict(prior.named_parameters())
    found = {name: parameter.grad.clone() for name, parameter in learned.items()}
    prior.zero_grad()
    i, j = torch.from_numpy(prior.graph.edges.T.copy())
    log_z = torch.logsumexp(-states @ prior.h - (states[:, i] * states[:, j]) @ prior.J, 0)
    prior.expected_energy(q, torch.tensor([1])).sum().add(log_z).backward()
    for name, parameter in learned.items():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)
    assert all(bool(gradient.abs().sum() > 0) for gradient in found.values())


def test_labels_added_to_a_prior_change_nothing_but_what_they_add():
    torch.manual_seed(0)
    before = BoltzmannPrior(graphs.bipartite(2, 3), n_chains=2000)
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.copy_(0.6 * torch.randn_like(parameter))
        before.log_z.fill_(float(np.logaddexp.reduce(-energy_table(before.to_ising()))))
    before.set_moments(ExactSampler().sample(SamplingRequest(before.to_ising(), 2000, seed=1)))
    after = LabeledPrior(graphs.bipartite(2, 3), N_LABELS, n_chains=2000)
    after.take_over(before)
    assert float(after.log_z) == pytest.approx(np.logaddexp.reduce(-energy_table(after.to_ising())), abs=1e-5)
    s = 2.0 * torch.randint(2, (6, 5)) - 1.0
    # Every type is as likely as any other, whatever s is.
    torch.testing.assert_close(after.label_logits(s).softmax(1), torch.full((6, N_LABELS), 1 / N_LABELS))
    difference = (after.energy(s) - before.energy(s)).detach()
    torch.testing.assert_close(difference, difference[:1].expand(6))
    assert torch.equal(after.chains[:, :5], before.chains)
    # One label of three is up in the mean; standard error of a share in 2,000 chains: 0.011.
    assert (0.5 * (1 + after.spin_mean[5:]) - 1 / N_LABELS).abs().max() < 0.05
    with pytest.raises(ValueError, match="5 spins.*2000 chains.*6 and 16"):
        LabeledPrior(graphs.bipartite(3, 3), N_LABELS, n_chains=16).take_over(before)


# ---------------------------------------------------------------------------------------------------------------------
# Annotation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adata():
    """A third of the cells with labels; logistic regression of them on log counts finds 0.82 of the others."""
    adata = synthetic_counts(n_cells=600, n_genes=300, seed=2)
    is_known = np.random.default_rng(0).random(adata.n_obs) < 1 / 3
    adata.obs["label"] = np.where(is_known, adata.obs["cell_type"].astype(str), "Unknown")
    return adata


def annotate(adata, labels_key="label", max_epochs=15, **kwargs) -> QBMSCANVI:
    scvi.settings.seed = 0
    QBMSCANVI.setup_anndata(adata, labels_key, "Unknown", batch_key="batch")
    model = QBMSCANVI(adata, n_chains=64, **kwargs)
    model.train(max_epochs=max_epochs, batch_size=32, enable_progress_bar=False)
    return model


def accuracy(model) -> float:
    """Over the cells whose type the model was not told."""
    obs = model.adata.obs
    is_unknown = (obs["label"] == "Unknown").to_numpy()
    return float((model.predict() == obs["cell_type"].astype(str))[is_unknown].mean())


def test_types_are_transferred_to_cells_without_label(adata):
    model = annotate(adata)
    share_of_largest = adata.obs["cell_type"].value_counts(normalize=True).max()
    assert accuracy(model) > 0.7 > share_of_largest + 0.3
    assert {"classification_loss_train", "accuracy_train"} <= set(model.history)


def test_shuffled_labels_transfer_nothing(adata):
    """The control: what is transferred above comes from the labels."""
    adata = adata.copy()
    is_known = (adata.obs["label"] != "Unknown").to_numpy()
    labels = adata.obs["label"].to_numpy(copy=True)
    labels[is_known] = np.random.default_rng(1).permutation(labels[is_known])
    adata.obs["label"] = labels
    assert accuracy(annotate(adata)) < adata.obs["cell_type"].value_counts(normalize=True).max() + 0.1


def test_a_trained_model_takes_labels_on(adata):
    scvi.settings.seed = 0
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    trained = QBMSCVI(adata, n_chains=64)
    trained.train(max_epochs=10, batch_size=32, enable_progress_bar=False)
    model = QBMSCANVI.from_qbmscvi_model(trained, "Unknown", labels_key="label")
    assert model.module.prior.n_spins == trained.module.prior.n_spins + adata.obs["cell_type"].nunique()
    own, other = model.module.state_dict(), trained.module.state_dict()
    assert all(torch.equal(own[name], value) for name, value in other.items() if not name.startswith("prior."))
    model.train(batch_size=32, enable_progress_bar=False)
    assert len(model.history["elbo_train"]) == 10
    assert float(model.trainer.lightning_module.kl_weight) == 1.0
    assert accuracy(model) > 0.7


def test_probabilities_are_those_of_the_labels(adata, tmp_path):
    model = annotate(adata, max_epochs=2)
    table = model.predict(soft=True)
    assert set(table.columns) == set(adata.obs["label"]) - {"Unknown"}
    np.testing.assert_allclose(table.sum(1), 1.0, rtol=1e-5)
    assert (table.idxmax(1) == model.predict()).all()
    rows = [5, 3, 99]
    some = model.predict(indices=rows, soft=True, batch_size=2)
    pd.testing.assert_frame_equal(some, table.iloc[rows], check_exact=False, rtol=1e-5)
    assert len(model.predict(indices=[])) == 0
    model.save(tmp_path / "model", save_anndata=False)
    loaded = QBMSCANVI.load(tmp_path / "model", adata=adata)
    pd.testing.assert_frame_equal(loaded.predict(soft=True), table)
    new = adata[:50].copy()
    new.obs["label"] = "Unknown"
    pd.testing.assert_frame_equal(loaded.predict(new, soft=True), table.iloc[:50], check_exact=False, rtol=1e-4)


def test_everything_of_the_model_without_labels_works(adata):
    model = annotate(adata, max_epochs=1, n_latent=8)
    assert model.get_latent_representation().shape == (600, 8)
    assert model.sample_prior(20, seed=0).shape == (20, 8)
    assert model.generate(20, seed=0).shape == (20, 300)
    assert np.isfinite(model.get_prior_energy()).all()
    assert np.isfinite(float(model.get_elbo()))


def test_batches_without_labels_train(adata):
    few = adata[:200].copy()
    few.obs["label"] = "Unknown"
    few.obs.iloc[:2, few.obs.columns.get_loc("label")] = few.obs["cell_type"].astype(str).to_numpy()[:2]
    model = annotate(few, max_epochs=2)
    assert all(bool(torch.isfinite(value).all()) for value in model.module.state_dict().values())


@pytest.mark.parametrize(
    ("change", "arguments", "match"),
    [
        pytest.param({"label": "Unknown"}, {}, "No cell.*label", id="no-labels"),
        pytest.param({}, {"dispersion": "gene-label"}, "every cell.*'gene'", id="gene-label"),
    ],
)
def test_impossible_annotations_are_refused(adata, change, arguments, match):
    adata = adata.copy()
    for column, value in change.items():
        adata.obs[column] = value
    QBMSCANVI.setup_anndata(adata, "label", "Unknown")
    with pytest.raises(ValueError, match=match):
        QBMSCANVI(adata, **arguments)


def test_models_without_training_or_labels_are_refused(adata):
    QBMSCVI.setup_anndata(adata)
    model = QBMSCVI(adata, n_chains=16)
    with pytest.raises(RuntimeError, match="trained"):
        QBMSCANVI.from_qbmscvi_model(model, "Unknown", "label")
    model.train(max_epochs=1, enable_progress_bar=False)
    with pytest.raises(ValueError, match="labels_key"):
        QBMSCANVI.from_qbmscvi_model(model, "Unknown")
