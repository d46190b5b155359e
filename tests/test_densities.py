"""Rival priors: normalization, draws and divergences against enumeration and closed forms."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from oracles import ALPHA, Distribution, assert_follows, judge, state_table
from scipy import special, stats
from torch.distributions import Normal

from qbmscvi.benchmark._autoregressive import AutoregressiveDensity
from qbmscvi.benchmark._densities import (
    BernoulliMixture,
    GaussianMixture,
    IndependentSpins,
    divergence,
)
from qbmscvi.boltzmann.posterior import FactorialPosterior

N_SPINS = 8
STATES = state_table(N_SPINS)
SPIN_DENSITIES = {
    "independent": IndependentSpins.fit,
    "mixture": lambda codes, seed=0: BernoulliMixture.fit(codes, seed, n_components=(5, 30)),
    "autoregressive": lambda codes, seed=0: AutoregressiveDensity.fit(
        codes, seed, n_members=2, n_components=5, width=64
    ),
}


def two_modes() -> np.ndarray:
    """Probabilities of states near a pattern or near its opposite; 3 % of the spins are off."""
    pattern = np.array([1, -1, -1, 1, 1, -1, 1, 1])
    up = np.where(STATES == pattern, 0.97, 0.03).prod(1)
    return 0.7 * up + 0.3 * up[::-1]


def three_body() -> np.ndarray:
    """Probabilities of states of which no two spins are dependent, but three are."""
    weights = 1.0 + 0.9 * STATES[:, [0, 3, 6]].prod(1)
    return weights / weights.sum()


def spin_codes(logits) -> FactorialPosterior:
    return FactorialPosterior(torch.as_tensor(logits, dtype=torch.float32))


def gaussian_codes(mean: np.ndarray, scale: np.ndarray) -> Normal:
    return Normal(*(torch.as_tensor(values, dtype=torch.float32) for values in (mean, scale)))


def codes_of(probabilities: np.ndarray, n_cells: int = 2000):
    """Almost hard codes whose aggregated posterior is the distribution, but for sampling and one flip in 3,000."""
    index = np.random.default_rng(5).choice(len(STATES), n_cells, p=probabilities)
    return spin_codes(8.0 * STATES[index])


def random_codes(n_cells: int = 300, seed: int = 0):
    """Soft codes of three clusters."""
    rng = np.random.default_rng(seed)
    return spin_codes(
        2.0 * rng.normal(size=(3, N_SPINS))[rng.integers(3, size=n_cells)] + rng.normal(size=(n_cells, N_SPINS))
    )


def table(density) -> np.ndarray:
    """Log probability of every state."""
    return density.log_prob(torch.tensor(STATES, dtype=torch.float32)).double().numpy()


def distribution_of(density) -> Distribution:
    log_p = table(density)
    return Distribution(STATES, -log_p, np.exp(log_p) / np.exp(log_p).sum())


@cache
def fit_once(name: str):
    return SPIN_DENSITIES[name](random_codes())


@pytest.fixture(params=SPIN_DENSITIES)
def fitted(request):
    return fit_once(request.param)


def test_probabilities_sum_to_one(fitted):
    """The sum is right to single precision."""
    assert np.exp(table(fitted)).sum() == pytest.approx(1.0, abs=1e-5)


def test_a_spin_that_sees_itself_breaks_the_sum():
    density = deepcopy(fit_once("autoregressive"))
    direct = density.members[0].network.direct
    direct.mask.fill_(1.0)
    direct.weight.data += 0.2 * torch.eye(N_SPINS)
    assert abs(np.exp(table(density)).sum() - 1.0) > 0.01


def test_draws_follow_the_probabilities(fitted):
    draws = fitted.sample(20_000, torch.Generator().manual_seed(1)).to(torch.int8)
    assert_follows(draws, distribution_of(fitted))
    # The draws come in no order that says which component or member made them.
    assert_follows(draws[:10_000], distribution_of(fitted))
    assert judge(draws.roll(1, dims=1), distribution_of(fitted)).p_value < ALPHA


@pytest.mark.parametrize("name", ["mixture", "autoregressive"])
def test_draws_without_dependence_are_told_apart(name):
    """Independent spins with the right means."""
    distribution = distribution_of(fit_once(name))
    independent = IndependentSpins(torch.tensor(2.0 * np.arctanh(distribution.mean)))
    draws = independent.sample(20_000, torch.Generator().manual_seed(1)).to(torch.int8)
    assert judge(draws, distribution).p_value < ALPHA


@pytest.mark.parametrize("target", [two_modes, three_body])
def test_autoregressive_density_recovers_a_known_distribution(target):
    """A table of 255 free numbers would lose 255 / (2 * 2000) = 0.064 nats; what has fewer loses less."""
    p, codes = target(), codes_of(target())

    def lost(density) -> float:
        return float(p @ (np.log(p) - table(density)))

    assert 0.0 < lost(SPIN_DENSITIES["autoregressive"](codes)) < 0.064
    assert lost(IndependentSpins.fit(codes)) > 0.3


def test_held_out_cells_choose_the_number_of_components():
    one = spin_codes(np.tile(np.linspace(-3, 3, N_SPINS), (500, 1)))
    assert len(BernoulliMixture.fit(codes_of(two_modes()), n_components=(1, 2)).weights) == 2
    assert len(BernoulliMixture.fit(codes_of(two_modes()), n_components=(2, 1)).weights) == 2
    assert len(BernoulliMixture.fit(one, n_components=(1, 100)).weights) == 1
    line = gaussian_codes(np.repeat([[0.0], [9.0]], 200, axis=0), np.ones((400, 1)))
    assert GaussianMixture.fit(line, n_components=(1, 2)).fitted.n_components == 2


def test_divergence_matches_enumeration(fitted):
    """Within four standard errors; of a density with another mean spin it is not."""
    codes = random_codes(seed=1)
    log_q = -np.logaddexp(0.0, -codes.logits.double().numpy()[:, None] * STATES).sum(2)
    exact = (np.exp(log_q) * (log_q - table(fitted))).sum(1)
    estimate = divergence(codes, fitted, n_draws=20, seed=3)
    assert abs(estimate.kl - exact.mean()) < 4.0 * estimate.error < 0.2
    assert np.corrcoef(estimate.per_cell, exact)[0, 1] > 0.95
    assert estimate.kl == pytest.approx(estimate.per_cell.mean())
    flipped = spin_codes(codes.logits * torch.tensor([-1.0] + [1.0] * (N_SPINS - 1)))
    assert abs(divergence(flipped, fitted, n_draws=20, seed=3).kl - exact.mean()) > 4.0 * estimate.error


def test_error_of_the_divergence_is_that_of_repetitions():
    """Standard deviation of 100 estimates: known to 7 %, so 25 % is beyond three of its errors."""
    density, codes = IndependentSpins.fit(random_codes()), random_codes(50, seed=1)
    estimates = [divergence(codes, density, n_draws=4, seed=seed) for seed in range(100)]
    spread = np.std([estimate.kl for estimate in estimates], ddof=1)
    assert spread == pytest.approx(np.mean([estimate.error for estimate in estimates]), rel=0.25)


@pytest.fixture(scope="module")
def gaussian():
    """Codes of two correlated Gaussian units, of posteriors that are as wide as their means are scattered."""
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(2000, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]])
    return gaussian_codes(mean, rng.uniform(0.5, 1.5, size=mean.shape))


def test_gaussian_mixture_of_one_component_matches_the_closed_form(gaussian):
    density = GaussianMixture.fit(gaussian, n_components=(1,))
    mu, S = density.fitted.means_[0], density.fitted.covariances_[0]
    mean, var = gaussian.mean.double().numpy(), gaussian.variance.double().numpy()
    # Law of total variance; five draws of 2,000 cells know a variance of 2 to 2 %.
    np.testing.assert_allclose(S, np.cov(mean.T, ddof=0) + np.diag(var.mean(0)), atol=0.12)
    distance = ((mean - mu) @ np.linalg.inv(S) * (mean - mu)).sum(1)
    exact = 0.5 * (var @ np.diag(np.linalg.inv(S)) + distance - 2 + np.linalg.slogdet(S)[1] - np.log(var).sum(1))
    estimate = divergence(gaussian, density, n_draws=20)
    assert abs(estimate.kl - exact.mean()) < 4.0 * estimate.error < 0.05
    # A fit to the means alone would be too narrow, and worse.
    narrow = GaussianMixture.fit(gaussian_codes(mean, 1e-6 * var), n_components=(1,))
    assert divergence(gaussian, narrow, n_draws=20).kl > exact.mean() + 0.1


def test_draws_of_the_gaussian_mixture_follow_its_density():
    """Kolmogorov-Smirnov, on the direction that the components differ in."""
    rng = np.random.default_rng(1)
    mean = np.where(rng.random((1000, 1)) < 0.3, [[0.0, 0.0]], [[3.0, 1.0]])
    density = GaussianMixture.fit(gaussian_codes(mean, np.full_like(mean, 0.5)), n_components=(2,))
    draws = density.sample(5000, torch.Generator().manual_seed(2)).double().numpy()
    direction = np.array([0.8, -0.6])

    def cdf(x):
        scales = np.sqrt(np.einsum("i,nij,j->n", direction, density.fitted.covariances_, direction))
        return special.ndtr((x[:, None] - density.fitted.means_ @ direction) / scales) @ density.fitted.weights_

    assert stats.kstest(draws @ direction, cdf).pvalue > ALPHA
    assert stats.kstest(draws[:, ::-1] @ direction, cdf).pvalue < ALPHA


@pytest.mark.parametrize("name", SPIN_DENSITIES)
def test_seeds_decide_and_global_random_numbers_stay(name):
    fit, codes, before = SPIN_DENSITIES[name], random_codes(40), torch.random.get_rng_state()
    first, again, other = (table(fit(codes, seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert np.array_equal(first, other) == (name == "independent")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_too_few_cells_or_draws_are_refused():
    with pytest.raises(ValueError, match="those of 5 cells"):
        BernoulliMixture.fit(random_codes(5))
    with pytest.raises(ValueError, match="n_draws=1"):
        divergence(random_codes(), IndependentSpins.fit(random_codes()), n_draws=1)
