"""Examples in docstrings run as they stand and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from typing import TYPE_CHECKING

import pytest
from tables import over

import qbmscvi

if TYPE_CHECKING:
    from types import ModuleType


class SilentExpectation(doctest.OutputChecker):
    """What is said to be printed must be; an example that says nothing may print, a progress bar for instance."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def modules() -> list[ModuleType]:
    """Every module of the package but its commands."""
    names = [found.name for found in pkgutil.walk_packages(qbmscvi.__path__, "qbmscvi.")]
    return [qbmscvi, *(importlib.import_module(name) for name in names if not name.endswith("__main__"))]


EXAMPLES = [test for module in modules() for test in doctest.DocTestFinder().find(module) if test.examples]


def failures(test: doctest.DocTest) -> list[str]:
    """What went wrong, in doctest's words."""
    said: list[str] = []
    doctest.DocTestRunner(SilentExpectation(), verbose=False).run(test, out=said.append)
    return said


@over("test", EXAMPLES)
def test_example_runs_and_prints_what_it_says(test: doctest.DocTest) -> None:
    assert failures(test) == []


def test_examples_are_found_where_they_stand() -> None:
    names = {test.name for test in EXAMPLES}
    assert {
        "qbmscvi.model._qbmscvi.QBMSCVI",
        "qbmscvi.datasets.synthetic_counts",
        "qbmscvi.samplers.testing._check.check_sampler",
    } <= names


@over(
    ("example", "is_good"),
    [
        pytest.param(">>> 1 + 1\n2\n", True, id="good"),
        pytest.param(">>> print('a bar')\n", True, id="prints-beside"),
        pytest.param(">>> 1 + 1\n3\n", False, id="wrong-result"),
        pytest.param(">>> qbmscvi.QBMSCVI.setup_anndata(None, batch='batch')\n", False, id="wrong-argument"),
    ],
)
def test_planted_mistakes_are_found(example: str, is_good: bool) -> None:
    test = doctest.DocTestParser().get_doctest(example, {"qbmscvi": qbmscvi}, "planted", None, None)
    assert (failures(test) == []) is is_good
