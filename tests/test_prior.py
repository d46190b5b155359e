r"""The Boltzmann prior: KL and its gradients, the Ising problem behind it, and learning from samples alone.

The oracle writes KL, log Z and the moments out as sums over all spin states in plain torch, so that autograd gives
its gradients.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import Distribution, binomial_p_value, random_problem, ring, scrambled_bipartite, set_exact_moments
from tables import over
from torch.autograd import grad
from torch.distributions import kl_divergence
from torch.nn.functional import logsigmoid

from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.enumeration import all_states, exact_log_z, exact_moments
from qbmscvi.boltzmann.ising import IsingModel, SampleBatch
from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.boltzmann.prior import BoltzmannPrior
from qbmscvi.samplers import BlockGibbsSampler, SamplingRequest


def random_prior(graph, seed=0, scale=0.5):
    """Float64 prior with random parameters."""
    prior = BoltzmannPrior(graph).double()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in (prior.h, prior.J):
            parameter.copy_(torch.tensor(scale * rng.normal(size=tuple(parameter.shape))))
    return prior


PRIORS = {
    "bipartite-3x4": lambda: random_prior(scrambled_bipartite(3, 4), seed=1),
    "layers-4x3": lambda: random_prior(graphs.bipartite(4, 3), seed=11),
    "complete-5": lambda: random_prior(graphs.complete(5), seed=2),
    "ring-9-gathered": lambda: random_prior(ring(9), seed=3),
}
each_prior = over("make", [pytest.param(make, id=name) for name, make in PRIORS.items()])


def random_posterior(prior, batch=(6,), seed=7):
    return FactorialPosterior(torch.tensor(1.5 * np.random.default_rng(seed).normal(size=(*batch, prior.n_spins))))


def oracle_energy(prior, states):
    """h.s + sum J s s, edge by edge."""
    energy = states @ prior.h
    for (i, j), J in zip(prior.graph.edges.tolist(), prior.J, strict=True):
        energy = energy + J * states[:, i] * states[:, j]
    return energy


def oracle_log_z(prior):
    return torch.logsumexp(-oracle_energy(prior, all_states(prior.n_spins)), 0)


def oracle_kl(prior, logits):
    """KL of one factorial posterior, state by state: E_q E - H + log Z."""
    states = all_states(prior.n_spins)
    log_q = logsigmoid(states * logits).sum(-1)
    return (log_q.exp() * (log_q + oracle_energy(prior, states))).sum() + oracle_log_z(prior)


def set_exact(prior):
    set_exact_moments(prior)
    prior.log_z.fill_(oracle_log_z(prior).item())


# Energy and KL -----------------------------------------------------------------------------------------------------


@each_prior
def test_energy_matches_the_definition_term_by_term(make):
    prior = make()
    rng = np.random.default_rng(8)
    for _ in range(20):
        s = rng.choice([-1.0, 1.0], size=prior.n_spins)
        expected = sum(h * value for h, value in zip(prior.h.tolist(), s, strict=True))
        for (i, j), J in zip(prior.graph.edges, prior.J.tolist(), strict=True):
            expected += J * s[i] * s[j]
        assert math.isclose(prior.energy(torch.tensor(s)).item(), expected, abs_tol=1e-12)


@each_prior
def test_kl_matches_enumeration_and_sums_over_spins(make):
    prior = make()
    set_exact(prior)
    q = random_posterior(prior)
    per_spin = kl_divergence(q, prior.distribution())
    assert per_spin.shape == (6, prior.n_spins)
    for found, logits in zip(per_spin.sum(-1), q.logits, strict=True):
        assert math.isclose(found.item(), oracle_kl(prior, logits).item(), abs_tol=1e-11)
        assert found > 0


@each_prior
def test_kl_of_each_spin_is_energy_less_entropy_and_carries_exact_grad(make):
    """Spins with weights of their own, to the posterior and the prior."""
    prior = make()
    q = random_posterior(prior)
    inputs = [q.logits.requires_grad_(), prior.h, prior.J]
    parts = prior.expected_energy(q) - q.entropy() + prior.log_partition() / prior.n_spins
    whole = kl_divergence(q, prior.distribution())
    assert torch.allclose(whole, parts, rtol=0, atol=1e-12)
    weights = torch.tensor(np.random.default_rng(13).normal(size=tuple(whole.shape)))
    expected = grad((weights * parts).sum(), inputs, retain_graph=True)
    for found, other in zip(grad((weights * whole).sum(), inputs), expected, strict=True):
        assert torch.allclose(found, other, rtol=0, atol=1e-12)


@each_prior
def test_kl_takes_batches_of_any_shape(make):
    prior = make()
    q = random_posterior(prior, batch=(2, 3))
    whole = kl_divergence(q, prior.distribution())
    assert whole.shape == (2, 3, prior.n_spins)
    for k in range(2):
        row = kl_divergence(FactorialPosterior(q.logits[k]), prior.distribution())
        assert torch.allclose(whole[k], row, rtol=0, atol=1e-13)


@each_prior
def test_kl_gradients_match_autograd_through_the_enumeration(make):
    """To the logits and to every parameter of the prior, with exact moments."""
    prior = make()
    set_exact(prior)
    q = random_posterior(prior)
    inputs = [q.logits.requires_grad_(), prior.h, prior.J]
    weight = torch.tensor([1.0, -0.3, 0.8, 2.0, 0.1, 1.3], dtype=torch.float64)
    found = grad(kl_divergence(q, prior.distribution()).sum(-1) @ weight, inputs)
    oracle = sum(w * oracle_kl(prior, logits) for w, logits in zip(weight, q.logits, strict=True))
    expected = grad(oracle, inputs)
    for name, a, b in zip(["logits", "h", "J"], found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-11), name


@each_prior
def test_encoder_gradient_does_not_depend_on_the_moments(make):
    """Bitwise: the sampler's noise never reaches the encoder."""
    prior = make()
    q = random_posterior(prior)
    q.logits.requires_grad_()

    def encoder_gradient():
        return grad(kl_divergence(q, prior.distribution()).sum(), q.logits)[0]

    before = encoder_gradient()
    for seed in (1, 2):
        spins = Distribution.boltzmann(prior.to_ising(), 0.01).draw(30, seed)
        prior.set_moments(SampleBatch(spins, torch.zeros(30, dtype=torch.float64)))
        prior.log_z.fill_(1000.0 * seed)
        assert torch.equal(before, encoder_gradient())


@each_prior
def test_kl_of_the_best_factorial_posterior_is_zero_without_couplings(make):
    """The prior is factorial, and its own marginals have KL zero."""
    prior = make()
    with torch.no_grad():
        prior.J.zero_()
    set_exact(prior)
    q = FactorialPosterior(-2 * prior.h.detach())
    assert torch.allclose(kl_divergence(q, prior.distribution()).sum(-1), torch.zeros(()).double(), rtol=0, atol=1e-12)


@each_prior
def test_expected_energy_is_the_mean_energy_of_samples(make):
    """z-score of 100,000 draws below 4.5; alpha 7e-6."""
    prior = make()
    q = random_posterior(prior, batch=())
    torch.manual_seed(9)
    energy = prior.energy(q.sample((100_000,))).detach()
    expected = prior.expected_energy(q).sum().item()
    assert abs(float(energy.mean()) - expected) < 4.5 * float(energy.std()) / math.sqrt(100_000)


@each_prior
def test_log_prob_is_normalized_and_its_gradient_too(make):
    prior = make()
    set_exact(prior)
    p = prior.distribution().log_prob(all_states(prior.n_spins)).exp()
    assert math.isclose(p.sum().item(), 1.0, rel_tol=1e-12)
    assert np.allclose(p.detach(), Distribution.boltzmann(prior.to_ising()).probabilities, rtol=1e-10)


def test_distribution_describes_its_shape_and_does_not_sample():
    prior = PRIORS["bipartite-3x4"]()
    p = prior.distribution()
    assert (p.batch_shape, p.event_shape) == ((), (7,))
    with pytest.raises(NotImplementedError):
        p.sample()


# log Z and moments -------------------------------------------------------------------------------------------------


@each_prior
def test_log_partition_has_the_buffers_value_and_the_gradient_of_log_z(make):
    prior = make()
    set_exact_moments(prior)
    prior.log_z.fill_(12.25)
    parameters = [prior.h, prior.J]
    value = prior.log_partition()
    assert math.isclose(value.item(), 12.25, rel_tol=1e-14)
    found = grad(value, parameters)
    expected = grad(oracle_log_z(prior), parameters)
    for name, a, b in zip("hJ", found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-11), name


def test_log_partition_has_exactly_the_buffers_value_in_float32():
    prior = PRIORS["bipartite-3x4"]().float()
    prior.spin_mean.fill_(0.3)
    for log_z in torch.linspace(3.0, 30.0, 50):
        prior.log_z.fill_(log_z)
        assert prior.log_partition().item() == prior.log_z.item()


@each_prior
def test_log_partition_gradient_is_minus_the_mean_gradient_of_the_energy(make):
    """For any batch, not only an exact one: -<dE / dtheta>."""
    prior = make()
    spins = Distribution.boltzmann(prior.to_ising(), 0.3).draw(40, seed=10)
    prior.set_moments(SampleBatch(spins, torch.zeros(40, dtype=torch.float64)))
    parameters = [prior.h, prior.J]
    found = grad(prior.log_partition(), parameters)
    expected = grad(-prior.energy(spins.double()).mean(), parameters)
    for name, a, b in zip("hJ", found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12), name


@each_prior
def test_moments_go_into_buffers_of_fixed_shape(make):
    prior = make()
    before = {name: tuple(value.shape) for name, value in prior.named_buffers()}
    spins = Distribution.boltzmann(prior.to_ising()).draw(40, seed=10)
    prior.set_moments(SampleBatch(spins, torch.zeros(40, dtype=torch.float64)))
    s = spins.double().numpy()
    i, j = prior.graph.edges.T
    assert np.allclose(prior.spin_mean.numpy(), s.mean(0), rtol=0, atol=1e-13)
    assert np.allclose(prior.edge_mean.numpy(), (s[:, i] * s[:, j]).mean(0), rtol=0, atol=1e-13)
    assert int(prior.n_updates) == 1
    assert {name: tuple(value.shape) for name, value in prior.named_buffers()} == before


# The Ising problem behind the prior --------------------------------------------------------------------------------


@each_prior
def test_log_z_of_the_ising_problem_is_that_of_the_prior(make):
    prior = make()
    assert math.isclose(exact_log_z(prior.to_ising()), oracle_log_z(prior).item(), abs_tol=1e-11)


@each_prior
def test_ising_problem_carries_no_gradient(make):
    problem = make().to_ising()
    assert not problem.energy(torch.ones(problem.n_spins)).requires_grad


def test_ising_problem_keeps_its_values_when_the_prior_learns():
    prior = PRIORS["bipartite-3x4"]()
    problem = prior.to_ising()
    before = problem.energy(torch.ones(prior.n_spins))
    with torch.no_grad():
        prior.J.add_(1.0)
    assert torch.equal(problem.energy(torch.ones(prior.n_spins)), before)


def test_a_new_prior_starts_near_the_independent_one_and_says_so():
    torch.manual_seed(13)
    prior = BoltzmannPrior(graphs.bipartite(3, 4))
    assert float(prior.log_z) == pytest.approx(7 * math.log(2))
    assert float(prior.log_z) == pytest.approx(exact_log_z(prior.to_ising()), abs=0.05)
    mean, second = exact_moments(prior.to_ising())
    assert torch.allclose(mean.float(), prior.spin_mean, atol=0.05)
    assert (second - torch.eye(7)).abs().max() < 0.05
    assert prior.chains.dtype == torch.int8
    assert set(prior.chains.unique().tolist()) == {-1, 1}


# Learning from samples alone ---------------------------------------------------------------------------------------

LEARNING_STEPS, LEARNING_CHAINS = 250, 1024


def learn(optimizer, sign=1.0):
    """Fit a fully visible bipartite model to 20,000 exact samples by PCD; return the worst moment error."""
    target = random_problem(graphs.bipartite(5, 5), seed=61, offset=0.0)
    data = Distribution.boltzmann(target).draw(20_000, seed=62).float()
    torch.manual_seed(63)
    prior = BoltzmannPrior(target.graph, n_chains=LEARNING_CHAINS)
    optimizer = optimizer(prior.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / LEARNING_STEPS)
    sampler = BlockGibbsSampler()
    for step in range(LEARNING_STEPS):
        request = SamplingRequest(
            prior.to_ising(),
            LEARNING_CHAINS,
            initial_spins=prior.chains if step else None,
            n_sweeps=3 if step else 50,
            seed=step,
        )
        batch = sampler.sample(request)
        prior.chains.copy_(batch.spins)
        prior.set_moments(batch)
        rows = torch.arange(500 * step, 500 * (step + 1)) % len(data)
        loss = prior.energy(data[rows]).mean() + sign * prior.log_partition()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    mean, second = exact_moments(prior.to_ising())
    i, j = (torch.tensor(ends) for ends in target.graph.edges.T)
    data = data.double()
    errors = torch.cat([mean - data.mean(0), (second - data.T @ data / len(data))[i, j]])
    return float(errors.abs().max())


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(lambda parameters: torch.optim.Adam(parameters, lr=0.05), id="adam"),
        pytest.param(lambda parameters: torch.optim.SGD(parameters, lr=0.3), id="sgd"),
    ],
)
def test_a_machine_trained_on_samples_recovers_the_moments_of_its_data(optimizer):
    """Worst of 35 moments within 0.05: a batch of 500 has a standard error of 0.045, averaged by the decay."""
    error = learn(optimizer)
    print(f"worst moment error {error:.3f}")
    assert error < 0.05


def test_a_negative_phase_of_the_wrong_sign_does_not_recover_them():
    error = learn(lambda parameters: torch.optim.Adam(parameters, lr=0.05), sign=-1.0)
    print(f"worst moment error {error:.3f}")
    assert error > 0.5


# Two modes ---------------------------------------------------------------------------------------------------------


def ferromagnet(J):
    """4 + 4 spins, all couplings alike and negative, a small field: two modes of unequal weight."""
    return IsingModel(torch.full((8,), 0.02), torch.full((16,), J), graphs.bipartite(4, 4))


def crossing_rate(problem, n_sweeps=1):
    """Exact chance that the total spin changes sign in a sweep at equilibrium; no change through zero is counted."""
    distribution = Distribution.boltzmann(problem)
    matrix, h = problem.couplings().double().numpy(), problem.h.double().numpy()
    total = distribution.states.sum(1)
    # Left layer given right, then right given the new left: T(s, t) = p(t_left | s_right) p(t_right | t_left).
    field = h + distribution.states @ matrix
    up = 1 / (1 + np.exp(2 * field))  # (state, spin)
    chance = np.where(distribution.states[None] > 0, up[:, None], 1 - up[:, None])  # (from, to, spin)
    left = chance[:, :, :4].prod(-1)
    right = chance[:, :, 4:].prod(-1).diagonal()  # given the left layer of the new state itself
    return float(distribution.probabilities @ ((left * right) * (total[:, None] * total[None] < 0)).sum(1))


@pytest.mark.parametrize(
    ("J", "burn_in"),
    [pytest.param(J, n, id=f"J{J}") for J, n in ((-0.3, 50), (-0.4, 150), (-0.5, 500), (-0.6, 2000))],
)
def test_persistent_chains_keep_both_modes_in_their_shares_and_cross_as_often_as_they_should(J, burn_in):
    """1,000 chains, 101 sweeps after a burn-in of eight relaxation times or more.

    The count in the upper mode is binomial at every time; four of them at alpha 1e-4 in all. Crossings within 5
    standard errors over chains. Run with -s for the rates.
    """
    problem, n_chains = ferromagnet(J), 1000
    distribution = Distribution.boltzmann(problem)
    total = distribution.states.sum(1)
    share = float(distribution.probabilities[total > 0].sum())
    sampler = BlockGibbsSampler()
    spins = sampler.sample(SamplingRequest(problem, n_chains, n_sweeps=burn_in, seed=71)).spins
    signs = [spins.sum(1).sign()]
    for sweep in range(100):
        request = SamplingRequest(problem, n_chains, initial_spins=spins, n_sweeps=1, seed=72 + sweep)
        spins = sampler.sample(request).spins
        signs.append(spins.sum(1).sign())
    signs = torch.stack(signs).numpy().astype(int)
    ups = [int((signs[time] > 0).sum()) for time in (0, 33, 67, 100)]
    crossings = (signs[1:] * signs[:-1] < 0).sum(0)
    expected = 100 * crossing_rate(problem)
    error = crossings.std() / math.sqrt(n_chains)
    print(
        f"J = {J}: upper mode {[up / n_chains for up in ups]}, exact {share:.3f}; "
        f"crossings per 100 sweeps {crossings.mean():.3f} +- {error:.3f}, exact {expected:.3f}"
    )
    assert 0.35 < share < 0.5
    assert min(binomial_p_value(up, n_chains, share) for up in ups) > 1e-4 / 4
    assert abs(crossings.mean() - expected) < 5 * error


def test_chains_started_in_one_mode_are_found_out():
    """The gate of the modes has power: 100 sweeps at J = -0.6 do not cross, and the share says so."""
    problem = ferromagnet(-0.6)
    distribution = Distribution.boltzmann(problem)
    share = float(distribution.probabilities[distribution.states.sum(1) > 0].sum())
    start = torch.ones(1000, 8, dtype=torch.int8)
    spins = BlockGibbsSampler().sample(SamplingRequest(problem, 1000, initial_spins=start, n_sweeps=100, seed=73)).spins
    assert binomial_p_value(int((spins.sum(1) > 0).sum()), 1000, share) < 1e-20
