"""Confidence intervals of the difference of two paired metrics, from the intervals of each and their correlation.

The method of variance estimates recovery (MOVER; Zou and Donner 2008, doi:10.1002/sim.3095; for paired proportions
Newcombe 1998, doi:10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C, method 8) keeps the accuracy of
the single intervals: near 1, and with few cases, they are asymmetric and much wider than the estimated variance says.
docs/explanation/statistics/promotion.md compares it with other methods by simulation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fadeformer.evaluation.intervals.proportions import Truth, proportion_interval

Floats = NDArray[np.float64]
Bounds = tuple[float, float]


@dataclass(frozen=True)
class PairedDifference:
    """Difference of a metric of two models on the same images, first minus second, with its interval."""

    value: float
    low: float
    high: float


def paired_difference(
    first: float, first_bounds: Bounds, second: float, second_bounds: Bounds, correlation: float
) -> PairedDifference:
    """Compute the interval of first minus second by MOVER.

    Args:
        first: metric of the first model.
        first_bounds: its interval.
        second: metric of the second model.
        second_bounds: its interval, at the same level.
        correlation: of the two estimates, in [-1, 1].
    """

    def half_width(first_bound: float, second_bound: float) -> float:
        a, b = abs(first - first_bound), abs(second - second_bound)
        return math.sqrt(max(0.0, a * a + b * b - 2 * correlation * a * b))

    value = first - second
    return PairedDifference(
        value,
        value - half_width(first_bounds[0], second_bounds[1]),
        value + half_width(first_bounds[1], second_bounds[0]),
    )


def proportion_difference(
    first: Truth, second: Truth, trials: Truth, groups: NDArray[np.int64], confidence: float
) -> PairedDifference | None:
    """Compare the proportions of hits of two models among the same trials, such as the recall of a class.

    Args:
        first: mask of the hits of the first model, (images,).
        second: mask of the hits of the second model, (images,).
        trials: mask of the images in the denominator, (images,).
        groups: group code (patient or lesion) of each image, (images,).
        confidence: level of the interval, such as 0.95.

    Returns:
        None without trials, or with several trials in a single group.
    """
    bounds = [proportion_interval(hits, trials, groups, confidence) for hits in (first, second)]
    if bounds[0] is None or bounds[1] is None:
        return None
    values = [float(hits[trials].mean()) for hits in (first, second)]
    residuals = [
        np.bincount(groups[trials], hits[trials] - value) for hits, value in zip((first, second), values, strict=True)
    ]
    norms = math.sqrt(float((residuals[0] ** 2).sum() * (residuals[1] ** 2).sum()))
    correlation = float(residuals[0] @ residuals[1]) / norms if norms > 0 else 0.0
    return paired_difference(values[0], bounds[0], values[1], bounds[1], correlation)
