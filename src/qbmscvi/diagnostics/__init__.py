"""Diagnostics of a prior, its samples and its scores: log Z with its error, chains, devices, confounders."""

from __future__ import annotations

from qbmscvi.boltzmann.log_z import LogPartition, estimate_log_z, log_mean_exp
from qbmscvi.diagnostics._chains import MIXED, ChainDiagnostics, chain_diagnostics
from qbmscvi.diagnostics._confounders import RankCorrelation, partial_spearman
from qbmscvi.diagnostics._fidelity import Fidelity, device_fidelity

__all__ = [
    "MIXED",
    "ChainDiagnostics",
    "Fidelity",
    "LogPartition",
    "RankCorrelation",
    "chain_diagnostics",
    "device_fidelity",
    "estimate_log_z",
    "log_mean_exp",
    "partial_spearman",
]
