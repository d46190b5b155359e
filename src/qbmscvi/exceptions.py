"""Errors of the package.

Wrong arguments raise :class:`ValueError` or :class:`TypeError`. The classes here are for what lies outside
the caller's hands (samplers, devices, a training run that diverged) and for problems that do not fit a
sampler.
"""


class QBMSCVIError(Exception):
    """Base class of every error that is particular to this package."""


class GraphMismatchError(QBMSCVIError, ValueError):
    """A problem does not fit the sampler: too many spins, or edges the sampler does not have."""


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
