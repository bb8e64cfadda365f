"""Metrics of several training runs of a model, and paired differences of two models on the same test images.

Reported is the mean over seeds: the expected metric of a single run, not that of an ensemble. There are two sources of
variance. Test images: the covariance of the runs' metrics over the images, for AUC after DeLong
(`fadeformer.evaluation.intervals.delong`), for accuracies from the influence of each image, summed per patient or
lesion before squaring (exact for accuracy, first order for balanced accuracy). Training: the variance from seed to
seed.

The interval of one model's mean covers the test images only, with the runs fixed; its standard deviation over seeds is
reported separately. The interval of a difference covers both: the variances are added, and Student's t has the degrees
of freedom of the sum (Satterthwaite 1946, doi:10.2307/3002019). The variance over seeds contains some variance of the
images, so this interval is slightly conservative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from fadeformer.evaluation.intervals import bootstrap, delong, proportions
from fadeformer.evaluation.predictions import Predictions
from fadeformer.evaluation.weighted_metrics import WeightedMetrics

Floats = NDArray[np.float64]
MetricName = Literal["auc", "accuracy", "balanced_accuracy"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)


@dataclass(frozen=True)
class SeedMean:
    """Mean of a metric over the seeds of one model.

    Attributes:
        value: mean, in [0, 1].
        std: standard deviation over seeds; None for a single seed.
        interval: of the mean, over test images with the runs fixed; None if undefined.
        num_seeds: number of runs.
    """

    value: float
    std: float | None
    interval: tuple[float, float] | None
    num_seeds: int


@dataclass(frozen=True)
class MetricDifference:
    """Mean over seeds of the metric of the first model minus that of the second, on the same images.

    Attributes:
        value: in [-1, 1].
        image_se: standard error due to the test images.
        seed_se: standard error due to the training seeds; None for a single seed.
        interval: over images and seeds, or images only for a single seed; None if undefined.
        num_seeds: number of compared pairs of runs with equal seeds.
    """

    value: float
    image_se: float
    seed_se: float | None
    interval: tuple[float, float] | None
    num_seeds: int


def mean_over_seeds(runs: Sequence[Predictions], metric: MetricName, confidence: float = 0.95) -> SeedMean | None:
    """Average a metric over the seeds of one model.

    Args:
        runs: predictions on one split, one per seed, on the same images.
        metric: one of METRICS.
        confidence: level of the interval.

    Returns:
        None if the metric is undefined: no class has both positives and negatives.

    Raises:
        ValueError: the images differ.
    """
    runs = align(runs)
    values = _metric_values(runs, metric)
    if not np.isfinite(values).all():
        return None
    value, num_seeds = float(values.mean()), len(runs)
    std = float(values.std(ddof=1)) if num_seeds > 1 else None
    if metric == "auc":
        estimates = _average_over_seeds(_estimate_aucs(runs), num_seeds)
        interval = delong.mean_auc_interval(estimates, list(range(len(estimates.areas))), confidence)
    else:
        variance = float(_covariance(runs, metric).mean())
        interval = _proportion_interval(value, variance, _group_codes(runs[0]), confidence)
    return SeedMean(value, std, interval, num_seeds)


def metric_difference(
    first: Mapping[int, Predictions], second: Mapping[int, Predictions], metric: MetricName, confidence: float = 0.95
) -> MetricDifference | None:
    """Compare two models: the metric of the first minus that of the second, averaged over common seeds.

    Args:
        first: predictions of one model on one split, by seed.
        second: predictions of the other model on the same images, by seed.
        metric: one of METRICS.
        confidence: level of the interval.

    Returns:
        None if the metric is undefined.

    Raises:
        ValueError: the images differ, or there is no common seed.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise ValueError("the models have no training seed in common")
    runs = align([*(first[seed] for seed in seeds), *(second[seed] for seed in seeds)])
    values = _metric_values(runs, metric)
    if not np.isfinite(values).all():
        return None
    num_seeds = len(seeds)
    differences = values[:num_seeds] - values[num_seeds:]
    contrast = np.repeat([1 / num_seeds, -1 / num_seeds], num_seeds)
    image_variance = max(0.0, float(contrast @ _covariance(runs, metric) @ contrast))
    seed_variance = float(differences.var(ddof=1)) / num_seeds if num_seeds > 1 else 0.0
    value, variance = float(differences.mean()), image_variance + seed_variance
    interval = None
    if math.isfinite(variance):
        degrees = variance**2 / (seed_variance**2 / (num_seeds - 1)) if seed_variance > 0 else math.inf
        half_width = float(t.ppf((1 + confidence) / 2, degrees)) * math.sqrt(variance)
        interval = (value - half_width, value + half_width)
    seed_se = math.sqrt(seed_variance) if num_seeds > 1 else None
    return MetricDifference(value, math.sqrt(image_variance), seed_se, interval, num_seeds)


def align(runs: Sequence[Predictions]) -> list[Predictions]:
    """Sort the predictions of several runs by image id.

    Raises:
        ValueError: images, labels, task or classes differ.
    """
    if len({(run.fingerprint(), run.task.name, run.classes) for run in runs}) != 1:
        raise ValueError("the predictions differ in images, labels or classes and cannot be compared")
    return [
        Predictions(run.frame.sort_values("id", kind="stable", ignore_index=True), run.task, run.classes)
        for run in runs
    ]


def _metric_values(runs: Sequence[Predictions], metric: MetricName) -> Floats:
    """Compute the metric of each run, (runs,)."""
    unit_weights = np.ones((1, len(runs[0].frame)))
    return np.array([WeightedMetrics(run).compute(unit_weights).overall[metric][0] for run in runs])


def _covariance(runs: Sequence[Predictions], metric: MetricName) -> Floats:
    """Estimate the covariance of the runs' metrics over test images, (runs, runs)."""
    if metric == "auc":
        estimates = _estimate_aucs(runs)
        curves = len(estimates.areas) // len(runs)
        class_mean = np.kron(np.eye(len(runs)), np.full(curves, 1 / curves))  # runs, runs * curves
        return np.asarray(class_mean @ estimates.covariance @ class_mean.T)
    groups = _group_codes(runs[0])
    influence = np.stack([_influence(WeightedMetrics(run), metric) for run in runs], axis=1)  # images, runs
    sums = np.stack([np.bincount(groups, column) for column in influence.T], axis=1)  # groups, runs
    count = len(sums)
    return np.asarray(sums.T @ sums) * (count / (count - 1) if count > 1 else math.nan)


def _estimate_aucs(runs: Sequence[Predictions]) -> delong.AUCEstimates:
    """Estimate the class AUCs that the mean AUC averages, run by run: runs * curves."""
    metrics = [WeightedMetrics(run) for run in runs]
    classes = np.flatnonzero(metrics[0].averaged)
    if metrics[0].is_exclusive and metrics[0].truth.shape[1] == 2:
        classes = classes[-1:]  # binary: the AUC of the last class
    curves = [(run.truth[:, c], run.scores[:, c]) for run in metrics for c in classes]
    truths, scores = zip(*curves, strict=True)
    return delong.estimate_aucs(truths, scores, _group_codes(runs[0]))


def _average_over_seeds(estimates: delong.AUCEstimates, num_seeds: int) -> delong.AUCEstimates:
    """Average each class AUC over the seeds; the degrees of freedom are the smallest of the runs."""
    curves = len(estimates.areas) // num_seeds
    mean = np.kron(np.full(num_seeds, 1 / num_seeds), np.eye(curves))  # curves, num_seeds * curves
    degrees = estimates.degrees_of_freedom.reshape(num_seeds, curves).min(axis=0)
    covariance = mean @ estimates.covariance @ mean.T
    return delong.AUCEstimates(mean @ estimates.areas, covariance, estimates.min_groups[:curves], degrees)


def _influence(metrics: WeightedMetrics, metric: MetricName) -> Floats:
    """Compute the influence of each image on an accuracy, (images,); the values sum to 0."""
    if metric == "accuracy":
        return np.asarray((metrics.correct - metrics.correct.mean()) / len(metrics.correct))
    truth, is_correct = metrics.truth, metrics.predicted == metrics.truth
    sides = [truth] if metrics.is_exclusive else [truth, ~truth]  # recall; multi-label: also specificity
    averaged = truth.any(axis=0) if metrics.is_exclusive else metrics.averaged
    influence = np.zeros(len(truth))
    for c in np.flatnonzero(averaged):
        for side in sides:
            rows = side[:, c]
            weight = rows.sum() * averaged.sum() * len(sides)
            influence[rows] += (is_correct[rows, c] - is_correct[rows, c].mean()) / weight
    return influence


def _group_codes(predictions: Predictions) -> NDArray[np.int64]:
    return bootstrap.encode_groups(predictions.frame["group"])


def _proportion_interval(
    value: float, variance: float, groups: NDArray[np.int64], confidence: float
) -> tuple[float, float] | None:
    """Compute a Wilson interval for the effective sample size of a mean proportion; None without variance."""
    num_groups = int(groups.max()) + 1
    if not variance > 0 or not math.isfinite(variance):
        return None
    effective_size = value * (1 - value) / variance
    return proportions.score_interval(value, effective_size, float(t.ppf((1 + confidence) / 2, num_groups - 1)))
