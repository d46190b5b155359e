"""QBoson's coherent Ising machines, through the Kaiwu SDK.

The SDK needs a separate interpreter (CPython 3.10), which runs ``_worker.py``; this module handles matrices, jobs and
deadlines. :class:`KaiwuSampler` is the device without wrappers; :func:`build_kaiwu_sampler` adds the usual ones. Only
the worker reads credentials, from its environment. Splitting of spins into copies for more precision
(``PrecisionReducer``) and other solvers of the SDK are not supported.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import shutil
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from qbmscvi.exceptions import InvalidSamples, SamplerTimeout, SamplerUnavailable, require_integer
from qbmscvi.samplers._contract import Draw, Sampler, SamplerTraits, derive_seed
from qbmscvi.samplers.kaiwu._ising_matrix import IsingMatrix, fill_up
from qbmscvi.samplers.kaiwu._link import Link
from qbmscvi.samplers.wrappers._calibrated import Calibrated
from qbmscvi.samplers.wrappers._retrying import Retrying

if TYPE_CHECKING:
    from qbmscvi.boltzmann.ising import IsingModel
    from qbmscvi.samplers._contract import SamplingRequest

# From the SDK's documentation: CIMOptimizer(interval, sample_number).
_INTERVAL = 60.0  # seconds between two queries of a job; the least that the SDK allows
_LEAST_READS, _MOST_READS = 10, 2_000
_START_SECONDS = 120.0


class KaiwuSampler(Sampler):
    r"""A coherent Ising machine of QBoson without wrappers.

    The problem becomes an integer matrix with an ancilla for the fields (:mod:`qbmscvi.samplers.kaiwu._ising_matrix`).
    It is multiplied by ``beta / device_beta``, or by less if the range is too narrow. Each request becomes one job, or
    several of at most 2,000 runs; all jobs of a call are under way together. The platform identifies a job by its name,
    which comes from ``request_id`` and the matrix. So a repeated request, also from another process, finds the job that
    is under way or done. Without ``request_id`` every call has a new name, because the SDK stores answers and would
    return the same ones again.

    ``info`` has ``scale``, ``effective_beta`` (the assumed ``scale * device_beta``, see :class:`Calibrated`),
    ``is_range_limited``, ``rounding_error``, ``is_sorted``, ``is_deduplicated``, ``n_distinct``, ``n_candidates``
    (states in the answer), ``mode``, ``task_names`` and ``sdk`` (its version).

    Parameters
    ----------
    python
        Interpreter that has the SDK; None for the path in the environment variable ``KAIWU_PYTHON``.
    mode
        ``"sample"`` returns one state for each run of the machine. ``"quota"`` returns a short list of candidates,
        which the sampler repeats. These are results of an optimizer, so ``traits.target`` is ``"ground_state"``.
    n_physical_spins
        Spins of the machine, 550 or 1,000. One of them is the ancilla.
    n_bits
        Signed precision of the couplings.
    device_beta
        Inverse temperature of the machine, in units in which its largest coupling is one. It is not published; the
        default is the one of :class:`CoherentIsingSampler`.
    timeout
        Seconds for a whole call, including the queue. The worker is then ended; its jobs continue, and the same request
        finds them.
    folder
        Folder in which the SDK stores matrices and answers; None for a temporary folder.
    telemetry
        Whether the SDK may report to the vendor which functions are called, by whom, and with how many spins.

    Raises
    ------
    SamplerUnavailable
        If there is no such interpreter, or it has no SDK or no licence.
    SamplerTimeout
        If the worker does not start in time.
    ValueError
        If an argument is not allowed.
    """

    def __init__(
        self,
        *,
        python: str | os.PathLike[str] | None = None,
        mode: Literal["sample", "quota"] = "sample",
        n_physical_spins: int = 550,
        n_bits: int = 8,
        device_beta: float = 2.5,
        timeout: float = 1_800.0,
        folder: str | os.PathLike[str] | None = None,
        telemetry: bool = False,
    ) -> None:
        require_integer("n_physical_spins", n_physical_spins, 2, "The devices have 550 or 1000.")
        require_integer("n_bits", n_bits, 2, "The devices have 8.")
        for name, value in {"device_beta": device_beta, "timeout": timeout}.items():
            if not 0 < value < math.inf:
                msg = f"{name}={value} must be a positive finite number."
                raise ValueError(msg)
        if mode not in ("sample", "quota"):
            msg = f"mode={mode!r} is not known. Use 'sample' or 'quota'."
            raise ValueError(msg)
        self.python = find_python(python)
        self.mode, self.n_physical_spins, self.n_bits, self.device_beta = mode, n_physical_spins, n_bits, device_beta
        self.timeout, self.telemetry = timeout, telemetry
        self.folder = None if folder is None else os.fspath(folder)
        target = "approximate" if mode == "sample" else "ground_state"
        self.traits = SamplerTraits(target=target, is_remote=True, is_slow=True, max_spins=n_physical_spins - 1)
        self._reset()
        self._connected(time.monotonic() + min(_START_SECONDS, timeout))

    def _reset(self) -> None:
        self._link: Link | None = None
        self._lock = threading.Lock()
        self._calls: list[threading.Event] = []
        self._n_refused: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: a new worker is started."""
        dropped = ("_link", "_lock", "_calls", "_n_refused")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over settings."""
        self._reset()
        self.__dict__.update(state)

    def cancel(self) -> None:
        """Cancel the calls under way and end the worker; the platform cannot cancel a job."""
        for canceled in list(self._calls):
            canceled.set()
        self.close()

    def close(self) -> None:
        """End the worker; the next call starts another one."""
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def program(self, problem: IsingModel, beta: float = 1.0) -> IsingMatrix:
        """Matrix that the machine would get; nothing is submitted."""
        return IsingMatrix.from_problem(problem, beta, self.device_beta, self.n_bits)

    def _connected(self, deadline: float) -> Link:
        with self._lock:
            if self._link is None or not self._link.is_open:
                self._link = Link(self.python, self.folder, self.telemetry, deadline)
            return self._link

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        deadline = time.monotonic() + self.timeout
        orders = [self._order(request, seed) for request, seed in zip(requests, seeds, strict=True)]
        canceled = threading.Event()
        self._calls.append(canceled)
        try:
            self._serve([job for order in orders for job in order.jobs], deadline, canceled)
        finally:
            self._calls.remove(canceled)
        return [self._draw(order) for order in orders]

    def _order(self, request: SamplingRequest, seed: int) -> _Order:
        program = self.program(request.problem, request.beta)
        digest = hashlib.sha256((request.request_id or uuid.uuid4().hex).encode())
        digest.update(f" {self.mode} {request.n_samples} ".encode() + program.values.tobytes())
        stem = f"qb-{digest.hexdigest()[:14]}"  # other interfaces of the machine take 24 characters
        # The SDK stores refused answers, too, so a second attempt has to be another job.
        attempt = self._n_refused.get(stem, 0)
        n_jobs = math.ceil(request.n_samples / _MOST_READS) if self.mode == "sample" else 1
        wanted = request.n_samples if self.mode == "sample" else _LEAST_READS
        sizes = [wanted // n_jobs + (k < wanted % n_jobs) for k in range(n_jobs)]
        rng = np.random.default_rng(derive_seed(seed, "order of the answer"))
        order = _Order(request, program, stem, rng)
        for number, size in enumerate(sizes):
            message = {
                "task_name": f"{stem}-{attempt}-{number}",
                "mode": self.mode,
                "n_samples": max(_LEAST_READS, size),
                "n": len(program.values),
                "matrix": base64.b64encode(program.values.astype("<i4").tobytes()).decode(),
            }
            order.jobs.append(_Job(message))
        return order

    def _serve(self, jobs: list[_Job], deadline: float, canceled: threading.Event) -> None:
        """Submit all jobs, and query them until all are done."""
        while True:
            for job in jobs:
                if job.states is None:
                    self._ask(job, deadline, canceled)
            if all(job.states is not None for job in jobs):
                return
            due = time.monotonic() + _INTERVAL  # counts from the last query
            if due > deadline:
                self.close()
                msg = (
                    f"{self.name} did not answer within {self.timeout:g} s. Its jobs continue; the same request, with "
                    "its `request_id`, finds them."
                )
                raise SamplerTimeout(msg)
            if canceled.wait(max(0.0, due - time.monotonic())):
                self._raise_canceled()

    def _ask(self, job: _Job, deadline: float, canceled: threading.Event) -> None:
        link = self._connected(deadline)
        try:
            answer = link.ask(job.message, deadline)
        except SamplerUnavailable:
            if canceled.is_set():
                answer = None
            else:
                raise
        if answer is None or canceled.is_set():
            self._raise_canceled()
        if answer["status"] == "done":
            values = np.frombuffer(base64.b64decode(answer["states"]), dtype=np.int8)
            job.states = values.reshape(answer["shape"])
            job.sdk = link.header["sdk"]

    def _raise_canceled(self) -> None:
        msg = f"The request to {self.name} was canceled. Its jobs continue."
        raise SamplerUnavailable(msg)

    def _draw(self, order: _Order) -> Draw:
        try:
            return self._read(order)
        except InvalidSamples:
            self._n_refused[order.stem] = self._n_refused.get(order.stem, 0) + 1
            raise

    def _read(self, order: _Order) -> Draw:
        n_samples, program = order.request.n_samples, order.program
        parts, is_sorted, is_deduplicated = [], True, False
        for job in order.jobs:
            n_wanted = job.message["n_samples"]
            spins, found = program.read(job.states, n_wanted, order.rng)
            is_sorted &= found["is_sorted"]
            is_deduplicated |= found["is_deduplicated"]
            if self.mode == "sample" and (len(spins) < n_wanted or found["is_deduplicated"]):
                msg = (
                    f"The answer to {job.message['task_name']} has {len(spins)} states, {found['n_distinct']} of them "
                    f"distinct, but {n_wanted} runs were requested. Repeated states may be missing, which carry the "
                    "probabilities. Repeat the request, or use mode='quota', which accepts lists of candidates."
                )
                raise InvalidSamples(msg)
            parts.append(spins)
        states = torch.cat(parts)
        facts = {
            **program.facts,
            "effective_beta": program.scale * self.device_beta,
            "is_sorted": is_sorted,
            "is_deduplicated": is_deduplicated,
            "n_distinct": len(states.unique(dim=0)),
            "n_candidates": len(states),
            "mode": self.mode,
            "task_names": [job.message["task_name"] for job in order.jobs],
            "sdk": order.jobs[0].sdk,
        }
        return Draw(fill_up(states, n_samples, order.rng), info=facts)


@dataclass
class _Job:
    """A request to the worker, and the states that it returned."""

    message: dict[str, Any]
    states: np.ndarray | None = None
    sdk: str = ""


@dataclass
class _Order:
    """A request under way."""

    request: SamplingRequest
    program: IsingMatrix
    stem: str
    rng: np.random.Generator
    jobs: list[_Job] = field(default_factory=list)


def find_python(python: str | os.PathLike[str] | None = None) -> str:
    """Path of the interpreter for the SDK, by argument or ``KAIWU_PYTHON``.

    Raises
    ------
    SamplerUnavailable
        If none is given, or the path is no interpreter.
    """
    given = os.fspath(python) if python is not None else os.environ.get("KAIWU_PYTHON", "")
    found = shutil.which(given) if given else None
    if found is None:
        what = f"{given} is not an interpreter" if given else "None is known"
        msg = (
            f"The Kaiwu SDK needs a separate interpreter, CPython 3.10. {what}: set KAIWU_PYTHON to one that has "
            "the package `kaiwu` (see docs/kaiwu.md)."
        )
        raise SamplerUnavailable(msg)
    return found


def build_kaiwu_sampler(*, n_attempts: int = 2, **settings: Any) -> Sampler:
    """Put the usual wrappers around a :class:`KaiwuSampler`; like ``sampler="kaiwu"``, but with settings.

    :class:`Retrying` repeats calls that fail; :class:`Calibrated`, around it, measures and corrects the temperature.
    Training continues from these samples with local Gibbs sweeps; for other uses add :class:`Polished`.

    Parameters
    ----------
    n_attempts
        Argument of :class:`Retrying`.
    settings
        Arguments of :class:`KaiwuSampler`.
    """
    return Calibrated(Retrying(KaiwuSampler(**settings), n_attempts))
