"""What is on the other side of the network: jobs, faults, and a record of the calls."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


def place(name):
    return Path(os.environ["KAIWU_STANDIN"]) / name


def load(name, default):
    return json.loads(place(name).read_text()) if place(name).exists() else default


def save(name, value):
    """Write in one piece: others read at any time."""
    place(f"{name}.new").write_text(json.dumps(value))
    place(f"{name}.new").replace(place(name))


def note(what, **facts):
    with place("calls.jsonl").open("a") as file:
        file.write(json.dumps({"what": what, "time": time.monotonic(), "pid": os.getpid(), **facts}) + "\n")


def next_fault():
    """The next planned one, which is then gone; None for none."""
    plan = load("plan.json", [])
    if not plan:
        return None
    place("plan.json").write_text(json.dumps(plan[1:]))
    return plan[0]
