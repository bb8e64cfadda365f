"""Areas under ROC curves with their covariance (DeLong et al. 1988, doi:10.2307/2531595), also of clustered images.

A positive's component is the share of negatives that it outranks, a negative's the share of positives that outrank it,
ties counted half; their spread is that of the AUC. Where a patient or lesion has several images, components are summed
within it before they are squared (Obuchowski 1997, doi:10.2307/2533958). Ranks make it O(n log n) (Sun and Xu 2014,
doi:10.1109/LSP.2014.2337313).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import norm, rankdata

from fadeformer.proportions import wilson

Floats = NDArray[np.float64]
Truth = NDArray[np.bool_]


@dataclass(frozen=True)
class Aucs:
    """Some AUCs of the same images.

    Attributes:
        areas: (curves,), in [0, 1].
        covariance: (curves, curves); NaN where a curve has positives, or negatives, in fewer than two groups.
        fewest: of each curve, the smaller number of groups: with positives or with negatives.
    """

    areas: Floats
    covariance: Floats
    fewest: NDArray[np.int64]


def aucs(truths: Sequence[Truth], scores: Sequence[Floats], groups: NDArray[np.int64] | None = None) -> Aucs:
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
    areas, fewest = np.empty(len(truths)), np.empty(len(truths), dtype=np.int64)
    of_positives, of_negatives = np.zeros((2, clusters, len(truths)))  # summed components, each over its own count
    factors = np.empty((2, len(truths)))
    for curve, (truth, score) in enumerate(zip(truths, scores, strict=True)):
        outranks, is_outranked = components(truth, score)
        areas[curve] = outranks.mean()
        for side, sums, rows, found in (
            (0, of_positives, truth, outranks), (1, of_negatives, ~truth, is_outranked),
        ):  # fmt: skip
            sums[:, curve] = np.bincount(codes[rows], (found - areas[curve]) / len(found), minlength=clusters)
            factors[side, curve] = _corrected(len(np.unique(codes[rows])))
        fewest[curve] = min(len(np.unique(codes[truth])), len(np.unique(codes[~truth])))
    positives, negatives = of_positives * np.sqrt(factors[0]), of_negatives * np.sqrt(factors[1])
    both = of_positives.T @ of_negatives
    covariance = positives.T @ positives + negatives.T @ negatives + _corrected(clusters) * (both + both.T)
    return Aucs(areas, covariance, fewest)


def components(truth: Truth, score: Floats) -> tuple[Floats, Floats]:
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


def interval(auc: float, variance: float, fewest: int, confidence: float) -> tuple[float, float] | None:
    """Interval of an AUC, normal on the scale of log odds, so that it stays in [0, 1].

    At 0 or 1, where the variance is 0, it is Wilson's for as many cases as there are groups of the rarer kind. None
    where the variance is not known.
    """
    if not math.isfinite(variance):
        return None
    if auc in (0.0, 1.0):
        return wilson(round(auc * fewest), fewest, confidence)
    half = norm.ppf((1 + confidence) / 2) * math.sqrt(max(variance, 0.0)) / (auc * (1 - auc))
    return float(expit(logit(auc) - half)), float(expit(logit(auc) + half))


@dataclass(frozen=True)
class Difference:
    """Of two AUCs on the same images: first less second, its standard error, interval and two-sided p."""

    value: float
    standard_error: float
    low: float
    high: float
    p: float


def difference(
    truth: Truth, first: Floats, second: Floats, groups: NDArray[np.int64] | None = None, confidence: float = 0.95
) -> Difference:
    """Paired comparison of two models.

    Args:
        truth: which images are positive, (images,).
        first: scores of one model, (images,).
        second: of the other.
        groups: number of each image's patient or lesion; None where every image stands alone.
        confidence: of the interval.

    Raises:
        ValueError: there are no positives or negatives, or in one group only.
    """
    found = aucs([truth, truth], [first, second], groups)
    contrast = np.array([1.0, -1.0])
    value, variance = float(contrast @ found.areas), float(contrast @ found.covariance @ contrast)
    if not math.isfinite(variance):
        raise ValueError("a comparison needs positives and negatives of two groups each")
    error = math.sqrt(max(variance, 0.0))
    half = float(norm.ppf((1 + confidence) / 2)) * error
    of_equals = 1.0 if value == 0 else 0.0  # scores in the same order have no error
    p = float(2 * norm.sf(abs(value) / error)) if error > 0 else of_equals
    return Difference(value, error, value - half, value + half, p)


def _corrected(groups: int) -> float:
    """What makes a variance of so many groups unbiased."""
    return groups / (groups - 1) if groups > 1 else math.nan
