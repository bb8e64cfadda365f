"""Operating points: above which score an image is called positive, chosen on val and judged on test; net benefit.

A point is chosen for each class against the rest, or each finding; of two classes for the last one. A threshold lies
half way between two scores of val, so that none of them stands on it.
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

THRESHOLD_PROBABILITIES = np.arange(1, 100) / 100  # at which net benefit is told


def choose_threshold(truth: Truth, score: Floats, rule: str, least: float | None) -> float | None:
    """The score from which on an image is called positive.

    Args:
        truth: which images are positive, (images,).
        score: (images,), in [0, 1].
        rule: `youden` (the largest sum of sensitivity and specificity, Youden 1950), `sensitivity` (as specific as it
            can be with at least that sensitivity) or `specificity` (the other way round).
        least: sensitivity or specificity that is asked for.

    Returns:
        None where there are no positives, or no negatives.
    """
    if truth.all() or not truth.any():
        return None
    false, true, scores = roc_curve(truth, score, drop_intermediate=False)
    if rule == "youden":
        place = int(np.argmax(true - false))
    elif rule == "sensitivity":
        place = int(np.argmax(true >= least))  # the first, of the highest threshold
    else:
        place = int(np.flatnonzero(1 - false >= least)[-1])
    if place == 0:  # roc_curve begins where nothing is positive
        return float(np.nextafter(max(1.0, scores[1]), np.inf))
    above, below = float(scores[place]), float(scores[place + 1]) if place + 1 < len(scores) else 0.0
    middle = (above + below) / 2
    return middle if below < middle else above  # neighbours that no number lies between


def select_operating_points(
    val: Predictions, test: Predictions, wanted: Mapping[str, float | None], confidence: float
) -> dict[str, dict[str, Any]]:
    """Thresholds by val, and what they give on test with intervals.

    Args:
        val: images that choose the thresholds.
        test: images that judge them.
        wanted: rules, and the least value that each asks for.
        confidence: of the intervals.

    Returns:
        By rule and class: `threshold`, `on_val` (sensitivity, specificity) and `on_test`, where each share has `value`,
        `low` and `high`; None for a class that val or test cannot judge.
    """
    count = len(val.classes)
    truth_val, truth = (one_versus_rest(part.labels, count, part.task) for part in (val, test))
    groups = bootstrap.encode_groups(test.frame["group"])
    found: dict[str, dict[str, Any]] = {}
    for rule, least in wanted.items():
        found[rule] = {}
        for c in curve_classes(val):
            name, score, of_class = val.classes[c], test.scores[:, c], truth[:, c]
            limit = choose_threshold(truth_val[:, c], val.scores[:, c], rule, least)
            if limit is None or of_class.all() or not of_class.any():
                found[rule][name] = None
                continue
            called = score >= limit
            parts = _numerators_and_denominators(of_class, called)
            bounds = {
                "sensitivity": proportion_interval(called, of_class, groups, confidence),
                "specificity": proportion_interval(~called, ~of_class, groups, confidence),
                "positive_predictive_value": predictive_value_interval(called, of_class, groups, confidence),
                "negative_predictive_value": predictive_value_interval(~called, ~of_class, groups, confidence),
            }
            on_val = _numerators_and_denominators(truth_val[:, c], val.scores[:, c] >= limit)
            found[rule][name] = {
                "threshold": limit,
                "on_val": {share: _proportion(*on_val[share]) for share in ("sensitivity", "specificity")},
                "on_test": {share: _with_bounds(_proportion(*part), bounds[share]) for share, part in parts.items()},
            }
    return found


def net_benefit(predictions: Predictions) -> pd.DataFrame:
    """Decision curves (Vickers and Elkin 2006, doi:10.1177/0272989X06295361) of the classes that can be judged.

    At a threshold probability p, true positives less p / (1 - p) times the false ones, per image: of the model, and of
    calling all images positive. Calling none positive gives 0.

    Returns:
        Columns class, probability, model, all.
    """
    truth = one_versus_rest(predictions.labels, len(predictions.classes), predictions.task)
    parts = [pd.DataFrame({"class": pd.Series(dtype="str"), **dict.fromkeys(("probability", "model", "all"), 0.0)})]
    for c in curve_classes(predictions):
        if truth[:, c].all() or not truth[:, c].any():
            continue
        called = predictions.scores[:, c][:, None] >= THRESHOLD_PROBABILITIES  # images, probabilities
        odds, prevalence = THRESHOLD_PROBABILITIES / (1 - THRESHOLD_PROBABILITIES), truth[:, c].mean()
        of_model = called[truth[:, c]].sum(axis=0) - odds * called[~truth[:, c]].sum(axis=0)
        columns = {
            "class": predictions.classes[c], "probability": THRESHOLD_PROBABILITIES, "model": of_model / len(truth),
            "all": prevalence - odds * (1 - prevalence),
        }  # fmt: skip
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts[1:] or parts, ignore_index=True)


def _numerators_and_denominators(truth: Truth, called: Truth) -> dict[str, tuple[Truth, Truth]]:
    """Of each share what is counted, and of what."""
    return {
        "sensitivity": (called, truth), "specificity": (~called, ~truth),
        "positive_predictive_value": (truth, called), "negative_predictive_value": (~truth, ~called),
    }  # fmt: skip


def _proportion(hits: Truth, trials: Truth) -> float | None:
    return float(hits[trials].mean()) if trials.any() else None


def _with_bounds(value: float | None, bound: Interval) -> dict[str, float | None]:
    low, high = (None, None) if bound is None else bound
    return {"value": value, "low": low, "high": high}
