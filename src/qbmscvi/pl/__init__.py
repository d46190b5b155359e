"""Figures from arrays and tables.

Every function draws on one matplotlib Axes and returns it; none computes an embedding, trains or samples. The exception
is :func:`generated`, which takes cells, embeds them, and draws on one or two Axes. Signatures follow scanpy (``ax``,
``show``, ``save``), except that ``show=None`` does not open a window. No function sets the backend. Colors are those of
Okabe and Ito, which color-blind readers can tell apart; if there are more categories than colors, the marker changes as
well.
"""

from __future__ import annotations

from ._comparisons import difference_forest, score_table
from ._couplings import coupling_matrix
from ._figures import embedding, energy_histogram, training_curves
from ._generated import generated
from ._prior import cell_scores, chain_energies, effective_beta, prior_modes, spin_activity

__all__ = [
    "cell_scores",
    "chain_energies",
    "coupling_matrix",
    "difference_forest",
    "effective_beta",
    "embedding",
    "energy_histogram",
    "generated",
    "prior_modes",
    "score_table",
    "spin_activity",
    "training_curves",
]
