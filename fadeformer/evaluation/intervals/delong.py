"""Areas under ROC curves with their covariance (DeLong et al. 1988, doi:10.2307/2531595), also of clustered images.

A positive's component is the share of negatives that it outranks, a negative's the share of positives that outrank it,
ties counted half; their spread is that of the AUC. Where a patient or lesion has several images, components are summed
within it before they are squared (Obuchowski 1997, doi:10.2307/2533958). Ranks make it O(n log n) (Sun and Xu 2014,
doi:10.1109/LSP.2014.2337313). An AUC's interval takes Student's t, by the degrees of freedom of Brunner and Munzel
(2000, doi:10.1002/(SICI)1521-4036(200001)42:1<17::AID-BIMJ17>3.0.CO;2-U), whose effect an AUC is.
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

ROUNDING_ERROR = 1e-13  # of a variance, relative to those that it is the difference of

Floats = NDArray[np.float64]
Truth = NDArray[np.bool_]


@dataclass(frozen=True)
class AUCEstimates:
    """Some AUCs of the same images.

    Attributes:
        areas: (curves,), in [0, 1].
        covariance: (curves, curves); NaN where a curve has positives, or negatives, in fewer than two groups.
        fewest: of each curve, the smaller number of groups: with positives or with negatives.
        degrees: of freedom of each variance, (curves,).
    """

    areas: Floats
    covariance: Floats
    min_groups: NDArray[np.int64]
    degrees_of_freedom: Floats


def estimate_aucs(
    truths: Sequence[Truth], scores: Sequence[Floats], groups: NDArray[np.int64] | None = None
) -> AUCEstimates:
    """AUCs of several classes, findings or models on the same images.

    Args:
        truths: of each curve, which images are positive, (images,).
        scores: of each curve, (images,).
        groups: number of each image's patient or lesion, (images,); None where every image stands alone.

    Raises:
        ValueError: a curve lacks positives or negatives.
    """
    codes = np.arange(len(truths[0])) if groups is None else np.unique(groups, return_inverse=True)[1]
    clusters = int(codes.max()) + 1
    areas = np.empty(len(truths))
    of_positives, of_negatives = np.zeros((2, clusters, len(truths)))  # summed components, each over its own count
    factors, sizes = np.empty((2, 2, len(truths)))
    for curve, (truth, score) in enumerate(zip(truths, scores, strict=True)):
        outranks, is_outranked = structural_components(truth, score)
        areas[curve] = outranks.mean()
        for side, sums, rows, found in (
            (0, of_positives, truth, outranks), (1, of_negatives, ~truth, is_outranked),
        ):  # fmt: skip
            sums[:, curve] = np.bincount(codes[rows], (found - areas[curve]) / len(found), minlength=clusters)
            sizes[side, curve] = len(np.unique(codes[rows]))
            factors[side, curve] = _bessel_correction(int(sizes[side, curve]))
    fewest = sizes.min(axis=0).astype(np.int64)
    positives, negatives = of_positives * np.sqrt(factors[0]), of_negatives * np.sqrt(factors[1])
    both = of_positives.T @ of_negatives
    covariance = positives.T @ positives + negatives.T @ negatives + _bessel_correction(clusters) * (both + both.T)
    parts = np.stack([(positives**2).sum(axis=0), (negatives**2).sum(axis=0)])
    return AUCEstimates(areas, covariance, fewest, _satterthwaite(parts, sizes - 1))


def structural_components(truth: Truth, score: Floats) -> tuple[Floats, Floats]:
    """Of each positive the share of negatives below it, of each negative the share of positives above it.

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


def mean_auc_interval(found: AUCEstimates, curves: Sequence[int], confidence: float) -> tuple[float, float] | None:
    """Interval of the mean of some of the AUCs, on the scale of log odds, so that it stays in [0, 1].

    At 0 or 1, where the variance is 0, it is Wilson's for as many cases as there are groups of the rarer kind. None
    where the variance is not known.
    """
    area, variances = float(found.areas[curves].mean()), np.diag(found.covariance)[curves]
    variance, fewest = float(found.covariance[np.ix_(curves, curves)].mean()), int(found.min_groups[curves].min())
    if not math.isfinite(variance):
        return None
    if area in (0.0, 1.0):
        return wilson_interval(round(area * fewest), fewest, confidence)
    degrees = _satterthwaite(variances[:, None], found.degrees_of_freedom[curves][:, None])[0]
    half = t.ppf((1 + confidence) / 2, degrees) * math.sqrt(max(variance, 0.0)) / (area * (1 - area))
    return float(expit(logit(area) - half)), float(expit(logit(area) + half))


@dataclass(frozen=True)
class AUCDifference:
    """Of two AUCs on the same images: first less second, and its interval."""

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
    """Paired comparison of the means of two models' AUCs over some classes or findings.

    Args:
        truths: of each class, which images are positive, (images,).
        first: scores of one model for each class, (images,).
        second: of the other.
        groups: number of each image's patient or lesion; None where every image stands alone.
        confidence: of the interval.

    Raises:
        ValueError: there are no positives or negatives of a class, or in one group only.
    """
    found = estimate_aucs([*truths, *truths], [*first, *second], groups)
    contrast = np.repeat([1.0, -1.0], len(truths)) / len(truths)
    one, other = np.split(found.areas, 2)
    value, variance = float((one - other).mean()), float(contrast @ found.covariance @ contrast)  # of equals exactly 0
    if not math.isfinite(variance):
        raise ValueError("a comparison needs positives and negatives of two groups each")
    if (
        variance < ROUNDING_ERROR * found.covariance.diagonal().max()
    ):  # of scores in the same order only rounding is left
        variance = 0.0
    half = float(norm.ppf((1 + confidence) / 2)) * math.sqrt(variance)
    return AUCDifference(value, value - half, value + half)


def _satterthwaite(variances: Floats, degrees: Floats) -> Floats:
    """Of a sum of variances over the first axis (Satterthwaite 1946, doi:10.2307/3002019)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = variances.sum(axis=0) ** 2 / (variances**2 / degrees).sum(axis=0)
    return np.asarray(np.where(np.isfinite(found), found, degrees.min(axis=0)))


def _bessel_correction(groups: int) -> float:
    """What makes a variance of so many groups unbiased."""
    return groups / (groups - 1) if groups > 1 else math.nan
