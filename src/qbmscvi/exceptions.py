"""Errors of the package.

Wrong arguments raise :class:`ValueError` or :class:`TypeError`. The classes here are for failures that the caller
cannot prevent (samplers, devices, a training run that diverged), and for problems that do not fit a sampler.
"""

from __future__ import annotations

import operator


class QBMSCVIError(Exception):
    """Base class of the errors of this package."""


class GraphMismatchError(QBMSCVIError, ValueError):
    """A problem does not fit the sampler: too many spins, or edges that the sampler lacks."""


class MissingColumnError(QBMSCVIError, ValueError, KeyError):
    """A column of ``adata.obs`` that an argument names does not exist; a :class:`KeyError`, as in scvi-tools, too."""

    __str__ = Exception.__str__  # KeyError's shows quotes and escapes


class SamplerError(QBMSCVIError, RuntimeError):
    """A sampler failed to answer a request."""


class SamplerUnavailable(SamplerError):
    """The sampler cannot be reached or is not installed."""


class SamplerTimeout(SamplerError):
    """The sampler did not answer before its deadline."""


class BudgetExceeded(SamplerError):
    """Answering the request would exceed the budget of calls, samples or device time."""


class InvalidSamples(SamplerError):
    """The sampler answered with something that is not a set of samples of the problem."""


class TrainingDivergedError(QBMSCVIError, ArithmeticError):
    """A non-finite loss or parameter ended training; the model holds its last finite state."""


def require_integer(name: str, value: object, least: int, remedy: str = "") -> None:
    """Raise unless ``value`` is an integer of at least ``least``.

    Raises
    ------
    TypeError
        If it is not an integer.
    ValueError
        If it is too small.
    """
    try:
        number = operator.index(None if isinstance(value, bool) else value)
    except TypeError:
        msg = f"{name}={value!r} is a {type(value).__name__}; it must be an integer of at least {least}. {remedy}"
        raise TypeError(msg.rstrip()) from None
    if number < least:
        msg = f"{name}={value} is too small; it must be at least {least}. {remedy}"
        raise ValueError(msg.rstrip())
