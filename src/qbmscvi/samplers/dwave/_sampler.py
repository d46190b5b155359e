"""D-Wave quantum annealers.

:class:`DWaveSampler` is the device without wrappers: it embeds, scales, submits, waits and reads the answer.
:func:`build_dwave_sampler` adds the usual wrappers. Account and endpoint come from D-Wave's configuration file or
environment. Only D-Wave's client holds them; names, states and errors of this package do not.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from qbmscvi.exceptions import InvalidSamples, SamplerTimeout, SamplerUnavailable
from qbmscvi.samplers._background import call_in_background
from qbmscvi.samplers._contract import Draw, Sampler, SamplerTraits, derive_seed
from qbmscvi.samplers.dwave._device import check_parameters, connect, lattice_of, name_of, read_times
from qbmscvi.samplers.dwave._embedding import Embedding, find_embedding
from qbmscvi.samplers.dwave._errors import guarded
from qbmscvi.samplers.dwave._jobs import Order, Trip, read_answer
from qbmscvi.samplers.dwave._program import Program, Ranges, fit
from qbmscvi.samplers.wrappers._calibrated import Calibrated
from qbmscvi.samplers.wrappers._retrying import Retrying
from qbmscvi.samplers.wrappers._spin_reversed import SpinReversed

if TYPE_CHECKING:
    import networkx as nx

    from qbmscvi.boltzmann.ising import IsingModel
    from qbmscvi.samplers._contract import SamplingRequest

_TICK = 0.05  # seconds between two looks at the clock
_MAX_TRIPS = 3  # at most, to replace discarded samples


class DWaveSampler(Sampler):
    r"""A D-Wave quantum annealer without wrappers.

    The problem is embedded (:class:`~qbmscvi.samplers.dwave._embedding.Embedding`, found once per graph), repeated over
    the chip, and multiplied by ``beta / device_beta``, or by less if the ranges are too narrow. It is submitted with
    ``auto_scale=False`` and ``answer_mode="raw"``; the requests of a batch are under way together. ``info`` has

    - ``scale``, ``effective_beta`` (the assumed ``scale * device_beta``, see :class:`Calibrated`) and
      ``is_range_limited``;
    - ``embedding``, ``n_copies``, ``n_qubits`` (per copy), ``max_chain_length``, ``chain_strength`` and
      ``chain_break_rate``, the share of broken chains;
    - ``solver``, ``job_ids``, ``n_reads``, ``timing`` (microseconds, as reported) and ``device_seconds``, the QPU
      access time.

    Parameters
    ----------
    solver
        Name of the solver; None for the configured solver, or else the largest.
    topology
        Topology of the solver.
    profile
        Section of D-Wave's configuration file.
    device
        Structured :class:`dimod.Sampler` instead of a solver, e.g. ``dwave.system.testing.MockDWaveSampler`` for a test
        without an account.
    device_beta
        Inverse temperature of the device in its own units.
    chain_strength
        Coupling within chains in the units of the device; None for uniform torque compensation, see
        :func:`~qbmscvi.samplers.dwave._program.fit`.
    chain_break
        ``"majority"`` takes the majority of a broken chain. ``"discard"`` drops the sample and requests missing ones
        again, in up to three trips in total.
    max_copies
        Largest number of copies of the problem on the chip.
    parameters
        Solver parameters for every job, e.g. ``{"annealing_time": 50}``.
    timeout
        Seconds for a whole call, including the queue.
    embedding_seconds, embedding_seed
        Longest search of each embedding heuristic in seconds, and its seed.

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
            msg = "`device` is given, so `solver`, `topology` and `profile` have no effect. Leave them out."
            raise ValueError(msg)
        self.solver, self.topology, self.profile, self.timeout = solver, topology, profile, timeout
        self.device_beta, self.chain_strength, self.chain_break = device_beta, chain_strength, chain_break
        self.max_copies, self.parameters = max_copies, dict(parameters or {})
        self.embedding_seconds, self.embedding_seed = embedding_seconds, embedding_seed
        self._given_device = device
        self._reset()
        check_parameters(self.device, self.parameters)

    def _reset(self) -> None:
        self._device: Any = None
        self._lock = threading.RLock()
        self._trips: list[Trip] = []
        self._embeddings: dict[str, Embedding] = {}
        self._lattice: nx.Graph | None = None
        self._lattice_key = ""
        self._ranges: Ranges | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: the connection holds the credentials and is opened again."""
        dropped = ("_device", "_lock", "_trips", "_lattice", "_ranges")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore settings and embeddings."""
        self._reset()
        self.__dict__.update(state)

    @property
    def name(self) -> str:
        """Name for logs and provenance."""
        return f"{type(self).__name__}[{self.solver_name}]" if self._device is not None else type(self).__name__

    # The device ----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> Any:
        """The structured dimod sampler in use, ``dwave.system.DWaveSampler`` unless ``device`` was given."""
        with self._lock:
            if self._device is None:
                choice = {"solver": self.solver, "topology": self.topology, "profile": self.profile}
                given = self._given_device
                self._device = connect(**choice, timeout=self.timeout) if given is None else given
            return self._device

    @property
    def solver_name(self) -> str:
        """Name of the solver in use."""
        return name_of(self.device)

    @property
    def working_graph(self) -> nx.Graph:
        """Working qubits and couplers, as a lattice of ``dwave-networkx``."""
        with self._lock:
            if self._lattice is None:
                self._lattice = lattice_of(self.device)
                names = f"{sorted(self._lattice)} {sorted(map(sorted, self._lattice.edges))}"
                self._lattice_key = hashlib.sha256(names.encode()).hexdigest()
            return self._lattice

    @property
    def ranges(self) -> Ranges:
        """Limits of the device."""
        with self._lock:
            if self._ranges is None:
                self._ranges = Ranges.from_properties(self.device.properties, self.working_graph)
            return self._ranges

    def close(self) -> None:
        """Cancel all jobs under way and close the connection, without waiting."""
        self.cancel()
        with self._lock:
            device, self._device, self._lattice, self._ranges = self._device, None, None, None
        client = getattr(device, "client", None)
        if client is not None:
            call_in_background(lambda: client.close(wait=False))

    # Problems ------------------------------------------------------------------------------------------------------

    def check(self, problem: IsingModel) -> None:
        """Raise :class:`~qbmscvi.exceptions.GraphMismatchError` if no embedding of the problem is found."""
        self.embedding(problem)

    def embedding(self, problem: IsingModel) -> Embedding:
        """Embedding of the problem on the chip; found once per graph and kept."""
        graph = problem.graph
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
        """Program that the device would get; nothing is submitted."""
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
        return read_times(self.device, program.embedding.qubits.size, self.parameters)

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
            Order(request, self.program(request.problem, request.beta), derive_seed(seed, "coins"))
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

    def _serve(self, orders: list[Order], deadline: float) -> None:
        """One trip: submit everything, then collect it."""
        trip = Trip()
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
                    answer, error = guarded(read_answer, job, order, n_reads, profile=self.profile)
                if error is None:
                    order.take(*answer, self.chain_break)
        finally:
            if error is not None:
                trip.cancel()
            with self._lock:
                self._trips.remove(trip)
        if error is not None:
            raise error

    def _submit(self, order: Order, n_reads: int) -> Any:
        fields, couplings = order.program.on_chip()
        arguments = {"num_reads": n_reads, "answer_mode": "raw", "auto_scale": False, **self.parameters}
        label = order.request.request_id or f"qbmscvi {order.request.purpose}"
        target = getattr(self.device, "solver", None) or self.device
        return target.sample_ising(fields, couplings, label=label, **arguments)

    def _wait(self, trip: Trip, job: Any, deadline: float) -> Exception | None:
        while hasattr(job, "wait") and not job.wait(_TICK):
            if trip.is_canceled.is_set():
                return SamplerUnavailable(f"The jobs of {self.name} were canceled.")
            if time.monotonic() > deadline:
                return SamplerTimeout(f"{self.name} did not answer within {self.timeout:g} s; its jobs were canceled.")
        return None

    def _draw(self, order: Order) -> Draw:
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


def build_dwave_sampler(*, n_gauges: int = 4, n_attempts: int = 3, **settings: Any) -> Sampler:
    """Put the usual wrappers around a :class:`DWaveSampler`; like ``sampler="dwave"``, but with settings.

    From the inside out: :class:`Retrying` repeats calls that fail, :class:`SpinReversed` averages bias fields out over
    gauges, and :class:`Calibrated` measures and corrects the temperature. Training continues from these samples with
    local Gibbs sweeps; for other uses add :class:`Polished`.

    Parameters
    ----------
    n_gauges, n_attempts
        Arguments of :class:`SpinReversed` and :class:`Retrying`.
    settings
        Arguments of :class:`DWaveSampler`.
    """
    return Calibrated(SpinReversed(Retrying(DWaveSampler(**settings), n_attempts), n_gauges))
