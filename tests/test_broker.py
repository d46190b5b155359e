"""The broker between a training run and a sampler: one trip per interval, answers in order and at fixed steps."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import scvi
import torch
from faulty import Pace
from lightning.pytorch.callbacks import Callback

from qbmscvi import QBMSCVI, SamplingSchedule
from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.ising import IsingModel, disjoint_union
from qbmscvi.datasets import synthetic_counts
from qbmscvi.exceptions import SamplerError, SamplerTimeout
from qbmscvi.samplers import (
    BlockGibbsSampler,
    Broker,
    Draw,
    ExactSampler,
    Recorded,
    Replayed,
    Retrying,
    SamplerTraits,
    SamplingRequest,
    SpinReversed,
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
    parts = [problem(2, 3, 0), IsingModel(torch.ones(3), torch.zeros(0), graphs.independent(3), 0.5)]
    union = disjoint_union(parts)
    spins = torch.where(torch.rand(50, 8, generator=torch.Generator().manual_seed(0)) < 0.5, 1.0, -1.0)
    expected = parts[0].energy(spins[:, :5]) + parts[1].energy(spins[:, 5:])
    torch.testing.assert_close(union.energy(spins), expected)
    for nodes in union.graph.color_classes:
        assert not np.isin(union.graph.edges, nodes).all(axis=1).any()


def dispatched(sampler, step=10, latency=3, max_staleness=20, n_samples=4) -> Broker:
    broker = Broker(sampler, latency, max_staleness)
    broker.submit(SamplingRequest(problem(2, 3, 0), n_samples, seed=7, request_id="job-1"))
    broker.dispatch(step)
    return broker


def wait_for(broker: Broker) -> None:
    """Until the sampler has answered, in its thread; the future is not part of the public face."""
    broker._trip.future.exception(timeout=10.0)


def test_remote_answers_are_used_at_a_fixed_age_and_never_waited_for():
    broker = dispatched(Counting(is_remote=True))
    wait_for(broker)
    assert [broker.collect(step) for step in (10, 11, 12)] == [None, None, None]
    with pytest.raises(RuntimeError, match="under way"):
        broker.dispatch(11)
    (batch,) = broker.collect(13)
    assert batch.info["staleness"] == 3
    assert not broker.is_busy
    assert broker.collect(14) is None


@pytest.mark.parametrize(("answers_at", "used_at"), [(12, 13), (13, 13), (14, 16), (16, 16), (17, 19), (27, 28)])
def test_late_answers_are_used_at_the_next_multiple_of_the_latency(answers_at, used_at):
    gate = threading.Event()
    broker = dispatched(Counting(gate=gate, is_remote=True))
    for step in range(11, 31):
        if step == answers_at:
            gate.set()
            wait_for(broker)
        batches = broker.collect(step)
        if batches is not None:
            break
    assert step == used_at
    assert batches[0].info["staleness"] == used_at - 10
    assert broker.ledger.n_late == int(answers_at > 13)


def test_a_job_that_does_not_end_fails_once_and_is_dropped_when_it_does():
    gate = threading.Event()
    sampler = Counting(gate=gate, is_remote=True)
    broker = dispatched(sampler)
    for step in range(11, 31):
        assert broker.collect(step) is None
    with pytest.raises(SamplerTimeout, match="max_staleness=20"):
        broker.collect(31)
    assert [broker.collect(step) for step in (32, 33, 50)] == [None] * 3
    assert broker.is_busy
    gate.set()
    wait_for(broker)
    assert [broker.collect(step) for step in (51, 52, 53, 54, 55)] == [None] * 5
    assert not broker.is_busy
    assert (broker.ledger.n_failures, broker.ledger.n_samples, broker.ledger.n_trips) == (1, 0, 1)


def test_an_answer_that_is_too_old_is_refused():
    """Training may have been elsewhere when it came, as after a restart."""
    broker = dispatched(Counting(is_remote=True))
    wait_for(broker)
    with pytest.raises(SamplerTimeout, match="is 21 steps old"):
        broker.collect(31)
    assert not broker.is_busy


def test_without_latency_the_answer_is_waited_for():
    broker = dispatched(Counting(is_remote=True), latency=0)
    assert broker.collect(10)[0].n_samples == 4
    assert broker.ledger.wait_seconds > 0


def test_a_failure_reaches_the_collector_and_the_next_trip_works():
    sampler = Counting(fails=lambda call: call == 1, is_remote=True)
    broker = dispatched(sampler)
    wait_for(broker)
    with pytest.raises(SamplerError, match="the line is down"):
        broker.collect(13)
    broker.submit(SamplingRequest(problem(2, 3, 0), 5, seed=1))
    broker.dispatch(13)
    wait_for(broker)
    assert broker.collect(16)[0].n_samples == 5
    assert (broker.ledger.n_failures, broker.ledger.n_trips, broker.ledger.n_samples) == (1, 2, 5)


def test_a_trip_under_way_is_asked_for_again_exactly_once_after_a_restart():
    gate = threading.Event()
    killed = dispatched(Counting(gate=gate, is_remote=True))
    file = io.BytesIO()
    torch.save(killed.state_dict(), file)  # plain tensors and numbers: loads without trusting the file
    gate.set()
    killed.close()

    file.seek(0)
    sampler = Counting(is_remote=True)
    broker = Broker(sampler, latency=3)
    broker.load_state_dict(torch.load(file, weights_only=True))
    wait_for(broker)
    (batch,) = broker.collect(13)
    assert [[request.request_id for request in call] for call in sampler.calls] == [["job-1"]]
    direct = ExactSampler().sample(SamplingRequest(problem(2, 3, 0), 4, seed=7))
    assert torch.equal(batch.spins, direct.spins)
    assert batch.info["staleness"] == 3


class Cancellable(Counting):
    n_cancelled = 0

    def cancel(self):
        self.n_cancelled += 1


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: Retrying(SpinReversed(s, 1))], ids=["bare", "wrapped"])
def test_closing_cancels_what_is_under_way_and_nothing_else(wrap):
    gate = threading.Event()
    sampler = Cancellable(gate=gate, is_remote=True)
    broker = dispatched(wrap(sampler))
    broker.close()
    broker.close()
    assert (sampler.n_cancelled, broker.is_busy) == (1, False)
    gate.set()
    answered = dispatched(wrap(sampler))
    wait_for(answered)
    answered.close()
    assert sampler.n_cancelled == 1


@pytest.mark.slow
def test_a_job_that_never_ends_does_not_hold_up_the_end_of_the_program():
    script = """
import time, torch
from qbmscvi import graphs
from qbmscvi.boltzmann.ising import IsingModel
from qbmscvi.samplers import Broker, Sampler, SamplerTraits, SamplingRequest

class Hanging(Sampler):
    traits = SamplerTraits(is_remote=True)
    def _sample(self, request, seed):
        time.sleep(1000)

broker = Broker(Hanging(), latency=3)
broker.submit(SamplingRequest(IsingModel(torch.zeros(2), torch.zeros(0), graphs.independent(2)), 2))
broker.dispatch(0)
print("under way:", broker.is_busy)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "under way: True\n"


def test_answers_sorted_by_energy_are_dealt_out_at_random():
    """Two requests of one problem share an answer: neither may get the low half of the energies."""

    class Sorted(Counting):
        def _sample_batch(self, requests, seeds):
            draws = super()._sample_batch(requests, seeds)
            order = [r.problem.energy(d.spins).argsort() for r, d in zip(requests, draws, strict=True)]
            return [Draw(draw.spins[rows]) for draw, rows in zip(draws, order, strict=True)]

    requests = [SamplingRequest(problem(3, 3, 1), 2000, seed=seed) for seed in (1, 2)]
    first, second = ask(Broker(Sorted()), requests)
    pooled = torch.cat([first.energies, second.energies])
    # Standard error of a difference of two means of 2,000: 0.032 standard deviations; sorted halves differ by 1.6.
    assert abs(first.energies.mean() - second.energies.mean()) < 4 * 0.032 * pooled.std()
    assert len(first.energies.unique()) > 20


@pytest.mark.parametrize(("latency", "match"), [(-1, "latency=-1"), (30, "max_staleness=20")])
def test_latencies_without_meaning_are_refused(latency, match):
    with pytest.raises(ValueError, match=match):
        Broker(ExactSampler(), latency, max_staleness=20)


# ---------------------------------------------------------------------------------------------------------------------
# In training
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adata():
    adata = synthetic_counts(n_cells=300, n_genes=80)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    return adata


def train(adata, sampler, schedule=SamplingSchedule(every_n_steps=1, latency=3), callbacks=()):
    scvi.settings.seed = 0
    model = QBMSCVI(adata, n_latent=8, n_chains=64, gene_likelihood="nb")
    quiet = {"enable_progress_bar": False, "callbacks": list(callbacks), "fit_prior": False}
    model.train(max_epochs=4, batch_size=64, sampler=sampler, schedule=schedule, **quiet)
    return model


def test_one_request_a_step_serves_moments_and_log_z(adata):
    sampler = Counting()
    model = train(adata, sampler)
    ledger = model.trainer.lightning_module.sampling.broker.ledger
    n_steps = int(model.module.prior.n_updates)
    assert ledger.n_requests == ledger.n_trips == len(sampler.calls) == n_steps == 20
    assert [request.n_samples for call in sampler.calls for request in call] == [64] * n_steps


def test_answers_sorted_by_energy_do_not_reach_log_z_as_the_highest(adata):
    """The last eight of 64 rows track log Z; sorted, they would be the highest at every step."""

    class Sorted(Counting):
        def _sample_batch(self, requests, seeds):
            (draw,) = super()._sample_batch(requests, seeds)
            return [Draw(draw.spins[requests[0].problem.energy(draw.spins).argsort()])]

    class Ranks(Callback):
        ranks = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            sampling = pl_module.sampling
            order = sampling.prior.to_ising().energy(sampling.prior.chains).argsort().argsort()
            self.ranks.append(float(order[-8:].float().mean()))

    watch = Ranks()
    train(adata, Sorted(), callbacks=[watch])
    # Mean rank 31.5 of 0 to 63 by chance, with a standard error of 1.4 over 20 steps; 59.5 if sorted.
    assert abs(np.mean(watch.ranks) - 31.5) < 5 * 1.4


def test_remote_sampler_trains_at_a_fixed_staleness(adata):
    sampler = Counting(is_remote=True)
    model = train(adata, sampler, schedule=SamplingSchedule(every_n_steps=1, latency=0))
    assert set(model.history["sampling_staleness"]["sampling_staleness"]) == {1.0}
    assert len(sampler.calls) == int(model.module.prior.n_updates) == 20
    assert not model.trainer.lightning_module.sampling.broker.is_busy


def test_slow_remote_sampler_does_not_slow_training(adata):
    """Five seconds an answer, against some hundredths of a second a step: training ends before the first answer."""
    gate = threading.Event()
    started = time.perf_counter()
    sampler = Counting(gate=gate, is_remote=True)
    with pytest.warns(RuntimeWarning, match="20 steps") as caught:
        model = train(adata, sampler)
    assert len([w for w in caught if issubclass(w.category, RuntimeWarning)]) == 1
    ledger = model.trainer.lightning_module.sampling.broker.ledger
    assert time.perf_counter() - started < 10.0  # the gate closes by itself after 10 s
    gate.set()
    assert (ledger.n_trips, ledger.n_samples, ledger.n_late) == (1, 0, 1)
    assert ledger.wait_seconds == 0.0
    assert model.history["sampling_fallbacks"].iloc[-1, 0] == 0


def test_job_that_never_ends_costs_one_warning(adata):
    sampler = Counting(gate=threading.Event(), is_remote=True)
    with pytest.warns(RuntimeWarning, match="max_staleness=6") as caught:
        model = train(adata, sampler, schedule=SamplingSchedule(every_n_steps=1, latency=3, max_staleness=6))
    assert len([w for w in caught if "max_staleness" in str(w.message)]) == 1
    assert model.history["sampling_fallbacks"].iloc[-1, 0] == 1
    assert len(sampler.calls) == 1
    sampler.gate.set()


def test_failing_remote_costs_one_warning_and_no_step(adata):
    with pytest.warns(RuntimeWarning, match="the line is down") as caught:
        model = train(adata, Counting(is_remote=True, fails=lambda call: call % 2 == 0))
    assert len([w for w in caught if "the line is down" in str(w.message)]) == 1
    assert model.history["sampling_fallbacks"].iloc[-1, 0] >= 2
    assert model.is_trained


def test_recorded_training_replays_bit_for_bit_without_the_device(adata, tmp_path):
    """Answers that come in time, of which every third is a failure."""
    sampler, callbacks = Counting(is_remote=True, fails=lambda call: call % 3 == 0), [Pace()]
    with pytest.warns(RuntimeWarning, match="the line is down"):
        recorded = train(adata, Recorded(sampler, tmp_path / "recording.jsonl"), callbacks=callbacks)
    replayed = Replayed(tmp_path / "recording.jsonl")
    assert replayed.traits.is_remote
    with pytest.warns(RuntimeWarning, match="the line is down"):
        again = train(adata, replayed)
    weights = again.module.state_dict()
    differing = [name for name, value in recorded.module.state_dict().items() if not torch.equal(value, weights[name])]
    assert differing == []
    first, second = (model.trainer.lightning_module.sampling for model in (recorded, again))
    assert first.n_fallbacks == second.n_fallbacks >= 1
    for key in ("n_trips", "n_samples", "n_failures"):
        assert getattr(first.broker.ledger, key) == getattr(second.broker.ledger, key)
