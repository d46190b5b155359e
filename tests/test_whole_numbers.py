"""Block Gibbs with couplings rounded to whole numbers: when it is used, what it rounds, and the law that it samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from qbmscvi import graphs
from qbmscvi.ising import IsingModel
from qbmscvi.samplers import _gibbs, _whole_numbers
from qbmscvi.samplers._gibbs import gibbs_sweeps
from qbmscvi.samplers._whole_numbers import MAX_DIVERGENCE, WholeNumberChains, rounding_step

N_FIRST, N_SECOND = 130, 144


@pytest.fixture(autouse=True)
def fast_everywhere(monkeypatch):
    """The products are right on every processor; only where they are fast differs."""
    monkeypatch.setattr(_whole_numbers, "_is_fast_here", lambda: True)


def problem(scale: float = 0.1, n_first: int = N_FIRST, n_second: int = N_SECOND) -> IsingModel:
    rng = np.random.default_rng(0)
    graph = graphs.bipartite(n_first, n_second)
    h, J = rng.normal(size=graph.n_nodes), scale * rng.normal(size=graph.n_edges)
    return IsingModel(torch.tensor(h).float(), torch.tensor(J).float(), graph)


def random_spins(n: int, n_spins: int) -> torch.Tensor:
    return torch.where(torch.rand(n, n_spins, generator=torch.Generator().manual_seed(1)) < 0.5, 1.0, -1.0)


def test_fields_are_those_of_couplings_rounded_by_half_a_step_at_most():
    given, scale, beta = problem(), -2.0, 1.0
    step = rounding_step(given, beta)
    assert given.graph.n_edges * step**2 / 24.0 < MAX_DIVERGENCE
    block = given.J.view(N_FIRST, N_SECOND)
    rounded = torch.round(block / step).double() * step
    assert float((rounded - block).abs().max()) <= 0.501 * step
    state = random_spins(20, N_FIRST + N_SECOND)
    chains = WholeNumberChains(state, block, scale, step)
    assert torch.equal(chains.spins(), state)
    first, second = state.double().split((N_FIRST, N_SECOND), dim=1)
    base = torch.zeros(1)
    for k, fields in enumerate((second @ rounded.T, first @ rounded)):
        assert torch.allclose(chains.logits(k, base).double(), scale * fields, rtol=0, atol=1e-5)
        floats = (second @ block.double().T, first @ block.double())[k]
        assert not torch.allclose(scale * floats, scale * fields, rtol=0, atol=1e-6)  # the rounding is there to be seen


def z_scores(after: torch.Tensor, fields: torch.Tensor) -> torch.Tensor:
    """Of the number of spins up, given their fields."""
    mean = torch.tanh(-fields.double())
    return (after.double() - mean).sum(0) / (1.0 - mean.square()).sum(0).sqrt()


@pytest.mark.parametrize("error", [pytest.param(1.0, id="right"), pytest.param(1.02, id="couplings-off-by-2-percent")])
def test_each_class_is_drawn_given_the_other(error, monkeypatch):
    """Chi-square of all spins of either class, 40,000 chains from one state; alpha 1e-4, an error of 2 % is seen."""
    used = []

    class Chains(WholeNumberChains):
        def update(self, k, difference):
            used.append(k)
            super().update(k, difference)

    monkeypatch.setattr(_gibbs, "WholeNumberChains", Chains)
    given = problem()
    before = random_spins(1, given.n_spins).expand(40_000, -1)
    after = gibbs_sweeps(given, before, 1, 1.0, torch.Generator().manual_seed(2))
    assert used == [0, 1]
    block, (h_first, h_second) = error * given.J.view(N_FIRST, N_SECOND), given.h.split((N_FIRST, N_SECOND))
    first, second = after.split((N_FIRST, N_SECOND), dim=1)
    z = [z_scores(first, h_first + before[:, N_FIRST:] @ block.T), z_scores(second, h_second + first @ block)]
    p_values = [stats.chi2.sf(float(part.square().sum()), len(part)) for part in z]
    assert (min(p_values) > 1e-4) == (error == 1.0), p_values


@pytest.mark.parametrize(
    ("given", "beta"),
    [
        pytest.param(problem(n_first=100), 1.0, id="few-spins"),
        pytest.param(problem(scale=30.0), 1.0, id="rounding-to-be-seen"),
        pytest.param(problem(), 300.0, id="cold"),
        pytest.param(problem(scale=0.0), 1.0, id="no-couplings"),
        pytest.param(problem().to(torch.float64), 1.0, id="double-precision"),
        pytest.param(replace(problem(), factor=torch.ones(1, N_FIRST + N_SECOND)), 1.0, id="factor"),
        pytest.param(IsingModel(torch.zeros(8), torch.ones(28), graphs.complete(8)), 1.0, id="classes"),
    ],
)
def test_floats_are_used_elsewhere(given, beta):
    assert rounding_step(given, beta) is None
