"""Samplers of others, and state that outlives a run."""

from __future__ import annotations

import dimod
import networkx as nx
import numpy as np
import pytest
import scvi
import torch
from devices import OffTemperature
from dwave import samplers as dwave_samplers
from lightning.pytorch.callbacks import ModelCheckpoint
from oracles import Distribution, assert_follows, random_problem
from scvi.train import SaveCheckpoint
from tables import corners, over
from without_float64 import DEVICE, WithoutFloat64

from qbmscvi import QBMSCVI, SamplingSchedule
from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.enumeration import draw_exact, exact_moments
from qbmscvi.boltzmann.ising import IsingModel
from qbmscvi.datasets import synthetic_counts
from qbmscvi.diagnostics import estimate_log_z
from qbmscvi.exceptions import BudgetExceeded, GraphMismatchError, InvalidSamples
from qbmscvi.samplers import (
    BlockGibbsSampler,
    Budgeted,
    Calibrated,
    CoherentIsingSampler,
    DimodSampler,
    Draw,
    ExactSampler,
    ParallelTemperingSampler,
    PathIntegralAnnealingSampler,
    Polished,
    Recorded,
    Replayed,
    Rescaled,
    Sampler,
    SamplerTraits,
    SamplingRequest,
    SimulatedAnnealingSampler,
    SpinReversed,
    TreeDecompositionSampler,
    Vetted,
    build_sampler,
)
from qbmscvi.samplers._temperature import fits_beta
from qbmscvi.samplers.testing import SamplerCheckError, check_sampler
from qbmscvi.samplers.wrappers._recordings import problem_fingerprint


@pytest.fixture(scope="module")
def adata():
    counts = synthetic_counts(n_cells=200, n_genes=60)
    QBMSCVI.setup_anndata(counts, batch_key="batch")
    return counts


def untrained(adata, **settings) -> QBMSCVI:
    scvi.settings.seed = 0
    return QBMSCVI(adata, **{"n_latent": 10, "n_hidden_spins": 0, "n_chains": 256} | settings)


def train(model, sampler, **settings) -> QBMSCVI:
    arguments = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False}
    model.train(sampler=sampler, **arguments | settings)
    return model


def coupled(adata, **settings) -> QBMSCVI:
    """An untrained model whose prior has energies that depend on the temperature."""
    model, rng = untrained(adata, **settings), np.random.default_rng(4)
    for parameter in (model.module.prior.h, model.module.prior.J):
        parameter.data.copy_(parameter.new_tensor(0.5 * rng.normal(size=parameter.shape)))
    model.is_trained_ = True
    return model


# Samplers of dimod -------------------------------------------------------------------------------------------------


class Foreign(dimod.Sampler):
    """Exact draws at unit temperature, as somebody else would hand them out."""

    properties: dict = {}
    parameters = {"num_reads": [], "seed": []}

    def sample(self, bqm, num_reads=1, seed=None):
        problem = IsingModel.from_bqm(bqm, dtype=torch.float64)
        spins = draw_exact(problem, num_reads, 1.0, torch.Generator().manual_seed(seed or 0)).to(torch.int8).numpy()
        return self.answer(spins, list(bqm.variables), bqm)

    def answer(self, spins, variables, bqm):
        return dimod.SampleSet.from_samples_bqm((spins, variables), bqm)


class Bits(Foreign):
    def answer(self, spins, variables, bqm):
        return super().answer(spins, variables, bqm).change_vartype("BINARY", inplace=False)


class UnsignedBits(Foreign):
    dtype = np.uint8

    def answer(self, spins, variables, bqm):
        bits = ((spins + 1) // 2).astype(self.dtype)
        return dimod.SampleSet.from_samples((bits, variables), "BINARY", energy=0, sort_labels=False)


class Booleans(UnsignedBits):
    dtype = bool


class Shuffled(Foreign):
    def answer(self, spins, variables, bqm):
        order = np.random.default_rng(0).permutation(len(variables))
        names = [variables[k] for k in order]
        return dimod.SampleSet.from_samples((spins[:, order], names), "SPIN", energy=0, sort_labels=False)


class Textual(Foreign):
    """Labels went through JSON; in the order of text, 10 stands before 2."""

    def answer(self, spins, variables, bqm):
        order = sorted(range(len(variables)), key=lambda k: str(variables[k]))
        names = [str(variables[k]) for k in order]
        return dimod.SampleSet.from_samples((spins[:, order], names), "SPIN", energy=0, sort_labels=False)


class WithAncillas(Foreign):
    def answer(self, spins, variables, bqm):
        extra = np.ones((len(spins), 2), dtype=np.int8)
        labels = ["slack", *variables, 10_000]
        return dimod.SampleSet.from_samples((np.hstack([extra[:, :1], spins, extra[:, 1:]]), labels), "SPIN", energy=0)


class Aggregated(Foreign):
    def answer(self, spins, variables, bqm):
        return super().answer(spins, variables, bqm).aggregate()


class FloatCounts(Foreign):
    """No energies, and numbers of occurrences that are no integers."""

    def answer(self, spins, variables, bqm):
        rows, counts = np.unique(spins, axis=0, return_counts=True)
        fields = [("sample", np.int8, (len(variables),)), ("energy", float), ("num_occurrences", float)]
        record = np.rec.array([*zip(rows, [np.nan] * len(rows), counts, strict=True)], dtype=fields)
        return dimod.SampleSet(record, variables, {}, "SPIN")


class Sorted(Foreign):
    """More rows than asked for, by energy: the first of them are too cold."""

    def sample(self, bqm, num_reads=1, seed=None):
        return super().sample(bqm, num_reads=3 * num_reads, seed=seed)

    def answer(self, spins, variables, bqm):
        answer = super().answer(spins, variables, bqm)
        return answer.slice(sorted_by="energy")


class AtMostHundred(Foreign):
    def sample(self, bqm, num_reads=1, seed=None):
        return super().sample(bqm, num_reads=min(num_reads, 100), seed=seed)


class WithoutReads(Foreign):
    """Knows no number of reads; 70 rows a call."""

    parameters = {"seed": []}

    def sample(self, bqm, seed=None):
        return super().sample(bqm, num_reads=70, seed=seed)


class WithoutSeed(Foreign):
    parameters = {"num_reads": []}

    def __init__(self):
        self.n_calls = 0

    def sample(self, bqm, num_reads=1):
        self.n_calls += 1
        return super().sample(bqm, num_reads=num_reads, seed=self.n_calls)


FOREIGN = [
    Foreign,
    Bits,
    UnsignedBits,
    Booleans,
    Shuffled,
    Textual,
    WithAncillas,
    Aggregated,
    FloatCounts,
    Sorted,
    AtMostHundred,
    WithoutReads,
    WithoutSeed,
]
each_foreign = pytest.mark.parametrize("kind", FOREIGN, ids=lambda kind: kind.__name__)
PROBLEM = random_problem(graphs.bipartite(6, 6), seed=5)


@each_foreign
def test_answers_of_a_dimod_sampler_are_taken_as_they_come(kind):
    """The distribution at 0.7, which the sampler never hears of; alpha 1e-4 a case."""
    batch = DimodSampler(kind()).sample(SamplingRequest(PROBLEM, 3000, 0.7, seed=3))
    assert batch.spins.shape == (3000, 12)
    assert_follows(batch.spins, Distribution.boltzmann(PROBLEM, 0.7))


@pytest.mark.parametrize("kind", [Foreign, Booleans, WithoutReads, WithoutSeed], ids=lambda kind: kind.__name__)
def test_a_dimod_sampler_trains_wrapped_or_bare(kind, adata):
    for sampler in (DimodSampler(kind()), kind()):
        model = train(untrained(adata), sampler, max_epochs=1)
        assert model.history["sampling_fallbacks"].to_numpy().max() == 0


class Empty(Foreign):
    def answer(self, spins, variables, bqm):
        return super().answer(spins[:0], variables, bqm)


class Incomplete(Foreign):
    def answer(self, spins, variables, bqm):
        return dimod.SampleSet.from_samples((spins[:, 1:], variables[1:]), "SPIN", energy=0)


@over(("kind", "match"), [(Empty, "no samples.*5"), (Incomplete, "variable 0")])
def test_answers_that_cannot_be_completed_say_what_is_missing(kind, match):
    with pytest.raises(InvalidSamples, match=match):
        DimodSampler(kind()).sample(SamplingRequest(PROBLEM, 5, seed=3))


@over("kind", [AtMostHundred, WithoutReads, Sorted], ids=lambda kind: kind.__name__)
def test_equal_seeds_give_equal_samples_however_many_rows_a_call_returns(kind):
    first, again, other = (
        DimodSampler(kind()).sample(SamplingRequest(PROBLEM, 250, seed=seed)).spins for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:70], first[70:140])


CLASSES = {
    "dimod": dimod.RandomSampler,
    "dwave": dwave_samplers.SimulatedAnnealingSampler,
    "foreign": Foreign,
    "own": BlockGibbsSampler,
    "tempering": ParallelTemperingSampler,
    "adapter": DimodSampler,
}
TAKERS = {
    "DimodSampler": DimodSampler,
    "build_sampler": build_sampler,
    "Vetted": Vetted,
    "Calibrated": Calibrated,
    "check_sampler": check_sampler,
}


@over("kind", CLASSES.values(), ids=CLASSES)
@over("take", TAKERS.values(), ids=TAKERS)
def test_a_class_in_place_of_an_instance_is_refused_at_once(take, kind):
    with pytest.raises(TypeError, match=rf"{kind.__name__} is a class.*pass `{kind.__name__}\(\)`"):
        take(kind)


def test_a_class_is_no_child_of_a_recording(tmp_path):
    with pytest.raises(TypeError, match="BlockGibbsSampler is a class"):
        Recorded(BlockGibbsSampler, tmp_path / "recording")
    assert not (tmp_path / "recording").exists()


@over("kind", CLASSES.values(), ids=CLASSES)
def test_training_with_a_class_is_refused_before_it_starts(kind, adata):
    model = untrained(adata)
    with pytest.raises(TypeError, match=rf"{kind.__name__} is a class"):
        train(model, kind)
    assert not model.is_trained


def test_a_layer_takes_a_dimod_sampler_as_it_is():
    assert_follows(
        Calibrated(Foreign()).sample(SamplingRequest(PROBLEM, 3000, 0.7, seed=3)).spins,
        Distribution.boltzmann(PROBLEM, 0.7),
    )


SOLVERS = {
    "exact": dimod.ExactSolver,
    "descent": dwave_samplers.SteepestDescentSolver,
    "tabu": dwave_samplers.TabuSampler,
    "planar": dwave_samplers.PlanarGraphSolver,
    "tree": dwave_samplers.TreeDecompositionSolver,
    "annealing": dwave_samplers.SimulatedAnnealingSampler,
    "reference-annealing": dimod.SimulatedAnnealingSampler,
    "tracked": lambda: dimod.TrackingComposite(dimod.ExactSolver()),
}


@pytest.mark.parametrize("method", ["train", "sample_prior", "generate"])
@over("build", SOLVERS.values(), SOLVERS)
def test_solvers_are_refused_before_they_are_asked(method, build, adata):
    model = coupled(adata)
    calls = {
        "train": lambda sampler: train(model, sampler),
        "sample_prior": lambda sampler: model.sample_prior(10, sampler=sampler),
        "generate": lambda sampler: model.generate(10, sampler=sampler),
    }
    for sampler in (build(), DimodSampler(build())):
        with pytest.raises(ValueError, match="ground states.*'gibbs'"):
            calls[method](sampler)


def test_annealing_with_a_schedule_is_no_solver_and_neither_is_a_class_made_of_it():
    class Held(dwave_samplers.SimulatedAnnealingSampler):
        def sample(self, bqm, **kwargs):
            return super().sample(bqm, beta_range=(0.01, 1.0), **kwargs)

    annealing = dwave_samplers.SimulatedAnnealingSampler()
    assert DimodSampler(annealing, sample_kwargs={"beta_range": (0.01, 1.0)}).traits.target == "approximate"
    assert DimodSampler(Held()).traits.target == "approximate"
    assert DimodSampler(annealing, target="approximate").traits.target == "approximate"


# Structured samplers -----------------------------------------------------------------------------------------------


def structured(n_nodes: int, first_label=0) -> dimod.Sampler:
    """Exact draws on a ring, as hardware would offer it."""
    nodes = [first_label + k if isinstance(first_label, int) else f"{first_label}{k}" for k in range(n_nodes)]
    return dimod.StructureComposite(Foreign(), nodes, list(zip(nodes, [*nodes[1:], nodes[0]], strict=True)))


MISFITS = {
    "bipartite": {"n_latent": 10},
    "complete": {"n_latent": 10, "prior_graph": "complete"},
    "too-many-spins": {"n_latent": 14, "prior_graph": nx.cycle_graph(14)},
}


@over("settings", MISFITS.values(), MISFITS)
@over("is_tracked", [False, True])
def test_a_prior_that_does_not_fit_the_graph_of_a_sampler_is_refused_before_training(is_tracked, settings, adata):
    sampler = dimod.TrackingComposite(structured(12)) if is_tracked else structured(12)
    model = untrained(adata, **settings)
    for layered in (sampler, DimodSampler(sampler), Vetted(sampler)):
        with pytest.raises(GraphMismatchError, match="EmbeddingComposite.*prior_graph"):
            train(model, layered)
    assert not model.is_trained


@pytest.mark.parametrize("first_label", [0, 7, "q"])
def test_a_prior_on_the_graph_of_a_sampler_trains(first_label, adata):
    sampler = structured(10, first_label)
    model = untrained(adata, n_latent=10, prior_graph=sampler.to_networkx_graph())
    train(model, sampler, max_epochs=1)
    assert model.history["sampling_fallbacks"].to_numpy().max() == 0


@pytest.mark.parametrize("first_label", [0, 7, "q"])
def test_spins_keep_their_places_on_a_structured_sampler(first_label):
    sampler = structured(12, first_label)
    problem = random_problem(graphs.from_networkx(sampler.to_networkx_graph()), seed=6)
    batch = DimodSampler(sampler).sample(SamplingRequest(problem, 3000, 0.7, seed=3))
    assert_follows(batch.spins, Distribution.boltzmann(problem, 0.7))


def test_a_part_of_the_graph_will_do():
    problem = random_problem(graphs.from_networkx(nx.path_graph(6)), seed=6)
    DimodSampler(structured(12)).check(problem)


def test_the_stand_in_for_a_d_wave_machine_is_refused_without_an_embedding(adata):
    testing = pytest.importorskip("dwave.system.testing")
    sampler = testing.MockDWaveSampler()
    with pytest.raises(GraphMismatchError, match="EmbeddingComposite"):
        train(untrained(adata, prior_graph="complete"), sampler)


# State -------------------------------------------------------------------------------------------------------------


def mean_energy_z(distribution: Distribution, spins: np.ndarray) -> float:
    """Mean energy of rows less the exact one, over the standard error of so many independent rows."""
    code = ((spins.astype(int) + 1) // 2) @ (1 << np.arange(spins.shape[1] - 1, -1, -1))
    mean = distribution.probabilities @ distribution.energies
    scale = np.sqrt(distribution.probabilities @ (distribution.energies - mean) ** 2 / len(spins))
    return float((distribution.energies[code].mean() - mean) / scale)


@pytest.mark.parametrize(("n_sweeps", "n_rungs"), [(1, 4), (4, 2)])
def test_a_new_tempering_sampler_leaves_chains_in_equilibrium(n_sweeps, n_rungs):
    """Exact draws stay exact draws: mean energy within 5 standard errors, and the whole distribution at alpha 1e-4."""
    problem = random_problem(graphs.bipartite(6, 6), seed=5, scale=0.8)
    distribution = Distribution.boltzmann(problem)
    start = distribution.draw(20_000, seed=1)
    sampler = ParallelTemperingSampler(n_rungs)
    spins = sampler.sample(SamplingRequest(problem, 20_000, initial_spins=start, n_sweeps=n_sweeps, seed=2)).spins
    assert abs(mean_energy_z(distribution, spins.numpy())) < 5
    assert_follows(spins, distribution)


@pytest.mark.parametrize("n_more", [0, pytest.param(40, marks=pytest.mark.slow)])
def test_hot_replicas_of_another_number_of_chains_are_not_mixed_with_the_chains(n_more):
    problem = random_problem(graphs.bipartite(6, 6), seed=5, scale=0.8)
    distribution, sampler = Distribution.boltzmann(problem), ParallelTemperingSampler(4)
    sampler.sample(SamplingRequest(problem, 20_000 + n_more, seed=1))
    start = distribution.draw(20_000, seed=1)
    spins = sampler.sample(SamplingRequest(problem, 20_000, initial_spins=start, n_sweeps=4, seed=2)).spins
    assert_follows(spins, distribution)


def test_a_budget_is_not_filled_up_by_a_restart():
    sampler, again = (Budgeted(ExactSampler(), n_calls=3) for _ in range(2))
    request = SamplingRequest(PROBLEM, 5, seed=0)
    sampler.sample(request)
    sampler.sample(request)
    again.load_state_dict(sampler.state_dict())
    again.sample(request)
    with pytest.raises(BudgetExceeded):
        again.sample(request)


def test_a_recording_goes_on_where_it_was_and_another_one_starts_at_its_beginning(tmp_path):
    recorder = Recorded(ExactSampler(), tmp_path / "recording")
    requests = [SamplingRequest(PROBLEM, 5, seed=seed) for seed in range(3)]
    recorded = [recorder.sample(request).spins for request in requests]
    player = Replayed(tmp_path / "recording")
    player.sample(requests[0])
    again = Replayed(tmp_path / "recording")
    again.load_state_dict(player.state_dict())
    assert torch.equal(again.sample(requests[1]).spins, recorded[1])
    other = Recorded(ExactSampler(), tmp_path / "other")
    expected = other.sample(requests[2]).spins
    played = Replayed(tmp_path / "other")
    played.load_state_dict(player.state_dict())
    assert torch.equal(played.sample(requests[2]).spins, expected)


class Forgetful(ExactSampler):
    """What it does with chains depends on how often it was asked, which is not in its state."""

    traits = SamplerTraits(is_persistent=True)
    n_answers = 0

    def _sample(self, request, seed):
        self.n_answers += request.initial_spins is not None
        return super()._sample(request, seed + self.n_answers * (request.initial_spins is not None))


class Unreadable(ExactSampler):
    def state_dict(self):
        return {"rng": np.random.default_rng(0)}


@over(("kind", "match"), [(Forgetful, "lacks something"), (Unreadable, "plain values")])
def test_state_that_is_lost_or_unreadable_breaks_the_contract(kind, match):
    with pytest.raises(SamplerCheckError, match=match) as caught:
        check_sampler(kind(), betas=(1.0,), dtypes=(torch.float64,))
    assert {failure.rule for failure in caught.value.report.failures} == {"state"}


def resumed(adata, folder, build) -> tuple[QBMSCVI, QBMSCVI]:
    """A run, and one that goes on from its checkpoint of the first epoch in a new sampler."""
    keep = [ModelCheckpoint(folder, "{epoch}", save_top_k=-1), SaveCheckpoint(f"{folder}/scvi")]
    settings = {"enable_checkpointing": True, "callbacks": keep, "schedule": SamplingSchedule(every_n_steps=1)}
    first = train(untrained(adata), build(), **settings)
    return first, train(untrained(adata), build(), **settings, ckpt_path=f"{folder}/epoch=0.ckpt")


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: "gibbs", id="gibbs"),
        pytest.param(lambda: "parallel_tempering", id="tempering"),
        pytest.param(lambda: Calibrated(OffTemperature(0.7)), id="calibrated"),
        pytest.param(lambda: Vetted(Budgeted(ParallelTemperingSampler(3), n_calls=1000)), id="stack"),
    ],
)
def test_a_resumed_run_is_the_run_that_did_not_stop(build, adata, tmp_path):
    first, second = resumed(adata, tmp_path, build)
    other = second.module.state_dict()
    assert [name for name, value in first.module.state_dict().items() if not torch.equal(value, other[name])] == []


# A device without float64 ------------------------------------------------------------------------------------------


@pytest.fixture
def no_float64():
    with WithoutFloat64():
        yield


def test_the_stand_in_refuses_float64_on_the_device_alone(no_float64):
    values = torch.ones(3, device=DEVICE)
    assert values.device == DEVICE
    assert (2.0 * values).sum().device == DEVICE
    assert values.cpu().double().device.type == "cpu"
    for mistake in (
        lambda: values.double(),
        lambda: values.to("cpu", torch.float64),
        lambda: values.to(torch.ones(1, dtype=torch.float64)),
        lambda: values * torch.ones(3, dtype=torch.float64),
        lambda: torch.rand(3, dtype=torch.float64, device=DEVICE),
        lambda: torch.ones(3, dtype=torch.float64).to(DEVICE),
        lambda: torch.tensor(np.ones(3), device=DEVICE),
    ):
        with pytest.raises(RuntimeError, match="float64"):
            mistake()


LOCAL = {
    "gibbs": BlockGibbsSampler,
    "tempering": lambda: ParallelTemperingSampler(3),
    "exact": ExactSampler,
    "annealing": SimulatedAnnealingSampler,
    "path-integral": lambda: PathIntegralAnnealingSampler(5, 5),
    "tree": TreeDecompositionSampler,
    "coherent-ising": CoherentIsingSampler,
    "dimod": lambda: DimodSampler(Foreign()),
    "rescaled": lambda: Rescaled(ExactSampler(), h_limit=0.1, J_limit=0.1, n_bits=8),
    "spin-reversed": lambda: SpinReversed(BlockGibbsSampler(), 3),
    "calibrated": lambda: Calibrated(ExactSampler()),
    "polished": lambda: Polished(ExactSampler()),
    "vetted": lambda: Vetted(BlockGibbsSampler()),
    "in-double-precision": lambda: InDoublePrecision(),
}
GRAPHS = {
    "bipartite": graphs.bipartite(4, 4),
    "complete": graphs.complete(6),
    "sparse": graphs.from_networkx(nx.cycle_graph(7)),
}
each_graph = over("graph", GRAPHS)


class InDoublePrecision(Sampler):
    """Somebody's sampler, which computes with numpy."""

    def _sample(self, request, seed):
        return Draw(np.random.default_rng(seed).choice([-1.0, 1.0], size=(request.n_samples, request.problem.n_spins)))


def elsewhere(graph) -> tuple[IsingModel, IsingModel]:
    """A problem in main memory, and the same on the device."""
    problem = random_problem(GRAPHS[graph], dtype=torch.float32, seed=7)
    return problem, problem.to(DEVICE)


@pytest.mark.parametrize(("build", "graph"), corners(LOCAL, ["bipartite", "sparse"]) + corners(LOCAL, ["sparse"])[:2])
def test_samplers_answer_for_a_problem_on_a_device_without_float64(build, graph, no_float64, tmp_path):
    _, problem = elsewhere(graph)
    sampler = Recorded(build(), tmp_path / "recording")
    batch = sampler.sample(SamplingRequest(problem, 300, seed=1))
    assert batch.spins.device == batch.energies.device == DEVICE
    assert batch.moments(problem.graph)[0].device == DEVICE
    sampler.sample(SamplingRequest(problem, 300, initial_spins=batch.spins, n_sweeps=2, seed=2))
    fits_beta(problem, batch, 1.0)


@each_graph
@over("method", ["auto", "exact", "ais"])
def test_log_z_of_a_problem_on_a_device_without_float64_is_that_in_main_memory(method, graph, no_float64):
    problem, away = elsewhere(graph)
    samples = ExactSampler().sample(SamplingRequest(problem, 100, seed=1)).spins
    for start in (None, samples):
        moved = None if start is None else start.to(DEVICE)
        expected = estimate_log_z(problem, samples=start, n_chains=8, n_steps=10, method=method)
        assert estimate_log_z(away, samples=moved, n_chains=8, n_steps=10, method=method) == expected


@each_graph
def test_a_problem_on_a_device_without_float64_is_read_in_main_memory(graph, no_float64):
    problem, away = elsewhere(graph)
    assert away.to_bqm() == problem.to_bqm()
    assert problem_fingerprint(away) == problem_fingerprint(problem)
    assert away.to("cpu", torch.float64).h.tolist() == problem.h.tolist()
    assert problem.to(torch.float64).to(DEVICE, torch.float32).h.device == DEVICE
    assert exact_moments(away)[0].tolist() == exact_moments(problem)[0].tolist()
