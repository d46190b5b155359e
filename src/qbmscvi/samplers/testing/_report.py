"""What a check of a sampler found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qbmscvi.exceptions import QBMSCVIError

if TYPE_CHECKING:
    from qbmscvi.samplers.testing._comparison import Verdict


class SamplerCheckError(QBMSCVIError, AssertionError):
    """A sampler breaks the contract; ``report`` is the report of :func:`check_sampler`."""

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Failure:
    """A rule that a sampler breaks, the case in which it does, and how."""

    rule: str
    case: str
    reason: str

    def __str__(self) -> str:
        return f"{self.rule} ({self.case}): {self.reason}"


@dataclass(frozen=True)
class Report:
    """Outcome of :func:`check_sampler`.

    Parameters
    ----------
    sampler
        Name of the sampler.
    target
        Its ``traits.target``.
    verdicts
        Comparison with the Boltzmann distribution by case, e.g. ``"complete-6, beta=1, float32"``; empty for a sampler
        of ground states.
    failures
        Broken rules.
    skipped
        Problems that the sampler refused, with its reason.
    """

    sampler: str
    target: str
    verdicts: dict[str, Verdict]
    failures: tuple[Failure, ...]
    skipped: dict[str, str]

    @property
    def has_passed(self) -> bool:
        """Whether no rule is broken."""
        return not self.failures

    @property
    def distances(self) -> dict[str, float]:
        """Total variation distance to the Boltzmann distribution, by case."""
        return {case: verdict.distance for case, verdict in self.verdicts.items() if verdict.distance is not None}

    def __str__(self) -> str:
        verdict = "keeps the contract" if self.has_passed else f"breaks the contract in {len(self.failures)} cases"
        lines = [f"{self.sampler} (target: {self.target}) {verdict}"]
        lines += [f"- {failure}" for failure in self.failures]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"{case}: {verdict}" for case, verdict in self.verdicts.items()]
        return "\n".join(lines)
