"""The faster count likelihoods against scVI's, value by value and gradient by gradient."""

from __future__ import annotations

import warnings
from unittest.mock import patch

import numpy as np
import pytest
import scvi
import torch
from scvi.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from tables import over

from qbmscvi import QBMSCVI
from qbmscvi.datasets import synthetic_counts
from qbmscvi.module._sparse_likelihoods import (
    SparseNegativeBinomial,
    SparsePoisson,
    SparseZeroInflatedNegativeBinomial,
    with_sparse_log_prob,
)

N_CELLS, N_GENES, N_DRAWS = 6, 40, 3
COUNTS = torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 17.0, 500.0, 1e5])
THETA_SHAPES = {
    "gene": (N_GENES,),
    "gene, two axes": (1, N_GENES),
    "gene-cell": (N_CELLS, N_GENES),
    "scalar": (),
}
PAIRS = {
    "nb": (SparseNegativeBinomial, NegativeBinomial, ("mu", "theta")),
    "zinb": (SparseZeroInflatedNegativeBinomial, ZeroInflatedNegativeBinomial, ("mu", "theta", "zi_logits")),
    "poisson": (SparsePoisson, Poisson, ("rate",)),
}
every_likelihood = over("name", PAIRS)


def _parameters(dtype, theta_shape=(N_GENES,), draws=()) -> dict[str, torch.Tensor]:
    """Rates from 1e-6 to 1e5, dispersions from 1e-4 to 1e4, zero inflation from none to nearly certain."""
    generator = torch.Generator().manual_seed(0)
    shape = (*draws, N_CELLS, N_GENES)

    def uniform(size, low, high):
        return (low + (high - low) * torch.rand(size, generator=generator, dtype=torch.float64)).to(dtype)

    mu = torch.pow(10.0, uniform(shape, -6, 5))
    parameters = {
        "mu": mu,
        "rate": mu.clone(),
        "theta": torch.pow(10.0, uniform(theta_shape, -4, 4)),
        "zi_logits": uniform(shape, -40, 40),
    }
    return {key: value.requires_grad_() for key, value in parameters.items()}


def _counts(dtype) -> torch.Tensor:
    index = torch.randint(len(COUNTS), (N_CELLS, N_GENES), generator=torch.Generator().manual_seed(1))
    return COUNTS[index].to(dtype)


def _value_and_gradients(cls, names, parameters, counts):
    parameters = {name: parameters[name].detach().clone().requires_grad_() for name in names}
    value = cls(**parameters).log_prob(counts)
    # another weight for each entry, as from the mean over draws; a sum alone would hide entries that are swapped
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).view(value.shape).to(value)
    return value.detach(), torch.autograd.grad((weights * value).sum(), list(parameters.values()))


@every_likelihood
@over("theta_shape", THETA_SHAPES.values(), ids=THETA_SHAPES)
@over("draws", [(), (1,), (N_DRAWS,)], ids=["cells", "one draw", "draws"])
def test_value_and_gradients_are_those_of_scvi(name, theta_shape, draws):
    """In double precision; 1e-8 is what scVI's differences of logarithms lose at theta = 1e4."""
    ours, scvis, names = PAIRS[name]
    parameters, counts = _parameters(torch.float64, theta_shape, draws), _counts(torch.float64)
    value, gradients = _value_and_gradients(ours, names, parameters, counts)
    expected, expected_gradients = _value_and_gradients(scvis, names, parameters, counts)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-8)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-8)


@every_likelihood
def test_single_precision_is_no_worse_than_scvis(name):
    """Against scVI in double precision: largest error in units of rounding of the terms that are summed."""
    ours, scvis, names = PAIRS[name]
    parameters = _parameters(torch.float32)
    counts = _counts(torch.float32)
    exact = {key: value.detach().double() for key, value in parameters.items()}
    expected, expected_gradients = _value_and_gradients(scvis, names, exact, counts.double())
    errors = {}
    for cls in (ours, scvis):
        value, gradients = _value_and_gradients(cls, names, parameters, counts)
        assert {value.dtype, *(gradient.dtype for gradient in gradients)} == {torch.float32}
        pairs = zip([value, *gradients], [expected, *expected_gradients], strict=True)
        errors[cls] = [float(((got - want).abs() / (1.0 + want.abs())).max()) for got, want in pairs]
    for error, error_of_scvi in zip(errors[ours], errors[scvis], strict=True):
        assert error <= max(2.0 * error_of_scvi, 1e-6)


@over("is_inflated", [False, True], ids=["nb", "zinb"])
@over("theta_shape", THETA_SHAPES.values(), ids=THETA_SHAPES)
def test_gradient_is_that_of_finite_differences(is_inflated, theta_shape):
    generator = torch.Generator().manual_seed(2)

    def positive(shape):
        return (0.2 + 3 * torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    counts = torch.poisson(torch.full((N_CELLS, N_GENES), 0.5, dtype=torch.float64), generator=generator)
    inputs = [positive((N_CELLS, N_GENES)), positive(theta_shape)]
    if is_inflated:
        inputs.append((positive((N_CELLS, N_GENES)).detach() - 1.5).requires_grad_())

    def log_prob(mu, theta, *logits):
        if logits:
            return SparseZeroInflatedNegativeBinomial(mu=mu, theta=theta, zi_logits=logits[0]).log_prob(counts)
        return SparseNegativeBinomial(mu=mu, theta=theta).log_prob(counts)

    assert torch.autograd.gradcheck(log_prob, inputs, fast_mode=True)


@every_likelihood
def test_only_asked_gradients_are_computed(name):
    ours, _, names = PAIRS[name]
    counts = _counts(torch.float64)
    everything = _value_and_gradients(ours, names, _parameters(torch.float64), counts)[1]
    for i, wanted in enumerate(names):
        parameters = {key: _parameters(torch.float64)[key].requires_grad_(key == wanted) for key in names}
        value = ours(**parameters).log_prob(counts)
        weights = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).view(value.shape)
        (weights * value).sum().backward()
        assert torch.equal(parameters[wanted].grad, everything[i])
        assert all(parameters[other].grad is None for other in names if other != wanted)


@every_likelihood
@over("counts", [torch.zeros(4, 5), torch.full((4, 5), 3.0)], ids=["only zeros", "no zeros"])
def test_density_of_the_counts_does_not_matter(name, counts):
    ours, scvis, names = PAIRS[name]
    parameters = {key: torch.full((4, 5), 0.7) for key in names}
    with torch.inference_mode():
        torch.testing.assert_close(ours(**parameters).log_prob(counts), scvis(**parameters).log_prob(counts))


@every_likelihood
def test_counts_may_be_integers_and_of_another_precision(name):
    ours, scvis, names = PAIRS[name]
    parameters = {key: value.detach() for key, value in _parameters(torch.float64).items() if key in names}
    for dtype in (torch.int64, torch.float32):
        value = ours(**parameters).log_prob(_counts(dtype))
        assert value.dtype == scvis(**parameters).log_prob(_counts(dtype)).dtype
        expected = scvis(**parameters).log_prob(_counts(torch.float64))  # scVI rounds x! to the precision of x
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-8)


def test_parameters_of_two_precisions_are_promoted():
    """As under mixed precision, where the logits alone are in half precision."""
    parameters = {key: value.detach() for key, value in _parameters(torch.float32).items()}
    logits = parameters["zi_logits"].bfloat16().requires_grad_()
    px = SparseZeroInflatedNegativeBinomial(mu=parameters["mu"], theta=parameters["theta"], zi_logits=logits)
    value = px.log_prob(_counts(torch.float32))
    value.sum().backward()
    assert value.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16


@every_likelihood
def test_counts_may_have_more_axes_than_the_parameters(name):
    ours, scvis, names = PAIRS[name]
    parameters = {key: torch.full((5,), 0.7, dtype=torch.float64) for key in names}
    counts = torch.arange(60.0, dtype=torch.float64).view(3, 4, 5) % 3
    torch.testing.assert_close(ours(**parameters).log_prob(counts), scvis(**parameters).log_prob(counts))


@over("bad", [-1.0, 0.5, float("nan")])
def test_values_that_are_no_counts_meet_what_scvi_does(bad):
    parameters = {key: torch.full((5,), 0.7) for key in ("mu", "theta", "zi_logits", "rate")}
    value = torch.tensor([0.0, 1.0, bad, 0.0, 2.0])
    px = SparseZeroInflatedNegativeBinomial(**{key: parameters[key] for key in ("mu", "theta", "zi_logits")})
    expected = ZeroInflatedNegativeBinomial(**{key: parameters[key] for key in ("mu", "theta", "zi_logits")})
    with pytest.warns(UserWarning, match="within the support"):
        got = px.log_prob(value)
    with pytest.warns(UserWarning, match="within the support"):
        torch.testing.assert_close(got, expected.log_prob(value), equal_nan=True)
    with pytest.raises(ValueError, match="within the support"):
        SparsePoisson(parameters["rate"]).log_prob(value)
    with pytest.warns(UserWarning, match="within the support"):
        SparseNegativeBinomial(mu=parameters["mu"], theta=parameters["theta"], validate_args=True).log_prob(value)


@every_likelihood
def test_gradient_to_the_counts_is_scvis(name):
    ours, scvis, names = PAIRS[name]
    parameters = {key: torch.full((5,), 0.7, dtype=torch.float64) for key in names}
    gradients = []
    for cls in (ours, scvis):
        counts = torch.tensor([0.0, 1.0, 2.0, 0.0, 9.0], dtype=torch.float64, requires_grad=True)
        gradients += torch.autograd.grad(cls(**parameters).log_prob(counts).sum(), counts)
    assert torch.equal(*gradients)


def test_compiled_code_gives_the_same():
    parameters, counts = _parameters(torch.float64), _counts(torch.float64)

    def log_prob(mu, theta, zi_logits):
        return SparseZeroInflatedNegativeBinomial(mu=mu, theta=theta, zi_logits=zi_logits).log_prob(counts).sum()

    inputs = [parameters[key] for key in ("mu", "theta", "zi_logits")]
    compiled = torch.compile(log_prob, backend="aot_eager")
    expected = torch.autograd.grad(log_prob(*inputs), inputs)
    for gradient, wanted in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_everything_but_log_prob_is_scvis():
    parameters = {key: value.detach() for key, value in _parameters(torch.float32).items()}
    scale = torch.rand(N_CELLS, N_GENES)
    for name, (ours, scvis, names) in PAIRS.items():
        px = scvis(**{key: parameters[key] for key in names}, scale=scale)
        sparse = with_sparse_log_prob(px)
        assert type(sparse) is ours, name
        assert isinstance(sparse, scvis)
        for attribute in ("mean", "variance", "scale", *names):
            assert torch.equal(getattr(sparse, attribute), getattr(px, attribute)), (name, attribute)
        draws = []
        for distribution in (px, sparse):
            torch.manual_seed(0)
            draws.append(distribution.sample((2,)))
        assert torch.equal(*draws)
    normal = scvi.distributions.Normal(parameters["mu"], parameters["mu"], normal_mu=parameters["mu"])
    ours = with_sparse_log_prob(normal)
    assert isinstance(ours, scvi.distributions.Normal)
    for key in ("mu", "scale"):
        assert torch.equal(ours.get_normalized(key), normal.get_normalized(key))
    assert torch.equal(ours.stddev, normal.stddev)


@pytest.mark.parametrize(
    ("gene_likelihood", "dispersion"),
    [("zinb", "gene"), ("zinb", "gene-cell"), ("zinb", "gene-batch"), ("zinb", "gene-label"), ("nb", "gene")]
    + [("poisson", "gene")],
)
def test_training_gives_the_losses_that_scvis_likelihood_gives(gene_likelihood, dispersion):
    """In double precision where scVI can train in it, elsewhere with an epsilon that keeps Adam from making full steps
    of rounding errors."""
    adata = synthetic_counts(300, 60, seed=0)
    adata.obs["label"] = np.arange(adata.n_obs) % 3
    QBMSCVI.setup_anndata(adata, batch_key="batch", labels_key="label")
    is_single = dispersion in ("gene-batch", "gene-label")
    precision, tolerance, eps = ("32-true", 1e-6, 0.01) if is_single else ("64-true", 1e-7, 1e-8)
    losses, shapes = [], set()

    def train():
        scvi.settings.seed = 0
        model = QBMSCVI(adata, n_latent=8, gene_likelihood=gene_likelihood, dispersion=dispersion)
        settings = {"precision": precision, "accelerator": "cpu", "enable_progress_bar": False}
        settings["plan_kwargs"] = {"eps": eps}
        model.train(max_epochs=3, check_val_every_n_epoch=1, fit_prior=False, **settings)
        return np.stack([model.history[key].to_numpy(float) for key in ("elbo_train", "elbo_validation")])

    def spy(px, theta):
        shapes.add(None if theta is None else tuple(theta.shape))
        return px

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses.append(train())
        with patch("qbmscvi.module._qbmvae.with_sparse_log_prob", spy):
            losses.append(train())
    np.testing.assert_allclose(losses[0], losses[1], rtol=tolerance)
    assert shapes == ({(60,)} if dispersion == "gene" else {None})
