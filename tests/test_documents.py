"""README, pages and tutorials run as they stand.

Fences marked ``no-run`` are commands for a shell, or say why they cannot run; those in braces are directives.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from tables import over

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Names and arguments in them are checked by test_signatures.py; `make tutorials` and the site run them.
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
# The page of the benchmark compiles scIB's scores for half a minute; test_compare.py runs what it shows.
RUNNING = [
    pytest.param(page, id=page.stem, marks=pytest.mark.slow if page.stem == "benchmark" else [])
    for page in PAGES
    if "```" in page.read_text()
]
INTERVAL = re.compile(r"([-+]?\d+\.\d+)[^().\d]*\(([-+]?\d+\.\d+)\s+to\s+([-+]?\d+\.\d+)\)")
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def run_fences(text: str, name: str) -> None:
    namespace: dict = {}
    for match in FENCE.finditer(text):
        info = match["info"].strip()
        is_directive = info.startswith("{")
        assert info == "python" or info.endswith("no-run") or is_directive, f"fence {info!r} neither runs nor says why"
        if info == "python":
            exec(compile(match["code"], name, "exec"), namespace)
    plt.close("all")


def code_cells(notebook: dict) -> list[str]:
    """Code of a notebook that is stored without outputs."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert [cell["outputs"] for cell in cells if cell["outputs"]] == []
    return ["".join(cell["source"]) for cell in cells]


def run_cells(notebook: dict, name: str) -> None:
    namespace: dict = {}
    for number, code in enumerate(code_cells(notebook)):
        exec(compile(code, f"{name}:{number}", "exec"), namespace)
    plt.close("all")


@pytest.mark.parametrize("page", RUNNING)
def test_python_fences_of_a_page_run_in_order(page: Path) -> None:
    run_fences(page.read_text(), str(page))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook: Path) -> None:
    run_cells(json.loads(notebook.read_text()), notebook.name)


@over("notebook", NOTEBOOKS)
def test_notebook_compiles_and_is_stored_without_outputs(notebook: Path) -> None:
    for code in code_cells(json.loads(notebook.read_text())):
        compile(code, notebook.name, "exec")


def test_planted_mistakes_are_found() -> None:
    good = "```python\nx = 1\n```\n\n```bash no-run\nmake\n```\n\n```python\nassert x == 1\n```\n"
    run_fences(good, "page")
    for bad, error in [
        (good.replace("x == 1", "x == 2"), AssertionError),
        (good.replace("x = 1", "import qbmscvi; x = qbmscvi.SamplingSchedule(n_sweep=1)"), TypeError),
        (good.replace("bash no-run", "bash"), AssertionError),
    ]:
        with pytest.raises(error):
            run_fences(bad, "page")
    cell = {"cell_type": "code", "source": ["x = 1\n", "x"], "outputs": []}
    run_cells({"cells": [cell]}, "notebook")
    with pytest.raises(NameError):
        run_cells({"cells": [cell, {**cell, "source": ["y"]}]}, "notebook")
    with pytest.raises(AssertionError):
        run_cells({"cells": [{**cell, "outputs": [{}]}]}, "notebook")


def dead_links(text: str, folder: Path) -> list[str]:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    return [target for target in targets if not (folder / target).exists()]


def test_relative_links_of_a_page_lead_somewhere() -> None:
    assert [(page.name, link) for page in PAGES for link in dead_links(page.read_text(), page.parent)] == []
    assert dead_links("[a](README.md#top), [b](docs/none.md), [c](https://none.org)", ROOT) == ["docs/none.md"]


def intervals_without_a_source(text: str) -> list[tuple[str, ...]]:
    """Differences with an interval that no table of the benchmarks has, in either direction, to the stated digits."""
    folder = ROOT / "benchmarks"
    tables = [(folder / name).read_text() for name in ("LABEL_TRANSFER.md", "LEVERS.md", "PER_TYPE.md", "PRIOR.md")]
    known = [[float(number) for number in match] for table in tables for match in INTERVAL.findall(table)]
    for row in csv.DictReader((folder / "results" / "differences.csv").open()):
        known.append([float(row[name]) for name in ("mean", "low", "high")])
    known += [[-mean, -high, -low] for mean, low, high in known]

    def is_known(stated: tuple[str, ...]) -> bool:
        half_a_digit = 0.5001 * 10 ** -len(stated[0].partition(".")[2])
        return any(all(abs(float(a) - b) <= half_a_digit for a, b in zip(stated, row, strict=True)) for row in known)

    return [stated for stated in INTERVAL.findall(text) if not is_known(stated)]


CLAIMING = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("annotation", "comparison", "settings"))]


@over("page", CLAIMING)
def test_intervals_of_a_page_are_those_of_the_tables(page: Path) -> None:
    text = page.read_text()
    assert INTERVAL.findall(text)
    assert intervals_without_a_source(text) == []
    first = INTERVAL.search(text)
    for number in first.groups():
        wrong = first[0].replace(number, f"{number[:-1]}{(int(number[-1]) + 5) % 10}", 1)
        assert len(intervals_without_a_source(wrong)) == 1


def claims_that_hold_zero(text: str) -> list[str]:
    """Intervals that hold zero, but for those of a table whose other intervals are bold; and bold ones that do."""
    wrong = []
    for match in INTERVAL.finditer(text):
        line = text[text.rfind("\n", 0, match.start()) + 1 :].partition("\n")[0]
        is_bold = text[max(match.start() - 2, 0) : match.start()] == "**"
        holds_zero = float(match[2]) <= 0.0 <= float(match[3])
        if holds_zero if is_bold or not line.startswith("|") else not holds_zero and "**" in line:
            wrong.append(match[0])
    return wrong


@over("page", CLAIMING)
def test_no_claim_of_a_page_has_an_interval_that_holds_zero(page: Path) -> None:
    assert claims_that_hold_zero(page.read_text()) == []


def test_a_claim_whose_interval_holds_zero_is_found() -> None:
    assert claims_that_hold_zero("it is better, 0.01 (-0.01 to 0.03)") == ["0.01 (-0.01 to 0.03)"]
    assert claims_that_hold_zero("| total | **+0.01 (-0.01 to +0.03)** |") == ["+0.01 (-0.01 to +0.03)"]
    assert claims_that_hold_zero("| total | +0.01 (-0.01 to +0.03) | **-2.0 (-3.0 to -1.0)** |") == []


def test_every_citation_has_an_entry() -> None:
    entries = set(re.findall(r"^@\w+\{(\w+),", (ROOT / "docs" / "references.bib").read_text(), re.MULTILINE))
    cited = set()
    for source in (ROOT / "src").rglob("*.py"):
        cited |= set(re.findall(r":cite:p:`(\w+)`", source.read_text()))
    assert cited
    assert cited <= entries


def test_actions_are_pinned_by_commit_and_a_commit_has_one_version() -> None:
    versions: dict[str, set[str]] = {}
    for workflow in (ROOT / ".github" / "workflows").glob("*.yaml"):
        for line in re.findall(r"uses: (.+)", workflow.read_text()):
            action, version = re.fullmatch(r"([\w./-]+@[0-9a-f]{40}) # (v[\d.]+)", line).groups()
            versions.setdefault(action, set()).add(version)
    assert versions
    assert all(len(found) == 1 for found in versions.values())
    assert len({action.split("@")[0] for action in versions}) == len(versions)
