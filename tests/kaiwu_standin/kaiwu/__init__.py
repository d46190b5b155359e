"""Stand-in for the Kaiwu SDK: the names that the worker uses, and the behavior that its documentation describes.

Written from public documentation and users' reports; nothing of the SDK is copied. The platform is a folder, named by
the environment variable ``KAIWU_STANDIN``, so that jobs outlive the process: ``jobs.json``, ``plan.json`` (faults to
come), ``calls.jsonl`` (what was called, when), ``telemetry.log``. Runs without anything of qbmscvi.
"""

from __future__ import annotations

from . import cim, common, license

__all__ = ["cim", "common", "license"]
