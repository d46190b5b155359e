"""Comparisons of latent representations, and of the models that make them."""

from __future__ import annotations

from ._compare import compare, read_records
from ._metrics import score_latent
from ._models import MODEL_NAMES, Fit, Task
from ._statistics import PairedDifference, PooledDifference, paired_difference, pooled_difference

__all__ = [
    "MODEL_NAMES",
    "Fit",
    "PairedDifference",
    "PooledDifference",
    "Task",
    "compare",
    "paired_difference",
    "pooled_difference",
    "read_records",
    "score_latent",
]
