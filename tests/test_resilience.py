"""Wrappers around an unreliable or expensive device: attempts, pauses, budgets; and training with them."""

from __future__ import annotations

import re
import time

import pytest
import torch
from tables import over

from qbmscvi.exceptions import (
    BudgetExceeded,
    GraphMismatchError,
    InvalidSamples,
    SamplerError,
    SamplerTimeout,
    SamplerUnavailable,
)
from qbmscvi.samplers import (
    Budgeted,
    Draw,
    ExactSampler,
    Retrying,
    SamplingRequest,
)
from qbmscvi.samplers.testing import tiny_problems
from qbmscvi.samplers.wrappers import _retrying as resilience

PROBLEM = tiny_problems()["complete-6"]


class Unreliable(ExactSampler):
    """Fails as told, call by call, then answers; ``facts`` go into ``info``."""

    def __init__(self, *errors, facts=None):
        self.errors, self.facts = list(errors), facts or {}
        self.requests = []

    def _sample_batch(self, requests, seeds):
        self.requests.append(requests)
        if self.errors:
            raise self.errors.pop(0)
        return [Draw(draw.spins, info=dict(self.facts)) for draw in super()._sample_batch(requests, seeds)]


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """Pauses, which take no time."""
    made: list[float] = []
    monkeypatch.setattr(resilience.time, "sleep", made.append)
    return made


def ask(sampler, n_samples=5, seed=3, **kwargs):
    return sampler.sample(SamplingRequest(PROBLEM, n_samples, seed=seed, **kwargs))


# Retrying ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_failures", [0, 1, 2])
def test_failed_calls_are_repeated_and_counted(n_failures, pauses):
    child = Unreliable(*[SamplerUnavailable("busy")] * n_failures)
    batch = ask(Retrying(child, 3))
    assert batch.info["n_attempts"] == n_failures + 1 == len(child.requests)
    assert torch.equal(batch.spins, ask(ExactSampler()).spins)


def test_pauses_double(pauses):
    child = Unreliable(*[SamplerTimeout("slow")] * 4)
    ask(Retrying(child, 5, pause=0.25))
    assert pauses == [0.25, 0.5, 1.0, 2.0]


def test_pauses_start_anew_with_each_request(pauses):
    child = Unreliable(SamplerError("one"), SamplerError("two"))
    sampler = Retrying(child, 3, pause=1.0)
    ask(sampler)
    child.errors = [SamplerError("three")]
    ask(sampler)
    assert pauses == [1.0, 2.0, 1.0]


def test_the_last_error_is_raised_as_it_is(pauses):
    errors = [SamplerError("first"), InvalidSamples("second"), SamplerUnavailable("third")]
    child = Unreliable(*errors)
    with pytest.raises(SamplerUnavailable, match="third") as caught:
        ask(Retrying(child, 3))
    assert caught.value is errors[-1]
    assert len(pauses) == 2  # none after the last


def test_foreign_exceptions_are_retried_too(pauses):
    child = Unreliable(ConnectionResetError("peer"))
    assert ask(Retrying(child, 2)).info["n_attempts"] == 2


def test_invalid_answers_are_retried():
    class Bits(ExactSampler):
        n_calls = 0

        def _sample(self, request, seed):
            self.n_calls += 1
            spins = super()._sample(request, seed).spins
            return Draw((spins + 1) / 2 if self.n_calls == 1 else spins)

    assert ask(Retrying(Bits(), 2, pause=0.0)).info["n_attempts"] == 2


def test_every_attempt_sends_the_same_request(pauses):
    """Without a seed as well: it is drawn once."""
    child = Unreliable(SamplerError("one"), SamplerError("two"))
    requests = [SamplingRequest(PROBLEM, n, seed=None) for n in (2, 3)]
    batches = Retrying(child, 3).sample_batch(requests)
    asked = [[(request.problem, request.n_samples, request.seed) for request in call] for call in child.requests]
    assert asked[0] == asked[1] == asked[2]
    assert [batch.info["seed"] for batch in batches] == [seed for _, _, seed in asked[0]]
    assert None not in [seed for _, _, seed in asked[0]]


def test_a_canceled_request_is_not_sent_again(pauses, monkeypatch):
    """Neither when the call under way fails, nor when the cancel comes in a pause; the next request is another one."""

    class GivesUp(Unreliable):
        def _sample_batch(self, requests, seeds):
            if self.errors:
                sampler.cancel()  # by whoever no longer wants the answer
            return super()._sample_batch(requests, seeds)

    child = GivesUp(SamplerUnavailable("was canceled"))
    sampler = Retrying(child, 3)
    with pytest.raises(SamplerUnavailable, match="was canceled"):
        ask(sampler)
    assert len(child.requests) == 1
    assert ask(sampler).info["n_attempts"] == 1

    child = Unreliable(SamplerUnavailable("busy"))
    sampler = Retrying(child, 3)
    monkeypatch.setattr(resilience.time, "sleep", lambda seconds: sampler.cancel())
    with pytest.raises(SamplerUnavailable, match="busy"):
        ask(sampler)
    assert len(child.requests) == 1
    assert ask(sampler).info["n_attempts"] == 1


def test_a_spent_budget_is_not_asked_again(pauses):
    child = Unreliable(BudgetExceeded("no more"), SamplerError("never seen"))
    with pytest.raises(BudgetExceeded, match="no more"):
        ask(Retrying(child, 5))
    assert len(child.requests) == 1
    assert pauses == []


def test_problems_that_do_not_fit_are_not_retried():
    child = Unreliable()
    large = SamplingRequest(PROBLEM, 5).problem
    child.check = lambda problem: (_ for _ in ()).throw(GraphMismatchError("too large"))
    with pytest.raises(GraphMismatchError, match="too large"):
        Retrying(child).sample(SamplingRequest(large, 5))
    assert child.requests == []


def test_by_default_pauses_are_real():
    started = time.perf_counter()
    ask(Retrying(Unreliable(SamplerError("once")), 2, pause=0.05))
    assert time.perf_counter() - started >= 0.05


# Budgeted ----------------------------------------------------------------------------------------------------------


class Slow(ExactSampler):
    def _sample(self, request, seed):
        time.sleep(0.5)
        return super()._sample(request, seed)


def test_calls_are_counted_by_trip():
    child = Unreliable()
    sampler = Budgeted(child, n_calls=2)
    sampler.sample_batch([SamplingRequest(PROBLEM, 3, seed=1), SamplingRequest(PROBLEM, 4, seed=2)])
    assert ask(sampler).info["spent"]["n_calls"] == 2
    pattern = r"The budget of n_calls=2 for Unreliable is spent \(2 used, 1 more requested\). Raise it"
    with pytest.raises(BudgetExceeded, match=pattern):
        ask(sampler)
    assert len(child.requests) == 2


def test_samples_are_counted_and_a_request_that_would_pass_the_limit_is_refused():
    child = Unreliable()
    sampler = Budgeted(child, n_samples=10)
    ask(sampler, 6)
    with pytest.raises(BudgetExceeded, match=r"n_samples=10.*6 used, 5 more"):
        ask(sampler, 5)
    batch = ask(sampler, 4)
    assert batch.info["spent"]["n_samples"] == 10
    assert sampler.spent["n_samples"] == 10
    assert len(child.requests) == 2


def test_a_refused_request_costs_nothing():
    sampler = Budgeted(Unreliable(), n_samples=10, n_calls=5)
    before = dict(sampler.spent)
    with pytest.raises(BudgetExceeded):
        ask(sampler, 11)
    assert sampler.spent == before == {"n_calls": 0, "n_samples": 0, "device_seconds": 0.0}


def test_device_time_is_what_the_child_reports():
    """The call that passes the limit is answered; the next is not made."""
    child = Unreliable(facts={"device_seconds": 0.4})
    sampler = Budgeted(child, device_seconds=1.0)
    spent = [ask(sampler).info["spent"]["device_seconds"] for _ in range(3)]
    assert spent == pytest.approx([0.4, 0.8, 1.2])
    with pytest.raises(BudgetExceeded, match=r"device_seconds=1 .*1\.2 used, 0 more"):
        ask(sampler)
    assert len(child.requests) == 3


def test_device_time_that_is_used_up_exactly_is_used_up():
    sampler = Budgeted(Unreliable(facts={"device_seconds": 0.5}), device_seconds=1.0)
    ask(sampler)
    ask(sampler)
    with pytest.raises(BudgetExceeded, match="1 used, 0 more"):
        ask(sampler)


def test_device_time_of_several_answers_adds_up():
    sampler = Budgeted(Unreliable(facts={"device_seconds": 0.4}), device_seconds=1.0)
    sampler.sample_batch([SamplingRequest(PROBLEM, 3, seed=seed) for seed in range(3)])
    assert sampler.spent["device_seconds"] == pytest.approx(1.2)


def test_without_a_report_device_time_is_the_time_of_the_answer():
    sampler = Budgeted(Slow(), device_seconds=0.5)
    ask(sampler)
    assert 0.5 <= sampler.spent["device_seconds"] < 5.0
    with pytest.raises(BudgetExceeded, match=r"device_seconds=0.5 for Slow"):
        ask(sampler)


def test_a_call_is_charged_before_it_is_made():
    """What failed may have cost all the same."""
    sampler = Budgeted(Unreliable(SamplerTimeout("late")), n_calls=1, n_samples=100)
    with pytest.raises(SamplerTimeout, match="late"):
        ask(sampler, 7)
    assert (sampler.spent["n_calls"], sampler.spent["n_samples"]) == (1, 7)
    with pytest.raises(BudgetExceeded, match="n_calls=1"):
        ask(sampler)


def test_what_was_spent_is_a_record_of_its_time():
    sampler = Budgeted(Unreliable(), n_calls=5)
    first = ask(sampler)
    ask(sampler)
    assert first.info["spent"]["n_calls"] == 1


def test_retries_within_a_budget_and_a_budget_within_retries(pauses):
    inner = Retrying(Budgeted(Unreliable(*[SamplerError("x")] * 9), n_calls=2), 5)
    with pytest.raises(BudgetExceeded, match="n_calls=2"):
        ask(inner)
    assert inner.child.spent["n_calls"] == 2  # every attempt is a call
    outer = Budgeted(Retrying(Unreliable(SamplerError("x")), 5), n_calls=2)
    info = ask(outer).info
    assert (info["spent"]["n_calls"], info["n_attempts"]) == (1, 2)


def test_budgets_of_nothing_let_nothing_through():
    child = Unreliable()
    for limits in ({"n_calls": 0}, {"n_samples": 0}):
        with pytest.raises(BudgetExceeded, match=re.escape(f"{next(iter(limits))}=0")):
            ask(Budgeted(child, **limits))
    assert child.requests == []


# Arguments ---------------------------------------------------------------------------------------------------------


@over(
    ("build", "match"),
    [
        (lambda: Retrying(ExactSampler(), 0), "n_attempts=0"),
        (lambda: Retrying(ExactSampler(), pause=-1.0), "pause=-1.0 at least 0"),
        (lambda: Budgeted(ExactSampler()), "n_calls, n_samples or device_seconds"),
    ],
)
def test_values_without_meaning_are_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()
