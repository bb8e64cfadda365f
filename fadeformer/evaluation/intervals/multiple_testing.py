"""Step-down adjustment of p-values for many correlated tests.

A single-step procedure compares every test with the largest of all; a step-down one compares the most significant with
the largest of all, the next with the largest of the rest, and so on (Westfall and Young 1993, ISBN
978-0-471-55761-6). The test statistics are normal quantiles of the p-values, whose joint distribution is multivariate
normal with the correlation of the tests (Hothorn, Bretz and Westfall 2008, doi:10.1002/bimj.200810425).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

Floats = NDArray[np.float64]

NUM_DRAWS = 10_000  # of the multivariate normal distribution; the standard error of a p-value of 0.05 is 0.002
CHUNK = 2_000  # draws at a time, to limit memory


@dataclass(frozen=True)
class AdjustedTests:
    """Result of `step_down`.

    Attributes:
        p_values: adjusted p-values, (tests,).
        tail: p-value before adjustment below which the most significant test is significant.
    """

    p_values: Floats
    tail: float


def step_down(p_values: Floats, correlation: Floats, alpha: float, seed: int) -> AdjustedTests:
    """Adjust one-sided p-values so that the probability of any false positive is at most `alpha`.

    Args:
        p_values: in (0, 1], (tests,).
        correlation: of the test statistics, (tests, tests).
        alpha: family-wise error rate, such as 0.05.
        seed: of the draws.
    """
    statistics = -ndtri(p_values)
    order = np.argsort(-statistics, kind="stable")
    values, vectors = np.linalg.eigh(correlation)
    factor = (vectors * np.sqrt(np.maximum(values, 0.0)))[order]  # factor @ independent normals have the correlation
    rng, counts, largest = np.random.default_rng(seed), np.zeros(len(order), dtype=np.int64), []
    for _ in range(NUM_DRAWS // CHUNK):
        draws = factor @ rng.standard_normal((len(order), CHUNK))  # tests, draws
        maxima = np.maximum.accumulate(draws[::-1])[::-1]  # over each test and all less significant ones
        counts += (maxima >= statistics[order, None]).sum(axis=1)
        largest.append(maxima[0])
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate((1 + counts) / (1 + NUM_DRAWS))
    return AdjustedTests(adjusted, float(ndtr(-np.quantile(np.concatenate(largest), 1 - alpha))))
