"""What the Boltzmann prior costs beside the rest of a training step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cost import FAMILIES, measure

pytestmark = pytest.mark.slow


@pytest.fixture
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.parametrize("family", FAMILIES)
def test_prior_costs_a_tenth_of_a_training_step_and_the_layer_above_the_sampler_little(family, one_thread, capsys):
    """Shares of whole epochs' CPU time, median of 11 epochs of one run; 2,000 genes, batch 128, one thread.

    The goals, 8 % and 1 %, are missed since chains move at every second step and there are hidden spins: 10.2 to 10.5 %
    and 1.5 % on an idle machine. Gates leave a fifth to the machine.
    """
    cost = measure(family)
    assert {values.shape for values in cost.seconds.values()} == {(11, 20)}
    assert np.all(cost.seconds["sweeps"].sum(1) > 0)  # or the sweeps that are not the layer's were not seen
    assert np.all(cost.seconds["kl"] > 0)
    parts = ("sampling", "sweeps", "moments", "tracking", "layer", "kl")
    shares = ", ".join(f"{part} {100 * cost.share(part)[0]:.2f}" for part in parts)
    with capsys.disabled():
        print(f"\n{family}: step {1e3 * cost.median('step'):.1f} ms; % of it: {shares}")
    assert cost.share("sampling", "kl")[0] < 0.125
    assert cost.share("layer")[0] < 0.018
