r"""Ising problems as the matrix of a coherent Ising machine, and its answers as samples.

Such a machine takes one symmetric integer matrix :math:`M` with zero diagonal and looks for spins of low
:math:`H(s) = -s^\top M s` (both halves of the matrix count). It has no fields: fields of the problem become couplings
to an additional last spin, the ancilla. Multiplying a state by its ancilla gives the spins of the problem. This is the
convention of QBoson's Kaiwu SDK. Only this module handles sign, factor two, ancilla, scale and rounding.

The scale sets the temperature, as on an annealer (:mod:`qbmscvi.samplers.dwave._program`). A quantizer that always maps
the largest coupling to the end of the range would change the temperature between requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from qbmscvi.exceptions import InvalidSamples

if TYPE_CHECKING:
    from typing import Any

    from qbmscvi.boltzmann.ising import IsingModel

_MARGIN = 1.0 - 1e-12  # so that the largest value does not round beyond the end of the range
_IMPOSSIBLE = -math.log(1e-6)


@dataclass(frozen=True, eq=False)
class IsingMatrix:
    r"""A problem as the machine gets it.

    Up to rounding and a constant, :math:`H(s) = 2 L\, c\, E(s)`, with :math:`L = 2^{\text{bits} - 1} - 1` levels and
    :math:`c` the ``scale``: fields and couplings of the problem times :math:`c` are at most one.

    Parameters
    ----------
    values
        Shape ``(n_spins + 1, n_spins + 1)``, int32; the last spin is the ancilla.
    scale
        Factor :math:`c`.
    is_range_limited
        Whether the range did not allow the scale for the requested temperature.
    rounding_error
        Root mean square error of the non-zero fields and couplings, in the units of the problem.
    """

    values: np.ndarray
    scale: float
    is_range_limited: bool
    rounding_error: float

    @classmethod
    def from_problem(cls, problem: IsingModel, beta: float, device_beta: float, n_bits: int) -> IsingMatrix:
        """Scale by ``beta / device_beta``, or by less if that exceeds the range, and round.

        Parameters
        ----------
        problem
            The problem.
        beta
            Requested inverse temperature.
        device_beta
            Inverse temperature of the machine, in units in which its largest coupling is one.
        n_bits
            Signed precision.
        """
        problem = problem.to("cpu", torch.float64)
        n = problem.n_spins
        energy = np.zeros((n + 1, n + 1))  # each coupling in both halves
        energy[:n, :n] = problem.couplings().numpy()
        energy[:n, n] = energy[n, :n] = problem.h.numpy()
        largest = np.abs(energy).max()
        wanted = beta / device_beta
        scale = min(wanted, _MARGIN / largest) if largest > 0 else wanted
        n_levels = 2 ** (n_bits - 1) - 1
        values = np.rint(-scale * n_levels * energy).astype(np.int32)
        error = (values / (-scale * n_levels) - energy)[np.triu(energy != 0)]
        rms = float(np.sqrt(np.mean(error**2))) if error.size else 0.0
        return cls(values, float(scale), bool(scale < wanted), rms)

    @property
    def facts(self) -> dict[str, Any]:
        """Facts for ``info`` of an answer."""
        return {
            "scale": self.scale,
            "is_range_limited": self.is_range_limited,
            "rounding_error": self.rounding_error,
        }

    def energy(self, states: np.ndarray) -> np.ndarray:
        """:math:`H` of states with the ancilla, shape ``(..., n_spins + 1)``."""
        states = states.astype(np.int64)
        return -((states @ self.values.astype(np.int64)) * states).sum(-1)

    def read(self, states: np.ndarray, n_samples: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, Any]]:
        """Spins of the problem, shape ``(n_states, n_spins)``, in random order, and facts about the answer.

        Machines sort their answers by energy, and some leave repeated states out. This method undoes the order. It
        cannot restore repetitions, which carry the probabilities. ``is_deduplicated`` is True if no state is repeated
        and one of two conditions holds. Either there are fewer states than the ``n_samples`` requested, or so many that
        a sample of any distribution would have a repetition (except for one in a million).

        Raises
        ------
        InvalidSamples
            If the answer has another width, or values other than -1 and +1.
        """
        width = len(self.values)
        if states.ndim != 2 or states.shape[1] != width or not len(states):
            msg = f"The answer has shape {states.shape}; rows of {width} spins, the ancilla included, are needed."
            raise InvalidSamples(msg)
        if not (np.abs(states) == 1).all():
            msg = "The answer has values other than -1 and +1."
            raise InvalidSamples(msg)
        spins = states[:, :-1] * states[:, -1:]
        energies = self.energy(states)
        n_states, n_spins = spins.shape
        n_distinct = len(np.unique(spins, axis=0))
        expected_repetitions = 0.5 * n_states * (n_states - 1) * 2.0**-n_spins  # at least
        is_one_due = n_states < n_samples or expected_repetitions > _IMPOSSIBLE
        facts = {
            # A few energies come in order by chance.
            "is_sorted": bool((np.diff(energies) >= 0).all()) and len(np.unique(energies)) > 2,
            "is_deduplicated": n_distinct == n_states and is_one_due,
            "n_distinct": n_distinct,
        }
        order = rng.permutation(n_states)
        return torch.from_numpy(spins[order].astype(np.int8)), facts


def fill_up(states: torch.Tensor, n_samples: int, rng: np.random.Generator) -> torch.Tensor:
    """Choose ``n_samples`` states at random, each as often as any other, or once more."""
    rounds = [rng.permutation(len(states)) for _ in range(math.ceil(n_samples / len(states)))]
    return states[torch.from_numpy(np.concatenate(rounds)[:n_samples])]
