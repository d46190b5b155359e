"""Comparisons of models by their latent representations and generated cells."""

from __future__ import annotations

from ._compare import compare
from ._data import prepare
from ._generation import gap_closed, score_generated, score_real
from ._metrics import score_latent
from ._models import MODEL_NAMES, Fit, Task, available_models
from ._records import read_records
from ._report import METRICS, write_report
from ._statistics import Difference, paired_difference, pooled_difference

__all__ = [
    "METRICS",
    "MODEL_NAMES",
    "Difference",
    "Fit",
    "Task",
    "available_models",
    "compare",
    "gap_closed",
    "paired_difference",
    "pooled_difference",
    "prepare",
    "read_records",
    "score_generated",
    "score_latent",
    "score_real",
    "write_report",
]
