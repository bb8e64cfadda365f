"""Checks of a challenger against an earlier champion, on test images that neither has been trained on.

All differences are tested for non-inferiority (Blackwelder 1982, doi:10.1016/0197-2456(82)90024-1): the lower
confidence bound must not be below minus the margin. The mean AUC has `margin`; classes and subgroups, which have fewer
cases, have the wider `class_margin` and `recall_margin`. All of them must pass (an intersection-union test, Berger
1982, doi:10.1080/00401706.1982.10487790), so a model that is worse than its margin in any of them is promoted no more
often than if this were the only test, and the levels need no correction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fadeformer.evaluation import subgroups
from fadeformer.evaluation.intervals import bootstrap, delong, differences
from fadeformer.evaluation.intervals.differences import PairedDifference
from fadeformer.evaluation.predictions import CONTENT, Predictions
from fadeformer.evaluation.summary import summarize
from fadeformer.promotion.criteria import (
    Challenger,
    OperatingPoints,
    PromotionCriteria,
    averaged_classes,
    check_scores,
    decide_as_deployed,
)
from fadeformer.promotion.decision import FAILED, NOT_ASSESSED, PASSED, Check, CheckItem, combine_items, status_of
from fadeformer.tasks import one_versus_rest

Truth = NDArray[np.bool_]


@dataclass(frozen=True)
class Opponent:
    """An earlier champion that the challenger is compared with.

    Attributes:
        name: in messages, `champion` or `best champion so far`.
        test: its predictions on the test images of the challenger, in any order.
        operating_points: output of `fadeformer.evaluation.operating_points.select_operating_points`.
        training_images: content hashes of its train and val images; None if they were not recorded.
    """

    name: str
    test: Predictions
    operating_points: OperatingPoints
    training_images: frozenset[str] | None


class Pair:
    """Predictions of a challenger and an opponent on the same images, in the same order.

    Args:
        first: predictions of the challenger.
        second: predictions of the opponent.
        min_cases: minimum number of groups with, and without, a class to compare it.
    """

    def __init__(self, first: Predictions, second: Predictions, min_cases: int) -> None:
        self.first, self.second, self.min_cases = first, second, min_cases
        self.groups = bootstrap.encode_groups(first.frame["group"])
        self.truth = one_versus_rest(first.labels, len(first.classes), first.task)

    def count_cases(self, rows: Truth | None = None) -> dict[str, int]:
        """Count the groups of each class of the mean AUC: the smaller of positives and negatives."""
        within = np.ones(len(self.groups), dtype=bool) if rows is None else rows
        return {
            name: min(
                len(np.unique(self.groups[within & side]))
                for side in (self.truth[:, self._column(name)], ~self.truth[:, self._column(name)])
            )
            for name in averaged_classes(self.first)
        }

    def auc_difference(
        self, classes: Sequence[str], confidence: float, rows: Truth | None = None
    ) -> PairedDifference | None:
        """Compare the mean AUCs over some classes; None if one of them has too few groups for an interval."""
        within = slice(None) if rows is None else rows
        columns = [self._column(name) for name in classes]
        truths = [self.truth[within, c] for c in columns]
        first, second = ([model.scores[within, c] for c in columns] for model in (self.first, self.second))
        try:
            return delong.auc_difference(truths, first, second, self.groups[within], confidence)
        except ValueError:  # all positives, or all negatives, are in one group
            return None

    def _column(self, name: str) -> int:
        return self.first.classes.index(name)


def align(challenger: Challenger, opponent: Opponent, criteria: PromotionCriteria) -> tuple[Pair | None, list[Check]]:
    """Pair the predictions on the test images that neither model was trained on; None if they cannot be compared.

    The whole patient or lesion of an image that the opponent was trained on is left out.
    """
    name, test, other = opponent.name, challenger.test, opponent.test
    if other.task.name != test.task.name or other.classes != test.classes:
        details = f"the {name} has {', '.join(other.classes)}; give this model its own promote.model_name"
        return None, [Check("same_classes", f"same classes as the {name}", FAILED, details)]
    if test.fingerprint() != other.fingerprint():
        details = f"the {name} was evaluated on other test images; give this model its own promote.model_name"
        return None, [Check("same_test_images", f"same test images as the {name}", FAILED, details)]
    scores_check = check_scores("champion_finite", f"every score of the {name} is in [0, 1]", other)
    if scores_check.status == FAILED:
        return None, [scores_check]
    first, second = (
        Predictions(model.frame.sort_values("id", kind="stable", ignore_index=True), model.task, model.classes)
        for model in (test, other)
    )
    requirement = f"test images that the {name} was not trained on"
    if opponent.training_images is None or CONTENT not in first.frame:
        details = "its training images were not recorded; promote a model of this version of the program by force"
        return None, [Check("unseen_test_images", requirement, NOT_ASSESSED, details)]
    seen = first.frame[CONTENT].isin(opponent.training_images).to_numpy()
    groups = bootstrap.encode_groups(first.frame["group"])
    kept = ~np.isin(groups, groups[seen])
    details = f"{int(kept.sum()):,} of {len(kept):,} images"
    if seen.any():
        details += (
            f": {int(seen.sum()):,} were in its train or val set and are left out, with their patients or lesions"
        )
    if not kept.any():
        return None, [Check("unseen_test_images", requirement, NOT_ASSESSED, details)]
    pair = Pair(first.select_rows(kept), second.select_rows(kept), criteria.min_cases)
    return pair, [Check("unseen_test_images", requirement, PASSED, details)]


def compare_with_champion(
    challenger: Challenger, champion: Opponent, criteria: PromotionCriteria
) -> tuple[list[Check], float | None]:
    """Return the checks against the champion, and its AUC on the compared images, None if they cannot be compared."""
    pair, checks = align(challenger, champion, criteria)
    if pair is None:
        return checks, None
    checks.append(_check_mean_auc(pair, challenger, champion.name, criteria, criteria.min_gain))
    if criteria.class_margin is not None:
        checks.append(_check_class_aucs(pair, challenger, criteria.class_margin))
        checks += _check_subgroup_aucs(pair, challenger, criteria.class_margin)
    if criteria.recall_margin is not None:
        checks.append(_check_recall(pair, challenger, champion, criteria.operating_point, criteria.recall_margin))
    return checks, summarize(pair.second)["overall"]["auc"]


def compare_with_best(challenger: Challenger, best: Opponent, criteria: PromotionCriteria) -> Check:
    """Compare the mean AUC with that of the best champion so far: losses must not add up over generations."""
    pair, checks = align(challenger, best, criteria)
    check = checks[-1] if pair is None else _check_mean_auc(pair, challenger, best.name, criteria, None)
    return Check("not_inferior_to_best", check.requirement, check.status, check.details)


def _check_mean_auc(
    pair: Pair, challenger: Challenger, name: str, criteria: PromotionCriteria, min_gain: float | None
) -> Check:
    """Check the difference of the mean AUC over the classes with enough cases: against a gain, or else the margin."""
    confidence = challenger.paid_confidence
    level = f"at {100 * confidence:.6g} %"
    if min_gain is None:
        short = "not_inferior"
        requirement = f"test AUC not lower than that of the {name} by more than {criteria.margin:g}, {level}"
    else:
        short, requirement = "better", f"test AUC higher than that of the {name} by more than {min_gain:g}, {level}"
    cases = pair.count_cases()
    classes = [c for c, count in cases.items() if count >= criteria.min_cases]
    difference = pair.auc_difference(classes, confidence) if classes else None
    if difference is None:
        return Check(short, requirement, NOT_ASSESSED, f"no class has {criteria.min_cases} cases and as many others")
    passed = difference.low >= -criteria.margin if min_gain is None else difference.low > min_gain
    left_out = ", ".join(f"{c} (n = {count})" for c, count in cases.items() if c not in classes)
    details = _format(difference) + (f", without {left_out}" if left_out else "")
    return Check(short, requirement, status_of(passed), details)


def _check_class_aucs(pair: Pair, challenger: Challenger, margin: float) -> Check:
    def items() -> Iterator[CheckItem]:
        for name, count in pair.count_cases().items():
            if count < pair.min_cases:
                yield CheckItem(name, NOT_ASSESSED, f"n = {count}")
            else:
                yield _judge(name, pair.auc_difference([name], challenger.paid_confidence), margin)

    requirement = f"AUC of each class not lower than the champion's by more than {margin:g}"
    return combine_items("class_auc_not_inferior", requirement, items())


def _check_subgroup_aucs(pair: Pair, challenger: Challenger, margin: float) -> Iterator[Check]:
    def items() -> Iterator[CheckItem]:
        for column, values in subgroups.assign_subgroups(pair.first.subgroups, challenger.age_bands).items():
            for value in values.cat.categories:
                rows = (values == value).to_numpy()
                if not rows.any() or rows.all():
                    continue
                classes = [name for name, count in pair.count_cases(rows).items() if count >= pair.min_cases]
                if classes:
                    difference = pair.auc_difference(classes, challenger.paid_confidence, rows)
                    yield _judge(f"{column} {value}", difference, margin)
                else:
                    yield CheckItem(f"{column} {value}", NOT_ASSESSED, "too few cases")

    judged = list(items())
    if judged:
        requirement = f"AUC of each subgroup not lower than the champion's by more than {margin:g}"
        yield combine_items("subgroup_auc_not_inferior", requirement, judged, required=False)


def _check_recall(pair: Pair, challenger: Challenger, champion: Opponent, operating_point: str, margin: float) -> Check:
    first = decide_as_deployed(pair.first, challenger.operating_points, operating_point)
    second = decide_as_deployed(pair.second, champion.operating_points, operating_point)

    def items() -> Iterator[CheckItem]:
        for c, class_name in enumerate(pair.first.classes):
            count = len(np.unique(pair.groups[pair.truth[:, c]]))
            if count < pair.min_cases:
                yield CheckItem(class_name, NOT_ASSESSED, f"n = {count}")
                continue
            difference = differences.proportion_difference(
                first[:, c], second[:, c], pair.truth[:, c], pair.groups, challenger.paid_confidence
            )
            yield _judge(class_name, difference, margin)

    requirement = f"recall of each class by the deployed decision not lower than the champion's by more than {margin:g}"
    return combine_items("recall_not_inferior", requirement, items())


def _judge(name: str, difference: PairedDifference | None, margin: float) -> CheckItem:
    """Judge the non-inferiority of one class or subgroup.

    It failed if the difference itself is beyond the margin, or significantly below 0; if its interval is merely too
    wide, the data cannot show either, and it was not assessed.
    """
    if difference is None:
        return CheckItem(name, NOT_ASSESSED, "too few patients or lesions for an interval")
    if difference.low >= -margin:
        return CheckItem(name, PASSED, _format(difference))
    if difference.value < -margin or difference.high < 0:
        return CheckItem(name, FAILED, _format(difference))
    return CheckItem(name, NOT_ASSESSED, f"{_format(difference)}: too few cases to show it")


def _format(difference: PairedDifference) -> str:
    return f"difference {difference.value:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"
