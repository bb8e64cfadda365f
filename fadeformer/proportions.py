"""Intervals of a proportion."""

from __future__ import annotations

import math

from scipy.stats import norm


def wilson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927, doi:10.2307/2276774), which holds its level in small samples and near 0 and 1.

    Raises:
        ValueError: there are no trials.
    """
    if trials < 1:
        raise ValueError("a proportion of nothing has no interval")
    z, share = float(norm.ppf((1 + confidence) / 2)), hits / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)
