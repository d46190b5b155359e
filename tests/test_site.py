"""The site names what the package has: every public name, every module with messages, the layers as they are."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import qbmscvi

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import draw_layers  # noqa: E402
import list_messages  # noqa: E402


def public_names(module_name: str) -> set[str]:
    """What a module exports: ``__all__``, or else the functions and classes that it defines."""
    module = importlib.import_module(module_name)
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_")
            and (inspect.isclass(value) or inspect.isfunction(value))
            and value.__module__ == module_name
        ]
    names = {name for name in names if not inspect.ismodule(getattr(module, name))}
    if module_name.startswith("qbmscvi.boltzmann"):  # described where users meet them
        names -= {*qbmscvi.__all__, *qbmscvi.diagnostics.__all__}
    return names


# `demo` is a command; what it defines is not imported by anybody.
MODULES = [
    "qbmscvi",
    *(
        found.name
        for found in pkgutil.walk_packages(qbmscvi.__path__, "qbmscvi.")
        if "._" not in found.name and found.name != "qbmscvi.demo" and public_names(found.name)
    ),
]


API = (DOCS / "api.md").read_text()


def names_on_the_page(text: str = API) -> dict[str, set[str]]:
    """Names by module in ``docs/api.md``."""
    found = {}
    for block in re.findall(r"^```\{eval-rst\}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        module = re.search(r"currentmodule:: (\S+)", block).group(1)
        listed = re.search(r":toctree: generated\n\n((?:   \S+\n)+)", block).group(1).split()
        constants = re.findall(r"py:data:: (\S+)", block)
        assert len(listed) == len(set(listed))
        found[module] = {*listed, *constants}
    return found


def test_api_page_names_what_the_modules_export_and_nothing_else() -> None:
    exported = {module: public_names(module) for module in MODULES}
    assert names_on_the_page() == exported
    assert names_on_the_page(API.replace("   QBMSCVI\n", "   QBMSCVY\n", 1)) != exported


def without_docstring(module: str) -> list[str]:
    loaded = importlib.import_module(module)
    described = {name: getattr(loaded, name) for name in public_names(module) if callable(getattr(loaded, name))}
    assert described
    return [f"{module}.{name}" for name, value in described.items() if not inspect.getdoc(value)]


def test_public_names_have_a_docstring_of_their_own(monkeypatch) -> None:
    assert [name for module in MODULES for name in without_docstring(module)] == []
    monkeypatch.setattr(qbmscvi.datasets.synthetic_counts, "__doc__", None)
    assert without_docstring("qbmscvi.datasets") == ["qbmscvi.datasets.synthetic_counts"]


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = set()
    for page in DOCS.glob("*.md"):
        for block in re.findall(r"^:::\{toctree\}\n(.*?)^:::", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in filter(None, block.splitlines()):
                if not line.startswith(":"):
                    listed |= {path.resolve() for path in DOCS.glob(f"{line}.md")}
                    listed |= {path.resolve() for path in DOCS.glob(f"{line}.ipynb")}
    pages = [*DOCS.glob("*.md"), *(ROOT / "tutorials").glob("*.ipynb"), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
    assert {path.resolve() for path in pages} - listed == {(DOCS / "index.md").resolve()}


def test_every_message_is_under_one_subject_of_the_page_of_errors() -> None:
    rows = list_messages.rows()
    named = [name for names, _ in rows.values() for name in names]
    assert len(named) == len(set(named))
    assert all(re.search(r"\]\([\w-]+\.md", links) for _, links in rows.values())
    known = {path.relative_to(list_messages.SOURCE).with_suffix("") for path in list_messages.SOURCE.rglob("*.py")}
    known |= {path.parent for path in known}
    assert {Path(*name.split(".")) for name in named} <= known

    listed = list_messages.messages()
    assert len(listed) > 40
    page = list_messages.page()
    assert [
        text for texts in listed.values() for text in texts if f"- {list_messages._escaped(text)}\n" not in page
    ] == []
    assert list_messages.subject("samplers.wrappers._rescaled") != list_messages.subject("samplers._contract")
    with pytest.raises(LookupError, match="no row"):
        list_messages.subject("elsewhere._file")


def test_messages_are_found_in_every_form() -> None:
    texts = list_messages.messages()
    assert any("finds ground states" in text for text in texts["model._generation"])  # f-string
    assert any("no AnnData to be trained on. Pass `datamodule`, or" in text for text in texts["model._qbmscvi"])
    assert any("Block Gibbs answers in its place" in text for text in texts["train._sampling"])  # warning
    assert r"\[0\] `J[i]` \*x\*" in list_messages._escaped("[0] `J[i]` *x*")


def test_picture_of_the_layers_is_that_of_the_import_contract() -> None:
    assert draw_layers.PICTURE.read_text() == draw_layers.draw()
    modules = {path.stem for path in list_messages.SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    drawn = {name for row in draw_layers.layers() for name in row}
    assert drawn == modules - {"__init__", "__pycache__", "py"}
