"""Samplers of Ising problems behind one contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qbmscvi.samplers._broker import Broker, Ledger
from qbmscvi.samplers._contract import Draw, Sampler, SamplerTraits, SamplingRequest
from qbmscvi.samplers._temperature import BetaEstimate, effective_beta
from qbmscvi.samplers.annealers._dimod import (
    DimodSampler,
    PathIntegralAnnealingSampler,
    SimulatedAnnealingSampler,
    TreeDecompositionSampler,
    as_sampler,
)
from qbmscvi.samplers.dwave._sampler import DWaveSampler, build_dwave_sampler
from qbmscvi.samplers.kaiwu._sampler import KaiwuSampler, build_kaiwu_sampler
from qbmscvi.samplers.local._coherent_ising import CoherentIsingSampler, build_coherent_ising_sampler
from qbmscvi.samplers.local._exact import ExactSampler
from qbmscvi.samplers.local._gibbs import BlockGibbsSampler
from qbmscvi.samplers.local._tempering import ParallelTemperingSampler
from qbmscvi.samplers.wrappers._budgeted import Budgeted
from qbmscvi.samplers.wrappers._calibrated import Calibrated
from qbmscvi.samplers.wrappers._polished import Polished
from qbmscvi.samplers.wrappers._recordings import Recorded, Replayed
from qbmscvi.samplers.wrappers._rescaled import Rescaled
from qbmscvi.samplers.wrappers._retrying import Retrying
from qbmscvi.samplers.wrappers._spin_reversed import SpinReversed
from qbmscvi.samplers.wrappers._vetting import Vetted
from qbmscvi.samplers.wrappers._wrapper import Wrapper

if TYPE_CHECKING:
    import dimod

__all__ = [
    "SAMPLER_NAMES",
    "BetaEstimate",
    "BlockGibbsSampler",
    "Broker",
    "Budgeted",
    "Calibrated",
    "CoherentIsingSampler",
    "DWaveSampler",
    "DimodSampler",
    "Draw",
    "ExactSampler",
    "KaiwuSampler",
    "Ledger",
    "ParallelTemperingSampler",
    "PathIntegralAnnealingSampler",
    "Polished",
    "Recorded",
    "Replayed",
    "Rescaled",
    "Retrying",
    "Sampler",
    "SamplerTraits",
    "SamplingRequest",
    "SimulatedAnnealingSampler",
    "SpinReversed",
    "TreeDecompositionSampler",
    "Vetted",
    "Wrapper",
    "build_coherent_ising_sampler",
    "build_dwave_sampler",
    "build_kaiwu_sampler",
    "build_sampler",
    "effective_beta",
    "vet",
]

_BY_NAME = {
    "gibbs": BlockGibbsSampler,
    "parallel_tempering": ParallelTemperingSampler,
    "simulated_annealing": SimulatedAnnealingSampler,
    "path_integral_annealing": PathIntegralAnnealingSampler,
    "tree_decomposition": TreeDecompositionSampler,
    "exact": ExactSampler,
    "coherent_ising": build_coherent_ising_sampler,
    "dwave": build_dwave_sampler,
    "kaiwu": build_kaiwu_sampler,
}
SAMPLER_NAMES = tuple(_BY_NAME)


def vet(sampler: Sampler) -> Sampler:
    """Wrap a sampler in :class:`Vetted`, unless it is a local Boltzmann sampler of this package, or wrapped already.

    The traits that a sampler declares prove nothing. Only the classes of this package are tested against enumeration.
    """
    is_own = type(sampler) in _BY_NAME.values() and sampler.traits.target == "boltzmann"
    is_trusted = (is_own and not sampler.traits.is_remote) or isinstance(sampler, Vetted)
    return sampler if is_trusted else Vetted(sampler)


def build_sampler(spec: str | Sampler | dimod.Sampler) -> Sampler:
    """Turn a sampler's name into an instance with default settings, and wrap a dimod sampler in :class:`DimodSampler`.

    Names: ``"gibbs"``, ``"parallel_tempering"``, ``"simulated_annealing"``, ``"path_integral_annealing"``,
    ``"tree_decomposition"``, ``"exact"``, and ``"coherent_ising"`` (a simulation, see
    :func:`build_coherent_ising_sampler`). Two need an account: ``"dwave"`` (see :func:`build_dwave_sampler`) and
    ``"kaiwu"`` (see :func:`build_kaiwu_sampler`).

    Raises
    ------
    ValueError
        If the name is unknown.
    TypeError
        If ``spec`` is of another type, or a class instead of an instance.
    SamplerUnavailable
        If ``"dwave"`` or ``"kaiwu"`` is not installed, not configured, or cannot be reached.
    """
    if isinstance(spec, str):
        if spec in _BY_NAME:
            return _BY_NAME[spec]()
        msg = (
            f"Unknown sampler {spec!r}. Use one of {', '.join(map(repr, _BY_NAME))}, or pass an instance of a "
            "class in `qbmscvi.samplers`."
        )
        raise ValueError(msg)
    return as_sampler(spec, "a name, a qbmscvi.samplers.Sampler or a dimod sampler")
