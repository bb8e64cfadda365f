"""Operating points (decision thresholds), selected on val and evaluated on test, and net benefit.

There is one threshold per class (one against the rest) or finding; in binary tasks only for the last class. A threshold
is the midpoint of two adjacent val scores, so that no val score is equal to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from fadeformer.errors import UserError
from fadeformer.evaluation.intervals import bootstrap
from fadeformer.evaluation.intervals.bootstrap import Interval
from fadeformer.evaluation.intervals.proportions import predictive_value_interval, proportion_interval
from fadeformer.evaluation.metrics import curve_classes
from fadeformer.evaluation.predictions import Predictions
from fadeformer.tasks import one_versus_rest

Floats = NDArray[np.float64]
Truth = NDArray[np.bool_]

THRESHOLD_PROBABILITIES = np.arange(1, 100) / 100  # of the decision curves


def choose_threshold(truth: Truth, score: Floats, rule: str, target: float | None) -> float | None:
    """Choose the minimum score of a positive decision.

    Args:
        truth: True for positives, (images,).
        score: (images,), in [0, 1].
        rule: `youden` (maximum of sensitivity + specificity, Youden 1950), `sensitivity` (maximum specificity at a
            sensitivity of at least `target`) or `specificity` (the reverse).
        target: minimum sensitivity or specificity; None for `youden`.

    Returns:
        None if there are no positives or no negatives.
    """
    if truth.all() or not truth.any():
        return None
    fpr, tpr, thresholds = roc_curve(truth, score, drop_intermediate=False)
    if rule == "youden":
        index = int(np.argmax(tpr - fpr))
    elif rule == "sensitivity":
        index = int(np.argmax(tpr >= target))  # the first one has the highest threshold
    else:
        index = int(np.flatnonzero(1 - fpr >= target)[-1])
    if index == 0:  # roc_curve starts with a threshold above all scores
        return float(np.nextafter(max(1.0, thresholds[1]), np.inf))
    above, below = float(thresholds[index]), float(thresholds[index + 1]) if index + 1 < len(thresholds) else 0.0
    midpoint = (above + below) / 2
    return midpoint if below < midpoint else above  # adjacent floating-point numbers have no midpoint


def resolve_prevalences(
    setting: Sequence[float] | Mapping[str, Sequence[float]] | None, predictions: Predictions
) -> dict[str, Sequence[float]]:
    """Return the stated prevalences of each class or finding with an operating point.

    Args:
        setting: `evaluate.prevalence`: prevalences of all classes, or by class; None for none.
        predictions: of any split.

    Raises:
        UserError: a name is not a class with an operating point.
    """
    names = [predictions.classes[c] for c in curve_classes(predictions)]
    by_class = dict(setting) if isinstance(setting, Mapping) else dict.fromkeys(names, setting or [])
    for name in by_class:
        if name not in names:
            available = ", ".join(names)
            raise UserError(f"params.yaml: evaluate.prevalence names {name}; classes with a threshold: {available}")
    return by_class


def select_operating_points(
    val: Predictions,
    test: Predictions,
    targets: Mapping[str, float | None],
    confidence: float,
    prevalences: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Select thresholds on val and evaluate them on test, with intervals.

    Args:
        val: predictions for the selection.
        test: predictions for the evaluation.
        targets: target value by rule, see `choose_threshold`.
        confidence: level of the intervals.
        prevalences: stated prevalences by class, from `resolve_prevalences`; None for none.

    Returns:
        By rule and class: `threshold`; `on_val` (sensitivity, specificity); `on_test`, where each proportion has
        `value`, `low` and `high`, and the predictive values are those at the case mix of test as a random sample; and
        `at_prevalence`, a list of `prevalence` and both predictive values at it. None for a class without positives or
        without negatives in val or test.
    """
    count = len(val.classes)
    val_truth, test_truth = (one_versus_rest(split.labels, count, split.task) for split in (val, test))
    groups = bootstrap.encode_groups(test.frame["group"])
    points: dict[str, dict[str, Any]] = {}
    for rule, target in targets.items():
        points[rule] = {}
        for c in curve_classes(val):
            name, truth = val.classes[c], test_truth[:, c]
            threshold = choose_threshold(val_truth[:, c], val.scores[:, c], rule, target)
            if threshold is None or truth.all() or not truth.any():
                points[rule][name] = None
                continue
            predicted = test.scores[:, c] >= threshold
            on_val = _numerators_and_denominators(val_truth[:, c], val.scores[:, c] >= threshold)
            on_test = _numerators_and_denominators(truth, predicted)
            points[rule][name] = {
                "threshold": threshold,
                "on_val": {key: _proportion(*on_val[key]) for key in ("sensitivity", "specificity")},
                "on_test": {
                    key: _with_bounds(_proportion(*masks), proportion_interval(*masks, groups, confidence))
                    for key, masks in on_test.items()
                },
                "at_prevalence": [
                    _predictive_values(predicted, truth, groups, confidence, prevalence)
                    for prevalence in (prevalences or {}).get(name, [])
                ],
            }
    return points


def net_benefit(predictions: Predictions) -> pd.DataFrame:
    """Compute decision curves (Vickers and Elkin 2006, doi:10.1177/0272989X06295361).

    The net benefit at threshold probability p is (true positives - p / (1 - p) * false positives) / images, of the
    model and of treating all images as positive; treating none has net benefit 0. Classes without positives or without
    negatives are left out.

    Returns:
        Table with columns class, probability, model, all.
    """
    truth = one_versus_rest(predictions.labels, len(predictions.classes), predictions.task)
    tables = [pd.DataFrame({"class": pd.Series(dtype="str"), **dict.fromkeys(("probability", "model", "all"), 0.0)})]
    for c in curve_classes(predictions):
        if truth[:, c].all() or not truth[:, c].any():
            continue
        predicted = predictions.scores[:, c][:, None] >= THRESHOLD_PROBABILITIES  # images, probabilities
        odds, prevalence = THRESHOLD_PROBABILITIES / (1 - THRESHOLD_PROBABILITIES), truth[:, c].mean()
        benefit = predicted[truth[:, c]].sum(axis=0) - odds * predicted[~truth[:, c]].sum(axis=0)
        columns = {
            "class": predictions.classes[c], "probability": THRESHOLD_PROBABILITIES, "model": benefit / len(truth),
            "all": prevalence - odds * (1 - prevalence),
        }  # fmt: skip
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables[1:] or tables, ignore_index=True)


def _numerators_and_denominators(truth: Truth, predicted: Truth) -> dict[str, tuple[Truth, Truth]]:
    """Return the masks of numerator and denominator of each proportion."""
    return {
        "sensitivity": (predicted, truth), "specificity": (~predicted, ~truth),
        "positive_predictive_value": (truth, predicted), "negative_predictive_value": (~truth, ~predicted),
    }  # fmt: skip


def _predictive_values(
    predicted: Truth, truth: Truth, groups: NDArray[np.int64], confidence: float, prevalence: float
) -> dict[str, Any]:
    positive = predictive_value_interval(predicted, truth, groups, confidence, prevalence)
    negative = predictive_value_interval(~predicted, ~truth, groups, confidence, 1 - prevalence)
    values = {"positive_predictive_value": positive, "negative_predictive_value": negative}
    return {
        "prevalence": prevalence,
        **{name: dict(zip(("value", "low", "high"), v or (None,) * 3, strict=True)) for name, v in values.items()},
    }


def _proportion(hits: Truth, trials: Truth) -> float | None:
    return float(hits[trials].mean()) if trials.any() else None


def _with_bounds(value: float | None, bounds: Interval) -> dict[str, float | None]:
    low, high = (None, None) if bounds is None else bounds
    return {"value": value, "low": low, "high": high}
