"""Intervals of a proportion, of images that stand alone and of several of one patient or lesion."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

Truth = NDArray[np.bool_]


def wilson_interval(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927, doi:10.2307/2276774), which holds its level in small samples and near 0 and 1."""
    return score_interval(hits / trials, trials, float(norm.ppf((1 + confidence) / 2)))


def proportion_interval(
    hits: Truth, trials: Truth, groups: NDArray[np.int64], confidence: float
) -> tuple[float, float] | None:
    """Interval of the share of hits among trials.

    Where images stand alone it is Wilson's. Else it is Wilson's for as many images as would be as sure if they stood
    alone (Franco et al. 2019, doi:10.1093/jssam/smy019), with Student's t: the variance is that of a ratio of sums over
    groups; where all or none are hits, which has no variance, a group counts as one image. Mistakes of a patient may
    make up for one another, so that there are more such images than there are, but not more than twice as many: the
    variance of a few groups may be small by chance.

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
        return wilson_interval(int(found.sum()), images, confidence)
    if clusters == 1:
        return None
    variance = clusters / (clusters - 1) * float(((found - share * counts) ** 2).sum()) / images**2
    if share in (0.0, 1.0):
        effective = float(clusters)
    else:
        effective = min(2.0 * images, share * (1 - share) / variance) if variance > 0 else float(images)
    return score_interval(share, effective, float(t.ppf((1 + confidence) / 2, clusters - 1)))


def predictive_value_interval(
    called: Truth, truth: Truth, groups: NDArray[np.int64], confidence: float
) -> tuple[float, float] | None:
    """Interval of the share of positives among what was called positive, in images of the same mix.

    A threshold decides how many images the share is of, so that Wilson's interval would be too wide. It is 1 / (1 +
    ratio of false and true positives), and that ratio the one of false positive rate and sensitivity times a fixed one:
    the method of variance estimates recovery takes its limits from theirs (Donner and Zou 2012,
    doi:10.1177/0962280210383082; of predictive values Mercaldo et al. 2007, doi:10.1002/sim.2677), which are those of
    `share_interval`, with the correlation of the two counts over patients or lesions.

    Args:
        called: which images are called positive, (images,).
        truth: which are, (images,).
        groups: number of each image's patient or lesion, (images,).
        confidence: such as 0.95.

    Returns:
        None where nothing is called positive, or one of the two rates has no interval.
    """
    of_true, of_false = (proportion_interval(called, of, groups, confidence) for of in (truth, ~truth))
    if of_true is None or of_false is None or not called.any():
        return None
    positives, negatives = int(truth.sum()), int((~truth).sum())
    true, false = (called & truth).sum() / positives, (called & ~truth).sum() / negatives
    together = _correlation(called, truth, groups)
    low = _ratio_bound(false, of_false[0], true, of_true[1], together)
    high = _ratio_bound(false, of_false[1], true, of_true[0], together)
    return 1 / (1 + high * negatives / positives), 1 / (1 + low * negatives / positives)


def _ratio_bound(above: float, above_bound: float, below: float, below_bound: float, correlation: float) -> float:
    """A limit of above / below: the lower one of a lower bound above and an upper one below, or the other way round."""
    scale = below_bound * (2 * below - below_bound)
    if scale == 0:
        return math.inf
    middle = above * below - correlation * (above - above_bound) * (below_bound - below)
    spread = middle * middle - above_bound * below_bound * (2 * above - above_bound) * (2 * below - below_bound)
    return (middle + math.copysign(math.sqrt(max(0.0, spread)), above_bound - above)) / scale


def _correlation(called: Truth, truth: Truth, groups: NDArray[np.int64]) -> float:
    """Of the true and the false positives of a patient or lesion, each less what its images lead to expect."""
    surplus = []
    for of in (truth, ~truth):
        images, found = (np.bincount(groups[rows], minlength=int(groups.max()) + 1) for rows in (of, of & called))
        surplus.append(found - images * (found.sum() / images.sum()))
    size = math.sqrt(float((surplus[0] ** 2).sum() * (surplus[1] ** 2).sum()))
    return float(surplus[0] @ surplus[1]) / size if size > 0 else 0.0


def score_interval(share: float, trials: float, quantile: float) -> tuple[float, float]:
    """Wilson's interval of a share of so many trials, which need be no whole number, for a quantile of the error."""
    square = quantile * quantile
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    half = quantile / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)
