"""Hidden spins: every number of the prior against sums over all states of visible and hidden spins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import kl_divergence

from qbmscvi import QBMSCANVI, QBMSCVI
from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.enumeration import all_states, exact_log_z, exact_moments, log_2cosh
from qbmscvi.boltzmann.ising import SampleBatch
from qbmscvi.boltzmann.labeled_prior import LabeledPrior
from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.boltzmann.prior import BoltzmannPrior
from qbmscvi.datasets import synthetic_counts
from qbmscvi.samplers import ExactSampler, SamplingRequest

N_VISIBLE, N_HIDDEN, N_LABELS = 5, 4, 3
GRAPHS = {
    "restricted": graphs.bipartite(N_VISIBLE, N_HIDDEN),
    "couplings among visible spins": graphs.with_hidden(graphs.complete(N_VISIBLE), N_HIDDEN),
}


def randomize(prior: BoltzmannPrior, seed: int = 0) -> BoltzmannPrior:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        prior.h.copy_(torch.randn(prior.h.shape, generator=generator))
        prior.J.copy_(0.7 * torch.randn(prior.J.shape, generator=generator))
    return prior.double()


@pytest.fixture(params=GRAPHS)
def prior(request) -> BoltzmannPrior:
    return randomize(BoltzmannPrior(GRAPHS[request.param], n_hidden=N_HIDDEN, n_chains=16))


@pytest.fixture(params=GRAPHS)
def labeled(request) -> LabeledPrior:
    return randomize(LabeledPrior(GRAPHS[request.param], N_LABELS, n_hidden=N_HIDDEN, n_chains=16))


def posterior(n_cells: int = 3, seed: int = 1) -> FactorialPosterior:
    logits = 2.0 * torch.randn(n_cells, N_VISIBLE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return FactorialPosterior(logits.requires_grad_())


def joint_energies(prior: BoltzmannPrior) -> torch.Tensor:
    """Energies of the Ising problem, shape ``(n_visible_states, n_other_states)``, by its own definition."""
    n_other = prior.n_spins - N_VISIBLE
    visible, others = all_states(N_VISIBLE), all_states(n_other)
    states = torch.cat([visible[:, None].expand(-1, len(others), -1), others.expand(len(visible), -1, -1)], dim=-1)
    return prior.to_ising().energy(states)


def test_energy_sums_over_hidden_spins(prior):
    expected = -torch.logsumexp(-joint_energies(prior), 1)
    torch.testing.assert_close(prior.energy(all_states(N_VISIBLE)), expected)
    assert float(torch.logsumexp(-expected, 0)) == pytest.approx(exact_log_z(prior.to_ising()))


def test_energy_with_labels_sums_over_hidden_spins_and_types(labeled):
    """Of the states of the label spins only those of a type count."""
    n_states = 2**N_LABELS
    energies = joint_energies(labeled).unflatten(1, (2**N_HIDDEN, n_states))
    is_type = (all_states(N_LABELS) > 0).sum(1) == 1
    expected = -torch.logsumexp(-energies[:, :, is_type].flatten(1), 1)
    torch.testing.assert_close(labeled.energy(all_states(N_VISIBLE)), expected)


def exact_kl(prior: BoltzmannPrior, q: FactorialPosterior, energies: torch.Tensor) -> torch.Tensor:
    log_q = q.log_prob(all_states(N_VISIBLE)[:, None]).sum(-1)  # (n_states, n_cells)
    return (log_q.exp() * (log_q + energies[:, None])).sum(0) + prior.log_z


@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_kl_of_training_is_close_and_draws_are_unbiased(graph, has_labels):
    """Draws: a gate of four standard errors over 40 repetitions, false alarms below 1e-4, which KL at mean spins fails.

    The form of training takes fields as normal. With five spins they are hardly so, and it is still off by a third of
    the error at mean spins at most.
    """
    build = (lambda *a, **k: LabeledPrior(a[0], N_LABELS, **k)) if has_labels else BoltzmannPrior
    prior = randomize(build(graph, n_hidden=N_HIDDEN, n_chains=16))
    prior.set_log_z(3.0, 3.0, 3.0, 0.0)
    q = posterior()
    known = {"labels": torch.tensor([0, 1, 2])} if has_labels else {}
    energies = -torch.logsumexp(-joint_energies(prior), 1) if not has_labels else None
    if has_labels:  # of cells of a known type: energies at that type's label spins
        by_type = joint_energies(prior).unflatten(1, (2**N_HIDDEN, 2**N_LABELS))
        rows = [int(((all_states(N_LABELS) > 0).long() @ torch.tensor([1, 2, 4]) == 2**y).nonzero()) for y in range(3)]
        exact = torch.stack(
            [exact_kl(prior, q, -torch.logsumexp(-by_type[:, :, row], 1))[y] for y, row in enumerate(rows)]
        )
    else:
        exact = exact_kl(prior, q, energies)
    with torch.no_grad():
        of_training = kl_divergence(q, prior.distribution(**known)).sum(-1)
        gap = (prior._mean_log_sum_over_hidden(q.mean) - prior._log_sum_over_hidden(q.mean)).detach()
        at_mean_spins = of_training + gap
        torch.manual_seed(0)
        draws = torch.stack([kl_divergence(q, prior.distribution(**known, n_draws=50)).sum(-1) for _ in range(40)])
    error = draws.std(0) / 40**0.5
    assert ((of_training - exact).abs() < (at_mean_spins - exact) / 3).all()
    assert ((draws.mean(0) - exact).abs() < 4.0 * error).all()
    assert ((at_mean_spins - exact).abs() > 4.0 * error).any()


def test_sum_over_hidden_spins_is_exact_where_fields_are_nearly_normal():
    """Twelve spins with weak couplings: within 5 % of the error at mean spins. A spread that is off by 10 % fails."""
    generator = torch.Generator().manual_seed(0)
    prior = BoltzmannPrior(graphs.bipartite(12, N_HIDDEN), n_hidden=N_HIDDEN, n_chains=16).double()
    with torch.no_grad():
        prior.J.copy_(0.1 * torch.randn(prior.J.shape, generator=generator))
        prior.h.copy_(0.5 * torch.randn(prior.h.shape, generator=generator))
        q = FactorialPosterior(torch.randn(8, 12, generator=generator, dtype=torch.float64))
        states = all_states(12)
        mass = q.log_prob(states[:, None]).sum(-1).exp()
        exact = (mass * prior._log_sum_over_hidden(states)[:, None]).sum(0)
        at_mean = prior._log_sum_over_hidden(q.mean)

        def error(values):
            return float(((values - exact) / (exact - at_mean)).abs().max())

        def two_points(share):
            center, spread = prior.hidden_fields(q.mean), share * (q.variance @ prior.J.view(12, -1).square()).sqrt()
            return sum(0.5 * log_2cosh(center + sign * spread).sum(-1) for sign in (1, -1))

        assert error(prior._mean_log_sum_over_hidden(q.mean)) < 0.05
        torch.testing.assert_close(prior._mean_log_sum_over_hidden(q.mean), two_points(1.0))
        assert error(two_points(0.9)) > 0.05
        assert error(two_points(1.1)) > 0.05


def test_gradient_of_training_is_that_of_its_value_even_at_saturated_spins(prior):
    """Where a spin is certain, its part in the variance of a field vanishes, and the square root has no slope."""
    q = posterior()
    with torch.no_grad():
        q.logits[0] = 60.0 * q.logits[0].sign()
    assert torch.autograd.gradcheck(lambda logits: prior.expected_energy(FactorialPosterior(logits)), q.logits[1:])
    (gradient,) = torch.autograd.grad(prior.expected_energy(q).sum(), q.logits)
    assert torch.isfinite(gradient).all()


def test_gradient_of_the_prior_is_that_of_enumeration(prior):
    """Of the objective, with moments of exact samples: these have no hidden spins in them (Rao and Blackwell)."""
    q, problem = posterior(), prior.to_ising()
    n = 200_000
    prior.set_moments(ExactSampler().sample(SamplingRequest(problem, n, seed=3)))
    kl_divergence(q, prior.distribution()).sum(-1).mean().backward()
    found = {name: parameter.grad.clone() for name, parameter in prior.named_parameters() if parameter.numel()}
    prior.zero_grad()
    log_z = torch.logsumexp(-prior.energy(all_states(N_VISIBLE)), 0)
    (prior.expected_energy(q).sum(-1).mean() + log_z).backward()
    for name, gradient in found.items():
        expected = dict(prior.named_parameters())[name].grad
        assert float((gradient - expected).abs().max()) < 5.0 / n**0.5, name
        assert float(expected.abs().max()) > 0.05


def test_moments_of_hidden_spins_have_less_variance_than_their_draws(prior):
    """The mean is the same: compared with the moments by enumeration, over 50 batches of 100 samples."""
    problem = prior.to_ising()
    mean, second = exact_moments(problem)
    i, j = torch.from_numpy(prior.graph.edges.T.copy())
    expected = torch.cat([mean, second[i, j]])
    of_prior, of_draws = [], []
    for seed in range(50):
        batch = ExactSampler().sample(SamplingRequest(problem, 100, seed=seed))
        prior.set_moments(batch)
        of_prior.append(torch.cat([prior.spin_mean, prior.edge_mean]))
        of_draws.append(torch.cat(batch.moments(prior.graph)))
    of_prior, of_draws = torch.stack(of_prior), torch.stack(of_draws)
    is_hidden = torch.cat([torch.arange(prior.n_spins) >= N_VISIBLE, j >= N_VISIBLE])
    error = of_prior.std(0) / 50**0.5
    assert ((of_prior.mean(0) - expected).abs() < 4.5 * error + 1e-12).all()
    assert float(of_prior.var(0)[is_hidden].sum()) < 0.7 * float(of_draws.var(0)[is_hidden].sum())


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_chains_that_start_at_codes_have_hidden_spins_drawn_given_these(graph):
    """Conditional means of all other spins, 4.5 standard errors."""
    prior = randomize(LabeledPrior(graph, N_LABELS, n_hidden=N_HIDDEN, n_chains=20_000))
    torch.manual_seed(0)
    prior.start_chains(torch.ones(20_000, N_VISIBLE, dtype=torch.float64))
    s = torch.ones(N_VISIBLE, dtype=torch.float64)
    couplings = prior.to_ising().couplings()
    expected = -torch.tanh(prior.h[N_VISIBLE:] + couplings[N_VISIBLE:, :N_VISIBLE] @ s)
    chains = prior.chains.double()
    assert (chains[:, :N_VISIBLE] == 1).all()
    error = ((1 - expected.square()) / len(chains)).sqrt()
    assert ((chains[:, N_VISIBLE:].mean(0) - expected).abs() < 4.5 * error).all()


def test_hidden_spins_do_not_couple_to_each_other():
    with pytest.raises(ValueError, match="visible spins only"):
        BoltzmannPrior(graphs.complete(6), n_hidden=2)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param({"n_hidden_spins": -1}, "n_hidden_spins=-1", id="negative"),
        pytest.param({"n_hidden_spins": 4, "prior_graph": "independent"}, "no couplings", id="independent"),
    ],
)
def test_a_number_of_hidden_spins_that_does_nothing_is_refused(arguments, match):
    adata = synthetic_counts(60, 30, seed=0)
    QBMSCVI.setup_anndata(adata)
    with pytest.raises(ValueError, match=match):
        QBMSCVI(adata, **arguments)


@pytest.fixture(scope="module")
def model() -> QBMSCVI:
    adata = synthetic_counts(400, 40, seed=0)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    torch.manual_seed(0)
    model = QBMSCVI(adata, n_latent=6, n_hidden_spins=5, n_hidden=16, gene_likelihood="nb")
    model.train(max_epochs=15, accelerator="cpu", enable_progress_bar=False, plan_kwargs={"lr": 0.02})
    randomize(model.module.prior.float()).float()
    model.update_log_z()
    return model


def test_numbers_of_a_model_are_without_bias(model):
    """KL and ELBO against the sum over all codes, four standard errors, which KL at mean spins fails."""
    prior = model.module.prior
    assert model.get_log_z().value == pytest.approx(exact_log_z(prior.to_ising()), abs=1e-4)
    logits = torch.from_numpy(model.get_latent_representation(representation="logits")).double()
    states = all_states(6)
    log_q = torch.nn.functional.logsigmoid(states[:, None] * logits).sum(-1)
    exact = (log_q.exp() * (log_q + prior.double().energy(states)[:, None].detach())).sum(0) + prior.log_z.double()
    prior.float()
    torch.manual_seed(0)
    repeats = np.stack([model.get_kl() for _ in range(30)])
    error = repeats.mean(1).std(ddof=1) / 30**0.5
    expected = float(exact.mean())
    q = FactorialPosterior(logits.float())
    gap = prior._mean_log_sum_over_hidden(q.mean) - prior._log_sum_over_hidden(q.mean)
    at_mean_spins = float((kl_divergence(q, prior.distribution()).sum(-1) + gap).mean().detach())
    assert abs(repeats.mean() - expected) < 4.0 * error + 1e-4
    assert at_mean_spins - expected > 10.0 * error
    values, errors = model.get_kl(return_error=True)
    z = (values - exact.numpy()) / errors
    assert 0.7 < z.std() < 1.4  # of 400 cells with 20 draws each; errors that are half or twice too large fail
    assert abs(z.mean()) < 5.0 / len(z) ** 0.5 + 0.1
    with torch.no_grad():
        energies = np.stack([model.get_prior_energy() for _ in range(30)])
    exact_energy = float((log_q.exp() * prior.energy(states.float())[:, None].double().detach()).sum(0).mean())
    assert abs(energies.mean() - exact_energy) < 4.0 * energies.mean(1).std(ddof=1) / 30**0.5 + 1e-4


def test_hidden_spins_are_saved_and_come_back(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = QBMSCVI.load(tmp_path / "model", model.adata, accelerator="cpu")
    prior, other = model.module.prior, loaded.module.prior
    assert (other.n_visible, other.n_hidden) == (6, 5)
    torch.testing.assert_close(other.state_dict(), prior.state_dict(), rtol=0.0, atol=0.0)
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    assert loaded.get_ising_model().to_bqm().num_variables == 11


def test_a_query_model_keeps_the_prior_with_its_hidden_spins(model):
    query = synthetic_counts(100, 40, seed=1)
    query.obs["batch"] = "new"
    mapped = QBMSCVI.load_query_data(query, model, accelerator="cpu")
    mapped.train(max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    for name, value in model.module.prior.state_dict().items():
        torch.testing.assert_close(mapped.module.prior.state_dict()[name], value, rtol=0.0, atol=0.0, msg=name)


def test_an_annotation_model_takes_hidden_spins_over(model):
    adata = model.adata.copy()
    QBMSCVI.setup_anndata(adata, batch_key="batch", labels_key="cell_type")
    plain = QBMSCVI(adata, n_latent=6, n_hidden_spins=5, n_hidden=16)
    plain.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    annotated = QBMSCANVI.from_qbmscvi_model(plain, "unknown")
    prior, before = annotated.module.prior, plain.module.prior
    assert (prior.n_visible, prior.n_hidden) == (6, 5)
    states = all_states(6).float()
    gap = prior.energy(states) - before.energy(states)
    torch.testing.assert_close(gap, gap[0].expand_as(gap), rtol=0.0, atol=1e-4)


def test_set_moments_of_a_batch_leaves_the_batch_alone(prior):
    batch = ExactSampler().sample(SamplingRequest(prior.to_ising(), 50, seed=0))
    before = batch.spins.clone()
    prior.set_moments(SampleBatch(batch.spins, batch.energies))
    assert torch.equal(batch.spins, before)
