"""Problems scaled into the ranges of a device, and rounded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from qbmscvi.samplers.wrappers._wrapper import Wrapper, pass_on

if TYPE_CHECKING:
    from qbmscvi.samplers._contract import Draw, Sampler, SamplingRequest


class Rescaled(Wrapper):
    r"""Fit problems into the ranges and the precision of a device, and report the temperature.

    The wrapper multiplies the energy by a scale :math:`c`; samples of the scaled problem at :math:`\beta / c` follow
    the requested distribution. It clips nothing: a problem that does not fit is scaled down. On a device of fixed
    temperature (``device_beta``) the scale sets the temperature, :math:`c = \beta / \beta_\text{dev}`. If the ranges do
    not allow this scale, the samples are hotter than requested, and ``info["effective_beta"]`` says so.

    Parameters
    ----------
    child
        The wrapped sampler.
    h_limit, J_limit
        Largest absolute field and coupling that the device takes; None for no limit.
    n_bits
        Signed precision of fields and couplings within the limits; None for no rounding.
    device_beta
        Inverse temperature of the device in its own units; None if requests can choose it.
    """

    def __init__(
        self,
        child: Sampler,
        *,
        h_limit: float | None = None,
        J_limit: float | None = None,
        n_bits: int | None = None,
        device_beta: float | None = None,
    ) -> None:
        super().__init__(child)
        for name, value in (("h_limit", h_limit), ("J_limit", J_limit), ("device_beta", device_beta)):
            if value is not None and not value > 0:
                msg = f"{name}={value} must be positive, or None for none."
                raise ValueError(msg)
        if n_bits is not None and (n_bits < 2 or h_limit is None or J_limit is None):
            msg = f"n_bits={n_bits} needs at least 2 bits and both `h_limit` and `J_limit`, which set the step."
            raise ValueError(msg)
        self.h_limit, self.J_limit, self.n_bits, self.device_beta = h_limit, J_limit, n_bits, device_beta

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        fitted = [self._fit(request, seed) for request, seed in zip(requests, seeds, strict=True)]
        batches = self.child.sample_batch([request for request, _ in fitted])
        return [pass_on(batch, **facts) for batch, (_, facts) in zip(batches, fitted, strict=True)]

    def _fit(self, request: SamplingRequest, seed: int) -> tuple[SamplingRequest, dict[str, Any]]:
        problem = request.problem
        largest = [(problem.h, self.h_limit), (problem.J, self.J_limit)]
        room = [limit / float(values.abs().max()) for values, limit in largest if limit and values.any()]
        # Slightly smaller, because the product could round to just above the limit.
        fills_range = min(room, default=1.0) * (1.0 - torch.finfo(problem.h.dtype).eps if room else 1.0)
        wanted = fills_range if self.device_beta is None else request.beta / self.device_beta
        scale = min(wanted, fills_range) if room else wanted
        child_beta = request.beta / scale if self.device_beta is None else self.device_beta
        scaled = problem.scaled(scale)
        facts = {"scale": scale, "effective_beta": child_beta * scale, "is_range_limited": scale < wanted}
        if self.n_bits is not None:
            levels = 2 ** (self.n_bits - 1) - 1
            h_step, J_step = self.h_limit / levels, self.J_limit / levels
            h_top, J_top = (limit * (1.0 - torch.finfo(scaled.h.dtype).eps) for limit in (self.h_limit, self.J_limit))
            rounded = replace(
                scaled,
                h=((scaled.h / h_step).round() * h_step).clamp(-h_top, h_top),
                J=((scaled.J / J_step).round() * J_step).clamp(-J_top, J_top),
            )
            error = torch.cat([rounded.h - scaled.h, rounded.J - scaled.J]) / scale
            facts["rounding_error"] = float(error.square().mean().sqrt())
            scaled = rounded
        return replace(request, problem=scaled, beta=child_beta, seed=seed), facts
