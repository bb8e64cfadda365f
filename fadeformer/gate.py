"""The registry gate: test predictions of challenger and champion, and the rules, to a decision with reasons."""

from __future__ import annotations

from dataclasses import dataclass

from fadeformer.metrics import auc
from fadeformer.predictions import Predictions


@dataclass(frozen=True)
class Rule:
    """One rule's short name, the rule in words, its verdict and the figures it rests on."""

    name: str
    rule: str
    passed: bool
    figures: str


@dataclass(frozen=True)
class Decision:
    """Whether the challenger becomes champion, by which rules, and the AUCs in [0, 1] that were compared."""

    promoted: bool
    rules: tuple[Rule, ...]
    auc: float | None
    champion_auc: float | None

    @property
    def reason(self) -> str:
        """The rules that decided, as a sentence."""
        return "; ".join(f"{rule.rule}: {rule.figures}" for rule in self.rules if rule.passed == self.promoted)


def decide(challenger: Predictions, champion: Predictions | None, *, min_auc: float) -> Decision:
    """Judges a challenger by its test AUC.

    Args:
        challenger: its predictions on the test images.
        champion: the present champion's on its own test images; None where there is no champion.
        min_auc: least test AUC of a champion.
    """
    found = auc(challenger.labels, challenger.scores, challenger.task)
    shown = "undefined: no class has both positives and negatives" if found is None else f"{found:.4f}"
    rules = [Rule("min_auc", f"test AUC at least {min_auc:g}", found is not None and found >= min_auc, shown)]
    best = None
    if champion is not None:
        same = challenger.identity() == champion.identity()
        figures = "the champion was judged on other test images; give this model its own promote.model_name"
        rules.append(
            Rule(
                "same_test_images",
                "same test images as the champion",
                same,
                "equal ids and labels" if same else figures,
            )
        )
        if same:
            best = auc(champion.labels, champion.scores, champion.task)
            passed = best is None or (found is not None and found >= best)
            compared = "undefined" if best is None else f"{best:.4f}"
            rules.append(
                Rule(
                    "not_below_champion",
                    "test AUC not below that of the champion",
                    passed,
                    f"{shown} against {compared}",
                )
            )
    return Decision(all(rule.passed for rule in rules), tuple(rules), found, best)
