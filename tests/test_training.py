"""Training QBMSCVI: the contract with Lightning and scvi-tools, sampling between steps, failure and divergence."""

from __future__ import annotations

import math
import re
import threading
import zipfile
from dataclasses import replace
from inspect import signature

import dimod
import networkx as nx
import numpy as np
import pytest
import scvi
import torch
from dwave.samplers import SimulatedAnnealingSampler
from faulty import FAULTS, Faulty, Pace
from lightning.pytorch.callbacks import Callback

from qbmscvi import QBMSCVI, SamplingSchedule
from qbmscvi.datasets import synthetic_counts
from qbmscvi.exceptions import SamplerTimeout, TrainingDivergedError
from qbmscvi.samplers import BlockGibbsSampler, DimodSampler, ExactSampler, Sampler, build_sampler
from qbmscvi.train._plan import auto_weight_decay

SAMPLER_NAMES = (
    "gibbs",
    "parallel_tempering",
    "simulated_annealing",
    "path_integral_annealing",
    "tree_decomposition",
    "exact",
    "coherent_ising",
)
DEVICE_NAMES = ("dwave", "kaiwu")  # which need an account: test_dwave_training.py, test_kaiwu.py
N_STEPS = 4  # steps of an epoch: 216 of 240 cells in batches of 64


def build(adata, **kwargs) -> QBMSCVI:
    return QBMSCVI(adata, **{"n_latent": 8, "n_chains": 64, "gene_likelihood": "nb", **kwargs})


def train(model: QBMSCVI, **kwargs) -> QBMSCVI:
    """Train for a few steps, without the fit of the prior at the end, which would move chains and moments."""
    defaults = {"max_epochs": 2, "batch_size": 64, "accelerator": "cpu", "enable_progress_bar": False}
    if isinstance(model, QBMSCVI):
        defaults |= {"schedule": SamplingSchedule(every_n_steps=1, n_sweeps=2), "fit_prior": False}
    model.train(**{**defaults, **kwargs})
    return model


def state_of(model: QBMSCVI) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.module.state_dict().items()}


def assert_equal_states(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    unequal = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert not unequal


def n_updates(model: QBMSCVI) -> int:
    return int(model.module.prior.n_updates)


def column(model: QBMSCVI, key: str) -> list[float]:
    return [float(value) for value in model.history[key].iloc[:, 0]]


class RecordingSampler(BlockGibbsSampler):
    """Block Gibbs that keeps what it was asked; the lock makes it impossible to pickle, as a connection would."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = []
        self.lock = threading.Lock()

    def _sample(self, request, seed):
        initial = None if request.initial_spins is None else request.initial_spins.clone()
        self.requests.append(replace(request, initial_spins=initial))
        return super()._sample(request, seed)


class CallCounter(Callback):
    """A user's callback: counts its calls."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(["fit_start", "epoch", "batch_start", "batch_end", "optimizer_step", "fit_end"], 0)

    def on_fit_start(self, trainer, pl_module):
        self.counts["fit_start"] += 1

    def on_train_epoch_end(self, trainer, pl_module):
        self.counts["epoch"] += 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.counts["batch_start"] += 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.counts["batch_end"] += 1

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.counts["optimizer_step"] += 1

    def on_fit_end(self, trainer, pl_module):
        self.counts["fit_end"] += 1


class KLWeights(Callback):
    """Keeps the KL weight that entered the loss of each step."""

    def __init__(self) -> None:
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(float(pl_module.loss_kwargs["kl_weight"]))


class Plant(Callback):
    """Sets one element of a parameter or buffer to NaN before a step; keeps the states at the end of the epochs."""

    def __init__(self, name: str, step: int) -> None:
        self.name, self.step, self.states = name, step, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            tensors = dict(pl_module.module.named_parameters()) | dict(pl_module.module.named_buffers())
            with torch.no_grad():
                tensors[self.name].view(-1)[0] = float("nan")

    def on_train_epoch_end(self, trainer, pl_module):
        state = pl_module.module.state_dict()
        self.states.append({name: value.detach().clone() for name, value in state.items()})


@pytest.fixture(scope="module")
def adata():
    adata = synthetic_counts(240, 60, seed=1)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    return adata


# ---------------------------------------------------------------------------------------------------------------------
# State: save, load, go on
# ---------------------------------------------------------------------------------------------------------------------


def test_loaded_model_is_the_saved_one_and_its_chains_continue(adata, tmp_path):
    sampler = RecordingSampler()
    model = train(build(adata), sampler=sampler)
    assert len(sampler.requests) == n_updates(model) == 2 * N_STEPS
    assert sampler.requests[0].initial_spins is None
    model.save(tmp_path / "model", overwrite=True)
    loaded = QBMSCVI.load(tmp_path / "model", adata)

    assert_equal_states(state_of(loaded), state_of(model))
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    assert loaded.history.keys() == model.history.keys()

    chains = model.module.prior.chains.clone()
    sampler = RecordingSampler()
    train(loaded, max_epochs=1, sampler=sampler, schedule=SamplingSchedule(every_n_steps=1, n_sweeps=7, burn_in=50))
    first, *others = sampler.requests
    assert torch.equal(first.initial_spins, chains)
    assert {request.n_sweeps for request in sampler.requests} == {7}  # no burn-in
    assert all(request.initial_spins is not None for request in others)
    assert n_updates(loaded) == 3 * N_STEPS
    assert len(loaded.history["train_loss"]) == 3


@pytest.mark.parametrize("method", ["sample_prior", "generate", "get_prior_energy"])
def test_loaded_model_trains_after_it_was_read(adata, tmp_path, method):
    model = train(build(adata, prior_graph=nx.path_graph(8)), max_epochs=1)
    model.save(tmp_path / "model")
    loaded = QBMSCVI.load(tmp_path / "model", adata)
    getattr(loaded, method)()
    train(loaded, max_epochs=1)


def test_loaded_model_draws_the_same_prior_samples(adata, tmp_path):
    model = train(build(adata), max_epochs=1)
    model.save(tmp_path / "model")
    loaded = QBMSCVI.load(tmp_path / "model", adata)
    np.testing.assert_array_equal(loaded.sample_prior(20, seed=0), model.sample_prior(20, seed=0))
    np.testing.assert_array_equal(loaded.generate(20, seed=0).X, model.generate(20, seed=0).X)


def test_second_call_of_train_trains_in_training_mode(adata):
    modes = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes.append({module.training for module in pl_module.module.modules()})

    model = train(build(adata), max_epochs=1)
    assert not model.module.training
    train(model, max_epochs=1, callbacks=[Watch()])
    assert modes == [{True}] * N_STEPS
    assert not model.module.training


def test_second_call_of_train_continues_the_chains(adata):
    model = train(build(adata), max_epochs=1)
    chains, sampler = model.module.prior.chains.clone(), RecordingSampler()
    train(model, max_epochs=1, sampler=sampler)
    assert torch.equal(sampler.requests[0].initial_spins, chains)
    assert n_updates(model) == 2 * N_STEPS
    assert len(model.history["prior_log_z"]) == 2


def test_each_request_continues_where_the_last_one_ended(adata):
    sampler = RecordingSampler()
    model = train(
        build(adata), max_epochs=1, sampler=sampler, schedule=SamplingSchedule(every_n_steps=1, n_sweeps=2, burn_in=30)
    )
    assert [request.n_sweeps for request in sampler.requests] == [30, 2, 2, 2]
    assert {request.n_samples for request in sampler.requests} == {64}
    assert len({request.seed for request in sampler.requests}) == N_STEPS
    assert [request.initial_spins is None for request in sampler.requests] == [True, False, False, False]
    assert model.module.prior.chains.dtype == torch.int8


def test_saved_file_holds_no_sampler(adata, tmp_path):
    model = train(build(adata), max_epochs=1, sampler=RecordingSampler())  # which cannot be pickled
    model.save(tmp_path / "model", save_anndata=False)
    with zipfile.ZipFile(tmp_path / "model" / "model.pt") as file:
        pickles = [file.read(name) for name in file.namelist() if name.endswith(".pkl")]
    assert pickles
    assert not any(re.search(rb"qbmscvi\.samplers|Sampler", content) for content in pickles)
    loaded = QBMSCVI.load(tmp_path / "model", adata)
    attributes = {**vars(loaded), **vars(loaded.module)}
    assert not [name for name, value in attributes.items() if isinstance(value, Sampler)]


def dimod_annealer() -> DimodSampler:
    return DimodSampler(SimulatedAnnealingSampler(), sample_kwargs={"beta_range": (0.01, 1.0), "num_sweeps": 5})


@pytest.mark.parametrize(
    "sampler",
    ["gibbs", "parallel_tempering", "simulated_annealing", "coherent_ising", dimod_annealer],
)
def test_equal_seeds_give_bit_equal_models(adata, sampler):
    """Persistent chains, annealers, and an annealer behind dimod; each answers at every step."""

    def run(seed):
        scvi.settings.seed = seed
        model = train(build(adata), max_epochs=1, sampler=sampler() if callable(sampler) else sampler)
        assert n_updates(model) == N_STEPS
        assert model.trainer.lightning_module.sampling.broker.ledger.n_failures == 0
        return state_of(model)

    first, again, other = run(0), run(0), run(1)
    assert_equal_states(first, again)
    for name in ("prior.h", "prior.chains", "px_r"):
        assert not torch.equal(first[name], other[name])


# Settings that change how much is sampled, but not what training draws for itself.
@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"schedule": SamplingSchedule(every_n_steps=1, n_sweeps=9, burn_in=20)}, id="n_sweeps"),
        pytest.param({"schedule": SamplingSchedule(every_n_steps=3)}, id="every_n_steps"),
        *(pytest.param({"sampler": name}, id=name) for name in ("simulated_annealing", "exact")),
        pytest.param({"sampler": Faulty(FAULTS["timeout"].spoil, child=BlockGibbsSampler())}, id="failing"),
    ],
)
@pytest.mark.filterwarnings("ignore:Faulty failed")
def test_sampling_takes_nothing_from_the_global_streams_per_step(adata, other):
    def run(**kwargs):
        scvi.settings.seed = 0
        model = build(adata)
        train(model, **kwargs)
        return torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002

    (torch_state, numpy_state), (torch_other, numpy_other) = run(), run(**other)
    assert torch.equal(torch_state, torch_other)
    np.testing.assert_array_equal(numpy_state, numpy_other)


# ---------------------------------------------------------------------------------------------------------------------
# Host: callbacks, trainer arguments
# ---------------------------------------------------------------------------------------------------------------------


def test_users_callbacks_survive_beside_ours(adata):
    first, second = CallCounter(), CallCounter()
    callbacks = [first, second]
    model = train(build(adata), max_epochs=3, callbacks=callbacks)
    assert callbacks == [first, second]
    assert first.counts == second.counts
    assert first.counts == {
        "fit_start": 1,
        "epoch": 3,
        "batch_start": 3 * N_STEPS,
        "batch_end": 3 * N_STEPS,
        "optimizer_step": 3 * N_STEPS,
        "fit_end": 1,
    }
    assert {first, second} < set(model.trainer.callbacks)
    assert n_updates(model) == 3 * N_STEPS


def test_early_stopping_ends_training(adata):
    arguments = {"early_stopping_patience": 2, "early_stopping_min_delta": 1e9}
    model = train(build(adata), max_epochs=20, early_stopping=True, **arguments)
    assert len(model.history["elbo_validation"]) == 3  # the first is the best, then two without improvement
    assert np.isfinite(column(model, "elbo_validation")).all()
    assert model.is_trained


def test_early_stopping_waits_while_the_elbo_improves(adata):
    # Ten times the learning rate: fifteen epochs of an untrained model improve by more than their noise.
    model = train(
        build(adata), max_epochs=15, early_stopping=True, early_stopping_patience=10, plan_kwargs={"lr": 0.01}
    )
    elbo = column(model, "elbo_validation")
    assert len(elbo) == 15
    assert min(elbo) < elbo[0]


class Waiting(RecordingSampler):
    """Remote, and silent until it is told to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.traits = replace(self.traits, is_remote=True)
        self.n_cancelled, self.gate = 0, threading.Event()

    def _sample(self, request, seed):
        assert self.gate.wait(60)
        return super()._sample(request, seed)

    def cancel(self):
        self.n_cancelled += 1
        self.gate.set()


def test_early_stopping_drops_the_request_under_way(adata):
    sampler = Waiting()
    arguments = {"early_stopping_patience": 2, "early_stopping_min_delta": 1e9}
    model = train(build(adata), max_epochs=20, early_stopping=True, sampler=sampler, **arguments)
    assert len(model.history["elbo_validation"]) == 3
    assert np.isfinite(column(model, "elbo_validation")).all()
    assert sampler.n_cancelled == 1
    assert not model.trainer.lightning_module.sampling.broker.is_busy
    train(model, max_epochs=1)  # and training can go on without it
    assert n_updates(model) == 4 * N_STEPS


def test_an_exception_drops_the_request_under_way(adata):
    class Broken(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise KeyError("the user's own")

    sampler = Waiting()
    with pytest.raises(KeyError):
        train(build(adata), callbacks=[Broken()], sampler=sampler)
    assert sampler.n_cancelled == 1


def test_accumulated_gradients_need_one_request_per_optimizer_step(adata):
    sampler, counter = RecordingSampler(), CallCounter()
    model = train(build(adata), max_epochs=3, sampler=sampler, accumulate_grad_batches=2, callbacks=[counter])
    assert counter.counts["batch_end"] == 3 * N_STEPS
    assert counter.counts["optimizer_step"] == 3 * N_STEPS / 2
    assert len(sampler.requests) == n_updates(model) == 3 * N_STEPS / 2


def test_accumulated_gradients_move_the_chains_beside_a_remote_sampler_once_per_step(adata):
    sampler = RecordingSampler()
    sampler.traits = replace(sampler.traits, is_remote=True)
    schedule = SamplingSchedule(every_n_steps=1, latency=2)
    model = train(
        build(adata), max_epochs=3, sampler=sampler, schedule=schedule, accumulate_grad_batches=2, callbacks=[Pace()]
    )
    assert n_updates(model) == 3 * N_STEPS / 2
    # asked at steps 0, 2 and 4; the answers of the first two are used at 2 and 4
    assert model.trainer.lightning_module.sampling.broker.ledger.n_trips == 3
    assert set(column(model, "sampling_staleness")) == {2.0}  # optimizer steps, not batches


@pytest.mark.parametrize(("every", "n_checks"), [(None, None), (1, 4), (2, 2)], ids=["never", "each", "second"])
def test_validation_runs_as_often_as_asked(adata, every, n_checks):
    model = train(build(adata), max_epochs=4, check_val_every_n_epoch=every)
    assert len(model.history["elbo_train"]) == 4
    if every is None:
        assert "elbo_validation" not in model.history
    else:
        assert len(model.history["elbo_validation"]) == n_checks
        assert np.isfinite(column(model, "elbo_validation")).all()


def test_clipped_gradients_include_those_of_the_prior(adata):
    class Norms(Callback):
        total, of_prior = [], []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            # still the clipped ones: zeroed only before the next backward pass
            def norm(parameters):
                return float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm())

            self.total.append(norm(pl_module.module.parameters()))
            self.of_prior.append(norm(pl_module.module.prior.parameters()))

    norms = Norms()
    train(build(adata), gradient_clip_val=0.1, callbacks=[norms], plan_kwargs={"min_kl_weight": 0.5})
    np.testing.assert_allclose(norms.total, 0.1, rtol=1e-3)  # unclipped they are near 10
    assert min(norms.of_prior) > 0


def test_plan_config_reaches_the_plan(adata):
    model = train(build(adata), max_epochs=1, plan_config={"lr": 0.03, "prior_lr": 0.5}, plan_kwargs={"prior_lr": 0.2})
    assert [group["lr"] for group in model.trainer.optimizers[0].param_groups] == [0.03, 0.2, 0.03]


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW"])
def test_fused_optimizer_makes_the_steps_of_scvis(adata, optimizer):
    """In double precision, but for rounding; the prior's group has settings of its own."""

    def losses(**kwargs):
        scvi.settings.seed = 0
        plan = {"optimizer": optimizer, "weight_decay": 1e-3, "prior_lr": 3e-3, **kwargs}
        model = train(build(adata), max_epochs=3, precision="64-true", plan_kwargs=plan)
        groups = model.trainer.optimizers[0].param_groups
        return model.history["train_loss"].to_numpy(float), [group["fused"] for group in groups]

    def create(params):
        rest, prior = params
        linear, others = ([p for p in rest["params"] if (p.ndim == 2) is is_matrix] for is_matrix in (True, False))
        groups = [{"params": linear}, prior | {"weight_decay": 0.0}, {"params": others, "weight_decay": 0.0}]
        return getattr(torch.optim, optimizer)(groups, lr=2e-3, eps=1e-8, weight_decay=1e-3)

    fused, flags = losses()
    plain, plain_flags = losses(optimizer="Custom", optimizer_creator=create)
    assert flags == [True] * 3
    assert plain_flags == [None] * 3
    np.testing.assert_allclose(fused, plain, rtol=1e-7)


@pytest.mark.skipif(
    "fused_optimizer" not in signature(scvi.train.TrainingPlan.__init__).parameters,
    reason="an argument of scvi-tools 1.5 and newer",
)
def test_fused_optimizer_can_be_declined(adata):
    model = train(build(adata), max_epochs=1, plan_kwargs={"fused_optimizer": False})
    assert not any(group["fused"] for group in model.trainer.optimizers[0].param_groups)


def test_config_objects_of_scvi_do_not_bring_its_defaults_back(adata):
    """scVI's eps of 0.01 would freeze the prior, its 400 epochs of warm-up keep the weight of the KL low."""
    model = train(build(adata), max_epochs=10, plan_config=scvi.train.TrainingPlanConfig(lr=0.03, n_epochs_kl_warmup=3))
    plan = model.trainer.lightning_module
    assert (plan.lr, plan.eps, plan.n_epochs_kl_warmup) == (0.03, 1e-8, 3)
    model = train(build(adata), max_epochs=10, plan_kwargs=scvi.train.TrainingPlanConfig())
    plan = model.trainer.lightning_module
    assert (plan.lr, plan.eps, plan.n_epochs_kl_warmup, plan.n_steps_kl_warmup) == (2e-3, 1e-8, None, N_STEPS)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def test_every_sampler_name_is_listed_here():
    with pytest.raises(ValueError, match="Unknown sampler") as error:
        build_sampler("")
    assert set(re.findall(r"'(\w+)'", str(error.value))) == {*SAMPLER_NAMES, *DEVICE_NAMES}


@pytest.mark.parametrize(
    "sampler",
    [
        *(pytest.param(name, id=name) for name in SAMPLER_NAMES),
        pytest.param(BlockGibbsSampler(n_sweeps=1), id="instance"),
    ],
)
def test_every_sampler_trains(adata, sampler):
    model = train(build(adata), sampler=sampler)
    assert n_updates(model) == 2 * N_STEPS
    assert column(model, "sampling_fallbacks") == [0.0, 0.0]
    assert np.isfinite(model.get_latent_representation()).all()


@pytest.mark.parametrize(("every", "expected"), [(1, 20), (5, 4), (7, 3), (100, 1)])
def test_schedule_asks_every_n_steps(adata, every, expected):
    sampler = RecordingSampler()
    train(build(adata), max_epochs=5, sampler=sampler, schedule=SamplingSchedule(every_n_steps=every))
    assert len(sampler.requests) == expected


def test_default_schedule_moves_chains_at_every_second_step_and_asks_other_samplers_at_every_eighth(adata):
    sampler = RecordingSampler()
    train(build(adata), max_epochs=5, sampler=sampler, schedule=None)  # 20 steps
    assert [request.n_sweeps for request in sampler.requests] == [SamplingSchedule().burn_in, *[2] * 9]
    sampler = RecordingSampler()
    sampler.traits = replace(sampler.traits, is_persistent=False)
    train(build(adata), max_epochs=5, sampler=sampler, schedule=None)
    assert len(sampler.requests) == 3


def test_moments_stay_as_they_are_between_requests(adata):
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(pl_module.module.prior.spin_mean.clone())

    train(build(adata), schedule=SamplingSchedule(every_n_steps=4), callbacks=[Watch()])
    assert all(torch.equal(mean, seen[0]) for mean in seen[:4])
    assert all(torch.equal(mean, seen[4]) for mean in seen[4:])
    assert not torch.equal(seen[0], seen[4])


@pytest.mark.parametrize("n_chains", [2, 7, 8], ids="{}-chains".format)
def test_few_chains_suffice(adata, n_chains):
    assert train(build(adata, n_chains=n_chains), max_epochs=1).is_trained


def test_fallback_of_a_sampler_without_chains_is_burnt_in(adata, monkeypatch):
    """Energy of the fallback's samples against the exact mean; |z| below 5."""

    class BreaksLater(ExactSampler):
        n_calls = 0

        def _sample(self, request, seed):
            self.n_calls += 1
            if self.n_calls > 1:
                raise SamplerTimeout("no answer")
            return super()._sample(request, seed)

    energies = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            prior = pl_module.module.prior
            energies.append(prior.to_ising().energy(prior.chains))

    model = build(adata, prior_graph=nx.path_graph(8), n_chains=2000)
    with torch.no_grad():
        model.module.prior.J.fill_(-1.5)  # strongly coupled: 10 sweeps from random spins are far from enough
    with pytest.warns(RuntimeWarning, match="Block Gibbs"):
        train(model, max_epochs=1, sampler=BreaksLater(), plan_kwargs={"prior_lr": 1e-9}, callbacks=[Watch()])
    exact = -7 * 1.5 * np.tanh(1.5)  # of an open chain
    assert len(energies) == N_STEPS
    for energy in energies:
        z = (energy.mean() - exact) / (energy.std() / np.sqrt(len(energy)))
        assert abs(float(z)) < 5


def test_sampler_of_ground_states_is_refused(adata):
    model = build(adata)
    sampler = DimodSampler(dimod.ExactSolver(), target="ground_state")
    with pytest.raises(ValueError, match=r"ground states.*sampler='gibbs'"):
        train(model, sampler=sampler)
    assert not model.is_trained
    assert n_updates(model) == 0


def test_history_tells_what_was_sampled(adata):
    model = train(build(adata), max_epochs=3, schedule=SamplingSchedule(every_n_steps=1, burn_in=200))
    for key in ("prior_log_z", "prior_energy", "sampling_seconds", "sampling_fallbacks"):
        assert len(model.history[key]) == 3, key
        assert np.isfinite(column(model, key)).all(), key
    assert min(column(model, "sampling_seconds")) > 0
    assert column(model, "sampling_seconds")[0] > column(model, "sampling_seconds")[2]  # burn-in; restarts each epoch
    # With 8 spins the estimate at the end is exact; tracking follows it to a tenth of a nat (a tenth of its change).
    assert float(model.module.prior.log_z_scale) == 0.0
    assert abs(column(model, "prior_log_z")[-1] - float(model.module.prior.log_z)) < 0.1


def test_log_z_at_the_end_is_exact_for_a_small_prior(adata):
    """By a sum over all states of the trained prior's Ising problem, written out here; float32 against float64."""
    model = train(build(adata, prior_graph="complete"), plan_kwargs={"prior_lr": 0.1})
    problem = model.get_ising_model()
    s = np.array(np.meshgrid(*[[-1.0, 1.0]] * 8)).reshape(8, -1).T
    h, J = problem.h.double().numpy(), problem.J.double().numpy()
    energy = float(problem.offset) + s @ h
    for value, (i, j) in zip(J, problem.graph.edges, strict=True):
        energy = energy + value * s[:, i] * s[:, j]
    assert abs(np.log(np.exp(-energy).sum()) - float(model.module.prior.log_z)) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer, KL warm-up, frozen prior
# ---------------------------------------------------------------------------------------------------------------------


def groups_of(model: QBMSCVI) -> list[dict]:
    (optimizer,) = model.trainer.optimizers
    return optimizer.param_groups


def test_own_optimizer_is_left_one_group_without_settings_of_the_prior(adata):
    def create(params):
        return torch.optim.Adam(params, lr=2e-3)

    (group,) = groups_of(
        train(build(adata), max_epochs=1, plan_kwargs={"optimizer": "Custom", "optimizer_creator": create})
    )
    assert group["lr"] == 2e-3
    assert len(group["params"]) > 10


@pytest.mark.parametrize(
    ("plan_kwargs", "lr", "decay"),
    [
        pytest.param({"weight_decay": 0.2}, 2e-4, 0.0, id="defaults"),
        pytest.param({"weight_decay": 0.2, "lr": 4e-3}, 4e-4, 0.0, id="a-tenth"),
        pytest.param({"weight_decay": 0.2, "prior_lr": 0.02}, 0.02, 0.0, id="lr"),
        pytest.param({"weight_decay": 0.2, "prior_weight_decay": 0.1}, 2e-4, 0.1, id="decay"),
        pytest.param({"weight_decay": 0.2, "prior_lr": 0.02, "prior_weight_decay": 0.3}, 0.02, 0.3, id="both"),
    ],
)
def test_prior_and_what_does_not_decay_have_groups_of_their_own(adata, plan_kwargs, lr, decay):
    model = train(build(adata), max_epochs=1, plan_kwargs=plan_kwargs)
    linear, prior, others = groups_of(model)
    names = {id(p): name for name, p in model.module.named_parameters()}
    of_linear = {id(m.weight) for m in model.module.modules() if isinstance(m, torch.nn.Linear)}
    assert {id(p) for p in prior["params"]} == {id(p) for p in model.module.prior.parameters()}
    assert {id(p) for p in linear["params"]} == of_linear
    assert len(linear["params"]) + len(prior["params"]) + len(others["params"]) == len(names)
    assert {names[id(p)].rpartition(".")[2] for p in others["params"]} == {"bias", "weight", "px_r"}  # of BatchNorm
    assert (prior["lr"], prior["weight_decay"]) == pytest.approx((lr, decay))
    rate = plan_kwargs.get("lr", 2e-3)
    assert [(group["lr"], group["weight_decay"]) for group in (linear, others)] == [(rate, 0.2), (rate, 0.0)]


@pytest.mark.parametrize(("batch_size", "lr"), [(16, 2e-3), (16, 4e-3), (10, 2e-3)])
def test_weights_that_nothing_renews_fade_within_50_epochs(batch_size, lr):
    """Those of a gene without counts; AdamW multiplies them by one less learning rate times decay at each step."""
    adata = synthetic_counts(240, 60)
    adata.X[:, 3] = 0
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    model = build(adata)
    layers = (m for m in model.module.z_encoder.modules() if isinstance(m, torch.nn.Linear))
    weight = next(layers).weight
    before = weight[:, 3].detach().clone()
    train(model, max_epochs=2, batch_size=batch_size, plan_kwargs={"lr": lr})
    assert lr * model.trainer.lightning_module.weight_decay < 0.01
    np.testing.assert_allclose((weight[:, 3] / before).detach(), np.exp(-2 / 50), rtol=2e-3)


@pytest.mark.parametrize(
    ("plan_kwargs", "decay"),
    [
        pytest.param({"optimizer": "Adam"}, 1e-6, id="scvis-with-adam"),
        pytest.param({"lr": 1e-4}, 1.0, id="bounded"),
        pytest.param({"lr": 0.1}, 1 / (50 * 0.1 * N_STEPS), id="by-the-steps-of-an-epoch"),
        pytest.param({"weight_decay": 0.0}, 0.0, id="given"),
    ],
)
def test_weight_decay(adata, plan_kwargs, decay):
    model = train(build(adata), max_epochs=3, max_steps=2, plan_kwargs=plan_kwargs)
    assert model.trainer.lightning_module.weight_decay == pytest.approx(decay)
    assert groups_of(model)[0]["weight_decay"] == pytest.approx(decay)


def test_weight_decay_is_zero_beside_frozen_networks(adata):
    """Decay would change what a hook keeps from being changed by gradients, as in query models."""
    model = build(adata)
    model.module.z_encoder.requires_grad_(False)
    train(model, max_epochs=1)
    assert {group["weight_decay"] for group in groups_of(model)} == {0.0}


def test_weight_decay_without_a_known_number_of_steps_is_zero():
    assert auto_weight_decay(2e-3, math.inf) == auto_weight_decay(0.0, 20) == 0.0


@pytest.mark.parametrize("value", ["none", -0.1])
def test_wrong_weight_decay_is_refused(adata, value):
    with pytest.raises(ValueError, match=r"^weight_decay=.*'auto'"):
        train(build(adata), max_epochs=1, plan_kwargs={"weight_decay": value})


def test_learning_rates_are_recorded_under_scvis_name_and_go_on_in_a_second_training(adata):
    model = train(build(adata), max_epochs=2, learning_rate_monitor=True)
    n_before = len(model.history["lr-Adam"])
    train(model, max_epochs=3, learning_rate_monitor=True)
    for name, rate in (("lr-Adam", 2e-3), ("lr-Adam-prior", 2e-4)):
        table = model.history[name]
        assert list(table.columns) == [name]
        np.testing.assert_allclose(table[name].to_numpy(float), rate)
        assert len(table) > n_before
    assert not [name for name in model.history if "/pg" in name]


def test_prior_learning_rate_of_zero_holds_the_prior(adata):
    model = build(adata)
    before = state_of(model)
    train(model, plan_kwargs={"prior_lr": 0.0})
    after = state_of(model)
    assert all(torch.equal(before[f"prior.{name}"], after[f"prior.{name}"]) for name in "hJ")
    assert not torch.equal(before["px_r"], after["px_r"])
    assert n_updates(model) == 2 * N_STEPS  # it is sampled all the same


def test_every_parameter_of_the_prior_is_trained(adata):
    model = build(adata, prior_graph="complete")
    before = state_of(model)
    train(model)
    for name, value in model.module.prior.named_parameters():
        assert (value != before[f"prior.{name}"]).all(), name


def test_frozen_prior_is_left_alone_and_not_sampled(adata):
    sampler, model = RecordingSampler(), build(adata)
    model.module.prior.requires_grad_(False)
    before = state_of(model)
    train(model, sampler=sampler)
    after = state_of(model)
    assert sampler.requests == []
    prior_state = [name for name in before if name.startswith("prior.")]
    assert_equal_states({n: before[n] for n in prior_state}, {n: after[n] for n in prior_state})
    assert not torch.equal(before["px_r"], after["px_r"])
    assert "prior_energy" not in model.history


def test_partly_frozen_prior_is_sampled_for_the_rest(adata):
    sampler, model = RecordingSampler(), build(adata, prior_graph="complete")
    model.module.prior.h.requires_grad_(False)
    train(model, sampler=sampler)  # J is trained, and needs moments
    assert len(sampler.requests) == 2 * N_STEPS


@pytest.mark.parametrize("max_epochs", [1, 10, 15])
def test_automatic_warmup_takes_the_first_tenth_of_the_steps(adata, max_epochs):
    recorder = KLWeights()
    train(build(adata), max_epochs=max_epochs, callbacks=[recorder])
    n_steps = max_epochs * N_STEPS
    n_warmup = round(0.1 * n_steps)
    expected = np.minimum(np.arange(n_steps) / n_warmup, 1.0) if n_warmup else np.ones(n_steps)
    np.testing.assert_allclose(recorder.weights, expected, atol=1e-6)


def test_automatic_warmup_of_training_without_an_end(adata):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    model = train(build(adata), max_epochs=-1, callbacks=[Stop()])
    assert model.trainer.lightning_module.n_steps_kl_warmup == 1000


@pytest.mark.parametrize(
    "plan_kwargs",
    [
        pytest.param({"n_epochs_kl_warmup": 4}, id="epochs"),
        pytest.param({"n_epochs_kl_warmup": None}, id="none"),
        pytest.param({"n_epochs_kl_warmup": None, "n_steps_kl_warmup": 6}, id="steps"),
        pytest.param({"n_epochs_kl_warmup": 2, "n_steps_kl_warmup": 6}, id="epochs-before-steps"),
        pytest.param({"n_epochs_kl_warmup": 3, "min_kl_weight": 0.2, "max_kl_weight": 0.5}, id="bounds"),
    ],
)
def test_explicit_warmup_is_that_of_scvi(adata, plan_kwargs):
    ours, theirs = KLWeights(), KLWeights()
    train(build(adata), max_epochs=4, plan_kwargs=plan_kwargs, callbacks=[ours])
    copy = synthetic_counts(240, 60, seed=1)
    scvi.model.SCVI.setup_anndata(copy, batch_key="batch")
    train(scvi.model.SCVI(copy), max_epochs=4, plan_kwargs=plan_kwargs, callbacks=[theirs])
    assert len(ours.weights) == 4 * N_STEPS
    np.testing.assert_array_equal(ours.weights, theirs.weights)


def test_steps_of_warmup_win_over_automatic_epochs(adata):
    recorder = KLWeights()
    train(build(adata), max_epochs=2, plan_kwargs={"n_steps_kl_warmup": 5}, callbacks=[recorder])
    np.testing.assert_allclose(recorder.weights, [0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1], atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Divergence
# ---------------------------------------------------------------------------------------------------------------------

# Each of them reaches the loss by another way: log likelihood, decoder, posterior, energy (seen by the sampler), log Z.
PLACES = ["px_r", "decoder.px_scale_decoder.0.weight", "z_encoder.logit_encoder.weight", "prior.h", "prior.log_z"]


@pytest.mark.parametrize("place", PLACES)
def test_divergence_is_reported_and_the_last_finite_state_is_given_back(adata, place):
    model, plant = build(adata), Plant(place, step=6)  # in the middle of the second epoch
    # Six steps were good. What is not finite is a parameter after step 6, or the loss of step 7.
    with pytest.raises(TrainingDivergedError, match=r"step (6|7)\b.*step 4"):
        train(model, max_epochs=4, callbacks=[plant])
    assert_equal_states(state_of(model), plant.states[0])
    assert all(torch.isfinite(value).all() for value in model.module.state_dict().values())
    assert not model.module.training
    assert np.isfinite(model.get_latent_representation()).all()
    assert len(model.history["train_loss"]) == len(model.history["prior_log_z"]) == 1
    assert len(model.train_indices) + len(model.validation_indices) == adata.n_obs


def test_divergence_in_the_first_epoch_gives_the_initial_state_back(adata):
    model = build(adata)
    before = state_of(model)
    with pytest.raises(TrainingDivergedError, match=r"step 0"):
        train(model, callbacks=[Plant("px_r", step=1)])
    assert_equal_states(state_of(model), before)
    assert not model.is_trained


def test_divergence_names_the_first_bad_step_when_the_sampler_sees_it_later(adata):
    with pytest.raises(TrainingDivergedError, match=r"non-finite at step 7\b"):
        train(build(adata), batch_size=16, callbacks=[Plant("px_r", step=6)])


def test_divergence_is_noticed_within_a_hundred_steps(adata):
    model = build(adata)
    model.module.prior.requires_grad_(False)  # or the sampler would notice at once
    with pytest.raises(TrainingDivergedError, match=r"step 61\b.*step 0"):
        train(model, batch_size=2, max_epochs=1, callbacks=[Plant("px_r", step=60)])
    with pytest.raises(TrainingDivergedError, match=r"step 104\b.*step 100"):
        train(model, batch_size=2, max_epochs=1, callbacks=[Plant("px_r", step=103)])


def test_divergence_with_validation_is_reported_all_the_same(adata):
    model = build(adata)
    with pytest.raises(TrainingDivergedError, match=r"non-finite at step (6|7|8)\b"):
        train(model, callbacks=[Plant("px_r", step=6)], check_val_every_n_epoch=1)
    assert np.isfinite(model.get_latent_representation()).all()
    assert np.isfinite(column(model, "elbo_validation")[0])


@pytest.mark.parametrize("gene_likelihood", ["zinb", "nb", "poisson", "normal"])
def test_absurd_learning_rate_diverges_and_a_sane_one_trains_on(adata, gene_likelihood):
    model = build(adata, gene_likelihood=gene_likelihood)
    with pytest.raises(TrainingDivergedError, match=r"non-finite.*plan_kwargs={'lr': 1e-4}"):
        train(model, plan_kwargs={"lr": 1e6})
    assert all(torch.isfinite(value).all() for value in model.module.state_dict().values())
    before = float(model.get_elbo())
    train(model, max_epochs=3, plan_kwargs={"lr": 1e-2})
    assert float(model.get_elbo()) > before


def test_training_after_divergence_in_the_first_epoch_has_a_history(adata):
    model = build(adata)
    with pytest.raises(TrainingDivergedError):
        train(model, callbacks=[Plant("px_r", step=1)])
    train(model)
    assert len(model.history["train_loss"]) == 2


def test_other_exceptions_pass_as_they_are(adata):
    class Broken(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        train(build(adata), callbacks=[Broken()])
