"""Samplers with one known fault each, and a device with several, shared by the tests of samplers and wrappers."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from sapi_server import SapiServer, Solver, working_graph

from qbmscvi.boltzmann.enumeration import draw_exact
from qbmscvi.samplers import Draw, ExactSampler, Rescaled, Sampler, SamplerTraits, Wrapper

if TYPE_CHECKING:
    from qbmscvi.boltzmann.ising import IsingModel

TRUE_BETA, BELIEVED_BETA, RANGE, N_BITS = 3.7, 5.0, 0.2, 8


class Device(Sampler):
    """Answers at 3.7, whatever is asked, with a field of its own; refuses what it cannot represent."""

    traits = SamplerTraits(target="approximate", max_spins=12)

    def __init__(self, bias=0.03):
        self.bias = bias

    def _sample(self, request, seed):
        problem = request.problem
        assert request.beta == BELIEVED_BETA, "this device has one temperature"
        for values in (problem.h, problem.J):
            level = values.double() / (RANGE / (2 ** (N_BITS - 1) - 1))
            assert (values.double().abs() <= RANGE * (1 + 1e-6)).all(), "out of range"
            assert (level - level.round()).abs().max() < 1e-3, "finer than eight bits"
        biased = replace(problem, h=problem.h + self.bias)
        generator = torch.Generator().manual_seed(seed)
        return Draw(draw_exact(biased, request.n_samples, TRUE_BETA, generator))


def rescaled(device, device_beta=BELIEVED_BETA) -> Rescaled:
    return Rescaled(device, h_limit=RANGE, J_limit=RANGE, n_bits=N_BITS, device_beta=device_beta)


class OffTemperature(ExactSampler):
    """Exact, at ``gain * beta``."""

    traits = SamplerTraits(target="boltzmann")

    def __init__(self, gain):
        self.gain = gain

    def _sample(self, request, seed):
        return super()._sample(replace(request, beta=self.gain * request.beta), seed)


def _flip_couplings(problem: IsingModel) -> IsingModel:
    return replace(problem, J=-problem.J)


def _negative(problem: IsingModel) -> IsingModel:
    return replace(problem, h=-problem.h, J=-problem.J)


def _drop_edge(problem: IsingModel) -> IsingModel:
    J = problem.J.clone()
    J[-1] = 0.0
    return replace(problem, J=J)


class Faulty(Wrapper):
    """An error around any sampler: in what it is asked, or in the order of the nodes that it answers."""

    FAULTS = ("sign-of-J", "beta-10-percent-high", "shifted-nodes", "dropped-edge")

    def __init__(self, child, fault):
        super().__init__(child)
        self.fault = fault

    def _sample_batch(self, requests, seeds):
        asked = [replace(request, seed=seed) for request, seed in zip(requests, seeds, strict=True)]
        if self.fault == "beta-10-percent-high":
            asked = [replace(request, beta=1.1 * request.beta) for request in asked]
        if self.fault in ("sign-of-J", "dropped-edge"):
            change = _flip_couplings if self.fault == "sign-of-J" else _drop_edge
            asked = [replace(request, problem=change(request.problem)) for request in asked]
        if self.fault == "sign-of-everything":
            asked = [replace(request, problem=_negative(request.problem)) for request in asked]
        shift = int(self.fault == "shifted-nodes")
        return [Draw(batch.spins.roll(shift, dims=1)) for batch in self.child.sample_batch(asked)]


@cache
def annealer_service() -> SapiServer:
    """A service with one solver, at inverse temperature 5, that lives as long as the tests."""
    return SapiServer(Solver("Loop_zephyr", working_graph("zephyr", 3), beta=5.0)).__enter__()


def connected(build, **settings) -> Sampler:
    """Build a sampler while D-Wave's client is configured for :func:`annealer_service`."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as environment:
        file = Path(folder) / "dwave.conf"
        file.write_text(annealer_service().configuration())
        environment.setenv("DWAVE_CONFIG_FILE", str(file))
        return build(**settings)
