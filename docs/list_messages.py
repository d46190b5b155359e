"""List the messages of the package for the site: what it raises and what it warns of, by the rows of `docs/errors.md`.

``conf.py`` writes the list into `docs/generated/`, so that a search for a message on the site finds `docs/errors.md`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "qbmscvi"
TABLE = (Path(__file__).parent / "errors.md").read_text()


def messages() -> dict[str, list[str]]:
    """Messages by module, in the order of the source; what is filled in at run time is written as an ellipsis."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        texts = [text for node in ast.walk(ast.parse(path.read_text())) for text in _texts(node)]
        if texts:
            found[name] = list(dict.fromkeys(texts))
    return found


def rows(table: str = TABLE) -> dict[str, tuple[list[str], str]]:
    """Modules and links by subject, from the table of `docs/errors.md`."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    return {about: (re.findall(r"`([\w.]+)`", modules), links) for about, modules, links in cells[1:]}


def subject(module: str) -> str:
    """Subject of a module's messages: the row that names the module, or else the nearest folder that contains it."""
    found = {name: about for about, (names, _) in rows().items() for name in names}
    while module not in found:
        module, dot, _ = module.rpartition(".")
        if not dot:
            msg = "docs/errors.md has no row for the messages of a module: name it, or its folder, in one row."
            raise LookupError(msg)
    return found[module]


def page() -> str:
    """Return the list in Markdown."""
    listed = messages()
    parts = []
    for about, (_, links) in rows().items():
        texts = [text for module in listed if subject(module) == about for text in listed[module]]
        if texts:
            parts += [f"### {about[0].upper()}{about[1:]}", "", f"Read on: {links}.", ""]
            parts += [*(f"- {_escaped(text)}" for text in dict.fromkeys(texts)), ""]
    return "\n".join(parts)


def _texts(node: ast.AST) -> list[str]:
    candidates: list[ast.expr] = []
    if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "msg" for t in node.targets):
        candidates = [node.value]
    elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        candidates = node.exc.args[:1]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "warn":
        candidates = node.args[:1]
    return [text for text in map(_template, candidates) if any(letter.isalpha() for letter in text)]


def _template(value: ast.expr) -> str:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
    if isinstance(value, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in value.values)
    return ""


def _escaped(text: str) -> str:
    """Keep code in backticks, and everything else from being read as Markdown."""
    parts = " ".join(text.split()).split("`")
    for i in range(0, len(parts), 2):
        for sign in "\\*_[]<>$":
            parts[i] = parts[i].replace(sign, f"\\{sign}")
    return "`".join(parts)
