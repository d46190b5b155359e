"""Run scvi-tools' own tests of SCVI with QBMSCVI in its place.

    python tests/scvi_suite.py [--tests FOLDER] [arguments of pytest]

The tests come from the source distribution of the installed scvi-tools, which pip downloads, unless FOLDER is one that
is unpacked already. Tests that cannot pass are listed here with the reason. They are strict: one that passes fails the
run, and so does a name that no longer exists.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

FILES = [
    "tests/model/test_scvi.py",
    "tests/model/test_models_with_minified_data.py",
    "tests/model/test_differential.py",
    "tests/model/test_differential_abundance.py",
    "tests/train",
    "tests/criticism",
    "tests/dataloaders/test_dataloaders.py",
    "tests/dataloaders/test_datasplitter.py",
]

_SCANVI = "needs the weights of a Gaussian latent space: ends in SCANVI.from_scvi_model, which fails with any other"
EXEMPT = {
    "test_scanvi_from_scvi": _SCANVI,
    "test_anncollection": _SCANVI,
    "test_scvi_n_obs_error": "expects the error of a last batch of one cell, which is left out here",
}


class Substitution:
    """Pytest plugin that marks the exempt tests."""

    def __init__(self, exempt: dict[str, str], is_whole: bool) -> None:
        self.exempt = exempt
        self.is_whole = is_whole

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = set()
        for item in items:
            # A name with a bracket is the beginning of that of one case; others stand for all cases of a test.
            for name in self.exempt:
                if item.originalname == name or ("[" in name and item.name.startswith(name)):
                    found.add(name)
                    item.add_marker(pytest.mark.xfail(reason=self.exempt[name], strict=True))
        unknown = sorted(set(self.exempt) - found)
        if self.is_whole and unknown:
            msg = f"scvi-tools {version('scvi-tools')} has no test {', '.join(unknown)}: take it off the list."
            raise pytest.UsageError(msg)


def download(folder: Path) -> Path:
    """Fetch and unpack the source distribution of the installed scvi-tools."""
    options = ["--no-deps", "--no-binary", ":all:", "--ignore-requires-python", "--quiet", "--dest", str(folder)]
    spec = f"scvi-tools=={version('scvi-tools')}"
    subprocess.run([sys.executable, "-m", "pip", "download", *options, spec], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run scvi-tools' tests of SCVI with QBMSCVI in its place.")
    parser.add_argument("--tests", type=Path, help="unpacked source distribution of scvi-tools (default: download it)")
    arguments, for_pytest = parser.parse_known_args()
    for_pytest = ["-q", "-p", "no:cacheprovider", "-W", "ignore", *for_pytest]

    import scvi.model

    from qbmscvi import QBMSCVI

    scvi.model.SCVI = QBMSCVI  # before the tests say `from scvi.model import SCVI`
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(arguments.tests.resolve() if arguments.tests else download(Path(folder)))  # for relative paths
        sys.path.insert(0, os.getcwd())
        # Files of the caller's own choice, or all of ours.
        is_whole = not any(word.startswith("tests/") or word == "-k" for word in for_pytest)
        files = FILES if not any(word.startswith("tests/") for word in for_pytest) else []
        try:
            return int(pytest.main([*for_pytest, *files], plugins=[Substitution(EXEMPT, is_whole)]))
        finally:
            os.chdir(Path(__file__).parent)


if __name__ == "__main__":
    raise SystemExit(main())
