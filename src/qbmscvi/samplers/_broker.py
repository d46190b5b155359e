"""The broker between a training run and a sampler.

The broker dispatches all requests of one interval together. It merges requests of one problem into one call, and packs
several problems into one if the sampler declares that it can. A local sampler answers at once. A remote sampler works
in another thread while training continues. Its answer is used at a fixed age; a late answer is used at the next
multiple of that age. So training never waits, and a run with a fast device depends on seeds alone.
"""

from __future__ import annotations

import math
import time
import warnings
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from qbmscvi.boltzmann.ising import SampleBatch, disjoint_union
from qbmscvi.exceptions import SamplerError, SamplerTimeout
from qbmscvi.samplers._background import call_in_background
from qbmscvi.samplers._contract import Sampler, SamplingRequest, derive_seed
from qbmscvi.samplers.wrappers._recordings import problem_fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


_ADVICE = "Raise `max_staleness` of the schedule, or let training wait for answers with `latency=0`."


@dataclass
class Ledger:
    """Counts of what the broker has done.

    Parameters
    ----------
    n_requests, n_trips, n_samples
        Requests submitted, calls made, samples received and used.
    n_failures
        Calls that raised, or gave an answer that was too old.
    n_late
        Answers that had not arrived when they were due.
    n_attempts, device_seconds
        As reported by the sampler in ``info``.
    wait_seconds
        Time that the training thread waited for answers.
    sampler_seconds
        Time that the sampler took, in any thread.
    """

    n_requests: int = 0
    n_trips: int = 0
    n_samples: int = 0
    n_failures: int = 0
    n_late: int = 0
    n_attempts: int = 0
    wait_seconds: float = 0.0
    sampler_seconds: float = 0.0
    device_seconds: float = 0.0


@dataclass
class _Trip:
    """One dispatch: its requests, the step at which it was sent, and the step at which its answers are due."""

    requests: tuple[SamplingRequest, ...]
    step: int
    due: int
    future: Future
    sampler_state: dict[str, Any]
    is_late: bool = False
    is_given_up: bool = False

    def state_dict(self) -> dict[str, Any]:
        """State from which the trip can be sent again."""
        own = {"step": self.step, "due": self.due, "is_late": self.is_late}
        return {"requests": [request.state_dict() for request in self.requests], **own}


class Broker:
    """Merge and pack requests, send them to a sampler, and fetch the answers.

    Parameters
    ----------
    sampler
        Sampler to ask.

    latency
        Steps between dispatch and collection with a remote sampler; zero waits for the answer. A local sampler always
        answers at once.
    max_staleness
        Age in steps beyond which an answer is not used; may be infinite.

    Raises
    ------
    ValueError
        If ``latency`` is negative or above ``max_staleness``.
    """

    def __init__(self, sampler: Sampler, latency: int = 0, max_staleness: float = 500) -> None:
        if not 0 <= latency <= max_staleness:
            msg = f"latency={latency} must be at least 0 and at most max_staleness={max_staleness} (steps)."
            raise ValueError(msg)
        self.sampler = sampler
        self.latency = latency if sampler.traits.is_remote else 0
        self.max_staleness = max_staleness
        self.ledger = Ledger()
        self._submitted: list[SamplingRequest] = []
        self._trip: _Trip | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a trip is under way."""
        return self._trip is not None

    def submit(self, request: SamplingRequest) -> None:
        """Add a request to the next trip."""
        self._submitted.append(request)
        self.ledger.n_requests += 1

    def dispatch(self, step: int) -> None:
        """Send all submitted requests; only one trip is under way at a time.

        Raises
        ------
        RuntimeError
            If a trip is under way.
        """
        if self.is_busy:
            msg = "A trip is under way: collect it before the next one is dispatched."
            raise RuntimeError(msg)
        requests, self._submitted = tuple(self._submitted), []
        self._send(requests, step)

    def _send(self, requests: tuple[SamplingRequest, ...], step: int) -> None:
        self.ledger.n_trips += 1
        sampler_state = self.sampler.state_dict()
        if self.latency and not self.sampler.traits.is_replay:
            future = call_in_background(self._call, requests)
        else:
            future, started = Future(), time.perf_counter()
            try:
                future.set_result(self._call(requests))
            except Exception as error:  # noqa: BLE001 - whatever it is, the collector gets it
                future.set_exception(error)
            self.ledger.wait_seconds += time.perf_counter() - started
        self._trip = _Trip(requests, step, step + self.latency, future, sampler_state)

    def collect(self, step: int) -> list[SampleBatch] | None:
        """Fetch the answers of the trip under way, one per request in the order of submission; never wait.

        ``info["staleness"]`` of each batch is the age of its problem in steps.

        Returns
        -------
        The answers; None if they are not due, have not arrived, or no trip is under way.

        Raises
        ------
        SamplerError
            If the sampler failed, or has not answered for ``max_staleness`` steps (raised once per trip). No other trip
            can be dispatched until it answers.
        """
        trip = self._trip
        if trip is None:
            return None
        age = step - trip.step
        if not self._is_there(trip, step):
            if age > self.max_staleness and not trip.is_given_up:
                trip.is_given_up = True
                self.ledger.n_failures += 1
                self._cancel()
                limit = f"max_staleness={self.max_staleness}"
                msg = f"{self.sampler.name} has not answered within {limit} steps. {_ADVICE}"
                raise SamplerTimeout(msg)
            return None
        self._trip = None
        if trip.is_given_up:
            return None
        error = trip.future.exception()
        if age > self.max_staleness:
            limit = f"max_staleness={self.max_staleness}"
            error = SamplerTimeout(f"The answer of {self.sampler.name} is {age} steps old ({limit}). {_ADVICE}")
        if error is not None:
            self.ledger.n_failures += 1
            if isinstance(error, SamplerError):
                raise error
            # From outside the guarded call, e.g. `check` of a device that has gone offline, or a client that ends its
            # thread.
            msg = f"{self.sampler.name} failed: {type(error).__name__}: {error}"
            raise SamplerError(msg) from error
        batches = trip.future.result()
        self.ledger.n_samples += sum(batch.n_samples for batch in batches)
        for batch in batches:
            batch.info["staleness"] = age
        return batches

    def _is_there(self, trip: _Trip, step: int) -> bool:
        if step < trip.due:
            return False
        if trip.future.done():
            return True
        trip.due += self.latency * math.ceil((step - trip.due + 1) / self.latency)
        self.ledger.n_late += not trip.is_late
        trip.is_late = True
        return False

    def _call(self, requests: Sequence[SamplingRequest]) -> list[SampleBatch]:
        started = time.perf_counter()
        is_single = len(requests) == 1
        try:
            merged, places = (requests, []) if is_single else _merge(requests)
            packed = len(merged) > 1 and self.sampler.traits.packs_problems and _can_pack(merged)
            answers = _ask_packed(self.sampler, merged) if packed else self.sampler.sample_batch(merged)
        finally:
            self.ledger.sampler_seconds += time.perf_counter() - started
        self.ledger.n_attempts += int(max((batch.info.get("n_attempts", 1) for batch in answers), default=0))
        self.ledger.device_seconds += sum(batch.info.get("device_seconds", 0.0) for batch in answers)
        return answers if is_single else [answers[group][rows] for group, rows in places]

    def state_dict(self) -> dict[str, Any]:
        """Ledger and the trip under way, unless it was given up, so that a restarted run can send it again.

        The sampler's state is the one before the trip was sent, so that the device gets the same request again.
        """
        trip = self._trip if self._trip is not None and not self._trip.is_given_up else None
        return {
            "ledger": asdict(self.ledger),
            "trip": None if trip is None else trip.state_dict(),
            "sampler": (self.sampler.name, self.sampler.state_dict() if trip is None else trip.sampler_state),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; a trip that was under way is sent again, exactly once and with its old ids.

        If a local sampler has replaced the remote one, the trip is dropped: a local sampler answers only current
        requests.
        """
        self.ledger = Ledger(**state["ledger"])
        name, sampler_state = state["sampler"]
        if name == self.sampler.name:  # what was learned of one device does not hold for another
            self.sampler.load_state_dict(sampler_state)
        trip = state["trip"]
        if trip is not None and self.sampler.traits.is_remote:
            self._send(tuple(map(SamplingRequest.from_state_dict, trip["requests"])), trip["step"])
            self._trip.due, self._trip.is_late = trip["due"], trip["is_late"]

    def close(self) -> None:
        """Drop the trip under way; a later answer is ignored."""
        if self._trip is not None:
            if not self._trip.future.done():
                self._cancel()
            self._trip = None

    def _cancel(self) -> None:
        try:
            self.sampler.cancel()
        except Exception as error:  # noqa: BLE001 - a courtesy to the device must not cost the run
            warnings.warn(
                f"{self.sampler.name} could not cancel its request ({type(error).__name__}: {error}). Training is not "
                "affected; a job may still be running on the device.",
                RuntimeWarning,
                stacklevel=3,
            )


def _merge(requests: Sequence[SamplingRequest]) -> tuple[list[SamplingRequest], list[tuple[int, slice | Tensor]]]:
    """Join requests of one problem and temperature; return them and the rows of each original request."""
    problems = {id(request.problem): request.problem for request in requests}
    names: dict[int, str] = dict.fromkeys(problems, "the only problem")
    if len(problems) > 1:  # a hash costs as much as a Gibbs sweep
        names = {key: problem_fingerprint(problem) for key, problem in problems.items()}
    groups: dict[tuple, list[SamplingRequest]] = {}
    members = []
    for request in requests:
        key = (names[id(request.problem)], request.beta, request.n_sweeps, request.initial_spins is None)
        group = groups.setdefault(key, [])
        members.append((list(groups).index(key), len(group)))
        group.append(request)
    rows = [_share_out(group) for group in groups.values()]
    return [_join(group) for group in groups.values()], [(group, rows[group][member]) for group, member in members]


def _share_out(group: list[SamplingRequest]) -> Sequence[slice | Tensor]:
    """Rows of each member: its own chains, or random rows, because some devices sort their answers by energy."""
    sizes = [member.n_samples for member in group]
    if len(group) > 1 and group[0].initial_spins is None:
        seed = derive_seed(group[0].seed or 0, "rows of a merged request")
        return torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed)).split(sizes)
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _join(group: list[SamplingRequest]) -> SamplingRequest:
    first = group[0]
    if len(group) == 1:
        return first
    initial = None
    if first.initial_spins is not None:
        initial = torch.cat([member.initial_spins for member in group])
    return replace(first, n_samples=sum(member.n_samples for member in group), initial_spins=initial)


def _can_pack(requests: Sequence[SamplingRequest]) -> bool:
    """Packed problems share temperature, sweeps and number of samples."""
    return len({(r.beta, r.n_sweeps, r.n_samples, r.initial_spins is None) for r in requests}) == 1


def _ask_packed(sampler: Sampler, requests: Sequence[SamplingRequest]) -> list[SampleBatch]:
    first = requests[0]
    initial = None
    if first.initial_spins is not None:
        initial = torch.cat([request.initial_spins for request in requests], dim=1)
    union = disjoint_union([request.problem for request in requests])
    batch = sampler.sample(replace(first, problem=union, initial_spins=initial))
    parts = batch.spins.split([request.problem.n_spins for request in requests], dim=1)
    info = {**batch.info, "n_packed": len(requests)}
    return [
        SampleBatch(spins.contiguous(), request.problem.energy(spins), dict(info))
        for request, spins in zip(requests, parts, strict=True)
    ]
