"""The registry gate: what was found of a challenger and of the champion on the same images, to a decision with reasons.

It is pure: no file, no registry. A class, finding or subgroup with too few cases is `not evaluated`, with their number,
and stands in nobody's way; all else that is asked for has to be shown. Against the champion a model has to be not
inferior: the lower bound of the difference of their AUCs, by DeLong's paired comparison, is not below minus the margin
(Blackwelder 1982, doi:10.1016/0197-2456(82)90024-1). A model that is truly worse by the margin passes in 2.5 % of cases
at 95 % confidence, one that is worse by more in fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fadeformer.evaluation.intervals import bootstrap, delong
from fadeformer.evaluation.intervals.delong import AUCDifference
from fadeformer.evaluation.metrics import auc, curve_classes
from fadeformer.evaluation.predictions import Predictions
from fadeformer.evaluation.summary import summarize
from fadeformer.io.formatting import format_with_interval
from fadeformer.promotion.decision import (
    FAILED,
    NOT_EVALUATED,
    PASSED,
    Check,
    CheckItem,
    Decision,
    combine_items,
    status_of,
)
from fadeformer.tasks import one_versus_rest

UNDEFINED_AUC = "undefined: no class has both positives and negatives"


@dataclass(frozen=True)
class PromotionCriteria:
    """What a champion has to show; the fields are keys of `promote:` in params.yaml, None where nothing is asked.

    Attributes:
        min_auc: least lower bound of the test AUC.
        min_class_auc: least AUC of each class or finding.
        min_subgroup_auc: least AUC of each subgroup: of all columns, or by column.
        min_cases: patients, lesions or single images with a class, and without it; with fewer it is not evaluated.
        max_ece: largest calibration error.
        operating_point: `youden`, `sensitivity` or `specificity`.
        min_sensitivity: least sensitivity of each class at that point.
        margin: how much lower than the champion's the AUC may be, at most.
        min_gain: how much higher it has to be at least, in place of the margin.
    """

    min_auc: float
    min_class_auc: float | None
    min_subgroup_auc: float | Mapping[str, float] | None
    min_cases: int
    max_ece: float | None
    operating_point: str
    min_sensitivity: float | None
    margin: float
    min_gain: float | None


@dataclass(frozen=True)
class Challenger:
    """What is known of a challenger.

    Attributes:
        test: its predictions on the test images.
        intervals: of `fadeformer.evaluation.summary.confidence_intervals`, of test.
        confidence: of all intervals.
        subgroups: of `fadeformer.evaluation.subgroups.evaluate_subgroups`, of test.
        points: of `fadeformer.evaluation.operating_points.select_operating_points`.
        data_passed: whether the data gate let the data pass.
        rolled_back: why this very model was taken back once; None where it was not.
    """

    test: Predictions
    intervals: Mapping[str, Any]
    confidence: float
    subgroups: Mapping[str, Mapping[str, Any]]
    points: Mapping[str, Mapping[str, Any]]
    data_passed: bool
    rolled_back: str | None = None


def decide(
    of: Challenger, champion: Predictions | None, asked: PromotionCriteria, force_reason: str | None = None
) -> Decision:
    """Judges a challenger.

    Args:
        of: the challenger.
        champion: the present champion's predictions on the same test images; None where there is no champion.
        asked: what a champion has to show.
        force_reason: why the challenger is promoted whatever comes of it; None: by the rules alone.
    """
    rules = [_check_data(of), _check_scores("finite_scores", "every score is a number from 0 to 1", of.test)]
    if of.rolled_back is not None:
        rules.append(Check("not_rolled_back", "was not taken back before", FAILED, f"taken back: {of.rolled_back}"))
    if rules[1].status == FAILED:  # nothing that follows could be computed
        return Decision(tuple(rules), None, None, force_reason)
    found, cases = summarize(of.test), _count_cases(of.test)
    area = found["overall"]["auc"]
    rules += [
        _check_min_auc(of, area, asked),
        *_check_class_aucs(of, found, cases, asked),
        *_check_subgroup_aucs(of, asked),
        *_check_calibration(found["overall"]["calibration_error"], asked),
        *_check_sensitivity(of, cases, asked),
    ]
    best = None
    if champion is not None:
        compared, best = _compare_with_champion(of, champion, asked)
        rules += compared
    return Decision(tuple(rules), area, best, force_reason)


def _check_data(of: Challenger) -> Check:
    figures = "it did" if of.data_passed else "it did not"
    return Check("data_gate", "the data gate let the data pass", status_of(of.data_passed), figures)


def _check_scores(name: str, rule: str, predictions: Predictions) -> Check:
    scores = predictions.scores
    with np.errstate(invalid="ignore"):
        wrong = ~((scores >= 0) & (scores <= 1)).all(axis=1)
    if not len(scores):
        return Check(name, rule, FAILED, "there are no test images")
    if not wrong.any():
        return Check(name, rule, PASSED, f"{len(scores):,} images")
    first = predictions.frame["id"].to_numpy()[wrong][0]
    return Check(name, rule, FAILED, f"{int(wrong.sum()):,} images have others, such as {first}")


def _check_min_auc(of: Challenger, area: float | None, asked: PromotionCriteria) -> Check:
    rule = f"lower bound of the test AUC at least {asked.min_auc:g}"
    bounds = of.intervals["overall"]["auc"]
    if area is None:
        return Check("min_auc", rule, FAILED, UNDEFINED_AUC)
    if bounds is None:
        return Check("min_auc", rule, FAILED, f"{area:.4f} without an interval: too few patients, lesions or images")
    return Check("min_auc", rule, status_of(bounds[0] >= asked.min_auc), format_with_interval(area, bounds))


def _check_class_aucs(
    of: Challenger, found: Mapping[str, Any], cases: Mapping[str, int], asked: PromotionCriteria
) -> Iterator[Check]:
    least = asked.min_class_auc
    if least is None:
        return

    def part(name: str) -> CheckItem:
        area = found["per_class"][name]["auc"]
        return CheckItem(
            name, status_of(area >= least), format_with_interval(area, of.intervals["per_class"][name]["auc"])
        )

    what = "finding" if of.test.task.multi_label else "class"
    yield combine_items(
        "min_class_auc", f"AUC of each {what} at least {least:g}", _check_each_class(of, cases, asked, part)
    )


def _check_each_class(
    of: Challenger, cases: Mapping[str, int], asked: PromotionCriteria, judge: Callable[[str], CheckItem]
) -> Iterator[CheckItem]:
    """The classes one by one, those with too few cases not evaluated."""
    for name in _averaged_classes(of.test):
        few = cases[name] < asked.min_cases
        yield CheckItem(name, NOT_EVALUATED, f"n = {cases[name]}") if few else judge(name)


def _check_subgroup_aucs(of: Challenger, asked: PromotionCriteria) -> Iterator[Check]:
    if asked.min_subgroup_auc is None:
        return
    floors = asked.min_subgroup_auc
    by_column = dict(floors) if isinstance(floors, Mapping) else dict.fromkeys(of.subgroups, floors)

    def parts() -> Iterator[CheckItem]:
        for column, least in by_column.items():
            if column not in of.subgroups:
                there = ", ".join(of.subgroups) or "none"
                told_of = f"is not known of the test images (known: {there}); see evaluate.subgroups"
                yield CheckItem(column, FAILED, told_of)
                continue
            for value, one in of.subgroups[column].items():
                yield part(f"{column} {value}", one, least)

    def part(name: str, one: Mapping[str, Any], least: float) -> CheckItem:
        supports = {of_class: one["per_class"][of_class]["support"] for of_class in _averaged_classes(of.test)}
        areas = [
            one["per_class"][of_class]["auc"]
            for of_class, support in supports.items()
            if min(support, one["images"] - support) >= asked.min_cases
        ]
        if one["groups"] < asked.min_cases:
            return CheckItem(name, NOT_EVALUATED, f"n = {one['groups']}")
        if not areas:
            return CheckItem(name, NOT_EVALUATED, f"n = {one['groups']}, of no class enough")
        area = float(np.mean(areas))
        return CheckItem(name, status_of(area >= least), f"{area:.4f} (n = {one['images']})")

    each = f"at least {floors:g}" if not isinstance(floors, Mapping) else "at least as asked of its column"
    yield combine_items("min_subgroup_auc", f"AUC of each subgroup {each}", parts())


def _check_calibration(error: float | None, asked: PromotionCriteria) -> Iterator[Check]:
    if asked.max_ece is None:
        return
    rule = f"calibration error at most {asked.max_ece:g}"
    if error is None:
        yield Check("max_ece", rule, FAILED, "undefined")
    else:
        yield Check("max_ece", rule, status_of(error <= asked.max_ece), f"{error:.4f}")


def _check_sensitivity(of: Challenger, cases: Mapping[str, int], asked: PromotionCriteria) -> Iterator[Check]:
    least = asked.min_sensitivity
    if least is None:
        return

    def part(name: str) -> CheckItem:
        point = of.points[asked.operating_point].get(name)
        if point is None:
            return CheckItem(name, NOT_EVALUATED, "no threshold, since validation lacks images with or without it")
        share = point["on_test"]["sensitivity"]
        bounds = None if share["low"] is None else (share["low"], share["high"])
        return CheckItem(name, status_of(share["value"] >= least), format_with_interval(share["value"], bounds))

    rule = f"sensitivity at the operating point {asked.operating_point} at least {least:g}"
    yield combine_items("min_sensitivity", rule, _check_each_class(of, cases, asked, part))


def _compare_with_champion(
    of: Challenger, champion: Predictions, asked: PromotionCriteria
) -> tuple[list[Check], float | None]:
    """The rules of a comparison, and the champion's AUC."""
    same_classes = "same classes as the champion"
    if champion.task.name != of.test.task.name or champion.classes != of.test.classes:
        theirs = f"the champion's are {', '.join(champion.classes)}; give this model its own promote.model_name"
        return [Check("same_classes", same_classes, FAILED, theirs)], None
    same = "same test images as the champion"
    if of.test.fingerprint() != champion.fingerprint():
        figures = "the champion was judged on other test images; give this model its own promote.model_name"
        return [Check("same_test_images", same, FAILED, figures)], None
    rules = [Check("same_test_images", same, PASSED, "equal ids and labels")]
    of_champion = _check_scores("champion_finite", "every score of the champion is a number from 0 to 1", champion)
    if of_champion.status == FAILED:
        return [*rules, of_champion], None
    best = auc(champion.labels, champion.scores, champion.task)
    difference = paired_auc_difference(of.test, champion, of.confidence)
    percent = f"{100 * of.confidence:g} %"
    name = "not_inferior" if asked.min_gain is None else "better"
    if asked.min_gain is None:
        rule = f"test AUC not lower than the champion's by more than {asked.margin:g}, at {percent}"
    else:
        rule = f"test AUC higher than the champion's by more than {asked.min_gain:g}, at {percent}"
    if difference is None:
        figures = "cannot be compared: no class has positives and negatives of two patients, lesions or images each"
        return [*rules, Check(name, rule, FAILED, figures)], best
    passed = difference.low > asked.min_gain if asked.min_gain is not None else difference.low >= -asked.margin
    figures = f"difference {difference.value:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"
    return [*rules, Check(name, rule, status_of(passed), figures)], best


def paired_auc_difference(first: Predictions, second: Predictions, confidence: float) -> AUCDifference | None:
    """The first's AUC less the second's, over the classes that can be judged, paired image by image.

    Args:
        first: of some images.
        second: of the same images, in whatever order.
        confidence: of the interval.

    Returns:
        None where no class has positives and negatives of two patients or lesions each.
    """
    mine, theirs = (part.frame.sort_values("id", kind="stable") for part in (first, second))
    ours, others = (Predictions(frame, first.task, first.classes) for frame in (mine, theirs))
    truth = one_versus_rest(ours.labels, len(first.classes), first.task)
    places = [first.classes.index(name) for name in _averaged_classes(ours)]
    places = [c for c in places if truth[:, c].any() and not truth[:, c].all()]
    if not places:
        return None
    groups = bootstrap.encode_groups(mine["group"])
    truths = [truth[:, c] for c in places]
    scores, of_others = ([part.scores[:, c] for c in places] for part in (ours, others))
    try:
        return delong.auc_difference(truths, scores, of_others, groups, confidence)
    except ValueError:  # of one group alone
        return None


def _averaged_classes(predictions: Predictions) -> list[str]:
    """The classes that the mean AUC is made of, be they too rare or not."""
    return [predictions.classes[c] for c in curve_classes(predictions)]


def _count_cases(predictions: Predictions) -> dict[str, int]:
    """Of each class the fewer of: patients, lesions or single images with it, and without it."""
    groups = bootstrap.encode_groups(predictions.frame["group"])
    truth = one_versus_rest(predictions.labels, len(predictions.classes), predictions.task)
    return {
        name: min(len(np.unique(groups[is_so])) for is_so in (truth[:, c], ~truth[:, c]))
        for c, name in enumerate(predictions.classes)
    }
