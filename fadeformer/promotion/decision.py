"""What a gate says: rules with their verdicts and figures, and the decision that follows from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

Verdict = Literal["passed", "failed", "not judged"]
PASSED: Final = "passed"
FAILED: Final = "failed"
NOT_JUDGED: Final = "not judged"
CHIEF = ("min_auc", "not_inferior", "better")  # rules whose figures are told of a model that keeps all


@dataclass(frozen=True)
class Part:
    """A class, finding or subgroup that a rule judges: its name, verdict and the figures it rests on."""

    name: str
    verdict: Verdict
    figures: str


@dataclass(frozen=True)
class Rule:
    """A rule's short name, the rule in words, its verdict and the figures it rests on, part by part where it has some.

    A rule fails where one of its parts does, and is not judged where none of them is.
    """

    name: str
    rule: str
    verdict: Verdict
    figures: str
    parts: tuple[Part, ...] = field(default=())


@dataclass(frozen=True)
class Decision:
    """Whether a model becomes champion, and why.

    Attributes:
        rules: in the order in which they were judged.
        auc: of the model, on test, in [0, 1]; None where no class can be judged.
        champion_auc: of the champion, on the same images; None where there is none, or it was not compared.
        forced: why the model is promoted whatever the rules say; None where they decide.
    """

    rules: tuple[Rule, ...]
    auc: float | None
    champion_auc: float | None
    forced: str | None = None

    @property
    def passed(self) -> bool:
        """Whether no rule failed; what could not be judged stands in nobody's way."""
        return not any(rule.verdict == FAILED for rule in self.rules)

    @property
    def promoted(self) -> bool:
        """Whether the model becomes champion."""
        return self.passed or self.forced is not None

    @property
    def reason(self) -> str:
        """The rules that decided, as a sentence."""
        wanted = [r for r in self.rules if (r.name in CHIEF if self.passed else r.verdict == FAILED)]
        told = "; ".join(f"{rule.rule}: {rule.figures}" for rule in wanted)
        if self.passed:
            told = f"no rule of {len(self.rules)} is broken; {told}"
        return told if self.forced is None else f"FORCED: {self.forced}; without force: {told}"

    def as_dict(self) -> dict[str, Any]:
        """The rules as plain values."""
        return {"rules": [asdict(rule) for rule in self.rules]}


def kept(is_so: bool) -> Verdict:
    """The verdict on what could be judged."""
    return PASSED if is_so else FAILED


def of_parts(name: str, rule: str, parts: Iterable[Part]) -> Rule:
    """A rule that each of its parts has to keep."""
    found = tuple(parts)
    failed = [part for part in found if part.verdict == FAILED]
    judged = [part for part in found if part.verdict != NOT_JUDGED]
    if failed:
        return Rule(name, rule, FAILED, ", ".join(f"{part.name} {part.figures}" for part in failed), found)
    if not judged:
        told = ", ".join(f"{part.name} {part.figures}" for part in found) or "nothing to judge"
        return Rule(name, rule, NOT_JUDGED, told, found)
    left = len(found) - len(judged)
    return Rule(name, rule, PASSED, f"{len(judged)} keep it" + (f", {left} not judged" if left else ""), found)
