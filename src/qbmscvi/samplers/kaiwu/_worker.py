"""The other end of :class:`~qbmscvi.samplers.KaiwuSampler`: a program for the interpreter that has QBoson's Kaiwu SDK.

The SDK is a wheel for CPython 3.10 only. So this file runs there, and imports the standard library, numpy and
``kaiwu``.

Protocol: one JSON object per line, on the standard input and output that the program was started with.

- The first line says ``{"protocol": "qbmscvi-kaiwu", "version": 1, "folder": ..., "telemetry": ...}``: where the SDK
  may keep its files, and whether it may report its use to the vendor. The answer repeats protocol and version and has
  ``python`` and ``sdk`` (versions), or ``error``.
- A request has ``id``, ``task_name``, ``mode`` (``"sample"`` or ``"quota"``), ``n_samples``, ``n`` and ``matrix``,
  int32, row by row, little-endian, base64. The worker calls the SDK once, which submits the job or queries it. The
  answer has ``id`` and ``status``: ``"computing"``; ``"done"`` with ``shape`` and ``states``, int8, base64; or
  ``"error"``.
- An ``error`` has ``kind`` (``"budget"``, ``"unavailable"``, ``"invalid"``) and ``message``.
- The end of the input ends the program.

Only this file reads ``KAIWU_USER_ID``, ``KAIWU_SDK_CODE`` and ``KAIWU_PROJECT_NO`` from the environment. If the SDK
finds no licence, it asks for one on the standard input, and it writes to the standard output. The worker replaces both
before it imports the SDK, so that this prompt fails at once and no output enters the protocol.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import re
import sys

PROTOCOL = {"protocol": "qbmscvi-kaiwu", "version": 1}
_SECRETS = ("KAIWU_USER_ID", "KAIWU_SDK_CODE", "KAIWU_PROJECT_NO")
_MAX_WORDS = 300  # characters of a message of the SDK
_SECRET_LIKE = re.compile(r"[A-Za-z0-9_\-.=+/%&?:]{25,}")  # tokens, signed addresses, paths
# Names of the modes in versions 1.4 and 1.3 of the SDK; the latter has them in the module of the optimizer only.
_MODES = {"sample": ("SAMPLING", "SAMPLE"), "quota": ("OPTIMIZATION", "QUOTA")}
_IS_SPENT = ("资源不足", "quota", "insufficient")


def _error(kind, message):
    return {"error": {"kind": kind, "message": message}}


def _clean(error):
    """Message of an error of the SDK, without credentials or strings that look like credentials."""
    text = f"{type(error).__name__}: {error}"
    for name in _SECRETS:
        if os.environ.get(name):
            text = text.replace(os.environ[name], "[removed]")
    return _SECRET_LIKE.sub("[removed]", text)[:_MAX_WORDS]


def _judge(error):
    """Error of the protocol for one of the SDK."""
    words = _clean(error)
    if any(word in str(error).lower() for word in _IS_SPENT):
        return _error("budget", f"The Kaiwu account has no machine time left ({words}). Buy some, or wait.")
    return _error("unavailable", f"The Kaiwu SDK failed ({words}).")


def _take_standard_streams():
    """Keep standard input and output for the protocol; the SDK gets an empty input, and its output is discarded."""
    requests, replies = os.fdopen(os.dup(0), "r", encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    return requests, replies


def _silence_telemetry():
    """Stop the SDK from reporting calls, user and number of spins; return whether that was possible."""
    os.environ["KPP_STATS_ENABLED"] = "false"
    try:
        import kaiwu.license._track_data as tracking
    except ImportError:
        return False
    is_there = hasattr(tracking, "post_sdk_data")
    tracking.post_sdk_data = lambda *arguments, **settings: None
    return is_there


def _task_mode(kaiwu, mode):
    """Value of a mode in this version of the SDK; None if it has no such mode."""
    optimizer = kaiwu.cim.CIMOptimizer
    modes = getattr(kaiwu.cim, "TaskMode", None) or getattr(sys.modules[optimizer.__module__], "TaskMode", None)
    return next((getattr(modes, name) for name in _MODES[mode] if hasattr(modes, name)), None)


def _open(settings):
    """Import the SDK and check its licence; return it, or an error."""
    if {key: settings.get(key) for key in PROTOCOL} != PROTOCOL:
        return None, _error("invalid", "The two ends of the protocol are of different versions. Reinstall qbmscvi.")
    try:
        import kaiwu
        import kaiwu.cim
        import kaiwu.license
    except Exception as error:  # noqa: BLE001 - whatever it is, the SDK cannot be used
        words = f"This interpreter ({platform.python_version()}) cannot import the Kaiwu SDK ({_clean(error)})."
        return None, _error("unavailable", f"{words} Run `pip install kaiwu` with CPython 3.10.")
    if any(_task_mode(kaiwu, mode) is None for mode in _MODES):
        words = f"The Kaiwu SDK {_version()} does not have the modes that are known here."
        return None, _error("unavailable", f"{words} Install version 1.3 or 1.4.")
    if not settings["telemetry"] and not _silence_telemetry():
        words = f"The telemetry of the Kaiwu SDK {_version()} cannot be switched off."
        return None, _error("unavailable", f"{words} Install version 1.3 or 1.4, or pass telemetry=True.")
    kaiwu.common.CheckpointManager.save_dir = settings["folder"]
    user_id, sdk_code = os.environ.get("KAIWU_USER_ID"), os.environ.get("KAIWU_SDK_CODE")
    try:
        if user_id and sdk_code:
            kaiwu.license.init(user_id, sdk_code)
        kaiwu.license.ensure_license()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, there is no licence
        words = f"The Kaiwu SDK has no licence ({_clean(error)})."
        verb = "Check" if user_id and sdk_code else "Set"
        return None, _error(
            "unavailable", f"{words} {verb} KAIWU_USER_ID and KAIWU_SDK_CODE, from platform.qboson.com."
        )
    return kaiwu, None


def _solve(kaiwu, request):
    """One call of the SDK, as part of an answer."""
    import numpy as np

    n = request["n"]
    matrix = np.frombuffer(base64.b64decode(request["matrix"]), dtype="<i4").reshape(n, n).astype(float)
    try:
        optimizer = kaiwu.cim.CIMOptimizer(
            task_name=request["task_name"],
            wait=False,
            project_no=os.environ.get("KAIWU_PROJECT_NO"),
            task_mode=_task_mode(kaiwu, request["mode"]),
            sample_number=request["n_samples"],
        )
        states = optimizer.solve(matrix)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, the other end gets it
        return _judge(error)
    if states is None:
        return {"status": "computing"}
    try:
        states = np.asarray(states)
        is_good = states.ndim == 2 and bool((np.abs(states) == 1).all())
    except (TypeError, ValueError):
        is_good = False
    if not is_good:
        return _error("invalid", "The answer of the Kaiwu SDK is not a table of -1 and +1.")
    packed = base64.b64encode(np.ascontiguousarray(states, dtype=np.int8).tobytes()).decode()
    return {"status": "done", "shape": list(states.shape), "states": packed}


def main():
    """Answer until the input ends."""
    requests, replies = _take_standard_streams()
    sys.path.pop(0)  # the folder of this file, which is a package of another interpreter

    def say(message):
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    kaiwu, error = _open(json.loads(requests.readline() or "{}"))
    if error is not None:
        say({**PROTOCOL, **error})
        return
    say({**PROTOCOL, "python": platform.python_version(), "sdk": _version()})
    for line in requests:
        request = json.loads(line)
        answer = _solve(kaiwu, request)
        say({"id": request["id"], "status": "error", **answer})


def _version():
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("kaiwu")
    except PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    main()
