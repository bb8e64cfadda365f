"""Measures of several trainings of a network, and paired differences of two networks, on the same test images.

What is told is the mean over seeds: what one training comes to, not what an ensemble of all does. Two things make it
unsure, and they are kept apart. Other test images: the covariance of all trainings' numbers over the images, of AUCs
after DeLong (`fadeformer.evaluation.intervals.delong`), of accuracies by how much each image moves them (their linear parts, summed over a
patient or lesion before they are squared; exact for accuracy, first order for balanced accuracy). Other trainings: the
variance of the numbers from seed to seed.

The interval of one network's mean speaks of other test images only, its trainings as they are; the spread over seeds
stands beside it. The interval of a difference holds both: the two variances are added, and Student's t has the degrees
of freedom of their sum (Satterthwaite 1946, doi:10.2307/3002019). What of a seed is chance of the images counts in
both, so that it is a little too wide rather than too narrow.
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
    """A measure over the seeds of one network.

    Attributes:
        value: the mean, in [0, 1].
        spread: standard deviation from seed to seed; None of a single one.
        interval: of the mean over other test images, the trainings as they are; None where it is not known.
        seeds: how many trainings.
    """

    value: float
    std: float | None
    interval: tuple[float, float] | None
    num_seeds: int


@dataclass(frozen=True)
class MetricDifference:
    """Of two networks: the mean over seeds of first less second, on the same images.

    Attributes:
        value: in [-1, 1].
        of_images: standard error that other test images make.
        of_seeds: standard error that other trainings make; None of a single seed.
        interval: over both, or over test images alone where there is a single seed; None where it is not known.
        seeds: trainings of each that are compared, those of the same seed with each other.
    """

    value: float
    image_se: float
    seed_se: float | None
    interval: tuple[float, float] | None
    num_seeds: int


def mean_over_seeds(trainings: Sequence[Predictions], measure: MetricName, confidence: float = 0.95) -> SeedMean | None:
    """What one training of a network comes to.

    Args:
        trainings: predictions of one split, one for each seed, of the same images.
        measure: one of MEASURES.
        confidence: of the interval.

    Returns:
        None where the measure is undefined: no class has both positives and negatives.

    Raises:
        ValueError: the images are not the same.
    """
    trainings = align(trainings)
    values = _metric_values(trainings, measure)
    if not np.isfinite(values).all():
        return None
    value, count = float(values.mean()), len(trainings)
    spread = float(values.std(ddof=1)) if count > 1 else None
    if measure == "auc":
        found = _average_over_seeds(_estimate_aucs(trainings), count)
        interval = delong.mean_auc_interval(found, list(range(len(found.areas))), confidence)
    else:
        interval = _proportion_interval(
            value, float(_covariance(trainings, measure).mean()), _group_codes(trainings[0]), confidence
        )
    return SeedMean(value, spread, interval, count)


def metric_difference(
    first: Mapping[int, Predictions], second: Mapping[int, Predictions], measure: MetricName, confidence: float = 0.95
) -> MetricDifference | None:
    """How much better the first network is, in one training of each.

    Args:
        first: predictions of one split by seed.
        second: of the other network, on the same images; compared are the seeds that both have.
        measure: one of MEASURES.
        confidence: of the interval.

    Returns:
        None where the measure is undefined.

    Raises:
        ValueError: the images are not the same, or there is no common seed.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise ValueError("no seed was trained of both networks")
    both = align([*(first[seed] for seed in seeds), *(second[seed] for seed in seeds)])
    values = _metric_values(both, measure)
    if not np.isfinite(values).all():
        return None
    count = len(seeds)
    gaps = values[:count] - values[count:]
    contrast = np.repeat([1 / count, -1 / count], count)
    of_images = max(0.0, float(contrast @ _covariance(both, measure) @ contrast))
    of_seeds = float(gaps.var(ddof=1)) / count if count > 1 else 0.0
    value, variance = float(gaps.mean()), of_images + of_seeds
    interval = None
    if math.isfinite(variance):
        degrees = variance**2 / (of_seeds**2 / (count - 1)) if of_seeds > 0 else math.inf
        half = float(t.ppf((1 + confidence) / 2, degrees)) * math.sqrt(variance)
        interval = (value - half, value + half)
    return MetricDifference(value, math.sqrt(of_images), math.sqrt(of_seeds) if count > 1 else None, interval, count)


def align(trainings: Sequence[Predictions]) -> list[Predictions]:
    """The same predictions, all in order of the images' ids.

    Raises:
        ValueError: they are not of the same images with the same labels.
    """
    if len({(each.fingerprint(), each.task.name, each.classes) for each in trainings}) != 1:
        raise ValueError("the predictions are of different images, labels or classes, and cannot be compared")
    return [
        Predictions(each.frame.sort_values("id", kind="stable", ignore_index=True), each.task, each.classes)
        for each in trainings
    ]


def _metric_values(trainings: Sequence[Predictions], measure: MetricName) -> Floats:
    """The measure of each training, (trainings,), as `fadeformer.evaluation.weighted_metrics` defines it."""
    once = np.ones((1, len(trainings[0].frame)))
    return np.array([WeightedMetrics(each).compute(once).overall[measure][0] for each in trainings])


def _covariance(trainings: Sequence[Predictions], measure: MetricName) -> Floats:
    """Of the measures of all trainings over other test images, (trainings, trainings)."""
    if measure == "auc":
        found = _estimate_aucs(trainings)
        curves = len(found.areas) // len(trainings)
        over_classes = np.kron(np.eye(len(trainings)), np.full(curves, 1 / curves))  # trainings, curves of all
        return np.asarray(over_classes @ found.covariance @ over_classes.T)
    groups = _group_codes(trainings[0])
    parts = np.stack([_influence(WeightedMetrics(each), measure) for each in trainings], axis=1)  # images, trainings
    sums = np.stack([np.bincount(groups, column) for column in parts.T], axis=1)  # groups, trainings
    count = len(sums)
    return np.asarray(sums.T @ sums) * (count / (count - 1) if count > 1 else math.nan)


def _estimate_aucs(trainings: Sequence[Predictions]) -> delong.AUCEstimates:
    """The curves whose mean is the AUC, of the first training, then of the next: trainings x curves."""
    measures = [WeightedMetrics(each) for each in trainings]
    judged = np.flatnonzero(measures[0].evaluable)
    if measures[0].is_exclusive and measures[0].truth.shape[1] == 2:
        judged = judged[-1:]  # of two classes the last one's
    curves = [(each.truth[:, c], each.scores[:, c]) for each in measures for c in judged]
    truths, scores = zip(*curves, strict=True)
    return delong.estimate_aucs(truths, scores, _group_codes(trainings[0]))


def _average_over_seeds(found: delong.AUCEstimates, trainings: int) -> delong.AUCEstimates:
    """The mean of each class's curves over the trainings. It has no more degrees of freedom than one training's has."""
    curves = len(found.areas) // trainings
    mean = np.kron(np.full(trainings, 1 / trainings), np.eye(curves))  # curves, curves of all trainings
    degrees = found.degrees_of_freedom.reshape(trainings, curves).min(axis=0)
    return delong.AUCEstimates(mean @ found.areas, mean @ found.covariance @ mean.T, found.min_groups[:curves], degrees)


def _influence(measures: WeightedMetrics, measure: MetricName) -> Floats:
    """By how much each image moves an accuracy, (images,); they sum to 0."""
    if measure == "accuracy":
        return np.asarray((measures.correct - measures.correct.mean()) / len(measures.correct))
    truth, right = measures.truth, measures.predicted == measures.truth
    sides = [truth] if measures.is_exclusive else [truth, ~truth]  # recall, and of findings specificity too
    counted = truth.any(axis=0) if measures.is_exclusive else measures.evaluable
    found = np.zeros(len(truth))
    for c in np.flatnonzero(counted):
        for side in sides:
            of = side[:, c]
            found[of] += (right[of, c] - right[of, c].mean()) / (of.sum() * counted.sum() * len(sides))
    return found


def _group_codes(predictions: Predictions) -> NDArray[np.int64]:
    return bootstrap.encode_groups(predictions.frame["group"])


def _proportion_interval(
    value: float, variance: float, groups: NDArray[np.int64], confidence: float
) -> tuple[float, float] | None:
    """Interval of a mean of shares: Wilson's for as many images as would be as sure; None of one without variance."""
    count = int(groups.max()) + 1
    if not variance > 0 or not math.isfinite(variance):
        return None
    return proportions.score_interval(
        value, value * (1 - value) / variance, float(t.ppf((1 + confidence) / 2, count - 1))
    )
