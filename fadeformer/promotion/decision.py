"""What a gate says: rules with their verdicts and figures, and the decision that follows from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

Status = Literal["passed", "failed", "not evaluated"]
PASSED: Final = "passed"
FAILED: Final = "failed"
NOT_EVALUATED: Final = "not evaluated"
HEADLINE_CHECKS = ("min_auc", "not_inferior", "better")  # rules whose figures are told of a model that keeps all


@dataclass(frozen=True)
class CheckItem:
    """A class, finding or subgroup that a rule judges: its name, verdict and the figures it rests on."""

    name: str
    status: Status
    details: str


@dataclass(frozen=True)
class Check:
    """A rule's short name, the rule in words, its verdict and the figures it rests on, part by part where it has some.

    A rule fails where one of its parts does, and is not evaluated where none of them is.
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
        rules: in the order in which they were judged.
        auc: of the model, on test, in [0, 1]; None where no class can be judged.
        champion_auc: of the champion, on the same images; None where there is none, or it was not compared.
        forced: why the model is promoted whatever the rules say; None where they decide.
    """

    checks: tuple[Check, ...]
    auc: float | None
    champion_auc: float | None
    force_reason: str | None = None

    @property
    def passed(self) -> bool:
        """Whether no rule failed; what could not be judged stands in nobody's way."""
        return not any(rule.status == FAILED for rule in self.checks)

    @property
    def promoted(self) -> bool:
        """Whether the model becomes champion."""
        return self.passed or self.force_reason is not None

    @property
    def reason(self) -> str:
        """The rules that decided, as a sentence."""
        wanted = [r for r in self.checks if (r.name in HEADLINE_CHECKS if self.passed else r.status == FAILED)]
        told = "; ".join(f"{rule.requirement}: {rule.details}" for rule in wanted)
        if self.passed:
            told = f"no rule of {len(self.checks)} is broken; {told}"
        return told if self.force_reason is None else f"FORCED: {self.force_reason}; without force: {told}"

    def to_dict(self) -> dict[str, Any]:
        """The rules as plain values."""
        return {"checks": [asdict(rule) for rule in self.checks]}


def status_of(is_so: bool) -> Status:
    """The verdict on what could be judged."""
    return PASSED if is_so else FAILED


def combine_items(name: str, rule: str, parts: Iterable[CheckItem]) -> Check:
    """A rule that each of its parts has to keep."""
    found = tuple(parts)
    failed = [part for part in found if part.status == FAILED]
    judged = [part for part in found if part.status != NOT_EVALUATED]
    if failed:
        return Check(name, rule, FAILED, ", ".join(f"{part.name} {part.details}" for part in failed), found)
    if not evaluated:
        told = ", ".join(f"{part.name} {part.details}" for part in found) or "nothing to judge"
        return Check(name, rule, NOT_EVALUATED, told, found)
    left = len(found) - len(judged)
    return Check(name, rule, PASSED, f"{len(judged)} keep it" + (f", {left} not evaluated" if left else ""), found)
