"""Samplers of Ising problems behind one contract."""

from __future__ import annotations

from qbmscvi.samplers._base import Draw, Sampler, SamplerTraits, SamplingRequest
from qbmscvi.samplers._dimod import DimodSampler, SimulatedAnnealingSampler
from qbmscvi.samplers._exact import ExactSampler
from qbmscvi.samplers._gibbs import BlockGibbsSampler

__all__ = [
    "BlockGibbsSampler",
    "DimodSampler",
    "Draw",
    "ExactSampler",
    "Sampler",
    "SamplerTraits",
    "SamplingRequest",
    "SimulatedAnnealingSampler",
    "build_sampler",
]

_BY_NAME = {
    "gibbs": BlockGibbsSampler,
    "simulated_annealing": SimulatedAnnealingSampler,
    "exact": ExactSampler,
}


def build_sampler(spec: str | Sampler) -> Sampler:
    """Turn a sampler's name (``"gibbs"``, ``"simulated_annealing"``, ``"exact"``) into an instance.

    Raises
    ------
    ValueError
        If the name is unknown.
    TypeError
        If ``spec`` is neither a name nor a :class:`Sampler`.
    """
    if isinstance(spec, Sampler):
        return spec
    if isinstance(spec, str):
        if spec in _BY_NAME:
            return _BY_NAME[spec]()
        msg = (
            f"Unknown sampler {spec!r}. Use one of {', '.join(map(repr, _BY_NAME))}, or pass an instance of a "
            "class in `qbmscvi.samplers`."
        )
        raise ValueError(msg)
    msg = (
        f"`sampler` must be a name or a qbmscvi.samplers.Sampler, got {type(spec).__name__}. "
        "Wrap a dimod sampler as `qbmscvi.samplers.DimodSampler(sampler)`."
    )
    raise TypeError(msg)
