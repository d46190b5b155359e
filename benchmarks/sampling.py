"""What does the sampling layer save, and what does it repair?

Two measurements, written to SAMPLING.md beside this script (with ``--quick``: to the output folder), and a figure:

    python benchmarks/sampling.py --out sampling-output
    python benchmarks/sampling.py --out sampling-output --quick

Trips to an imagined remote device, with and without the broker; and the errors that each wrapper removes from a
device with a bias field and a wrong temperature. Harness and device are those of the tests. What the layer takes of a
training step is in SPEED.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import scvi
import torch

from qbmscvi.boltzmann.ising import IsingModel
from qbmscvi.samplers import Broker, Draw, Sampler, SamplerTraits, SamplingRequest
from qbmscvi.samplers.testing import tiny_problems

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from oracles import Distribution  # noqa: E402
from test_wrappers import BELIEVED_BETA, TRUE_BETA, Device, answers_by_layer, worst_mean  # noqa: E402

TRIP_SECONDS, SAMPLE_SECONDS = 20e-3, 50e-6
N_REQUESTS = (1, 2, 4, 8, 16, 32)
N_SAMPLES = 100  # per request
SEEDS = (0, 1, 2, 3, 4)
N_DRAWS = 40_000


class FarAway(Sampler):
    """A device that takes a fixed time per trip and per sample. Its answers are random spins: only time matters."""

    def __init__(self, *, packs_problems: bool) -> None:
        self.traits = SamplerTraits(target="approximate", is_remote=True, packs_problems=packs_problems)
        self.n_trips = 0

    def _sample(self, request: SamplingRequest, seed: int) -> Draw:
        self.n_trips += 1
        time.sleep(TRIP_SECONDS + SAMPLE_SECONDS * request.n_samples)
        generator = torch.Generator().manual_seed(seed)
        bits = torch.randint(2, (request.n_samples, request.problem.n_spins), generator=generator)
        return Draw(2 * bits - 1)


def batching(seeds: tuple[int, ...]) -> list[dict]:
    """Trips and wall seconds of N requests: by the broker, and call by call."""
    records = []
    for case in ("one problem", "N problems"):
        for n in N_REQUESTS:
            for seed in seeds:
                requests = draw_requests(n, seed, is_shared=case == "one problem")
                device = FarAway(packs_problems=case == "N problems")
                broker = Broker(device)
                started = time.perf_counter()
                for request in requests:
                    broker.submit(request)
                broker.dispatch(step=0)
                n_answers = len(broker.collect(step=0))
                together = time.perf_counter() - started
                one_by_one = FarAway(packs_problems=False)
                started = time.perf_counter()
                for request in requests:
                    one_by_one.sample(request)
                alone = time.perf_counter() - started
                records.append(
                    {
                        "case": case,
                        "n": n,
                        "answers": n_answers,
                        "broker trips": device.n_trips,
                        "single trips": one_by_one.n_trips,
                        "broker": together,
                        "single": alone,
                    }
                )
    return records


def draw_requests(n: int, seed: int, *, is_shared: bool) -> list[SamplingRequest]:
    problem = tiny_problems(torch.float32)["bipartite-3x5"]
    generator = torch.Generator().manual_seed(seed)
    problems: list[IsingModel] = [problem] * n
    if not is_shared:
        problems = [replace(problem, h=torch.randn(problem.n_spins, generator=generator)) for _ in range(n)]
    return [SamplingRequest(p, N_SAMPLES, seed=1000 * seed + k) for k, p in enumerate(problems)]


def batching_table(records: list[dict]) -> list[str]:
    lines = [
        "## Merging and packing",
        "",
        f"N requests of {N_SAMPLES} samples of 8 spins each, submitted in one interval to a device that sleeps "
        f"{1e3 * TRIP_SECONDS:g} ms per trip and {1e6 * SAMPLE_SECONDS:g} µs per sample. Requests of one problem are "
        "merged: the samples are still all drawn. Different problems are packed side by side into one, for a device "
        "with `traits.packs_problems`: one read serves all of them, as long as they fit. Wall time in ms, median "
        "(least to largest).",
        "",
        "| requests | N | trips: broker / one by one | broker, ms | one by one, ms | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for case in ("one problem", "N problems"):
        for n in N_REQUESTS:
            rows = [r for r in records if (r["case"], r["n"]) == (case, n)]
            trips = {(r["broker trips"], r["single trips"], r["answers"]) for r in rows}
            ((together, alone, _),) = trips
            medians = {way: np.median([r[way] for r in rows]) for way in ("broker", "single")}
            cells = [
                f"{1e3 * medians[way]:.1f} ({1e3 * min(r[way] for r in rows):.1f} to "
                f"{1e3 * max(r[way] for r in rows):.1f})"
                for way in ("broker", "single")
            ]
            ratio = medians["single"] / medians["broker"]
            lines.append(f"| {case} | {n} | {together} / {alone} | {cells[0]} | {cells[1]} | {ratio:.1f} |")
    return [*lines, ""]


def draw_figure(records: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8.0, 3.4), layout="constrained", sharey=True)
    titles = {"one problem": "one problem: merged", "N problems": "N problems: packed"}
    styles = {"single": ("one call each", "#D55E00", "s"), "broker": ("broker", "#0072B2", "o")}
    for ax, case in zip(axes, titles, strict=True):
        for way, (label, color, marker) in styles.items():
            seconds = np.array([[r[way] for r in records if (r["case"], r["n"]) == (case, n)] for n in N_REQUESTS])
            middle = 1e3 * np.median(seconds, axis=1)
            reach = np.abs(1e3 * np.array([seconds.min(1), seconds.max(1)]) - middle)
            ax.errorbar(N_REQUESTS, middle, reach, label=label, color=color, marker=marker, capsize=2, linewidth=1.5)
        ax.set(title=titles[case], xscale="log", yscale="log", xlabel="requests in one interval", xticks=N_REQUESTS)
        ax.set_xticklabels(N_REQUESTS)
        ax.minorticks_off()
        ax.set_yticks([20, 50, 100, 200, 500, 1000], [20, 50, 100, 200, 500, 1000])
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("wall time (ms)")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def repair_table() -> list[str]:
    problem = tiny_problems(torch.float32)["bipartite-3x5"]
    target = Distribution.boltzmann(problem, 1.0)
    ratio = TRUE_BETA / BELIEVED_BETA
    hot = Distribution.boltzmann(problem, ratio)
    noise = np.sqrt((1 - target.mean**2) / N_DRAWS).max()
    lines = [
        "## What each layer repairs",
        "",
        f"A device of 8 bits at an inverse temperature of {TRUE_BETA} where {BELIEVED_BETA:g} is believed, with a "
        f"field of {Device().bias} added to every spin in its own units; {N_DRAWS:,} samples of 8 spins, exact "
        f"but for these faults. Largest error of a mean spin; one standard error is {noise:.4f}. Compared with the "
        f"distribution at beta = 1, which is requested, and at {ratio:.2f}, which is left when only the field is gone.",
        "",
        "| outermost layer | error at beta = 1 | error at the device's own beta | effective beta measured |",
        "|---|---|---|---|",
    ]
    for layer, batch in answers_by_layer(problem, N_DRAWS).items():
        beta = batch.info.get("effective_beta") if "Calibrated" in layer or "Polished" in layer else None
        shown = "" if beta is None else f"{beta:.3f}"
        lines.append(f"| {layer} | {worst_mean(batch, target):.4f} | {worst_mean(batch, hot):.4f} | {shown} |")
    return [*lines, ""]


def describe_machine() -> str:
    info = Path("/proc/cpuinfo")
    models = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if (info.exists())
        else [platform.processor() or platform.machine()]
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()
    return (
        f"{models[0]}, {os.cpu_count()} cores, torch on {torch.get_num_threads()} thread, load average at the start "
        f"{os.getloadavg()[0]:.1f}; Python {platform.python_version()}, scvi-tools {scvi.__version__}, torch "
        f"{torch.__version__}, numpy {np.__version__}; commit {commit}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sampling-output"), help="folder for the figure")
    parser.add_argument("--quick", action="store_true", help="one repetition; the report goes to the output folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    seeds = SEEDS[:1] if options.quick else SEEDS
    lines = [
        "# What the sampling layer saves and repairs",
        "",
        f"Written by `{Path(__file__).name}`. {describe_machine()} Seeds: {', '.join(map(str, seeds))} for the "
        "requests, 1 to 3 for the repaired device.",
        "",
    ]
    records = batching(seeds)
    draw_figure(records, options.out / "batching.png")
    lines += batching_table(records) + repair_table()
    report = "\n".join(lines)
    (options.out if options.quick else HERE).joinpath("SAMPLING.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
