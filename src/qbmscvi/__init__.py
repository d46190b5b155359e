"""QBMSCVI: scVI with a Boltzmann prior, trained with samples of any Ising sampler."""

from __future__ import annotations

from importlib.metadata import version

# scvi-tools 1.4.2 uses `rich.pretty` without importing it, which rich 15 no longer does on its own; without this line
# `view_anndata_setup` raises AttributeError. Fixed upstream in 1.4.3.
import rich.pretty  # noqa: F401

from qbmscvi import benchmark, boltzmann, datasets, diagnostics, exceptions, pl, samplers
from qbmscvi.boltzmann import graphs, ising
from qbmscvi.boltzmann.prior import BoltzmannPrior
from qbmscvi.model._interpretation import PriorModes
from qbmscvi.model._qbmscanvi import QBMSCANVI
from qbmscvi.model._qbmscvi import QBMSCVI
from qbmscvi.module._qbmvae import QBMVAE
from qbmscvi.train._plan import QBMTrainingPlan
from qbmscvi.train._prior_fit import PriorFit
from qbmscvi.train._sampling import SamplingCallback
from qbmscvi.train._schedule import SamplingSchedule

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
    "boltzmann",
    "datasets",
    "diagnostics",
    "exceptions",
    "graphs",
    "ising",
    "pl",
    "samplers",
]
