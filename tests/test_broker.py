"""The broker between a training run and a sampler: one trip per interval, answers in order and at fixed steps."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
import scvi
import torch

from qbmscvi import QBMSCVI, SamplingSchedule, graphs
from qbmscvi.datasets import synthetic_counts
from qbmscvi.exceptions import SamplerError
from qbmscvi.ising import IsingModel, disjoint_union
from qbmscvi.samplers import (
    BlockGibbsSampler,
    Broker,
    ExactSampler,
    Recorded,
    Replayed,
    SamplerTraits,
    SamplingRequest,
)


class Counting(ExactSampler):
    """Exact sampler that remembers what it was asked, and can be told to fail or wait."""

    def __init__(self, *, fails=lambda call: False, gate: threading.Event | None = None, **traits):
        self.traits = SamplerTraits(is_exact=True, **traits)
        self.calls: list[list[SamplingRequest]] = []
        self.fails, self.gate = fails, gate

    def _sample_batch(self, requests, seeds):
        self.calls.append(requests)
        if self.gate is not None:
            self.gate.wait(10.0)
        if self.fails(len(self.calls)):
            raise OSError("the line is down")
        return super()._sample_batch(requests, seeds)


def problem(n_left: int, n_right: int, seed: int) -> IsingModel:
    generator = torch.Generator().manual_seed(seed)
    graph = graphs.bipartite(n_left, n_right)
    h = torch.randn(graph.n_nodes, generator=generator)
    return IsingModel(h, 0.5 * torch.randn(graph.n_edges, generator=generator), graph, offset=float(seed))


def ask(broker: Broker, requests: list[SamplingRequest], step: int = 0):
    for request in requests:
        broker.submit(request)
    broker.dispatch(step)
    return broker.collect(step)


def test_requests_of_one_problem_make_one_call_and_come_back_in_order():
    sampler, shared = Counting(), problem(2, 3, 0)
    twin = IsingModel(shared.h.clone(), shared.J.clone(), shared.graph, shared.offset)
    broker = Broker(sampler)
    requests = [
        SamplingRequest(shared, 5, seed=1),
        SamplingRequest(problem(3, 3, 1), 4, seed=2),
        SamplingRequest(twin, 7, seed=3),
        SamplingRequest(shared, 2, beta=0.5, seed=4),
    ]
    batches = ask(broker, requests)
    assert [len(call) for call in sampler.calls] == [3]
    assert [request.n_samples for request in sampler.calls[0]] == [12, 4, 2]
    assert [batch.spins.shape for batch in batches] == [(5, 5), (4, 6), (7, 5), (2, 5)]
    for request, batch in zip(requests, batches, strict=True):
        torch.testing.assert_close(batch.energies, request.problem.energy(batch.spins))
    assert (broker.ledger.n_requests, broker.ledger.n_trips, broker.ledger.n_samples) == (4, 1, 18)


def test_merged_chains_go_on_from_their_own_states():
    sampler, shared = BlockGibbsSampler(), problem(2, 3, 0).scaled(1e-9)
    frozen = IsingModel(torch.tensor([50.0, -50.0, 50.0, -50.0, 50.0]), shared.J, shared.graph)
    ground = torch.tensor([[-1, 1, -1, 1, -1]]).repeat(3, 1)
    batches = ask(
        Broker(sampler),
        [SamplingRequest(frozen, 3, initial_spins=ground, seed=0), SamplingRequest(frozen, 3, initial_spins=ground)],
    )
    assert all(torch.equal(batch.spins.long(), ground) for batch in batches)


def test_small_problems_are_packed_into_one_where_the_sampler_says_so():
    sampler = Counting(packs_problems=True)
    problems = [problem(2, 3, 0), problem(1, 2, 1), problem(3, 2, 2)]
    batches = ask(Broker(sampler), [SamplingRequest(p, 20_000, beta=0.7, seed=5) for p in problems])
    assert [len(call) for call in sampler.calls] == [1]
    assert sampler.calls[0][0].problem.n_spins == 13
    for p, batch in zip(problems, batches, strict=True):
        direct = ExactSampler().sample(SamplingRequest(p, 20_000, beta=0.7, seed=6))
        # Means of 20,000 draws: 5 standard errors of a difference, at most 0.05.
        assert (batch.spins.float().mean(0) - direct.spins.float().mean(0)).abs().max() < 0.05
        torch.testing.assert_close(batch.energies, p.energy(batch.spins))
        assert batch.info["n_packed"] == 3


def test_union_has_the_energies_of_its_parts_and_their_colors():
    parts = [problem(2, 3, 0), IsingModel(torch.ones(3), torch.zeros(0), graphs.independent(3), 0.5, torch.ones(2, 3))]
    union = disjoint_union(parts)
    spins = torch.where(torch.rand(50, 8, generator=torch.Generator().manual_seed(0)) < 0.5, 1.0, -1.0)
    expected = parts[0].energy(spins[:, :5]) + parts[1].energy(spins[:, 5:])
    torch.testing.assert_close(union.energy(spins), expected)
    for nodes in union.graph.color_classes:
        assert not np.isin(union.graph.edges, nodes).all(axis=1).any()


def test_remote_answers_are_collected_at_the_step_they_are_due():
    gate = threading.Event()
    broker = Broker(Counting(gate=gate, is_remote=True), latency=3)
    broker.submit(SamplingRequest(problem(2, 3, 0), 4, seed=1))
    broker.dispatch(10)
    assert broker.is_busy
    assert [broker.is_due(step) for step in (10, 12, 13, 14)] == [False, False, True, True]
    with pytest.raises(RuntimeError, match="A trip is under way"):
        broker.dispatch(11)
    gate.set()
    (batch,) = broker.collect(13)
    assert batch.info["staleness"] == 3
    with pytest.raises(RuntimeError, match="No trip is under way"):
        broker.collect(14)
    broker.close()


def test_a_failure_reaches_the_collector_and_the_next_trip_works():
    broker = Broker(Counting(fails=lambda call: call == 1, is_remote=True), latency=1)
    for step, is_good in ((0, False), (1, True)):
        broker.submit(SamplingRequest(problem(2, 3, 0), 4, seed=1))
        broker.dispatch(step)
        if is_good:
            assert broker.collect(step + 1)[0].n_samples == 4
        else:
            with pytest.raises(SamplerError, match="the line is down"):
                broker.collect(step + 1)
    assert broker.ledger.n_failures == 1
    broker.close()


def test_a_trip_under_way_is_asked_for_again_exactly_once_after_a_restart():
    gate = threading.Event()
    killed = Broker(Counting(gate=gate, is_remote=True), latency=5)
    killed.submit(SamplingRequest(problem(2, 3, 0), 4, seed=7, request_id="job-1"))
    killed.dispatch(100)
    file = io.BytesIO()
    torch.save(killed.state_dict(), file)  # plain tensors and numbers: loads without trusting the file
    gate.set()
    killed.close()

    file.seek(0)
    sampler = Counting(is_remote=True)
    broker = Broker(sampler, latency=5)
    broker.load_state_dict(torch.load(file, weights_only=True))
    assert broker.is_due(105)
    (batch,) = broker.collect(105)
    assert [[request.request_id for request in call] for call in sampler.calls] == [["job-1"]]
    direct = ExactSampler().sample(SamplingRequest(problem(2, 3, 0), 4, seed=7))
    assert torch.equal(batch.spins, direct.spins)
    assert batch.info["staleness"] == 5
    broker.close()


def test_negative_latency_is_refused():
    with pytest.raises(ValueError, match="latency=-1 steps must not be negative"):
        Broker(ExactSampler(), latency=-1)


# ---------------------------------------------------------------------------------------------------------------------
# In training
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adata():
    adata = synthetic_counts(n_cells=300, n_genes=80)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    return adata


def train(adata, sampler, **kwargs):
    scvi.settings.seed = 0
    model = QBMSCVI(adata, n_spins=8, n_chains=64, gene_likelihood="nb")
    schedule = SamplingSchedule(latency=3)
    model.train(max_epochs=4, batch_size=64, sampler=sampler, schedule=schedule, enable_progress_bar=False, **kwargs)
    return model


def test_moments_and_log_z_questions_share_a_trip(adata):
    sampler = Counting()
    model = train(adata, sampler)
    ledger = model.trainer.lightning_module.sampling.broker.ledger
    assert ledger.n_requests == 2 * ledger.n_trips == 2 * len(sampler.calls)
    assert all(len(call) == 1 for call in sampler.calls)


def test_remote_sampler_trains_at_a_fixed_staleness(adata):
    sampler = Counting(is_remote=True)
    model = train(adata, sampler)
    assert set(model.history["sampling_staleness"]["sampling_staleness"]) == {3.0}
    n_steps = int(model.module.prior.n_updates)
    assert len(sampler.calls) == -(-n_steps // 3)
    assert not model.trainer.lightning_module.sampling.broker.is_busy


def test_failing_remote_costs_one_warning_and_no_step(adata):
    with pytest.warns(RuntimeWarning, match="the line is down") as caught:
        model = train(adata, Counting(is_remote=True, fails=lambda call: call % 2 == 0))
    assert len([w for w in caught if "the line is down" in str(w.message)]) == 1
    assert model.history["sampling_fallbacks"].iloc[-1, 0] >= 2
    assert model.is_trained


def test_recorded_training_replays_bit_for_bit_without_the_device(adata, tmp_path):
    recorded = train(adata, Recorded(Counting(is_remote=True), tmp_path / "tape.jsonl"))
    replayed = Replayed(tmp_path / "tape.jsonl")
    assert replayed.traits.is_remote
    weights = train(adata, replayed).module.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in recorded.module.state_dict().items())
