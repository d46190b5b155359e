"""``python -m qbmscvi.samplers``: list the samplers of this machine with their needs, or check one.

Exit codes of ``--check``: 0 it passed; 1 it breaks the contract; 2 it is unknown, or cannot be built or reached.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from qbmscvi.exceptions import QBMSCVIError, SamplerUnavailable
from qbmscvi.samplers import SAMPLER_NAMES, build_sampler
from qbmscvi.samplers.kaiwu._sampler import find_python

_PASSED, _BROKEN, _UNAVAILABLE = 0, 1, 2


def _dwave_state() -> str:
    if find_spec("dwave") is None or find_spec("dwave.system") is None:
        return "not installed: pip install 'qbmscvi[dwave]'"
    from dwave.cloud.config import get_configfile_paths

    named = os.environ.get("DWAVE_CONFIG_FILE")
    has_file = Path(named).exists() if named else bool(get_configfile_paths())
    if has_file or os.environ.get("DWAVE_API_TOKEN"):
        return "installed and configured"
    return "installed, but no account: run `dwave config create`, or set DWAVE_API_TOKEN"


def _kaiwu_state() -> str:
    try:
        find_python()
    except SamplerUnavailable as error:
        return f"not configured: {error}"
    if os.environ.get("KAIWU_USER_ID") and os.environ.get("KAIWU_SDK_CODE"):
        return "configured"
    return "interpreter configured; without KAIWU_USER_ID and KAIWU_SDK_CODE it needs a licence of its own"


_STATES = {"dwave": _dwave_state, "kaiwu": _kaiwu_state}


def describe() -> list[tuple[str, str]]:
    """Name and state of every sampler with a name; no service is contacted."""
    return [(name, _STATES.get(name, lambda: "ready")()) for name in SAMPLER_NAMES]


def check(name: str, n_samples: int) -> int:
    """Check a sampler end to end on tiny problems, and print the findings."""
    from qbmscvi.samplers.testing import SamplerCheckError, check_sampler

    try:
        sampler = build_sampler(name)
    except (QBMSCVIError, ValueError) as error:
        print(f"{name}: cannot be used. {error}", file=sys.stderr)
        return _UNAVAILABLE
    try:
        print(check_sampler(sampler, n_samples=n_samples, betas=(1.0,)))
    except SamplerCheckError as error:
        print(error, file=sys.stderr)
        return _BROKEN
    return _PASSED


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m qbmscvi.samplers", description=__doc__.splitlines()[0])
    parser.add_argument("--check", metavar="NAME", help="test this sampler end to end on tiny problems")
    parser.add_argument("--samples", type=int, default=2000, help="samples per problem of the check (default: 2000)")
    chosen = parser.parse_args(arguments)
    if chosen.check is not None:
        return check(chosen.check, chosen.samples)
    width = max(map(len, SAMPLER_NAMES))
    for name, state in describe():
        print(f"{name:<{width}}  {state}")
    return _PASSED


if __name__ == "__main__":
    sys.exit(main())
