"""Recordings: what is recorded is what is replayed, bit for bit; the file can be read by anything; damage is found.

Spins are rebuilt from the file here by hand, with ``json`` and ``base64`` alone.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import inspect
import json
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scvi
import torch
from oracles import random_problem, ring
from tables import over

from qbmscvi import QBMSCVI, SamplingSchedule
from qbmscvi.datasets import synthetic_counts
from qbmscvi.exceptions import BudgetExceeded, InvalidSamples, SamplerError, SamplerTimeout, SamplerUnavailable
from qbmscvi.samplers import (
    BlockGibbsSampler,
    Budgeted,
    Draw,
    ExactSampler,
    Polished,
    Recorded,
    Replayed,
    SamplerTraits,
    SamplingRequest,
    SpinReversed,
)
from qbmscvi.samplers.testing import tiny_problems
from qbmscvi.samplers.wrappers import _recordings

PROBLEMS = {
    dtype: {
        name: problem.to(dtype) for name, problem in (tiny_problems() | {"ring-7": random_problem(ring(7))}).items()
    }
    for dtype in (torch.float32, torch.float64)
}
PROBLEM = PROBLEMS[torch.float64]["complete-6"]


class Talkative(ExactSampler):
    """Reports facts of every kind."""

    def _sample(self, request, seed):
        facts = {
            "job": "7f-é",
            "n_breaks": 3,
            "effective_beta": 0.1 + 0.2,
            "is_range_limited": False,
            "nothing": None,
            "array": np.zeros(3),
            "tensor": torch.zeros(3),
        }
        return Draw(super()._sample(request, seed).spins, facts)


def requests_of(dtype=torch.float64) -> list[SamplingRequest]:
    return [
        SamplingRequest(problem, n, beta, seed=seed)
        for seed, (problem, n, beta) in enumerate(
            zip(PROBLEMS[dtype].values(), (9, 1, 300, 13), (0.3, 1.0, 2.0, 0.7), strict=True)
        )
    ]


@pytest.fixture
def recording(tmp_path) -> Path:
    """Four answers of different sizes; 9 x 8 + 1 x 6 + 300 x 12 + 13 x 7 bits."""
    path = tmp_path / "run.jsonl"
    recorder = Recorded(Talkative(), path)
    for request in requests_of():
        recorder.sample(request)
    return path


def calls(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().decode("ascii").split("\n")[1:-1]]


def entries(path) -> list[dict]:
    return [answer for call in calls(path) for answer in call["answers"]]


def rewrite(path, change, line=2) -> Path:
    """Change a line of a recording, given and taken as text, the header being line 1."""
    lines = path.read_text().splitlines()
    lines[line - 1] = change(lines[line - 1])
    changed = path.with_name(f"{path.name}-changed")
    changed.write_text("\n".join(lines) + "\n")
    return changed


def checksum(entry) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


# What is replayed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(Talkative, id="talkative"),
        pytest.param(lambda: SpinReversed(ExactSampler(), 1), id="wrapped"),
    ],
)
def test_replayed_answers_equal_recorded_ones_bit_for_bit(build, dtype, tmp_path):
    recorder = Recorded(build(), tmp_path / "recording")
    requests = [replace(request, n_samples=request.n_samples + 200) for request in requests_of(dtype)]
    recorded = [recorder.sample(request) for request in requests]
    player = Replayed(tmp_path / "recording")
    for request, first in zip(requests, recorded, strict=True):
        second = player.sample(request)
        assert second.spins.dtype == torch.int8
        assert torch.equal(first.spins, second.spins)
        assert first.energies.dtype == second.energies.dtype == dtype
        assert torch.equal(first.energies, second.energies)
        own = {"sampler", "seconds", "is_recorded", "is_replayed"}
        plain = {k: v for k, v in first.info.items() if isinstance(v, bool | int | float | str | None) and k not in own}
        assert plain == {key: value for key, value in second.info.items() if key not in own}
        assert second.info["sampler"] == recorder.child.name
        assert (first.info["is_recorded"], second.info["is_replayed"]) == (True, True)


def test_facts_that_json_can_hold_are_kept(recording):
    info = Replayed(recording).sample(requests_of()[0]).info
    kept = {"job": "7f-é", "n_breaks": 3, "effective_beta": 0.1 + 0.2, "is_range_limited": False, "nothing": None}
    assert {key: info[key] for key in kept} == kept
    assert isinstance(info["is_range_limited"], bool)
    assert "array" not in info
    assert "tensor" not in info
    assert (info["seed"], info["beta"]) == (0, 0.3)


def test_a_batch_is_one_call_of_the_recording(tmp_path):
    together = Recorded(ExactSampler(), tmp_path / "recording").sample_batch(requests_of())
    assert [len(call["answers"]) for call in calls(tmp_path / "recording")] == [4]
    again = Replayed(tmp_path / "recording").sample_batch(requests_of())
    assert all(torch.equal(a.spins, b.spins) for a, b in zip(together, again, strict=True))
    for part in (requests_of()[:3], requests_of()[::-1]):
        with pytest.raises(InvalidSamples, match="Call 1 .*another problem"):
            Replayed(tmp_path / "recording").sample_batch(part)


class Failing(ExactSampler):
    """Fails at every second call."""

    def __init__(self, error):
        self.error, self.n_calls = error, 0

    def _sample_batch(self, requests, seeds):
        self.n_calls += 1
        if self.n_calls % 2 == 0:
            raise self.error
        return super()._sample_batch(requests, seeds)


@pytest.mark.parametrize(
    "error", [SamplerTimeout("no answer"), BudgetExceeded("spent"), OSError("line cut"), SamplerError("odd")], ids=repr
)
def test_failures_are_played_back_where_they_happened(error, tmp_path):
    recorder = Recorded(Failing(error), tmp_path / "recording")
    player = None
    for sampler in (recorder, None):
        player = sampler or Replayed(tmp_path / "recording")
        for k, request in enumerate(requests_of()):
            if k % 2 == 0:
                assert player.sample(request).n_samples == request.n_samples
                continue
            with pytest.raises(SamplerError) as caught:
                player.sample(request)
            kind = type(error) if isinstance(error, SamplerError) else SamplerError
            assert type(caught.value) is kind
            assert str(error) in str(caught.value)


def test_unknown_failures_of_a_recording_call_nothing(tmp_path):
    """The type of a failure is a word to look up in a short list, not a name to evaluate."""
    recorder = Recorded(Failing(SamplerTimeout("no answer")), tmp_path / "recording")
    recorder.sample(requests_of()[0])
    with pytest.raises(SamplerTimeout):
        recorder.sample(requests_of()[1])

    def rename(line):
        body = {"failure": {"type": "require_integer", "message": "x"}}
        return json.dumps({**body, "sha256": checksum(body)})

    player = Replayed(rewrite(tmp_path / "recording", rename, 3))
    player.sample(requests_of()[0])
    with pytest.raises(SamplerError, match="^x$"):
        player.sample(requests_of()[1])


def test_recording_changes_nothing(tmp_path):
    request = requests_of()[2]
    plain, recorded = ExactSampler().sample(request), Recorded(ExactSampler(), tmp_path / "recording").sample(request)
    assert torch.equal(plain.spins, recorded.spins)
    assert recorded.info["sampler"] == "Recorded(ExactSampler)"


def test_seeds_are_drawn_once_and_written_down(tmp_path):
    torch.manual_seed(4)
    Recorded(ExactSampler(), tmp_path / "recording").sample(replace(requests_of()[0], seed=None))
    torch.manual_seed(4)
    (entry,) = entries(tmp_path / "recording")
    assert entry["info"]["seed"] == int(torch.randint(2**31 - 1, ()))


class RemoteChains(BlockGibbsSampler):
    traits = SamplerTraits(is_remote=True, is_persistent=True, is_slow=True)


@pytest.mark.parametrize(
    ("build", "is_remote", "is_persistent"),
    [(ExactSampler, False, False), (BlockGibbsSampler, False, True), (RemoteChains, True, True)],
)
def test_a_recording_has_the_traits_that_a_run_depends_on(build, is_remote, is_persistent, tmp_path):
    recorder = Recorded(build(), tmp_path / "recording")
    request = SamplingRequest(PROBLEM, 4, seed=1)
    first = recorder.sample(request)
    second = recorder.sample(replace(request, initial_spins=first.spins))
    player = Replayed(tmp_path / "recording")
    expected = SamplerTraits(is_remote=is_remote, is_persistent=is_persistent, is_slow=is_remote, is_replay=True)
    assert player.traits == expected
    player.sample(request)
    assert torch.equal(player.sample(replace(request, initial_spins=first.spins)).spins, second.spins)


def test_a_recording_inside_other_wrappers(tmp_path):
    """Recorded at the device, replayed at the device: the layers around it do the same again."""
    request = SamplingRequest(PROBLEM, 40, 1.3, seed=5)
    first = Polished(SpinReversed(Recorded(ExactSampler(), tmp_path / "recording"), 3), 2).sample(request)
    second = Polished(SpinReversed(Replayed(tmp_path / "recording"), 3), 2).sample(request)
    assert torch.equal(first.spins, second.spins)


# The file ----------------------------------------------------------------------------------------------------------


def test_header_names_format_and_version(recording):
    header = json.loads(recording.read_text().splitlines()[0])
    traits = dict.fromkeys(("is_remote", "is_persistent", "is_slow"), False)
    assert header == {"format": "qbmscvi-recording", "version": 1, **traits}


def test_the_file_is_plain_json_lines(recording):
    text = recording.read_bytes().decode("ascii")
    assert text.endswith("\n")
    assert text.count("\n") == 5
    for call in calls(recording):
        assert set(call) == {"answers", "sha256"}
        assert [set(answer) for answer in call["answers"]] == [{"request", "shape", "spins", "info"}]
        assert call["sha256"] == checksum({"answers": call["answers"]})


def test_spins_and_facts_can_be_rebuilt_by_hand(recording):
    for request, entry in zip(requests_of(), entries(recording), strict=True):
        n_samples, n_spins = entry["shape"]
        number = int.from_bytes(base64.b64decode(entry["spins"]), "big")
        n_bits = len(base64.b64decode(entry["spins"])) * 8
        bits = [number >> (n_bits - 1 - k) & 1 for k in range(n_samples * n_spins)]
        rows = [[2 * bit - 1 for bit in bits[k * n_spins : (k + 1) * n_spins]] for k in range(n_samples)]
        assert rows == ExactSampler().sample(request).spins.tolist()
        assert n_bits - n_samples * n_spins < 8
        assert entry["info"]["effective_beta"] == 0.1 + 0.2
        assert (entry["info"]["sampler"], entry["info"]["beta"]) == ("Talkative", request.beta)


def test_a_recording_grows_answer_by_answer(tmp_path):
    """What a run that dies leaves behind can be replayed."""
    recorder = Recorded(ExactSampler(), tmp_path / "recording")
    assert Replayed(tmp_path / "recording")._calls == []
    for k, request in enumerate(requests_of(), start=1):
        recorder.sample(request)
        assert len(entries(tmp_path / "recording")) == k


def test_nothing_is_pickled(recording, monkeypatch):
    """Neither in the file nor on the way in: a recording from elsewhere can run nothing."""

    def refuse(*args, **kwargs):
        msg = "a pickle was read"
        raise AssertionError(msg)

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (np, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert Replayed(recording).sample(requests_of()[0]).n_samples == 9
    source = inspect.getsource(_recordings)
    assert not any(word in source for word in ("pickle", "torch.load", "np.load", "eval(", "exec("))
    assert b"\x80\x04" not in recording.read_bytes()


def test_facts_that_are_not_finite_are_json_all_the_same(tmp_path):
    class Odd(ExactSampler):
        def _sample(self, request, seed):
            return replace(super()._sample(request, seed), info={"chain_breaks": float("nan")})

    def refuse(word):
        msg = f"{word} is not JSON"
        raise ValueError(msg)

    Recorded(Odd(), tmp_path / "recording").sample(requests_of()[0])
    for line in (tmp_path / "recording").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_facts_of_a_budget_are_kept(tmp_path):
    Recorded(Budgeted(ExactSampler(), n_calls=5), tmp_path / "recording").sample(requests_of()[0])
    assert entries(tmp_path / "recording")[0]["info"]["spent"]["n_calls"] == 1


# Damage ------------------------------------------------------------------------------------------------------------


@over(
    ("change", "match"),
    [
        pytest.param(lambda line: line[: len(line) // 2], r"Line 2 .*damaged", id="half-a-line"),
        pytest.param(lambda line: "", r"Line 2 .*damaged", id="empty-line"),
        pytest.param(lambda line: "[1, 2]", r"Line 2 .*not a record", id="not-a-record"),
        pytest.param(lambda line: "{}", r"Line 2 .*checksum", id="empty-record"),
        pytest.param(lambda line: line.replace("sha256", "sha512"), "Line 2 .* checksum", id="no-checksum"),
        pytest.param(lambda line: line.replace('"seed": 0', '"seed": 1'), "Line 2 .* checksum", id="changed-fact"),
        pytest.param(lambda line: line.replace('"shape": [9, 8]', '"shape": [8, 9]'), "checksum", id="changed-shape"),
    ],
)
def test_a_damaged_line_is_named(recording, change, match):
    with pytest.raises(InvalidSamples, match=match):
        Replayed(rewrite(recording, change))


def test_a_wrong_checksum_is_found_in_any_line(recording):
    for number in (2, 5):
        copy = recording.with_name(f"copy-{number}")
        copy.write_text(recording.read_text())
        digest = calls(copy)[number - 2]["sha256"]
        with pytest.raises(InvalidSamples, match=f"Line {number} .*checksum"):
            Replayed(rewrite(copy, lambda line, digest=digest: line.replace(digest, "0" * 64), number))


def test_a_last_line_that_was_cut_off_is_found(recording):
    """At any byte within the line; cut off right behind it, the recording is a shorter recording."""
    whole = recording.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for stop in (last + 1, last + 40, len(whole) - 5, len(whole) - 2):
        recording.write_bytes(whole[:stop])
        with pytest.raises(InvalidSamples, match="Line 5 .*damaged"):
            Replayed(recording)
    recording.write_bytes(whole[:last])
    assert len(Replayed(recording)._calls) == 3


def test_no_single_changed_character_goes_unnoticed(recording):
    """Three hundred characters of the first answer, each replaced by another one; or else the content is the same."""
    lines = recording.read_text().splitlines()
    rng = np.random.default_rng(6)
    due = json.loads(lines[1])
    for _ in range(300):
        k = int(rng.integers(len(lines[1])))
        other = chr(rng.integers(33, 127))
        changed = lines[1][:k] + other + lines[1][k + 1 :]
        recording.write_text("\n".join([lines[0], changed, *lines[2:]]) + "\n")
        try:
            player = Replayed(recording)
        except InvalidSamples as error:
            assert "Line 2 of the recording" in str(error)
        else:
            assert {**player._calls[0], "sha256": due["sha256"]} == due


@over(
    "header",
    [
        pytest.param('{"format": "qbmscvi-recording", "version": 2}', id="later-version"),
        pytest.param('{"format": "qbmscvi-recording"}', id="no-version"),
        pytest.param('{"format": "other", "version": 1}', id="other-format"),
        pytest.param("{}", id="no-header"),
        pytest.param(
            '{"format": "qbmscvi-recording", "version": 1}',
            id="no-traits",
        ),
    ],
)
def test_files_of_other_versions_and_formats_are_refused(recording, header):
    with pytest.raises(InvalidSamples, match=r"version 1"):
        Replayed(rewrite(recording, lambda line: header, 1))


@pytest.mark.parametrize("content", ["", "cell,gene\n1,2\n", "[]\n", "null\n", '"recording"\n'], ids=repr)
def test_files_that_are_no_recordings_are_refused(tmp_path, content):
    (tmp_path / "recording").write_text(content)
    with pytest.raises(InvalidSamples, match="recording"):
        Replayed(tmp_path / "recording")


def test_binary_files_are_refused(tmp_path):
    (tmp_path / "recording").write_bytes(b"\x89HDF\r\n\x1a\n\x00\xff")
    with pytest.raises(InvalidSamples, match="not a recording"):
        Replayed(tmp_path / "recording")


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Replayed(tmp_path / "nowhere")


# Another run -------------------------------------------------------------------------------------------------------

OTHERS = {
    "h": lambda r: replace(r, problem=replace(r.problem, h=r.problem.h * (1 + 1e-15))),
    "J": lambda r: replace(r, problem=replace(r.problem, J=-r.problem.J)),
    "offset": lambda r: replace(r, problem=replace(r.problem, offset=0.0)),
    "precision": lambda r: replace(r, problem=r.problem.to(torch.float32)),
    "beta": lambda r: replace(r, beta=0.71),
    "n_samples": lambda r: replace(r, n_samples=12),
    "graph": lambda r: replace(r, problem=PROBLEM),
}


@over("change", [pytest.param(change, id=name) for name, change in OTHERS.items()])
def test_another_request_is_not_answered(recording, change):
    player = Replayed(recording)
    for request in requests_of()[:3]:
        player.sample(request)
    with pytest.raises(InvalidSamples, match=r"Call 4 .*another problem"):
        player.sample(change(requests_of()[3]))
    assert player.sample(requests_of()[3]).n_samples == 13  # the wrong request did not use the answer up


def test_seeds_and_chain_states_are_not_part_of_the_request(recording):
    request = requests_of()[0]
    other = replace(request, seed=99, initial_spins=torch.ones(9, 8), n_sweeps=4, purpose="refresh")
    assert torch.equal(Replayed(recording).sample(other).spins, Replayed(recording).sample(request).spins)


def test_a_recording_at_its_end_has_no_more_answers(recording):
    player = Replayed(recording)
    for request in requests_of():
        player.sample(request)
    with pytest.raises(SamplerUnavailable, match="4 calls"):
        player.sample(requests_of()[0])


def test_answers_come_in_the_order_of_the_recording(recording):
    with pytest.raises(InvalidSamples, match="Call 1"):
        Replayed(recording).sample(requests_of()[1])


# Writing -----------------------------------------------------------------------------------------------------------


def test_an_existing_file_is_not_written_over(recording):
    before = recording.read_bytes()
    with pytest.raises(FileExistsError, match="exists"):
        Recorded(ExactSampler(), recording)
    assert recording.read_bytes() == before


def test_a_folder_that_is_missing_is_found_at_once(tmp_path):
    with pytest.raises(FileNotFoundError):
        Recorded(ExactSampler(), tmp_path / "nowhere" / "recording")


def disk_full(monkeypatch, path):
    def fail(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", fail)


def path_gone(monkeypatch, path):
    path.unlink()
    path.parent.rmdir()


@pytest.mark.parametrize(
    ("accident", "match"), [(disk_full, "No space left on device"), (path_gone, "No such file")], ids=lambda v: None
)
def test_a_recording_that_cannot_be_written_costs_the_recording_and_not_the_run(tmp_path, monkeypatch, accident, match):
    path = tmp_path / "folder" / "recording"
    path.parent.mkdir()
    recorder = Recorded(ExactSampler(), path)
    assert recorder.sample(requests_of()[0]).info["is_recorded"]
    accident(monkeypatch, path)
    with pytest.warns(RuntimeWarning, match=rf"recording stopped.*{match}") as caught:
        batch = recorder.sample(requests_of()[1])
    assert len(caught) == 1
    assert batch.info["is_recorded"] is False
    assert torch.equal(batch.spins, ExactSampler().sample(requests_of()[1]).spins)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recorder.sample(requests_of()[2]).info["is_recorded"] is False


def test_what_was_written_before_the_disk_was_full_can_be_replayed(tmp_path, monkeypatch):
    recorder = Recorded(ExactSampler(), tmp_path / "recording")
    first = recorder.sample(requests_of()[0])
    with monkeypatch.context() as patch:
        disk_full(patch, None)
        with pytest.warns(RuntimeWarning, match="stopped"):
            recorder.sample(requests_of()[1])
    recorder.sample(requests_of()[2])  # space is back, but a recording with a gap would be worthless
    player = Replayed(tmp_path / "recording")
    assert torch.equal(player.sample(requests_of()[0]).spins, first.spins)
    with pytest.raises(SamplerUnavailable, match="ends after 1 calls"):
        player.sample(requests_of()[1])


# Training ----------------------------------------------------------------------------------------------------------


def trained(adata, sampler) -> QBMSCVI:
    scvi.settings.seed = 11
    model = QBMSCVI(adata, n_latent=8, n_chains=64, n_hidden=16, gene_likelihood="nb")
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "schedule": SamplingSchedule(every_n_steps=1)}
    model.train(max_epochs=2, batch_size=64, sampler=sampler, **settings)
    return model


class Entropic(BlockGibbsSampler):
    """As a device: no seed brings the same answer back."""

    def _sample(self, request, seed):
        return super()._sample(request, torch.Generator().seed() % 2**31)


def unequal_weights(first: QBMSCVI, second: QBMSCVI) -> list[str]:
    one, other = first.module.state_dict(), second.module.state_dict()
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


@pytest.mark.parametrize("child", [BlockGibbsSampler, Entropic])
def test_training_with_a_recording_gives_bit_equal_weights(child, tmp_path):
    adata = synthetic_counts(200, 40, seed=1)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    first = trained(adata, Recorded(child(), tmp_path / "recording"))
    second = trained(adata, Replayed(tmp_path / "recording"))
    assert unequal_weights(first, second) == []
    for key in ("train_loss", "prior_energy", "prior_log_z"):
        assert first.history[key].equals(second.history[key])
    assert float(second.history["sampling_fallbacks"].iloc[-1, 0]) == 0
    assert len(entries(tmp_path / "recording")) >= 4
    if child is Entropic:  # the seed alone would not do
        assert unequal_weights(first, trained(adata, child()))
