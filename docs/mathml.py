"""Formulas as MathML, which browsers set by themselves: no script, no network, no LaTeX.

latex2mathml translates. What it cannot translate is a warning, which ends ``make docs``. Numbers of equations and
references to them are left out.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)


def translate(node: nodes.math | nodes.math_block, display: str) -> str:
    """Return the formula as an element, or its source, with a warning, where that fails."""
    source = " ".join(node.astext().split())
    try:
        element = convert(source, display=display)
    except Exception as error:  # noqa: BLE001 - its exceptions have no base class of their own
        logger.warning("formula %r: %r", source, error, location=node)
        return f"<code>{escape(source)}</code>"
    if "\\" in element:  # an unknown command comes through as it is
        logger.warning("formula %r has a command that latex2mathml does not know", source, location=node)
    return element


def visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(f'<span class="math">{translate(node, "inline")}</span>')
    raise nodes.SkipNode


def visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    style = "display: block; overflow-x: auto; margin: 1em 0; text-align: center"
    translator.body.append(f'<div class="math" style="{style}">{translate(node, "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer; ``html_math_renderer`` chooses it."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
