"""QBMSCVI: scVI with a Boltzmann prior, trained with samples of any Ising sampler."""

from __future__ import annotations

from importlib.metadata import version

# scvi-tools 1.4.2 uses `rich.pretty` without importing it, which rich 15 no longer does on its own; without this
# line `view_anndata_setup` raises AttributeError. Mended upstream in 1.4.3.
import rich.pretty  # noqa: F401

from qbmscvi import benchmark, datasets, diagnostics, distributions, exceptions, graphs, ising, pl, samplers
from qbmscvi._callbacks import SamplingCallback, SamplingSchedule
from qbmscvi._interpretation import PriorModes
from qbmscvi._model import QBMSCVI
from qbmscvi._module import QBMVAE
from qbmscvi._prior import BoltzmannPrior
from qbmscvi._prior_fit import PriorFit
from qbmscvi._scanvi import QBMSCANVI
from qbmscvi._training_plan import QBMTrainingPlan

__version__ = version("qbmscvi")

__all__ = [
    "QBMSCANVI",
    "QBMSCVI",
    "QBMVAE",
    "BoltzmannPrior",
    "PriorFit",
    "PriorModes",
    "QBMTrainingPlan",
    "SamplingCallback",
    "SamplingSchedule",
    "benchmark",
    "datasets",
    "diagnostics",
    "distributions",
    "exceptions",
    "graphs",
    "ising",
    "pl",
    "samplers",
]
