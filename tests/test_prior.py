r"""Laws of the Boltzmann prior: KL and its gradients, the Ising problem behind it, and learning from samples alone.

The oracle writes KL, log Z and the moments out as sums over all spin states, with the Gaussian integrals in closed
form and in plain torch, so that autograd gives its gradients.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from laws import Law, binomial_p_value, random_problem, ring, scrambled_bipartite, set_exact_moments
from scipy import stats
from torch.distributions import kl_divergence
from torch.nn.functional import logsigmoid

from qbmscvi import graphs
from qbmscvi._prior import BoltzmannPrior
from qbmscvi.distributions import FactorialPosterior
from qbmscvi.enumeration import all_states, exact_log_z, exact_moments
from qbmscvi.ising import IsingModel, SampleBatch
from qbmscvi.samplers import BlockGibbsSampler, SamplingRequest


def random_prior(graph, n_gaussian=0, seed=0, scale=0.5, **kwargs):
    """Float64 prior with random parameters."""
    prior = BoltzmannPrior(graph, n_gaussian, **kwargs).double()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in (prior.h, prior.J, prior.a, prior.W):
            parameter.copy_(torch.tensor(scale * rng.normal(size=tuple(parameter.shape))))
    return prior


PRIORS = {
    "spins-bipartite-3x4": lambda: random_prior(scrambled_bipartite(3, 4), seed=1),
    "spins-layers-4x3": lambda: random_prior(graphs.bipartite(4, 3), seed=11),
    "spins-complete-5": lambda: random_prior(graphs.complete(5), seed=2),
    "spins-ring-9-gathered": lambda: random_prior(ring(9), seed=3),
    "gaussian-3-spins-4": lambda: random_prior(graphs.independent(4), 3, seed=4),
    "gaussian-2-spins-bipartite-2x3": lambda: random_prior(scrambled_bipartite(2, 3), 2, seed=5),
    "gaussian-2-spins-layers-2x3": lambda: random_prior(graphs.bipartite(2, 3), 2, seed=12),
    "gaussian-1-spins-ring-9-gathered": lambda: random_prior(ring(9), 1, seed=6),
}
each_prior = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in PRIORS.items()])


def random_posterior(prior, batch=(6,), seed=7):
    rng = np.random.default_rng(seed)
    loc = torch.tensor(rng.normal(size=(*batch, prior.n_gaussian)))
    scale = torch.tensor(np.exp(0.4 * rng.normal(size=(*batch, prior.n_gaussian))))
    logits = torch.tensor(1.5 * rng.normal(size=(*batch, prior.n_spins)))
    return FactorialPosterior(loc, scale, logits)


def oracle_spin_energy(prior, states):
    """h.s + sum J s s, edge by edge."""
    energy = states @ prior.h
    for (i, j), J in zip(prior.graph.edges.tolist(), prior.J, strict=True):
        energy = energy + J * states[:, i] * states[:, j]
    return energy


def oracle_log_z(prior):
    """Sum over spins; the Gaussian integral of each state is (2 pi)^(d/2) exp(|a + W s|^2 / 2)."""
    states = all_states(prior.n_spins)
    drive = (prior.a + states @ prior.W.T).square().sum(-1)
    constant = 0.5 * prior.n_gaussian * math.log(2 * math.pi)
    return torch.logsumexp(0.5 * drive - oracle_spin_energy(prior, states), 0) + constant


def oracle_kl(prior, loc, scale, logits):
    """KL of one factorial posterior, state by state: E_q E - H + log Z."""
    states = all_states(prior.n_spins)
    log_q = logsigmoid(states * logits).sum(-1)
    quadratic = 0.5 * (loc.square() + scale.square()).sum() - prior.a @ loc - (states @ prior.W.T) @ loc
    gaussian_entropy = (scale.log() + 0.5 * math.log(2 * math.pi * math.e)).sum()
    each = log_q + quadratic + oracle_spin_energy(prior, states)
    return (log_q.exp() * each).sum() - gaussian_entropy + oracle_log_z(prior)


def gradients(value, inputs):
    """Gradients, zero where an input has no part in the value: spins alone do not know ``a`` and ``W``."""
    inputs = [x if x.requires_grad or x.numel() else x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)


def set_exact(prior):
    set_exact_moments(prior)
    prior.log_z.fill_(oracle_log_z(prior).item())


# Energy and KL -----------------------------------------------------------------------------------------------------


@each_prior
def test_energy_matches_the_definition_term_by_term(make):
    prior = make()
    rng = np.random.default_rng(8)
    for _ in range(20):
        v, s = rng.normal(size=prior.n_gaussian), rng.choice([-1.0, 1.0], size=prior.n_spins)
        expected = 0.0
        for a, value in enumerate(v):
            expected += 0.5 * value**2 - prior.a[a].item() * value
            for i in range(prior.n_spins):
                expected -= value * prior.W[a, i].item() * s[i]
        for i in range(prior.n_spins):
            expected += prior.h[i].item() * s[i]
        for (i, j), J in zip(prior.graph.edges, prior.J.tolist(), strict=True):
            expected += J * s[i] * s[j]
        z = torch.tensor(np.concatenate([v, s]))
        assert math.isclose(prior.energy(z).item(), expected, abs_tol=1e-12)


@each_prior
def test_kl_matches_enumeration_and_sums_over_units(make):
    prior = make()
    set_exact(prior)
    q = random_posterior(prior)
    per_unit = kl_divergence(q, prior.distribution())
    assert per_unit.shape == (6, prior.n_units)
    for found, loc, scale, logits in zip(per_unit.sum(-1), q.gaussian_loc, q.gaussian_scale, q.logits, strict=True):
        assert math.isclose(found.item(), oracle_kl(prior, loc, scale, logits).item(), abs_tol=1e-11)
        assert found > 0


@each_prior
def test_kl_of_each_unit_is_energy_less_entropy_and_carries_exact_gradients(make):
    """Units with weights of their own, to the posterior and the prior."""
    prior = make()
    q = random_posterior(prior)
    leaves = [leaf.requires_grad_() for leaf in (q.gaussian_loc, q.gaussian_scale, q.logits)]
    parts = prior.expected_energy(q) - q.entropy() + prior.log_partition() / prior.n_units
    whole = kl_divergence(q, prior.distribution())
    assert torch.allclose(whole, parts, rtol=0, atol=1e-12)
    weights = torch.tensor(np.random.default_rng(13).normal(size=tuple(whole.shape)))
    inputs = [*leaves, prior.h, prior.J, prior.a, prior.W]
    expected = gradients((weights * parts).sum(), inputs)
    for found, other in zip(gradients((weights * whole).sum(), inputs), expected, strict=True):
        assert torch.allclose(found, other, rtol=0, atol=1e-12)


@each_prior
def test_kl_takes_batches_of_any_shape(make):
    prior = make()
    q = random_posterior(prior, batch=(2, 3))
    whole = kl_divergence(q, prior.distribution())
    assert whole.shape == (2, 3, prior.n_units)
    for k in range(2):
        row = FactorialPosterior(q.gaussian_loc[k], q.gaussian_scale[k], q.logits[k])
        assert torch.allclose(whole[k], kl_divergence(row, prior.distribution()), rtol=0, atol=1e-13)


@each_prior
def test_kl_gradients_match_autograd_through_the_enumeration(make):
    """To the encoder's outputs and to every parameter of the prior, with exact moments."""
    prior = make()
    set_exact(prior)
    q = random_posterior(prior)
    parameters = [prior.h, prior.J, prior.a, prior.W]
    inputs = [value.requires_grad_() for value in (q.gaussian_loc, q.gaussian_scale, q.logits)] + parameters
    weight = torch.tensor([1.0, -0.3, 0.8, 2.0, 0.1, 1.3], dtype=torch.float64)
    found = gradients(kl_divergence(q, prior.distribution()).sum(-1) @ weight, inputs)
    oracle = sum(
        w * oracle_kl(prior, *row) for w, *row in zip(weight, q.gaussian_loc, q.gaussian_scale, q.logits, strict=True)
    )
    expected = gradients(oracle, inputs)
    for name, a, b in zip(["loc", "scale", "logits", "h", "J", "a", "W"], found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-11), name


@each_prior
def test_encoder_gradient_does_not_depend_on_the_moments(make):
    """Bitwise: the sampler's noise never reaches the encoder."""
    prior = make()
    q = random_posterior(prior)
    inputs = [value.requires_grad_() for value in (q.gaussian_loc, q.gaussian_scale, q.logits)]

    def encoder_gradients():
        return gradients(kl_divergence(q, prior.distribution()).sum(), inputs)

    before = encoder_gradients()
    for seed in (1, 2):
        spins = Law.boltzmann(prior.to_ising(), 0.01).draw(30, seed)
        prior.set_moments(SampleBatch(spins, torch.zeros(30, dtype=torch.float64)))
        prior.log_z.fill_(1000.0 * seed)
        assert all(torch.equal(a, b) for a, b in zip(before, encoder_gradients(), strict=True))


@each_prior
def test_kl_of_the_best_factorial_posterior_is_zero_without_couplings(make):
    """J = W = 0: the prior is factorial, and its own marginals have KL zero."""
    prior = make()
    with torch.no_grad():
        prior.J.zero_()
        prior.W.zero_()
    set_exact(prior)
    q = FactorialPosterior(prior.a.detach(), torch.ones(prior.n_gaussian, dtype=torch.float64), -2 * prior.h.detach())
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
    states = all_states(prior.n_spins)
    # The Gaussian layer at its conditional mean carries the density (2 pi)^(-d/2) given the spins.
    z = torch.cat([prior.a.detach() + states @ prior.W.detach().T, states], dim=-1)
    log_p = prior.distribution().log_prob(z) + 0.5 * prior.n_gaussian * math.log(2 * math.pi)
    p = log_p.exp()
    assert math.isclose(p.sum().item(), 1.0, rel_tol=1e-12)
    assert np.allclose(p.detach(), Law.boltzmann(prior.to_ising()).probabilities, rtol=1e-10)


def test_distribution_describes_its_shape_and_does_not_sample():
    prior = PRIORS["gaussian-2-spins-bipartite-2x3"]()
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
    parameters = [prior.h, prior.J, prior.a, prior.W]
    value = prior.log_partition()
    assert math.isclose(value.item(), 12.25, rel_tol=1e-14)
    found = gradients(value, parameters)
    expected = gradients(oracle_log_z(prior), parameters)
    for name, a, b in zip(["h", "J", "a", "W"], found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-11), name


def test_log_partition_has_exactly_the_buffers_value_in_float32():
    prior = PRIORS["gaussian-2-spins-bipartite-2x3"]().float()
    prior.spin_mean.fill_(0.3)
    for log_z in torch.linspace(3.0, 30.0, 50):
        prior.log_z.fill_(log_z)
        assert prior.log_partition().item() == prior.log_z.item()


@each_prior
def test_log_partition_gradient_is_minus_the_mean_gradient_of_the_energy(make):
    """For any batch, not only an exact one: -<dE / dtheta> with v at its conditional moments."""
    prior = make()
    spins = Law.boltzmann(prior.to_ising(), 0.3).draw(40, seed=10)
    prior.set_moments(SampleBatch(spins, torch.zeros(40, dtype=torch.float64)))
    parameters = [prior.h, prior.J, prior.a, prior.W]
    found = gradients(prior.log_partition(), parameters)
    s = spins.double()
    v = (prior.a + s @ prior.W.T).detach()  # the energy is linear in v but for v^2 / 2, which has no parameter
    expected = gradients(-prior.energy(torch.cat([v, s], dim=-1)).mean(), parameters)
    for name, a, b in zip(["h", "J", "a", "W"], found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12), name


@each_prior
def test_moments_go_into_buffers_of_fixed_shape(make):
    prior = make()
    before = {name: tuple(value.shape) for name, value in prior.named_buffers()}
    spins = Law.boltzmann(prior.to_ising()).draw(40, seed=10)
    prior.set_moments(SampleBatch(spins, torch.zeros(40, dtype=torch.float64)))
    s = spins.double().numpy()
    i, j = prior.graph.edges.T
    assert np.allclose(prior.spin_mean.numpy(), s.mean(0), rtol=0, atol=1e-13)
    assert np.allclose(prior.edge_mean.numpy(), (s[:, i] * s[:, j]).mean(0), rtol=0, atol=1e-13)
    if prior.n_gaussian:
        assert np.allclose(prior.spin_second.numpy(), s.T @ s / 40, rtol=0, atol=1e-13)
    assert int(prior.n_updates) == 1
    assert {name: tuple(value.shape) for name, value in prior.named_buffers()} == before


# The Ising problem behind the prior --------------------------------------------------------------------------------


@each_prior
def test_log_z_of_the_ising_problem_is_that_of_the_prior(make):
    prior = make()
    assert math.isclose(exact_log_z(prior.to_ising()), oracle_log_z(prior).item(), abs_tol=1e-11)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: random_prior(ring(5), 1, seed=11), id="one-gaussian"),
        pytest.param(PRIORS["gaussian-2-spins-bipartite-2x3"], id="two-gaussians"),
    ],
)
def test_integrating_the_gaussian_layer_out_matches_quadrature(make):
    """State by state: the integral of exp(-E(v, s)) by the trapezoid rule, which is geometric on Gaussians."""
    prior = make()
    line = torch.arange(-9.0, 9.01, 0.25, dtype=torch.float64)
    grid = torch.tensor(list(itertools.product(line.tolist(), repeat=prior.n_gaussian)), dtype=torch.float64)
    states = all_states(prior.n_spins)
    energies = prior.to_ising().energy(states)
    for state, energy in zip(states, energies.tolist(), strict=True):
        z = torch.cat([grid, state.expand(len(grid), -1)], dim=1)
        log_integral = torch.logsumexp(-prior.energy(z), 0) + prior.n_gaussian * math.log(0.25)
        assert math.isclose(log_integral.item(), -energy, abs_tol=1e-10)


@each_prior
def test_ising_problem_carries_no_gradient(make):
    problem = make().to_ising()
    assert not problem.energy(torch.ones(problem.n_spins)).requires_grad


@pytest.mark.parametrize("name", ["spins-bipartite-3x4", "gaussian-2-spins-bipartite-2x3"])
def test_ising_problem_keeps_its_values_when_the_prior_learns(name):
    prior = PRIORS[name]()
    problem = prior.to_ising()
    before = problem.energy(torch.ones(prior.n_spins))
    with torch.no_grad():
        prior.J.add_(1.0)
    assert torch.equal(problem.energy(torch.ones(prior.n_spins)), before)


def test_completed_samples_have_the_conditional_mean_and_covariance():
    """v given s by z-scores: 3 means per state of 3 and 6 covariances over all, alpha 1e-4 after Bonferroni."""
    prior = PRIORS["gaussian-3-spins-4"]()
    n = 20_000
    states = all_states(4)[[0, 6, 13]]
    spins = states.repeat_interleave(n, dim=0).to(torch.int8)
    z = prior.complete(spins, torch.Generator().manual_seed(12))
    assert torch.equal(z[:, 3:], spins.double())
    noise = z[:, :3].view(3, n, 3) - (prior.a + states @ prior.W.T).detach()[:, None]
    p_mean = 2 * stats.norm.sf(np.abs(noise.mean(1).numpy()) * math.sqrt(n))
    flat = noise.reshape(-1, 3)
    i, j = np.triu_indices(3)
    product = (flat[:, i] * flat[:, j]).mean(0).numpy() - (i == j)
    p_cov = 2 * stats.norm.sf(np.abs(product) * math.sqrt(3 * n) / np.where(i == j, math.sqrt(2), 1.0))
    assert min(p_mean.min(), p_cov.min()) > 1e-4 / 15


def test_completing_needs_no_gaussian_layer_and_follows_its_generator():
    spins = torch.ones(5, 7, dtype=torch.int8)
    assert torch.equal(PRIORS["spins-bipartite-3x4"]().complete(spins), spins.double())
    prior = PRIORS["gaussian-2-spins-bipartite-2x3"]()
    before = torch.get_rng_state()
    first, second = (prior.complete(spins[:, :5], torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n_gaussian", [pytest.param(0, id="spins"), pytest.param(3, id="gaussian-spins")])
def test_a_new_prior_starts_near_the_independent_one_and_says_so(n_gaussian):
    torch.manual_seed(13)
    prior = BoltzmannPrior(graphs.bipartite(3, 4), n_gaussian)
    assert float(prior.log_z) == pytest.approx(7 * math.log(2) + 0.5 * n_gaussian * math.log(2 * math.pi))
    assert float(prior.log_z) == pytest.approx(exact_log_z(prior.to_ising()), abs=0.05)
    mean, second = exact_moments(prior.to_ising())
    assert torch.allclose(mean.float(), prior.spin_mean, atol=0.05)
    assert (second - torch.eye(7)).abs().max() < 0.05
    assert prior.chains.dtype == torch.int8
    assert set(prior.chains.unique().tolist()) == {-1, 1}


def test_an_uncoupled_gaussian_layer_stays_uncoupled():
    prior = BoltzmannPrior(graphs.independent(4), 3, is_coupled=False)
    assert not prior.W.requires_grad
    assert not prior.W.any()
    kl_divergence(random_posterior(prior.double()), prior.distribution()).sum().backward()
    assert prior.W.grad is None
    assert prior.a.grad.abs().min() > 0


# Learning from samples alone ---------------------------------------------------------------------------------------

LEARNING_STEPS, LEARNING_CHAINS = 250, 1024


def learn(optimizer, sign=1.0):
    """Fit a fully visible bipartite model to 20,000 exact samples by PCD; return the worst moment error."""
    target = random_problem(graphs.bipartite(5, 5), seed=61, offset=0.0)
    data = Law.boltzmann(target).draw(20_000, seed=62).float()
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
    law = Law.boltzmann(problem)
    matrix, h = problem.couplings().double().numpy(), problem.h.double().numpy()
    total = law.states.sum(1)
    # Left layer given right, then right given the new left: T(s, t) = p(t_left | s_right) p(t_right | t_left).
    field = h + law.states @ matrix
    up = 1 / (1 + np.exp(2 * field))  # (state, spin)
    chance = np.where(law.states[None] > 0, up[:, None], 1 - up[:, None])  # (from, to, spin)
    left = chance[:, :, :4].prod(-1)
    right = chance[:, :, 4:].prod(-1).diagonal()  # given the left layer of the new state itself
    return float(law.probabilities @ ((left * right) * (total[:, None] * total[None] < 0)).sum(1))


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
    law = Law.boltzmann(problem)
    total = law.states.sum(1)
    share = float(law.probabilities[total > 0].sum())
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
    law = Law.boltzmann(problem)
    share = float(law.probabilities[law.states.sum(1) > 0].sum())
    start = torch.ones(1000, 8, dtype=torch.int8)
    spins = BlockGibbsSampler().sample(SamplingRequest(problem, 1000, initial_spins=start, n_sweeps=100, seed=73)).spins
    assert binomial_p_value(int((spins.sum(1) > 0).sum()), 1000, share) < 1e-20
