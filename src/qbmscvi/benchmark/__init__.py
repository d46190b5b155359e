"""Comparisons of latent representations."""

from __future__ import annotations

from ._metrics import score_latent

__all__ = ["score_latent"]
