"""Every fault of a sampler in a training run: it ends, with one warning, right counts and honest moments."""

from __future__ import annotations

import contextlib
import re
import threading
import time
import warnings
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import scvi
import torch
from faulty import FAULTS, Faulty, Honesty, Pace, SteppedClock, SteppedDevice
from tables import corners

from qbmscvi import QBMSCVI, SamplingSchedule
from qbmscvi.datasets import synthetic_counts
from qbmscvi.samplers import BlockGibbsSampler, Budgeted, Draw, ExactSampler, Recorded, Replayed

N_STEPS = 12  # three epochs of 216 cells in batches of 64
# The largest of 16 to 24 moments in each of 12 steps, in exact standard errors: false alarm 1e-5 per run.
MAX_Z = 5.5

# How the sampler is asked: from where chains go on, what is asked in how many trips, and how many answers are used.
PLACES = {
    "local-chains": (lambda spoil: Faulty(spoil, child=BlockGibbsSampler()), {}, 12, range(12)),
    "local-draws": (lambda spoil: Faulty(spoil), {}, 12, range(12)),
    "remote": (lambda spoil: Faulty(spoil, is_remote=True), {"latency": 2}, 6, range(5)),
    "remote-waited-for": (lambda spoil: Faulty(spoil, is_remote=True), {"latency": 0}, 12, range(11)),
}


@pytest.fixture(scope="module")
def adata():
    adata = synthetic_counts(240, 30, seed=1)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    return adata


def train(adata, sampler, *, pace=None, **schedule):
    """A model whose prior has structure from the start, so that ground states and noise differ from samples."""
    scvi.settings.seed = 0
    sizes = {"n_latent": 8, "n_hidden_spins": 0, "n_chains": 512, "n_hidden": 8}
    model = QBMSCVI(adata, gene_likelihood="poisson", **sizes)
    prior, honesty = model.module.prior, Honesty()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        prior.h.copy_(0.4 * torch.randn(8, generator=generator))
        prior.J.copy_(0.4 * torch.randn(16, generator=generator))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train(
            max_epochs=3,
            batch_size=64,
            accelerator="cpu",
            enable_progress_bar=False,
            sampler=sampler,
            schedule=SamplingSchedule(**{"every_n_steps": 1, "n_sweeps": 2, **schedule}),
            plan_kwargs={"n_epochs_kl_warmup": None},  # the prior moves from the first step on
            callbacks=[pace or Pace(), honesty],
            fit_prior=False,
        )
    model.warned = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    model.worst = max(honesty.worst)
    assert len(honesty.worst) == model.trainer.global_step == N_STEPS
    return model


def assert_survived(model, n_failures: int, words: str, n_trips: int | None = None) -> None:
    sampling = model.trainer.lightning_module.sampling
    ledger = sampling.broker.ledger
    assert len(model.warned) == (n_failures > 0), model.warned
    if n_failures:
        pattern = rf"(?s)failed.*({words}).*Block Gibbs answers in its place.*sampling_fallbacks"
        assert re.search(pattern, model.warned[0]), model.warned
    assert model.history["sampling_fallbacks"].iloc[-1, 0] == sampling.n_fallbacks == ledger.n_failures == n_failures
    assert n_trips in (None, ledger.n_trips)
    assert int(model.module.prior.n_updates) == N_STEPS
    assert all(bool(torch.isfinite(value).all()) for value in model.module.state_dict().values())
    assert np.isfinite(model.get_latent_representation()).all()
    assert model.worst < MAX_Z


SOME = corners(FAULTS.keys(), ["local-chains", "remote"])
REST = [pytest.param(*pair, marks=pytest.mark.slow) for pair in product(FAULTS, PLACES)]


@pytest.mark.parametrize(
    ("fault", "place"), SOME + [param for param in REST if param.values not in [some.values for some in SOME]]
)
def test_training_survives(adata, fault, place):
    """Every second answer is spoiled, from the second on."""
    spoil, words = FAULTS[fault]
    build, schedule, n_trips, used = PLACES[place]
    model = train(adata, build(spoil), **schedule)
    assert_survived(model, sum(call % 2 for call in used), words, n_trips)


@pytest.mark.parametrize("fault", ["ground-states", "noise", "few-states"])
def test_the_moments_tell_when_answers_are_not_vetted(adata, fault, monkeypatch):
    monkeypatch.setattr("qbmscvi.train._sampling.vet", lambda sampler: sampler)
    model = train(adata, Faulty(FAULTS[fault].spoil))
    assert not model.warned
    assert model.worst > MAX_Z


def test_fallbacks_are_counted_where_they_happen(adata):
    model = train(adata, Faulty(FAULTS["timeout"].spoil, lambda call: call in (1, 5, 6)))
    assert list(model.history["sampling_fallbacks"].iloc[:, 0]) == [1.0, 3.0, 3.0]


# Faults outside the draw -------------------------------------------------------------------------------------------


class Broken(ExactSampler):
    """A method raises; with ``after``, from that call on."""

    def __init__(self, method: str, error: BaseException, after: int = 0, is_remote: bool = True) -> None:
        self.traits = Faulty(None, is_remote=is_remote).traits
        self.n_calls = 0

        def fail(*args):
            self.n_calls += 1
            if self.n_calls > after:
                raise error

        setattr(self, method, fail)


@pytest.mark.parametrize("is_remote", [False, True], ids=["local", "remote"])
@pytest.mark.parametrize(
    ("method", "after"), [pytest.param("_sample_batch", 0, id="draw"), pytest.param("check", 1, id="check")]
)
def test_a_device_that_is_gone_is_replaced(adata, method, after, is_remote):
    """``check`` passes before training, and is called with every request again."""
    model = train(adata, Broken(method, ConnectionError("no route"), after, is_remote), latency=2)
    assert_survived(model, 5 if is_remote else N_STEPS, "ConnectionError: no route")


@pytest.mark.parametrize("error", [SystemExit("no license"), KeyboardInterrupt()], ids=["exit", "interrupt"])
def test_a_client_that_ends_its_thread_does_not_end_training(adata, error):
    model = train(adata, Broken("_sample_batch", error), latency=2)
    assert_survived(model, 5, type(error).__name__)


def test_a_whole_trip_answered_with_nothing_is_a_failure(adata):
    class Silent(BlockGibbsSampler):
        def _sample_batch(self, requests, seeds):
            return None

    assert_survived(train(adata, Silent()), N_STEPS, "Silent failed")


def test_a_job_that_cannot_be_cancelled_costs_a_warning(adata):
    class Stubborn(SteppedDevice):
        def cancel(self):
            super().cancel()
            raise ConnectionError("no route")

    device = Stubborn(None, lambda call: False, [None])
    model = train(adata, device, pace=SteppedClock(device), latency=2)
    unanswered, warning = model.warned
    assert "has not answered during these 12 steps" in unanswered
    assert re.search("could not cancel its request .ConnectionError: no route", warning)
    assert model.worst < MAX_Z


# Late answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latencies", "n_failures", "n_trips"),
    [
        # asked at 0, 4, 6, 10; what is late by one step is used at the next multiple
        pytest.param([3, 1, 3, 1], 0, 4, id="late"),
        # given up at 5 and cancelled, free at 6; the next one at 11, which ends the run
        pytest.param([None] * 3, 2, 2, id="never"),
        pytest.param([9, 1, 1, 1], 1, 4, id="too-old"),
    ],
)
def test_late_answers(adata, latencies, n_failures, n_trips):
    device = SteppedDevice(None, lambda call: False, latencies)
    model = train(adata, device, pace=SteppedClock(device), latency=2, max_staleness=4)
    assert_survived(model, n_failures, "has not answered within max_staleness=4 steps", n_trips)


@pytest.mark.parametrize("is_slow", [False, True])
def test_answers_of_slow_devices_are_used_whenever_they_come(adata, is_slow, monkeypatch):
    """With no limit in the schedule, and 4 steps in place of 500: asked at 0, answered at 7, used at 8."""
    monkeypatch.setattr("qbmscvi.train._schedule._MAX_STALENESS", 4)
    device = SteppedDevice(None, lambda call: False, [7, None, None], is_slow=is_slow)
    model = train(adata, device, pace=SteppedClock(device), latency=2)
    if is_slow:
        assert_survived(model, 0, "", 2)
        assert float(model.history["sampling_staleness"].iloc[-1].iloc[0]) == 8.0
    else:
        assert_survived(model, 2, "has not answered within max_staleness=4 steps. Raise `max_staleness`", 2)


def test_a_run_that_ends_before_its_first_answer_says_so(adata):
    device = SteppedDevice(None, lambda call: False, [None], is_slow=True)
    model = train(adata, device, pace=SteppedClock(device))
    (warning,) = model.warned
    assert "has not answered during these 12 steps: the prior was trained on local block Gibbs alone" in warning
    assert "schedule=SamplingSchedule(latency=0, every_n_steps=1)" in warning


def test_answers_to_the_request_before_are_carried_to_the_current_parameters(adata):
    """A queue that is one request behind: nothing shows, but age; the sweeps of the chains make up for it."""
    problems = []

    def one_behind(sampler, request, draw):
        problems.append(request.problem)
        old = problems[-2] if len(problems) > 1 else request.problem
        return Draw(ExactSampler().sample(replace(request, problem=old)).spins)

    model = train(adata, Faulty(one_behind, lambda call: True, is_remote=True), latency=2)
    assert_survived(model, 0, "")


# Budgets and recordings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_remote", [False, True], ids=["local", "remote"])
def test_training_goes_on_when_the_budget_is_spent(adata, is_remote):
    device = Faulty(None, lambda call: False, is_remote=is_remote)
    model = train(adata, Budgeted(device, n_calls=3), latency=2)
    assert_survived(model, 2 if is_remote else N_STEPS - 3, "The budget of n_calls=3 .* is spent")
    assert device.n_calls == 3


def test_a_full_disk_costs_the_recording_and_not_the_run(adata, tmp_path):
    """The folder of the recording disappears after the third call."""
    folder = tmp_path / "recordings"
    folder.mkdir()

    def lose_disk(sampler, request, draw):
        with contextlib.suppress(FileNotFoundError):
            (folder / "recording").rename(tmp_path / "gone")
            folder.rmdir()
        return draw

    model = train(adata, Recorded(Faulty(lose_disk, lambda call: call == 3), folder / "recording"))
    (warning,) = model.warned
    assert "stopped" in warning
    model.warned = []
    assert_survived(model, 0, "")


@pytest.mark.parametrize(
    ("damage", "words", "n_failures"),
    [
        pytest.param(lambda lines: lines[:4], "ends after 3 calls", 9, id="cut-off"),
        pytest.param(lambda lines: [lines[0], *lines[3:]], "another problem", 12, id="gap"),
    ],
)
def test_a_recording_that_does_not_fit_is_replaced(adata, tmp_path, damage, words, n_failures):
    """A line that does not match its checksum is refused before training; see ``test_recordings.py``."""
    recording = tmp_path / "recording"
    train(adata, Recorded(ExactSampler(), recording))
    lines = recording.read_text().splitlines()
    recording.write_text("\n".join(damage(lines)) + "\n")
    assert_survived(train(adata, Replayed(recording)), n_failures, words)


# A run that is over ------------------------------------------------------------------------------------------------


def test_no_thread_outlives_a_run_by_more_than_its_request(adata):
    device = SteppedDevice(None, lambda call: False, [None])
    n_threads = threading.active_count()
    train(adata, device, pace=SteppedClock(device), latency=2)
    deadline = time.monotonic() + 30.0
    while threading.active_count() > n_threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert device.n_cancelled == 1
    assert threading.active_count() <= n_threads
