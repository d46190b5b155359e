"""Tables that one test goes through, with all findings reported together, and corners of products."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def over(names: str | tuple[str, ...], cases: Iterable, ids: Iterable | Callable | None = None) -> Callable:
    """Like ``pytest.mark.parametrize``, but in one test, which goes on after a failure and names every bad case.

    For tables whose entries take no time and leave fixtures as they are. A skip skips all of them: use none.
    """
    names = tuple(names.split(",")) if isinstance(names, str) else tuple(names)
    cases = list(cases)
    labels = [ids(case) for case in cases] if callable(ids) else list(ids or [None] * len(cases))
    table = []
    for case, label in zip(cases, labels, strict=True):
        is_param = isinstance(case, type(pytest.param()))
        values = case.values if is_param else case if len(names) > 1 else (case,)
        label = (case.id if is_param else label) or ", ".join(str(value) for value in values)
        table.append((label, dict(zip(names, values, strict=True))))
    assert table, "nothing would be tested"

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def whole(**fixtures: object) -> None:
            findings = []
            for label, values in table:
                try:
                    test(**fixtures, **values)
                except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - all of them are reported
                    findings.append(f"[{label}] {type(error).__name__}: {error}")
            assert findings == [], f"{len(findings)} of {len(table)} cases fail:\n" + "\n".join(findings)

        signature = inspect.signature(test)
        rest = [parameter for name, parameter in signature.parameters.items() if name not in names]
        whole.__signature__ = signature.replace(parameters=rest)
        del whole.__wrapped__
        return whole

    return decorate


def corners(*axes: Mapping | Iterable) -> list:
    """As few cases as have every value of every axis, where axes do not interact: a walk along a diagonal."""
    named = [[*axis.items()] if isinstance(axis, Mapping) else [(str(value), value) for value in axis] for axis in axes]
    cases = [[axis[i % len(axis)] for axis in named] for i in range(max(map(len, named)))]
    return [pytest.param(*(v for _, v in case), id="-".join(name for name, _ in case)) for case in cases]
