"""Gauges: problems with some spins reversed, and answers with these spins reversed back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qbmscvi.samplers.wrappers._wrapper import Wrapper, pass_on

if TYPE_CHECKING:
    from qbmscvi.samplers._contract import Draw, Sampler, SamplingRequest


class SpinReversed(Wrapper):
    """Average over random gauges, so that bias fields of a device cancel.

    Each gauge flips the sign convention of a random half of the spins in the problem, and flips it back in the answer.
    All gauges of a request travel in one trip.

    Parameters
    ----------
    child
        The wrapped sampler.
    n_gauges
        Gauges per request; they share the samples equally.
    """

    def __init__(self, child: Sampler, n_gauges: int = 4) -> None:
        super().__init__(child)
        if n_gauges < 1:
            msg = f"n_gauges={n_gauges} must be at least 1; 4 to 16 is usual."
            raise ValueError(msg)
        self.n_gauges = n_gauges

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        flipped, gauges = [], []
        for request, seed in zip(requests, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            rows = torch.tensor_split(torch.arange(request.n_samples), min(self.n_gauges, request.n_samples))
            for number, part in enumerate(rows):
                gauge = (2 * torch.randint(2, (request.problem.n_spins,), generator=generator) - 1).to(
                    request.problem.h.device, torch.int8
                )
                start = None if request.initial_spins is None else request.initial_spins[part] * gauge
                flipped.append(
                    replace(
                        request,
                        problem=request.problem.gauged(gauge),
                        n_samples=len(part),
                        initial_spins=start,
                        seed=int(torch.randint(2**31 - 1, (), generator=generator)),
                        request_id=request.request_id and f"{request.request_id}-gauge-{number}",
                    )
                )
                gauges.append(gauge)
        batches = self.child.sample_batch(flipped)
        draws, position = [], 0
        for request in requests:
            n_parts = min(self.n_gauges, request.n_samples)
            parts = list(zip(batches, gauges, strict=True))[position : position + n_parts]
            position += n_parts
            spins = torch.cat([batch.spins * gauge for batch, gauge in parts])
            facts = {"n_gauges": n_parts}
            if "device_seconds" in parts[0][0].info:
                facts["device_seconds"] = sum(batch.info["device_seconds"] for batch, _ in parts)
            if "chain_break_rate" in parts[0][0].info:
                broken = [batch.info["chain_break_rate"] * batch.n_samples for batch, _ in parts]
                facts["chain_break_rate"] = sum(broken) / request.n_samples
            draws.append(replace(pass_on(parts[0][0], **facts), spins=spins))
        return draws
