"""Precision that a test split allows: how wide intervals will be, known from the number of cases before any training.

Each group (patient, lesion or slide) counts as one independent case, which is cautious: further images of a patient add
a little. The variance of an AUC is that of Hanley and McNeil (1982, doi:10.1148/radiology.143.1.7063747) for scores
that are normally distributed in both classes, with the same variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit
from scipy.stats import multivariate_normal, norm

from fadeformer.evaluation.intervals.proportions import score_interval

AUCS = (0.8, 0.9, 0.95)  # assumed true AUCs
SENSITIVITY = 0.9  # assumed true sensitivity
COMPARED_AUC = 0.9  # assumed true AUC of the champion
AUC_CORRELATION = 0.6  # of the AUCs of two models on the same images; about 0.7 if their scores correlate by 0.8
POWER = 0.8  # probability to detect the detectable difference
MIN_CASES = 2  # with and without the class; a single case has no variance

Interval = tuple[float, float]


@dataclass(frozen=True)
class ExpectedPrecision:
    """Expected intervals of one class or finding.

    Attributes:
        auc_intervals: of each AUC of `AUCS`.
        sensitivity_interval: of `SENSITIVITY`.
        detectable_difference: smallest difference of the AUCs of two models on the same images that is detected with
            probability `POWER`, if the champion's is `COMPARED_AUC`.
    """

    auc_intervals: tuple[Interval, ...]
    sensitivity_interval: Interval
    detectable_difference: float


def expected_precision(positives: int, negatives: int, confidence: float = 0.95) -> ExpectedPrecision | None:
    """Compute the intervals to expect on a test split.

    Args:
        positives: number of cases with the class or finding.
        negatives: number of cases without it.
        confidence: level of the intervals and of the comparison.

    Returns:
        None with fewer than `MIN_CASES` cases of either kind.
    """
    if min(positives, negatives) < MIN_CASES:
        return None
    quantile = float(norm.ppf((1 + confidence) / 2))
    variance = auc_variance(COMPARED_AUC, positives, negatives)
    return ExpectedPrecision(
        tuple(_auc_interval(auc, positives, negatives, quantile) for auc in AUCS),
        score_interval(SENSITIVITY, positives, quantile),
        (quantile + float(norm.ppf(POWER))) * math.sqrt(2 * (1 - AUC_CORRELATION) * variance),
    )


def auc_variance(auc: float, positives: int, negatives: int) -> float:
    """Compute the variance of an AUC (Hanley and McNeil 1982, equation 1) for normally distributed scores.

    Their own approximation of the probability that two positives outrank a negative is for exponential scores, whose
    AUCs vary more: the standard error would be up to 40 % too large for normal scores.

    Args:
        auc: true AUC, in (0, 1).
        positives: number of independent positives, 1 or more.
        negatives: number of independent negatives, 1 or more.
    """
    both = multivariate_normal(cov=[[1, 0.5], [0.5, 1]])  # of two differences that share one score
    pair = float(both.cdf(np.full(2, norm.ppf(auc))))  # probability that two positives outrank a negative, or one two
    return (auc * (1 - auc) + (positives + negatives - 2) * (pair - auc**2)) / (positives * negatives)


def _auc_interval(auc: float, positives: int, negatives: int, quantile: float) -> Interval:
    """Interval on the logit scale, as `fadeformer.evaluation.intervals.delong` computes it."""
    half_width = quantile * math.sqrt(auc_variance(auc, positives, negatives)) / (auc * (1 - auc))
    return float(expit(logit(auc) - half_width)), float(expit(logit(auc) + half_width))
