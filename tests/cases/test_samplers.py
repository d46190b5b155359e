"""Samplers of others, samples without weights, and state that outlives a run."""

from __future__ import annotations

import pytest

from qbmscvi.distributions import build_smoothing


def test_an_estimator_that_is_gone_is_an_unknown_name():
    with pytest.raises(ValueError, match="'disarm'.*straight-through.*spike-exponential"):
        build_smoothing("disarm")
