r"""A gate for answers that cannot be samples of the problem at the temperature asked for.

Samples of another temperature (ground states, noise) are refused, and repeated states. Both tests rest on one fact. Let
:math:`s'` be what reversible Gibbs sweeps at the temperature asked for make of :math:`s`. If :math:`s` is a Boltzmann
sample, the pair can be exchanged: any function that changes its sign when :math:`s` and :math:`s'` change places is
positive and negative equally often. For independent samples the signs are coin flips, given everything else, so that
their sum exceeds :math:`z` of its standard deviations with probability :math:`e^{-z^2/2}` at most (Hoeffding's
inequality), whatever the problem and however few the samples. An honest answer is refused by each test once in a
million.

Significance alone would refuse what is only nearly right, and is wrong for samples that are not independent. So each
test asks for a large effect, too.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qbmscvi.exceptions import InvalidSamples
from qbmscvi.samplers._temperature import effective_beta, pseudo_likelihood_score
from qbmscvi.samplers.local._gibbs import gibbs_sweeps
from qbmscvi.samplers.wrappers._wrapper import Wrapper, pass_on

if TYPE_CHECKING:
    from torch import Tensor

    from qbmscvi.boltzmann.ising import IsingModel, SampleBatch
    from qbmscvi.samplers._contract import Draw, Sampler, SamplingRequest

_ALPHA = 1e-6
_MAX_Z = math.sqrt(-2.0 * math.log(_ALPHA))  # 5.3: no fewer than 28 samples can be refused
_N_SWEEPS = 5
_MAX_LOSS = 0.1


class Vetted(Wrapper):
    r"""Refuse answers that are no samples of the problem at the temperature asked for.

    - Ground states are too cold, noise is too hot: Gibbs sweeps at the temperature asked for raise, or lower, the
      energy of most samples, and the maximum of the pseudo-likelihood lies beyond ``max_ratio`` times the inverse
      temperature asked for, or below its ``max_ratio``-th part.
    - Repeated states fall apart: sweeps lead away, in a tenth of the samples and more, from the states that the
      answer consists of; even at the inverse temperature that it seems to have.

    What passes may still be wrong: one of several far-apart modes, say, looks like the whole to single spin flips, and
    fewer than 28 samples prove nothing. ``info`` has ``effective_beta`` (where there is an estimate) and
    ``effective_share``: the effective number of distinct states :math:`1 / \sum_k f_k^2` (:math:`f_k`: their shares)
    over the number of samples.

    Parameters
    ----------
    child
        The wrapped sampler.
    max_ratio
        Largest acceptable factor between the inverse temperature of the samples and the one asked for.

    Raises
    ------
    ValueError
        If ``max_ratio`` is not above one.
    """

    def __init__(self, child: Sampler, max_ratio: float = 4.0) -> None:
        super().__init__(child)
        if not max_ratio > 1:
            msg = f"max_ratio={max_ratio} must be above 1."
            raise ValueError(msg)
        self.max_ratio = max_ratio

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        asked = [replace(request, seed=seed) for request, seed in zip(requests, seeds, strict=True)]
        batches = self.child.sample_batch(asked)
        return [self._vet(request, batch) for request, batch in zip(asked, batches, strict=True)]

    def _vet(self, request: SamplingRequest, batch: SampleBatch) -> Draw:
        problem, spins = request.problem.to("cpu", torch.float64), batch.spins.cpu()
        generator = torch.Generator().manual_seed(self._own_seed(request.seed))
        rise = problem.energy(_sweep(problem, spins, request.beta, generator)) - problem.energy(spins)
        self._refuse_temperature(request, batch, rise)

        counts = spins.unique(dim=0, return_counts=True)[1]
        facts = {"effective_share": len(spins) / float(counts.square().sum())}
        try:
            facts["effective_beta"] = effective_beta(problem, batch).value
        except ValueError:  # flat, or all ground states: every temperature fits, or none
            pass
        self._refuse_repeats(request, problem, spins, facts, generator)
        return pass_on(batch, **facts)

    def _refuse_temperature(self, request: SamplingRequest, batch: SampleBatch, rise: Tensor) -> None:
        beta, z = request.beta, _z_score(rise.sign())
        highest, lowest = beta * self.max_ratio, beta / self.max_ratio
        is_cold = z > _MAX_Z and float(pseudo_likelihood_score(request.problem, batch, highest).sum()) > 0.0
        is_hot = z < -_MAX_Z and float(pseudo_likelihood_score(request.problem, batch, lowest).sum()) < 0.0
        if is_cold or is_hot:
            where = f"above {highest:.3g}, as ground states have" if is_cold else f"below {lowest:.3g}, as noise has"
            msg = (
                f"The answer of {self.child.name} has an inverse temperature {where}; {beta:.3g} was asked for. These "
                "are no Boltzmann samples of the problem: calibrate the sampler (`qbmscvi.samplers.Calibrated`), or "
                "choose another."
            )
            raise InvalidSamples(msg)

    def _refuse_repeats(
        self,
        request: SamplingRequest,
        problem: IsingModel,
        spins: Tensor,
        facts: dict[str, float],
        generator: torch.Generator,
    ) -> None:
        # Samples that are colder than asked for, within the limits, lose states as well, but not at their own beta.
        for beta in (request.beta, facts.get("effective_beta", request.beta)):
            z, loss = _loss_of_states(spins, _sweep(problem, spins, beta, generator), generator)
            if z <= _MAX_Z or loss <= _MAX_LOSS:
                return
        msg = (
            f"The answer of {self.child.name} repeats states: {len(spins)} samples are worth "
            f"{facts['effective_share'] * len(spins):.0f}, and {_N_SWEEPS} Gibbs sweeps lead {loss:.0%} of them "
            "to other states than these. Ask the device for raw, not for sorted or best, samples."
        )
        raise InvalidSamples(msg)


def _sweep(problem: IsingModel, spins: Tensor, beta: float, generator: torch.Generator) -> Tensor:
    swept = gibbs_sweeps(problem, spins.to(problem.h), _N_SWEEPS, beta, generator, is_reversible=True)
    return swept.to(torch.int8)


def _loss_of_states(spins: Tensor, swept: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """Share of the samples that sweeps lead out of known states, less the share led into them: its z score and size.

    A quarter of the samples says which states are known. The others, which are independent of it, are counted.
    """
    n = len(spins)
    _, numbers = torch.cat([spins, swept]).unique(dim=0, return_inverse=True)  # equal states, equal numbers
    before, after = numbers.split(n)
    sources, counted = torch.randperm(n, generator=generator).tensor_split([n // 4])
    known = before[sources]
    change = torch.isin(before[counted], known).double() - torch.isin(after[counted], known).double()
    return _z_score(change), float(change.mean())


def _z_score(signs: Tensor) -> float:
    """Sum of -1, 0 and +1 over the standard deviation it has if signs are coin flips."""
    scale = float(signs.norm())
    return float(signs.sum()) / scale if scale > 0.0 else 0.0
