"""The broker between a training run and a sampler.

Requests of one interval are submitted, then dispatched together: those of one problem become one call, and where the
sampler says so several problems become one. A local sampler answers at once. A remote one works in a thread of its own,
and its answer is collected a fixed number of steps later, not when it happens to arrive: a run then depends on seeds
alone, and a recorded one can be replayed bit for bit.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from qbmscvi.exceptions import SamplerError
from qbmscvi.ising import SampleBatch, disjoint_union
from qbmscvi.samplers._base import Sampler, SamplingRequest
from qbmscvi.samplers._tape import problem_fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass
class Ledger:
    """What the broker did so far.

    Parameters
    ----------
    n_requests, n_trips, n_samples
        Requests submitted, calls made, samples received.
    n_failures
        Calls that raised.
    wait_seconds
        Time that the training thread waited for answers.
    sampler_seconds
        Time that the sampler took, in whatever thread.
    n_attempts, device_seconds
        As reported by the sampler in ``info``.
    """

    n_requests: int = 0
    n_trips: int = 0
    n_samples: int = 0
    n_failures: int = 0
    n_attempts: int = 0
    wait_seconds: float = 0.0
    sampler_seconds: float = 0.0
    device_seconds: float = 0.0


@dataclass(frozen=True)
class Trip:
    """One dispatch: its requests, when it was made, and when its answers are due."""

    requests: tuple[SamplingRequest, ...]
    step: int
    due: int
    future: Future

    def state_dict(self) -> dict[str, Any]:
        """State from which the trip can be asked for again."""
        return {"requests": [r.state_dict() for r in self.requests], "step": self.step, "due": self.due}


class Broker:
    """Collect, merge and pack requests, and fetch the answers.

    Parameters
    ----------
    sampler
        Sampler to ask.
    latency
        Steps between dispatch and collection with a remote sampler; zero waits for the answer on the spot. A local
        sampler always answers on the spot.
    """

    def __init__(self, sampler: Sampler, latency: int = 0) -> None:
        if latency < 0:
            msg = f"latency={latency} steps must not be negative."
            raise ValueError(msg)
        self.sampler = sampler
        self.latency = latency if sampler.traits.is_remote else 0
        self.ledger = Ledger()
        self._submitted: list[SamplingRequest] = []
        self._trip: Trip | None = None
        self._executor: ThreadPoolExecutor | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a trip is under way."""
        return self._trip is not None

    def submit(self, request: SamplingRequest) -> None:
        """Add a request to the next trip."""
        self._submitted.append(request)
        self.ledger.n_requests += 1

    def dispatch(self, step: int) -> None:
        """Send what was submitted; one trip is under way at a time.

        Raises
        ------
        RuntimeError
            If a trip is under way.
        """
        if self.is_busy:
            msg = "A trip is under way: collect it before the next one is dispatched."
            raise RuntimeError(msg)
        requests, self._submitted = tuple(self._submitted), []
        self._send(requests, step, step + self.latency)

    def _send(self, requests: tuple[SamplingRequest, ...], step: int, due: int) -> None:
        self.ledger.n_trips += 1
        if due > step:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qbmscvi-broker")
            future = self._executor.submit(self._call, requests)
        else:
            future = Future()
            try:
                future.set_result(self._call(requests))
            except SamplerError as error:
                future.set_exception(error)
        self._trip = Trip(requests, step, due, future)

    def is_due(self, step: int) -> bool:
        """Whether the trip under way should be collected at this step."""
        return self._trip is not None and step >= self._trip.due

    def collect(self, step: int) -> list[SampleBatch]:
        """Fetch the answers of the trip under way, one per request in the order of submission; wait if necessary.

        ``info`` of each batch gets ``staleness``, the age of its problem in steps.

        Raises
        ------
        SamplerError
            If the sampler failed.
        RuntimeError
            If no trip is under way.
        """
        if self._trip is None:
            msg = "No trip is under way: submit requests and dispatch them first."
            raise RuntimeError(msg)
        trip, self._trip = self._trip, None
        started = time.perf_counter()
        try:
            batches = trip.future.result()
        except SamplerError:
            self.ledger.n_failures += 1
            raise
        finally:
            self.ledger.wait_seconds += time.perf_counter() - started
        for batch in batches:
            self.ledger.n_samples += batch.n_samples
        return [replace(batch, info={**batch.info, "staleness": step - trip.step}) for batch in batches]

    def _call(self, requests: Sequence[SamplingRequest]) -> list[SampleBatch]:
        started = time.perf_counter()
        try:
            merged, slices = _merge(requests)
            packed = len(merged) > 1 and self.sampler.traits.packs_problems and _can_pack(merged)
            answers = _ask_packed(self.sampler, merged) if packed else self.sampler.sample_batch(merged)
        finally:
            self.ledger.sampler_seconds += time.perf_counter() - started
        self.ledger.n_attempts += max((batch.info.get("n_attempts", 1) for batch in answers), default=0)
        self.ledger.device_seconds += sum(batch.info.get("device_seconds", 0.0) for batch in answers)
        return [answers[group][rows] for group, rows in slices]

    def state_dict(self) -> dict[str, Any]:
        """Ledger, and the trip under way, so that a restarted run can ask for it once more."""
        return {"ledger": asdict(self.ledger), "trip": None if self._trip is None else self._trip.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; a trip that was under way is asked for again, exactly once and with its old ids."""
        self.ledger = Ledger(**state["ledger"])
        trip = state["trip"]
        if trip is not None:
            self._send(tuple(map(SamplingRequest.from_state_dict, trip["requests"])), trip["step"], trip["due"])

    def close(self) -> None:
        """Drop the trip under way; an answer that comes later is ignored."""
        if self._trip is not None:
            self._trip.future.cancel()
            self._trip = None
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None


def _merge(requests: Sequence[SamplingRequest]) -> tuple[list[SamplingRequest], list[tuple[int, slice]]]:
    """Join requests of one problem and temperature; return them and where each original one finds its rows."""
    groups: dict[tuple, list[SamplingRequest]] = {}
    slices = []
    for request in requests:
        known = {id(member.problem): key[0] for key, group in groups.items() for member in group}
        name = known.get(id(request.problem)) or problem_fingerprint(request.problem)
        key = (name, request.beta, request.n_sweeps, request.initial_spins is None)
        group = groups.setdefault(key, [])
        start = sum(member.n_samples for member in group)
        slices.append((list(groups).index(key), slice(start, start + request.n_samples)))
        group.append(request)
    return [_join(group) for group in groups.values()], slices


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
        SampleBatch(spins.contiguous(), request.problem.energy(spins), batch.weights, dict(info))
        for request, spins in zip(requests, parts, strict=True)
    ]
