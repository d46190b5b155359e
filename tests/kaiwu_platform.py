"""What is behind the stand-in of the Kaiwu SDK, seen from this side: an interpreter that has it, and its folder."""

from __future__ import annotations

import json
import venv
from pathlib import Path

import numpy as np

TRUE_BETA = 2.0  # of the stand-in, where the largest coupling of the range counts as one
SECRETS = {
    "KAIWU_USER_ID": "user-77",
    "KAIWU_SDK_CODE": "sdk-code-of-the-stand-in",
    "KAIWU_PROJECT_NO": "project-9",
}


def make_interpreter(folder: Path) -> Path:
    """Make an environment that has the stand-in and numpy, and not this package."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    packages = next(folder.glob("lib/python*/site-packages"))
    standin = Path(__file__).parent / "kaiwu_standin"
    (packages / "standin.pth").write_text(f"{standin}\n{Path(np.__file__).parent.parent}\n")
    return folder / "bin" / "python"


class Platform:
    """The folder behind the stand-in."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder

    def environment(self, interpreter: Path) -> dict[str, str]:
        """Variables for the worker."""
        return {"KAIWU_STANDIN": str(self.folder), "KAIWU_PYTHON": str(interpreter), **SECRETS}

    def plan(self, *faults) -> None:
        (self.folder / "plan.json").write_text(json.dumps(faults))

    def compute_for(self, n_polls: int) -> None:
        (self.folder / "polls.json").write_text(json.dumps(n_polls))

    def finish_jobs(self) -> None:
        done = {name: {**job, "polls_left": 0} for name, job in self.jobs.items()}
        (self.folder / "jobs.json").write_text(json.dumps(done))

    def calls(self, what="solve") -> list[dict]:
        path = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in calls if call["what"] == what]

    @property
    def jobs(self) -> dict:
        path = self.folder / "jobs.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def has_heard_telemetry(self) -> bool:
        return (self.folder / "telemetry.log").exists()
