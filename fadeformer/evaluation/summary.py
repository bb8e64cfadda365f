"""Metrics with confidence intervals, as nested plain values.

Means leave out classes with positives or negatives of fewer than two patients, lesions or images, which are listed.
Macro precision, recall and F1 are means over the classes that an image has or is predicted to have; an undefined term
counts as 0. For exclusive classes this equals scikit-learn with `zero_division=0`, as in the published results. For
findings scikit-learn also counts those that no image has and none is predicted to have, as 0; here they are left out.
Undefined values are None, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, logit

from fadeformer.evaluation.intervals import bootstrap, delong
from fadeformer.evaluation.intervals.bootstrap import Interval
from fadeformer.evaluation.intervals.proportions import estimate_mean_proportion, proportion_interval
from fadeformer.evaluation.predictions import Predictions
from fadeformer.evaluation.recalibration import recalibrate, recalibration_intervals
from fadeformer.evaluation.weighted_metrics import MetricSamples, WeightedMetrics

NUM_HALF_SAMPLES = 200  # for the bias correction of average precision
CALIBRATION_METRICS = (
    "loss",
    "brier",
    "calibration_error",
    "class_calibration_error",
)  # reported before and after calibration


def summarize(predictions: Predictions) -> dict[str, Any]:
    """Compute all metrics.

    Returns:
        `images`, `overall`, `per_class` by class name, and `not_evaluated`: classes that the means leave out.
        `class_calibration_error` is in `overall` (the mean over classes; of two exclusive ones that of the last) and in
        `per_class`; `calibration_slope` and `calibration_intercept` are in `per_class` only.
    """
    metrics = WeightedMetrics(predictions)
    point = metrics.compute(np.ones((1, len(predictions.frame))))
    support, calibration_errors = metrics.truth.sum(axis=0), metrics.class_calibration_errors()
    fits = [recalibrate(truth, metrics.scores[:, c]) for c, truth in enumerate(metrics.truth.T)]
    per_class = {
        name: {
            "support": int(support[c]),
            "prevalence": float(support[c] / len(metrics.truth)),
            **{key: _finite_or_none(values[0, c]) for key, values in point.per_class.items()},
            "mean_score": float(metrics.scores[:, c].mean()),
            "class_calibration_error": _finite_or_none(calibration_errors[c]),
            "calibration_slope": fits[c].slope,
            "calibration_intercept": fits[c].intercept,
        }
        for c, name in enumerate(predictions.classes)
    }
    return {
        "images": len(metrics.truth),
        "overall": {
            **{key: _finite_or_none(values[0]) for key, values in point.overall.items()},
            "class_calibration_error": _finite_or_none(metrics.class_mean(calibration_errors[None])[0]),
        },
        "per_class": per_class,
        "not_evaluated": [
            name for name, averaged in zip(predictions.classes, metrics.averaged, strict=True) if not averaged
        ],
    }


def confidence_intervals(predictions: Predictions, *, n_resamples: int, seed: int, confidence: float) -> dict[str, Any]:
    """Compute the confidence interval of every metric of `summarize`.

    AUCs have DeLong intervals, proportions Wilson intervals, and means of proportions (balanced accuracy, macro
    sensitivity and specificity) intervals that follow from exact bounds (MOVER). The interval of a precision takes the
    images as a random sample, at the case mix of the split. Calibration slope and intercept have those of
    `recalibration_intervals`. All other metrics use a stratified cluster bootstrap of patients or lesions: percentile
    intervals, wider for classes with few groups; for average precision and the pooled AUC a normal interval on the
    logit scale (Boyd et al. 2013, doi:10.1007/978-3-642-40994-3_29) with a half-sample bias correction, because average
    precision is biased upward in small samples and more so in resamples with repeated images. Calibration errors have
    none: every resample overestimates them by more than their standard deviation (docs/reference/evaluation.md).

    Args:
        predictions: of one split.
        n_resamples: number of bootstrap resamples.
        seed: of the bootstrap.
        confidence: level of the intervals, such as 0.95.

    Returns:
        `groups`, the number of patients, lesions or single images, and `overall` and `per_class` with (low, high). None
        if there is no interval, as for a perfect bootstrapped metric, whose resamples are all identical.
    """
    metrics, groups = WeightedMetrics(predictions), bootstrap.encode_groups(predictions.frame["group"])
    strata = bootstrap.assign_strata(metrics.truth, groups)
    chunks = bootstrap.map_resamples(metrics.compute, groups, strata, n_resamples, seed)
    return intervals_from_samples(metrics, predictions.classes, groups, concat_samples(chunks), confidence)


def concat_samples(chunks: Sequence[MetricSamples]) -> MetricSamples:
    """Concatenate chunks of samples."""

    def concat(chunk_values: Sequence[Mapping[str, NDArray[np.float64]]]) -> dict[str, NDArray[np.float64]]:
        return {name: np.concatenate([values[name] for values in chunk_values]) for name in chunk_values[0]}

    return MetricSamples(concat([chunk.overall for chunk in chunks]), concat([chunk.per_class for chunk in chunks]))


def intervals_from_samples(
    metrics: WeightedMetrics,
    classes: Sequence[str],
    groups: NDArray[np.int64],
    samples: MetricSamples,
    confidence: float,
) -> dict[str, Any]:
    """Compute the intervals of `confidence_intervals` from given bootstrap samples.

    Args:
        metrics: of the predictions.
        classes: class names, in the order of the scores.
        groups: group code of each image, consecutive from 0, (images,).
        samples: bootstrap samples of all metrics.
        confidence: level of the intervals, such as 0.95.
    """
    num_groups = int(groups.max()) + 1
    point, strata = metrics.compute(np.ones((1, len(groups)))), bootstrap.assign_strata(metrics.truth, groups)
    with np.errstate(invalid="ignore", divide="ignore"):  # a half-sample may have no image of a class
        half = metrics.compute_areas(bootstrap.half_sample_weights(groups, strata, NUM_HALF_SAMPLES, 0))
    groups_per_stratum = max(min(num_groups, 2), num_groups // len(np.unique(strata)))
    overall = {
        name: _bootstrap_interval(
            name, float(point.overall[name][0]), values, half.overall.get(name), groups_per_stratum, confidence
        )
        for name, values in samples.overall.items()
    }
    min_groups = [
        min(len(np.unique(groups[metrics.truth[:, c]])), len(np.unique(groups[~metrics.truth[:, c]])))
        for c in range(len(classes))
    ]
    per_class: dict[str, dict[str, Interval]] = {name: {} for name in classes}
    for key, values in samples.per_class.items():
        for c, name in enumerate(classes):
            value = float(point.per_class[key][0, c])
            half_values = half.per_class[key][:, c] if key in half.per_class else None
            effective_groups = min_groups[c] if half_values is None else num_groups
            per_class[name][key] = _bootstrap_interval(
                key, value, values[:, c], half_values, effective_groups, confidence
            )
    overall |= _proportion_intervals(metrics, groups, confidence)
    overall["class_calibration_error"] = None
    for c, name in enumerate(classes):
        truth, predicted = metrics.truth[:, c], metrics.predicted[:, c]
        recalibrated = recalibration_intervals(truth, metrics.scores[:, c], groups, confidence)
        per_class[name] |= {"class_calibration_error": None} | {
            f"calibration_{key}": bounds for key, bounds in recalibrated._asdict().items()
        }
        masks = {"recall": (predicted, truth), "specificity": (~predicted, ~truth), "precision": (truth, predicted)}
        for key, (hits, trials) in masks.items():
            per_class[name][key] = proportion_interval(hits, trials, groups, confidence)
    areas = _auc_intervals(metrics, classes, groups, confidence)
    overall["auc"] = areas["overall"]
    for name, bounds in areas["per_class"].items():
        per_class[name]["auc"] = bounds
    return {"groups": num_groups, "overall": overall, "per_class": per_class}


def auc_intervals(predictions: Predictions, confidence: float) -> dict[str, Any]:
    """Compute only the intervals of the AUCs: `overall`, and `per_class` by class name; None for an undefined AUC."""
    groups = bootstrap.encode_groups(predictions.frame["group"])
    return _auc_intervals(WeightedMetrics(predictions), predictions.classes, groups, confidence)


def _auc_intervals(
    metrics: WeightedMetrics, classes: Sequence[str], groups: NDArray[np.int64], confidence: float
) -> dict[str, Any]:
    evaluable = np.flatnonzero(metrics.evaluable).tolist()
    per_class: dict[str, Interval] = dict.fromkeys(classes)
    if not evaluable:
        return {"overall": None, "per_class": per_class}
    estimates = delong.estimate_aucs(
        [metrics.truth[:, c] for c in evaluable], [metrics.scores[:, c] for c in evaluable], groups
    )
    for curve, c in enumerate(evaluable):
        per_class[classes[c]] = delong.mean_auc_interval(estimates, [curve], confidence)
    averaged = [curve for curve, c in enumerate(evaluable) if metrics.averaged[c]]
    if metrics.is_exclusive and len(classes) == 2:
        averaged = averaged[-1:]
    overall = delong.mean_auc_interval(estimates, averaged, confidence) if averaged else None
    return {"overall": overall, "per_class": per_class}


def _proportion_intervals(
    metrics: WeightedMetrics, groups: NDArray[np.int64], confidence: float
) -> dict[str, Interval]:
    """Compute the intervals of accuracy and of the means of proportions over classes or findings.

    Macro sensitivity counts a class without positives that is predicted as 0 (`WeightedMetrics`); otherwise it is
    balanced accuracy if classes are exclusive, and has the same interval.
    """

    def mean_interval(masks: Sequence[tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> Interval:
        estimate = estimate_mean_proportion(masks, groups)
        return None if estimate is None else estimate.tail_bounds((1 - confidence) / 2)

    has_positives = metrics.truth.any(axis=0)
    truth, predicted = metrics.truth.T, metrics.predicted.T
    recalls = [(predicted[c], truth[c]) for c in np.flatnonzero(has_positives)]
    averaged = np.flatnonzero(metrics.averaged)
    specificities = [(~predicted[c], ~truth[c]) for c in averaged]
    recall = mean_interval(recalls)
    if recall is not None:
        counted = len(recalls) / int(metrics.present.sum())
        recall = recall[0] * counted, recall[1] * counted
    intervals = {"recall": recall, "specificity": mean_interval(specificities)}
    if not metrics.is_exclusive:
        return intervals | {
            "balanced_accuracy": mean_interval([*((predicted[c], truth[c]) for c in averaged), *specificities])
        }
    correct, all_images = metrics.correct.astype(bool), np.ones(len(groups), dtype=bool)
    return intervals | {
        "balanced_accuracy": mean_interval(recalls),
        "accuracy": proportion_interval(correct, all_images, groups, confidence),
    }


def collect_metrics(
    test: Mapping[str, Any],
    val: Mapping[str, Any],
    uncalibrated: Mapping[str, Any],
    subgroups: Mapping[str, Any],
    points: Mapping[str, Any],
) -> dict[str, Any]:
    """Collect the content of `metrics.json`, which is also logged to MLflow.

    Args:
        test: output of `summarize` on test.
        val: output of `summarize` on val.
        uncalibrated: output of `summarize` on test with the scores before calibration.
        subgroups: output of `fadeformer.evaluation.subgroups.evaluate_subgroups`.
        points: output of `fadeformer.evaluation.operating_points.select_operating_points`.
    """
    return {
        "val": {"overall": val["overall"], "per_class": val["per_class"]},
        "test": {
            "overall": test["overall"],
            "per_class": test["per_class"],
            "before_calibration": {key: uncalibrated["overall"][key] for key in CALIBRATION_METRICS},
            "subgroups": {
                column: {value: {"images": group["images"], **group["overall"]} for value, group in values.items()}
                for column, values in subgroups.items()
            },
            "operating_points": {
                rule: {
                    name: {"threshold": point["threshold"], **{k: v["value"] for k, v in point["on_test"].items()}}
                    for name, point in by_class.items()
                    if point is not None
                }
                for rule, by_class in points.items()
            },
        },
    }


def published_results(test: Mapping[str, Any], history: pd.DataFrame, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `results.json`, with the keys of the published results.

    Args:
        test: output of `summarize` on test.
        history: one row per epoch.
        config: parameters of the run.
    """
    names = ("loss", "accuracy", "precision", "recall", "f1", "auc")
    columns = {
        "train_losses": "train_loss", "val_losses": "val_loss",
        "train_accuracies": "train_accuracy", "val_accuracies": "val_accuracy",
    }  # fmt: skip
    return {
        **{f"test_{name}": test["overall"][name] for name in names},
        **{key: history[column].tolist() for key, column in columns.items()},
        "config": config,
    }


def _bootstrap_interval(
    name: str,
    value: float,
    samples: NDArray[np.float64],
    half: NDArray[np.float64] | None,
    groups: int,
    confidence: float,
) -> Interval:
    bounds = bootstrap.percentile_interval(samples, groups, confidence)
    if bounds is None or name == "calibration_error" or np.ptp(samples[np.isfinite(samples)]) == 0:
        return None
    if half is not None and 0 < value < 1:
        sample_logits, half_logits = _log_odds(samples), _log_odds(half)
        bias = float(half_logits.mean()) - logit(value) if len(half_logits) else 0.0
        std = sample_logits.std(ddof=1) if len(sample_logits) > 1 else math.inf
        half_width = bootstrap.critical_value(groups, confidence) * std
        return float(expit(logit(value) - bias - half_width)), float(expit(logit(value) - bias + half_width))
    return bounds


def _log_odds(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the finite log odds of samples."""
    return np.asarray(logit(samples[(samples > 0) & (samples < 1)]))


def _finite_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
