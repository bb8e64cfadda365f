"""Confidence intervals of proportions, for independent and for clustered images (several per patient or lesion)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

Truth = NDArray[np.bool_]


def wilson_interval(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute the Wilson score interval (1927, doi:10.2307/2276774); accurate in small samples and near 0 and 1."""
    return score_interval(hits / trials, trials, float(norm.ppf((1 + confidence) / 2)))


def proportion_interval(
    hits: Truth, trials: Truth, groups: NDArray[np.int64], confidence: float
) -> tuple[float, float] | None:
    """Compute the interval of the proportion of hits among trials.

    Independent images have a Wilson interval. Clustered images have one for the effective sample size, with Student's t
    (Franco et al. 2019, doi:10.1093/jssam/smy019): the variance is that of a ratio of sums over groups; proportions of
    0 or 1 have no variance, and the number of groups is the effective size. Negative correlation within groups can make
    the effective size larger than the number of images; it is limited to twice that number, as the variance of a few
    groups can be small by chance.

    Args:
        hits: mask of the counted images, (images,).
        trials: mask of the images in the denominator, (images,).
        groups: group code of each image, (images,).
        confidence: level of the interval, such as 0.95.

    Returns:
        None without trials, or with several trials in a single group.
    """
    counts = np.bincount(groups[trials])
    group_hits = np.bincount(groups[trials & hits], minlength=len(counts))[counts > 0]
    counts = counts[counts > 0]
    if not len(counts):
        return None
    images, num_groups, value = int(counts.sum()), len(counts), float(group_hits.sum() / counts.sum())
    if images == num_groups:
        return wilson_interval(int(group_hits.sum()), images, confidence)
    if num_groups == 1:
        return None
    variance = num_groups / (num_groups - 1) * float(((group_hits - value * counts) ** 2).sum()) / images**2
    if value in (0.0, 1.0):
        effective_size = float(num_groups)
    else:
        effective_size = min(2.0 * images, value * (1 - value) / variance) if variance > 0 else float(images)
    return score_interval(value, effective_size, float(t.ppf((1 + confidence) / 2, num_groups - 1)))


def predictive_value_interval(
    predicted: Truth, truth: Truth, groups: NDArray[np.int64], confidence: float
) -> tuple[float, float] | None:
    """Compute the interval of a predictive value (precision) at fixed prevalence.

    The number of predicted positives is random, so a Wilson interval would be too wide. The predictive value is
    1 / (1 + false positives / true positives), and this ratio is FPR / sensitivity times a constant. The limits follow
    from those of FPR and sensitivity (`proportion_interval`) by the method of variance estimates recovery (MOVER;
    Donner and Zou 2012, doi:10.1177/0962280210383082; for predictive values Mercaldo et al. 2007,
    doi:10.1002/sim.2677), with the correlation of the two counts over groups.

    Args:
        predicted: mask of the predicted positives, (images,).
        truth: mask of the positives, (images,).
        groups: group code of each image, (images,).
        confidence: level of the interval, such as 0.95.

    Returns:
        None without predicted positives, or if one of the two rates has no interval.
    """
    tpr_bounds, fpr_bounds = (proportion_interval(predicted, rows, groups, confidence) for rows in (truth, ~truth))
    if tpr_bounds is None or fpr_bounds is None or not predicted.any():
        return None
    positives, negatives = int(truth.sum()), int((~truth).sum())
    tpr, fpr = (predicted & truth).sum() / positives, (predicted & ~truth).sum() / negatives
    correlation = _correlation(predicted, truth, groups)
    low = _ratio_bound(fpr, fpr_bounds[0], tpr, tpr_bounds[1], correlation)
    high = _ratio_bound(fpr, fpr_bounds[1], tpr, tpr_bounds[0], correlation)
    return 1 / (1 + high * negatives / positives), 1 / (1 + low * negatives / positives)


def _ratio_bound(
    numerator: float, numerator_bound: float, denominator: float, denominator_bound: float, correlation: float
) -> float:
    """Return a limit of a ratio: the lower one for a lower numerator and an upper denominator bound, or vice versa."""
    scale = denominator_bound * (2 * denominator - denominator_bound)
    if scale == 0:
        return math.inf
    covariance = correlation * (numerator - numerator_bound) * (denominator_bound - denominator)
    center = numerator * denominator - covariance
    discriminant = center * center - numerator_bound * denominator_bound * (2 * numerator - numerator_bound) * (
        2 * denominator - denominator_bound
    )
    return (center + math.copysign(math.sqrt(max(0.0, discriminant)), numerator_bound - numerator)) / scale


def _correlation(predicted: Truth, truth: Truth, groups: NDArray[np.int64]) -> float:
    """Correlate the true and false positives of each group, after subtracting their expectation."""
    residuals = []
    for mask in (truth, ~truth):
        images, hits = (np.bincount(groups[rows], minlength=int(groups.max()) + 1) for rows in (mask, mask & predicted))
        residuals.append(hits - images * (hits.sum() / images.sum()))
    norm_product = math.sqrt(float((residuals[0] ** 2).sum() * (residuals[1] ** 2).sum()))
    return float(residuals[0] @ residuals[1]) / norm_product if norm_product > 0 else 0.0


def score_interval(value: float, trials: float, quantile: float) -> tuple[float, float]:
    """Compute the Wilson interval of a proportion for a (possibly fractional) number of trials and a critical value."""
    square = quantile * quantile
    center = (value + square / (2 * trials)) / (1 + square / trials)
    std = math.sqrt(value * (1 - value) / trials + square / (4 * trials * trials))
    half_width = quantile / (1 + square / trials) * std
    return max(0.0, center - half_width), min(1.0, center + half_width)
