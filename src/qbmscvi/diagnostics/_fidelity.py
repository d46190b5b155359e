r"""Distance between the distribution of a device's program and the distribution of the problem, without a job.

It includes ranges that are too narrow (samples are hotter than requested), rounding of fields and couplings, and broken
chains. The device is assumed to sample its program exactly, at a known temperature; noise, bias fields, freeze-out and
a wrong temperature add to the distance.

With all chains intact a device samples an Ising problem over the same spins, :math:`q(s) \propto e^{-\beta_d E_d(s)}`,
so that, with :math:`\Delta = \beta_d E_d - \beta E`,

.. math:: \mathrm{KL}(p \Vert q) = \langle \Delta \rangle_p + \log \langle e^{-\Delta} \rangle_p ,

exact by enumeration of at most 20 spins outside the largest color class, or an average over Gibbs samples of the
problem. The divergence includes majority votes of broken chains only if all states of the qubits of a copy can be
enumerated, too. Otherwise the rate of breaks is estimated for each chain, given the spins around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from qbmscvi.boltzmann.enumeration import MAX_ENUMERATED_SPINS, all_states, enumerate_ising, exact_moments, n_enumerated
from qbmscvi.boltzmann.ising import IsingModel
from qbmscvi.samplers import BlockGibbsSampler, SamplingRequest

if TYPE_CHECKING:
    from torch import Tensor

    from qbmscvi.samplers import DWaveSampler
    from qbmscvi.samplers.dwave._program import Program

_CHUNK = 1 << 16
_MAX_CHAIN = 12  # qubits of a chain, for enumeration of its states
_N_RATE = 256  # Gibbs samples for the mean rate of breaks


@dataclass(frozen=True)
class Fidelity:
    """Effect of a device on a problem.

    Parameters
    ----------
    kl
        Divergence of the device's distribution from the problem's, in nats.
    kl_scale
        Its standard error; zero if it is exact.
    method
        ``"exact"`` or ``"estimate"``.
    counts_broken_chains
        Whether ``kl`` describes spins after majority votes. Otherwise it describes intact chains; it is then complete
        without chains, or with ``chain_break="discard"``.
    chain_break_rate
        Expected share of broken chains; NaN if chains are too long.
    effective_beta
        Inverse temperature of the samples, in units of the problem.
    is_range_limited
        Whether ranges make it lower than requested.
    n_qubits, max_chain_length, n_copies, chain_strength
        The embedding: qubits of a copy, longest chain, copies, coupling within chains.
    access_seconds
        QPU access time of the request, by the solver's own timing model; None if it has none.
    """

    kl: float
    kl_scale: float
    method: Literal["exact", "estimate"]
    counts_broken_chains: bool
    chain_break_rate: float
    effective_beta: float
    is_range_limited: bool
    n_qubits: int
    max_chain_length: int
    n_copies: int
    chain_strength: float
    access_seconds: float | None


def device_fidelity(
    sampler: DWaveSampler,
    problem: IsingModel,
    *,
    beta: float = 1.0,
    n_samples: int = 1000,
    device_beta: float | None = None,
    n_bits: int | None = None,
    method: Literal["auto", "exact", "estimate"] = "auto",
    seed: int = 0,
) -> Fidelity:
    """Compare the distribution of a problem with that of its program on a device.

    Parameters
    ----------
    sampler
        The device; its working graph, ranges and settings are used, and nothing is submitted.
    problem
        The problem.
    beta
        Requested inverse temperature.
    n_samples
        Size of the request, for its access time, and number of Gibbs chains of an estimate.
    device_beta
        Inverse temperature of the device; None for the one that the sampler assumes.
    n_bits
        Signed precision of fields and couplings within the ranges; None for no rounding.
    method
        ``"auto"`` enumerates if at most 20 spins have to be visited.
    seed
        Seed of an estimate.

    Raises
    ------
    GraphMismatchError
        If there is no embedding, or ``method="exact"`` and the problem is too large.
    ValueError
        If the method is unknown or ``n_bits`` below 2.
    """
    if method not in ("auto", "exact", "estimate") or (n_bits is not None and n_bits < 2):
        msg = f"method={method!r} must be 'auto', 'exact' or 'estimate', and n_bits={n_bits} None or at least 2."
        raise ValueError(msg)
    problem = problem.to("cpu", torch.float64)
    program = sampler.program(problem, beta)
    h, J = program.h, program.J
    if n_bits is not None:
        levels = 2 ** (n_bits - 1) - 1
        h_step, J_step = sampler.ranges.h / levels, sampler.ranges.chain / levels
        h, J = h_step * np.round(h / h_step), J_step * np.round(J / J_step)
    true_beta = sampler.device_beta if device_beta is None else device_beta
    realized = _intact(problem, program, h, J)
    is_exact = method == "exact" or (method == "auto" and n_enumerated(problem) <= MAX_ENUMERATED_SPINS)
    has_chains = bool(program.embedding.is_chain.any())
    wants_votes = has_chains and sampler.chain_break == "majority"
    can_vote = is_exact and max(program.embedding.n_qubits, problem.n_spins) <= MAX_ENUMERATED_SPINS

    kl_scale = rate = 0.0
    if is_exact:
        kl = _exact_divergence(problem, realized, beta, true_beta)
    else:
        kl, kl_scale = _sampled_divergence(problem, realized, beta, true_beta, _gibbs(problem, beta, n_samples, seed))
    if has_chains and can_vote:
        voted, rate = _voted_distribution(program, h, J, true_beta)
        if wants_votes:
            probabilities = torch.softmax(-beta * problem.energy(all_states(problem.n_spins)), 0).numpy()
            kl = float(probabilities @ (np.log(probabilities) - np.log(np.maximum(voted, np.finfo(float).tiny))))
    elif has_chains:
        rate = _break_rate(program, h, J, true_beta, _gibbs(problem, beta, _N_RATE, seed))
    return Fidelity(
        kl=max(kl, 0.0),
        kl_scale=kl_scale,
        method="exact" if is_exact else "estimate",
        counts_broken_chains=wants_votes and can_vote,
        chain_break_rate=rate,
        effective_beta=program.scale * true_beta,
        is_range_limited=program.is_range_limited,
        n_qubits=program.embedding.n_qubits,
        max_chain_length=int(program.embedding.chain_lengths.max()),
        n_copies=program.embedding.n_copies,
        chain_strength=program.chain_strength,
        access_seconds=sampler.access_seconds(program, n_samples),
    )


def _intact(problem: IsingModel, program: Program, h: np.ndarray, J: np.ndarray) -> IsingModel:
    """Problem of the spins if all chains are intact, in the units of the device."""
    embedding = program.embedding
    is_edge = ~embedding.is_chain
    fields = np.bincount(embedding.spin_of, h, minlength=problem.n_spins)
    couplings = np.bincount(embedding.edge_of[is_edge], J[is_edge], minlength=problem.graph.n_edges)
    return IsingModel(torch.from_numpy(fields), torch.from_numpy(couplings.astype(float)), problem.graph)


def _exact_divergence(problem: IsingModel, other: IsingModel, beta: float, other_beta: float) -> float:
    mean, second = exact_moments(problem, beta)
    i, j = problem.graph.edge_index()

    def energy(model: IsingModel) -> float:
        return float(model.offset + model.h @ mean + model.J @ second[i, j])

    log_z, other_log_z = enumerate_ising(problem, beta).log_z, enumerate_ising(other, other_beta).log_z
    return other_beta * energy(other) + other_log_z - beta * energy(problem) - log_z


def _sampled_divergence(
    problem: IsingModel, other: IsingModel, beta: float, other_beta: float, spins: Tensor
) -> tuple[float, float]:
    delta = other_beta * other.energy(spins) - beta * problem.energy(spins)
    log_mean = torch.logsumexp(-delta, 0) - math.log(len(delta))
    influence = delta + (-delta - log_mean).exp()
    return float(delta.mean() + log_mean), float(influence.std()) / math.sqrt(len(delta))


def _gibbs(problem: IsingModel, beta: float, n_samples: int, seed: int) -> Tensor:
    return BlockGibbsSampler().sample(SamplingRequest(problem, n_samples, beta, seed=seed)).spins


def _voted_distribution(program: Program, h: np.ndarray, J: np.ndarray, beta: float) -> tuple[np.ndarray, float]:
    """Distribution of the spins after majority votes, over the rows of ``all_states``, and share of broken chains."""
    embedding = program.embedding
    lengths = embedding.chain_lengths
    n_spins, n_qubits = len(lengths), embedding.n_qubits
    members = np.zeros((n_qubits, n_spins))
    members[np.arange(n_qubits), embedding.spin_of] = 1.0
    bases = np.where(lengths % 2 == 0, 3, 2)  # lost, a tie if there can be one, won
    strides = np.append(np.cumprod(bases[::-1])[-2::-1], 1)  # first spin slowest
    table, broken, total = np.zeros(int(bases.prod())), 0.0, 0.0
    lowest = -np.abs(h).sum() - np.abs(J).sum()
    a, b = embedding.couplers.T
    places = np.arange(n_qubits - 1, -1, -1)
    for start in range(0, 2**n_qubits, _CHUNK):
        numbers = np.arange(start, min(start + _CHUNK, 2**n_qubits))
        states = 2.0 * ((numbers[:, None] >> places) & 1) - 1.0
        weights = np.exp(-beta * (states @ h + (states[:, a] * states[:, b]) @ J - lowest))
        votes = states @ members
        digits = np.where(votes < 0, 0, np.where(votes == 0, 1, bases - 1))
        table += np.bincount(digits @ strides, weights, minlength=len(table))
        broken += float(weights @ (np.abs(votes) < lengths).sum(1))
        total += float(weights.sum())
    probabilities = table.reshape(bases)
    for axis, base in enumerate(bases):
        if base == 3:
            lost, tie, won = np.split(probabilities, 3, axis)
            probabilities = np.concatenate([lost + 0.5 * tie, won + 0.5 * tie], axis)
    return probabilities.ravel() / total, broken / total / n_spins


def _break_rate(program: Program, h: np.ndarray, J: np.ndarray, beta: float, spins: Tensor) -> float:
    """Share of broken chains, each by enumeration of its states, with the others intact and as in ``spins``."""
    embedding = program.embedding
    qubits = spins.double().numpy()[:, embedding.spin_of]  # (n_samples, n_qubits)
    fields = np.tile(h, (len(qubits), 1))
    is_edge = ~embedding.is_chain
    for one, other in ((0, 1), (1, 0)):
        ends, others = embedding.couplers[is_edge, one], embedding.couplers[is_edge, other]
        np.add.at(fields.T, ends, (J[is_edge] * qubits[:, others]).T)
    rates = []
    for spin, length in enumerate(embedding.chain_lengths):
        if length == 1:
            rates.append(0.0)
            continue
        if length > _MAX_CHAIN:
            return math.nan
        chain = np.flatnonzero(embedding.spin_of == spin)
        place = {qubit: k for k, qubit in enumerate(chain.tolist())}
        states = all_states(int(length)).numpy()  # the first and the last are the intact ones
        inner = np.zeros(len(states))
        for (a, b), value in zip(embedding.couplers.tolist(), J, strict=True):
            if a in place and b in place:
                inner += value * states[:, place[a]] * states[:, place[b]]
        logits = torch.from_numpy(-beta * (fields[:, chain] @ states.T + inner))
        p = torch.softmax(logits, 1)
        rates.append(float(1.0 - p[:, 0].mean() - p[:, -1].mean()))
    return float(np.mean(rates))
