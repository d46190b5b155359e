"""Scripts that train in several processes, started from a test: Lightning starts all but the first process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

_SET_BY_LIGHTNING = ("MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
_SETTINGS = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def run_script(name: str, folder: Path, *arguments: str, timeout: float) -> None:
    """Run a script of this folder in ``folder``, its first argument; Lightning finds a free port of the loopback."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name(name)), str(folder), *arguments],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in _SET_BY_LIGHTNING} | _SETTINGS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"A rank is waiting for another one that does not come.\n{output}")
    assert process.returncode == 0, output
