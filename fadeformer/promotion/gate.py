"""Promotion gate: check a challenger against the criteria and against earlier champions, and decide with reasons.

A pure function of its inputs, without file or registry access. Every check passes, fails, or is not assessed because
there are too few cases; a model is promoted if no check failed and, unless `promote.not_assessed` is `allow`, all were
assessed. Intervals are at the level that the number of this candidate on the same test images has left
(`fadeformer.promotion.alpha_spending`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fadeformer.evaluation.intervals import bootstrap
from fadeformer.evaluation.intervals.proportions import proportion_interval
from fadeformer.evaluation.predictions import CONTENT
from fadeformer.evaluation.summary import auc_intervals, summarize
from fadeformer.io.formatting import format_with_interval
from fadeformer.promotion import comparison
from fadeformer.promotion.comparison import Opponent
from fadeformer.promotion.criteria import (
    Challenger,
    PromotionCriteria,
    averaged_classes,
    check_scores,
    count_cases,
    decide_as_deployed,
)
from fadeformer.promotion.decision import (
    FAILED,
    NOT_ASSESSED,
    PASSED,
    Check,
    CheckItem,
    Decision,
    combine_items,
    status_of,
)
from fadeformer.tasks import one_versus_rest

MAX_SCORE_RATIO = 2.0  # of mean score and observed frequency of a class; with 20 cases, chance reaches 1.5
UNDEFINED_AUC = "undefined: no class has positives and negatives of two patients, lesions or images each"


def decide(
    challenger: Challenger,
    champion: Opponent | None,
    criteria: PromotionCriteria,
    best: Opponent | None = None,
    force_reason: str | None = None,
) -> Decision:
    """Run all checks on a challenger.

    Args:
        challenger: the new model.
        champion: the current champion; None without one.
        criteria: minimum requirements.
        best: the best champion so far; None if it is the current one, or without one.
        force_reason: promote regardless of the checks, for this reason; None: the checks decide.
    """
    allow = criteria.not_assessed == "allow"
    scores_check = check_scores("finite_scores", "every score is in [0, 1]", challenger.test)
    checks = [_check_data(challenger), *_check_initial_weights(challenger), scores_check]
    if challenger.rollback_reason is not None:
        details = f"rolled back: {challenger.rollback_reason}"
        checks.append(Check("not_rolled_back", "was never rolled back", FAILED, details))
    if scores_check.status == FAILED:  # no metric can be computed
        return Decision(tuple(checks), None, None, force_reason, allow)
    metrics, cases = summarize(challenger.test), count_cases(challenger.test)
    test_auc = metrics["overall"]["auc"]
    intervals = auc_intervals(challenger.test, challenger.paid_confidence)
    checks += [
        _check_min_auc(challenger, test_auc, intervals["overall"], criteria),
        *_check_class_aucs(challenger, metrics, intervals, cases, criteria),
        *_check_subgroup_aucs(challenger, criteria),
        *_check_calibration(challenger, metrics, cases, criteria),
        *_check_recall(challenger, criteria),
    ]
    champion_auc = None
    if champion is not None:
        champion_checks, champion_auc = comparison.compare_with_champion(challenger, champion, criteria)
        checks += champion_checks
    if best is not None:
        checks.append(comparison.compare_with_best(challenger, best, criteria))
    return Decision(tuple(checks), test_auc, champion_auc, force_reason, allow)


def _check_data(challenger: Challenger) -> Check:
    details = "passed" if challenger.is_data_valid else "failed"
    if warnings := challenger.data_warnings:
        details += f", with warnings: {'. '.join(warnings)}"
    return Check("data_gate", "data validation passed", status_of(challenger.is_data_valid), details)


def _check_initial_weights(challenger: Challenger) -> Iterator[Check]:
    """Check that no test image was a training image of the initial weights."""
    if challenger.initial_weights is None:
        return
    name, requirement = "initial_weights", "test images that the initial weights were not trained on"
    if challenger.initial_images is None:
        details = f"{challenger.initial_weights} has no training_images.parquet next to it"
        yield Check(name, requirement, NOT_ASSESSED, details)
        return
    frame = challenger.test.frame
    seen = frame["id"][frame[CONTENT].isin(challenger.initial_images)]
    if len(seen):
        details = (
            f"{len(seen):,} test images were training images of {challenger.initial_weights}, such as {seen.iloc[0]}"
        )
        yield Check(name, requirement, FAILED, details)
    else:
        yield Check(name, requirement, PASSED, f"{len(frame):,} images")


def _check_min_auc(
    challenger: Challenger, test_auc: float | None, bounds: tuple[float, float] | None, criteria: PromotionCriteria
) -> Check:
    level = f"at {100 * challenger.paid_confidence:.6g} %"
    requirement = f"lower bound of the test AUC at least {criteria.min_auc:g}, {level}"
    if test_auc is None or bounds is None:
        return Check("min_auc", requirement, FAILED, UNDEFINED_AUC)
    status = status_of(bounds[0] >= criteria.min_auc)
    return Check("min_auc", requirement, status, format_with_interval(test_auc, bounds))


def _check_class_aucs(
    challenger: Challenger,
    metrics: Mapping[str, Any],
    intervals: Mapping[str, Any],
    cases: Mapping[str, int],
    criteria: PromotionCriteria,
) -> Iterator[Check]:
    minimum = criteria.min_class_auc
    if minimum is None:
        return

    def check_class(name: str) -> CheckItem:
        class_auc, bounds = metrics["per_class"][name]["auc"], intervals["per_class"][name]
        if class_auc is None:
            return CheckItem(
                name, NOT_ASSESSED, "undefined: all its positives or negatives are of one patient or lesion"
            )
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
    """Check each class; those with too few cases are not assessed."""
    for name in averaged_classes(challenger.test):
        if cases[name] < criteria.min_cases:
            yield CheckItem(name, NOT_ASSESSED, f"n = {cases[name]}")
        else:
            yield check_class(name)


def _check_subgroup_aucs(challenger: Challenger, criteria: PromotionCriteria) -> Iterator[Check]:
    minima = criteria.min_subgroup_auc
    if minima is None or (not challenger.subgroups and not isinstance(minima, Mapping)):
        return
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
        supports = {c: subgroup["per_class"][c]["support"] for c in averaged_classes(challenger.test)}
        aucs = [
            subgroup["per_class"][c]["auc"]
            for c, support in supports.items()
            if min(support, subgroup["images"] - support) >= criteria.min_cases
            and subgroup["per_class"][c]["auc"] is not None
        ]
        if subgroup["groups"] < criteria.min_cases:
            return CheckItem(name, NOT_ASSESSED, f"n = {subgroup['groups']}")
        if not aucs:
            return CheckItem(name, NOT_ASSESSED, f"n = {subgroup['groups']}, too few cases of each class")
        mean_auc = float(np.mean(aucs))
        return CheckItem(name, status_of(mean_auc >= minimum), f"{mean_auc:.4f} (n = {subgroup['images']})")

    limit = "the minimum of its column" if isinstance(minima, Mapping) else f"{minima:g}"
    yield combine_items("min_subgroup_auc", f"AUC of each subgroup at least {limit}", check_columns(), required=False)


def _check_calibration(
    challenger: Challenger, metrics: Mapping[str, Any], cases: Mapping[str, int], criteria: PromotionCriteria
) -> Iterator[Check]:
    """Check the calibration error of each class, and its mean score, which a small error hides in a rare class."""
    limit = criteria.max_ece
    if limit is None:
        return

    def check_class(name: str) -> CheckItem:
        values = metrics["per_class"][name]
        error, mean, frequency = values["class_calibration_error"], values["mean_score"], values["prevalence"]
        passed = error <= limit and frequency / MAX_SCORE_RATIO <= mean <= frequency * MAX_SCORE_RATIO
        return CheckItem(name, status_of(passed), f"{error:.4f} (mean score {mean:.4f}, observed {frequency:.4f})")

    requirement = (
        f"calibration error of each class at most {limit:g}, and its mean score at most {MAX_SCORE_RATIO:g} times too"
        " high or too low"
    )
    yield combine_items("max_ece", requirement, _check_each_class(challenger, cases, criteria, check_class))


def _check_recall(challenger: Challenger, criteria: PromotionCriteria) -> Iterator[Check]:
    """Check the recall of each class by the decision of the deployed model."""
    minimum, test = criteria.min_sensitivity, challenger.test
    if minimum is None:
        return
    decisions = decide_as_deployed(test, challenger.operating_points, criteria.operating_point)
    truth = one_versus_rest(test.labels, len(test.classes), test.task)
    groups = bootstrap.encode_groups(test.frame["group"])

    def check_classes() -> Iterator[CheckItem]:
        for c, name in enumerate(test.classes):
            rows = truth[:, c]
            count = len(np.unique(groups[rows]))
            bounds = proportion_interval(decisions[:, c], rows, groups, challenger.paid_confidence)
            if count < criteria.min_cases or bounds is None:
                yield CheckItem(name, NOT_ASSESSED, f"n = {count}")
            else:
                details = format_with_interval(float(decisions[rows, c].mean()), bounds)
                yield CheckItem(name, status_of(bounds[0] >= minimum), details)

    requirement = f"lower bound of the recall of each class by the deployed decision at least {minimum:g}"
    yield combine_items("min_sensitivity", requirement, check_classes())
