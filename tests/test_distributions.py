r"""The factorial posterior and the three relaxations of a spin.

Gradients are compared in expectation, without sampling where that is possible: the uniform noise that leads to each
corner of the cube is fed in and weighted with the corner's probability (straight-through), or integrated by
quadrature (Gumbel, spike-and-exponential). The exact gradient of :math:`E_q f(s)` is the derivative of the sum over
all corners; for a decoder that is a polynomial it does not depend on how the decoder continues between them, while
the estimators do.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from oracles import binomial_p_value
from scipy import special, stats
from scvi.nn import Encoder
from tables import over
from torch.nn.functional import logsigmoid

from qbmscvi.boltzmann.enumeration import all_states
from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.boltzmann.smoothing import Gumbel, SpikeExponential, StraightThrough, build_smoothing
from qbmscvi.module._encoder import BoltzmannEncoder

SMOOTHINGS = {
    "straight-through": StraightThrough(),
    "gumbel": Gumbel(temperature=0.4),
    "spike-exponential": SpikeExponential(sharpness=3.5),
}
each_smoothing = over("smoothing", [pytest.param(s, id=name) for name, s in SMOOTHINGS.items()])
each_dtype = over("dtype", [torch.float64, torch.float32], ids=str)
LOGITS = torch.tensor([-1.7, -0.4, 0.3, 2.2], dtype=torch.float64)


def posterior(n_spins=3, batch=(4,), dtype=torch.float64, smoothing=None, seed=0):
    logits = 1.5 * np.random.default_rng(seed).normal(size=(*batch, n_spins))
    return FactorialPosterior(torch.tensor(logits, dtype=dtype), smoothing)


# The posterior -----------------------------------------------------------------------------------------------------


@each_dtype
def test_log_prob_and_entropy_are_those_of_bernoulli(dtype):
    q = posterior(dtype=dtype)
    bernoulli = torch.distributions.Bernoulli(logits=q.logits)
    torch.manual_seed(1)
    s = q.sample((5,))
    assert torch.allclose(q.log_prob(s), bernoulli.log_prob((s + 1) / 2), rtol=1e-6)
    assert torch.allclose(q.entropy(), bernoulli.entropy(), rtol=1e-5)
    assert torch.allclose(q.mean, 2 * bernoulli.mean - 1, rtol=1e-5, atol=1e-6)
    assert torch.allclose(q.variance, 4 * bernoulli.variance, rtol=1e-5)
    assert torch.equal(q.loc, q.mean)
    assert torch.equal(q.scale, q.variance.sqrt())


def test_posterior_is_normalized_and_its_sums_over_states_match():
    q = posterior(n_spins=4, batch=(3,))
    states = all_states(4)[:, None].expand(-1, 3, -1)
    p = q.log_prob(states).sum(-1).exp()  # (16, 3)
    assert torch.allclose(p.sum(0), torch.ones(3, dtype=torch.float64), rtol=1e-14)
    mean = (p[..., None] * states).sum(0)
    assert torch.allclose(q.mean, mean, rtol=0, atol=1e-14)
    assert torch.allclose(q.variance, (p[..., None] * (states - mean) ** 2).sum(0), rtol=0, atol=1e-14)
    assert torch.allclose(q.entropy().sum(-1), -(p * p.log()).sum(0), rtol=1e-13)


@over("magnitude", [pytest.param(40.0, id="40"), pytest.param(500.0, id="500")])
@each_dtype
def test_saturated_logits_stay_finite_with_their_gradients(dtype, magnitude):
    logits = torch.tensor([[-magnitude, 0.0, magnitude]], dtype=dtype, requires_grad=True)
    q = FactorialPosterior(logits)
    likely = torch.tensor([[-1.0, 1.0, 1.0]], dtype=dtype)
    assert torch.allclose(q.log_prob(likely), torch.tensor([[0.0, -math.log(2), 0.0]], dtype=dtype))
    assert torch.allclose(q.log_prob(-likely)[0, ::2], torch.tensor(-magnitude, dtype=dtype))
    assert torch.allclose(q.entropy(), torch.tensor([[0.0, math.log(2), 0.0]], dtype=dtype), atol=1e-10)
    assert (q.variance[0, ::2] >= 0).all()
    (gradient,) = torch.autograd.grad(q.entropy().sum() + q.log_prob(likely).sum(), logits)
    assert gradient.isfinite().all()


def test_variance_of_a_nearly_saturated_spin_does_not_cancel():
    logits = torch.tensor([20.0])  # 1 - tanh(10)**2 is zero in float32
    variance = FactorialPosterior(logits).variance
    assert math.isclose(variance, 4 * math.exp(-20), rel_tol=1e-6)


def test_entropy_gradient_is_exact_on_both_sides_of_zero():
    logits = torch.tensor([-2.0, -1e-3, 0.0, 0.7, 3.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(FactorialPosterior(logits).entropy().sum(), logits)
    expected = -logits * torch.sigmoid(logits) * torch.sigmoid(-logits)
    assert torch.allclose(gradient, expected.detach(), rtol=0, atol=1e-14)


@each_dtype
def test_samples_have_the_stated_distribution(dtype):
    """Mean spins by exact binomial, alpha 1e-4 after Bonferroni; and no correlation."""
    q, n = posterior(5, batch=(), dtype=dtype), 40_000
    torch.manual_seed(2)
    s = q.sample((n,)).double().numpy()
    assert set(np.unique(s)) == {-1.0, 1.0}
    assert not q.sample().requires_grad
    assert binomial_p_value((s > 0).sum(0), n, torch.sigmoid(q.logits).double().numpy()).min() > 1e-4 / 5
    assert abs(np.corrcoef(s.T)[np.triu_indices(5, 1)]).max() < 5 / math.sqrt(n)


def test_draws_have_the_shape_of_the_samples_before_that_of_the_logits():
    q = posterior()
    assert q.batch_shape == (4, 3)
    assert q.sample((2, 3)).shape == q.rsample((2, 3)).shape == (2, 3, 4, 3)


# Forward distributions of the relaxations -----------------------------------------------------------------------------


def relaxed(smoothing, n=20_000, seed=4):
    uniform = torch.tensor(np.random.default_rng(seed).random((n, 4)))
    return smoothing.relax(LOGITS.expand(n, -1), uniform).numpy()


def test_straight_through_draws_spins_of_the_posterior():
    """Alpha 1e-4 after Bonferroni over the spins."""
    zeta = relaxed(StraightThrough())
    assert np.abs(np.abs(zeta) - 1).max() < 1e-15
    p = binomial_p_value((zeta > 0).sum(0), len(zeta), special.expit(LOGITS.numpy()))
    assert p.min() > 1e-4 / 4


@each_dtype
def test_straight_through_is_exactly_plus_or_minus_one(dtype):
    torch.manual_seed(5)
    zeta = StraightThrough().relax(torch.randn(10_000, dtype=dtype), torch.rand(10_000, dtype=dtype))
    assert (zeta.abs() == 1).all()


def test_gumbel_follows_the_concrete_distribution():
    """Kolmogorov-Smirnov against the closed form of the distribution function; alpha 1e-4 over four spins."""
    zeta, temperature = relaxed(SMOOTHINGS["gumbel"]), 0.4
    for i, logit in enumerate(LOGITS.tolist()):

        def cdf(z, logit=logit):
            return special.expit(2 * temperature * np.arctanh(np.clip(z, -1, 1)) - logit)

        assert stats.kstest(zeta[:, i], cdf).pvalue > 1e-4 / 4


def spike_cdf(zeta, sharpness=3.5):
    """Distribution function of zeta above the spike."""
    return np.expm1(sharpness * (zeta + 1) / 2) / np.expm1(sharpness)


def test_spike_exponential_follows_the_mixture_distribution():
    """Binomial for the spike, Kolmogorov-Smirnov above it; alpha 1e-4 over eight tests."""
    zeta = relaxed(SMOOTHINGS["spike-exponential"])
    for i, q in enumerate(special.expit(LOGITS.numpy())):
        above = zeta[zeta[:, i] > -1, i]
        assert binomial_p_value(len(above), len(zeta), q) > 1e-4 / 8
        assert stats.kstest(above, spike_cdf).pvalue > 1e-4 / 8


def test_spike_exponential_emits_the_distribution_it_was_trained_with():
    spins = torch.tensor(np.random.default_rng(6).choice([-1.0, 1.0], size=30_000))
    zeta = SMOOTHINGS["spike-exponential"].emit(spins, torch.tensor(np.random.default_rng(7).random(30_000)))
    assert (zeta[spins < 0] == -1).all()
    assert stats.kstest(zeta[spins > 0].numpy(), spike_cdf).pvalue > 1e-4


@over("magnitude", [pytest.param(30.0, id="30"), pytest.param(300.0, id="300")])
@each_smoothing
@each_dtype
def test_relaxations_stay_finite_and_in_range_at_extreme_logits_and_noise(dtype, smoothing, magnitude):
    logits = torch.tensor([-magnitude, 0.0, magnitude], dtype=dtype).repeat_interleave(3).requires_grad_()
    tiny, largest = torch.finfo(dtype).tiny, 1 - torch.finfo(dtype).eps / 2
    zeta = smoothing.relax(logits, torch.tensor([tiny, 0.5, largest], dtype=dtype).repeat(3))
    assert zeta.isfinite().all()
    assert torch.autograd.grad(zeta.sum(), logits)[0].isfinite().all()
    assert (zeta.abs() <= 1 + torch.finfo(dtype).eps).all()


@each_smoothing
@each_dtype
def test_hard_spins_come_back_from_what_the_decoder_saw(dtype, smoothing):
    torch.manual_seed(8)
    spins = torch.where(torch.rand(50, 6) < 0.5, 1.0, -1.0).to(dtype)
    zeta = smoothing.emit(spins, torch.rand(50, 6, dtype=dtype))
    assert zeta.dtype == dtype
    assert torch.equal(smoothing.recover(zeta), spins)


def test_hard_spins_come_back_even_from_a_uniform_of_zero():
    """torch.rand returns zero once in 2**24 float32 draws; rsample guards against it, z_transformation does not."""
    smoothing = SpikeExponential()
    assert torch.equal(smoothing.recover(smoothing.emit(torch.ones(1), torch.zeros(1))), torch.ones(1))


@each_smoothing
def test_encoder_undoes_its_own_transformation(smoothing):
    encoder = BoltzmannEncoder(Encoder(5, 4, n_layers=1, n_hidden=6), 3, smoothing)
    torch.manual_seed(9)
    s = posterior(batch=(20,)).sample()
    assert torch.equal(encoder.recover(encoder.z_transformation(s)), s)


@each_smoothing
def test_posterior_relaxes_its_spins_with_its_smoothing(smoothing):
    q = posterior(smoothing=smoothing)
    torch.manual_seed(10)
    zeta = q.rsample((6,))
    torch.manual_seed(10)
    uniform = torch.rand(6, 4, 3, dtype=torch.float64)
    assert torch.equal(zeta, smoothing.relax(q.logits.expand(6, -1, -1), uniform))


# Gradients in expectation ------------------------------------------------------------------------------------------


def exact_gradient(f, logits=LOGITS):
    """Derivative of the sum of q(s) f(s) over all corners."""
    logits = logits.clone().requires_grad_()
    states = all_states(len(logits))
    value = (logsigmoid(states * logits).sum(-1).exp() * f(states)).sum()
    return torch.autograd.grad(value, logits)[0]


def mean_gradient(smoothing, f, logits=LOGITS):
    """Expectation of a hard relaxation's gradient: one noise value per corner, weighted with its probability."""
    states = all_states(len(logits))
    rows = logits.expand(len(states), -1).clone().requires_grad_()
    zeta = smoothing.relax(rows, torch.where(states > 0, 1e-12, 1 - 1e-12).double())
    assert torch.allclose(zeta, states, rtol=0, atol=1e-14)
    gradient = torch.autograd.grad(f(zeta).sum(), rows)[0]
    return logsigmoid(states * logits).sum(-1).exp() @ gradient


def multilinear(s):
    return 0.7 * s[..., 0] * s[..., 1] - 1.3 * s[..., 1] * s[..., 2] * s[..., 3] + s @ LOGITS + 2.0


def quadratic(s):
    """Degree two in each spin, with products: (s_i - c_i)^2 terms, and two of them multiplied."""
    square = (s - torch.tensor([0.6, -0.9, 0.2, 1.4], dtype=torch.float64)) ** 2
    return square @ LOGITS + 0.8 * square[..., 0] * square[..., 2] + multilinear(s)


def poisson_decoder(seed, weight_scale=0.5):
    """Negative log-likelihood of six counts, rates log-linear in the spins: the shape of a count decoder."""
    rng = np.random.default_rng(seed)
    weight, bias = weight_scale * torch.tensor(rng.normal(size=(6, 4))), 0.5 * torch.tensor(rng.normal(size=6))
    counts = torch.tensor(rng.poisson(2.0, size=6), dtype=torch.float64)

    def f(s):
        log_rate = s @ weight.T + bias
        return (log_rate.exp() - counts * log_rate).sum(-1)

    return f


@pytest.mark.parametrize(
    ("f", "is_unbiased"),
    [pytest.param(multilinear, True, id="linear"), pytest.param(quadratic, False, id="quadratic")],
)
def test_straight_through_is_unbiased_for_linear_decoders_and_no_others(f, is_unbiased):
    bias = (mean_gradient(StraightThrough(), f) - exact_gradient(f)).abs().max()
    assert bias < 1e-12 if is_unbiased else bias > 0.05


def bias_of(smoothing, f):
    return float((mean_gradient(smoothing, f) - exact_gradient(f)).norm())


def test_bias_of_straight_through_is_of_second_order_in_the_weights():
    """The order in the decoder's weights, from halving them."""
    decoders = [(poisson_decoder(seed, 0.02), poisson_decoder(seed, 0.01)) for seed in range(6)]
    ratios = [bias_of(StraightThrough(), wide) / bias_of(StraightThrough(), narrow) for wide, narrow in decoders]
    assert np.allclose(ratios, 4.0, rtol=0.05)  # the next order is 2 % of the first at these weights


def smooth(s):
    """Two spins, neither linear nor additive."""
    return torch.exp(0.6 * s[..., 0] - 0.3 * s[..., 1]) + torch.cos(s[..., 0] * s[..., 1] + 0.4 * s[..., 1])


def relaxed_gradient(smoothing, logits, nodes, weights):
    """Gradient of the relaxed objective as ``relax`` gives it, noise integrated on a product grid."""
    grid = torch.tensor(list(itertools.product(range(len(nodes[0])), range(len(nodes[1])))))
    uniform = torch.stack([nodes[i][grid[:, i]] for i in range(2)], dim=1)
    weight = weights[0][grid[:, 0]] * weights[1][grid[:, 1]]
    rows = logits.expand(len(grid), -1).clone().requires_grad_()
    gradient = torch.autograd.grad(smooth(smoothing.relax(rows, uniform)).sum(), rows)[0]
    return weight @ gradient


PAIRS = [
    pytest.param((-0.4, 2.2), id="mixed"),
    pytest.param((0.0, 0.0), id="even"),
    pytest.param((3.0, -1.7), id="far"),
]


@over("pair", PAIRS)
@over("temperature", [pytest.param(0.4, id="T-0.4"), pytest.param(1.0, id="T-1")])
def test_gumbel_is_unbiased_for_its_relaxed_objective(temperature, pair):
    """Against the score function's form of the same gradient, which does not differentiate the decoder."""
    logits = torch.tensor(pair, dtype=torch.float64)
    # The trapezoid rule in the noise's own logit converges geometrically. Beyond 30 the uniform rounds to one.
    x = torch.linspace(-30, 30, 601, dtype=torch.float64)
    density = torch.sigmoid(x) * torch.sigmoid(-x) * 0.1
    found = relaxed_gradient(Gumbel(temperature), logits, [torch.sigmoid(x)] * 2, [density] * 2)
    score = torch.tanh(0.5 * x) * density
    zeta = [torch.tanh(0.5 * (logit + x) / temperature) for logit in logits]
    table = smooth(torch.stack(torch.meshgrid(*zeta, indexing="ij"), dim=-1))
    expected = torch.stack([score @ table @ density, density @ table @ score])
    assert torch.allclose(found, expected, rtol=0, atol=1e-8)


@over("pair", PAIRS)
@over("sharpness", [pytest.param(1.0, id="sharpness-1"), pytest.param(5.0, id="sharpness-5")])
def test_spike_exponential_is_unbiased_for_its_own_model(sharpness, pair):
    """d/dl of (1 - q) f(spike) + q E f(slab) is q (1 - q) (E f(slab) - f(spike)): again without derivatives of f."""
    logits = torch.tensor(pair, dtype=torch.float64)
    q = torch.sigmoid(logits)
    x, w = (torch.tensor(values) for values in np.polynomial.legendre.leggauss(150))
    unit, weight = 0.5 * (x + 1), 0.5 * w  # on [0, 1]
    nodes = [torch.cat([(0.5 * (1 - p))[None], 1 - p + p * unit]) for p in q]
    weights = [torch.cat([(1 - p)[None], p * weight]) for p in q]
    found = relaxed_gradient(SpikeExponential(sharpness), logits, nodes, weights)

    slab = weight * sharpness * torch.exp(sharpness * unit) / math.expm1(sharpness)  # density on [0, 1]
    zeta = torch.cat([torch.tensor([-1.0]).double(), 2 * unit - 1])
    table = smooth(torch.stack(torch.meshgrid(zeta, zeta, indexing="ij"), dim=-1))
    distribution = [torch.cat([(1 - p)[None], p * slab]) for p in q]
    slope = [p * (1 - p) * torch.cat([torch.tensor([-1.0]).double(), slab]) for p in q]
    expected = torch.stack([slope[0] @ table @ distribution[1], distribution[0] @ table @ slope[1]])
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)


def test_colder_gumbel_has_less_bias_for_the_discrete_objective_and_more_variance():
    """Bias and variance of every relaxation on one count decoder, 200,000 draws; run with -s for the table."""
    f, n = poisson_decoder(1), 200_000
    exact = exact_gradient(f)
    torch.manual_seed(11)
    table = {}
    for name, smoothing in [
        ("straight-through", StraightThrough()),
        ("gumbel T=1", Gumbel(1.0)),
        ("gumbel T=0.5", Gumbel(0.5)),
        ("gumbel T=0.2", Gumbel(0.2)),
        ("spike-exponential 4", SpikeExponential(4.0)),
    ]:
        uniform = torch.rand(n, 4, dtype=torch.float64)
        rows = LOGITS.expand(n, -1).clone().requires_grad_()
        gradient = torch.autograd.grad(f(smoothing.relax(rows, uniform)).sum(), rows)[0]
        variance = gradient.var(0).sum()
        # E |mean - exact|^2 is |bias|^2 plus the variance of the mean.
        square = (gradient.mean(0) - exact).square().sum() - variance / n
        table[name] = math.sqrt(max(square, 0)), float(variance), math.sqrt(variance / n)
    print(f"\n|exact gradient| = {exact.norm():.3f}\n{'':20s} |bias|   variance  standard error")
    for name, (bias, variance, error) in table.items():
        print(f"{name:20s} {bias:6.3f} {variance:10.3f} {error:8.4f}")
    for hot, cold in (("gumbel T=1", "gumbel T=0.5"), ("gumbel T=0.5", "gumbel T=0.2")):
        assert table[hot][0] - table[cold][0] > 5 * math.hypot(table[hot][2], table[cold][2])
        assert table[cold][1] > 1.5 * table[hot][1]
    bias, _, error = table["straight-through"]
    assert abs(bias - bias_of(StraightThrough(), f)) < 5 * error


# Construction ------------------------------------------------------------------------------------------------------


@over(
    ("name", "kind"),
    [
        pytest.param("straight-through", StraightThrough, id="straight-through"),
        pytest.param("gumbel", Gumbel, id="gumbel"),
        pytest.param("spike-exponential", SpikeExponential, id="spike-exponential"),
    ],
)
def test_smoothings_are_built_by_name_and_passed_through(name, kind):
    smoothing = build_smoothing(name)
    assert smoothing == kind()
    assert build_smoothing(smoothing) is smoothing


@over(
    ("build", "error", "match"),
    [
        pytest.param(lambda: Gumbel(0.0), ValueError, "temperature=0.0", id="temperature-zero"),
        pytest.param(lambda: Gumbel(math.nan), ValueError, "temperature=nan", id="temperature-nan"),
        pytest.param(lambda: SpikeExponential(-1.0), ValueError, "sharpness=-1.0", id="sharpness"),
        pytest.param(
            lambda: build_smoothing("softmax"), ValueError, "Unknown smoothing 'softmax'.*'gumbel'", id="name"
        ),
        pytest.param(lambda: build_smoothing(Gumbel), TypeError, "got ABCMeta", id="class"),
        pytest.param(lambda: build_smoothing(0.5), TypeError, "got float", id="number"),
    ],
)
def test_smoothings_refuse(build, error, match):
    with pytest.raises(error, match=match):
        build()
