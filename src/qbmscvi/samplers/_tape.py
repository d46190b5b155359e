"""Record what a sampler answered, and play it back without the sampler.

A tape is a text file of JSON lines. First a header with ``"format": "qbmscvi-tape"``, ``"version": 2`` and the traits
that a training run depends on. Then, for call number ``"call"`` (from 1):

- one line per answer with the fingerprint of the request, the spins (bits packed most significant first, base64) and
  the facts of ``info`` that JSON can hold; or one line ``"failure"`` with the type and words of the error;
- one line ``"age"``: the steps after which the answer was used or dropped. A call that never answered has none.

Each line has a checksum. A tape can be read by anything and runs nothing when read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qbmscvi.exceptions import BudgetExceeded, InvalidSamples, SamplerError, SamplerTimeout, SamplerUnavailable
from qbmscvi.samplers._base import Draw, Sampler, SamplerTraits
from qbmscvi.samplers._composites import Composite, pass_on

if TYPE_CHECKING:
    import os

    from qbmscvi.ising import IsingModel, SampleBatch
    from qbmscvi.samplers._base import SamplingRequest

# What a run does depends on these traits, so a replay must have them.
_RUN_TRAITS = ("is_remote", "is_persistent", "is_slow")
_HEADER = {"format": "qbmscvi-tape", "version": 2}
_ERRORS = {kind.__name__: kind for kind in (BudgetExceeded, InvalidSamples, SamplerTimeout, SamplerUnavailable)}


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
    """Write every answer of the child to a tape, and every failure.

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
        traits = {name: getattr(self.traits, name) for name in _RUN_TRAITS}
        self.path.write_text(json.dumps({**_HEADER, **traits}) + "\n")
        self._is_intact = True
        self._n_calls = 0
        self._lock = threading.Lock()

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        asked = [replace(request, seed=seed) for request, seed in zip(requests, seeds, strict=True)]
        self._n_calls += 1
        call = self._n_calls
        try:
            batches = self.child.sample_batch(asked)
        except SamplerError as error:
            self._write(call, [{"failure": {"type": type(error).__name__, "message": str(error)}}])
            raise
        self._write(call, [_encode(request, batch) for request, batch in zip(asked, batches, strict=True)])
        return [pass_on(batch, is_recorded=self._is_intact) for batch in batches]

    def note_age(self, age: int) -> None:
        """Write down when the last answer was used."""
        self._write(self._n_calls, [{"age": age}])
        super().note_age(age)

    def _write(self, call: int, entries: list[dict[str, Any]]) -> None:
        entries = [{"call": call, **entry} for entry in entries]
        lines = [json.dumps({**entry, "sha256": _checksum(entry)}) + "\n" for entry in entries]
        with self._lock:
            if not self._is_intact:
                return
            try:
                with self.path.open("a") as file:
                    file.writelines(lines)
            except OSError as error:
                self._is_intact = False
                warnings.warn(
                    f"Recording to {self.path} stopped: {error}. Sampling goes on without it.",
                    RuntimeWarning,
                    stacklevel=3,
                )


class Replayed(Sampler):
    """Play back a tape: the same answers and failures in the same order, if the same is asked.

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
        if not is_tape or not set(_RUN_TRAITS) <= set(header):
            msg = f"{self.path} is not a tape of version {_HEADER['version']}: it begins with {lines[:1]}."
            raise InvalidSamples(msg)
        self._calls: list[list[dict[str, Any]]] = []
        self._ages: list[float] = []
        self._is_past_end = False
        for number, line in enumerate(lines[1:], start=2):
            self._file(_verify(line, self.path, number))
        self._position = 0
        self._checksum = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.traits = SamplerTraits(**{name: header[name] for name in _RUN_TRAITS}, is_replay=True)

    def state_dict(self) -> dict[str, Any]:
        """Number of answers that were replayed, and the checksum of the file that they came from."""
        return {"tape": self._checksum, "position": self._position, "is_past_end": self._is_past_end}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after these answers; another file is replayed from its start."""
        if state["tape"] == self._checksum:
            self._position, self._is_past_end = state["position"], state["is_past_end"]

    def _file(self, entry: dict[str, Any]) -> None:
        """Put an entry to its call; calls without an answer leave no other trace than a gap."""
        missing = entry["call"] - len(self._calls)
        self._calls += [[] for _ in range(missing)]
        self._ages += [math.inf] * missing
        if "age" in entry:
            self._ages[entry["call"] - 1] = entry["age"]
        else:
            self._calls[entry["call"] - 1].append(entry)

    @property
    def recorded_age(self) -> float | None:
        """Age at which the last answer was used when it was recorded; infinite for never.

        So it is for a call after the last one on the tape: that one was under way when the recording ended.
        """
        if self._is_past_end:
            return math.inf
        return self._ages[self._position - 1] if self._position else None

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        if self._position == len(self._calls):
            self._is_past_end = True
            msg = (
                f"The tape {self.path} ends after {len(self._calls)} calls, but another was made. Replay a run with "
                "the settings it was recorded with."
            )
            raise SamplerUnavailable(msg)
        entries = self._calls[self._position]
        failures = [entry["failure"] for entry in entries if "failure" in entry]
        expected = [entry["request"] for entry in entries if "request" in entry]
        if expected and expected != [fingerprint(request) for request in requests]:
            msg = (
                f"Call {self._position + 1} of {self.path} belongs to another problem than the one asked for. Replay "
                "with the same data, seed and settings as when it was recorded."
            )
            raise InvalidSamples(msg)
        self._position += 1
        if failures:
            raise _ERRORS.get(failures[0]["type"], SamplerError)(failures[0]["message"])
        if not entries:
            msg = f"Call {self._position} of {self.path} was never answered."
            raise SamplerTimeout(msg)
        return [_decode(entry) for entry in entries]


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
