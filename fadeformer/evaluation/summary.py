"""Predictions to numbers with their uncertainty, as nested plain values.

A class or finding without positives or without negatives is left out of means, and named. Macro precision, recall and
F1 are those of scikit-learn with what is undefined counted as 0, as the published results have them. No number is ever
a NaN: what is undefined is None.
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
from fadeformer.evaluation.intervals.proportions import predictive_value_interval, proportion_interval
from fadeformer.evaluation.predictions import Predictions
from fadeformer.evaluation.weighted_metrics import MetricSamples, WeightedMetrics

NUM_HALF_SAMPLES = 200  # samples of half of the images
CALIBRATION_METRICS = ("loss", "brier", "calibration_error")  # what calibration is for


def summarize(predictions: Predictions) -> dict[str, Any]:
    """Every number of some predictions.

    Returns:
        `images`, `overall`, `per_class` by class name, and `not_judged`: the classes that lack positives or negatives.
    """
    measures = WeightedMetrics(predictions)
    found = measures.compute(np.ones((1, len(predictions.frame))))
    support = measures.truth.sum(axis=0)
    per_class = {
        name: {
            "support": int(support[c]),
            "prevalence": float(support[c] / len(measures.truth)),
            **{key: _finite_or_none(values[0, c]) for key, values in found.per_class.items()},
        }
        for c, name in enumerate(predictions.classes)
    }
    return {
        "images": len(measures.truth),
        "overall": {key: _finite_or_none(values[0]) for key, values in found.overall.items()},
        "per_class": per_class,
        "not_evaluated": [name for name, values in per_class.items() if values["auc"] is None],
    }


def confidence_intervals(predictions: Predictions, *, n_resamples: int, seed: int, confidence: float) -> dict[str, Any]:
    """The interval of every number of `summarise`.

    AUCs have DeLong's, proportions Wilson's, precision one that follows from two of these; all else that of a bootstrap
    that draws patients or lesions whole, class by class: its percentiles, wider where a class has few; for average
    precisions and the pooled AUC its spread on the scale of log odds (Boyd et al. 2013,
    doi:10.1007/978-3-642-40994-3_29), less what half of the images have too much, as the average precision of few
    images is too high and that of samples that repeat images more so. The calibration error has none: it is too high in
    every sample, by more than its spread (docs/reference/evaluation.md).

    Args:
        predictions: of one split.
        n_resamples: samples of the bootstrap.
        seed: of the bootstrap.
        confidence: such as 0.95.

    Returns:
        `groups`, how many patients or lesions there are, and `overall` and `per_class` with (low, high), or None where
        there is none, as of a perfect number by bootstrap, whose samples are all alike.
    """
    measures, groups = WeightedMetrics(predictions), bootstrap.encode_groups(predictions.frame["group"])
    stratum = bootstrap.assign_strata(measures.truth, groups)
    parts = bootstrap.map_resamples(measures.compute, groups, stratum, n_resamples, seed)
    return intervals_from_samples(measures, predictions.classes, groups, concat_samples(parts), confidence)


def concat_samples(parts: Sequence[MetricSamples]) -> MetricSamples:
    """Measures of some samples and of others as those of all."""

    def together(kind: str) -> dict[str, NDArray[np.float64]]:
        return {name: np.concatenate([getattr(part, kind)[name] for part in parts]) for name in getattr(parts[0], kind)}

    return MetricSamples(together("overall"), together("per_class"))


def intervals_from_samples(
    measures: WeightedMetrics,
    classes: Sequence[str],
    groups: NDArray[np.int64],
    samples: MetricSamples,
    confidence: float,
) -> dict[str, Any]:
    """Likewise, where the samples are there already.

    Args:
        measures: of the predictions.
        classes: names in the order of the scores.
        groups: number of each image's patient or lesion, from 0 without a gap, (images,).
        samples: of the bootstrap.
        confidence: such as 0.95.
    """
    count = int(groups.max()) + 1
    point, stratum = measures.compute(np.ones((1, len(groups)))), bootstrap.assign_strata(measures.truth, groups)
    with np.errstate(invalid="ignore", divide="ignore"):  # half of a few may have no image of a class
        half = measures.compute_areas(bootstrap.half_sample_weights(groups, stratum, NUM_HALF_SAMPLES, 0))
    in_stratum = max(min(count, 2), count // len(np.unique(stratum)))
    overall = {
        name: _bootstrap_interval(
            name, float(point.overall[name][0]), values, half.overall.get(name), in_stratum, confidence
        )
        for name, values in samples.overall.items()
    }
    rarer = [
        min(len(np.unique(groups[measures.truth[:, c]])), len(np.unique(groups[~measures.truth[:, c]])))
        for c in range(len(classes))
    ]
    per_class: dict[str, dict[str, Interval]] = {name: {} for name in classes}
    for key, values in samples.per_class.items():
        for c, name in enumerate(classes):
            value = float(point.per_class[key][0, c])
            of_half = half.per_class[key][:, c] if key in half.per_class else None
            drawn_from = rarer[c] if of_half is None else count
            per_class[name][key] = _bootstrap_interval(key, value, values[:, c], of_half, drawn_from, confidence)
    if measures.is_exclusive:
        every = np.ones(len(groups), dtype=bool)
        overall["accuracy"] = proportion_interval(measures.correct.astype(bool), every, groups, confidence)
    for c, name in enumerate(classes):
        truth, decided = measures.truth[:, c], measures.predicted[:, c]
        for key, (hits, trials) in {"recall": (decided, truth), "specificity": (~decided, ~truth)}.items():
            per_class[name][key] = proportion_interval(hits, trials, groups, confidence)
        per_class[name]["precision"] = predictive_value_interval(decided, truth, groups, confidence)
        per_class[name]["auc"] = None
    judged = np.flatnonzero(measures.evaluable).tolist()
    overall["auc"] = None
    if len(judged):
        found = delong.estimate_aucs(
            [measures.truth[:, c] for c in judged], [measures.scores[:, c] for c in judged], groups
        )
        for place, row in enumerate(judged):
            per_class[classes[row]]["auc"] = delong.mean_auc_interval(found, [place], confidence)
        exclusive_two = measures.is_exclusive and len(classes) == 2
        averaged = [len(judged) - 1] if exclusive_two else list(range(len(judged)))
        overall["auc"] = delong.mean_auc_interval(found, averaged, confidence)
    return {"groups": count, "overall": overall, "per_class": per_class}


def collect_metrics(
    test: Mapping[str, Any],
    val: Mapping[str, Any],
    uncalibrated: Mapping[str, Any],
    subgroups: Mapping[str, Any],
    points: Mapping[str, Any],
) -> dict[str, Any]:
    """The numbers to compare runs by, as `metrics.json` and MLflow have them.

    Args:
        test: of `summarise`.
        val: likewise.
        uncalibrated: of test, likewise, by the scores before calibration.
        subgroups: of `fadeformer.evaluation.subgroups.evaluate_subgroups`.
        points: of `fadeformer.evaluation.operating_points.select_operating_points`.
    """
    return {
        "val": {"overall": val["overall"], "per_class": val["per_class"]},
        "test": {
            "overall": test["overall"],
            "per_class": test["per_class"],
            "before_calibration": {key: uncalibrated["overall"][key] for key in CALIBRATION_METRICS},
            "subgroups": {
                column: {value: {"images": of["images"], **of["overall"]} for value, of in values.items()}
                for column, values in subgroups.items()
            },
            "operating_points": {
                rule: {
                    name: {"threshold": point["threshold"], **{k: s["value"] for k, s in point["on_test"].items()}}
                    for name, point in of_classes.items()
                    if point is not None
                }
                for rule, of_classes in points.items()
            },
        },
    }


def published_results(test: Mapping[str, Any], history: pd.DataFrame, config: Mapping[str, Any]) -> dict[str, Any]:
    """The published `results.json`, by its keys.

    Args:
        test: of `summarise`.
        history: one row per epoch.
        config: what the run was made with.
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
        spread, of_half = _log_odds(samples), _log_odds(half)
        too_high = float(of_half.mean()) - logit(value) if len(of_half) else 0.0
        reach = bootstrap.critical_value(groups, confidence) * spread.std(ddof=1) if len(spread) > 1 else math.inf
        return float(expit(logit(value) - too_high - reach)), float(expit(logit(value) - too_high + reach))
    return bounds


def _log_odds(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of those samples that have some."""
    return np.asarray(logit(samples[(samples > 0) & (samples < 1)]))


def _finite_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
