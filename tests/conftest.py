"""Fixtures that every test may use. Plain functions (oracles, gates, problems) are in ``laws.py``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch

# Test modules are imported one by one (importlib mode), so the folder of the shared ones has to be named.
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("laws")


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _single_threaded():
    """One torch thread: the problems are tiny, and sums do not depend on the machine. Numba may have changed it."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets, beside the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data sets are not on this machine ({folder})")
    return folder
