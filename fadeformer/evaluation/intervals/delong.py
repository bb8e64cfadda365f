"""ROC AUCs with their covariance (DeLong et al. 1988, doi:10.2307/2531595), also for clustered images.

The structural component of a positive is the fraction of negatives that it outranks, that of a negative the fraction of
positives that outrank it, with ties counted half; their variance gives the variance of the AUC. With several images per
patient or lesion, components are summed within the group before squaring (Obuchowski 1997, doi:10.2307/2533958). Ranks
give O(n log n) (Sun and Xu 2014, doi:10.1109/LSP.2014.2337313). Intervals use Student's t with the degrees of freedom
of Brunner and Munzel (2000, doi:10.1002/(SICI)1521-4036(200001)42:1<17::AID-BIMJ17>3.0.CO;2-U), whose relative effect
is the AUC. They are computed on the logit scale, with a lower limit of the variance: near an AUC of 1 the variance of a
few images is often far too small (docs/explanation/statistics/promotion.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import rankdata

from fadeformer.evaluation.intervals.differences import PairedDifference, paired_difference
from fadeformer.evaluation.intervals.proportions import score_interval, upper_quantile

# Limit of the effective sample size area * (1 - area) / variance, in groups of the smaller class. It is about 3 for
# normal scores and an AUC of 0.99, and beyond this limit the variance is small by chance.
MAX_EFFECTIVE_SIZE = 15

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
    """Compute a confidence interval of the mean of some AUCs (`mean_auc_bounds`); None if the variance is undefined."""
    if not np.isfinite(estimates.covariance[np.ix_(curves, curves)]).all():
        return None
    return mean_auc_bounds(estimates, curves, (1 - confidence) / 2)


def mean_auc_bounds(estimates: AUCEstimates, curves: Sequence[int], tail: float) -> tuple[float, float]:
    """Compute confidence bounds of the mean of some AUCs, on the logit scale, so that they stay in [0, 1].

    At 0 or 1, where the variance is 0, Wilson bounds with the smaller number of groups as sample size are used.

    Args:
        estimates: with a finite covariance of the curves.
        curves: positions of the averaged AUCs.
        tail: tail probability on each side, such as 0.025 for a 95 % interval.
    """
    area = float(estimates.areas[curves].mean())
    if area in (0.0, 1.0):
        min_groups = int(estimates.min_groups[curves].min())
        return score_interval(area, min_groups, upper_quantile(tail, math.inf))
    variance, degrees = mean_auc_variance(estimates, curves)
    return logit_bounds(area, variance, upper_quantile(tail, degrees))


def mean_auc_variance(estimates: AUCEstimates, curves: Sequence[int]) -> tuple[float, float]:
    """Return variance and degrees of freedom of the mean of some AUCs; variances near 1 have a lower limit."""
    covariance = _limited_covariance(estimates)[np.ix_(curves, curves)]
    degrees = _satterthwaite(np.diag(covariance)[:, None], estimates.degrees_of_freedom[curves][:, None])[0]
    return max(0.0, float(covariance.mean())), float(degrees)


def logit_bounds(area: float, variance: float, quantile: float) -> tuple[float, float]:
    """Compute the bounds of an AUC in (0, 1) on the logit scale, from its variance and a critical value."""
    half_width = quantile * math.sqrt(variance) / (area * (1 - area))
    return float(expit(logit(area) - half_width)), float(expit(logit(area) + half_width))


def auc_difference(
    truths: Sequence[Truth],
    first: Sequence[Floats],
    second: Sequence[Floats],
    groups: NDArray[np.int64] | None = None,
    confidence: float = 0.95,
) -> PairedDifference:
    """Compare the mean AUCs of two models over classes or findings (paired).

    The interval combines those of the two mean AUCs with DeLong's correlation of them
    (`fadeformer.evaluation.intervals.differences`). Models that rank all images equally differ by exactly 0.

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
    classes = list(range(len(truths)))
    bounds = [
        mean_auc_interval(estimates, curves, confidence) for curves in (classes, [c + len(truths) for c in classes])
    ]
    if bounds[0] is None or bounds[1] is None:
        raise ValueError("a comparison needs positives and negatives in two groups each")
    if all(np.array_equal(rankdata(a), rankdata(b)) for a, b in zip(first, second, strict=True)):
        return PairedDifference(0.0, 0.0, 0.0)
    model_mean = np.kron(np.eye(2), np.full(len(truths), 1 / len(truths)))  # models, curves
    first_area, second_area = model_mean @ estimates.areas
    covariance = model_mean @ estimates.covariance @ model_mean.T
    scale = math.sqrt(covariance[0, 0] * covariance[1, 1])
    correlation = float(np.clip(covariance[0, 1] / scale, -1, 1)) if scale > 0 else 0.0
    return paired_difference(float(first_area), bounds[0], float(second_area), bounds[1], correlation)


def _limited_covariance(estimates: AUCEstimates) -> Floats:
    """Return the covariance with variances of at least area * (1 - area) / (MAX_EFFECTIVE_SIZE * groups)."""
    variances = np.diag(estimates.covariance)
    limits = estimates.areas * (1 - estimates.areas) / (MAX_EFFECTIVE_SIZE * estimates.min_groups)
    limited = np.maximum(variances, limits)  # NaN stays NaN
    ratios = np.sqrt(np.divide(limited, variances, out=np.ones_like(limited), where=variances > 0))
    covariance = estimates.covariance * np.outer(ratios, ratios)
    np.fill_diagonal(covariance, limited)
    return np.asarray(covariance)


def _satterthwaite(variances: Floats, degrees: Floats) -> Floats:
    """Degrees of freedom of a sum of variances over the first axis (Satterthwaite 1946, doi:10.2307/3002019)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        result = variances.sum(axis=0) ** 2 / (variances**2 / degrees).sum(axis=0)
    return np.asarray(np.where(np.isfinite(result), result, degrees.min(axis=0)))


def _bessel_correction(groups: int) -> float:
    """Factor that makes a variance over groups unbiased; NaN for a single group."""
    return groups / (groups - 1) if groups > 1 else math.nan
