"""``python -m qbmscvi.samplers``: what there is, and one check from end to end."""

from __future__ import annotations

import pytest
from devices import Device, annealer_service
from sapi_server import TOKEN

from qbmscvi import samplers
from qbmscvi.samplers import SAMPLER_NAMES
from qbmscvi.samplers import __main__ as command


@pytest.fixture
def account(tmp_path, monkeypatch):
    monkeypatch.delenv("DWAVE_API_TOKEN", raising=False)
    monkeypatch.setenv("DWAVE_CONFIG_FILE", str(tmp_path / "dwave.conf"))
    return tmp_path / "dwave.conf"


def test_every_name_is_listed_with_what_it_needs(account, capsys):
    assert command.main([]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert tuple(lines) == SAMPLER_NAMES
    assert lines["gibbs"] == "ready"
    assert lines["dwave"].startswith("installed, but no account: run `dwave config create`")
    account.write_text(annealer_service().configuration())
    assert dict(command.describe())["dwave"] == "installed and configured"


def test_a_missing_package_is_said(account, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert dict(command.describe())["dwave"] == "not installed: pip install 'qbmscvi[dwave]'"


def test_a_check_ends_with_a_code(account, capsys, monkeypatch):
    assert command.main(["--check", "exact", "--samples", "500"]) == 0
    assert "ExactSampler" in capsys.readouterr().out
    assert command.main(["--check", "dwave"]) == 2  # no account
    assert command.main(["--check", "abacus"]) == 2
    assert "Unknown sampler 'abacus'" in capsys.readouterr().err
    monkeypatch.setitem(samplers._BY_NAME, "exact", Device)  # refuses what it is asked
    assert command.main(["--check", "exact"]) == 1
    assert "Device" in capsys.readouterr().err


def test_the_check_of_a_device_goes_through_its_service(account, capsys):
    service = annealer_service()
    account.write_text(service.configuration())
    n_jobs = len(service.jobs)
    assert command.main(["--check", "dwave", "--samples", "400"]) == 0
    jobs = list(service.jobs.values())[n_jobs:]
    seconds = 1e-6 * sum(job.solver.timing(job.params["num_reads"])["qpu_access_time"] for job in jobs)
    output = capsys.readouterr()
    assert "DWaveSampler[Loop_zephyr]" in output.out
    assert TOKEN not in output.out + output.err
    with capsys.disabled():
        print(f"\nthe check made {len(jobs)} jobs, {seconds:.1f} s of access time")
    assert 0 < seconds < 5
