r"""Parallel tempering over block Gibbs chains.

Replicas of every chain run at a ladder of inverse temperatures that ends at the requested one,
:math:`\beta_1 < \dots < \beta_T = \beta`; after each sweep neighbors exchange their states with probability
:math:`\min(1, \exp((\beta_{t+1} - \beta_t)(E_{t+1} - E_t)))`. Hot replicas cross barriers that a cold chain does not
cross, so shares of distant modes become right.

The sampler keeps the hot replicas between requests with equal numbers of chains and spins. A new sampler may have to
continue chains in equilibrium, which replicas of the wrong temperature would disturb. So its hot replicas start from
these chains, and run among themselves before they exchange states with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qbmscvi.samplers._contract import Draw, Sampler, SamplerTraits
from qbmscvi.samplers.local._gibbs import gibbs_sweeps, random_spins

if TYPE_CHECKING:
    from qbmscvi.boltzmann.ising import IsingModel
    from qbmscvi.samplers._contract import SamplingRequest


class ParallelTemperingSampler(Sampler):
    """Block Gibbs chains with replicas at higher temperatures.

    ``info["exchange_rate"]`` is the smallest acceptance rate between neighbors of the ladder. If it is below about 0.2,
    use more rungs.

    Parameters
    ----------
    n_rungs
        Number of temperatures, including the requested one.
    lowest
        Inverse temperature of the hottest replica, as a share of the requested one.
    n_sweeps
        Sweeps, and rounds of exchange, of chains that continue, unless the request sets them.
    burn_in
        The same for chains that start from random spins. If chains continue without hot replicas, new replicas first
        make these sweeps among themselves.
    """

    traits = SamplerTraits(target="boltzmann", is_persistent=True)

    def __init__(self, n_rungs: int = 8, *, lowest: float = 0.1, n_sweeps: int = 10, burn_in: int = 200) -> None:
        if n_rungs < 2 or n_sweeps < 1 or burn_in < 1 or not 0.0 < lowest < 1.0:
            msg = (
                f"n_rungs={n_rungs} must be at least 2, n_sweeps={n_sweeps} and burn_in={burn_in} at least 1, and "
                f"lowest={lowest} between 0 and 1."
            )
            raise ValueError(msg)
        self.ladder = np.geomspace(lowest, 1.0, n_rungs)
        self.n_sweeps = n_sweeps
        self.burn_in = burn_in
        self._hot: Tensor | None = None  # (n_rungs - 1, n_samples, n_spins), int8

    def state_dict(self) -> dict[str, Any]:
        """The hot replicas."""
        return {"hot": self._hot}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the hot replicas."""
        self._hot = state["hot"]

    def _sample(self, request: SamplingRequest, seed: int) -> Draw:
        problem = request.problem
        generator = torch.Generator(device=problem.h.device).manual_seed(seed)
        fresh = request.initial_spins is None
        n_sweeps = request.n_sweeps or (self.burn_in if fresh else self.n_sweeps)
        betas = (self.ladder * request.beta).tolist()
        n_hot = len(betas) - 1
        if fresh:
            cold = random_spins(request.n_samples, problem, generator)
            hot = torch.stack([random_spins(request.n_samples, problem, generator) for _ in range(n_hot)])
        else:
            cold = request.initial_spins.to(problem.h)
            if self._hot is not None and self._hot.shape[1:] == cold.shape:
                hot = self._hot.to(problem.h)
            else:
                hot, _ = _temper(problem, cold.expand(n_hot, *cold.shape), betas[:-1], self.burn_in, generator)
        replicas, rates = _temper(problem, torch.cat([hot, cold[None]]), betas, n_sweeps, generator)
        self._hot = replicas[:-1].to(torch.int8)
        return Draw(replicas[-1], info={"n_sweeps": n_sweeps, "exchange_rate": float(rates.min())})


def _temper(
    problem: IsingModel, replicas: Tensor, betas: list[float], n_sweeps: int, generator: torch.Generator
) -> tuple[Tensor, np.ndarray]:
    """Sweep replicas and exchange neighbors ``n_sweeps`` times; return them and the share of exchanges per pair."""
    accepted = np.zeros(len(betas) - 1)
    for _ in range(n_sweeps):
        replicas = torch.stack(
            [gibbs_sweeps(problem, s, 1, beta, generator) for s, beta in zip(replicas, betas, strict=True)]
        )
        accepted += _exchange(problem, replicas, betas, generator)
    return replicas, accepted / n_sweeps


def _exchange(problem: IsingModel, replicas: Tensor, betas: list[float], generator: torch.Generator) -> np.ndarray:
    """Exchange neighbors in place, from hot to cold; return the share of chains that exchanged, per pair."""
    energies = problem.energy(replicas)  # (n_rungs, n_chains)
    rates = np.zeros(len(betas) - 1)
    for t in range(len(betas) - 1):
        gain = (betas[t + 1] - betas[t]) * (energies[t + 1] - energies[t])
        uniform = torch.rand(gain.shape, generator=generator, device=gain.device, dtype=gain.dtype)
        swap = uniform.log() < gain
        pair = torch.stack([replicas[t], replicas[t + 1]])
        replicas[t] = torch.where(swap[:, None], pair[1], pair[0])
        replicas[t + 1] = torch.where(swap[:, None], pair[0], pair[1])
        both = torch.stack([energies[t], energies[t + 1]])
        energies[t] = torch.where(swap, both[1], both[0])
        energies[t + 1] = torch.where(swap, both[0], both[1])
        rates[t] = float(swap.float().mean())
    return rates
