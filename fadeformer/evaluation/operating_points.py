"""Operating points (decision thresholds), selected on val and evaluated on test, and net benefit.

There is one threshold per class (one against the rest) or finding; in binary tasks only for the last class. A threshold
is the midpoint of two adjacent val scores, so that no val score is equal to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

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


def select_operating_points(
    val: Predictions, test: Predictions, targets: Mapping[str, float | None], confidence: float
) -> dict[str, dict[str, Any]]:
    """Select thresholds on val and evaluate them on test, with intervals.

    Args:
        val: predictions for the selection.
        test: predictions for the evaluation.
        targets: target value by rule, see `choose_threshold`.
        confidence: level of the intervals.

    Returns:
        By rule and class: `threshold`, `on_val` (sensitivity, specificity) and `on_test`, where each proportion has
        `value`, `low` and `high`; None for a class without positives or without negatives in val or test.
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
            bounds = {
                "sensitivity": proportion_interval(predicted, truth, groups, confidence),
                "specificity": proportion_interval(~predicted, ~truth, groups, confidence),
                "positive_predictive_value": predictive_value_interval(predicted, truth, groups, confidence),
                "negative_predictive_value": predictive_value_interval(~predicted, ~truth, groups, confidence),
            }
            points[rule][name] = {
                "threshold": threshold,
                "on_val": {key: _proportion(*on_val[key]) for key in ("sensitivity", "specificity")},
                "on_test": {key: _with_bounds(_proportion(*counts), bounds[key]) for key, counts in on_test.items()},
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


def _proportion(hits: Truth, trials: Truth) -> float | None:
    return float(hits[trials].mean()) if trials.any() else None


def _with_bounds(value: float | None, bounds: Interval) -> dict[str, float | None]:
    low, high = (None, None) if bounds is None else bounds
    return {"value": value, "low": low, "high": high}
