"""Results of the promotion gate: checks with their status and details, and the resulting decision.

A check passed, failed, or was not assessed because there are too few cases or the necessary data is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

Status = Literal["passed", "failed", "not assessed"]
PASSED: Final = "passed"
FAILED: Final = "failed"
NOT_ASSESSED: Final = "not assessed"
HEADLINE_CHECKS = ("min_auc", "not_inferior", "better")  # named in the reason of a promotion


@dataclass(frozen=True)
class CheckItem:
    """Result of a check for one class, finding or subgroup."""

    name: str
    status: Status
    details: str


@dataclass(frozen=True)
class Check:
    """Result of one check: its short name, the requirement in words, status, details and items."""

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
        force_reason: why the model is promoted regardless of its checks; None if the checks decide.
        allow_not_assessed: whether a model with checks that were not assessed can be promoted.
    """

    checks: tuple[Check, ...]
    auc: float | None
    champion_auc: float | None
    force_reason: str | None = None
    allow_not_assessed: bool = False

    @property
    def passed(self) -> bool:
        """Whether the checks permit promotion."""
        blocking = {FAILED} if self.allow_not_assessed else {FAILED, NOT_ASSESSED}
        return not any(check.status in blocking for check in self.checks)

    @property
    def promoted(self) -> bool:
        """Whether the model becomes champion."""
        return self.passed or self.force_reason is not None

    @property
    def counts(self) -> str:
        """Number of checks by status, such as `9 passed, 1 failed, 2 not assessed`."""
        counts = Counter(check.status for check in self.checks)
        return ", ".join(f"{counts[status]} {status}" for status in (PASSED, FAILED, NOT_ASSESSED) if counts[status])

    @property
    def reason(self) -> str:
        """The number of checks by status and the decisive check, as a sentence."""
        failed = [check for check in self.checks if check.status == FAILED]
        not_assessed = [check for check in self.checks if check.status == NOT_ASSESSED]
        if self.passed:
            decisive, others = [check for check in self.checks if check.name in HEADLINE_CHECKS], 0
        else:
            decisive = (failed or not_assessed)[:1]
            others = len(failed or not_assessed) - 1
        sentences = [f"{check.requirement}: {check.details}" for check in decisive]
        if others > 0:
            sentences.append(f"and {others} more")
        if not self.passed and not failed:
            sentences.append("see promote.not_assessed")
        reason = "; ".join([self.counts, *sentences])
        return reason if self.force_reason is None else f"FORCED: {self.force_reason}; without force: {reason}"

    def to_dict(self) -> dict[str, Any]:
        """Return the checks as plain values."""
        return {"checks": [asdict(check) for check in self.checks]}


def status_of(passed: bool) -> Status:
    """Return the status of an assessed check."""
    return PASSED if passed else FAILED


def combine_items(name: str, requirement: str, items: Iterable[CheckItem], *, required: bool = True) -> Check:
    """Combine items to a check that fails if any of them fails.

    Args:
        name: short name of the check.
        requirement: in words.
        items: results.
        required: whether all items must be assessed for the check to be; otherwise one is enough.
    """
    items = tuple(items)
    failed, not_assessed = ([item for item in items if item.status == status] for status in (FAILED, NOT_ASSESSED))
    if failed:
        return Check(name, requirement, FAILED, _list_items(failed), items)
    if not items:
        return Check(name, requirement, NOT_ASSESSED, "nothing to assess", items)
    if not_assessed and (required or len(not_assessed) == len(items)):
        return Check(name, requirement, NOT_ASSESSED, _list_items(not_assessed), items)
    details = f"{len(items) - len(not_assessed)} passed"
    if not_assessed:
        details += f", {len(not_assessed)} not assessed ({_list_items(not_assessed)})"
    return Check(name, requirement, PASSED, details, items)


def _list_items(items: Iterable[CheckItem]) -> str:
    return ", ".join(f"{item.name} {item.details}" for item in items)
