"""Test of a shortfall by its bounds, and the smallest detectable shortfall."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from fadeformer.evaluation.intervals.proportions import ProportionEstimate
from fadeformer.evaluation.intervals.shortfall import MIN_TAIL, detectable_shortfall, shortfall_p_value


def proportion(hits: int, trials: int) -> ProportionEstimate:
    return ProportionEstimate(hits / trials, trials, math.inf)


def naive_p_value(low_hits: int, low_trials: int, high_hits: int, high_trials: int) -> float:
    """Tail probability at which the interval of the difference by exact bounds starts at 0."""
    low, high = low_hits / low_trials, high_hits / high_trials

    def bound(tail: float) -> float:
        upper = stats.beta.isf(tail, low_hits + 1, low_trials - low_hits)
        lower = stats.beta.ppf(tail, high_hits, high_trials - high_hits + 1)
        return high - low - math.hypot(high - lower, upper - low)

    return optimize.brentq(bound, 1e-9, 0.45, xtol=1e-14)


@pytest.mark.parametrize("counts", [(48, 80, 56, 70), (0, 10, 60, 300), (30, 40, 99, 100), (1, 12, 2, 12)])
def test_p_value_inverts_the_interval(counts):
    subgroup, others = proportion(*counts[:2]), proportion(*counts[2:])
    assert shortfall_p_value(subgroup, others, 0.0) == pytest.approx(naive_p_value(*counts), rel=1e-3)


@pytest.mark.parametrize(("trials", "others_trials", "value"), [(30, 270, 0.92), (15, 100, 0.8), (100, 300, 0.95)])
def test_p_values_are_calibrated_in_the_tail(trials, others_trials, value):
    """By enumeration: a shortfall by chance has p < 0.005 in at most 0.5 %, also where proportions are skewed."""
    low, high = np.arange(trials + 1), np.arange(others_trials + 1)
    probability = np.outer(stats.binom.pmf(low, trials, value), stats.binom.pmf(high, others_trials, value))
    likely = np.argwhere(probability > 1e-7)
    false = sum(
        probability[a, b]
        for a, b in likely
        if shortfall_p_value(proportion(int(a), trials), proportion(int(b), others_trials), 0.0) < 0.005
    )
    assert 0.002 < false < 0.005


def test_p_value_at_the_limits():
    assert shortfall_p_value(proportion(9, 10), proportion(8, 10), 0.0) == 1
    assert shortfall_p_value(proportion(8, 10), proportion(8, 10), 0.0) == 1
    assert shortfall_p_value(proportion(100, 1000), proportion(900, 1000), 0.0) == MIN_TAIL


def test_correlation_within_patients_raises_power():
    subgroup, others = proportion(60, 80), proportion(70, 80)
    assert shortfall_p_value(subgroup, others, 0.6) < shortfall_p_value(subgroup, others, 0.0) / 2


@pytest.mark.parametrize(("trials", "others_trials", "tail"), [(100, 300, 0.002), (40, 400, 0.01), (300, 100, 0.05)])
def test_detectable_shortfall_is_found_in_80_percent(trials, others_trials, tail):
    value, random = 0.85, np.random.default_rng(0)
    others = ProportionEstimate(value, others_trials, math.inf)
    limit = detectable_shortfall(ProportionEstimate(0.5, trials, math.inf), others, 0.0, tail)
    draws = zip(random.binomial(trials, value - limit, 1000), random.binomial(others_trials, value, 1000), strict=True)
    found = [shortfall_p_value(proportion(a, trials), proportion(b, others_trials), 0.0) < tail for a, b in draws]
    assert 0.74 < np.mean(found) < 0.86


def test_few_images_detect_nothing():
    others = ProportionEstimate(0.3, 200, math.inf)
    assert detectable_shortfall(ProportionEstimate(0.3, 10, math.inf), others, 0.0, 0.001) is None
    large = detectable_shortfall(
        ProportionEstimate(0.9, 40, math.inf), ProportionEstimate(0.9, 200, math.inf), 0.0, 0.01
    )
    small = detectable_shortfall(
        ProportionEstimate(0.9, 160, math.inf), ProportionEstimate(0.9, 200, math.inf), 0.0, 0.01
    )
    assert 0 < small < large < 0.9
