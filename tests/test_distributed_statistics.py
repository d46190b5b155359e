"""Training in two processes has the distribution of training in one."""

from __future__ import annotations

import numpy as np
import pytest
from processes import run_script
from scipy import stats

N_SEEDS, N_FAULTY_SEEDS = 8, 4
ALPHA = 1e-3  # of a comparison, all of its statistics together
FAULTS = ("one shard", "unshared chains")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, np.ndarray]:
    """Moments and held-out ELBO of runs, shape ``(n_seeds, n_statistics)``, by what was done."""
    folder = tmp_path_factory.mktemp("runs")
    run_script("rank_statistics.py", folder, "1", str(N_SEEDS), "none", timeout=900)
    run_script("rank_statistics.py", folder, "2", str(N_SEEDS), "none", timeout=1800)
    run_script("rank_statistics.py", folder, "2", str(N_FAULTY_SEEDS), *FAULTS, timeout=1800)
    return {file.stem: np.load(file) for file in folder.glob("*.npy")}


def standard_error(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.sqrt(first.var(axis=0, ddof=1) / len(first) + second.var(axis=0, ddof=1) / len(second))


def p_value(first: np.ndarray, second: np.ndarray) -> float:
    """Of equal distributions, hence equal variances (Student's t), for all statistics together (Bonferroni)."""
    return min(1.0, first.shape[1] * stats.ttest_ind(first, second, axis=0).pvalue.min())


@pytest.mark.slow
def test_two_processes_have_the_distribution_of_one(runs):
    """First and second moments of the prior and the held-out ELBO, over eight seeds; familywise alpha 1e-3."""
    one, two = runs["1-none"], runs["2-none"]
    assert one.shape == two.shape == (N_SEEDS, 25)
    assert len(np.unique(one[:, -1])) == len(np.unique(two[:, -1])) == N_SEEDS
    assert p_value(one, two) > ALPHA
    # what the comparison can see
    error = standard_error(one, two)
    assert error[:-1].max() < 0.2
    assert error[-1] < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_distributed_training_are_seen(runs, fault):
    """Processes that all read one half of a sorted file, and negative phases that stay in the first process."""
    assert p_value(runs["1-none"], runs[f"2-{fault}"]) < ALPHA
