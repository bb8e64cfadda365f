"""Promotion gate: compare a challenger with the criteria and with the champion, and decide with reasons.

A pure function of its inputs, without file or registry access. A class, finding or subgroup with too few cases is
`not evaluated` and does not block promotion; every other criterion must be met. Against the champion the gate tests
non-inferiority: the lower confidence bound of the paired AUC difference (DeLong) must not be below minus the margin
(Blackwelder 1982, doi:10.1016/0197-2456(82)90024-1). At 95 % confidence a model whose true AUC is lower by exactly the
margin passes in 2.5 % of cases, a worse one less often.
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
    """Promotion criteria; the fields are keys of `promote:` in params.yaml, None disables a check.

    Attributes:
        min_auc: minimum of the lower confidence bound of the test AUC.
        min_class_auc: minimum AUC of each class or finding; of two classes the last one.
        min_subgroup_auc: minimum AUC of each subgroup, for all columns or by column.
        min_cases: minimum number of positive, and of negative, patients, lesions or single images of a class; with
            fewer it is not evaluated. Within a subgroup, classes need as many images.
        max_ece: maximum expected calibration error.
        operating_point: `youden`, `sensitivity` or `specificity`.
        min_sensitivity: minimum sensitivity of each class, one versus rest, at the operating point.
        margin: non-inferiority margin, the largest acceptable loss of AUC against the champion.
        min_gain: minimum gain of AUC against the champion; replaces the margin.
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
    """Evaluation results of a challenger.

    Attributes:
        test: predictions on the test images.
        intervals: output of `fadeformer.evaluation.summary.confidence_intervals` on test.
        confidence: level of all intervals.
        subgroups: output of `fadeformer.evaluation.subgroups.evaluate_subgroups` on test.
        operating_points: output of `fadeformer.evaluation.operating_points.select_operating_points`.
        is_data_valid: whether data validation passed.
        rollback_reason: why this model was rolled back before; None if it was not.
    """

    test: Predictions
    intervals: Mapping[str, Any]
    confidence: float
    subgroups: Mapping[str, Mapping[str, Any]]
    operating_points: Mapping[str, Mapping[str, Any]]
    is_data_valid: bool
    rollback_reason: str | None = None


def decide(
    challenger: Challenger,
    champion: Predictions | None,
    criteria: PromotionCriteria,
    force_reason: str | None = None,
) -> Decision:
    """Run all checks on a challenger.

    Args:
        challenger: the new model.
        champion: predictions of the current champion on the same test images; None without a champion.
        criteria: minimum requirements.
        force_reason: promote regardless of failed checks, for this reason; None: the checks decide.
    """
    scores_check = _check_scores("finite_scores", "every score is in [0, 1]", challenger.test)
    checks = [_check_data(challenger), scores_check]
    if challenger.rollback_reason is not None:
        details = f"rolled back: {challenger.rollback_reason}"
        checks.append(Check("not_rolled_back", "was never rolled back", FAILED, details))
    if scores_check.status == FAILED:  # no metric can be computed
        return Decision(tuple(checks), None, None, force_reason)
    metrics, cases = summarize(challenger.test), _count_cases(challenger.test)
    test_auc = metrics["overall"]["auc"]
    checks += [
        _check_min_auc(challenger, test_auc, criteria),
        *_check_class_aucs(challenger, metrics, cases, criteria),
        *_check_subgroup_aucs(challenger, criteria),
        *_check_calibration(metrics["overall"]["calibration_error"], criteria),
        *_check_sensitivity(challenger, cases, criteria),
    ]
    champion_auc = None
    if champion is not None:
        comparison, champion_auc = _compare_with_champion(challenger, champion, criteria)
        checks += comparison
    return Decision(tuple(checks), test_auc, champion_auc, force_reason)


def _check_data(challenger: Challenger) -> Check:
    details = "passed" if challenger.is_data_valid else "failed"
    return Check("data_gate", "data validation passed", status_of(challenger.is_data_valid), details)


def _check_scores(name: str, requirement: str, predictions: Predictions) -> Check:
    scores = predictions.scores
    with np.errstate(invalid="ignore"):
        invalid = ~((scores >= 0) & (scores <= 1)).all(axis=1)
    if not len(scores):
        return Check(name, requirement, FAILED, "there are no test images")
    if not invalid.any():
        return Check(name, requirement, PASSED, f"{len(scores):,} images")
    first = predictions.frame["id"].to_numpy()[invalid][0]
    return Check(name, requirement, FAILED, f"{int(invalid.sum()):,} images with invalid scores, such as {first}")


def _check_min_auc(challenger: Challenger, test_auc: float | None, criteria: PromotionCriteria) -> Check:
    requirement = f"lower bound of the test AUC at least {criteria.min_auc:g}"
    bounds = challenger.intervals["overall"]["auc"]
    if test_auc is None:
        return Check("min_auc", requirement, FAILED, UNDEFINED_AUC)
    if bounds is None:
        details = f"{test_auc:.4f} without an interval: too few patients, lesions or images"
        return Check("min_auc", requirement, FAILED, details)
    status = status_of(bounds[0] >= criteria.min_auc)
    return Check("min_auc", requirement, status, format_with_interval(test_auc, bounds))


def _check_class_aucs(
    challenger: Challenger, metrics: Mapping[str, Any], cases: Mapping[str, int], criteria: PromotionCriteria
) -> Iterator[Check]:
    minimum = criteria.min_class_auc
    if minimum is None:
        return

    def check_class(name: str) -> CheckItem:
        class_auc, bounds = metrics["per_class"][name]["auc"], challenger.intervals["per_class"][name]["auc"]
        return CheckItem(name, status_of(class_auc >= minimum), format_with_interval(class_auc, bounds))

    noun = "finding" if challenger.test.task.multi_label else "class"
    items = _check_each_class(challenger, cases, criteria, check_class)
    yield combine_items("min_class_auc", f"AUC of each {noun} at least {minimum:g}", items)


def _check_each_class(
    challenger: Challenger,
    cases: Mapping[str, int],
    criteria: PromotionCriteria,
    check_class: Callable[[str], CheckItem],
) -> Iterator[CheckItem]:
    """Check each class; those with too few cases are not evaluated."""
    for name in _averaged_classes(challenger.test):
        if cases[name] < criteria.min_cases:
            yield CheckItem(name, NOT_EVALUATED, f"n = {cases[name]}")
        else:
            yield check_class(name)


def _check_subgroup_aucs(challenger: Challenger, criteria: PromotionCriteria) -> Iterator[Check]:
    if criteria.min_subgroup_auc is None:
        return
    minima = criteria.min_subgroup_auc
    by_column = dict(minima) if isinstance(minima, Mapping) else dict.fromkeys(challenger.subgroups, minima)

    def check_columns() -> Iterator[CheckItem]:
        for column, minimum in by_column.items():
            if column not in challenger.subgroups:
                available = ", ".join(challenger.subgroups) or "none"
                details = (
                    f"is not a subgroup column of the test images (available: {available}); see evaluate.subgroups"
                )
                yield CheckItem(column, FAILED, details)
                continue
            for value, subgroup in challenger.subgroups[column].items():
                yield check_subgroup(f"{column} {value}", subgroup, minimum)

    def check_subgroup(name: str, subgroup: Mapping[str, Any], minimum: float) -> CheckItem:
        supports = {c: subgroup["per_class"][c]["support"] for c in _averaged_classes(challenger.test)}
        aucs = [
            subgroup["per_class"][c]["auc"]
            for c, support in supports.items()
            if min(support, subgroup["images"] - support) >= criteria.min_cases
        ]
        if subgroup["groups"] < criteria.min_cases:
            return CheckItem(name, NOT_EVALUATED, f"n = {subgroup['groups']}")
        if not aucs:
            return CheckItem(name, NOT_EVALUATED, f"n = {subgroup['groups']}, too few cases of each class")
        mean_auc = float(np.mean(aucs))
        return CheckItem(name, status_of(mean_auc >= minimum), f"{mean_auc:.4f} (n = {subgroup['images']})")

    limit = "the minimum of its column" if isinstance(minima, Mapping) else f"{minima:g}"
    yield combine_items("min_subgroup_auc", f"AUC of each subgroup at least {limit}", check_columns())


def _check_calibration(error: float | None, criteria: PromotionCriteria) -> Iterator[Check]:
    if criteria.max_ece is None:
        return
    requirement = f"calibration error at most {criteria.max_ece:g}"
    if error is None:
        yield Check("max_ece", requirement, FAILED, "undefined")
    else:
        yield Check("max_ece", requirement, status_of(error <= criteria.max_ece), f"{error:.4f}")


def _check_sensitivity(
    challenger: Challenger, cases: Mapping[str, int], criteria: PromotionCriteria
) -> Iterator[Check]:
    minimum = criteria.min_sensitivity
    if minimum is None:
        return

    def check_class(name: str) -> CheckItem:
        point = challenger.operating_points[criteria.operating_point].get(name)
        if point is None:
            return CheckItem(name, NOT_EVALUATED, "no threshold: val or test lacks positives or negatives")
        sensitivity = point["on_test"]["sensitivity"]
        bounds = None if sensitivity["low"] is None else (sensitivity["low"], sensitivity["high"])
        details = format_with_interval(sensitivity["value"], bounds)
        return CheckItem(name, status_of(sensitivity["value"] >= minimum), details)

    requirement = f"sensitivity at the operating point {criteria.operating_point} at least {minimum:g}"
    items = _check_each_class(challenger, cases, criteria, check_class)
    yield combine_items("min_sensitivity", requirement, items)


def _compare_with_champion(
    challenger: Challenger, champion: Predictions, criteria: PromotionCriteria
) -> tuple[list[Check], float | None]:
    """Return the checks against the champion, and the AUC of the champion."""
    test = challenger.test
    if champion.task.name != test.task.name or champion.classes != test.classes:
        details = f"the champion has {', '.join(champion.classes)}; give this model its own promote.model_name"
        return [Check("same_classes", "same classes as the champion", FAILED, details)], None
    requirement = "same test images as the champion"
    if test.fingerprint() != champion.fingerprint():
        details = "the champion was evaluated on other test images; give this model its own promote.model_name"
        return [Check("same_test_images", requirement, FAILED, details)], None
    checks = [Check("same_test_images", requirement, PASSED, "equal ids and labels")]
    champion_scores = _check_scores("champion_finite", "every score of the champion is in [0, 1]", champion)
    if champion_scores.status == FAILED:
        return [*checks, champion_scores], None
    champion_auc = auc(champion.labels, champion.scores, champion.task)
    difference = paired_auc_difference(test, champion, challenger.confidence)
    level = f"{100 * challenger.confidence:g} %"
    name = "not_inferior" if criteria.min_gain is None else "better"
    if criteria.min_gain is None:
        requirement = f"test AUC not lower than the champion's by more than {criteria.margin:g}, at {level}"
    else:
        requirement = f"test AUC higher than the champion's by more than {criteria.min_gain:g}, at {level}"
    if difference is None:
        details = "cannot be compared: no class has positives and negatives of two patients, lesions or images each"
        return [*checks, Check(name, requirement, FAILED, details)], champion_auc
    passed = difference.low >= -criteria.margin if criteria.min_gain is None else difference.low > criteria.min_gain
    details = f"difference {difference.value:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"
    return [*checks, Check(name, requirement, status_of(passed), details)], champion_auc


def paired_auc_difference(first: Predictions, second: Predictions, confidence: float) -> AUCDifference | None:
    """Compare the mean AUCs of two models on the same images: first minus second, with a paired interval.

    Args:
        first: predictions of one model.
        second: predictions of the other model on the same images, in any order.
        confidence: level of the interval.

    Returns:
        None if no class has positives and negatives in two groups (patients, lesions) each.
    """
    frames = [predictions.frame.sort_values("id", kind="stable") for predictions in (first, second)]
    first, second = (Predictions(frame, first.task, first.classes) for frame in frames)
    truth = one_versus_rest(first.labels, len(first.classes), first.task)
    columns = [first.classes.index(name) for name in _averaged_classes(first)]
    columns = [c for c in columns if truth[:, c].any() and not truth[:, c].all()]
    if not columns:
        return None
    groups = bootstrap.encode_groups(first.frame["group"])
    truths = [truth[:, c] for c in columns]
    first_scores, second_scores = ([predictions.scores[:, c] for c in columns] for predictions in (first, second))
    try:
        return delong.auc_difference(truths, first_scores, second_scores, groups, confidence)
    except ValueError:  # all positives, or all negatives, are in one group
        return None


def _averaged_classes(predictions: Predictions) -> list[str]:
    """Return the classes of the mean AUC, including those with too few cases."""
    return [predictions.classes[c] for c in curve_classes(predictions)]


def _count_cases(predictions: Predictions) -> dict[str, int]:
    """Count the groups (patients, lesions or single images) of each class: the smaller of positives and negatives."""
    groups = bootstrap.encode_groups(predictions.frame["group"])
    truth = one_versus_rest(predictions.labels, len(predictions.classes), predictions.task)
    return {
        name: min(len(np.unique(groups[rows])) for rows in (truth[:, c], ~truth[:, c]))
        for c, name in enumerate(predictions.classes)
    }
