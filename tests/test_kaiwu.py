"""QBoson's machines: the worker and its protocol, jobs, faults and secrets.

The worker is the real one, in a process and an interpreter environment of its own; the SDK in it is the stand-in of
``kaiwu_standin``. At the end the real wheel is tried, as far as it goes without a licence. No machine was ever reached.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import pickle
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty import Pace
from kaiwu_platform import SECRETS, TRUE_BETA, Platform, make_interpreter
from oracles import Distribution, assert_follows, energy_table, random_problem, state_table

from qbmscvi import QBMSCVI, SamplingSchedule
from qbmscvi.boltzmann import graphs
from qbmscvi.datasets import synthetic_counts
from qbmscvi.exceptions import (
    BudgetExceeded,
    GraphMismatchError,
    InvalidSamples,
    SamplerError,
    SamplerTimeout,
    SamplerUnavailable,
)
from qbmscvi.samplers import (
    Broker,
    Calibrated,
    KaiwuSampler,
    Polished,
    Recorded,
    Retrying,
    SamplingRequest,
    build_kaiwu_sampler,
    build_sampler,
)
from qbmscvi.samplers import __main__ as command
from qbmscvi.samplers._background import call_in_background
from qbmscvi.samplers.kaiwu import _sampler as _kaiwu
from qbmscvi.samplers.kaiwu import _worker as _kaiwu_worker
from qbmscvi.samplers.kaiwu._ising_matrix import IsingMatrix
from qbmscvi.samplers.testing import check_sampler

TOKEN = "token-of-the-licence"  # which the stand-in quotes


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory) -> Path:
    return make_interpreter(tmp_path_factory.mktemp("interpreter"))


@pytest.fixture
def platform(interpreter, tmp_path, monkeypatch) -> Platform:
    made = Platform(tmp_path / "platform")
    for name, value in made.environment(interpreter).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_kaiwu, "_INTERVAL", 0.2)
    return made


@pytest.fixture
def device(platform):
    made = KaiwuSampler(device_beta=TRUE_BETA, timeout=60.0)
    yield made
    made.close()


def wait_until(holds, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def problem():
    return random_problem(graphs.bipartite(3, 4), seed=5)


# Answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_samples_have_the_distribution_of_the_problem(device, problem, beta):
    """Sign, ancilla, scale and order at once: the stand-in enumerates the matrix that it gets. Alpha 1e-4."""
    batch = device.sample(SamplingRequest(problem, 4_001, beta=beta, seed=1))
    assert_follows(batch.spins, Distribution.boltzmann(problem, beta))
    info = batch.info
    assert info["is_sorted"]  # as it came
    assert not info["is_deduplicated"]
    assert bool((batch.energies.diff() < 0).any())  # as it is handed on
    assert info["effective_beta"] == pytest.approx(beta)
    assert info["scale"] == pytest.approx(beta / TRUE_BETA)
    assert 0 < info["rounding_error"] < 0.5 / 127 / info["scale"]
    assert info["n_candidates"] == 4_001
    assert len(info["task_names"]) == 3


def test_jobs_are_of_a_size_that_the_machine_takes(device, platform, problem):
    device.sample(SamplingRequest(problem, 4_001, seed=1))
    assert [call["n"] for call in platform.calls()] == [1334, 1334, 1333]
    assert {call["mode"] for call in platform.calls()} == {"sampling"}
    batch = device.sample(SamplingRequest(problem, 3, seed=1))
    assert platform.calls()[-1]["n"] == 10
    assert batch.info["n_candidates"] == 10
    first, second = device.sample_batch([SamplingRequest(problem, 20, seed=s) for s in (1, 2)])
    assert first.info["task_names"] != second.info["task_names"]
    assert not torch.equal(first.spins, second.spins)


def test_candidates_of_the_quota_mode_are_no_samples(platform, problem):
    optimizer = KaiwuSampler(device_beta=TRUE_BETA, mode="quota", timeout=60.0)
    assert optimizer.traits.target == "ground_state"
    batch = optimizer.sample(SamplingRequest(problem, 35, seed=1))
    assert platform.calls()[-1]["mode"] == "optimization"
    assert batch.info["n_candidates"] == 10
    states, counts = batch.spins.unique(dim=0, return_counts=True)
    assert sorted(counts.tolist()) == [3] * 5 + [4] * 5
    lowest = np.sort(energy_table(problem))[:10]
    assert np.allclose(np.sort(problem.energy(states).numpy()), lowest, atol=0.1)  # up to rounding to eight bits
    optimizer.close()


def test_jobs_that_compute_are_looked_at_no_faster_than_allowed(device, platform, problem):
    platform.compute_for(3)
    device.sample(SamplingRequest(problem, 2_500, seed=1))
    for task in {call["task"] for call in platform.calls()}:
        times = [call["time"] for call in platform.calls() if call["task"] == task]
        assert len(times) == 4
        assert min(np.diff(times)) > 0.15


def test_the_same_request_finds_its_job_after_a_restart(device, platform, problem):
    """By its name, on the platform: folder and worker are new."""
    platform.compute_for(2)
    request = SamplingRequest(problem, 50, seed=1, request_id="refresh-1-20-abc")
    device.timeout = 0.1
    with pytest.raises(SamplerTimeout, match="Its jobs continue"):
        device.sample(request)
    again = pickle.loads(pickle.dumps(device))
    again.timeout = 60.0
    first = again.sample(request)
    assert len(platform.jobs) == 1
    assert len({call["pid"] for call in platform.calls()}) == 2
    assert torch.equal(again.sample(request).spins, first.spins)
    again.sample(SamplingRequest(problem, 50, seed=1, request_id="refresh-1-40-abc"))
    for _ in range(2):  # no name: a draw of its own each time, in spite of the SDK's cache
        again.sample(SamplingRequest(problem, 50, seed=1))
    assert len(platform.jobs) == 4
    again.close()


def test_a_restarted_run_finds_the_job_of_its_request(platform, problem):
    """Through the whole chain, whose calibration has changed what is asked; the process is another one."""
    broker = Broker(build_kaiwu_sampler(device_beta=3.0), latency=1)
    for step, n_polls in ((0, 0), (1, 9_999)):
        platform.compute_for(n_polls)
        broker.submit(SamplingRequest(problem, 500, seed=step, request_id=f"refresh-{step}"))
        broker.dispatch(step)
        if step == 0:
            broker._trip.future.exception(timeout=60.0)
            broker.collect(1)
    gain = broker.sampler.log_gain
    assert gain == pytest.approx(np.log(2 / 3), abs=0.1)
    wait_until(lambda: len(platform.jobs) == 2)
    state = pickle.loads(pickle.dumps(broker.state_dict()))
    trip = broker._trip
    broker.close()
    with pytest.raises(SamplerUnavailable, match="was canceled"):
        trip.future.result(timeout=20.0)
    platform.finish_jobs()
    workers = {call["pid"] for call in platform.calls()}

    broker = Broker(build_kaiwu_sampler(device_beta=3.0), latency=1)
    broker.load_state_dict(state)
    assert broker.sampler.log_gain == gain
    broker._trip.future.exception(timeout=60.0)
    (batch,) = broker.collect(2)
    assert_follows(batch.spins, Distribution.boltzmann(problem))
    assert len(platform.jobs) == 2
    assert len({call["pid"] for call in platform.calls()} - workers) == 1
    broker.sampler.cancel()


def test_limits_and_arguments(device, monkeypatch):
    device.check(random_problem(graphs.independent(549)))
    with pytest.raises(GraphMismatchError, match="at most 549"):
        device.check(random_problem(graphs.independent(550)))
    for settings, words in (
        ({"mode": "fast"}, "mode='fast' is not known"),
        ({"device_beta": 0.0}, "device_beta=0.0 must be a positive"),
        ({"timeout": np.inf}, "timeout=inf must be a positive"),
        ({"n_bits": 1}, "n_bits=1 is too small"),
    ):
        with pytest.raises(ValueError, match=words):
            KaiwuSampler(**settings)


def test_the_contract_of_a_sampler_is_kept(device, platform, capsys):
    report = check_sampler(device, n_samples=300, betas=(1.0,))
    assert report.has_passed
    assert report.target == "approximate"
    with capsys.disabled():
        print(f"\nthe check made {len(platform.jobs)} jobs")


def test_training_takes_its_answers(platform, capsys):
    adata = synthetic_counts(n_cells=240, n_genes=30, seed=0)
    QBMSCVI.setup_anndata(adata)
    model = QBMSCVI(adata, n_latent=8, n_chains=64)
    sampler = build_kaiwu_sampler(device_beta=TRUE_BETA)
    schedule = SamplingSchedule(every_n_steps=1, latency=2, max_staleness=50)
    model.train(max_epochs=4, batch_size=64, sampler=sampler, schedule=schedule, callbacks=[Pace()])
    assert len(platform.jobs) > 3
    assert model.history["sampling_fallbacks"].to_numpy().ravel().tolist() == [0.0] * 4
    assert np.isfinite(model.history["sampling_effective_beta"].to_numpy(float)).any()


def test_the_ready_chain_has_its_layers_and_is_what_the_name_builds(platform, problem, monkeypatch):
    ready = build_sampler("kaiwu")
    assert ready.name == "Calibrated(Retrying(KaiwuSampler))"
    assert ready.traits.is_remote
    assert ready.traits.target == "approximate"
    ready = Polished(build_kaiwu_sampler(device_beta=3.0), 20)
    for seed in range(3):
        batch = ready.sample(SamplingRequest(problem, 4_000, seed=seed))
    assert_follows(batch.spins, Distribution.boltzmann(problem))
    assert batch.info["gain"] == pytest.approx(TRUE_BETA / 3.0, rel=0.1)


# Faults ------------------------------------------------------------------------------------------------------------

FAULTS = [
    ("quota", BudgetExceeded, "no machine time left"),
    ("transient", SamplerUnavailable, "must be str, bytes or bytearray, not NoneType"),
    ("creation", SamplerUnavailable, "Task creation failed"),
    ("network", SamplerUnavailable, "Max retries exceeded"),
    ("prompt", SamplerUnavailable, "EOF when reading a line"),
    ("leave", SamplerUnavailable, "SystemExit: 3"),
    ("crash", SamplerUnavailable, r"has ended \(exit code -9\)"),
    ("hang", SamplerTimeout, "did not answer before the deadline"),
    ("short", InvalidSamples, "has 100 states, .* but 200 runs were requested"),
    ("deduplicated", InvalidSamples, "Repeated states may be missing"),
    ("narrow", InvalidSamples, r"shape \(200, 7\); rows of 8 spins"),
    ("empty", InvalidSamples, r"shape \(0, 8\)"),
    ("zeros", InvalidSamples, "not a table of -1 and"),
    ("nan", InvalidSamples, "not a table of -1 and"),
    ("words", InvalidSamples, "not a table of -1 and"),
]


@pytest.mark.parametrize(("fault", "kind", "words"), FAULTS, ids=[fault for fault, _, _ in FAULTS])
def test_every_fault_ends_in_an_error_of_its_kind_in_time(device, platform, problem, fault, kind, words):
    device.timeout = 3.0 if fault == "hang" else 60.0
    platform.plan(fault)
    request = SamplingRequest(problem, 200, seed=1, request_id="refresh-1")
    started = time.monotonic()
    with pytest.raises(kind, match=words) as caught:
        device.sample(request)
    assert type(caught.value) is kind
    assert time.monotonic() - started < 30.0
    assert device._calls == []
    device.timeout = 60.0
    assert device.sample(request).n_samples == 200  # it goes on, with a new worker where the old one is gone
    names = {call["task"] for call in platform.calls()}
    # Bad answers would come again out of the SDK's cache; everything else finds the job that there is.
    is_kept = kind is InvalidSamples and fault not in ("zeros", "nan", "words")
    assert len(names) == 1 + is_kept


def test_training_outlives_every_fault(device, platform):
    """A request every two steps, and a fault for each of the first; those that come after are answered."""
    adata = synthetic_counts(n_cells=240, n_genes=30, seed=0)
    QBMSCVI.setup_anndata(adata)
    model = QBMSCVI(adata, n_latent=8, n_hidden_spins=0, n_chains=64)  # states repeat
    device.timeout = 5.0
    platform.plan(*[fault for fault, *_ in FAULTS])
    schedule = SamplingSchedule(every_n_steps=1, latency=2)
    with pytest.warns(RuntimeWarning, match="Block Gibbs"):
        model.train(
            max_epochs=16, batch_size=64, sampler=device, schedule=schedule, callbacks=[Pace()], fit_prior=False
        )
    sampling = model.trainer.lightning_module.sampling
    assert sampling.n_fallbacks == len(FAULTS)
    assert sampling.broker.ledger.n_samples > 0
    assert np.isfinite(model.get_latent_representation()).all()


def test_transient_faults_are_asked_again(device, platform, problem):
    platform.plan("transient", "network")
    batch = Retrying(device, 3, pause=0.01).sample(SamplingRequest(problem, 20, seed=1))
    assert batch.info["n_attempts"] == 3


def test_a_hanging_worker_does_not_outlive_its_call(device, platform, problem):
    device.timeout = 2.0
    platform.plan("hang")
    with pytest.raises(SamplerTimeout):
        device.sample(SamplingRequest(problem, 20, seed=1))
    with pytest.raises(ProcessLookupError):
        os.kill(platform.calls()[-1]["pid"], 0)


def test_cancel_ends_the_call(device, platform, problem, monkeypatch):
    platform.plan("hang")
    answer = call_in_background(device.sample, SamplingRequest(problem, 20, seed=1))
    wait_until(platform.calls)
    Polished(device).cancel()
    with pytest.raises(SamplerUnavailable, match="was canceled"):
        answer.result(timeout=20.0)
    monkeypatch.setattr(_kaiwu, "_INTERVAL", 30.0)
    platform.compute_for(1)
    answer = call_in_background(device.sample, SamplingRequest(problem, 20, seed=1))
    wait_until(lambda: len(platform.calls()) == 2)
    time.sleep(0.3)
    device.cancel()
    with pytest.raises(SamplerUnavailable, match="was canceled"):
        answer.result(timeout=20.0)


def test_a_missing_licence_is_said_and_not_asked_for(platform, monkeypatch):
    for name in SECRETS:
        monkeypatch.delenv(name)
    started = time.monotonic()
    with pytest.raises(SamplerUnavailable, match="EOF.*KAIWU_USER_ID"):
        KaiwuSampler(timeout=60.0)
    assert time.monotonic() - started < 30.0


def test_a_missing_interpreter_or_sdk_is_said(platform, monkeypatch, tmp_path):
    with pytest.raises(SamplerUnavailable, match="pip install kaiwu"):
        KaiwuSampler(python=sys.executable)
    with pytest.raises(SamplerUnavailable, match="nowhere/python.*KAIWU_PYTHON"):
        KaiwuSampler(python="nowhere/python")
    (tmp_path / "broken").write_text("no program")
    (tmp_path / "broken").chmod(0o755)
    with pytest.raises(SamplerUnavailable, match="cannot be started"):
        KaiwuSampler(python=tmp_path / "broken")
    monkeypatch.delenv("KAIWU_PYTHON")
    with pytest.raises(SamplerUnavailable, match="3.10.*KAIWU_PYTHON"):
        build_sampler("kaiwu")


@pytest.mark.parametrize("line", ["nonsense", "[1, 2]", '{"protocol": "qbmscvi-kaiwu", "version": 2}', ""])
def test_another_program_is_not_taken_for_the_worker(tmp_path, line):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho '{line}'\nsleep 60\n")
    program.chmod(0o755)
    with pytest.raises(InvalidSamples, match="request that was sent"):
        KaiwuSampler(python=program)


def test_a_worker_that_does_not_start_is_an_error_in_time(tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nsleep 60\n")
    program.chmod(0o755)
    with pytest.raises(SamplerTimeout):
        KaiwuSampler(python=program, timeout=0.5)


# Secrets -----------------------------------------------------------------------------------------------------------


def test_credentials_are_nowhere_but_in_the_environment(device, platform, problem, tmp_path, caplog, capfd):
    """States, names, recordings, logs, output, and tracebacks with all local variables."""
    caplog.set_level(logging.DEBUG)
    stack = Recorded(Polished(Calibrated(Retrying(device, pause=0.01)), 2), tmp_path / "recording")
    batch = stack.sample(SamplingRequest(problem, 50, seed=1))
    assert platform.calls("init")  # the worker has used them
    seen = []
    for fault in ("quote", "quota", "crash", "short", "prompt", "hang"):
        platform.plan(*[fault] * 20)
        device.timeout = 2.0 if fault == "hang" else 60.0
        try:
            stack.sample(SamplingRequest(problem, 20, seed=1))
        except SamplerError as error:
            trace = traceback.TracebackException.from_exception(error, capture_locals=True)
            seen += [*trace.format(), repr(error), pickle.dumps(error).decode("latin-1")]
            if fault == "quote":
                assert "bad header JWT [removed] of [removed] with [removed] in project [removed]" in str(error)
        platform.plan()
    assert len(seen) > 5 * 6
    seen += [repr(device), str(stack), repr(batch.info), pickle.dumps(device).decode("latin-1"), repr(vars(device))]
    seen += [(tmp_path / "recording").read_text(), caplog.text, *capfd.readouterr()]
    for secret in (*SECRETS.values(), TOKEN):
        assert [text for text in seen if secret in text] == []


def test_telemetry_is_off_unless_asked_for(device, platform, problem):
    device.sample(SamplingRequest(problem, 20, seed=1))
    assert not platform.has_heard_telemetry
    talking = KaiwuSampler(timeout=60.0, telemetry=True)
    talking.sample(SamplingRequest(problem, 20, seed=1))
    talking.close()
    assert platform.has_heard_telemetry


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("KAIWU_STANDIN_POSTS_ELSEWHERE", "telemetry=True"),
        ("KAIWU_STANDIN_HAS_OTHER_MODES", "modes"),
    ],
)
def test_an_sdk_of_another_kind_is_refused(platform, monkeypatch, variable, words):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(SamplerUnavailable, match=words):
        KaiwuSampler(timeout=60.0)


def test_the_command_says_what_is_missing(platform, monkeypatch):
    assert dict(command.describe())["kaiwu"] == "configured"
    monkeypatch.delenv("KAIWU_SDK_CODE")
    assert "without KAIWU_USER_ID and KAIWU_SDK_CODE" in dict(command.describe())["kaiwu"]
    monkeypatch.delenv("KAIWU_PYTHON")
    assert dict(command.describe())["kaiwu"].startswith("not configured: The Kaiwu SDK needs a separate interpreter")


# The worker, and the real wheel ------------------------------------------------------------------------------------


def test_the_worker_is_a_program_for_the_other_interpreter():
    source = Path(_kaiwu_worker.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 10))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - set(sys.stdlib_module_names) == {"numpy", "kaiwu"}
    assert "pickle" not in imported


@pytest.fixture(scope="session", params=["kaiwu==1.3.1", "kaiwu"])
def real_interpreter(request, tmp_path_factory) -> Path:
    """CPython 3.10 with the real SDK, from the package index: the first version that is supported, and the last."""
    candidates = ["python3.10", *map(str, Path.home().glob(".pyenv/versions/3.10*/bin/python3.10"))]
    for candidate in candidates:
        try:
            done = subprocess.run([candidate, "--version"], capture_output=True, check=False)
        except OSError:
            continue
        if done.returncode == 0:
            break
    else:
        pytest.skip("there is no CPython 3.10 on this machine")
    folder = tmp_path_factory.mktemp("real")
    subprocess.run([candidate, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    done = subprocess.run([python, "-m", "pip", "install", "-q", request.param], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("the wheel of the Kaiwu SDK cannot be installed here")
    return python


@pytest.fixture
def without_credentials(monkeypatch):
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)


def in_real(python: Path, code: str, **values) -> dict:
    """Run lines of code with ``values``, and the worker as a module, and return ``answer``; through JSON."""
    lines = [
        "import importlib.util, json, sys",
        "import numpy as np, kaiwu",
        f"spec = importlib.util.spec_from_file_location('worker', {_kaiwu_worker.__file__!r})",
        "worker = importlib.util.module_from_spec(spec)",
        "spec.loader.exec_module(worker)",
        "globals().update(json.load(sys.stdin))",
        code,
        "print('\\n' + json.dumps(answer))",
    ]
    command_line = [python, "-c", "\n".join(lines)]
    done = subprocess.run(command_line, input=json.dumps(values), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.usefixtures("without_credentials")
def test_the_real_sdk_says_that_it_has_no_licence(real_interpreter):
    started = time.monotonic()
    with pytest.raises(SamplerUnavailable, match="EOF.*KAIWU_USER_ID"):
        KaiwuSampler(python=real_interpreter)
    assert time.monotonic() - started < 60.0


@pytest.mark.slow
def test_the_real_sdk_has_the_names_modes_and_arguments_that_the_worker_uses(real_interpreter):
    code = """
import inspect
import kaiwu.cim, kaiwu.license
answer = {
    "arguments": list(inspect.signature(kaiwu.cim.CIMOptimizer.__init__).parameters),
    "modes": [worker._task_mode(kaiwu, mode) for mode in ("sample", "quota")],
    "others": [hasattr(kaiwu.license, "init"), hasattr(kaiwu.license, "ensure_license"),
               hasattr(kaiwu.common.CheckpointManager, "save_dir")],
}"""
    answer = in_real(real_interpreter, code)
    assert {"task_name", "wait", "project_no", "task_mode", "sample_number"} <= set(answer["arguments"])
    assert answer["modes"] in (["sampling", "optimization"], ["sample", "quota"])
    assert all(answer["others"])


@pytest.mark.slow
def test_our_matrix_is_read_by_the_real_sdk_as_it_is_meant(real_interpreter):
    """Its Hamiltonian of all states, and its quantizer, which finds nothing to round."""
    problem = random_problem(graphs.bipartite(3, 4), seed=5)
    program = IsingMatrix.from_problem(problem, 1.0, TRUE_BETA, 8)
    states = np.concatenate([state_table(7), np.ones((128, 1), dtype=int)], axis=1)
    code = """
M = np.array(matrix, dtype=float)
tools = kaiwu.preprocess if hasattr(kaiwu.preprocess, "adjust_ising_matrix_precision") else kaiwu.ising
adjusted = tools.adjust_ising_matrix_precision(M, bit_width=8)
answer = {
    "H": np.asarray(kaiwu.common.hamiltonian(M, np.array(states))).ravel().tolist(),
    "bits": int(tools.calculate_ising_matrix_bit_width(M)["precision"]),
    "is_same": bool(np.array_equal(adjusted, M)),
}"""
    answer = in_real(real_interpreter, code, matrix=program.values.tolist(), states=states.tolist())
    assert np.array_equal(answer["H"], program.energy(states))
    assert answer["bits"] <= 8
    assert answer["is_same"]
    energies = np.array(answer["H"]) / (2 * 127 * program.scale)
    assert np.abs(energies - energy_table(problem) - np.mean(energies - energy_table(problem))).max() < 0.1


@pytest.mark.slow
def test_the_real_sdk_is_kept_from_posting(real_interpreter):
    """Its decorator calls what the worker puts in the place of the function that posts."""
    code = """
import threading
import requests, kaiwu.license
posted = []
requests.post = requests.get = requests.request = lambda *a, **k: posted.append(a) or 1 / 0
requests.Session.request = lambda *a, **k: posted.append(a) or 1 / 0
from kaiwu.license import _track_data
heard = []
_track_data.post_sdk_data = lambda *a, **k: heard.append(a)
def run():
    try:
        kaiwu.license.track_data(alg_name="cim", enabled=True)(lambda self, matrix: 1)(object(), np.zeros((2, 2)))
    except Exception as error:
        print(error, file=sys.stderr)
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(5)
run()
before = len(heard)
assert worker._silence_telemetry()
run()
answer = {"before": before, "after": len(heard), "posted": len(posted)}
"""
    answer = in_real(real_interpreter, code)
    assert answer["before"] > 0  # the decorator does look the function up
    assert answer["after"] == answer["before"]
    assert answer["posted"] == 0
