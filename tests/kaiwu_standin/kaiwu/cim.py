"""Jobs: kept by task name and matrix, computing for a while, answered with states sorted by energy."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import sys
import time
from functools import lru_cache

import numpy as np

from . import common
from ._platform import load, next_fault, note, place, save
from .license import ensure_license, track_data

TRUE_BETA = 2.0  # where a coupling of 127 counts as one


class TaskMode:
    OPTIMIZATION = "optimization"
    SAMPLING = "sampling"


if os.environ.get("KAIWU_STANDIN_HAS_OTHER_MODES"):
    del TaskMode.SAMPLING


class CIMOptimizer:
    def __init__(self, task_name, wait=False, interval=1, project_no=None, task_mode="optimization", sample_number=10):
        ensure_license()
        assert interval >= 1
        assert not wait, "the worker must not block"
        assert 10 <= sample_number <= 2000
        assert common.CheckpointManager.save_dir is not None
        assert 5 <= len(task_name) <= 24
        self.task_name, self.task_mode, self.sample_number = task_name, task_mode, sample_number
        self.project_no = project_no

    @track_data
    def solve(self, ising_matrix):
        fault = next_fault()
        note("solve", task=self.task_name, mode=self.task_mode, n=self.sample_number, fault=fault)
        print("a line of the SDK on the standard output", flush=True)
        if fault is not None and fault in _FAULTS:
            _FAULTS[fault]()
        matrix = np.asarray(ising_matrix)
        assert np.array_equal(matrix, matrix.T)
        assert not matrix.diagonal().any()
        assert np.array_equal(matrix, matrix.round())
        assert np.abs(matrix).max() <= 127
        key = self.task_name + hashlib.md5(matrix.tobytes()).hexdigest()
        jobs = load("jobs.json", {})
        if key not in jobs:
            jobs[key] = {"polls_left": load("polls.json", 0), "n_created": len(jobs)}
        job = jobs[key]
        is_computing = job["polls_left"] > 0
        job["polls_left"] -= is_computing
        save("jobs.json", jobs)
        if is_computing:
            return None
        answer = place(f"answer-{job['n_created']}.npy")
        if not answer.exists():
            np.save(answer, self._draw(matrix, job["n_created"]).astype(np.int8))
        return _spoil(fault, np.load(answer))

    def _draw(self, matrix, number):
        """Boltzmann samples by enumeration; one state in two is given with the ancilla down."""
        states = _states(len(matrix))
        hamiltonian = -((states @ matrix) * states).sum(1)
        weights = np.exp(-TRUE_BETA / (2 * 127) * (hamiltonian - hamiltonian.min()))
        rng = np.random.default_rng(number)
        if self.task_mode == TaskMode.OPTIMIZATION:
            return states[np.argsort(hamiltonian)[:10]]
        drawn = np.sort(rng.choice(len(states), size=self.sample_number, p=weights / weights.sum()))
        drawn = drawn[np.argsort(hamiltonian[drawn], kind="stable")]
        return states[drawn] * rng.choice([-1, 1], size=(len(drawn), 1))


@lru_cache(maxsize=1)
def _states(n):
    """All states whose last spin, the ancilla, is up."""
    free = np.array(list(itertools.product((-1.0, 1.0), repeat=n - 1)))
    return np.concatenate([free, np.ones((len(free), 1))], axis=1)


def _spoil(fault, answer):
    if fault == "short":
        return answer[: len(answer) // 2]
    if fault == "deduplicated":
        return np.unique(answer * answer[:, -1:], axis=0)
    if fault == "narrow":
        return answer[:, 1:]
    if fault == "zeros":
        return answer * 0
    if fault == "nan":
        return answer * np.nan
    if fault == "words":
        return "up up down"
    if fault == "empty":
        return answer[:0]
    return answer


def _raise(kind, words):
    raise kind(words)


def _quote():
    user_id, sdk_code = os.environ["KAIWU_USER_ID"], os.environ["KAIWU_SDK_CODE"]
    project = os.environ["KAIWU_PROJECT_NO"]
    token = "eyJhbGciOiJSUzI1NiJ9.token-of-the-licence.c2lnbmF0dXJl"
    sys.stderr.write(f"{user_id} {sdk_code}\n")
    raise ValueError(f"bad header JWT {token} of {user_id} with {sdk_code} in project {project}")


_FAULTS = {
    "quota": lambda: _raise(ValueError, "CPQC-1资源不足"),
    "transient": lambda: _raise(TypeError, "the JSON object must be str, bytes or bytearray, not NoneType"),
    "creation": lambda: _raise(ValueError, "Task creation failed"),
    "network": lambda: _raise(ConnectionError, "Max retries exceeded"),
    "quote": _quote,
    "prompt": lambda: input("Please enter user ID: "),
    "leave": lambda: sys.exit(3),
    "crash": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: time.sleep(600),
}
