"""log Z of a prior during training.

A change of the parameters does work on the states of chains. By Jarzynski's equality the mean of ``exp(-work)`` over
Boltzmann samples is the ratio of the partition functions after and before. Weights accumulate it over many changes
:cite:p:`Carbone23`. These chains do not enter the moments, because an optimizer step raises the energy of the very
states that gave the moments.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from qbmscvi.boltzmann.ising import SampleBatch

if TYPE_CHECKING:
    from qbmscvi.boltzmann.ising import IsingModel
    from qbmscvi.boltzmann.prior import BoltzmannPrior

_RESAMPLE_BELOW = 0.5  # effective share of the chains


class LogZTracker:
    """Keeps the buffer ``log_z`` of a prior at its current parameters.

    Parameters
    ----------
    prior
        The prior; its last chains and their log weights track log Z.
    generator
        Random numbers of the resampling.
    """

    def __init__(self, prior: BoltzmannPrior, generator: torch.Generator) -> None:
        self.prior = prior
        self.generator = generator
        self.chains: SampleBatch | None = None  # with their energies at the parameters of the current log Z

    @property
    def n_chains(self) -> int:
        """Number of chains that track log Z."""
        return len(self.prior.tracking_log_weights)

    def follow(self, problem: IsingModel) -> None:
        """Update log Z to new parameters; no effect before the first :meth:`go_on`."""
        if self.chains is None:
            return
        work = problem.energy(self.chains.spins) - self.chains.energies
        log_weights = self.prior.tracking_log_weights.sub_(work)
        gain = torch.logsumexp(log_weights, 0) - math.log(self.n_chains)
        self.prior.log_z.add_(gain)
        log_weights.sub_(gain)  # the mean weight is one
        if (2.0 * log_weights).exp().sum() > self.n_chains / _RESAMPLE_BELOW:
            self._resample()
        self.chains = SampleBatch(self.prior.chains[-self.n_chains :].clone(), problem)

    def _resample(self) -> None:
        """Resample the chains by their weights, which are equal afterwards."""
        weights = self.prior.tracking_log_weights.exp().cpu()
        rows = torch.multinomial(weights, self.n_chains, replacement=True, generator=self.generator)
        self.prior.chains[-self.n_chains :] = self.chains.spins[rows.to(self.chains.spins.device)]
        self.prior.tracking_log_weights.zero_()

    def go_on(self, chains: SampleBatch, *, forget: bool) -> None:
        """Track with new states of the chains, samples of the current problem.

        ``forget`` sets their weights to one, for states that do not continue the earlier chains.
        """
        if forget:
            self.prior.tracking_log_weights.zero_()
        self.chains = chains

    def state_dict(self) -> dict[str, Any] | None:
        """Spins and energies of the chains."""
        return None if self.chains is None else {"spins": self.chains.spins, "energies": self.chains.energies}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore a state, which may be in main memory."""
        if state is not None:
            device = self.prior.chains.device
            self.chains = SampleBatch(**{name: value.to(device) for name, value in state.items()})
