r"""A gate for answers that cannot be samples of the problem at the temperature asked for.

It rests on one fact. Let :math:`s'` be what reversible Gibbs sweeps at the temperature asked for make of :math:`s`. If
:math:`s` is a Boltzmann sample, the pair can be exchanged: any function that changes its sign when :math:`s` and
:math:`s'` change places is positive and negative equally often. For independent samples the signs are coin flips, given
everything else, so that their sum exceeds :math:`z` of its standard deviations with probability
:math:`e^{-z^2/2}` at most (Hoeffding's inequality), whatever the problem and however few the samples. An honest answer
is refused by each test once in a million.

Significance alone would refuse what is only nearly right, and is wrong for samples that are not independent. So each
test asks for a large effect, too.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from qbmscvi.exceptions import InvalidSamples
from qbmscvi.samplers._base import Draw, Sampler
from qbmscvi.samplers._composites import Composite, pass_on
from qbmscvi.samplers._gibbs import gibbs_sweeps
from qbmscvi.samplers._tape import problem_fingerprint
from qbmscvi.samplers._temperature import effective_beta, pseudo_likelihood_score

if TYPE_CHECKING:
    from torch import Tensor

    from qbmscvi.ising import IsingModel, SampleBatch
    from qbmscvi.samplers._base import SamplingRequest

_ALPHA = 1e-6
_MAX_Z = math.sqrt(-2.0 * math.log(_ALPHA))  # 5.3: no fewer than 28 samples can be refused
_N_SWEEPS = 5
_MAX_LOSS = 0.1
_MIN_SORTED = 12  # distinct energies; 12 come in order by chance once in 10**8 answers
_MIN_RETURNED = 16  # distinct states; 16 come twice, in whatever order, with probability 16! / 16**16 at most
# Chains of which so many are elsewhere after five sweeps: if each moves with a tenth of that probability in what the
# device calls a sweep, all of them stay with probability `_ALPHA`.
_MIN_MOVED = -10.0 * math.log(_ALPHA)


class Vetted(Composite):
    r"""Refuse answers that are no samples of the problem at the temperature asked for.

    - Ground states are too cold, noise is too hot: Gibbs sweeps at the temperature asked for raise, or lower, the
      energy of most samples, and the maximum of the pseudo-likelihood lies beyond ``max_ratio`` times the inverse
      temperature asked for, or below its ``max_ratio``-th part.
    - Repeated states fall apart: sweeps lead away, in a tenth of the samples and more, from the states that the
      answer consists of; even at the inverse temperature that it seems to have.
    - The last answer comes back for another problem, 16 states or more of it; or chains have not moved, though of 139
      or more of them sweeps do not leave the state as it is.
    - Chains that were to go on come back sorted by energy.

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
        self._last: tuple[str, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The last answer, which must not come back."""
        return {**super().state_dict(), "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the last answer."""
        super().load_state_dict(state)
        self._last = state["last"]

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        asked = [replace(request, seed=seed) for request, seed in zip(requests, seeds, strict=True)]
        batches = self.child.sample_batch(asked)
        return [self._vet(request, batch) for request, batch in zip(asked, batches, strict=True)]

    def _vet(self, request: SamplingRequest, batch: SampleBatch) -> Draw:
        problem = request.problem.to("cpu", torch.float64)
        spins = batch.spins.cpu()
        generator = torch.Generator().manual_seed(self._own_seed(request.seed))
        swept = _sweep(problem, spins, request.beta, generator)
        energies, swept_energies = problem.energy(torch.stack([spins, swept]))
        states, swept_states = _number(spins, swept)

        self._refuse_old_states(request, spins, states, int((states != swept_states).sum()))
        self._refuse_sorted(request, energies)
        self._refuse_temperature(request, batch, swept_energies - energies)

        facts = {"effective_share": _n_effective(states) / len(spins)}
        try:
            facts["effective_beta"] = effective_beta(problem, batch).value
        except ValueError:  # flat, or all ground states: every temperature fits, or none
            pass
        self._refuse_repeats(problem, spins, request.beta, facts, swept, generator)
        return pass_on(batch, **facts)

    def _refuse_old_states(self, request: SamplingRequest, spins: Tensor, states: Tensor, n_moved: int) -> None:
        name, start = problem_fingerprint(request.problem), request.initial_spins
        last, self._last = self._last, (name, spins)
        if start is not None:
            what = "the states that its chains started from"
            is_old = n_moved > _MIN_MOVED and torch.equal(start.cpu().to(spins), spins)
        else:
            what = "its last answer once more"
            is_other_question = last is not None and name != last[0]
            is_old = is_other_question and len(states.unique()) >= _MIN_RETURNED and torch.equal(last[1], spins)
        if is_old:
            msg = f"{self.child.name} returned {what}. Look for a cache in the device or its client, or a lost job."
            raise InvalidSamples(msg)

    def _refuse_sorted(self, request: SamplingRequest, energies: Tensor) -> None:
        if request.initial_spins is None or len(energies.unique()) < _MIN_SORTED:
            return
        steps = energies.diff()
        if bool((steps >= 0).all()) or bool((steps <= 0).all()):
            msg = (
                f"The answer of {self.child.name} is sorted by energy, so its rows are not the chains that were to go "
                "on. Keep their order, or declare `is_persistent=False`."
            )
            raise InvalidSamples(msg)

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
        problem: IsingModel,
        spins: Tensor,
        beta: float,
        facts: dict[str, float],
        swept: Tensor,
        generator: torch.Generator,
    ) -> None:
        z, _ = _loss_of_states(spins, swept, generator)
        if z <= _MAX_Z:
            return
        # Samples that are colder than asked for, within the limits, lose states as well, but not at their own beta.
        again = _sweep(problem, spins, facts.get("effective_beta", beta), generator)
        z, share = _loss_of_states(spins, again, generator)
        if z > _MAX_Z and share > _MAX_LOSS:
            msg = (
                f"The answer of {self.child.name} repeats states: {len(spins)} samples are worth "
                f"{facts['effective_share'] * len(spins):.0f}, and {_N_SWEEPS} Gibbs sweeps lead {share:.0%} of them "
                "to other states than these. Ask the device for raw, not for sorted or best, samples."
            )
            raise InvalidSamples(msg)


def _sweep(problem: IsingModel, spins: Tensor, beta: float, generator: torch.Generator) -> Tensor:
    swept = gibbs_sweeps(problem, spins.to(problem.h), _N_SWEEPS, beta, generator, is_reversible=True)
    return swept.to(torch.int8)


def _number(spins: Tensor, swept: Tensor) -> tuple[Tensor, ...]:
    """Number the distinct states of both."""
    return torch.unique(torch.cat([spins, swept]), dim=0, return_inverse=True)[1].split(len(spins))


def _loss_of_states(spins: Tensor, swept: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """Significance and size of the loss of known states: share of the rows in them, before less after the sweeps."""
    states, swept_states = _number(spins, swept)
    # A quarter of the answer says which states to look for in the rest, which is independent of it.
    chosen, rest = torch.randperm(len(states), generator=generator).tensor_split([len(states) // 4])
    is_known, stays = (torch.isin(values[rest], states[chosen]) for values in (states, swept_states))
    change = is_known.double() - stays.double()
    return _z_score(change), float(change.mean())


def _z_score(signs: Tensor) -> float:
    """Sum of -1, 0 and +1 over the standard deviation it has if signs are coin flips."""
    scale = float(signs.norm())
    return float(signs.sum()) / scale if scale > 0.0 else 0.0


def _n_effective(states: Tensor) -> float:
    """Effective number of distinct states, given as numbers."""
    return len(states) ** 2 / float(states.bincount().square().sum())
