"""Weights of modes: how the prior's chains are run while it is fitted to codes, and what that does to shares of types.

    python benchmarks/mixing.py --data ../shared/data
    python benchmarks/mixing.py --table-only

One model is trained for each data set and seed. Its codes are then fitted anew, from independent spins, in these ways:

- *persistent chains*: 512 chains that start as codes, the parameters of the last step;
- *running mean*: the same chains, and the running mean of the parameters over some 100 steps;
- *tempered end*: the same, and chains exchange states with replicas in the last eighth of fewer steps, 1,700 (what
  ``fit_prior`` does);
- *parallel tempering*: replicas of 256 chains at eight temperatures, with the running mean and without;
- *trajectory tempering*: replicas of 256 chains at earlier parameters of the same fit. The current parameters become a
  rung whenever the exchange with the last rung falls below .25 (arXiv 2607.27077).

``share error`` is the total variation between the shares of types among the codes of training cells and among samples
of the fitted prior: 4,000 chains from random spins, 1,000 sweeps, types read by logistic regression on codes. Between
codes of training and of held-out cells it is the error of the samples alone. ``KL`` is of held-out codes, in nats per
cell, with log Z by annealed importance sampling. CPU seconds are of the fit.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scvi
import torch
from results import DATA_SETS, load
from sklearn.linear_model import LogisticRegression
from study import run_study

from qbmscvi import QBMSCVI, SamplingSchedule
from qbmscvi.benchmark import pooled_difference
from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.ising import IsingModel
from qbmscvi.boltzmann.posterior import FactorialPosterior
from qbmscvi.boltzmann.prior import BoltzmannPrior
from qbmscvi.samplers import (
    BlockGibbsSampler,
    Draw,
    ParallelTemperingSampler,
    Sampler,
    SamplerTraits,
    SamplingRequest,
)
from qbmscvi.train._prior_fit import Codes, fit_to_codes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from pathlib import Path

N_TEMPERED = 256
LEAST_EXCHANGE = 0.25


class TrajectoryTempering(Sampler):
    """Replica exchange with earlier problems, all rungs asked of block Gibbs in one batch."""

    traits = SamplerTraits(is_persistent=True)

    def __init__(self) -> None:
        self.rungs: list[IsingModel] = []
        self.states: list[torch.Tensor] = []
        self.exchange = 1.0

    def _sample(self, request: SamplingRequest, seed: int) -> Draw:
        problems = [*self.rungs, request.problem]
        states = [*self.states, request.initial_spins]
        requests = [
            replace(request, problem=problem, initial_spins=spins, seed=seed + i)
            for i, (problem, spins) in enumerate(zip(problems, states, strict=True))
        ]
        states = [batch.spins for batch in BlockGibbsSampler().sample_batch(requests)]
        generator = torch.Generator().manual_seed(seed)
        share = 1.0
        for i in range(len(problems) - 1):
            low, high = problems[i], problems[i + 1]
            a, b = states[i], states[i + 1]
            gain = low.energy(a) + high.energy(b) - low.energy(b) - high.energy(a)
            swap = torch.rand(len(a), generator=generator).log() < gain
            states[i], states[i + 1] = torch.where(swap[:, None], b, a), torch.where(swap[:, None], a, b)
            share = float(swap.float().mean())
        self.states, cold = states[:-1], states[-1]
        self.exchange = 0.9 * self.exchange + 0.1 * share
        if not self.rungs or self.exchange < LEAST_EXCHANGE:
            self.rungs.append(request.problem)
            self.states.append(cold.clone())
            self.exchange = 1.0
        return Draw(cold, {"n_rungs": len(self.rungs)})


TEMPERED_END = "tempered end"
WAYS = {
    "persistent chains": (BlockGibbsSampler, 512, 0.0),
    "running mean": (BlockGibbsSampler, 512, 0.99),
    TEMPERED_END: (BlockGibbsSampler, 512, 0.99),
    "parallel tempering": (ParallelTemperingSampler, N_TEMPERED, 0.0),
    "parallel tempering, running mean": (ParallelTemperingSampler, N_TEMPERED, 0.99),
    "trajectory tempering": (TrajectoryTempering, N_TEMPERED, 0.0),
    "trajectory tempering, running mean": (TrajectoryTempering, N_TEMPERED, 0.99),
}


def codes_of(logits: np.ndarray) -> Codes:
    return Codes(FactorialPosterior(torch.from_numpy(logits)))


def measure(name: str, seed: int, options: argparse.Namespace, done: list[dict]) -> Iterator[dict]:
    if len(done) == 1 + len(WAYS):
        return
    keys = DATA_SETS[name]
    adata = load(name, options.data, options.n_genes, options.max_cells)
    scvi.settings.seed = seed
    QBMSCVI.setup_anndata(adata, batch_key=keys.get("batch_key"))
    model = QBMSCVI(adata)
    model.train(max_epochs=options.epochs, train_size=0.8, accelerator="cpu", fit_prior=False)
    training, held_out = (
        model.get_latent_representation(indices=rows, representation="logits")
        for rows in (model.train_indices, model.validation_indices)
    )
    labels = adata.obs[keys["label_key"]].astype(str).to_numpy()[model.train_indices]
    torch.manual_seed(seed)
    classifier = LogisticRegression(C=0.1, max_iter=500)
    draws = codes_of(training).posterior.sample((3,)).flatten(0, 1).numpy()
    classifier.fit(draws, np.tile(labels, 3))

    def shares(spins: np.ndarray) -> np.ndarray:
        predicted = classifier.predict(spins)
        return np.array([(predicted == label).mean() for label in classifier.classes_])

    expected = shares(codes_of(training).posterior.sample().numpy())
    found = shares(codes_of(held_out).posterior.sample().numpy())
    yield {"way": "held-out codes", "share error": 0.5 * np.abs(found - expected).sum()}
    for way, (build, n_chains, memory) in WAYS.items():
        torch.manual_seed(seed)
        prior = BoltzmannPrior(graphs.bipartite(64, 64), n_hidden=64, n_chains=n_chains)
        with torch.no_grad():
            prior.h[:64] = -torch.atanh(torch.tanh(torch.from_numpy(training) / 2).mean(0).clamp(-0.98, 0.98))
        sampler, started = build(), time.process_time()
        fit = fit_to_codes(
            prior,
            codes_of(training),
            codes_of(held_out),
            sampler=sampler,
            schedule=None if way == TEMPERED_END else SamplingSchedule(every_n_steps=1, n_sweeps=2, latency=0),
            n_steps=1_700 if way == TEMPERED_END else options.n_steps,
            seed=seed,
            memory=memory,
        )
        seconds = time.process_time() - started
        problem = prior.to_ising()
        samples = BlockGibbsSampler().sample(SamplingRequest(problem, 4_000, n_sweeps=1_000, seed=seed)).spins
        found = shares(samples[:, :64].numpy())
        yield {
            "way": way,
            "share error": 0.5 * np.abs(found - expected).sum(),
            "KL": fit.kl,
            "log Z": fit.log_z.value,
            "log Z scale": fit.log_z.scale,
            "CPU seconds": seconds,
            "rungs": len(getattr(sampler, "rungs", [])),
        }


def write_table(records: pd.DataFrame, path: Path) -> None:
    ways = ["held-out codes", *WAYS]
    columns = ["share error", "KL", "CPU seconds", "rungs"]
    lines = [
        "# Weights of modes",
        "",
        "How shares of types among samples of the fitted prior depend on the way it was fitted. See",
        "`benchmarks/mixing.py`, which wrote this page. Means over data sets, with Student's t interval (95 %) of the",
        "difference to persistent chains over data sets.",
        "",
        f"Data sets: {', '.join(sorted(records['data'].unique()))}; seeds: "
        f"{', '.join(map(str, sorted(records['seed'].unique())))}.",
        "",
        "| way | share error | minus persistent chains | KL | CPU seconds | rungs |",
        "|---|---|---|---|---|---|",
    ]
    reference = records[records["way"] == "persistent chains"].groupby("data")["share error"].mean()
    for way in ways:
        of_sets = records[records["way"] == way].groupby("data")[columns].mean()
        gain = of_sets["share error"] - reference
        found = pooled_difference({name: [value] for name, value in gain.items()})
        interval = f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})" if gain.any() else ""
        cells = [f"{of_sets['share error'].mean():.3f}", interval]
        cells += ["" if of_sets[c].isna().all() else f"{of_sets[c].mean():.2f}" for c in columns[1:]]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    by_set = records.pivot_table(index="way", columns="data", values="share error").reindex(ways)
    lines += ["", "Share error on each set:", "", "| way | " + " | ".join(by_set.columns) + " |"]
    lines.append("|---|" + "---|" * by_set.shape[1])
    lines += [f"| {way} | " + " | ".join(f"{value:.3f}" for value in row) + " |" for way, row in by_set.iterrows()]
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run_study("mixing", __doc__, measure, write_table, epochs=100, n_steps=1_000, n_genes=2_000, max_cells=4_000)
