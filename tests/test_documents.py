"""README, pages and tutorials run as they stand.

Fences marked ``no-run`` are commands for a shell, or say why they cannot run; those in braces are directives.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# `make tutorials` and the site run all of them; the default run only the first.
NOTEBOOKS = [
    pytest.param(path, id=path.stem, marks=[] if path.stem == "quickstart" else pytest.mark.slow)
    for path in sorted((ROOT / "tutorials").glob("*.ipynb"))
]
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def fences(page: Path) -> list[tuple[str, str]]:
    return [(m["info"].strip(), m["code"]) for m in FENCE.finditer(page.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_fences_of_a_page_run_in_order(page: Path) -> None:
    namespace: dict = {}
    for info, code in fences(page):
        is_directive = info.startswith("{")
        assert info == "python" or info.endswith("no-run") or is_directive, f"fence {info!r} neither runs nor says why"
        if info == "python":
            exec(compile(code, str(page), "exec"), namespace)
    plt.close("all")


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_runs_and_is_stored_without_outputs(notebook: Path) -> None:
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    namespace: dict = {}
    for number, cell in enumerate(cells):
        assert cell["outputs"] == []
        exec(compile("".join(cell["source"]), f"{notebook.name}:{number}", "exec"), namespace)
    plt.close("all")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_of_a_page_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


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
