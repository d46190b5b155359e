"""A restricted Boltzmann machine of images: prior and sampler against another library, and against exact gradients.

scikit-learn's handwritten digits as 8 x 8 black and white images; 12 hidden units, so that log Z and every likelihood
are exact. The images are the posterior: -log p(v) is the KL divergence of a posterior that knows v, and, given v, the
hidden units. So this is the loss that cells see.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special
from sklearn.datasets import load_digits
from sklearn.neural_network import BernoulliRBM
from torch.distributions import kl_divergence

from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.enumeration import exact_moments
from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.boltzmann.prior import BoltzmannPrior
from qbmscvi.diagnostics import estimate_log_z
from qbmscvi.samplers import BlockGibbsSampler, SamplingRequest

pytestmark = pytest.mark.slow

N_VISIBLE, N_HIDDEN, N_EPOCHS, BATCH = 64, 12, 60, 100
N_SWEEPS = 30  # raised until level with exact gradients: -19.20 nats with 2 sweeps, -19.03 with 10, -18.84 with 30
KNOWN = 60.0  # logit of a pixel that is known: its mean is exactly one in float32, its entropy below 1e-24


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    """1,500 to train with and 297 to judge by, values 0 and 1."""
    bits = (load_digits().data > 7.5).astype(np.float32)
    bits = bits[np.random.default_rng(0).permutation(len(bits))]
    return bits[:1500], bits[1500:]


def negative_log_likelihood(prior: BoltzmannPrior, bits: torch.Tensor) -> torch.Tensor:
    """-log p(v) in nats, shape ``(n_images,)``; as good as ``prior.log_z``."""
    v = 2.0 * bits - 1.0
    J = prior.J.view(N_VISIBLE, N_HIDDEN)  # edges of a complete bipartite graph come row by row
    logits = torch.cat([KNOWN * v, -2.0 * (prior.h[N_VISIBLE:] + v @ J).detach()], dim=1)
    return kl_divergence(FactorialPosterior(logits), prior.distribution()).sum(-1)


def train(bits: np.ndarray, is_exact: bool, is_coupled: bool = True) -> BoltzmannPrior:
    torch.manual_seed(0)
    prior = BoltzmannPrior(graphs.bipartite(N_VISIBLE, N_HIDDEN))
    if not is_coupled:
        prior.J.requires_grad_(False).zero_()
    bits = torch.from_numpy(bits)
    with torch.no_grad():  # at the rates of the pixels, or hidden units saturate in the place of fields (Hinton 2012)
        prior.h[:N_VISIBLE] = -0.5 * torch.logit(bits.mean(0).clamp(0.01, 0.99))
    optimizer = torch.optim.Adam([p for p in prior.parameters() if p.requires_grad], lr=5e-3)
    sampler, chains = BlockGibbsSampler(), prior.chains
    for epoch in range(N_EPOCHS):
        for rows in torch.randperm(len(bits)).split(BATCH):
            problem = prior.to_ising()
            if is_exact:
                set_exact_moments(prior)
            else:
                batch = sampler.sample(SamplingRequest(problem, len(chains), initial_spins=chains, n_sweeps=N_SWEEPS))
                chains = batch.spins
                prior.set_moments(batch)
            optimizer.zero_grad()
            negative_log_likelihood(prior, bits[rows]).mean().backward()
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 5e-3 * (1.0 - (epoch + 1) / N_EPOCHS) + 1e-4
    estimate = estimate_log_z(prior.to_ising())
    assert estimate.scale == 0.0  # exact
    prior.log_z.fill_(estimate.value)
    return prior


def set_exact_moments(prior: BoltzmannPrior) -> None:
    mean, second = exact_moments(prior.to_ising(), 1.0)
    i, j = prior.graph.edge_index()
    prior.spin_mean.copy_(mean)
    prior.edge_mean.copy_(second[i, j])


SKLEARN_STARTS = [(rate, starts_at_rates) for rate in (0.03, 0.1, 0.3, 1.0) for starts_at_rates in (False, True)]


def train_sklearn(bits: np.ndarray, learning_rate: float, starts_at_rates: bool) -> BernoulliRBM:
    """The same number of epochs and batches; from its own start, or from the rates of the pixels as ours."""
    rbm = BernoulliRBM(N_HIDDEN, learning_rate=learning_rate, batch_size=BATCH, n_iter=N_EPOCHS, random_state=0)
    if not starts_at_rates:
        return rbm.fit(bits)
    rng = np.random.default_rng(0)
    rbm.partial_fit(bits[:BATCH])  # makes the arrays
    rbm.intercept_visible_ = special.logit(bits.mean(0).clip(0.01, 0.99)).astype(bits.dtype)
    for _ in range(N_EPOCHS):
        for rows in np.array_split(rng.permutation(len(bits)), len(bits) // BATCH):
            rbm.partial_fit(bits[rows])
    return rbm


def likelihood_of_sklearn(rbm: BernoulliRBM, bits: np.ndarray) -> np.ndarray:
    """Exact log p(v), its hidden units summed out by hand."""
    W, b, c = rbm.components_.astype(float), rbm.intercept_visible_, rbm.intercept_hidden_
    states = (np.arange(2**N_HIDDEN)[:, None] >> np.arange(N_HIDDEN)) & 1
    log_z = special.logsumexp(states @ c + np.logaddexp(0.0, b + states @ W).sum(1))
    return bits @ b + np.logaddexp(0.0, c + bits @ W.T).sum(1) - log_z


def test_machine_of_digits_is_as_good_as_others(images, capsys):
    """On held-out images: no worse than scikit-learn's best of eight runs, nor than exact gradients.

    Paired over 297 images; the gates are three standard errors of the mean difference.
    """
    learn, judge = images
    ours, exact, uncoupled = (
        -negative_log_likelihood(train(learn, **how), torch.from_numpy(judge)).detach().numpy()
        for how in ({"is_exact": False}, {"is_exact": True}, {"is_exact": True, "is_coupled": False})
    )
    others = {start: likelihood_of_sklearn(train_sklearn(learn, *start), judge) for start in SKLEARN_STARTS}
    best = max(others, key=lambda start: others[start].mean())
    with capsys.disabled():
        print(f"\nheld-out nats per image: ours {ours.mean():.2f}, exact gradients {exact.mean():.2f}, scikit-learn")
        print(f"{others[best].mean():.2f} (learning rate, starts as ours: {best}), no couplings {uncoupled.mean():.2f}")

    def surplus(other: np.ndarray) -> tuple[float, float]:
        difference = ours - other
        return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))

    for name, other in (("scikit-learn", others[best]), ("exact gradients", exact)):
        mean, error = surplus(other)
        with capsys.disabled():
            print(f"ours - {name}: {mean:+.3f} +- {error:.3f}")
        assert mean > -3.0 * error
    mean, error = surplus(uncoupled)
    assert mean > 3.0 * error  # the gate can tell models apart
