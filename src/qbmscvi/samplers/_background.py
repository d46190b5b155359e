"""Calls in a thread of their own."""

from __future__ import annotations

import atexit
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Callable

_GRACE_SECONDS = 2.0

_threads: WeakSet[threading.Thread] = WeakSet()


def call_in_background(function: Callable[..., Any], *arguments: Any) -> Future:
    """Start a call in a thread that delays neither its caller nor the end of the program.

    At its exit the interpreter waits for threads of :mod:`concurrent.futures`, and so would never exit if a job hangs.
    """
    future: Future = Future()
    thread = threading.Thread(target=_fulfil, args=(future, function, arguments), name="qbmscvi-sampler", daemon=True)
    _threads.add(thread)
    thread.start()
    return future


def _fulfil(future: Future, function: Callable[..., Any], arguments: tuple) -> None:
    try:
        result = function(*arguments)
    except BaseException as error:  # noqa: BLE001 - handed to whoever asks for the result
        future.set_exception(error)
    else:
        future.set_result(result)


@atexit.register
def _let_finish() -> None:
    """Wait briefly for busy threads: a thread that computes while the interpreter shuts down aborts the program."""
    deadline = time.monotonic() + _GRACE_SECONDS
    for thread in list(_threads):
        thread.join(max(0.0, deadline - time.monotonic()))
