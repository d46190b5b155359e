"""Adapters around dimod samplers.

The wrapped sampler sees the problem multiplied by ``beta``, so that a sampler of the Boltzmann distribution
at unit temperature answers at the temperature asked for.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from qbmscvi.exceptions import GraphMismatchError
from qbmscvi.samplers._base import Draw, Sampler, SamplerTraits

if TYPE_CHECKING:
    import dimod

    from qbmscvi.ising import IsingModel
    from qbmscvi.samplers._base import SamplingRequest


class _DimodAdapter(Sampler):
    """Translate requests into calls of a :class:`dimod.Sampler`, and sample sets into spins."""

    sampler: dimod.Sampler

    @abstractmethod
    def _call_arguments(self, request: SamplingRequest, seed: int) -> dict[str, Any]:
        """Keyword arguments of ``sampler.sample`` for this request."""

    def _sample(self, request: SamplingRequest, seed: int) -> Draw:
        bqm = request.problem.to_bqm()
        bqm.scale(request.beta)
        seed = seed % 2**31 or 2**31 - 1  # C integers; path-integral annealing takes zero for "draw one"
        sample_set = self.sampler.sample(bqm, **self._call_arguments(request, seed))
        columns = [sample_set.variables.index(spin) for spin in range(request.problem.n_spins)]
        record = sample_set.record
        spins = np.repeat(record.sample[:, columns], record.num_occurrences, axis=0)
        facts = {"backend": type(self.sampler).__name__, **self._facts(sample_set)}
        return Draw(torch.from_numpy(spins), info=facts)

    def _facts(self, sample_set: dimod.SampleSet) -> dict[str, Any]:
        """Facts that the backend reports and that are worth keeping."""
        return {}


class DimodSampler(_DimodAdapter):
    """Any :class:`dimod.Sampler`.

    Parameters
    ----------
    sampler
        Instance, e.g. ``dwave.samplers.SteepestDescentSampler()``.
    sample_kwargs
        Keyword arguments of each call. ``num_reads`` and ``seed`` are filled in where the sampler takes them.
    target
        Law of its samples; declare ``"boltzmann"`` only if it is.
    max_spins
        Largest problem it takes, or None.

    Raises
    ------
    TypeError
        If ``sampler`` has no ``sample`` method and ``parameters``.
    """

    def __init__(
        self,
        sampler: dimod.Sampler,
        *,
        sample_kwargs: dict[str, Any] | None = None,
        target: Literal["boltzmann", "approximate", "ground_state"] = "approximate",
        max_spins: int | None = None,
    ) -> None:
        if not (hasattr(sampler, "sample") and hasattr(sampler, "parameters")):
            msg = f"{sampler!r} is not a dimod sampler: it has no `sample` or no `parameters`. Pass an instance."
            raise TypeError(msg)
        self.sampler = sampler
        self.sample_kwargs = dict(sample_kwargs or {})
        self.traits = SamplerTraits(target=target, max_spins=max_spins)

    @property
    def name(self) -> str:
        """Name for logs and provenance."""
        return f"DimodSampler[{type(self.sampler).__name__}]"

    def _call_arguments(self, request: SamplingRequest, seed: int) -> dict[str, Any]:
        offered = {"num_reads": request.n_samples, "seed": seed}
        return {key: value for key, value in offered.items() if key in self.sampler.parameters} | self.sample_kwargs


class SimulatedAnnealingSampler(_DimodAdapter):
    """Simulated annealing of ``dwave-samplers``, run as a Boltzmann sampler.

    A fresh run heats from ``beta / 100`` to the requested ``beta`` in geometric steps during ``n_ramp`` sweeps and
    stays there for ``n_hold`` sweeps with heat-bath acceptance in random order; that second part is a Markov chain
    with the Boltzmann distribution as its stationary law. With ``initial_spins`` only the second part runs. The
    default of dwave-samplers, which goes on to ``beta`` far above the one asked for, finds ground states instead.

    Parameters
    ----------
    n_ramp
        Sweeps of the ramp.
    n_hold
        Sweeps at the requested ``beta``, unless the request says otherwise.

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

    def _call_arguments(self, request: SamplingRequest, seed: int) -> dict[str, Any]:
        hold = np.ones(request.n_sweeps or self.n_hold)
        arguments: dict[str, Any] = {
            "num_reads": request.n_samples,
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
        treewidth = problem.to_dense().graph.treewidth
        if treewidth > limit:
            msg = (
                f"The problem's treewidth is about {treewidth}, but tree decomposition takes at most {limit}. Use a "
                "sparser `prior_graph` or fewer spins, or sampler='gibbs'."
            )
            raise GraphMismatchError(msg)

    def _call_arguments(self, request: SamplingRequest, seed: int) -> dict[str, Any]:
        return {"num_reads": request.n_samples, "seed": seed, "marginals": False}

    def _facts(self, sample_set: dimod.SampleSet) -> dict[str, Any]:
        return {"log_z": float(sample_set.info["log_partition_function"])}


class PathIntegralAnnealingSampler(_DimodAdapter):
    """Simulated quantum annealing by path-integral Monte Carlo, from ``dwave-samplers``.

    The transverse field falls linearly to zero while the problem grows to the requested ``beta``; worldlines freeze on
    the way as spins of an annealer do. Classical sweeps follow at that temperature, a Markov chain with the Boltzmann
    distribution as its stationary law. Without them (``n_hold=0``) the samples are declared approximate.

    Parameters
    ----------
    n_ramp
        Sweeps of the ramp.
    n_hold
        Sweeps after it.
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

    def _call_arguments(self, request: SamplingRequest, seed: int) -> dict[str, Any]:
        return {
            "num_reads": request.n_samples,
            "seed": seed,
            "beta_schedule_type": "custom",
            "num_sweeps_per_beta": 1,
            "Hp_field": self.problem_schedule,
            "Hd_field": self.transverse_schedule,
        }
