"""Errors of D-Wave's client as errors of this package, without objects that hold the token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qbmscvi.exceptions import BudgetExceeded, InvalidSamples, SamplerError, SamplerTimeout, SamplerUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_WORDS = 300  # characters of a message of the client
_CONFIGURE = "Run `dwave config create`, or set DWAVE_API_TOKEN (see docs/dwave.md)."


def install_hint() -> str:
    """Message for a missing ``dwave-system``."""
    return "D-Wave samplers need the package `dwave-system`. Install it with `pip install 'qbmscvi[dwave]'`."


def guarded(function: Callable[..., Any], *arguments: Any, profile: str | None) -> tuple[Any, SamplerError | None]:
    """Call a function of D-Wave's client, and return its result or an error of this package.

    The error is returned, not raised. If raised here, it would have the original as its context, with requests that
    hold the token in their headers.
    """
    try:
        return function(*arguments), None
    except SamplerError as error:
        return None, error
    except Exception as error:  # noqa: BLE001 - whatever the client raises ends as an error of this package
        return None, _translate(error, profile)


def _translate(error: Exception, profile: str | None) -> SamplerError:
    from dwave.cloud import exceptions as cloud
    from dwave.cloud.api import exceptions as api

    what = f"{type(error).__name__}: {_without_token(str(error), profile)[:_MAX_WORDS]}"
    code = getattr(error, "error_code", None)
    if "insufficient remaining" in what.lower():
        return BudgetExceeded(f"The D-Wave account has no access time left ({what}). Wait for the next month's share.")
    if isinstance(error, api.ResourceAuthenticationError | api.ResourceAccessForbiddenError) or code in (401, 403):
        return SamplerUnavailable(f"D-Wave's service does not accept the credentials ({what}). {_CONFIGURE}")
    if isinstance(error, cloud.PollingTimeout | api.RequestTimeout | TimeoutError):
        return SamplerTimeout(f"D-Wave's service did not answer in time ({what}).")
    if isinstance(error, cloud.SolverOfflineError | cloud.SolverNotFoundError):
        return SamplerUnavailable(f"There is no such solver, or it is offline ({what}). `dwave solvers` lists them.")
    if isinstance(error, cloud.CanceledFutureError):
        return SamplerUnavailable(f"The job was canceled ({what}).")
    if isinstance(error, api.ResourceLimitsExceededError) or code == 429:
        return SamplerUnavailable(f"D-Wave's service takes no more requests for now ({what}). Ask less often.")
    if isinstance(error, cloud.ConfigFileError) or "token not defined" in what.lower():
        return SamplerUnavailable(f"D-Wave's client has no usable configuration ({what}). {_CONFIGURE}")
    if isinstance(error, api.RequestError | OSError):
        return SamplerUnavailable(f"D-Wave's service failed or cannot be reached ({what}).")
    return InvalidSamples(f"The answer of D-Wave's service cannot be read ({what}).")


def _without_token(text: str, profile: str | None) -> str:
    """Message of an error without the token, in case a library has quoted it."""
    from dwave.cloud.config import load_config

    try:
        token = load_config(profile=profile).get("token")
    except Exception:  # noqa: BLE001 - a configuration that cannot be read has no token to hide
        token = None
    return text.replace(token, "[token]") if token else text
