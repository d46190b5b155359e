r"""A simulated coherent Ising machine.

Degenerate optical parametric oscillators have measured amplitudes :math:`x_i` and are coupled through a feedback, while
the pump :math:`p` rises through their threshold :cite:p:`Wang13`. In units of the decay time of a pulse,

.. math::

    dx_i = \bigl[(p - 1 - x_i^2)\, x_i + \epsilon \textstyle\sum_j M_{ij} x_j\bigr]\,dt + \sigma\, dW_i,

and the signs are the spins. :math:`M` is the matrix of :mod:`qbmscvi.samplers.kaiwu._ising_matrix` divided by its
largest level. This is a Langevin equation in the potential
:math:`\sum_i (1 - p) x_i^2 / 2 + x_i^4 / 4 + \epsilon E(x)`. Far above the threshold amplitudes are near
:math:`\sqrt{p - 1}`. The spins then follow roughly a Boltzmann distribution at the inverse temperature
:math:`2 \epsilon (p - 1) / \sigma^2`, which freezes on the way. A laboratory experiment found answers of such machines
close to a Boltzmann distribution, at a temperature to be estimated :cite:p:`Takesue23`.

The simulation leaves out quantum noise that grows with the amplitude, loss and delay of the feedback, drift, and the
rescaling of the machine. No parameter was fitted to a device.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import torch

from qbmscvi.exceptions import SamplerUnavailable, require_integer
from qbmscvi.samplers._contract import Draw, Sampler, SamplerTraits, SamplingRequest, derive_seed
from qbmscvi.samplers.kaiwu._ising_matrix import IsingMatrix, fill_up
from qbmscvi.samplers.wrappers._calibrated import Calibrated
from qbmscvi.samplers.wrappers._polished import Polished

_STEP = 0.05  # decay times
_SLOW = 10.0  # seconds
_SATURATION = 3.0  # amplitudes that the detector tells apart, in those of a pump of two without feedback


class CoherentIsingSampler(Sampler):
    r"""A simulated coherent Ising machine without wrappers, with the limits of the devices for rent.

    The samples are not Boltzmann: put :class:`Calibrated` and :class:`Polished` around it, as
    :func:`build_coherent_ising_sampler` does. ``info`` has ``scale``, ``effective_beta`` (the assumed
    ``scale * device_beta``), ``is_range_limited``, ``rounding_error``, ``is_sorted``, ``is_deduplicated`` and
    ``n_distinct``.

    Parameters
    ----------
    n_physical_spins
        Spins of the machine, 550 or 1,000 for the devices of QBoson. One of them is the ancilla.
    n_bits
        Signed precision of the couplings.
    device_beta
        Assumed inverse temperature of the machine, in units in which its largest coupling is one.
    deduplicates
        Leave repeated states out, as an optimizer does. The sampler then repeats all states until there are enough.
    latency
        Seconds until an answer. Above zero the sampler counts as remote, and from ten seconds as slow.
    pump
        Pump at the end of the ramp, in units of the threshold.
    feedback
        :math:`\epsilon` for the largest coupling.
    noise
        :math:`\sigma`.
    duration
        Decay times; the pump rises during the first half.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    """

    def __init__(
        self,
        *,
        n_physical_spins: int = 1_000,
        n_bits: int = 8,
        # On problems of 6 to 12 spins, with the defaults below, 2.3 to 2.6 were measured.
        device_beta: float = 2.5,
        deduplicates: bool = False,
        latency: float = 0.0,
        pump: float = 2.0,
        feedback: float = 0.5,
        noise: float = 0.5,
        duration: float = 20.0,
    ) -> None:
        require_integer("n_physical_spins", n_physical_spins, 2, "The devices have 550 or 1000.")
        require_integer("n_bits", n_bits, 2, "The devices have 8.")
        positive = {"device_beta": device_beta, "feedback": feedback, "noise": noise, "duration": duration}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                msg = f"{name}={value} must be a positive finite number."
                raise ValueError(msg)
        if not 1 < pump < math.inf or not 0 <= latency < math.inf:
            msg = f"pump={pump} must be above 1, the threshold, and latency={latency} at least 0; both finite."
            raise ValueError(msg)
        self.n_physical_spins, self.n_bits, self.device_beta = n_physical_spins, n_bits, device_beta
        self.deduplicates, self.latency = deduplicates, latency
        self.pump, self.feedback, self.noise, self.duration = pump, feedback, noise, duration
        self.traits = SamplerTraits(
            target="approximate", is_remote=latency > 0, is_slow=latency >= _SLOW, max_spins=n_physical_spins - 1
        )
        self._reset()

    def _reset(self) -> None:
        self._canceled = threading.Event()

    def __getstate__(self) -> dict:
        """Settings only."""
        return {key: value for key, value in self.__dict__.items() if key != "_canceled"}

    def __setstate__(self, state: dict) -> None:
        """Take over settings."""
        self.__dict__.update(state)
        self._reset()

    def cancel(self) -> None:
        """End the wait for an answer."""
        self._canceled.set()

    def solve(self, matrix: np.ndarray, n_samples: int, seed: int) -> np.ndarray:
        """Answer of the machine: states of low :math:`-s^T M s`, sorted by it, lowest first.

        Parameters
        ----------
        matrix
            Symmetric, integer, zero diagonal, shape ``(n, n)``; the last spin is the ancilla.
        n_samples
            Number of runs.
        seed
            Seed of the noise.

        Returns
        -------
        Shape ``(n_samples, n)``, or fewer rows if the machine leaves repeated states out; int8, -1 or +1.
        """
        n_levels = 2 ** (self.n_bits - 1) - 1
        M = torch.from_numpy(matrix.astype(np.float32)) * (self.feedback / n_levels)
        generator = torch.Generator().manual_seed(seed)
        x = torch.zeros(n_samples, len(M))
        n_steps = math.ceil(self.duration / _STEP)
        for step in range(n_steps):
            pump = self.pump * min(1.0, 2.0 * (step + 1) / n_steps)
            kick = torch.randn(x.shape, generator=generator).mul_(self.noise * math.sqrt(_STEP))
            x = (x + _STEP * ((pump - 1.0 - x.square()) * x + x @ M) + kick).clamp_(-_SATURATION, _SATURATION)
        states = torch.where(x < 0, -1, 1).to(torch.int8).numpy()
        if self.deduplicates:
            meaning = states * states[:, -1:]
            states = states[np.unique(meaning, axis=0, return_index=True)[1]]
        wide = states.astype(np.int64)
        energies = -((wide @ matrix.astype(np.int64)) * wide).sum(1)
        return states[np.argsort(energies, kind="stable")]

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        self._canceled.clear()
        if self.latency and self._canceled.wait(self.latency):
            msg = f"The request to {self.name} was canceled."
            raise SamplerUnavailable(msg)
        return super()._sample_batch(requests, seeds)

    def _sample(self, request: SamplingRequest, seed: int) -> Draw:
        program = IsingMatrix.from_problem(request.problem, request.beta, self.device_beta, self.n_bits)
        rng = np.random.default_rng(derive_seed(seed, "order of the answer"))
        spins, found = program.read(self.solve(program.values, request.n_samples, seed), request.n_samples, rng)
        facts = {**program.facts, "effective_beta": program.scale * self.device_beta, **found}
        return Draw(fill_up(spins, request.n_samples, rng), info=facts)


def build_coherent_ising_sampler(*, n_polish_sweeps: int = 20, **settings: object) -> Sampler:
    """Put the usual wrappers around a :class:`CoherentIsingSampler`; ``sampler="coherent_ising"`` with settings.

    :class:`Calibrated` measures and corrects its temperature; :class:`Polished` reduces the remaining error by Gibbs
    sweeps.

    Parameters
    ----------
    n_polish_sweeps
        Sweeps of :class:`Polished`.
    settings
        Arguments of :class:`CoherentIsingSampler`.
    """
    return Polished(Calibrated(CoherentIsingSampler(**settings)), n_polish_sweeps)
