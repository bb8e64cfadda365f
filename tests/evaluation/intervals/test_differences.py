"""Intervals of paired differences, against published examples and by simulation."""

import numpy as np
import pytest

from fadeformer.evaluation.intervals import delong
from fadeformer.evaluation.intervals.differences import paired_difference, proportion_difference


def paired_counts(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    counts = [both, first, second, neither]
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


def test_proportion_difference_matches_newcombe():
    """Example of Newcombe (1998) with 36, 12, 2 and 0 pairs."""
    first, second = paired_counts(36, 12, 2, 0)
    result = proportion_difference(first, second, np.ones(50, bool), np.arange(50), 0.95)
    assert result.value == pytest.approx(0.2)
    assert (result.low, result.high) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_independent_difference_adds_squared_half_widths():
    result = paired_difference(0.8, (0.7, 0.85), 0.7, (0.6, 0.78), 0.0)
    assert (result.low, result.high) == pytest.approx(
        (0.1 - (0.1**2 + 0.08**2) ** 0.5, 0.1 + (0.05**2 + 0.1**2) ** 0.5)
    )


def test_correlation_narrows_the_interval():
    wide, narrow = (paired_difference(0.8, (0.7, 0.9), 0.7, (0.6, 0.8), r) for r in (0.0, 0.8))
    assert wide.low < narrow.low < 0.1 < narrow.high < wide.high


def test_proportion_difference_without_cases_is_undefined():
    none, all_images = np.zeros(4, bool), np.ones(4, bool)
    assert proportion_difference(none, none, none, np.arange(4), 0.95) is None
    assert proportion_difference(np.array([1, 0, 0, 0], bool), none, all_images, np.zeros(4, int), 0.95) is None


def test_equal_perfect_models_have_an_interval():
    """Two perfect models on few images are no evidence of equal models."""
    truth = np.arange(60) < 20
    random = np.random.default_rng(0)
    first, second = (truth + 0.5 * random.random(60) for _ in range(2))
    result = delong.auc_difference([truth], [first], [second])
    assert result.value == 0
    assert result.low < -0.1
    everything = np.ones(20, bool)
    recall = proportion_difference(everything, everything, everything, np.arange(20), 0.95)
    assert recall.value == 0
    assert recall.low < -0.1


@pytest.mark.parametrize(("positives", "auc"), [(20, 0.97), (50, 0.99)])
def test_model_at_the_margin_is_rarely_promoted(positives, auc):
    from scipy.stats import norm

    random, truth, promoted = np.random.default_rng(0), np.arange(positives + 100) < positives, 0
    for _ in range(400):
        common, *noises = random.normal(size=(3, len(truth)))
        first, second = (
            0.8**0.5 * common + 0.2**0.5 * noise + 2**0.5 * norm.ppf(area) * truth
            for noise, area in zip(noises, (auc - 0.02, auc), strict=True)
        )
        promoted += delong.auc_difference([truth], [first], [second]).low >= -0.02
    assert promoted / 400 < 0.05  # nominal 0.025, standard error 0.008
