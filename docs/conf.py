"""Configuration of the site, for ``make docs``.

The source folder is the repository itself, so that pages, tutorials, reports and changelog stand where a reader of the
repository looks for them, and every relative link between them works in both places.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from sphinx.util import logging

if TYPE_CHECKING:
    from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import list_messages  # noqa: E402

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels put figures on the page; another backend, which the caller may have set, would draw them nowhere.
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
# Progress bars of training are of no use on a page. Tutorials run in processes of their own, so this is how they know.
os.environ.setdefault("TQDM_DISABLE", "1")

project = "qbmscvi"
author = "qbmscvi developers"
copyright = f"2026, {author}"
release = installed_version("qbmscvi")
version = release

extensions = [
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
]
root_doc = "docs/index"
include_patterns = ["docs/**", "tutorials/*.ipynb", "benchmarks/*.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [
    "docs/_*",
    "docs/generated/messages.md",
    ".*",
    "build",
    "dist",
    "src",
    "tests",
    "**/.ipynb_checkpoints",
]
templates_path = [str(HERE / "_templates")]

# -- pages and tutorials ------------------------------------------------------
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = os.environ.get("QBMSCVI_DOCS_EXECUTION", "cache")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

# -- API reference ------------------------------------------------------------
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = False
# What is returned is told in prose here; its type stands in the signature.
napoleon_custom_sections = ["Returns"]
suppress_warnings = ["config.cache"]  # that `own_members` below cannot be pickled

# Without the inventories of other projects their names stay plain text; the build needs no network.
intersphinx_mapping = (
    {
        "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
        "matplotlib": ("https://matplotlib.org/stable/", None),
        "networkx": ("https://networkx.org/documentation/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/docs/", None),
        "python": ("https://docs.python.org/3", None),
        "scvi": ("https://docs.scvi-tools.org/en/stable/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
    }
    if os.environ.get("READTHEDOCS")
    else {}
)

# -- looks --------------------------------------------------------------------
html_theme = "sphinx_book_theme"
html_title = project
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]
html_theme_options = {
    "repository_url": "https://github.com/qbmscvi/qbmscvi",
    "use_repository_button": True,
    "use_download_button": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": False,
    "navbar_persistent": [],  # the search stands in the sidebar
}


def own_members(fullname: str) -> list[str]:
    """Public members of a class that this package defines, inherited ones included; not those of its hosts."""
    module, name = fullname.rsplit(".", 1)
    cls = getattr(importlib.import_module(module), name)
    found = {}
    for base in reversed(cls.__mro__):
        for member, value in vars(base).items():
            is_described = inspect.isroutine(value) or isinstance(value, property | classmethod | staticmethod)
            if not member.startswith("_") and is_described:
                is_ours = base.__module__.startswith("qbmscvi")
                found[member] = (is_ours and bool(inspect.getdoc(getattr(base, member)))) or (
                    found.get(member, False) and is_ours
                )
    return sorted(member for member, is_ours in found.items() if is_ours)


autosummary_context = {"own_members": own_members}


def write_messages(app: Sphinx) -> None:
    """Write the list that `errors.md` includes."""
    target = HERE / "generated" / "messages.md"
    target.parent.mkdir(exist_ok=True)
    if not target.exists() or target.read_text() != list_messages.page():
        target.write_text(list_messages.page())


def warn_of_missing_figures(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Warn, which ends the build, of a tutorial that draws and has no figure on its page."""
    if docname.startswith("tutorials/") and app.config.nb_execution_mode != "off":
        draws = any(".pl." in node.astext() for node in doctree.findall(nodes.literal_block))
        if draws and not any(doctree.findall(nodes.image)):
            logging.getLogger(__name__).warning("%s draws figures, and none is on the page", docname)


def setup(app: Sphinx) -> None:
    """Register what is done beside the ordinary build."""
    app.connect("builder-inited", write_messages)
    app.connect("doctree-resolved", warn_of_missing_figures)
