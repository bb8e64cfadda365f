"""Stratified cluster bootstrap: resamples as weights, the count of each image.

Groups (patients or lesions) are drawn as a whole, and within strata so that a class is rarely lost. The stratum of a
group is the rarest class or finding of its images. Strata with few groups are merged with the next rarest: a group that
is in every resample would contribute no variance.
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
Weights = NDArray[np.float32]  # integers; sums are exact up to 2**24
Result = TypeVar("Result")
Interval = tuple[float, float] | None

MIN_DEFINED_FRACTION = 0.95  # of the resamples, for an interval
MIN_STRATUM_GROUPS = 5
MAX_WEIGHTS = 2**20  # per chunk of resamples, 4 MiB


def encode_groups(column: pd.Series[Any]) -> GroupCodes:
    """Encode groups as consecutive integers from 0; an image without a group is its own group."""
    codes = pd.factorize(column)[0].astype(np.int64)
    ungrouped = codes < 0
    codes[ungrouped] = codes.max(initial=-1) + 1 + np.arange(ungrouped.sum())
    return codes


def assign_strata(truth: NDArray[np.bool_], groups: GroupCodes) -> GroupCodes:
    """Assign each group to a stratum, (groups,).

    Args:
        truth: classes or findings of each image as a mask, (images, classes).
        groups: group code of each image, consecutive from 0, (images,).
    """
    order = np.argsort(-truth.sum(axis=0), kind="stable")  # classes, the rarest last
    rarity = np.empty(len(order), dtype=np.int64)
    rarity[order] = np.arange(1, len(order) + 1)
    strata = np.zeros(int(groups.max()) + 1, dtype=np.int64)
    np.maximum.at(strata, groups, (truth * rarity).max(axis=1))
    values = np.unique(strata)
    for rarer, value in zip(values[:0:-1], values[-2::-1], strict=True):
        if (strata == rarer).sum() < MIN_STRATUM_GROUPS:
            strata[strata == rarer] = value
    # the most common stratum has no more common one: it is merged with the next rarer one
    if len(values) > 1 and (strata == values[0]).sum() < MIN_STRATUM_GROUPS:
        strata[strata == values[0]] = strata[strata > values[0]].min(initial=values[-1])
    return strata


def bootstrap_weights(
    groups: GroupCodes, strata: GroupCodes, n_resamples: int, seed: np.random.SeedSequence
) -> Weights:
    """Draw bootstrap resamples and return the count of each image, (n_resamples, images)."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((n_resamples, len(strata)), dtype=np.float32)
    for value in np.unique(strata):
        members = np.flatnonzero(strata == value)
        for row in weights:
            row[members] = np.bincount(rng.integers(len(members), size=len(members)), minlength=len(members))
    return weights[:, groups]


def half_sample_weights(groups: GroupCodes, strata: GroupCodes, n_resamples: int, seed: int) -> Weights:
    """Draw half-samples: weight 1 for half of the groups of each stratum, 0 for the others, (n_resamples, images).

    No image is repeated. A bias of c / n in n images is 2 c / n in half of them, so the excess over the full sample
    estimates the bias. For an odd number of groups the half is alternately rounded down and up.
    """
    rng = np.random.default_rng(seed)
    weights = np.zeros((n_resamples, len(strata)), dtype=np.float32)
    for value in np.unique(strata):
        members = np.flatnonzero(strata == value)
        for index, row in enumerate(weights):
            row[rng.permutation(members)[: (len(members) + index % 2) // 2]] = 1
    return weights[:, groups]


def map_resamples(
    function: Callable[[Weights], Result], groups: GroupCodes, strata: GroupCodes, n_resamples: int, seed: int
) -> list[Result]:
    """Apply a function to chunks of bootstrap weights in parallel; the result does not depend on the number of cores.

    Args:
        function: of weights (samples, images).
        groups: group code of each image, (images,).
        strata: stratum of each group, (groups,).
        n_resamples: number of resamples in total.
        seed: of the bootstrap.

    Returns:
        One result per chunk.
    """
    size = max(1, min(n_resamples, MAX_WEIGHTS // len(groups)))
    sizes = [min(size, n_resamples - start) for start in range(0, n_resamples, size)]
    seeds = np.random.SeedSequence(seed).spawn(len(sizes))
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        chunks = zip(sizes, seeds, strict=True)
        return list(workers.map(lambda chunk: function(bootstrap_weights(groups, strata, *chunk)), chunks))


def percentile_interval(samples: NDArray[np.float64], groups: int, confidence: float) -> Interval:
    """Compute a percentile interval, expanded for few groups (Hesterberg 2015, doi:10.1080/00031305.2015.1089789).

    Args:
        samples: bootstrap samples of a metric, (samples,).
        groups: number of groups that were drawn from.
        confidence: level of the interval, such as 0.95.

    Returns:
        None if the metric is undefined in too many resamples, or there is a single group.
    """
    defined = samples[np.isfinite(samples)]
    if len(defined) < MIN_DEFINED_FRACTION * len(samples) or groups < 2:
        return None
    tail = 100 * norm.sf(critical_value(groups, confidence))
    low, high = np.percentile(defined, [tail, 100 - tail])
    return float(low), float(high)


def critical_value(groups: int, confidence: float) -> float:
    """Return the half-width of an interval in standard deviations: Student's t, times sqrt(groups / (groups - 1))."""
    return float(np.sqrt(groups / (groups - 1)) * t.ppf((1 + confidence) / 2, groups - 1))
