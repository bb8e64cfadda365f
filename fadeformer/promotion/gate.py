"""The registry gate: what was found of a challenger and of the champion on the same images, to a decision with reasons.

It is pure: no file, no registry. A class, finding or subgroup with too few cases is `not judged`, with their number,
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
from fadeformer.evaluation.intervals.delong import Difference
from fadeformer.evaluation.metrics import auc, shown_classes
from fadeformer.evaluation.predictions import Predictions
from fadeformer.evaluation.summary import summarise
from fadeformer.io.formatting import told
from fadeformer.promotion.decision import FAILED, NOT_JUDGED, PASSED, Decision, Part, Rule, kept, of_parts
from fadeformer.tasks import one_versus_rest

UNDEFINED = "undefined: no class has both positives and negatives"


@dataclass(frozen=True)
class Asked:
    """What a champion has to show; the fields are keys of `promote:` in params.yaml, None where nothing is asked.

    Attributes:
        min_auc: least lower bound of the test AUC.
        min_class_auc: least AUC of each class or finding.
        min_subgroup_auc: least AUC of each subgroup: of all columns, or by column.
        min_cases: patients, lesions or single images with a class, and without it; with fewer it is not judged.
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
class Candidate:
    """What is known of a challenger.

    Attributes:
        test: its predictions on the test images.
        intervals: of `fadeformer.evaluation.summary.intervals`, of test.
        confidence: of all intervals.
        subgroups: of `fadeformer.evaluation.subgroups.compare`, of test.
        points: of `fadeformer.evaluation.operating_points.operating_points`.
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


def decide(of: Candidate, champion: Predictions | None, asked: Asked, forced: str | None = None) -> Decision:
    """Judges a challenger.

    Args:
        of: the challenger.
        champion: the present champion's predictions on the same test images; None where there is no champion.
        asked: what a champion has to show.
        forced: why the challenger is promoted whatever comes of it; None: by the rules alone.
    """
    rules = [_data(of), _finite("finite_scores", "every score is a number from 0 to 1", of.test)]
    if of.rolled_back is not None:
        rules.append(Rule("not_rolled_back", "was not taken back before", FAILED, f"taken back: {of.rolled_back}"))
    if rules[1].verdict == FAILED:  # nothing that follows could be computed
        return Decision(tuple(rules), None, None, forced)
    found, cases = summarise(of.test), _cases(of.test)
    area = found["overall"]["auc"]
    rules += [
        _min_auc(of, area, asked),
        *_classes(of, found, cases, asked),
        *_subgroups(of, asked),
        *_calibration(found["overall"]["calibration_error"], asked),
        *_sensitivity(of, cases, asked),
    ]
    best = None
    if champion is not None:
        compared, best = _against(of, champion, asked)
        rules += compared
    return Decision(tuple(rules), area, best, forced)


def _data(of: Candidate) -> Rule:
    figures = "it did" if of.data_passed else "it did not"
    return Rule("data_gate", "the data gate let the data pass", kept(of.data_passed), figures)


def _finite(name: str, rule: str, predictions: Predictions) -> Rule:
    scores = predictions.scores
    with np.errstate(invalid="ignore"):
        wrong = ~((scores >= 0) & (scores <= 1)).all(axis=1)
    if not len(scores):
        return Rule(name, rule, FAILED, "there are no test images")
    if not wrong.any():
        return Rule(name, rule, PASSED, f"{len(scores):,} images")
    first = predictions.frame["id"].to_numpy()[wrong][0]
    return Rule(name, rule, FAILED, f"{int(wrong.sum()):,} images have others, such as {first}")


def _min_auc(of: Candidate, area: float | None, asked: Asked) -> Rule:
    rule = f"lower bound of the test AUC at least {asked.min_auc:g}"
    bounds = of.intervals["overall"]["auc"]
    if area is None:
        return Rule("min_auc", rule, FAILED, UNDEFINED)
    if bounds is None:
        return Rule("min_auc", rule, FAILED, f"{area:.4f} without an interval: too few patients, lesions or images")
    return Rule("min_auc", rule, kept(bounds[0] >= asked.min_auc), told(area, bounds))


def _classes(of: Candidate, found: Mapping[str, Any], cases: Mapping[str, int], asked: Asked) -> Iterator[Rule]:
    least = asked.min_class_auc
    if least is None:
        return

    def part(name: str) -> Part:
        area = found["per_class"][name]["auc"]
        return Part(name, kept(area >= least), told(area, of.intervals["per_class"][name]["auc"]))

    what = "finding" if of.test.task.multi_label else "class"
    yield of_parts("min_class_auc", f"AUC of each {what} at least {least:g}", _each(of, cases, asked, part))


def _each(of: Candidate, cases: Mapping[str, int], asked: Asked, judge: Callable[[str], Part]) -> Iterator[Part]:
    """The classes one by one, those with too few cases not judged."""
    for name in _judged(of.test):
        few = cases[name] < asked.min_cases
        yield Part(name, NOT_JUDGED, f"n = {cases[name]}") if few else judge(name)


def _subgroups(of: Candidate, asked: Asked) -> Iterator[Rule]:
    if asked.min_subgroup_auc is None:
        return
    floors = asked.min_subgroup_auc
    by_column = dict(floors) if isinstance(floors, Mapping) else dict.fromkeys(of.subgroups, floors)

    def parts() -> Iterator[Part]:
        for column, least in by_column.items():
            if column not in of.subgroups:
                there = ", ".join(of.subgroups) or "none"
                told_of = f"is not known of the test images (known: {there}); see evaluate.subgroups"
                yield Part(column, FAILED, told_of)
                continue
            for value, one in of.subgroups[column].items():
                yield part(f"{column} {value}", one, least)

    def part(name: str, one: Mapping[str, Any], least: float) -> Part:
        supports = {of_class: one["per_class"][of_class]["support"] for of_class in _judged(of.test)}
        areas = [
            one["per_class"][of_class]["auc"]
            for of_class, support in supports.items()
            if min(support, one["images"] - support) >= asked.min_cases
        ]
        if one["groups"] < asked.min_cases:
            return Part(name, NOT_JUDGED, f"n = {one['groups']}")
        if not areas:
            return Part(name, NOT_JUDGED, f"n = {one['groups']}, of no class enough")
        area = float(np.mean(areas))
        return Part(name, kept(area >= least), f"{area:.4f} (n = {one['images']})")

    each = f"at least {floors:g}" if not isinstance(floors, Mapping) else "at least as asked of its column"
    yield of_parts("min_subgroup_auc", f"AUC of each subgroup {each}", parts())


def _calibration(error: float | None, asked: Asked) -> Iterator[Rule]:
    if asked.max_ece is None:
        return
    rule = f"calibration error at most {asked.max_ece:g}"
    if error is None:
        yield Rule("max_ece", rule, FAILED, "undefined")
    else:
        yield Rule("max_ece", rule, kept(error <= asked.max_ece), f"{error:.4f}")


def _sensitivity(of: Candidate, cases: Mapping[str, int], asked: Asked) -> Iterator[Rule]:
    least = asked.min_sensitivity
    if least is None:
        return

    def part(name: str) -> Part:
        point = of.points[asked.operating_point].get(name)
        if point is None:
            return Part(name, NOT_JUDGED, "no threshold, since validation lacks images with or without it")
        share = point["on_test"]["sensitivity"]
        bounds = None if share["low"] is None else (share["low"], share["high"])
        return Part(name, kept(share["value"] >= least), told(share["value"], bounds))

    rule = f"sensitivity at the operating point {asked.operating_point} at least {least:g}"
    yield of_parts("min_sensitivity", rule, _each(of, cases, asked, part))


def _against(of: Candidate, champion: Predictions, asked: Asked) -> tuple[list[Rule], float | None]:
    """The rules of a comparison, and the champion's AUC."""
    same_classes = "same classes as the champion"
    if champion.task.name != of.test.task.name or champion.classes != of.test.classes:
        theirs = f"the champion's are {', '.join(champion.classes)}; give this model its own promote.model_name"
        return [Rule("same_classes", same_classes, FAILED, theirs)], None
    same = "same test images as the champion"
    if of.test.identity() != champion.identity():
        figures = "the champion was judged on other test images; give this model its own promote.model_name"
        return [Rule("same_test_images", same, FAILED, figures)], None
    rules = [Rule("same_test_images", same, PASSED, "equal ids and labels")]
    of_champion = _finite("champion_finite", "every score of the champion is a number from 0 to 1", champion)
    if of_champion.verdict == FAILED:
        return [*rules, of_champion], None
    best = auc(champion.labels, champion.scores, champion.task)
    difference = compared(of.test, champion, of.confidence)
    percent = f"{100 * of.confidence:g} %"
    name = "not_inferior" if asked.min_gain is None else "better"
    if asked.min_gain is None:
        rule = f"test AUC not lower than the champion's by more than {asked.margin:g}, at {percent}"
    else:
        rule = f"test AUC higher than the champion's by more than {asked.min_gain:g}, at {percent}"
    if difference is None:
        figures = "cannot be compared: no class has positives and negatives of two patients, lesions or images each"
        return [*rules, Rule(name, rule, FAILED, figures)], best
    passed = difference.low > asked.min_gain if asked.min_gain is not None else difference.low >= -asked.margin
    figures = f"difference {difference.value:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"
    return [*rules, Rule(name, rule, kept(passed), figures)], best


def compared(first: Predictions, second: Predictions, confidence: float) -> Difference | None:
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
    places = [first.classes.index(name) for name in _judged(ours)]
    places = [c for c in places if truth[:, c].any() and not truth[:, c].all()]
    if not places:
        return None
    groups = bootstrap.group_numbers(mine["group"])
    truths = [truth[:, c] for c in places]
    scores, of_others = ([part.scores[:, c] for c in places] for part in (ours, others))
    try:
        return delong.difference(truths, scores, of_others, groups, confidence)
    except ValueError:  # of one group alone
        return None


def _judged(predictions: Predictions) -> list[str]:
    """The classes that the mean AUC is made of, be they too rare or not."""
    return [predictions.classes[c] for c in shown_classes(predictions)]


def _cases(predictions: Predictions) -> dict[str, int]:
    """Of each class the fewer of: patients, lesions or single images with it, and without it."""
    groups = bootstrap.group_numbers(predictions.frame["group"])
    truth = one_versus_rest(predictions.labels, len(predictions.classes), predictions.task)
    return {
        name: min(len(np.unique(groups[is_so])) for is_so in (truth[:, c], ~truth[:, c]))
        for c, name in enumerate(predictions.classes)
    }
