r"""Checks for samplers, also of other packages: small problems with known answers, and the contract in one call.

>>> from qbmscvi.samplers import ExactSampler
>>> from qbmscvi.samplers.testing import check_sampler
>>> report = check_sampler(ExactSampler())

Samples are compared with enumeration in float64. Draws of one request are treated as independent chains. The checks
test the distribution of their end states, at the length of run that the sampler chooses. They do not test time series,
effective sample sizes of single chains, GPU problems, or problems beyond enumeration.
"""

from __future__ import annotations

from qbmscvi.samplers.testing._check import check_sampler
from qbmscvi.samplers.testing._comparison import ALPHA as ALPHA
from qbmscvi.samplers.testing._comparison import Verdict, assert_boltzmann, compare_with_boltzmann
from qbmscvi.samplers.testing._problems import tiny_problems
from qbmscvi.samplers.testing._report import Failure, Report, SamplerCheckError

__all__ = [
    "Failure",
    "Report",
    "SamplerCheckError",
    "Verdict",
    "assert_boltzmann",
    "check_sampler",
    "compare_with_boltzmann",
    "tiny_problems",
]
