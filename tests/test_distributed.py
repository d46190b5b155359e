"""Training in two processes: equal models, one request to the sampler, and no process left waiting."""

from __future__ import annotations

import pytest
import torch
from processes import run_script

pytestmark = pytest.mark.slow  # nine trainings in two processes

N_STEPS = 8  # two epochs of 216 cells on two ranks, in batches of 32
CASES = ("local", "remote", "failing")
DIVERGING = ("refused-on-one-rank", "nan-on-one-rank", "infinite-on-one-rank")


@pytest.fixture(scope="module")
def dumps(tmp_path_factory) -> dict[str, tuple[dict, dict]]:
    """What both ranks wrote down, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    run_script("ranks.py", folder, timeout=240)
    names = (*CASES, *DIVERGING, "fitted", "resumed", "unshared")
    return {name: tuple(torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)) for name in names}


def unequal(first: dict, second: dict) -> list[str]:
    return [name for name, value in first["state"].items() if not torch.equal(value, second["state"][name])]


@pytest.mark.parametrize("case", CASES)
def test_ranks_end_with_bit_equal_models(dumps, case):
    first, second = dumps[case]
    assert first["error"] is second["error"] is None
    assert unequal(first, second) == []
    assert first["advice"] == second["advice"] == []
    assert int(first["state"]["prior.n_updates"]) == first["n_steps"] == second["n_steps"] == N_STEPS


def test_rank_0_fits_the_prior_for_all(dumps):
    first, second = dumps["fitted"]
    assert unequal(first, second) == []
    changed = unequal(first, dumps["local"][0])
    assert "prior.J" in changed
    assert all(name.startswith("prior.") for name in changed)
    assert first["n_calls"] > N_STEPS
    assert second["n_calls"] == 0


def test_resumed_ranks_equal_uninterrupted_ones(dumps):
    for whole, resumed in zip(dumps["local"], dumps["resumed"], strict=True):
        assert unequal(whole, resumed) == []
        assert torch.equal(resumed["cells"], whole["cells"][108:])
    assert [dump["n_calls"] for dump in dumps["resumed"]] == [N_STEPS / 2, 0]


def test_ranks_see_different_cells(dumps):
    first, second = dumps["local"]
    assert len(first["cells"]) == len(second["cells"]) == 2 * 216 / 2
    for epoch in (slice(0, 108), slice(108, 216)):
        assert len(set(first["cells"][epoch].tolist()) | set(second["cells"][epoch].tolist())) == 216


@pytest.mark.parametrize("case", CASES)
def test_rank_0_asks_for_all(dumps, case):
    first, second = dumps[case]
    # the last request to a remote sampler is answered on the spot and not used
    assert first["n_calls"] == N_STEPS
    assert second["n_calls"] == 0


def test_answers_of_rank_0_are_used(dumps):
    """Were they not, or had rank 1 asked too, its salted chains would be others."""
    assert unequal(dumps["local"][0], dumps["remote"][0])
    assert unequal(dumps["failing"][0], dumps["remote"][0])
    assert dumps["remote"][0]["history"]["sampling_staleness"] == [1.0, 1.0]


def test_failing_sampler_costs_one_warning_of_rank_0(dumps):
    first, second = dumps["failing"]
    assert len(first["warnings"]) == 1
    assert "the line is down" in first["warnings"][0]
    assert second["warnings"] == []
    assert first["history"]["sampling_fallbacks"] == [3.0, 7.0]  # answers are one step old


@pytest.mark.parametrize("case", DIVERGING)
def test_loss_that_is_not_finite_on_one_rank_stops_all(dumps, case):
    first, second = dumps[case]
    for dump in (first, second):
        assert "became non-finite at step" in dump["error"]
        assert "its state of step 4" in dump["error"]
        assert all(torch.isfinite(value).all() for value in dump["state"].values())
    assert unequal(first, second) == []
    assert first["n_steps"] == second["n_steps"] < N_STEPS


def test_without_shared_buffers_ranks_would_differ(dumps):
    """The planted fault that the tests above have to see."""
    names = unequal(*dumps["unshared"])
    assert {"prior.log_z", "z_encoder.encoder.fc_layers.Layer 0.1.running_mean"} <= set(names)
