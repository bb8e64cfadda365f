"""Bootstrap samples as weights: how often each image is drawn, its patient or lesion whole, class by class.

A sample draws as many groups of each stratum as there are, so that a class is hardly ever lost. The stratum of a group
is the rarest class or finding that any of its images has; few groups join the stratum of the next rarest, since a group
that is drawn in every sample would be taken for certain.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm, t

GroupCodes = NDArray[np.int64]
Weights = NDArray[np.float32]  # whole numbers, and sums of them up to 2**24, are exact
Result = TypeVar("Result")
Interval = tuple[float, float] | None

MIN_DEFINED_FRACTION = 0.95  # share of samples in which a measure must be defined for an interval
MIN_STRATUM_GROUPS = 5  # groups of a stratum
MAX_WEIGHTS = 2**20  # weights at once: 4 MiB of them


def encode_groups(column: pd.Series[Any]) -> GroupCodes:
    """Number of each image's group, from 0 without a gap; an image without one stands alone."""
    codes = pd.factorize(column)[0].astype(np.int64)
    alone = codes < 0
    codes[alone] = codes.max(initial=-1) + 1 + np.arange(alone.sum())
    return codes


def assign_strata(truth: NDArray[np.bool_], groups: GroupCodes) -> GroupCodes:
    """Stratum of each group, (groups,).

    Args:
        truth: which classes or findings each image has, (images, classes).
        groups: number of each image's group, from 0 without a gap, (images,).
    """
    common = np.argsort(-truth.sum(axis=0), kind="stable")  # classes, the rarest last
    rarity = np.empty(len(common), dtype=np.int64)
    rarity[common] = np.arange(1, len(common) + 1)
    found = np.zeros(int(groups.max()) + 1, dtype=np.int64)
    np.maximum.at(found, groups, (truth * rarity).max(axis=1))
    values = np.unique(found)
    for rarer, value in zip(values[:0:-1], values[-2::-1], strict=True):
        if (found == rarer).sum() < MIN_STRATUM_GROUPS:
            found[found == rarer] = value
    if (
        len(values) > 1 and (found == values[0]).sum() < MIN_STRATUM_GROUPS
    ):  # the most common have none to join but the next
        found[found == values[0]] = found[found > values[0]].min(initial=values[-1])
    return found


def bootstrap_weights(groups: GroupCodes, stratum: GroupCodes, draws: int, seed: np.random.SeedSequence) -> Weights:
    """How often each image is in each of some samples, (draws, images)."""
    random = np.random.default_rng(seed)
    drawn = np.zeros((draws, len(stratum)), dtype=np.float32)
    for value in np.unique(stratum):
        members = np.flatnonzero(stratum == value)
        for row in drawn:
            row[members] = np.bincount(random.integers(len(members), size=len(members)), minlength=len(members))
    return drawn[:, groups]


def half_sample_weights(groups: GroupCodes, stratum: GroupCodes, draws: int, seed: int) -> Weights:
    """Weights of 1 for half of the groups of each stratum and 0 for the others, (draws, images).

    No image is there twice. What is too high by c / n in n images is so by 2 c / n in half of them, and so by as much
    more there as here. Of an odd number as often one more as one less is drawn.
    """
    random = np.random.default_rng(seed)
    drawn = np.zeros((draws, len(stratum)), dtype=np.float32)
    for value in np.unique(stratum):
        members = np.flatnonzero(stratum == value)
        for number, row in enumerate(drawn):
            row[random.permutation(members)[: (len(members) + number % 2) // 2]] = 1
    return drawn[:, groups]


def map_resamples(
    measure: Callable[[Weights], Result], groups: GroupCodes, stratum: GroupCodes, draws: int, seed: int
) -> list[Result]:
    """Calls a function with the weights of `draws` samples, some at a time, on all cores; the same for any number.

    Args:
        measure: of weights (samples, images).
        groups: number of each image's group, (images,).
        stratum: of each group, (groups,).
        draws: samples in all.
        seed: of the draws.
    """
    size = max(1, min(draws, MAX_WEIGHTS // len(groups)))
    sizes = [min(size, draws - start) for start in range(0, draws, size)]
    seeds = np.random.SeedSequence(seed).spawn(len(sizes))
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        return list(
            workers.map(lambda part: measure(bootstrap_weights(groups, stratum, *part)), zip(sizes, seeds, strict=True))
        )


def percentile_interval(samples: NDArray[np.float64], groups: int, confidence: float) -> Interval:
    """The middle of bootstrap samples, wider for few groups (Hesterberg 2015, doi:10.1080/00031305.2015.1089789).

    Args:
        samples: of a measure, (samples,).
        groups: that were drawn from.
        confidence: such as 0.95.

    Returns:
        None where too few samples are defined, or there is one group only.
    """
    defined = samples[np.isfinite(samples)]
    if len(defined) < MIN_DEFINED_FRACTION * len(samples) or groups < 2:
        return None
    tail = 100 * norm.sf(critical_value(groups, confidence))
    low, high = np.percentile(defined, [tail, 100 - tail])
    return float(low), float(high)


def critical_value(groups: int, confidence: float) -> float:
    """By how many standard deviations of the samples an interval reaches either way: a little more than Student's t."""
    return float(np.sqrt(groups / (groups - 1)) * t.ppf((1 + confidence) / 2, groups - 1))
