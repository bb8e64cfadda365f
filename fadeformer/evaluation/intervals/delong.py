"""ROC AUCs with their covariance (DeLong et al. 1988, doi:10.2307/2531595), also for clustered images.

The structural component of a positive is the fraction of negatives that it outranks, that of a negative the fraction of
positives that outrank it, with ties counted half; their variance gives the variance of the AUC. With several images per
patient or lesion, components are summed within the group before squaring (Obuchowski 1997, doi:10.2307/2533958). Ranks
give O(n log n) (Sun and Xu 2014, doi:10.1109/LSP.2014.2337313). Intervals use Student's t with the degrees of freedom
of Brunner and Munzel (2000, doi:10.1002/(SICI)1521-4036(200001)42:1<17::AID-BIMJ17>3.0.CO;2-U), whose relative effect
is the AUC.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import norm, rankdata, t

from fadeformer.evaluation.intervals.proportions import wilson_interval

ROUNDING_ERROR = 1e-13  # of the variance of a difference, relative to the variances of its terms

Floats = NDArray[np.float64]
Truth = NDArray[np.bool_]


@dataclass(frozen=True)
class AUCEstimates:
    """AUCs of several curves on the same images.

    Attributes:
        areas: AUCs, (curves,), in [0, 1].
        covariance: (curves, curves); NaN if all positives, or all negatives, of a curve are in one group.
        min_groups: smaller number of groups with positives or with negatives, (curves,).
        degrees_of_freedom: of each variance, (curves,).
    """

    areas: Floats
    covariance: Floats
    min_groups: NDArray[np.int64]
    degrees_of_freedom: Floats


def estimate_aucs(
    truths: Sequence[Truth], scores: Sequence[Floats], groups: NDArray[np.int64] | None = None
) -> AUCEstimates:
    """Estimate the AUCs of several classes, findings or models on the same images.

    Args:
        truths: mask of the positives of each curve, (images,).
        scores: of each curve, (images,).
        groups: group code (patient or lesion) of each image, (images,); None if all images are independent.

    Raises:
        ValueError: a curve lacks positives or negatives.
    """
    codes = np.arange(len(truths[0])) if groups is None else np.unique(groups, return_inverse=True)[1]
    num_groups = int(codes.max()) + 1
    areas = np.empty(len(truths))
    positive_sums, negative_sums = np.zeros((2, num_groups, len(truths)))  # of centered components, per group
    corrections, sizes = np.empty((2, 2, len(truths)))
    for curve, (truth, score) in enumerate(zip(truths, scores, strict=True)):
        outranks, is_outranked = structural_components(truth, score)
        areas[curve] = outranks.mean()
        for side, sums, rows, values in (
            (0, positive_sums, truth, outranks), (1, negative_sums, ~truth, is_outranked),
        ):  # fmt: skip
            sums[:, curve] = np.bincount(codes[rows], (values - areas[curve]) / len(values), minlength=num_groups)
            sizes[side, curve] = len(np.unique(codes[rows]))
            corrections[side, curve] = _bessel_correction(int(sizes[side, curve]))
    min_groups = sizes.min(axis=0).astype(np.int64)
    positives, negatives = positive_sums * np.sqrt(corrections[0]), negative_sums * np.sqrt(corrections[1])
    cross = positive_sums.T @ negative_sums
    covariance = positives.T @ positives + negatives.T @ negatives + _bessel_correction(num_groups) * (cross + cross.T)
    variances = np.stack([(positives**2).sum(axis=0), (negatives**2).sum(axis=0)])
    return AUCEstimates(areas, covariance, min_groups, _satterthwaite(variances, sizes - 1))


def structural_components(truth: Truth, score: Floats) -> tuple[Floats, Floats]:
    """Return, for each positive, the fraction of negatives below it and, for each negative, of positives above it.

    Raises:
        ValueError: there are no positives, or no negatives.
    """
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        raise ValueError(f"an AUC needs positives and negatives; there are {positives} and {negatives}")
    ranks = rankdata(score)
    outranks = (ranks[truth] - rankdata(score[truth])) / negatives
    is_outranked = 1 - (ranks[~truth] - rankdata(score[~truth])) / positives
    return outranks, is_outranked


def mean_auc_interval(estimates: AUCEstimates, curves: Sequence[int], confidence: float) -> tuple[float, float] | None:
    """Compute a confidence interval of the mean of some AUCs, on the logit scale, so that it stays in [0, 1].

    At 0 or 1, where the variance is 0, a Wilson interval with the smaller number of groups as sample size is used. None
    if the variance is undefined.
    """
    area, variances = float(estimates.areas[curves].mean()), np.diag(estimates.covariance)[curves]
    variance = float(estimates.covariance[np.ix_(curves, curves)].mean())
    if not math.isfinite(variance):
        return None
    if area in (0.0, 1.0):
        min_groups = int(estimates.min_groups[curves].min())
        return wilson_interval(round(area * min_groups), min_groups, confidence)
    degrees = _satterthwaite(variances[:, None], estimates.degrees_of_freedom[curves][:, None])[0]
    half_width = t.ppf((1 + confidence) / 2, degrees) * math.sqrt(max(variance, 0.0)) / (area * (1 - area))
    return float(expit(logit(area) - half_width)), float(expit(logit(area) + half_width))


@dataclass(frozen=True)
class AUCDifference:
    """Difference of two AUCs on the same images, first minus second, with its interval."""

    value: float
    low: float
    high: float


def auc_difference(
    truths: Sequence[Truth],
    first: Sequence[Floats],
    second: Sequence[Floats],
    groups: NDArray[np.int64] | None = None,
    confidence: float = 0.95,
) -> AUCDifference:
    """Compare the mean AUCs of two models over classes or findings (paired).

    Args:
        truths: mask of the positives of each class, (images,).
        first: scores of the first model for each class, (images,).
        second: scores of the second model for each class, (images,).
        groups: group code (patient or lesion) of each image; None if all images are independent.
        confidence: level of the interval.

    Raises:
        ValueError: a class lacks positives or negatives, or has them in one group only.
    """
    estimates = estimate_aucs([*truths, *truths], [*first, *second], groups)
    contrast = np.repeat([1.0, -1.0], len(truths)) / len(truths)
    first_aucs, second_aucs = np.split(estimates.areas, 2)
    value = float((first_aucs - second_aucs).mean())  # exactly 0 for identical rankings
    variance = float(contrast @ estimates.covariance @ contrast)
    if not math.isfinite(variance):
        raise ValueError("a comparison needs positives and negatives in two groups each")
    if variance < ROUNDING_ERROR * estimates.covariance.diagonal().max():  # identical rankings
        variance = 0.0
    half_width = float(norm.ppf((1 + confidence) / 2)) * math.sqrt(variance)
    return AUCDifference(value, value - half_width, value + half_width)


def _satterthwaite(variances: Floats, degrees: Floats) -> Floats:
    """Degrees of freedom of a sum of variances over the first axis (Satterthwaite 1946, doi:10.2307/3002019)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        result = variances.sum(axis=0) ** 2 / (variances**2 / degrees).sum(axis=0)
    return np.asarray(np.where(np.isfinite(result), result, degrees.min(axis=0)))


def _bessel_correction(groups: int) -> float:
    """Factor that makes a variance over groups unbiased; NaN for a single group."""
    return groups / (groups - 1) if groups > 1 else math.nan
