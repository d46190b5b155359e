"""D-Wave quantum annealers.

:class:`DWaveSampler` is the bare device: it embeds, scales, submits, waits and reads the answer. What a device needs
around it is composites; :func:`build_dwave_sampler` puts the usual ones on. Account and endpoint come from D-Wave's own
configuration file or environment, and are kept by D-Wave's client alone: not here, not in names, states or errors.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import networkx as nx
import numpy as np
import torch

from qbmscvi.exceptions import InvalidSamples, SamplerTimeout, SamplerUnavailable
from qbmscvi.samplers._background import call_in_background
from qbmscvi.samplers._base import Draw, Sampler, SamplerTraits, derive_seed
from qbmscvi.samplers._composites import Calibrated, Polished, SpinReversed
from qbmscvi.samplers._dwave_errors import guarded, install_hint
from qbmscvi.samplers._embedding import Embedding, find_embedding
from qbmscvi.samplers._program import Program, Ranges, fit
from qbmscvi.samplers._resilience import Retrying

if TYPE_CHECKING:
    from qbmscvi.ising import IsingModel
    from qbmscvi.samplers._base import SamplingRequest

# Set here, or of no use to a sampler.
_OWN_PARAMETERS = ("answer_mode", "auto_scale", "label", "max_answers", "num_reads", "warnings")
_GRACE = 60.0  # seconds
_TICK = 0.05  # seconds between two looks at the clock
_MAX_TRIPS = 3  # for what was discarded
_MAX_REFILL = 4  # reads of such a trip, over those of the first


@dataclass
class _Trip:
    """Jobs of one call."""

    jobs: list[Any] = field(default_factory=list)
    is_canceled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.is_canceled.set()
        for job in self.jobs:
            if hasattr(job, "cancel"):
                job.cancel()


class DWaveSampler(Sampler):
    r"""A D-Wave quantum annealer, raw.

    The problem is embedded (:class:`~qbmscvi.samplers._embedding.Embedding`, found once per graph), repeated over the
    chip, multiplied by ``beta / device_beta`` or by less where the ranges are too narrow, and submitted with
    ``auto_scale=False`` and ``answer_mode="raw"``; the requests of a batch are under way together. ``info`` has

    - ``scale``, ``effective_beta`` (``scale * device_beta``: what is believed, see :class:`Calibrated`) and
      ``is_range_limited``;
    - ``embedding``, ``n_copies``, ``n_qubits`` (of a copy), ``max_chain_length``, ``chain_strength`` and
      ``chain_break_rate``, the share of broken chains;
    - ``solver``, ``job_ids``, ``n_reads``, ``timing`` (microseconds, as reported) and ``device_seconds``, the QPU
      access time.

    Parameters
    ----------
    solver
        Name of the solver; None for the configured one, or the largest.
    topology
        Choose among solvers of this topology.
    profile
        Section of D-Wave's configuration file.
    device
        Structured :class:`dimod.Sampler` in place of a solver, e.g. ``dwave.system.testing.MockDWaveSampler`` for a
        rehearsal.
    device_beta
        Inverse temperature of the device in its own units.
    chain_strength
        Coupling within chains in the units of the device; None for uniform torque compensation, see
        :func:`~qbmscvi.samplers._program.fit`.
    chain_break
        ``"majority"`` takes the majority of a broken chain. ``"discard"`` drops the sample; what is missing is asked
        for again, three times in all.
    max_copies
        Largest number of copies of the problem on the chip.
    parameters
        Solver parameters for every job, e.g. ``{"annealing_time": 50}``.
    timeout
        Seconds for a whole call, the queue included.
    embedding_seconds, embedding_seed
        Longest search of each embedding heuristic, and its seed.

    Raises
    ------
    SamplerUnavailable
        If ``dwave-system`` is not installed, there are no credentials, or no such solver can be reached.
    ValueError
        If an argument or a solver parameter is not allowed.
    """

    traits = SamplerTraits(target="approximate", is_remote=True)

    def __init__(
        self,
        *,
        solver: str | None = None,
        topology: Literal["chimera", "pegasus", "zephyr"] | None = None,
        profile: str | None = None,
        device: Any = None,
        # dwave-pytorch-plugin 0.4 divides problems for Advantage2_system1.3 by 6.35, and says 5 to 8.
        device_beta: float = 6.35,
        chain_strength: float | None = None,
        chain_break: Literal["majority", "discard"] = "majority",
        max_copies: int = 8,
        parameters: dict[str, Any] | None = None,
        timeout: float = 300.0,
        embedding_seconds: float = 60.0,
        embedding_seed: int = 0,
    ) -> None:
        positive = {"device_beta": device_beta, "timeout": timeout, "embedding_seconds": embedding_seconds}
        positive |= {"max_copies": max_copies} | ({} if chain_strength is None else {"chain_strength": chain_strength})
        for name, value in positive.items():
            if not 0 < value < math.inf:
                msg = f"{name}={value} must be a positive finite number."
                raise ValueError(msg)
        if chain_break not in ("majority", "discard"):
            msg = f"chain_break={chain_break!r} is not known. Use 'majority' or 'discard'."
            raise ValueError(msg)
        if device is not None and (solver or topology or profile):
            msg = "`device` is given, so `solver`, `topology` and `profile` have nothing to choose. Leave them out."
            raise ValueError(msg)
        self.solver, self.topology, self.profile, self.timeout = solver, topology, profile, timeout
        self.device_beta, self.chain_strength, self.chain_break = device_beta, chain_strength, chain_break
        self.max_copies, self.parameters = max_copies, dict(parameters or {})
        self.embedding_seconds, self.embedding_seed = embedding_seconds, embedding_seed
        self._given_device = device
        self._reset()
        self._check_parameters()

    def _reset(self) -> None:
        self._device: Any = None
        self._lock = threading.RLock()
        self._trips: list[_Trip] = []
        self._embeddings: dict[str, Embedding] = {}
        self._lattice: nx.Graph | None = None
        self._lattice_key = ""

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: the connection, which knows the credentials, is opened anew."""
        dropped = ("_device", "_lock", "_trips", "_lattice")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over settings and embeddings."""
        self._reset()
        self.__dict__.update(state)

    @property
    def name(self) -> str:
        """Name for logs and provenance."""
        return f"{type(self).__name__}[{self.solver_name}]" if self._device is not None else type(self).__name__

    # The device ----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> Any:
        """The structured dimod sampler behind this one, ``dwave.system.DWaveSampler`` unless another was given."""
        with self._lock:
            if self._device is None:
                self._device = self._given_device if self._given_device is not None else self._connect()
            return self._device

    def _connect(self) -> Any:
        try:
            import dwave.system
        except ModuleNotFoundError:
            dwave = None
        if dwave is None:
            raise SamplerUnavailable(install_hint())
        # At DEBUG, D-Wave's client writes its configuration, token included, to the log.
        log = logging.getLogger("dwave.cloud")
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)
        wanted = {"name__eq": self.solver, "topology__type__eq": self.topology}
        wanted = {key: value for key, value in wanted.items() if value is not None}
        choice = {"solver": {"order_by": "-num_active_qubits", **wanted}} if wanted else {}
        options = {
            "profile": self.profile,
            "request_timeout": min(60.0, self.timeout),
            # Later than our own: the client does not cancel a job that it gave up polling.
            "polling_timeout": self.timeout + _GRACE,
            "http_retry_total": 2,
        }
        # In a thread of its own: three attempts of every request may take longer than the time there is.
        open_device = partial(dwave.system.DWaveSampler, **options, **choice)
        opening = call_in_background(partial(guarded, open_device, profile=self.profile))
        try:
            device, error = opening.result(timeout=self.timeout)
        except TimeoutError:
            device, error = (
                None,
                SamplerTimeout(f"D-Wave's service did not list its solvers within {self.timeout:g} s."),
            )
        if error is not None:
            raise error
        return device

    @property
    def solver_name(self) -> str:
        """Name of the solver in use."""
        solver = getattr(self.device, "solver", None)
        return str(self.device.properties["chip_id"] if solver is None else solver.name)

    @property
    def working_graph(self) -> nx.Graph:
        """Working qubits and couplers, as a lattice of ``dwave-networkx``."""
        with self._lock:
            if self._lattice is None:
                self._lattice = _lattice(self.device)
                names = f"{sorted(self._lattice)} {sorted(map(sorted, self._lattice.edges))}"
                self._lattice_key = hashlib.sha256(names.encode()).hexdigest()
            return self._lattice

    @property
    def ranges(self) -> Ranges:
        """Limits of the device."""
        return Ranges.from_properties(self.device.properties)

    def close(self) -> None:
        """Cancel what is under way and close the connection, without waiting for either."""
        self.cancel()
        with self._lock:
            device, self._device, self._lattice = self._device, None, None
        client = getattr(device, "client", None)
        if client is not None:
            call_in_background(lambda: client.close(wait=False))

    def _check_parameters(self) -> None:
        allowed = sorted(set(self.device.parameters) - set(_OWN_PARAMETERS))
        unknown = sorted(set(self.parameters) - set(allowed))
        if unknown:
            reserved = [name for name in unknown if name in _OWN_PARAMETERS]
            why = f" ({', '.join(reserved)}: set by the sampler)" if reserved else ""
            msg = f"Solver parameters {unknown} are not allowed{why}. {self.solver_name} takes {', '.join(allowed)}."
            raise ValueError(msg)
        time_range = self.device.properties.get("annealing_time_range")
        annealing_time = self.parameters.get("annealing_time")
        if annealing_time is not None and time_range and not time_range[0] <= annealing_time <= time_range[1]:
            msg = (
                f"annealing_time={annealing_time:g} is outside the range of {self.solver_name}: {time_range[0]:g} to "
                f"{time_range[1]:g} microseconds."
            )
            raise ValueError(msg)
        if "anneal_schedule" in self.parameters and hasattr(self.device, "validate_anneal_schedule"):
            self.device.validate_anneal_schedule(self.parameters["anneal_schedule"])

    # Problems ------------------------------------------------------------------------------------------------------

    def check(self, problem: IsingModel) -> None:
        """Raise :class:`~qbmscvi.exceptions.GraphMismatchError` if no embedding of the problem is found."""
        self.embedding(problem)

    def embedding(self, problem: IsingModel) -> Embedding:
        """Where the problem goes on the chip; found once for a graph and kept."""
        graph = problem.to_dense().graph
        with self._lock:
            lattice = self.working_graph
            key = f"{self._lattice_key} {hashlib.sha256(graph.edges.tobytes()).hexdigest()} {graph.n_nodes}"
            if key not in self._embeddings:
                self._embeddings[key] = find_embedding(
                    graph,
                    lattice,
                    max_copies=self.max_copies,
                    seed=self.embedding_seed,
                    seconds=self.embedding_seconds,
                )
            return self._embeddings[key]

    def program(self, problem: IsingModel, beta: float = 1.0) -> Program:
        """What the device would be programmed to; nothing is submitted."""
        return fit(
            problem,
            self.embedding(problem),
            self.ranges,
            beta=beta,
            device_beta=self.device_beta,
            chain_strength=self.chain_strength,
        )

    def access_seconds(self, program: Program, n_samples: int) -> float | None:
        """QPU access time of a request in seconds, by the solver's own timing model; None if it has none."""
        reads = math.ceil(n_samples / program.embedding.n_copies)
        fixed, each, most = self._read_times(program)
        return None if each is None else 1e-6 * (math.ceil(reads / most) * fixed + reads * each)

    def _read_times(self, program: Program) -> tuple[float, float | None, int]:
        """Access time of a job in microseconds, constant part and per read, and the most reads of a job."""
        most = int(self.device.properties.get("num_reads_range", (1, 10_000))[1])
        solver = getattr(self.device, "solver", None)
        if solver is None or not self.device.properties.get("problem_timing_data"):
            return 0.0, None, most
        n_qubits = program.embedding.qubits.size
        one, two = (float(solver.estimate_qpu_access_time(n_qubits, num_reads=n, **self.parameters)) for n in (1, 2))
        each, longest = two - one, self.device.properties.get("problem_run_duration_range", (0, math.inf))[1]
        room = (longest - (one - each)) / each
        return one - each, each, most if math.isinf(room) else max(1, min(most, math.floor(room)))

    # Sampling ------------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Cancel the jobs under way, on the device too."""
        with self._lock:
            trips = list(self._trips)
        for trip in trips:
            trip.cancel()

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        deadline = time.monotonic() + self.timeout
        orders = [
            _Order(
                request, self.program(request.problem, request.beta), np.random.default_rng(derive_seed(seed, "coins"))
            )
            for request, seed in zip(requests, seeds, strict=True)
        ]
        for _ in range(_MAX_TRIPS):
            short = [order for order in orders if order.n_missing > 0]
            if not short:
                break
            self._serve(short, deadline)
        for order in orders:
            if order.n_missing > 0:
                msg = (
                    f"{order.n_kept} of {order.request.n_samples} samples of {self.name} had all chains intact after "
                    f"{_MAX_TRIPS} jobs ({order.break_rate:.1%} of the chains broken). Raise `chain_strength`, or use "
                    "chain_break='majority'."
                )
                raise InvalidSamples(msg)
        return [self._draw(order) for order in orders]

    def _serve(self, orders: list[_Order], deadline: float) -> None:
        """One trip: submit everything, then collect it."""
        trip = _Trip()
        with self._lock:
            self._trips.append(trip)
        error = None
        try:
            submitted = []
            for order in orders:
                most = self._read_times(order.program)[2]
                for n_reads in order.reads(most):
                    job, error = guarded(self._submit, order, n_reads, profile=self.profile)
                    if error is not None:
                        break
                    trip.jobs.append(job)
                    submitted.append((order, n_reads, job))
                if error is not None:
                    break
            for order, n_reads, job in submitted:
                error = error or self._wait(trip, job, deadline)
                if error is None:
                    answer, error = guarded(_read, job, order, n_reads, profile=self.profile)
                if error is None:
                    order.take(*answer, self.chain_break)
        finally:
            if error is not None:
                trip.cancel()
            with self._lock:
                self._trips.remove(trip)
        if error is not None:
            raise error

    def _submit(self, order: _Order, n_reads: int) -> Any:
        fields, couplings = order.program.on_chip()
        arguments = {"num_reads": n_reads, "answer_mode": "raw", "auto_scale": False, **self.parameters}
        label = order.request.request_id or f"qbmscvi {order.request.purpose}"
        target = getattr(self.device, "solver", None) or self.device
        return target.sample_ising(fields, couplings, label=label, **arguments)

    def _wait(self, trip: _Trip, job: Any, deadline: float) -> Exception | None:
        while hasattr(job, "wait") and not job.wait(_TICK):
            if trip.is_canceled.is_set():
                return SamplerUnavailable(f"The jobs of {self.name} were canceled.")
            if time.monotonic() > deadline:
                return SamplerTimeout(f"{self.name} did not answer within {self.timeout:g} s; its jobs were canceled.")
        return None

    def _draw(self, order: _Order) -> Draw:
        program, n_samples = order.program, order.request.n_samples
        facts = {
            "solver": self.solver_name,
            "embedding": program.embedding.kind,
            "n_copies": program.embedding.n_copies,
            "n_qubits": program.embedding.n_qubits,
            "max_chain_length": int(program.embedding.chain_lengths.max()),
            "chain_strength": program.chain_strength,
            "chain_break_rate": order.break_rate,
            "scale": program.scale,
            "effective_beta": program.scale * self.device_beta,
            "is_range_limited": program.is_range_limited,
            "n_reads": order.n_reads,
            "job_ids": order.job_ids,
            "timing": order.timing,
        }
        if "qpu_access_time" in order.timing:
            facts["device_seconds"] = 1e-6 * order.timing["qpu_access_time"]
        return Draw(torch.from_numpy(np.concatenate(order.kept)[:n_samples]), info=facts)


class _Order:
    """A request on its way: what it is programmed to, and what came back so far."""

    def __init__(self, request: SamplingRequest, program: Program, seed: int) -> None:
        self.request, self.program, self.rng = request, program, np.random.default_rng(seed)
        self.kept: list[np.ndarray] = []
        self.job_ids: list[str] = []
        self.timing: dict[str, float] = {}
        self.n_reads = self.n_rows = 0
        self._n_broken = 0

    @property
    def n_kept(self) -> int:
        return sum(map(len, self.kept))

    @property
    def n_missing(self) -> int:
        return self.request.n_samples - self.n_kept

    @property
    def break_rate(self) -> float:
        n_chains = self.n_rows * self.request.problem.n_spins
        return self._n_broken / n_chains if n_chains else 0.0

    def reads(self, most: int) -> list[int]:
        """Reads of the jobs that should fill the gap, judged by the share that was kept so far."""
        n_copies = self.program.embedding.n_copies
        share = max(self.n_kept, 1) / self.n_rows if self.n_rows else 1.0
        wanted = math.ceil(self.n_missing / share / n_copies * (1.1 if self.n_rows else 1.0))
        wanted = min(wanted, _MAX_REFILL * math.ceil(self.request.n_samples / n_copies))
        return [most] * (wanted // most) + ([wanted % most] if wanted % most else [])

    def take(self, values: np.ndarray, timing: dict[str, float], job_id: str | None, chain_break: str) -> None:
        """Add the answer of a job, shape ``(n_reads, n_copies, n_qubits)``."""
        rows = values.reshape(-1, values.shape[-1])
        spins, is_broken = self.program.embedding.gather(rows, self.rng)
        self.n_reads += len(values)
        self.n_rows += len(rows)
        self._n_broken += int(is_broken.sum())
        self.kept.append(spins[~is_broken.any(1)] if chain_break == "discard" else spins)
        self.job_ids += [] if job_id is None else [job_id]
        for key, microseconds in timing.items():
            self.timing[key] = self.timing.get(key, 0.0) + microseconds


def _read(job: Any, order: _Order, n_reads: int) -> tuple[np.ndarray, dict[str, float], str | None]:
    """Values of the qubits, shape ``(n_reads, n_copies, n_qubits)``, timing and id of a job that is done."""
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


def _lattice(device: Any) -> nx.Graph:
    import dwave_networkx as dnx

    family, shape = device.properties["topology"]["type"], device.properties["topology"]["shape"]
    build = {"chimera": dnx.chimera_graph, "pegasus": dnx.pegasus_graph, "zephyr": dnx.zephyr_graph}[family]
    return build(*shape, node_list=device.nodelist, edge_list=device.edgelist)


def build_dwave_sampler(
    *, n_gauges: int = 4, n_polish_sweeps: int = 10, n_attempts: int = 3, **settings: Any
) -> Sampler:
    """Put the usual layers around a :class:`DWaveSampler`; the same as ``sampler="dwave"`` with settings.

    From the inside out: calls are repeated when they fail (:class:`Retrying`), bias fields are averaged out over gauges
    (:class:`SpinReversed`), the temperature is measured and corrected (:class:`Calibrated`), and Gibbs sweeps mend what
    is left (:class:`Polished`).

    Parameters
    ----------
    n_gauges, n_polish_sweeps, n_attempts
        Of these layers.
    settings
        Arguments of :class:`DWaveSampler`.
    """
    device = Retrying(DWaveSampler(**settings), n_attempts)
    return Polished(Calibrated(SpinReversed(device, n_gauges)), n_polish_sweeps)
