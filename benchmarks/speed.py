"""How long does a training step take beside scVI's, what takes it, and how fast is block Gibbs?

    python benchmarks/speed.py
    python benchmarks/speed.py --compile
    python benchmarks/speed.py --quick --out speed-output

Everything is CPU time of one thread, and what is compared is measured in turns, so that it meets the machine in the
same states. Writes SPEED.md beside this script (with ``--quick``, which takes below three minutes on an idle machine:
to the output folder). Samplers of other packages are measured if they can be imported; a folder
beside the environment will do, which leaves its torch alone:

    pip install --no-deps --target extra rbms einops dwave-pytorch-plugin dwave-hybrid plucky
    PYTHONPATH=extra python benchmarks/speed.py

Compiling takes a C++ compiler and the headers of Python.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import scvi
import torch
from lightning.pytorch.callbacks import Callback
from scvi import REGISTRY_KEYS

from qbmscvi import QBMSCVI
from qbmscvi.boltzmann.graphs import bipartite
from qbmscvi.boltzmann.ising import IsingModel
from qbmscvi.datasets import synthetic_counts
from qbmscvi.samplers.local._gibbs import gibbs_sweeps

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import cost  # noqa: E402
from cost import BATCH_SIZE, FAMILIES, MEAN_DEPTH, N_CELLS, N_GENES  # noqa: E402

N_WARM = 3  # steps of each turn that are left out
SPINS = FAMILIES["spins, 64"]
ARMS: dict[str, dict | None] = {
    "SCVI, 10 Gaussians": None,
    **FAMILIES,
    "spins, 64, Gumbel": {**SPINS, "smoothing": "gumbel"},
    "spins, 64, spike-and-exponential": {**SPINS, "smoothing": "spike-exponential"},
}
BASE = "SCVI, 10 Gaussians"
SIDES = (64, 128, 256, 512, 1024)
N_CHAINS, N_SWEEPS = 512, 10
PADDED_LIMIT = 128  # the plugin's block sampler gathers (chains, spins, neighbors) numbers


class Steps(Callback):
    """CPU seconds of each step, loading included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started: float | None = None

    def on_train_epoch_start(self, trainer, pl_module):
        self._started = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self._started is not None:
            self.seconds.append(time.process_time() - self._started)
        self._started = time.process_time()


def build(arm: str, adata):
    if ARMS[arm] is None:
        scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
        return scvi.model.SCVI(adata, n_latent=10)
    QBMSCVI.setup_anndata(adata, batch_key="batch")
    return QBMSCVI(adata, **ARMS[arm])


def train(model, n_epochs: int, **kwargs) -> np.ndarray:
    """Train; CPU seconds of the steps after the first few."""
    steps = Steps()
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "train_size": 1.0, "batch_size": BATCH_SIZE}
    model.train(max_epochs=n_epochs, callbacks=[steps], **settings, **kwargs)
    return np.array(steps.seconds[N_WARM:])


def quartiles(values) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def step_table(n_turns: int) -> tuple[list[str], dict[str, float]]:
    adata = synthetic_counts(N_CELLS, N_GENES, mean_depth=MEAN_DEPTH, seed=0)
    density = adata.X.nnz / np.prod(adata.shape)
    models = {arm: build(arm, adata) for arm in ARMS}
    medians = {arm: [] for arm in ARMS}
    for turn in range(n_turns + 1):
        for arm, model in models.items():
            scvi.settings.seed = turn
            seconds = train(model, 1)
            if turn:  # the first turn meets every kernel for the first time
                medians[arm].append(float(np.median(seconds)))
    base = np.array(medians[BASE])
    lines = [
        "## A training step",
        "",
        f"{N_CELLS} cells, {N_GENES} genes, {100 * density:.1f} % of the counts not zero, batches of {BATCH_SIZE}, "
        f"ZINB; {n_turns} turns of one epoch each, in which the arms follow one another. CPU time of a step in ms, and "
        "its ratio to scVI's in the same turn: median (quartiles) over turns.",
        "",
        "| model | step, ms | ratio to SCVI |",
        "|---|---|---|",
    ]
    for arm, values in medians.items():
        lines.append(f"| {arm} | {quartiles(1e3 * np.array(values))} | {quartiles(np.array(values) / base)} |")
    return [*lines, ""], {arm: float(np.median(values)) for arm, values in medians.items()}


def timed(function: Callable[[], object], n: int = 40) -> float:
    """Median CPU seconds of one call."""
    seconds = []
    for _ in range(n + 3):
        started = time.process_time()
        function()
        seconds.append(time.process_time() - started)
    return float(np.median(seconds[3:]))


def share_table(n_epochs: int) -> list[str]:
    """What takes a step: parts of the prior timed inside the steps of a run, others alone beside steps of their own."""
    titles = {"sweeps": "Gibbs sweeps", "moments": "moments", "tracking": "log Z", "layer": "layer", "kl": "KL"}
    groups = [((part,), title) for part, title in titles.items()] + [(("sampling", "kl"), "prior, all of it")]
    lines = [
        "## What takes it",
        "",
        f"Share of the CPU time of {N_CELLS // BATCH_SIZE} steps in %, timed inside them, the KL after them: median "
        f"(quartiles) of {n_epochs - 1} epochs. *Layer* is all of sampling but the Gibbs sweeps, the moments and the "
        "tracking of log Z: requests, checks, merging, energies, bookkeeping.",
        "",
        "| family | " + " | ".join(title for _, title in groups) + " |",
        "|---|" + "---|" * len(groups),
    ]
    for family in FAMILIES:
        measured = cost.measure(family, n_epochs)
        shares = [100 * np.array(measured.share(*parts)) for parts, _ in groups]
        cells = [f"{middle:.1f} ({low:.1f} to {high:.1f})" for middle, low, high in shares]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    lines += [
        "",
        "Other parts, each alone, forward and backward, repeated on one batch beside steps of the same minute; ms and "
        "share of the step. The network is scVI's, from counts to the parameters of the likelihood. The rest is "
        "Lightning, Adam and the metrics.",
        "",
        "| part | " + " | ".join(FAMILIES) + " |",
        "|---|" + "---|" * len(FAMILIES),
    ]
    columns = [_parts(arm) for arm in FAMILIES]
    for part in columns[0]:
        cells = [f"{1e3 * column[part]:.2f} ({100 * column[part] / column['step']:.0f} %)" for column in columns]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return [*lines, ""]


def _parts(arm: str) -> dict[str, float]:
    adata = synthetic_counts(N_CELLS, N_GENES, mean_depth=MEAN_DEPTH, seed=0)
    model = build(arm, adata)
    step = float(np.median(train(model, 2)))
    module = model.module.train()
    loader = model._make_data_loader(adata, batch_size=BATCH_SIZE, shuffle=True)
    tensors = next(iter(loader))
    batches: Iterator = iter(())

    def load() -> None:
        nonlocal batches
        try:
            next(batches)
        except StopIteration:
            batches = iter(loader)
            next(batches)

    with torch.no_grad():
        px = module(tensors, compute_loss=False)[1]["px"]
    parameters = [p.detach().requires_grad_() for p in (px.mu, module.px_r.exp(), px.zi_logits)]
    counts = tensors[REGISTRY_KEYS.X_KEY]

    def likelihood() -> None:
        mu, theta, logits = parameters
        log_prob = type(px)(mu=mu, theta=theta, zi_logits=logits).log_prob(counts)
        torch.autograd.grad(log_prob.sum(-1).mean(), parameters)

    weights = [p for name, p in module.named_parameters() if not name.startswith(("prior.", "px_r"))]

    def network() -> None:
        out = module.generative(
            **module._get_generative_input(tensors, module.inference(**module._get_inference_input(tensors)))
        )["px"]
        total = out.mu.mean() + out.zi_logits.mean()
        torch.autograd.grad(total, weights, allow_unused=True)

    return {"step": step, "network": timed(network), "likelihood": timed(likelihood), "loading": timed(load)}


def compile_lines(step: float) -> list[str]:
    arm = "spins, 64"
    adata = synthetic_counts(N_CELLS, N_GENES, mean_depth=MEAN_DEPTH, seed=0)
    model = build(arm, adata)
    started = time.process_time()
    try:
        compiled = train(model, 4, plan_kwargs={"compile": True})
    except Exception as error:  # noqa: BLE001 - a compiler that fails is a result
        outcome = f"failed here ({type(error).__name__}: {str(error).splitlines()[0]})"
    else:
        total, tail = time.process_time() - started, compiled[-20:]
        outcome = (
            f"{quartiles(1e3 * tail)} ms of CPU time for each of the last 20 of 80 steps, {step * 1e3:.2f} ms without; "
            f"compiling and all steps took {total:.0f} s"
        )
    return ["## Compiled", "", f'`plan_kwargs={{"compile": True}}`, {arm}: {outcome}.', ""]


def _problem(side: int) -> IsingModel:
    graph = bipartite(side, side)
    generator = torch.Generator().manual_seed(0)
    J = torch.randn(graph.n_edges, generator=generator) / (2 * side) ** 0.5
    return IsingModel(0.1 * torch.randn(2 * side, generator=generator), J, graph)


def _ours(side: int) -> Callable[[], None]:
    problem, generator = _problem(side), torch.Generator().manual_seed(0)
    spins = torch.where(torch.rand(N_CHAINS, 2 * side, generator=generator) < 0.5, 1.0, -1.0)
    return lambda: gibbs_sweeps(problem, spins, N_SWEEPS, 1.0, generator)


def _rbms(side: int) -> Callable[[], None]:
    implement = importlib.import_module("rbms.bernoulli_bernoulli.implement")
    problem = _problem(side)
    weights, bias = problem.edge_couplings[:side, side:].contiguous(), problem.h
    state = [torch.bernoulli(torch.full((N_CHAINS, side), 0.5))]

    def sweep() -> None:
        for _ in range(N_SWEEPS):
            hidden, _ = implement._sample_hiddens(state[0], weights, bias[side:])
            state[0], _ = implement._sample_visibles(hidden, weights, bias[:side])

    return sweep


def _plugin(side: int) -> Callable[[], None] | None:
    if side > PADDED_LIMIT:
        return None
    models = importlib.import_module("dwave.plugins.torch.models")
    block = importlib.import_module("dwave.plugins.torch.samplers.block_spin_sampler")
    problem = _problem(side)
    edges = [(int(i), int(j)) for i, j in problem.graph.edges]
    machine = models.GraphRestrictedBoltzmannMachine(nodes=list(range(2 * side)), edges=edges)
    sampler = block.BlockSampler(machine, lambda node: int(node >= side), N_CHAINS, [1.0] * N_SWEEPS, seed=0)
    return lambda: sampler.sample()


def _annealing(side: int) -> Callable[[], None]:
    from dwave.samplers import SimulatedAnnealingSampler

    bqm, sampler = _problem(side).to_bqm(), SimulatedAnnealingSampler()
    return lambda: sampler.sample(bqm, num_reads=N_CHAINS, num_sweeps=N_SWEEPS, beta_range=(0.1, 1.0), seed=0)


SAMPLERS = {
    "block Gibbs": _ours,
    "dwave-samplers annealing": _annealing,
    "rbms": _rbms,
    "dwave-pytorch-plugin": _plugin,
}


def _rate(call: Callable[[], None]) -> float:
    """Calls per CPU second: the first one warms up, then as many as take a good quarter of a second."""
    call()
    n_calls, started = 0, time.process_time()
    while (elapsed := time.process_time() - started) < 0.25:
        call()
        n_calls += 1
    return n_calls / elapsed


def gibbs_table(n_turns: int) -> list[str]:
    rates: dict[tuple[str, int], list[float]] = {}
    notes = []
    for side in SIDES:
        calls = {}
        for name, prepare in SAMPLERS.items():
            try:
                calls[name] = prepare(side)
            except ImportError as error:
                notes.append(f"{name} could not be imported ({error}).")
        for turn in range(n_turns):
            for name, call in calls.items():
                if call is None or (turn > 1 and side > PADDED_LIMIT and name not in ("block Gibbs", "rbms")):
                    continue  # these take many seconds
                rates.setdefault((name, side), []).append(_rate(call) * N_CHAINS * N_SWEEPS * 2 * side / 1e6)
    lines = [
        "## Block Gibbs",
        "",
        f"Millions of spin updates per CPU second, {N_CHAINS} chains, {N_SWEEPS} sweeps of a bipartite problem of so "
        "many spins per side; in brackets how many times slower than block Gibbs here. Medians of turns, each of a "
        "quarter of a second or one call.",
        "",
        "| spins per side | " + " | ".join(SAMPLERS) + " |",
        "|---|" + "---|" * len(SAMPLERS),
    ]
    for side in SIDES:
        own = np.median(rates["block Gibbs", side])
        cells = []
        for name in SAMPLERS:
            values = rates.get((name, side))
            cells.append("" if values is None else f"{np.median(values):.1f} ({own / np.median(values):.1f})")
        lines.append(f"| {side} | {' | '.join(cells)} |")
    lines += ["", *sorted(set(notes)), ""] if notes else [""]
    return lines


_START = "import time, scvi; t = time.process_time(); import qbmscvi; print(time.process_time() - t)"


def start_lines(n_turns: int) -> list[str]:
    command = [sys.executable, "-c", _START]
    outputs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(n_turns)]
    seconds = [float(output.split()[-1]) for output in outputs]
    return ["## Start", "", f"`import qbmscvi` after `import scvi`: {quartiles(seconds)} s of CPU time.", ""]


def memory_table() -> list[str]:
    lines = ["## Memory", "", "Peak of a process of its own that trains one epoch, in MiB, data included.", ""]
    lines += ["| model | peak, MiB |", "|---|---|"]
    for arm in (BASE, *FAMILIES):
        command = [sys.executable, __file__, "--memory-of", arm]
        peak = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        lines.append(f"| {arm} | {peak:.0f} |")
    return [*lines, ""]


def peak_memory(arm: str) -> float:
    adata = synthetic_counts(N_CELLS, N_GENES, mean_depth=MEAN_DEPTH, seed=0)
    train(build(arm, adata), 1)
    # Not `ru_maxrss`, which a process takes over from the one that started it.
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def describe_machine() -> str:
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE)
    return (
        f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, torch on {torch.get_num_threads()} "
        f"thread, load average at the start {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, scvi-tools "
        f"{scvi.__version__}, torch {torch.__version__}, numpy {np.__version__}; commit {commit.stdout.strip()}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("speed-output"), help="folder for the report of --quick")
    parser.add_argument("--quick", action="store_true", help="few turns; the report goes to the output folder")
    parser.add_argument("--compile", action="store_true", help="steps compiled by torch as well; needs a C++ compiler")
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    scvi.settings.verbosity = logging.ERROR
    torch.set_num_threads(1)
    if options.memory_of:
        print(json.dumps(peak_memory(options.memory_of)))
        return
    n_turns = 2 if options.quick else 5
    folder = options.out if options.quick else HERE
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# Speed", "", f"Written by `{Path(__file__).name}`. {describe_machine()} Seed 0.", ""]
    steps, medians = step_table(n_turns)
    sections = [
        lambda: steps,
        lambda: share_table(2 * n_turns + 2),
        lambda: gibbs_table(n_turns),
        memory_table,
        lambda: start_lines(3),
    ]
    if options.compile:
        sections.append(lambda: compile_lines(medians["spins, 64"]))
    for section in sections:
        lines += section()
        (folder / "SPEED.md").write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
