"""A D-Wave solver: how it is found and opened, and its properties.

A "device" is the structured dimod sampler that D-Wave's packages build for a solver, or a substitute for it.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from qbmscvi.exceptions import SamplerTimeout, SamplerUnavailable
from qbmscvi.samplers._background import call_in_background
from qbmscvi.samplers.dwave._errors import guarded, install_hint

if TYPE_CHECKING:
    from collections.abc import Mapping

    import networkx as nx

# Parameters that the sampler sets, or that make no sense for it.
_OWN_PARAMETERS = ("answer_mode", "auto_scale", "label", "max_answers", "num_reads", "warnings")


def connect(*, solver: str | None, topology: str | None, profile: str | None, timeout: float) -> Any:
    """Open a solver through D-Wave's own client and configuration.

    Parameters
    ----------
    solver, topology
        Name and topology of the solver; None for the configured solver, or else the largest.
    profile
        Section of D-Wave's configuration file.
    timeout
        Seconds to wait for the solver, and later for every job.

    Raises
    ------
    SamplerUnavailable, SamplerTimeout
        If ``dwave-system`` or credentials are missing, or no such solver can be reached in time.
    """
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
    wanted = {"name__eq": solver, "topology__type__eq": topology}
    wanted = {key: value for key, value in wanted.items() if value is not None}
    choice = {"solver": {"order_by": "-num_active_qubits", **wanted}} if wanted else {}
    options = {"profile": profile, "http_retry_total": 2}
    # In another thread: three attempts of every request may take longer than the timeout.
    open_device = partial(dwave.system.DWaveSampler, **options, **choice)
    opening = call_in_background(partial(guarded, open_device, profile=profile))
    try:
        device, error = opening.result(timeout=timeout)
    except TimeoutError:
        device, error = None, SamplerTimeout(f"D-Wave's service did not list its solvers within {timeout:g} s.")
    if error is not None:
        raise error
    return device


def name_of(device: Any) -> str:
    """Name of the solver."""
    solver = getattr(device, "solver", None)
    return str(device.properties["chip_id"] if solver is None else solver.name)


def lattice_of(device: Any) -> nx.Graph:
    """Working qubits and couplers, as a lattice of ``dwave-networkx``."""
    import dwave_networkx as dnx

    family, shape = device.properties["topology"]["type"], device.properties["topology"]["shape"]
    build = {"chimera": dnx.chimera_graph, "pegasus": dnx.pegasus_graph, "zephyr": dnx.zephyr_graph}[family]
    return build(*shape, node_list=device.nodelist, edge_list=device.edgelist)


def check_parameters(device: Any, parameters: Mapping[str, Any]) -> None:
    """Refuse solver parameters that the device does not know, or with values that it would refuse.

    Raises
    ------
    ValueError
        If there is one.
    """
    name, allowed = name_of(device), sorted(set(device.parameters) - set(_OWN_PARAMETERS))
    unknown = sorted(set(parameters) - set(allowed))
    if unknown:
        reserved = [name for name in unknown if name in _OWN_PARAMETERS]
        why = f" ({', '.join(reserved)}: set by the sampler)" if reserved else ""
        msg = f"Solver parameters {unknown} are not allowed{why}. {name} takes {', '.join(allowed)}."
        raise ValueError(msg)
    time_range, annealing_time = device.properties.get("annealing_time_range"), parameters.get("annealing_time")
    if annealing_time is not None and time_range and not time_range[0] <= annealing_time <= time_range[1]:
        msg = (
            f"annealing_time={annealing_time:g} is outside the range of {name}: {time_range[0]:g} to "
            f"{time_range[1]:g} microseconds."
        )
        raise ValueError(msg)
    if "anneal_schedule" in parameters and hasattr(device, "validate_anneal_schedule"):
        device.validate_anneal_schedule(parameters["anneal_schedule"])


def read_times(device: Any, n_qubits: int, parameters: Mapping[str, Any]) -> tuple[float, float | None, int]:
    """Access time of a job in microseconds, constant part and per read, and the most reads of a job.

    Without a timing model of the device the constant part is zero and the part per read is None.
    """
    most = int(device.properties.get("num_reads_range", (1, 10_000))[1])
    solver = getattr(device, "solver", None)
    if solver is None or not device.properties.get("problem_timing_data"):
        return 0.0, None, most
    one, two = (float(solver.estimate_qpu_access_time(n_qubits, num_reads=n, **parameters)) for n in (1, 2))
    each, longest = two - one, device.properties.get("problem_run_duration_range", (0, math.inf))[1]
    room = (longest - (one - each)) / each
    return one - each, each, most if math.isinf(room) else max(1, min(most, math.floor(room)))
