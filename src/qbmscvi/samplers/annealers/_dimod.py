"""Adapters around dimod samplers.

The dimod sampler gets the problem multiplied by ``beta``, so that a sampler of the Boltzmann distribution at unit
temperature answers at the requested temperature. The adapter accepts bits or spins, variables in any order, rows with
counts or repeated rows, and more or fewer rows than requested.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from qbmscvi.exceptions import GraphMismatchError, InvalidSamples
from qbmscvi.samplers._contract import Draw, Sampler, SamplerTraits, derive_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    import dimod

    from qbmscvi.boltzmann.ising import IsingModel
    from qbmscvi.samplers._contract import SamplingRequest


# Solvers of dimod and dwave-samplers that look for ground states or list all states, and annealers that end far too
# cold unless one of these arguments sets their schedule.
_SOLVERS = {
    "ExactSolver",
    "PlanarGraphSolver",
    "SteepestDescentComposite",
    "SteepestDescentSampler",
    "SteepestDescentSolver",
    "TabuSampler",
    "TreeDecompositionSolver",
}
_ANNEALERS = {"SimulatedAnnealingSampler", "Neal"}
_SCHEDULES = {"beta_range", "beta_schedule"}
_PASS_PROBLEMS_ON = ("dimod.", "dwave.preprocessing.")  # composites of these packages keep variables and couplings


class _DimodAdapter(Sampler):
    """Translate requests into calls of a :class:`dimod.Sampler`, and sample sets into spins."""

    sampler: dimod.Sampler

    @abstractmethod
    def _call_arguments(self, request: SamplingRequest, n_reads: int, seed: int) -> dict[str, Any]:
        """Keyword arguments of ``sampler.sample`` for so many samples of this request."""

    def _sample(self, request: SamplingRequest, seed: int) -> Draw:
        bqm = request.problem.to_bqm()
        bqm.scale(request.beta)
        labels = self._label(request.problem)
        bqm.relabel_variables(dict(enumerate(labels)))
        rng = np.random.default_rng(seed)
        parts: list[np.ndarray] = []
        n_missing = request.n_samples
        while n_missing > 0:
            seed = seed % 2**31 or 2**31 - 1  # C integers; path-integral annealing takes zero for "draw one"
            sample_set = self.sampler.sample(bqm, **self._call_arguments(request, n_missing, seed))
            parts.append(_read(sample_set, labels))
            if not len(parts[-1]):
                msg = f"{self.name} returned no samples; {n_missing} were requested."
                raise InvalidSamples(msg)
            n_missing -= len(parts[-1])
            seed = derive_seed(seed, "the samples that are missing")
        spins = np.concatenate(parts)
        if n_missing < 0:  # drop random ones: some samplers sort by energy
            spins = spins[rng.choice(len(spins), request.n_samples, replace=False)]
        facts = {"backend": type(self.sampler).__name__, **self._facts(sample_set)}
        return Draw(torch.from_numpy(spins), info=facts)

    def _label(self, problem: IsingModel) -> Sequence[Any]:
        """Names of the spins in the sampler."""
        return range(problem.n_spins)

    def _facts(self, sample_set: dimod.SampleSet) -> dict[str, Any]:
        """Facts of the answer that are kept in ``info``."""
        return {}


def _read(sample_set: dimod.SampleSet, labels: Sequence[Any]) -> np.ndarray:
    """Spins of a sample set, one row for each occurrence; columns in the order of ``labels``."""
    variables = list(sample_set.variables)
    columns = {str(variable): column for column, variable in enumerate(variables)}  # labels may come back as text
    missing = [label for label in labels if str(label) not in columns]
    if missing:
        msg = f"The answer has no values of variable {missing[0]!r}; it has those of {variables[:5]} and so on."
        raise InvalidSamples(msg)
    record = sample_set.record
    values = record.sample[:, [columns[str(label)] for label in labels]]
    if sample_set.vartype.name == "BINARY":
        values = 2 * values.astype(np.int8) - 1  # bits may be unsigned, where dimod's own conversion overflows
    return np.repeat(values, record.num_occurrences.astype(int), axis=0)


class DimodSampler(_DimodAdapter):
    """Any :class:`dimod.Sampler`.

    The sampler gets the problem times ``beta`` and no temperature, and should answer at unit temperature. Wrap one that
    does not in :class:`Calibrated`. Bits become spins. If the sampler returns too many rows, a random part of them is
    used; if it returns too few, the rest is requested again.

    Parameters
    ----------
    sampler
        Instance, e.g. ``dwave.samplers.RotorModelAnnealingSampler()``. A structured one (``dimod.Structured``) takes a
        prior that fits its graph, e.g. ``prior_graph=sampler.to_networkx_graph()``.
    sample_kwargs
        Keyword arguments of each call. ``num_reads`` and ``seed`` are filled in where the sampler takes them.
    target
        Distribution of its samples; declare ``"boltzmann"`` only if it is true. None means ``"ground_state"`` for
        solvers of dimod and dwave-samplers, and for their simulated annealing without ``beta_range`` or
        ``beta_schedule``; for all others ``"approximate"``. Use ``sampler="simulated_annealing"`` to anneal to the
        right temperature.
    max_spins
        Largest problem it takes, or None.

    Raises
    ------
    TypeError
        If ``sampler`` is a class, or has no ``sample`` method and ``parameters``.
    """

    def __init__(
        self,
        sampler: dimod.Sampler,
        *,
        sample_kwargs: dict[str, Any] | None = None,
        target: Literal["boltzmann", "approximate", "ground_state"] | None = None,
        max_spins: int | None = None,
    ) -> None:
        _refuse_class(sampler)
        if not _is_dimod_sampler(sampler):
            msg = f"{sampler!r} is not a dimod sampler: it has no `sample` or no `parameters`. Pass an instance."
            raise TypeError(msg)
        self.sampler = sampler
        self.sample_kwargs = dict(sample_kwargs or {})
        layers = _layers(sampler)
        if target is None:
            is_solver = any(_is_solver(layer, self.sample_kwargs) for layer in layers)
            target = "ground_state" if is_solver else "approximate"
        self.traits = SamplerTraits(target=target, max_spins=max_spins)
        self._structure = next((layer for layer in layers if hasattr(layer, "nodelist")), None)

    @property
    def name(self) -> str:
        """Name for logs and provenance."""
        return f"DimodSampler[{type(self.sampler).__name__}]"

    def check(self, problem: IsingModel) -> None:
        """Raise :class:`~qbmscvi.exceptions.GraphMismatchError` if spins or couplings do not fit the sampler."""
        super().check(problem)
        self._label(problem)

    def _label(self, problem: IsingModel) -> Sequence[Any]:
        """Numbers of the spins, or for a structured sampler the first nodes of its list, in the order of its graph."""
        numbers = range(problem.n_spins)
        if self._structure is None:
            return numbers
        nodes = list(self._structure.nodelist)
        couplers = {frozenset(pair) for pair in self._structure.edgelist}
        edges = problem.graph.edges.tolist()
        for labels in (numbers, nodes[: problem.n_spins]):
            if set(labels) <= set(nodes) and len(labels) == problem.n_spins:
                if all(frozenset((labels[i], labels[j])) in couplers for i, j in edges):
                    return labels
        msg = (
            f"The prior does not fit {self.name}: its {problem.n_spins} spins and {len(edges)} couplings are no part "
            f"of the {len(nodes)} nodes and {len(couplers)} couplers of the sampler. Wrap the sampler in an embedding "
            "composite, e.g. `dwave.system.EmbeddingComposite(sampler)`, or build the model on its graph: "
            "`prior_graph=sampler.to_networkx_graph()` with as many spins as that has nodes."
        )
        raise GraphMismatchError(msg)

    def _call_arguments(self, request: SamplingRequest, n_reads: int, seed: int) -> dict[str, Any]:
        offered = {"num_reads": n_reads, "seed": seed}
        return {key: value for key, value in offered.items() if key in self.sampler.parameters} | self.sample_kwargs


def as_sampler(value: Any, allowed: str = "a qbmscvi.samplers.Sampler or a dimod sampler") -> Sampler:
    """Return a sampler unchanged, and a dimod sampler as :class:`DimodSampler`.

    Raises
    ------
    TypeError
        If it is neither, or a class instead of an instance.
    """
    if isinstance(value, Sampler):
        return value
    _refuse_class(value)
    if _is_dimod_sampler(value):
        return DimodSampler(value)
    msg = f"`sampler` must be {allowed}, got {type(value).__name__}. Pass e.g. `qbmscvi.samplers.BlockGibbsSampler()`."
    raise TypeError(msg)


def _refuse_class(value: Any) -> None:
    if isinstance(value, type):
        msg = f"{value.__name__} is a class, but a sampler is an instance of one: pass `{value.__name__}()`."
        raise TypeError(msg)


def _is_dimod_sampler(value: Any) -> bool:
    return hasattr(value, "sample") and hasattr(value, "parameters")


def _layers(sampler: dimod.Sampler) -> list[dimod.Sampler]:
    """The sampler, and the samplers that it wraps, as long as each passes on the same problem."""
    layers = [sampler]
    while type(layers[-1]).__module__.startswith(_PASS_PROBLEMS_ON) and getattr(layers[-1], "children", None):
        layers.append(layers[-1].children[0])
    return layers


def _is_solver(sampler: dimod.Sampler, arguments: dict[str, Any]) -> bool:
    """Whether this exact class, not a subclass, is known to find ground states with these arguments."""
    kind = type(sampler)
    if not kind.__module__.startswith(("dimod.", "dwave.")):
        return False
    return kind.__name__ in _SOLVERS or (kind.__name__ in _ANNEALERS and not _SCHEDULES & set(arguments))


class SimulatedAnnealingSampler(_DimodAdapter):
    """Simulated annealing of ``dwave-samplers``, run as a Boltzmann sampler.

    A fresh run cools from ``beta / 100`` to the requested ``beta`` in geometric steps during ``n_ramp`` sweeps. It then
    stays there for ``n_hold`` sweeps with heat-bath acceptance in random order. This second part is a Markov chain with
    the Boltzmann distribution as its stationary distribution. With ``initial_spins`` only the second part runs. The
    default schedule of dwave-samplers ends far above the requested ``beta`` and finds ground states instead.

    Parameters
    ----------
    n_ramp
        Sweeps of the ramp.
    n_hold
        Sweeps at the requested ``beta``, unless the request sets them.

    Raises
    ------
    ValueError
        If either is below one.
    """

    traits = SamplerTraits(target="boltzmann", is_persistent=True)

    def __init__(self, n_ramp: int = 100, n_hold: int = 100) -> None:
        if n_ramp < 1 or n_hold < 1:
            msg = f"n_ramp={n_ramp} and n_hold={n_hold} must both be at least 1."
            raise ValueError(msg)
        from dwave.samplers import SimulatedAnnealingSampler as Backend

        self.sampler = Backend()
        self.n_ramp = n_ramp
        self.n_hold = n_hold

    def _call_arguments(self, request: SamplingRequest, n_reads: int, seed: int) -> dict[str, Any]:
        hold = np.ones(request.n_sweeps or self.n_hold)
        arguments: dict[str, Any] = {
            "num_reads": n_reads,
            "seed": seed,
            "beta_schedule_type": "custom",
            "num_sweeps_per_beta": 1,
            "randomize_order": True,
            "proposal_acceptance_criteria": "Gibbs",
        }
        if request.initial_spins is None:
            arguments["beta_schedule"] = np.concatenate([np.geomspace(0.01, 1.0, self.n_ramp), hold])
        else:
            arguments["beta_schedule"] = hold
            initial = request.initial_spins.to("cpu", torch.int8).numpy()
            arguments["initial_states"] = (initial, list(range(request.problem.n_spins)))
        return arguments


class TreeDecompositionSampler(_DimodAdapter):
    """Exact independent draws for problems of low treewidth, by the tree decomposition of ``dwave-samplers``.

    ``info["log_z"]`` is log Z of the problem times ``beta``. Chains, rings, trees, and bipartite problems with few
    spins in the smaller layer fit; the sampler refuses a treewidth above its limit (25).
    """

    traits = SamplerTraits(target="boltzmann", is_exact=True)

    def __init__(self) -> None:
        from dwave.samplers import TreeDecompositionSampler as Backend

        self.sampler = Backend()

    def check(self, problem: IsingModel) -> None:
        """Raise :class:`~qbmscvi.exceptions.GraphMismatchError` if the treewidth is too large."""
        limit = self.sampler.properties["max_treewidth"]
        treewidth = problem.graph.treewidth
        if treewidth > limit:
            msg = (
                f"The problem's treewidth is about {treewidth}, but tree decomposition takes at most {limit}. Use a "
                "sparser `prior_graph` or fewer spins, or sampler='gibbs'."
            )
            raise GraphMismatchError(msg)

    def _call_arguments(self, request: SamplingRequest, n_reads: int, seed: int) -> dict[str, Any]:
        return {"num_reads": n_reads, "seed": seed, "marginals": False}

    def _facts(self, sample_set: dimod.SampleSet) -> dict[str, Any]:
        return {"log_z": float(sample_set.info["log_partition_function"])}


class PathIntegralAnnealingSampler(_DimodAdapter):
    """Simulated quantum annealing by path-integral Monte Carlo, from ``dwave-samplers``.

    The transverse field falls linearly to zero while the problem grows to the requested ``beta``. Worldlines freeze on
    the way, like spins of an annealer. Classical sweeps at that temperature follow, a Markov chain with the Boltzmann
    distribution as its stationary distribution. Without them (``n_hold=0``) the samples are declared approximate.

    Parameters
    ----------
    n_ramp
        Sweeps of the ramp.
    n_hold
        Classical sweeps after the ramp.
    transverse_field
        Transverse field at the start, in units of the problem times ``beta``.
    """

    def __init__(self, n_ramp: int = 200, n_hold: int = 50, transverse_field: float = 3.0) -> None:
        if n_ramp < 2 or n_hold < 0 or not transverse_field > 0:
            msg = (
                f"n_ramp={n_ramp} must be at least 2, n_hold={n_hold} at least 0 and "
                f"transverse_field={transverse_field} positive."
            )
            raise ValueError(msg)
        from dwave.samplers import PathIntegralAnnealingSampler as Backend

        self.sampler = Backend()
        self.traits = SamplerTraits(target="boltzmann" if n_hold else "approximate")
        self.problem_schedule = np.concatenate([np.linspace(0.0, 1.0, n_ramp), np.ones(n_hold)])
        self.transverse_schedule = transverse_field * np.concatenate([np.linspace(1.0, 0.0, n_ramp), np.zeros(n_hold)])

    def _call_arguments(self, request: SamplingRequest, n_reads: int, seed: int) -> dict[str, Any]:
        return {
            "num_reads": n_reads,
            "seed": seed,
            "beta_schedule_type": "custom",
            "num_sweeps_per_beta": 1,
            "Hp_field": self.problem_schedule,
            "Hd_field": self.transverse_schedule,
        }
