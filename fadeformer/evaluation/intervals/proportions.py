"""Confidence intervals of proportions, for independent and for clustered images (several per patient or lesion)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtr, ndtri, stdtrit

MIN_EXACT_TAIL = 1e-50  # of exact bounds; betaincinv is NaN for some tails below 1e-70

Truth = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ProportionEstimate:
    """Proportion with what its confidence bounds need.

    Attributes:
        value: in [0, 1].
        size: effective number of independent images.
        degrees: degrees of freedom of Student's t; infinite for independent images (normal quantiles).
    """

    value: float
    size: float
    degrees: float

    def bounds(self, tail: float) -> tuple[float, float]:
        """Compute the Wilson bounds at a tail probability on each side, such as 0.025 for a 95 % interval."""
        return score_interval(self.value, self.size, upper_quantile(tail, self.degrees))

    def tail_bounds(self, tail: float) -> tuple[float, float]:
        """Compute the exact bounds, whose error rates are at most `tail` also where it is small.

        Wilson's are not, as the binomial distribution is skewed: with a true value of 0.97, 20 images are significantly
        below 250 others at a tail of 0.002 five times as often as they should be, by enumeration.
        """
        return self.planned_bounds(self.value, tail)

    def planned_bounds(self, value: float, tail: float) -> tuple[float, float]:
        """Compute `tail_bounds` for another value."""
        return exact_bounds(value, self.size, upper_quantile(tail, self.degrees))


@dataclass(frozen=True)
class MeanProportionEstimate:
    """Mean of several proportions, such as the sensitivities of all classes.

    Attributes:
        parts: the proportions.
        correlation: of the proportions, (parts, parts).
    """

    parts: tuple[ProportionEstimate, ...]
    correlation: Floats

    @property
    def value(self) -> float:
        """Mean of the values."""
        return float(np.mean([part.value for part in self.parts]))

    @property
    def size(self) -> float:
        """Number of images with which one proportion would be as precise as the mean of equal proportions."""
        errors = np.array([1 / math.sqrt(part.size) for part in self.parts])
        return float(len(errors) ** 2 / (errors @ self.correlation @ errors))

    @property
    def degrees(self) -> float:
        """Degrees of freedom of a sum of variances (Satterthwaite 1946, doi:10.2307/3002019)."""
        variances = np.array([1 / part.size for part in self.parts])
        squares = float(np.sum(variances**2 / np.array([part.degrees for part in self.parts])))
        return float(variances.sum() ** 2 / squares) if squares > 0 else math.inf

    def tail_bounds(self, tail: float) -> tuple[float, float]:
        """Compute bounds from the exact ones of the parts by variance estimates recovery (MOVER).

        Zou and Donner 2008, doi:10.1002/sim.3095: the squared distances of the parts' bounds take the place of their
        variances, so that a part of 0 or 1, whose estimated variance is 0, contributes its uncertainty. With Wilson
        bounds the interval of a mean of five classes of 40 images covers 91 instead of 95 %.
        """
        bounds = [(part.value, *part.tail_bounds(tail)) for part in self.parts]
        distances = np.array([(value - low, high - value) for value, low, high in bounds])  # parts, sides
        below, above = np.sqrt(np.einsum("is,ij,js->s", distances, self.correlation, distances)) / len(self.parts)
        return max(0.0, self.value - float(below)), min(1.0, self.value + float(above))

    def planned_bounds(self, value: float, tail: float) -> tuple[float, float]:
        """Compute `tail_bounds` for another value, those of one proportion with the effective size of the mean."""
        return exact_bounds(value, self.size, upper_quantile(tail, self.degrees))


def wilson_interval(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute the Wilson score interval (1927, doi:10.2307/2276774); accurate in small samples and near 0 and 1."""
    return ProportionEstimate(hits / trials, trials, math.inf).bounds((1 - confidence) / 2)


def proportion_interval(
    hits: Truth, trials: Truth, groups: NDArray[np.int64], confidence: float
) -> tuple[float, float] | None:
    """Compute the interval of the proportion of hits among trials; see `estimate_proportion`.

    Args:
        hits: mask of the counted images, (images,).
        trials: mask of the images in the denominator, (images,).
        groups: group code of each image, (images,).
        confidence: level of the interval, such as 0.95.

    Returns:
        None without trials, or with several trials in a single group.
    """
    estimate = estimate_proportion(hits, trials, groups)
    return None if estimate is None else estimate.bounds((1 - confidence) / 2)


def estimate_proportion(hits: Truth, trials: Truth, groups: NDArray[np.int64]) -> ProportionEstimate | None:
    """Estimate the proportion of hits among trials.

    Independent images have a Wilson interval. Clustered images have one for the effective sample size, with Student's t
    (Franco et al. 2019, doi:10.1093/jssam/smy019): the variance is that of a ratio of sums over groups; proportions of
    0 or 1 have no variance, and the number of groups is the effective size. Negative correlation within groups can make
    the effective size larger than the number of images; it is limited to twice that number, as the variance of a few
    groups can be small by chance.

    Args:
        hits: mask of the counted images, (images,).
        trials: mask of the images in the denominator, (images,).
        groups: group code of each image, (images,).

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
        return ProportionEstimate(value, float(images), math.inf)
    if num_groups == 1:
        return None
    variance = num_groups / (num_groups - 1) * float(((group_hits - value * counts) ** 2).sum()) / images**2
    if value in (0.0, 1.0):
        effective_size = float(num_groups)
    else:
        effective_size = min(2.0 * images, value * (1 - value) / variance) if variance > 0 else float(images)
    return ProportionEstimate(value, effective_size, float(num_groups - 1))


def estimate_mean_proportion(
    masks: Sequence[tuple[Truth, Truth]], groups: NDArray[np.int64]
) -> MeanProportionEstimate | None:
    """Estimate the mean of several proportions of the same images, with their correlation over groups.

    Args:
        masks: `hits` and `trials` of each proportion, as in `estimate_proportion`.
        groups: group code of each image, consecutive from 0, (images,).

    Returns:
        None without proportions, or if one of them has no estimate.
    """
    parts = [estimate_proportion(hits, trials, groups) for hits, trials in masks]
    estimates = tuple(part for part in parts if part is not None)
    if not parts or len(estimates) < len(parts):
        return None
    residuals = np.stack([group_residuals(hits, trials, groups) for hits, trials in masks])
    return MeanProportionEstimate(estimates, correlation_matrix(residuals))


def group_residuals(hits: Truth, trials: Truth, groups: NDArray[np.int64]) -> Floats:
    """Return the hits of each group minus their expectation, the proportion times its trials, (groups,).

    Their sum is 0; divided by the number of trials they are the contributions of the groups to the error of the
    proportion.
    """
    num_groups = int(groups.max()) + 1
    images, group_hits = (np.bincount(groups[rows], minlength=num_groups) for rows in (trials, trials & hits))
    return np.asarray(group_hits - images * (group_hits.sum() / images.sum()), dtype=np.float64)


def correlation_matrix(residuals: Floats) -> Floats:
    """Return the correlation of the rows of centered residuals, (rows, groups); a row of zeros correlates with none."""
    norms = np.sqrt((residuals**2).sum(axis=1))
    unit = np.divide(residuals, norms[:, None], out=np.zeros_like(residuals), where=norms[:, None] > 0)
    matrix = unit @ unit.T
    np.fill_diagonal(matrix, 1.0)
    return np.asarray(matrix)


def predictive_value_interval(
    predicted: Truth, truth: Truth, groups: NDArray[np.int64], confidence: float, prevalence: float
) -> tuple[float, float, float] | None:
    """Compute the positive predictive value at a stated prevalence, with its interval.

    By Bayes' theorem the predictive value is 1 / (1 + FPR / sensitivity x (1 - prevalence) / prevalence). Its limits
    follow from those of FPR and sensitivity (`proportion_interval`) by the method of variance estimates recovery for a
    ratio (MOVER; Donner and Zou 2012, doi:10.1177/0962280210383082; for predictive values Mercaldo et al. 2007,
    doi:10.1002/sim.2677), with the correlation of true and false positives over groups. The prevalence is taken as
    known. With negated masks and 1 - `prevalence` it is the negative predictive value.

    Args:
        predicted: mask of the predicted positives, (images,).
        truth: mask of the positives, (images,).
        groups: group code of each image, consecutive from 0, (images,).
        confidence: level of the interval, such as 0.95.
        prevalence: share of positives among the images to which the value refers, in (0, 1).

    Returns:
        Value, low and high; None without predicted positives, or if one of the two rates has no interval.
    """
    tpr_bounds, fpr_bounds = (proportion_interval(predicted, rows, groups, confidence) for rows in (truth, ~truth))
    if tpr_bounds is None or fpr_bounds is None or not predicted.any():
        return None
    tpr, fpr = (float(predicted[rows].mean()) for rows in (truth, ~truth))
    residuals = np.stack([group_residuals(predicted, rows, groups) for rows in (truth, ~truth)])
    correlation = float(correlation_matrix(residuals)[0, 1])
    low = _ratio_bound(fpr, fpr_bounds[0], tpr, tpr_bounds[1], correlation)
    high = _ratio_bound(fpr, fpr_bounds[1], tpr, tpr_bounds[0], correlation)
    odds = (1 - prevalence) / prevalence
    value = tpr * prevalence / (tpr * prevalence + fpr * (1 - prevalence))
    return value, 1 / (1 + high * odds), 1 / (1 + low * odds)


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


def score_interval(value: float, trials: float, quantile: float) -> tuple[float, float]:
    """Compute the Wilson interval of a proportion for a (possibly fractional) number of trials and a critical value."""
    square = quantile * quantile
    center = (value + square / (2 * trials)) / (1 + square / trials)
    std = math.sqrt(value * (1 - value) / trials + square / (4 * trials * trials))
    half_width = quantile / (1 + square / trials) * std
    return max(0.0, center - half_width), min(1.0, center + half_width)


def upper_quantile(tail: float, degrees: float) -> float:
    """Return the value that Student's t exceeds with probability `tail`; the normal one for infinite degrees."""
    return float(-ndtri(tail) if math.isinf(degrees) else -stdtrit(degrees, tail))


def exact_bounds(value: float, trials: float, quantile: float) -> tuple[float, float]:
    """Compute the bounds of Clopper and Pearson (1934, doi:10.1093/biomet/26.4.404) of a proportion.

    Args:
        value: the proportion.
        trials: number of trials, also fractional.
        quantile: critical value of the normal distribution, such as 1.96 for a tail probability of 0.025.
    """
    tail, hits = max(float(ndtr(-quantile)), MIN_EXACT_TAIL), value * trials
    low = 0.0 if value == 0 else float(betaincinv(hits, trials - hits + 1, tail))
    high = 1.0 if value == 1 else 1 - float(betaincinv(trials - hits, hits + 1, tail))
    return low, high
