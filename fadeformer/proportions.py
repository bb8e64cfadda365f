"""Intervals of a proportion, of images that stand alone and of several of one patient or lesion."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

Truth = NDArray[np.bool_]


def wilson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927, doi:10.2307/2276774), which holds its level in small samples and near 0 and 1.

    Raises:
        ValueError: there are no trials.
    """
    if trials < 1:
        raise ValueError("a proportion of nothing has no interval")
    return score(hits / trials, trials, float(norm.ppf((1 + confidence) / 2)))


def share_interval(
    hits: Truth, trials: Truth, groups: NDArray[np.int64], confidence: float
) -> tuple[float, float] | None:
    """Interval of the share of hits among trials.

    Where images stand alone it is Wilson's. Else it is Wilson's for as many images as would be as sure if they stood
    alone (Franco et al. 2019, doi:10.1093/jssam/smy019), with Student's t: the variance is that of a ratio of sums over
    groups; where all or none are hits, which has no variance, a group counts as one image.

    Args:
        hits: which images are counted, (images,).
        trials: of which images, (images,).
        groups: number of each image's patient or lesion, (images,).
        confidence: such as 0.95.

    Returns:
        None where there are no trials, or several of a single group.
    """
    counts = np.bincount(groups[trials])
    found = np.bincount(groups[trials & hits], minlength=len(counts))[counts > 0]
    counts = counts[counts > 0]
    if not len(counts):
        return None
    images, clusters, share = int(counts.sum()), len(counts), float(found.sum() / counts.sum())
    if images == clusters:
        return wilson(int(found.sum()), images, confidence)
    if clusters == 1:
        return None
    variance = clusters / (clusters - 1) * float(((found - share * counts) ** 2).sum()) / images**2
    if share in (0.0, 1.0):
        effective = float(clusters)
    else:
        effective = min(float(images), share * (1 - share) / variance) if variance > 0 else float(images)
    return score(share, effective, float(t.ppf((1 + confidence) / 2, clusters - 1)))


def score(share: float, trials: float, quantile: float) -> tuple[float, float]:
    """Wilson's interval of a share of so many trials, which need be no whole number, for a quantile of the error."""
    square = quantile * quantile
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    half = quantile / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)
