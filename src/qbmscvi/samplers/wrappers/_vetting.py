r"""Refusal of answers that cannot be samples of the problem at the requested temperature.

One test refuses samples of another temperature (ground states, noise), the other refuses repeated states. Both rest on
one fact. Let reversible Gibbs sweeps at the requested temperature turn :math:`s` into :math:`s'`. If :math:`s` is a
Boltzmann sample, the pair is exchangeable: a function that changes its sign when :math:`s` and :math:`s'` change places
is positive and negative equally often. For independent samples these signs are coin flips, given everything else. By
Hoeffding's inequality their sum exceeds :math:`z` standard deviations with probability :math:`e^{-z^2/2}` at most. This
holds for every problem and every number of samples. Each test refuses a correct answer once in a million.

Significance alone would refuse answers that are nearly right, and is wrong for dependent samples. So each test also
requires a large effect.
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
    r"""Refuse answers that are no samples of the problem at the requested temperature.

    - Too cold (ground states) or too hot (noise): Gibbs sweeps at the requested temperature raise, or lower, the energy
      of most samples. In addition, the maximum of the pseudo-likelihood is more than ``max_ratio`` times, or less than
      ``1 / max_ratio`` times, the requested inverse temperature.
    - Repeated states: sweeps lead a tenth of the samples or more away from the states of the answer, even at the
      inverse temperature that it seems to have.

    An answer that passes may still be wrong. Single spin flips cannot tell one of several distant modes from all of
    them, and fewer than 28 samples prove nothing. ``info`` has ``effective_beta`` (if there is an estimate) and
    ``effective_share``: the effective number of distinct states :math:`1 / \sum_k f_k^2` (:math:`f_k`: their shares)
    divided by the number of samples.

    Parameters
    ----------
    child
        The wrapped sampler.
    max_ratio
        Largest acceptable factor between the inverse temperature of the samples and the requested one.

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
                f"The answer of {self.child.name} has an inverse temperature {where}; {beta:.3g} was requested. These "
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
        # Samples that are too cold, within the limits, lose states as well, but not at their own beta.
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
    """Share of the samples that sweeps lead out of known states, minus the share led into them: its z score and size.

    A quarter of the samples defines the known states. The others are independent of it and are counted.
    """
    n = len(spins)
    _, numbers = torch.cat([spins, swept]).unique(dim=0, return_inverse=True)  # equal states, equal numbers
    before, after = numbers.split(n)
    sources, counted = torch.randperm(n, generator=generator).tensor_split([n // 4])
    known = before[sources]
    change = torch.isin(before[counted], known).double() - torch.isin(after[counted], known).double()
    return _z_score(change), float(change.mean())


def _z_score(signs: Tensor) -> float:
    """Sum of -1, 0 and +1, divided by its standard deviation if signs are coin flips."""
    scale = float(signs.norm())
    return float(signs.sum()) / scale if scale > 0.0 else 0.0
