"""The temperature of a device, estimated from each answer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from qbmscvi.exceptions import InvalidSamples
from qbmscvi.samplers._temperature import effective_beta, fits_beta
from qbmscvi.samplers.wrappers._wrapper import Wrapper, pass_on

if TYPE_CHECKING:
    from qbmscvi.samplers._contract import Draw, Sampler, SamplingRequest


class Calibrated(Wrapper):
    """Measure the temperature of every answer, and correct the next request by it.

    The wrapper assumes that the child answers at ``gain * beta`` if ``beta`` is requested. Each answer gives an
    estimate of the gain; a running mean of its logarithm corrects later requests. ``info`` has ``effective_beta``,
    ``effective_beta_scale`` (its standard error) and ``gain``. Early in training a problem can be too flat to show a
    temperature; its answer is passed on without an estimate.

    Parameters
    ----------
    child
        The wrapped sampler.
    memory
        Weight of earlier answers in the running mean, in ``[0, 1)``. Raise it if estimates are noisy.
    """

    def __init__(self, child: Sampler, *, memory: float = 0.7) -> None:
        super().__init__(child)
        if not 0.0 <= memory < 1.0:
            msg = f"memory={memory} must be at least 0 and below 1."
            raise ValueError(msg)
        self.memory = memory
        self.log_gain: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The gain, which corrects requests to the child."""
        return {**super().state_dict(), "log_gain": self.log_gain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the gain."""
        super().load_state_dict(state)
        self.log_gain = state["log_gain"]

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        gain = 1.0 if self.log_gain is None else float(torch.tensor(self.log_gain).exp())
        sent = [
            replace(request, beta=request.beta / gain, seed=seed) for request, seed in zip(requests, seeds, strict=True)
        ]
        draws = []
        for request, scaled, batch in zip(requests, sent, self.child.sample_batch(sent), strict=True):
            try:
                estimate = effective_beta(request.problem, batch)
            except ValueError as error:
                if fits_beta(request.problem, batch, request.beta):
                    draws.append(pass_on(batch, gain=gain))
                    continue
                msg = f"The answer of {self.child.name} has no temperature: {error}"
                raise InvalidSamples(msg) from error
            # At the end of its range a device answers too hot, whatever its gain.
            if not batch.info.get("is_range_limited", False):
                observed = float(torch.tensor(estimate.value / scaled.beta).log())
                past = observed if self.log_gain is None else self.log_gain
                self.log_gain = self.memory * past + (1.0 - self.memory) * observed
            facts = {"effective_beta": estimate.value, "effective_beta_scale": estimate.scale, "gain": gain}
            draws.append(pass_on(batch, **facts))
        return draws
