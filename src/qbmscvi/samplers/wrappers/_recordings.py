"""Record the answers of a sampler, and replay them without it.

A recording is a text file of JSON lines. The header has ``"format": "qbmscvi-recording"``, ``"version": 1`` and the
traits that a training run depends on. One line per call follows, in order, with a checksum. ``"answers"`` lists the
fingerprint of each request, its spins (bits packed most significant first, base64) and the facts of ``info`` that JSON
can hold. ``"failure"`` has the type and message of the error. Any JSON reader can read the file; reading runs no code.

The recording does not say when an answer was used. A replay uses it after the ``latency`` of the schedule, like a run
with timely answers. The replay of a run with late answers makes other requests, which fail.
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

from qbmscvi.exceptions import BudgetExceeded, InvalidSamples, SamplerError, SamplerTimeout, SamplerUnavailable
from qbmscvi.samplers._contract import Draw, Sampler, SamplerTraits
from qbmscvi.samplers.wrappers._wrapper import Wrapper, pass_on

if TYPE_CHECKING:
    import os

    from qbmscvi.boltzmann.ising import IsingModel, SampleBatch
    from qbmscvi.samplers._contract import SamplingRequest

# A training run depends on these traits, so a replay must have them.
_RUN_TRAITS = ("is_remote", "is_persistent", "is_slow")
_HEADER = {"format": "qbmscvi-recording", "version": 1}
_ERRORS = {kind.__name__: kind for kind in (BudgetExceeded, InvalidSamples, SamplerTimeout, SamplerUnavailable)}


def problem_fingerprint(problem: IsingModel) -> str:
    """Hash of a problem's graph and numbers."""
    digest = hashlib.sha256()
    problem = problem.to("cpu", torch.float64)
    for values in (problem.graph.edges, problem.h.numpy(), problem.J.numpy()):
        digest.update(str(values.shape).encode() + np.ascontiguousarray(values).tobytes())
    digest.update(repr(float(problem.offset)).encode())
    return digest.hexdigest()


def fingerprint(request: SamplingRequest) -> str:
    """Hash of a request's problem, temperature and number of samples; seeds and chain states do not count."""
    return f"{problem_fingerprint(request.problem)} {request.beta!r} {request.n_samples}"


class Recorded(Wrapper):
    """Write every answer of the child to a file, and every failure.

    If the file cannot be written (e.g. the disk is full), the run continues: a warning appears once, and
    ``info["is_recorded"]`` is False from then on.

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
        traits = {name: getattr(self.traits, name) for name in _RUN_TRAITS}
        self.path.write_text(json.dumps({**_HEADER, **traits}) + "\n")
        self._is_intact = True

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        asked = [replace(request, seed=seed) for request, seed in zip(requests, seeds, strict=True)]
        try:
            batches = self.child.sample_batch(asked)
        except SamplerError as error:
            self._write({"failure": {"type": type(error).__name__, "message": str(error)}})
            raise
        self._write({"answers": [_encode(request, batch) for request, batch in zip(asked, batches, strict=True)]})
        return [pass_on(batch, is_recorded=self._is_intact) for batch in batches]

    def _write(self, call: dict[str, Any]) -> None:
        if not self._is_intact:
            return
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({**call, "sha256": _checksum(call)}) + "\n")
        except OSError as error:
            self._is_intact = False
            warnings.warn(
                f"Recording to {self.path} stopped: {error}. Sampling continues without it.",
                RuntimeWarning,
                stacklevel=3,
            )


class Replayed(Sampler):
    """Replay a recording: the same answers and failures in the same order, for the same requests.

    Parameters
    ----------
    path
        File written by :class:`Recorded`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    InvalidSamples
        If the file is no recording, has an unknown version, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        lines = self.path.read_text(errors="replace").splitlines()
        header = _parse(lines[0], self.path, 1) if lines else {}
        is_recording = all(header.get(key) == value for key, value in _HEADER.items())
        if not is_recording or not set(_RUN_TRAITS) <= set(header):
            msg = f"{self.path} is not a recording of version {_HEADER['version']}: it begins with {lines[:1]}."
            raise InvalidSamples(msg)
        self._calls = [_verify(line, self.path, number) for number, line in enumerate(lines[1:], start=2)]
        self._position = 0
        self._checksum = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.traits = SamplerTraits(**{name: header[name] for name in _RUN_TRAITS}, is_replay=True)

    def state_dict(self) -> dict[str, Any]:
        """Number of replayed calls, and the checksum of their file."""
        return {"recording": self._checksum, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after these calls; another file is replayed from its start."""
        if state["recording"] == self._checksum:
            self._position = state["position"]

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        if self._position == len(self._calls):
            msg = (
                f"The recording {self.path} ends after {len(self._calls)} calls, but another was made. Replay a run "
                "with the settings it was recorded with."
            )
            raise SamplerUnavailable(msg)
        call = self._calls[self._position]
        answers = call.get("answers", [])
        if answers and [answer["request"] for answer in answers] != [fingerprint(request) for request in requests]:
            msg = (
                f"Call {self._position + 1} of {self.path} belongs to another problem than the requested one. Replay "
                "with the same data, seed and settings as when it was recorded."
            )
            raise InvalidSamples(msg)
        self._position += 1
        if "failure" in call:
            raise _ERRORS.get(call["failure"]["type"], SamplerError)(call["failure"]["message"])
        return [_decode(answer) for answer in answers]


def _encode(request: SamplingRequest, batch: SampleBatch) -> dict[str, Any]:
    bits = np.packbits(batch.spins.cpu().numpy() > 0)
    return {
        "request": fingerprint(request),
        "shape": list(batch.spins.shape),
        "spins": base64.b64encode(bits.tobytes()).decode(),
        "info": _plain(batch.info),
    }


def _decode(entry: dict[str, Any]) -> Draw:
    shape = tuple(entry["shape"])
    bits = np.unpackbits(np.frombuffer(base64.b64decode(entry["spins"]), dtype=np.uint8), count=shape[0] * shape[1])
    spins = torch.from_numpy(2 * bits.astype(np.int8) - 1).reshape(shape)
    return Draw(spins, {**entry["info"], "is_replayed": True})


def _plain(value: Any) -> Any:
    """Convert a fact to JSON: numbers that are not finite become null, other objects are left out."""
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
        what = f"{path} is not a recording: line 1" if number == 1 else f"Line {number} of the recording {path}"
        msg = f"{what} is damaged ({error}). Use an intact copy."
        raise InvalidSamples(msg) from error
    if not isinstance(entry, dict):
        msg = f"Line {number} of the recording {path} is not a record. Use an intact copy."
        raise InvalidSamples(msg)
    return entry


def _verify(line: str, path: Path, number: int) -> dict[str, Any]:
    entry = _parse(line, path, number)
    checksum = entry.pop("sha256", None)
    if checksum != _checksum(entry):
        msg = f"Line {number} of the recording {path} does not match its checksum. Use an intact copy."
        raise InvalidSamples(msg)
    return entry
