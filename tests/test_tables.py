"""A table that is gone through in one test fails for each of its entries."""

from __future__ import annotations

import inspect

import pytest
from tables import corners, over


def test_every_bad_case_is_named_and_no_other() -> None:
    @over(("value", "limit"), [pytest.param(1, 2, id="one"), pytest.param(3, 2, id="three"), (4, 2)])
    def below(value: int, limit: int) -> None:
        assert value < limit

    with pytest.raises(AssertionError, match=r"^2 of 3 cases fail:\n\[three\] [^[]*\n\[4, 2\]"):
        below()


def test_a_refusal_that_does_not_come_is_a_finding() -> None:
    @over("call", [lambda: int("a"), pytest.param(lambda: int("1"), id="no error"), pytest.param(dict, id="none")])
    def refused(call) -> None:
        with pytest.raises(ValueError, match="int"):
            call()

    with pytest.raises(AssertionError, match=r"2 of 3 cases fail:\n\[no error\] .*\n\[none\]"):
        refused()


def test_tables_nest_and_fixtures_are_passed_on() -> None:
    seen = []

    @over("first", "ab")
    @over("second", [1, 2])
    def note(first: str, second: int, fixture: str) -> None:
        seen.append((fixture, first, second))

    assert list(inspect.signature(note).parameters) == ["fixture"]
    note(fixture="given")
    assert seen == [("given", first, second) for first in "ab" for second in (1, 2)]


def test_an_empty_table_is_refused() -> None:
    with pytest.raises(AssertionError, match="nothing"):
        over("name", [])


def test_corners_have_every_value_of_every_axis() -> None:
    cases = corners({"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}, "ab", [0.5, 1.0, 2.0])
    assert [case.values for case in cases] == [
        (1, "a", 0.5),
        (2, "b", 1.0),
        (3, "a", 2.0),
        (4, "b", 0.5),
        (5, "a", 1.0),
    ]
    assert cases[1].id == "two-b-1.0"
