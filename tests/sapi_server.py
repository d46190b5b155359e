"""A D-Wave solver service on this machine, for D-Wave's real client: its REST interface, and Boltzmann samples.

Solvers have Zephyr or Pegasus working graphs with gaps. A job is answered with samples of exactly what was submitted,
qubits and couplers, at the solver's inverse temperature and with its bias field: by enumeration where the connected
parts of the job are small, by annealed block Gibbs where they are not. Ranges are enforced. Faults are planted with
:meth:`SapiServer.plan`. This is written from what the client sends and accepts (dwave-cloud-client 0.14); nobody has
compared it with the real service.
"""

from __future__ import annotations

import base64
import json
import threading
import time
import uuid
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from urllib.parse import parse_qs, urlsplit

import dwave_networkx as dnx
import networkx as nx
import numpy as np
import torch
from dwave.system.coupling_groups import coupling_groups

from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.enumeration import draw_exact, n_enumerated
from qbmscvi.boltzmann.ising import IsingModel
from qbmscvi.samplers.local._gibbs import gibbs_sweeps

TOKEN = "SECR-0123456789abcdef0123456789abcdef01234567"
_MAX_ENUMERATED = 12
_MEDIA = "application/vnd.dwave.sapi."
# Microseconds; the timing model of an Advantage system as the client's own mocks have it, readout at its plateau.
_PROGRAMMING, _ANNEAL, _READOUT, _DELAY = 14072.88, 20.0, 235.0, 20.54


def working_graph(family: str, size: int, n_missing: int = 3, seed: int = 0) -> nx.Graph:
    """A lattice without some of its qubits, and as many couplers."""
    lattice = getattr(dnx, f"{family}_graph")(size)
    random = Random(seed)
    lattice.remove_nodes_from(random.sample(sorted(lattice), n_missing))
    lattice.remove_edges_from(random.sample(sorted(lattice.edges), n_missing))
    return lattice


@dataclass
class Solver:
    """A quantum annealer that is none: Boltzmann samples at ``beta``, with a field ``bias`` on every qubit."""

    name: str
    lattice: nx.Graph
    beta: float = 5.0
    bias: float = 0.0
    status: str = "ONLINE"
    n_sweeps: int = 200
    properties: dict = field(default_factory=dict)  # in place of the usual ones; None for a property that is not there

    @property
    def identity(self) -> dict:
        return {"name": self.name, "version": {"graph_id": f"01{len(self.lattice):08x}"}}

    def describe(self) -> dict:
        about = self.lattice.graph
        shape = [about["rows"], about["tile"]] if about["family"] == "zephyr" else [about["rows"]]
        names = (
            "annealing_time",
            "answer_mode",
            "auto_scale",
            "num_reads",
            "programming_thermalization",
            "anneal_schedule",
        )
        properties = {
            "chip_id": self.name,
            "category": "qpu",
            "topology": {"type": about["family"], "shape": shape},
            "num_qubits": max(self.lattice) + 1,
            "qubits": sorted(self.lattice),
            "couplers": sorted(map(sorted, self.lattice.edges)),
            "parameters": dict.fromkeys(names, ""),
            "supported_problem_types": ["ising", "qubo"],
            "h_range": [-4.0, 4.0],
            "j_range": [-1.0, 1.0],
            "extended_j_range": [-2.0, 1.0],
            "per_qubit_coupling_range": [-18.0, 15.0],
            "num_reads_range": [1, 10_000],
            "annealing_time_range": [0.5, 2000.0],
            "problem_run_duration_range": [0.0, 1_000_000.0],
            "max_anneal_schedule_points": 12,
            "quota_conversion_rate": 1,
            "tags": [],
            "problem_timing_data": {
                "version": "1.0.0",
                "typical_programming_time": _PROGRAMMING,
                "reverse_annealing_with_reinit_prog_time_delta": 0.0,
                "reverse_annealing_without_reinit_prog_time_delta": 0.0,
                "default_programming_thermalization": 0.0,
                "default_annealing_time": _ANNEAL,
                "readout_time_model": "pwl_linear",
                "readout_time_model_parameters": [0.0, 10_000.0, _READOUT, _READOUT],
                "qpu_delay_time_per_sample": _DELAY,
                "reverse_annealing_with_reinit_delay_time_delta": 0.0,
                "reverse_annealing_without_reinit_delay_time_delta": 0.0,
                "default_readout_thermalization": 0.0,
                "decorrelation_max_nominal_anneal_time": 2000.0,
                "decorrelation_time_range": [500.0, 10000.0],
            },
        } | self.properties
        properties = {name: value for name, value in properties.items() if value is not None}
        return {
            "identity": self.identity,
            "status": self.status,
            "description": "",
            "properties": properties,
            "avg_load": 0.1,
        }

    def decode(self, data: dict) -> tuple[dict[int, float], dict[tuple[int, int], float]]:
        properties = self.describe()["properties"]
        linear = np.frombuffer(base64.b64decode(data["lin"]), dtype="<f8")
        h = {q: v for q, v in zip(properties["qubits"], linear.tolist(), strict=True) if not np.isnan(v)}
        pairs = [(a, b) for a, b in properties["couplers"] if a in h and b in h]
        quadratic = np.frombuffer(base64.b64decode(data["quad"]), dtype="<f8")
        return h, dict(zip(pairs, quadratic.tolist(), strict=True))

    def complaint(self, h: dict, J: dict, params: dict) -> str | None:
        """What the service would say of values out of range."""
        properties = self.describe()["properties"]
        if params.get("auto_scale", True):
            return "this stand-in does not scale"
        if any(not properties["h_range"][0] <= value <= properties["h_range"][1] for value in h.values()):
            return "h is out of range"
        if any(not properties["extended_j_range"][0] <= v <= properties["extended_j_range"][1] for v in J.values()):
            return "J is out of range"
        adjacent = nx.Graph(list(J))
        totals = {
            "per_qubit_coupling_range": [[(a, b) for b in adjacent[a]] for a in adjacent],
            "per_group_coupling_range": coupling_groups(self.lattice),
        }
        for limit, groups in totals.items():
            low, high = properties.get(limit, (-np.inf, np.inf))
            sums = [sum(J.get((a, b), 0.0) + J.get((b, a), 0.0) for a, b in group) for group in groups]
            if not low <= min(sums, default=0.0) <= max(sums, default=0.0) <= high:
                return f"couplings add up to more than {limit}"
        if self.timing(params["num_reads"])["qpu_access_time"] > properties["problem_run_duration_range"][1]:
            return "problem_run_duration_range"
        return None

    def timing(self, n_reads: int) -> dict[str, float]:
        each = _ANNEAL + _READOUT + _DELAY
        return {
            "qpu_programming_time": _PROGRAMMING,
            "qpu_sampling_time": n_reads * each,
            "qpu_access_time": _PROGRAMMING + n_reads * each,
        }

    def sample(self, h: dict, J: dict, n_reads: int, seed: int) -> np.ndarray:
        """Boltzmann samples, shape ``(n_reads, n_active)``, qubits in increasing order."""
        generator = torch.Generator().manual_seed(seed)
        chip = nx.Graph([pair for pair, value in J.items() if value != 0.0])
        chip.add_nodes_from(h)
        place = {qubit: k for k, qubit in enumerate(sorted(h))}
        spins = np.zeros((n_reads, len(h)), dtype=np.int8)
        for part in nx.connected_components(chip):
            nodes = sorted(part)
            local = {qubit: k for k, qubit in enumerate(nodes)}
            pairs = [(a, b) for a, b in J if a in local and b in local and J[a, b] != 0.0]
            edges = np.array([(local[a], local[b]) for a, b in pairs], dtype=np.int64).reshape(-1, 2)
            graph = graphs.Graph(len(nodes), edges)
            coupling = {tuple(sorted((local[a], local[b]))): J[a, b] for a, b in pairs}
            problem = IsingModel(
                torch.tensor([h[qubit] + self.bias for qubit in nodes], dtype=torch.float64),
                torch.tensor([coupling[tuple(edge)] for edge in graph.edges.tolist()], dtype=torch.float64),
                graph,
            )
            spins[:, [place[qubit] for qubit in nodes]] = self._draw(problem, n_reads, generator).numpy()
        return spins

    def _draw(self, problem: IsingModel, n_reads: int, generator: torch.Generator) -> torch.Tensor:
        if n_enumerated(problem) <= _MAX_ENUMERATED:
            return draw_exact(problem, n_reads, self.beta, generator)
        state = 2.0 * torch.randint(2, (n_reads, problem.n_spins), generator=generator).double() - 1.0
        for beta in self.beta * torch.linspace(0.05, 1.0, 20):
            state = gibbs_sweeps(problem, state, max(1, self.n_sweeps // 20), float(beta), generator)
        return gibbs_sweeps(problem, state, self.n_sweeps, self.beta, generator).to(torch.int8)


@dataclass
class Job:
    solver: Solver
    params: dict
    data: dict
    label: str | None
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    status: str = "PENDING"
    message: str = ""
    answer: dict | None = None

    def describe(self, with_answer: bool = False) -> dict:
        about = {
            "id": self.id,
            "type": "ising",
            "solver": self.solver.identity,
            "label": self.label,
            "status": self.status,
            "submitted_on": "2026-01-01T00:00:00.000000Z",
        }
        if self.status == "COMPLETED":
            about["solved_on"] = "2026-01-01T00:00:01.000000Z"
        if self.message:
            about["error_message"] = self.message
        return about | ({"answer": self.answer} if with_answer and self.answer else {})


class SapiServer:
    """The service. ``jobs`` are all that were ever submitted, ``heard`` the requests: method and path."""

    def __init__(self, *solvers: Solver, seconds: float = 0.0) -> None:
        self.solvers = {solver.name: solver for solver in solvers}
        self.seconds = seconds
        self.jobs: dict[str, Job] = {}
        self.heard: list[tuple[str, str]] = []
        self.canceled: list[str] = []
        self._plans: dict[str, list[str]] = defaultdict(list)
        self._lock = threading.Lock()
        self._seeds = iter(range(10**9))
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"service": self}))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/sapi/v2/"

    def __enter__(self) -> SapiServer:
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._http.shutdown()
        self._http.server_close()

    def configuration(self, token: str = TOKEN) -> str:
        """A configuration file for D-Wave's client."""
        return f"[defaults]\nendpoint = {self.url}\ntoken = {token}\n"

    def plan(self, place: str, fault: str, n_times: int = 1) -> None:
        """Plant a fault at the next ``n_times`` visits of ``list``, ``submit``, ``poll``, ``answer`` or ``run``."""
        with self._lock:
            self._plans[place] += [fault] * n_times

    def calm(self) -> None:
        self._plans.clear()

    def next_fault(self, place: str) -> str | None:
        with self._lock:
            return self._plans[place].pop(0) if self._plans[place] else None

    def submit(self, body: dict) -> dict:
        solver = self.solvers.get(body["solver"]["name"])
        if solver is None:
            return {"error_code": 404, "error_msg": "no such solver"}
        h, J = solver.decode(body["data"])
        complaint = solver.complaint(h, J, body["params"])
        if complaint:
            return {"error_code": 400, "error_msg": complaint}
        job = Job(solver, body["params"], body["data"], body.get("label"))
        self.jobs[job.id] = job
        threading.Thread(target=self._run, args=(job, h, J, next(self._seeds)), daemon=True).start()
        return job.describe()

    def _run(self, job: Job, h: dict, J: dict, seed: int) -> None:
        fault = self.next_fault("run")
        if fault == "never":
            return
        if fault in ("offline", "failed", "budget"):
            job.message = {
                "offline": "Solver is offline",
                "failed": "Internal error",
                "budget": "The user has insufficient remaining solver access time in the project",
            }[fault]
            job.status = "FAILED"
            return
        time.sleep(self.seconds)
        n_reads = job.params["num_reads"]
        spins = job.solver.sample(h, J, n_reads, seed)
        qubits = sorted(h)
        column = {qubit: k for k, qubit in enumerate(qubits)}
        values = spins.astype(float)
        energies = values @ np.array([h[q] for q in qubits])
        for (a, b), value in J.items():
            energies += value * values[:, column[a]] * values[:, column[b]]
        counts = np.ones(n_reads)
        if job.params.get("answer_mode", "histogram") == "histogram":
            spins, first, counts = np.unique(spins, axis=0, return_index=True, return_counts=True)
            energies = energies[first]
            order = np.argsort(energies)
            spins, energies, counts = spins[order], energies[order], counts[order]
        if fault == "short":
            spins, energies, counts = spins[: len(spins) // 2], energies[: len(spins) // 2], counts[: len(spins) // 2]
        packed = np.packbits(spins > 0, axis=1).tobytes()
        if fault == "truncated":
            packed = packed[: len(packed) // 3]
        job.answer = {
            "format": "qp",
            "active_variables": _encode(np.array(qubits, dtype="<i4")),
            "energies": _encode(energies.astype("<f8")),
            "solutions": base64.b64encode(packed).decode(),
            "num_occurrences": _encode(counts.astype("<i4")),
            "num_variables": max(job.solver.lattice) + 1,
            "timing": job.solver.timing(n_reads),
        }
        if job.status == "PENDING":
            job.status = "COMPLETED"


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


class _Handler(BaseHTTPRequestHandler):
    service: SapiServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and content in one packet

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        path = address.path.removeprefix("/sapi/v2/").strip("/").split("/")
        if path[0] == "solvers":
            if self._fails("list", "solver-definition-list+json"):
                return
            if len(path) == 2:
                listed = [solver.describe() for solver in self.service.solvers.values()]
                self._answer(listed, "solver-definition-list+json")
            elif path[2] in self.service.solvers:
                self._answer(self.service.solvers[path[2]].describe(), "solver-definition+json")
            else:
                self._send(404, b'{"error_code": 404, "error_msg": "no such solver"}', "x")
        elif len(path) == 1:
            if not self._fails("poll", "problems+json"):
                query = parse_qs(address.query)
                jobs = [self.service.jobs[name] for name in query["id"][0].split(",")]
                until = time.monotonic() + min(0.5, float(query.get("timeout", ["0"])[0]))
                while time.monotonic() < until and all(job.status == "PENDING" for job in jobs):
                    time.sleep(0.002)
                self._answer([job.describe() for job in jobs], "problems+json")
        elif not self._fails("answer", "problem+json"):
            self._answer(self.service.jobs[path[1]].describe(with_answer=True), "problem+json")

    def do_POST(self) -> None:
        body = self._body()
        if not self._fails("submit", "problems+json"):
            self._answer([self.service.submit(job) for job in body], "problems+json")

    def do_DELETE(self) -> None:
        body = self._body()
        if not self._fails("cancel", "problems+json"):
            for name in body:
                self.service.canceled.append(name)
                self.service.jobs[name].status = "CANCELLED"
            self._answer([self.service.jobs[name].describe() for name in body], "problems+json")

    def _body(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return json.loads(zlib.decompress(raw) if self.headers.get("Content-Encoding") == "deflate" else raw)

    def _fails(self, place: str, media: str) -> bool:
        self.service.heard.append((self.command, self.path))
        fault = self.service.next_fault(place)
        if self.headers.get("X-Auth-Token") != TOKEN:
            fault = "401"
        if fault is None:
            return False
        if fault == "reset":
            self.connection.shutdown(2)
            self.close_connection = True
        elif fault == "hang":
            time.sleep(30.0)
            self.close_connection = True
        elif fault == "malformed":
            self._send(200, b'[{"id": "', media)
        elif fault == "nonsense":
            self._answer([{"status": 7}], media)
        else:
            self._send(int(fault), json.dumps({"error_code": int(fault), "error_msg": f"status {fault}"}).encode(), "x")
        return True

    def _answer(self, value, media: str) -> None:
        self._send(200, json.dumps(value).encode(), media)

    def _send(self, status: int, content: bytes, media: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{_MEDIA}{media}; version=3.0.0")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")  # or the client keeps solvers on disk, beyond the test
        self.end_headers()
        self.wfile.write(content)
