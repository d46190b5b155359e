"""What tells a model of the caller's own from another one of the same name, so that old records are not taken for it.

Of functions and classes of one module these are source text, default values and what they name; of other values, in a
global, a closure or a partial, the ``repr``. Not seen: attributes of functions, other modules, and what a ``repr``
leaves out, such as the middle of a large array. A value that a run changes makes another model of it.
"""

from __future__ import annotations

import functools
import inspect
import re
from types import CodeType
from typing import Any

import joblib


def define(model: Any) -> str:
    """Digest of a function, a partial, a method or a callable object."""
    return joblib.hash(_describe(model, getattr(getattr(model, "func", model), "__module__", None), []))


def _describe(value: Any, module: str | None, seen: list) -> str:
    """Text that decides what the value does; ``seen`` ends recursion."""
    if isinstance(value, functools.partial):
        arguments = (value.args, sorted(value.keywords.items()))
        return _describe(value.func, module, seen) + _describe(arguments, module, seen)
    if inspect.ismethod(value):
        return _describe(value.__func__, module, seen) + _describe(value.__self__, module, seen)
    if not inspect.isfunction(value) and not inspect.isclass(value):
        own = _describe(type(value), module, seen) if type(value).__module__ == module else ""
        return own + re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    if value.__module__ != module or value in seen:
        return f"{value.__module__}.{value.__qualname__}"
    seen.append(value)
    try:
        text = inspect.getsource(value)
    except (OSError, TypeError):  # written at the prompt
        functions = [value] if inspect.isfunction(value) else filter(inspect.isfunction, vars(value).values())
        text = "".join(_bytecode(function.__code__) for function in functions)
    if inspect.isfunction(value):
        names = inspect.getclosurevars(value)
        for item in (value.__defaults__, value.__kwdefaults__, *names.globals.values(), *names.nonlocals.values()):
            text += _describe(item, module, seen)
    return text


def _bytecode(code: CodeType) -> str:
    return f"{code.co_code}{code.co_names}{[_bytecode(c) if isinstance(c, CodeType) else c for c in code.co_consts]}"
