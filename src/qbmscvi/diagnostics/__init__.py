"""What can be said about a prior and its samples: log Z with its error."""

from __future__ import annotations

from qbmscvi.diagnostics._partition import LogPartition, estimate_log_z, log_mean_exp

__all__ = ["LogPartition", "estimate_log_z", "log_mean_exp"]
