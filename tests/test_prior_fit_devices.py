"""The prior fitted with samples of stand-ins of D-Wave's service and of the Kaiwu SDK: requests, faults, replay."""

from __future__ import annotations

import copy

import pytest
import scvi
import torch
from devices import annealer_service, connected
from kaiwu_platform import Platform, make_interpreter

from qbmscvi import QBMSCVI, SamplingSchedule
from qbmscvi.boltzmann import graphs
from qbmscvi.datasets import synthetic_counts
from qbmscvi.samplers import DWaveSampler, Recorded, Replayed, build_dwave_sampler, build_kaiwu_sampler
from qbmscvi.samplers.kaiwu import _sampler as _kaiwu

N_STEPS = 300


@pytest.fixture(scope="module")
def model() -> QBMSCVI:
    """Its prior has learned nothing, and is a patch of the annealer's graph, so that it needs no embedding."""
    graph = graphs.patch(connected(DWaveSampler).working_graph, 8)
    scvi.settings.seed = 0
    adata = synthetic_counts(400, 60, seed=1)
    QBMSCVI.setup_anndata(adata)
    model = QBMSCVI(adata, n_latent=8, n_hidden=16, prior_graph=graph, n_chains=128)
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "plan_kwargs": {"lr": 0.02}}
    model.train(max_epochs=40, batch_size=64, **settings, fit_prior=False)
    with torch.no_grad():
        for parameter in model.module.prior.parameters():
            parameter.zero_()
    return model


@pytest.fixture
def fit(model):
    """Fit the prior as often as one likes, from the same start, and put it back at the end."""
    before = copy.deepcopy(model.module.prior.state_dict())

    def run(sampler, **arguments):
        model.module.prior.load_state_dict(before)
        found = model.fit_prior(sampler=sampler, n_steps=N_STEPS, seed=0, progress=False, **arguments)
        return found, copy.deepcopy(model.module.prior.state_dict())

    yield run
    model.module.prior.load_state_dict(before)


def test_a_hundred_requests_to_dwaves_client_do_what_block_gibbs_does(fit):
    service = annealer_service()
    n_before = len(service.jobs)
    found, _ = fit(connected(build_dwave_sampler, device_beta=12.0, n_gauges=2))  # in truth at 5
    assert found.n_requests == 100
    assert found.n_samples in (99 * 128, 100 * 128)  # all are used, but for a last one after the last step
    assert found.n_failures == 0
    assert len(service.jobs) - n_before == 200  # two gauges each
    local, _ = fit("gibbs")
    assert found.kl < found.kl_before - 0.2
    assert found.kl == pytest.approx(local.kl, abs=0.1)


@pytest.mark.filterwarnings("error::UserWarning")
def test_faults_of_dwaves_service_cost_a_warning_and_a_recording_plays_them_back(fit, tmp_path):
    service = annealer_service()
    schedule = SamplingSchedule(every_n_steps=30, latency=0)
    service.plan("run", "short", n_times=3)
    with pytest.warns(RuntimeWarning, match="reads") as caught:
        found, recorded = fit(
            Recorded(connected(DWaveSampler, device_beta=5.0), tmp_path / "recording"), schedule=schedule
        )
    service.calm()
    assert len(caught) == 1
    assert (found.n_requests, found.n_failures) == (10, 3)
    n_before = len(service.jobs)
    with pytest.warns(RuntimeWarning, match="reads"):
        again, replayed = fit(Replayed(tmp_path / "recording"), schedule=schedule)
    assert len(service.jobs) == n_before
    assert again.history.equals(found.history)
    assert all(torch.equal(value, replayed[name]) for name, value in recorded.items())


def test_a_few_requests_to_the_kaiwu_sdk_do_what_block_gibbs_does(fit, tmp_path, monkeypatch):
    platform = Platform(tmp_path / "platform")
    for name, value in platform.environment(make_interpreter(tmp_path / "interpreter")).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_kaiwu, "_INTERVAL", 0.05)
    schedule = SamplingSchedule(every_n_steps=25, latency=0)
    platform.plan("short", "narrow")
    device = build_kaiwu_sampler(device_beta=6.0, timeout=60.0)  # in truth at 2
    with pytest.warns(RuntimeWarning, match="states|spins") as caught:
        found, recorded = fit(Recorded(device, tmp_path / "recording"), schedule=schedule)
    device.cancel()
    assert len(caught) == 1
    assert (found.n_requests, found.n_failures) == (
        12,
        1,
    )  # the first answer was bad, and so was the one to the same request again
    assert len(platform.calls()) == 13
    local, _ = fit("gibbs")
    assert found.kl < found.kl_before - 0.2
    assert found.kl == pytest.approx(local.kl, abs=0.1)
    with pytest.warns(RuntimeWarning, match="states|spins"):
        _, replayed = fit(Replayed(tmp_path / "recording"), schedule=schedule)
    assert len(platform.calls()) == 13
    assert all(torch.equal(value, replayed[name]) for name, value in recorded.items())
