"""The base of samplers around samplers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qbmscvi.samplers._contract import Draw, Sampler, derive_seed
from qbmscvi.samplers.annealers._dimod import as_sampler

if TYPE_CHECKING:
    from qbmscvi.boltzmann.ising import IsingModel, SampleBatch
    from qbmscvi.samplers._contract import SamplerTraits, SamplingRequest

_OWN_FACTS = ("sampler", "seed", "beta", "seconds")


class Wrapper(Sampler):
    """Base of samplers that wrap another one.

    Parameters
    ----------
    child
        The wrapped sampler; a dimod sampler is taken as :class:`DimodSampler`.

    Raises
    ------
    TypeError
        If ``child`` is no sampler, or a class in place of an instance.
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
        """Let the child give up its question."""
        self.child.cancel()

    def state_dict(self) -> dict[str, Any]:
        """That of the child."""
        return {"child": self.child.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hand it to the child."""
        self.child.load_state_dict(state["child"])

    def check(self, problem: IsingModel) -> None:
        """Raise if the child cannot take the problem."""
        self.child.check(problem)

    def _own_seed(self, seed: int) -> int:
        """Seed of this wrapper, unlike that of the child and of other wrappers of its class."""
        depth, child = 0, self.child
        while isinstance(child, Wrapper):
            depth += type(child) is type(self)
            child = child.child
        return derive_seed(seed, f"{type(self).__name__} {depth}")

    def _sample(self, request: SamplingRequest, seed: int) -> Draw:
        return self._sample_batch([request], [seed])[0]


def pass_on(batch: SampleBatch, **facts: Any) -> Draw:
    """Hand a child's batch upwards, with further facts beside those that it reported."""
    inherited = {key: value for key, value in batch.info.items() if key not in _OWN_FACTS}
    return Draw(batch.spins, {**inherited, **facts})
