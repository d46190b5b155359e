"""Figures from arrays and tables.

Every function draws on one matplotlib Axes and returns it; none computes an embedding, trains or samples. Signatures
follow scanpy (``ax``, ``show``, ``save``) with one difference: ``show=None`` does not open a window, it leaves that to
the caller or the notebook. The backend is never set. Colors are those of Okabe and Ito, which color-blind readers can
tell apart; where there are more categories than colors, the marker changes as well.
"""

from __future__ import annotations

from ._comparisons import difference_forest, score_table
from ._figures import coupling_matrix, embedding, energy_histogram, training_curves

__all__ = [
    "coupling_matrix",
    "difference_forest",
    "embedding",
    "energy_histogram",
    "score_table",
    "training_curves",
]
