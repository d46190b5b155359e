"""The process of ``_worker.py`` and this side of its protocol, which that file describes."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
import weakref
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbmscvi.exceptions import BudgetExceeded, InvalidSamples, SamplerTimeout, SamplerUnavailable
from qbmscvi.samplers._background import call_in_background
from qbmscvi.samplers.kaiwu._worker import PROTOCOL

if TYPE_CHECKING:
    from qbmscvi.exceptions import SamplerError

_SCRIPT = Path(__file__).with_name("_worker.py")
_KINDS: dict[str, type[SamplerError]] = {"budget": BudgetExceeded, "invalid": InvalidSamples}


class Link:
    """A running worker. A worker that hangs or breaks the protocol is killed; the next call starts another one.

    Parameters
    ----------
    python
        Interpreter.
    folder
        Folder for files of the SDK; None for a temporary one.
    telemetry
        Whether the SDK may report its use.
    deadline
        Latest time, on the clock of :func:`time.monotonic`, for the worker to be ready.

    Raises
    ------
    SamplerUnavailable
        If it cannot be started, or has no SDK or no licence.
    SamplerTimeout
        If it is not ready in time.
    """

    def __init__(self, python: str, folder: str | None, telemetry: bool, deadline: float) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="qbmscvi-kaiwu-") if folder is None else None
        # -E: variables like PYTHONPATH are meant for this interpreter only.
        command = [python, "-E", str(_SCRIPT)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        try:
            self._process, problem = subprocess.Popen(command, start_new_session=True, **pipes), None
        except OSError as error:
            problem = error.strerror
        if problem is not None:
            msg = f"The interpreter of the Kaiwu SDK, {python}, cannot be started ({problem}). Check KAIWU_PYTHON."
            raise SamplerUnavailable(msg)
        self._end = weakref.finalize(self, _kill, self._process)
        self._numbers = count(1)
        self._lock = threading.Lock()
        self._lines: queue.Queue[bytes] = queue.Queue()
        call_in_background(_read, self._process, self._lines)
        settings = {"folder": folder or self._temporary.name, "telemetry": telemetry}
        self.header = self._exchange({**PROTOCOL, **settings}, deadline, dict(PROTOCOL))

    @property
    def is_open(self) -> bool:
        """Whether the worker can take requests."""
        return self._end.alive and self._process.poll() is None

    def close(self) -> None:
        """Kill the worker."""
        self._end()

    def ask(self, message: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Send a request, and wait for its answer.

        Raises
        ------
        BudgetExceeded, InvalidSamples, SamplerUnavailable
            If the worker reports it, ends, or answers another request.
        SamplerTimeout
            If there is no answer before the deadline.
        """
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            msg = "The worker of the Kaiwu SDK was busy with another call until the deadline."
            raise SamplerTimeout(msg)
        try:
            number = next(self._numbers)
            return self._exchange({**message, "id": number}, deadline, {"id": number})
        finally:
            self._lock.release()

    def _exchange(self, message: dict[str, Any], deadline: float, expected: dict[str, Any]) -> dict[str, Any]:
        # In another thread: a worker that hangs does not read, either.
        call_in_background(_write, self._process, json.dumps(message).encode() + b"\n")
        try:
            line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            line = None
        if line is None:
            self.close()
            msg = "The worker of the Kaiwu SDK did not answer before the deadline, and was ended."
            raise SamplerTimeout(msg)
        if not line:
            self.close()
            self._lines.put(line)  # for other threads that wait
            msg = f"The worker of the Kaiwu SDK has ended (exit code {self._process.returncode})."
            raise SamplerUnavailable(msg)
        answer = _parse(line)
        if any(answer.get(key) != value for key, value in expected.items()):
            self.close()
            msg = "The worker of the Kaiwu SDK did not answer the request that was sent."
            raise InvalidSamples(msg)
        if "error" in answer:
            kind, words = answer["error"]["kind"], answer["error"]["message"]
            raise _KINDS.get(kind, SamplerUnavailable)(words)
        return answer


def _parse(line: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {}


def _write(process: subprocess.Popen, line: bytes) -> None:
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except (OSError, ValueError):
        pass  # it has ended; the thread that waits for its answer notices


def _read(process: subprocess.Popen, lines: queue.Queue) -> None:
    try:
        for line in process.stdout:
            lines.put(line)
    except (OSError, ValueError):
        pass
    process.wait()
    lines.put(b"")


def _kill(process: subprocess.Popen) -> None:
    """End the worker and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()
