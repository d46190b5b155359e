"""The gradient of the whole training objective against the one obtained by summing over all spin states.

The objective of the discrete model is ``E_q[-log p(x | s)] + w KL(q || p)``. For a tiny network the mean over the spins
is a sum over ``2**n_spins`` states, and autograd gives its exact gradient to every parameter. The stochastic gradient
of the module is averaged over many draws and compared:

- ``straight-through`` (hard spins forward): unbiased for decoder and prior;
- ``gumbel`` and ``spike-exponential``: their own objectives; the distance to the discrete one is printed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from oracles import set_exact_moments
from scvi.module._constants import MODULE_KEYS

from qbmscvi.boltzmann.enumeration import all_states
from qbmscvi.module._qbmvae import QBMVAE

if TYPE_CHECKING:
    import pytest

N_GENES, N_CELLS, KL_WEIGHT = 5, 3, 0.7
# Root-mean-square z-score of the unbiased estimator over 30 seeds, 2 groups and 200 draws: mean 1.0,
# largest 2.6. The planted bias of `test_a_biased_estimator_fails_the_same_gate` gives 9 and 17.
Z_LIMIT = 3.0
GROUPS = {"encoder": "z_encoder", "decoder": ("decoder", "px_r"), "prior": "prior"}


def build(smoothing: str) -> tuple[QBMVAE, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    module = QBMVAE(
        N_GENES,
        n_batch=1,
        n_labels=1,
        n_hidden=6,
        n_latent=4,
        dropout_rate=0.0,
        use_batch_norm="none",
        gene_likelihood="nb",
        smoothing=smoothing,
        n_chains=16,
    ).double()
    with torch.no_grad():
        for parameter in module.prior.parameters():
            parameter.normal_(0.0, 0.4)
        for layer in (module.z_encoder.logit_encoder, module.decoder.px_decoder.fc_layers[0][0]):
            layer.weight.mul_(3.0)  # a decoder far from linear in the spins
    set_exact_moments(module.prior)
    counts = torch.from_numpy(np.random.default_rng(0).poisson(6.0, (N_CELLS, N_GENES)) + 1).double()
    zeros = torch.zeros(N_CELLS, 1, dtype=torch.long)
    return module.train(), {"X": counts, "batch": zeros, "labels": zeros}


def gradients(module: QBMVAE, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = [(name, p) for name, p in module.named_parameters() if p.numel()]
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: grad for (name, _), grad in zip(named, grads, strict=True) if grad is not None}


def sampled_loss(module: QBMVAE, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return module(tensors, loss_kwargs={"kl_weight": KL_WEIGHT})[2].loss


def enumerated_loss(module: QBMVAE, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The objective with the spins summed out."""
    inputs = module._get_inference_input(tensors)
    outputs = module.inference(**inputs)
    qz = outputs[MODULE_KEYS.QZ_KEY]
    states = all_states(module.prior.n_visible)
    repeated = {key: value.repeat(len(states), 1) for key, value in tensors.items()}
    inner = {
        MODULE_KEYS.Z_KEY: states.repeat_interleave(N_CELLS, dim=0),  # (n_states * n_cells, n_spins), cells fastest
        MODULE_KEYS.LIBRARY_KEY: outputs[MODULE_KEYS.LIBRARY_KEY].repeat(len(states), 1),
    }
    px = module.generative(**module._get_generative_input(repeated, inner))[MODULE_KEYS.PX_KEY]
    log_q = torch.nn.functional.logsigmoid(states[:, None] * qz.logits).sum(-1)  # (n_states, n_cells)
    log_p = px.log_prob(repeated["X"]).sum(-1).view(len(states), N_CELLS)
    total = -(log_q.exp() * log_p).sum(0)
    kl = torch.distributions.kl_divergence(qz, module.prior.distribution()).sum(-1)
    return (total + KL_WEIGHT * kl).mean()


def compare(smoothing: str, n_draws: int = 400, seed: int = 1) -> dict[str, tuple[float, float, float]]:
    """Per parameter group: distance to the enumerated gradient as a share of its norm, its standard error, z.

    ``z`` is the root mean square of the z-scores of all entries; entries are correlated, so its spread under the null
    was measured: see :data:`Z_LIMIT`.
    """
    module, tensors = build(smoothing)
    torch.manual_seed(seed)
    total: dict[str, torch.Tensor] = {}
    square: dict[str, torch.Tensor] = {}
    exact = gradients(module, enumerated_loss(module, tensors))
    for _ in range(n_draws):
        got = gradients(module, sampled_loss(module, tensors))
        for name in got.keys() & exact.keys():
            difference = got[name] - exact[name]
            total[name] = total.get(name, 0.0) + difference / n_draws
            square[name] = square.get(name, 0.0) + difference.square() / n_draws
    result = {}
    for group, prefix in GROUPS.items():
        names = sorted(name for name in total if name.startswith(prefix))
        mean, second, want = (torch.cat([table[name].ravel() for name in names]) for table in (total, square, exact))
        variance = (second - mean.square()).clamp(min=0.0) / n_draws
        varies = variance > 1e-20
        z = float((mean[varies].square() / variance[varies]).mean().sqrt())
        result[group] = (float(mean.norm() / want.norm()), float(variance.sum().sqrt() / want.norm()), z)
    return result


def test_prior_gradient_of_the_objective_is_exact() -> None:
    """Given exact moments the prior's gradient has no variance, and equals the enumerated one."""
    module, tensors = build("straight-through")
    got = gradients(module, sampled_loss(module, tensors))
    want = gradients(module, enumerated_loss(module, tensors))
    for name in ("prior.h", "prior.J"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9)


def test_hard_spins_are_unbiased_for_the_decoder() -> None:
    """The z-score stays below :data:`Z_LIMIT`, at a resolution of a third of the gradient's norm or better."""
    bias, error, z = compare("straight-through")["decoder"]
    print(f"straight-through, decoder: distance {bias:.4f} ± {error:.4f} of the gradient's norm, z {z:.2f}")
    assert error < 0.3
    assert z < Z_LIMIT


def test_a_biased_estimator_fails_the_same_gate() -> None:
    """The gate has power: the straight-through gradient of the encoder is biased and is found out."""
    _, _, z = compare("straight-through")["encoder"]
    print(f"straight-through, encoder: z {z:.1f}")
    assert z > Z_LIMIT


def test_bias_of_the_relaxed_estimators_is_reported(capsys: pytest.CaptureFixture) -> None:
    """Gumbel comes closer to the discrete gradient than straight-through; all distances are printed."""
    rows = {}
    for smoothing in ("straight-through", "gumbel", "spike-exponential"):
        rows[smoothing] = compare(smoothing)["encoder"]
    with capsys.disabled():
        print("\nencoder gradient, distance to the enumerated one as a share of its norm (and standard error):")
        for smoothing, (bias, error, _) in rows.items():
            print(f"  {smoothing:18s} {bias:.3f} ± {error:.3f}")
    assert rows["gumbel"][0] + 3 * rows["gumbel"][1] < rows["straight-through"][0]
