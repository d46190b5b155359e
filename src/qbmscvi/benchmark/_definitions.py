"""What decides a run of a model before it is trained, so that records of other settings are not taken for it.

A definition is a dictionary of digests by name. Of a function it has code, default arguments, what a closure or a
partial holds, and the global values that the code names; of a callable object its class and attributes. Functions and
classes that are installed count by name, the caller's own by code. What a run itself changes, such as a counter, is no
setting: it is None, which agrees with everything.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
from pathlib import Path
from pickle import PicklingError
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    Definition = dict[str, str | None]

_INSTALLED = (*(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")), Path(__file__).parents[1])
_CONSTANTS = str | bytes | int | float | complex | type(None)
_CONTAINERS = list | tuple | set | frozenset | dict | CodeType | ModuleType
_LENGTH = 12


def define(model: Callable) -> Definition:
    """Digests of everything that decides what a model of the caller's own does."""
    definition: dict[str, str | None] = {}
    seen: dict[int, tuple[Any, str]] = {}  # holds the values, so that no other one gets their ids

    def add(path: str, value: Any) -> None:
        children = _children(value)
        if children is None:
            definition[path] = _digest(value, {})[:_LENGTH]
        elif id(value) in seen:
            definition[path] = seen[id(value)][1]
        else:
            seen[id(value)] = value, path
            for name in sorted(children):
                add(f"{path}.{name}" if path else name, children[name])

    add("", model)
    return definition


def agreed(before: Definition, after: Definition) -> Definition:
    """Definition of a run: None for what the run has changed."""
    return {name: before[name] if before.get(name) == value else None for name, value in after.items()}


def agree(one: Definition, other: Definition) -> bool:
    """Whether two definitions have the same digest, or None, under every name."""
    pairs = ((one.get(name, ""), other.get(name, "")) for name in one | other)
    return all(a == b or None in (a, b) for a, b in pairs)


def _children(value: Any) -> dict[str, Any] | None:
    """Parts of a value by name, if it is one whose parts may change one by one."""
    if isinstance(value, functools.partial):
        return {"function": value.func, "arguments": value.args, **value.keywords}
    if isinstance(value, MethodType):
        return {"function": value.__func__, "self": value.__self__}
    if isinstance(value, staticmethod | classmethod):
        return {"function": value.__func__}
    if isinstance(value, property):
        return {"get": value.fget, "set": value.fset}
    if isinstance(value, FunctionType) and _is_own(value):
        code = value.__code__
        positional = code.co_varnames[: code.co_argcount]
        defaults = dict(zip(positional[::-1], (value.__defaults__ or ())[::-1], strict=False))
        cells = zip(code.co_freevars, value.__closure__ or (), strict=True)
        return {
            "code": code,
            **_named("default", {**defaults, **(value.__kwdefaults__ or {})}),
            **_named("closure", {name: _cell_contents(cell) for name, cell in cells}),
            **_named("global", {k: value.__globals__[k] for k in _globals(code) if k in value.__globals__}),
            **_named("attribute", vars(value)),
        }
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value
    if isinstance(value, type):
        return {"name": value.__qualname__, "bases": value.__bases__, **_members(value)} if _is_own(value) else None
    if not isinstance(value, _CONTAINERS) and _is_own(type(value)):
        return {"class": type(value), **_state(value)}
    return None


def _named(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{kind} {name}": value for name, value in values.items()}


def _globals(code: CodeType) -> set[str]:
    """Names of globals, and of attributes: the code does not tell them apart."""
    nested = (_globals(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return {name for name in code.co_names if not name.startswith("__")}.union(*nested)


def _cell_contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _digest(value: Any, memo: dict[int, tuple[Any, str]]) -> str:
    """A digest that equal values share, in every process; what contains itself has a mark in its own place."""
    if isinstance(value, np.generic):
        value = value.item()
    kind = type(value).__name__
    if isinstance(value, _CONSTANTS):
        return joblib.hash((kind, value))
    if id(value) not in memo:
        memo[id(value)] = value, "itself"
        memo[id(value)] = value, joblib.hash((kind, _content(value, memo)))
    return memo[id(value)][1]


def _content(value: Any, memo: dict[int, tuple[Any, str]]) -> Any:
    def digests(*values: Any) -> list[str]:
        return [_digest(item, memo) for item in values]

    children = _children(value)
    if children is not None:
        return sorted((name, _digest(child, memo)) for name, child in children.items())
    if isinstance(value, list | tuple):
        return digests(*value)
    if isinstance(value, set | frozenset):
        return sorted(digests(*value))
    if isinstance(value, dict):
        return sorted(digests(*item) for item in value.items())
    if isinstance(value, CodeType):
        return digests(value.co_code, value.co_names, value.co_varnames, value.co_consts)
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, FunctionType | type):
        return f"{value.__module__}.{value.__qualname__}"
    try:
        return joblib.hash(value)
    except (PicklingError, TypeError, AttributeError, ValueError, RuntimeError):
        # It holds a function of the caller's own, or nothing can save it.
        return digests(type(value), _state(value))


def _members(kind: type) -> dict[str, Any]:
    """Methods and values of a class, without the values that Python adds to each."""
    functions = FunctionType | staticmethod | classmethod | property
    return {k: v for k, v in vars(kind).items() if isinstance(v, functions) or not k.startswith("__")}


def _state(value: Any) -> dict[str, Any]:
    try:
        state = value.__getstate__()
    except TypeError:  # such as a lock
        state = None
    return state if isinstance(state, dict) else {"state": state}


def _is_own(value: FunctionType | type) -> bool:
    """Whether a function or class is the caller's own code and not found under its name in what is installed."""
    if "<" in value.__qualname__:  # a lambda, or local to a function
        return True
    file = getattr(sys.modules.get(value.__module__), "__file__", None)
    if file is None:
        return value.__module__ not in sys.builtin_module_names
    return not any(Path(file).is_relative_to(folder) for folder in _INSTALLED)
