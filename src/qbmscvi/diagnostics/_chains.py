"""Mixing of Markov chains: rank-normalized split R-hat and effective sample size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm, rankdata
from torch import Tensor

MIXED = 1.05  # largest R-hat of chains that count as mixed


@dataclass(frozen=True)
class ChainDiagnostics:
    """Worst numbers over the recorded quantities.

    Parameters
    ----------
    r_hat
        Rank-normalized split R-hat :cite:p:`Vehtari21`: spread of all draws over the spread within chains. It is near
        one for chains that have mixed, and above :data:`MIXED` for chains that have not.
    ess
        Effective sample size of all chains together.
    n_chains, n_draws
        Number of chains, and of draws per chain.
    n_sweeps
        Sweeps of each chain from the first draw to the last.
    """

    r_hat: float
    ess: float
    n_chains: int
    n_draws: int
    n_sweeps: int


def chain_diagnostics(values: Tensor, *, n_sweeps: int) -> ChainDiagnostics:
    """Judge chains by some quantities of their states.

    Parameters
    ----------
    values
        Shape ``(n_chains, n_draws, n_quantities)``, with draws in order of time.
    n_sweeps
        Sweeps that each chain made for these draws.

    Returns
    -------
    The largest R-hat and the smallest effective sample size. A quantity that does not vary is left out.

    Raises
    ------
    ValueError
        If there are fewer than two chains or four draws of each.
    """
    from pyro.ops.stats import effective_sample_size, split_gelman_rubin  # slow to import

    n_chains, n_draws, _ = values.shape
    if n_chains < 2 or n_draws < 4:
        msg = f"R-hat needs 2 chains of 4 draws, got {n_chains} of {n_draws}. Follow more chains for longer."
        raise ValueError(msg)
    flat = values.detach().cpu().double().reshape(n_chains * n_draws, -1)
    flat = flat[:, flat.std(0) > 0]
    if not flat.shape[1]:
        return ChainDiagnostics(1.0, float(n_chains * n_draws), n_chains, n_draws, n_sweeps)
    ranks = rankdata(flat.numpy(), axis=0)
    scores = norm.ppf((ranks - 0.375) / (len(ranks) + 0.25))  # Blom's scores, as in the source
    scores = torch.from_numpy(np.ascontiguousarray(scores)).view(n_chains, n_draws, -1)
    r_hat, ess = split_gelman_rubin(scores), effective_sample_size(scores)
    return ChainDiagnostics(float(r_hat.max()), float(ess.min()), n_chains, n_draws, n_sweeps)
