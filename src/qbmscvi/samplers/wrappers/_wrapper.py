"""The base class of wrappers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qbmscvi.samplers._contract import Draw, Sampler, derive_seed
from qbmscvi.samplers.annealers._dimod import as_sampler

if TYPE_CHECKING:
    from qbmscvi.boltzmann.ising import IsingModel, SampleBatch
    from qbmscvi.samplers._contract import SamplerTraits, SamplingRequest

_OWN_FACTS = ("sampler", "seed", "beta", "seconds")


class Wrapper(Sampler):
    """Base class of samplers that wrap another sampler.

    Parameters
    ----------
    child
        The wrapped sampler; a dimod sampler becomes a :class:`DimodSampler`.

    Raises
    ------
    TypeError
        If ``child`` is no sampler, or a class instead of an instance.
    """

    def __init__(self, child: Sampler) -> None:
        self.child = as_sampler(child)

    @property
    def traits(self) -> SamplerTraits:
        """Those of the child."""
        return self.child.traits

    @property
    def name(self) -> str:
        """Name for logs and provenance."""
        return f"{type(self).__name__}({self.child.name})"

    def cancel(self) -> None:
        """Cancel the child's call."""
        self.child.cancel()

    def state_dict(self) -> dict[str, Any]:
        """The state of the child."""
        return {"child": self.child.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the child."""
        self.child.load_state_dict(state["child"])

    def check(self, problem: IsingModel) -> None:
        """Raise if the child cannot take the problem."""
        self.child.check(problem)

    def _own_seed(self, seed: int) -> int:
        """Seed of this wrapper; the child and other wrappers of its class have other seeds."""
        depth, child = 0, self.child
        while isinstance(child, Wrapper):
            depth += type(child) is type(self)
            child = child.child
        return derive_seed(seed, f"{type(self).__name__} {depth}")

    def _sample(self, request: SamplingRequest, seed: int) -> Draw:
        return self._sample_batch([request], [seed])[0]


def pass_on(batch: SampleBatch, **facts: Any) -> Draw:
    """Return a child's batch with further facts in ``info``."""
    inherited = {key: value for key, value in batch.info.items() if key not in _OWN_FACTS}
    return Draw(batch.spins, {**inherited, **facts})
