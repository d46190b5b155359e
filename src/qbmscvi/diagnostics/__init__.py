"""What can be said about a prior and its samples: log Z with its error, and what a device makes of the prior."""

from __future__ import annotations

from qbmscvi.diagnostics._fidelity import Fidelity, device_fidelity
from qbmscvi.diagnostics._partition import LogPartition, estimate_log_z, log_mean_exp

__all__ = ["Fidelity", "LogPartition", "device_fidelity", "estimate_log_z", "log_mean_exp"]
