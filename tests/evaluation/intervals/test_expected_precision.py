"""Expected intervals against simulated test splits, evaluated by the methods of the report."""

import numpy as np
import pytest
from scipy.stats import norm

from fadeformer.evaluation.intervals import delong, expected_precision, proportions


def simulate(auc: float, positives: int, negatives: int, sets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AUCs of two models on the same sets, (sets, 2), the first one's intervals, and half-widths of the difference."""
    rng, truth = np.random.default_rng(0), np.arange(positives + negatives) < positives
    distance = np.sqrt(2) * norm.ppf(auc)
    areas, bounds, half_widths = [], [], []
    for _ in range(sets):
        common = rng.normal(size=len(truth))
        scores = [
            np.sqrt(0.8) * common + np.sqrt(0.2) * rng.normal(size=len(truth)) + distance * truth for _ in range(2)
        ]
        estimates = delong.estimate_aucs([truth] * 2, scores)
        areas.append(estimates.areas)
        bounds.append(delong.mean_auc_interval(estimates, [0], 0.95))
        difference = delong.auc_difference([truth], scores[:1], scores[1:])
        half_widths.append((difference.high - difference.low) / 2)
    return np.array(areas), np.array(bounds), np.array(half_widths)


@pytest.mark.parametrize(("positives", "negatives"), [(50, 200), (100, 100)])
def test_auc_intervals_match_simulation(positives, negatives):
    expected = expected_precision.expected_precision(positives, negatives)
    for auc, interval in zip(expected_precision.AUCS, expected.auc_intervals, strict=True):
        areas, bounds, _ = simulate(auc, positives, negatives, 300)
        std = np.sqrt(expected_precision.auc_variance(auc, positives, negatives))
        assert areas.std() == pytest.approx(std, rel=0.12)
        assert interval == pytest.approx(bounds.mean(axis=0), abs=0.012)


def test_detectable_difference_matches_simulation():
    expected = expected_precision.expected_precision(50, 200).detectable_difference
    _, _, half_widths = simulate(expected_precision.COMPARED_AUC, 50, 200, 300)
    detectable = half_widths.mean() * (norm.ppf(0.975) + norm.ppf(0.8)) / norm.ppf(0.975)
    assert detectable <= expected <= 1.3 * detectable  # AUCs are assumed to be less correlated than here


def test_sensitivity_interval_is_that_of_wilson():
    expected = expected_precision.expected_precision(20, 100).sensitivity_interval
    assert expected == pytest.approx(proportions.wilson_interval(18, 20))


def test_single_case_has_no_expectation():
    assert expected_precision.expected_precision(1, 100) is None
    assert expected_precision.expected_precision(2, 2) is not None
