"""Results of the promotion gate: checks with their status and details, and the resulting decision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

Status = Literal["passed", "failed", "not evaluated"]
PASSED: Final = "passed"
FAILED: Final = "failed"
NOT_EVALUATED: Final = "not evaluated"
HEADLINE_CHECKS = ("min_auc", "not_inferior", "better")  # named in the reason of a promotion


@dataclass(frozen=True)
class CheckItem:
    """Result of a check for one class, finding or subgroup."""

    name: str
    status: Status
    details: str


@dataclass(frozen=True)
class Check:
    """Result of one check: its short name, the requirement in words, status, details and items.

    A check with items fails if any item fails, and is not evaluated if no item is.
    """

    name: str
    requirement: str
    status: Status
    details: str
    items: tuple[CheckItem, ...] = field(default=())


@dataclass(frozen=True)
class Decision:
    """Whether a model becomes champion, and why.

    Attributes:
        checks: in the order of evaluation.
        auc: test AUC of the model, in [0, 1]; None if undefined.
        champion_auc: AUC of the champion on the same images; None without a champion or a comparison.
        force_reason: why the model is promoted regardless of failed checks; None if the checks decide.
    """

    checks: tuple[Check, ...]
    auc: float | None
    champion_auc: float | None
    force_reason: str | None = None

    @property
    def passed(self) -> bool:
        """Whether no check failed; checks that were not evaluated do not block promotion."""
        return not any(check.status == FAILED for check in self.checks)

    @property
    def promoted(self) -> bool:
        """Whether the model becomes champion."""
        return self.passed or self.force_reason is not None

    @property
    def reason(self) -> str:
        """The decisive checks, as a sentence."""
        decisive = [c for c in self.checks if (c.name in HEADLINE_CHECKS if self.passed else c.status == FAILED)]
        reason = "; ".join(f"{check.requirement}: {check.details}" for check in decisive)
        if self.passed:
            reason = f"none of {len(self.checks)} checks failed; {reason}"
        return reason if self.force_reason is None else f"FORCED: {self.force_reason}; without force: {reason}"

    def to_dict(self) -> dict[str, Any]:
        """Return the checks as plain values."""
        return {"checks": [asdict(check) for check in self.checks]}


def status_of(passed: bool) -> Status:
    """Return the status of an evaluated check."""
    return PASSED if passed else FAILED


def combine_items(name: str, requirement: str, items: Iterable[CheckItem]) -> Check:
    """Combine items to a check that fails if any of them fails."""
    items = tuple(items)
    failed = [item for item in items if item.status == FAILED]
    evaluated = [item for item in items if item.status != NOT_EVALUATED]
    if failed:
        return Check(name, requirement, FAILED, ", ".join(f"{item.name} {item.details}" for item in failed), items)
    if not evaluated:
        details = ", ".join(f"{item.name} {item.details}" for item in items) or "nothing to evaluate"
        return Check(name, requirement, NOT_EVALUATED, details, items)
    skipped = len(items) - len(evaluated)
    details = f"{len(evaluated)} passed" + (f", {skipped} not evaluated" if skipped else "")
    return Check(name, requirement, PASSED, details, items)
