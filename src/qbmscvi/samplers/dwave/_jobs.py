"""Requests to a D-Wave annealer that are under way: their jobs and answers."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qbmscvi.exceptions import InvalidSamples

if TYPE_CHECKING:
    from qbmscvi.samplers._contract import SamplingRequest
    from qbmscvi.samplers.dwave._program import Program

_MAX_REFILL = 4  # reads of a trip that replaces discarded samples, relative to the first trip


@dataclass
class Trip:
    """Jobs of one call."""

    jobs: list[Any] = field(default_factory=list)
    is_canceled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Cancel the jobs, on the device too."""
        self.is_canceled.set()
        for job in self.jobs:
            if hasattr(job, "cancel"):
                job.cancel()


class Order:
    """A request under way: its program, and the samples received so far.

    Parameters
    ----------
    request
        The request.
    program
        Program that the device gets.
    seed
        Seed of the coins for chains without a majority.
    """

    def __init__(self, request: SamplingRequest, program: Program, seed: int) -> None:
        self.request, self.program, self._rng = request, program, np.random.default_rng(seed)
        self.kept: list[np.ndarray] = []
        self.job_ids: list[str] = []
        self.timing: dict[str, float] = {}
        self.n_reads = self.n_rows = 0
        self._n_broken = 0

    @property
    def n_kept(self) -> int:
        """Number of usable samples."""
        return sum(map(len, self.kept))

    @property
    def n_missing(self) -> int:
        """Number of missing samples."""
        return self.request.n_samples - self.n_kept

    @property
    def break_rate(self) -> float:
        """Share of broken chains."""
        n_chains = self.n_rows * self.request.problem.n_spins
        return self._n_broken / n_chains if n_chains else 0.0

    def reads(self, most: int) -> list[int]:
        """Number of reads that should give the missing samples, from the share kept so far."""
        n_copies = self.program.embedding.n_copies
        share = max(self.n_kept, 1) / self.n_rows if self.n_rows else 1.0
        wanted = math.ceil(self.n_missing / share / n_copies * (1.1 if self.n_rows else 1.0))
        wanted = min(wanted, _MAX_REFILL * math.ceil(self.request.n_samples / n_copies))
        return [most] * (wanted // most) + ([wanted % most] if wanted % most else [])

    def take(self, values: np.ndarray, timing: dict[str, float], job_id: str | None, chain_break: str) -> None:
        """Add the answer of a job, shape ``(n_reads, n_copies, n_qubits)``."""
        rows = values.reshape(-1, values.shape[-1])
        spins, is_broken = self.program.embedding.gather(rows, self._rng)
        self.n_reads += len(values)
        self.n_rows += len(rows)
        self._n_broken += int(is_broken.sum())
        self.kept.append(spins[~is_broken.any(1)] if chain_break == "discard" else spins)
        self.job_ids += [] if job_id is None else [job_id]
        for key, microseconds in timing.items():
            self.timing[key] = self.timing.get(key, 0.0) + microseconds


def read_answer(job: Any, order: Order, n_reads: int) -> tuple[np.ndarray, dict[str, float], str | None]:
    """Values of the qubits, shape ``(n_reads, n_copies, n_qubits)``, timing, and id of a finished job.

    Raises
    ------
    InvalidSamples
        If reads or qubits are missing, or values are neither -1 nor +1.
    """
    sample_set = getattr(job, "sampleset", job)
    record = sample_set.record
    rows = np.repeat(record.sample, record.num_occurrences, axis=0)
    columns = {variable: k for k, variable in enumerate(sample_set.variables)}
    qubits = order.program.embedding.qubits
    missing = [qubit for qubit in qubits.ravel().tolist() if qubit not in columns]
    if missing or len(rows) != n_reads:
        msg = f"The answer has {len(rows)} of {n_reads} reads, and lacks {len(missing)} of {qubits.size} qubits."
        raise InvalidSamples(msg)
    values = rows[:, [columns[qubit] for qubit in qubits.ravel().tolist()]].reshape(n_reads, *qubits.shape)
    if not (np.abs(values) == 1).all():
        msg = "The answer has values other than -1 and +1."
        raise InvalidSamples(msg)
    reported = sample_set.info.get("timing", {})
    timing = {key: float(value) for key, value in reported.items() if isinstance(value, int | float)}
    return values, timing, sample_set.info.get("problem_id")
