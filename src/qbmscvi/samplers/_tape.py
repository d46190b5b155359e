"""Record what a sampler answered, and play it back without the sampler.

A tape is a text file of JSON lines: a header with ``"format": "qbmscvi-tape"``, ``"version": 1`` and the traits that a
training run depends on, then one line per answer with the fingerprint of the request, the spins (bits packed most
significant first, base64), weights (little-endian float64, base64, or null), the facts of ``info`` that JSON can hold,
and a checksum of the line. It can be read by anything and runs nothing when read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qbmscvi.exceptions import InvalidSamples, SamplerUnavailable
from qbmscvi.samplers._base import Draw, Sampler, SamplerTraits
from qbmscvi.samplers._composites import Composite, pass_on

if TYPE_CHECKING:
    import os

    from qbmscvi.ising import IsingModel, SampleBatch
    from qbmscvi.samplers._base import SamplingRequest

_HEADER = {"format": "qbmscvi-tape", "version": 1}


def problem_fingerprint(problem: IsingModel) -> str:
    """Hash of a problem's graph and numbers."""
    digest = hashlib.sha256()
    problem = problem.to("cpu", torch.float64)
    tensors = [problem.h, problem.J] + ([] if problem.factor is None else [problem.factor])
    for values in (problem.graph.edges, *(tensor.numpy() for tensor in tensors)):
        digest.update(str(values.shape).encode() + np.ascontiguousarray(values).tobytes())
    digest.update(repr(float(problem.offset)).encode())
    return digest.hexdigest()


def fingerprint(request: SamplingRequest) -> str:
    """Hash of what is asked: problem, temperature and number of samples. Seeds and chain states do not count."""
    return f"{problem_fingerprint(request.problem)} {request.beta!r} {request.n_samples}"


class Recorded(Composite):
    """Write every answer of the child to a tape.

    A tape that cannot be written (disk full, say) costs the recording, not the run: one warning, and
    ``info["is_recorded"]`` is False from there on.

    Parameters
    ----------
    child
        The wrapped sampler.
    path
        File to write; it must not exist yet.

    Raises
    ------
    FileExistsError
        If the file exists.
    """

    def __init__(self, child: Sampler, path: str | os.PathLike[str]) -> None:
        super().__init__(child)
        self.path = Path(path)
        if self.path.exists():
            msg = f"{self.path} exists. Recording would append to another run: choose a new name or delete it."
            raise FileExistsError(msg)
        # What a run does depends on these two traits, so a replay must have them.
        traits = {"is_remote": child.traits.is_remote, "is_persistent": child.traits.is_persistent}
        self.path.write_text(json.dumps({**_HEADER, **traits}) + "\n")
        self._is_intact = True

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        asked = [replace(request, seed=seed) for request, seed in zip(requests, seeds, strict=True)]
        batches = self.child.sample_batch(asked)
        if self._is_intact:
            try:
                with self.path.open("a") as file:
                    file.writelines(_encode(request, batch) for request, batch in zip(asked, batches, strict=True))
            except OSError as error:
                self._is_intact = False
                warnings.warn(
                    f"Recording to {self.path} stopped: {error}. Sampling goes on without it.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return [pass_on(batch, is_recorded=self._is_intact) for batch in batches]


class Replayed(Sampler):
    """Play back a tape: the same answers in the same order, if the same is asked.

    Parameters
    ----------
    path
        Tape written by :class:`Recorded`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    InvalidSamples
        If the file is no tape, of a version not known here, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        lines = self.path.read_text(errors="replace").splitlines()
        header = _parse(lines[0], self.path, 1) if lines else {}
        is_tape = all(header.get(key) == value for key, value in _HEADER.items())
        if not is_tape or not {"is_remote", "is_persistent"} <= set(header):
            msg = f"{self.path} is not a tape of version {_HEADER['version']}: it begins with {lines[:1]}."
            raise InvalidSamples(msg)
        self._entries = [_verify(line, self.path, number) for number, line in enumerate(lines[1:], start=2)]
        self._position = 0
        self.traits = SamplerTraits(is_remote=header["is_remote"], is_persistent=header["is_persistent"])

    def _sample(self, request: SamplingRequest, seed: int) -> Draw:
        if self._position == len(self._entries):
            msg = (
                f"The tape {self.path} ends after {len(self._entries)} answers, but another was asked for. Replay a "
                "run with the settings it was recorded with."
            )
            raise SamplerUnavailable(msg)
        entry = self._entries[self._position]
        if entry["request"] != fingerprint(request):
            msg = (
                f"Answer {self._position + 1} of {self.path} belongs to another problem than the one asked for. Replay "
                "with the same data, seed and settings as when it was recorded."
            )
            raise InvalidSamples(msg)
        self._position += 1
        shape = tuple(entry["shape"])
        bits = np.unpackbits(np.frombuffer(base64.b64decode(entry["spins"]), dtype=np.uint8), count=shape[0] * shape[1])
        spins = torch.from_numpy(2 * bits.astype(np.int8) - 1).reshape(shape)
        weights = None
        if entry["weights"] is not None:
            values = np.frombuffer(base64.b64decode(entry["weights"]), dtype="<f8").copy()
            weights = torch.from_numpy(values).to(request.problem.h)
        return Draw(spins, weights, {**entry["info"], "is_replayed": True})


def _encode(request: SamplingRequest, batch: SampleBatch) -> str:
    bits = np.packbits(batch.spins.cpu().numpy() > 0)
    weights = None
    if batch.weights is not None:
        weights = base64.b64encode(batch.weights.cpu().numpy().astype("<f8").tobytes()).decode()
    entry = {
        "request": fingerprint(request),
        "shape": list(batch.spins.shape),
        "spins": base64.b64encode(bits.tobytes()).decode(),
        "weights": weights,
        "info": _plain(batch.info),
    }
    return json.dumps({**entry, "sha256": _checksum(entry)}) + "\n"


def _plain(value: Any) -> Any:
    """A fact as JSON can hold it: numbers that are not finite become null, other objects are left out."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if _is_plain(item)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value if _is_plain(item)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | dict | list | tuple)


def _checksum(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        what = f"{path} is not a tape: line 1" if number == 1 else f"Line {number} of the tape {path}"
        msg = f"{what} is damaged ({error}). Use an intact copy."
        raise InvalidSamples(msg) from error
    if not isinstance(entry, dict):
        msg = f"Line {number} of the tape {path} is not a record. Use an intact copy."
        raise InvalidSamples(msg)
    return entry


def _verify(line: str, path: Path, number: int) -> dict[str, Any]:
    entry = _parse(line, path, number)
    checksum = entry.pop("sha256", None)
    if checksum != _checksum(entry):
        msg = f"Line {number} of the tape {path} does not match its checksum. Use an intact copy."
        raise InvalidSamples(msg)
    return entry
