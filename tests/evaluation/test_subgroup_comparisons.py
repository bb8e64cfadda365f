"""Estimates of mean AUCs for subgroup comparisons."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from fadeformer.evaluation.intervals import delong
from fadeformer.evaluation.intervals.proportions import ProportionEstimate
from fadeformer.evaluation.intervals.shortfall import shortfall_p_value
from fadeformer.evaluation.subgroup_comparisons import MeanAUCEstimate, binormal_variance


@pytest.mark.parametrize("curves", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("clustered", [False, True])
def test_bounds_are_those_of_the_auc_interval(curves, clustered):
    random = np.random.default_rng(0)
    groups = np.arange(200) // (4 if clustered else 1)
    truths = [random.random(200) < share for share in (0.3, 0.6)]
    scores = [random.normal(size=200) + truth for truth in truths]
    estimates = delong.estimate_aucs(truths, scores, groups)
    estimate = MeanAUCEstimate(estimates, curves, (60.0, 140.0))
    assert estimate.tail_bounds(0.025) == pytest.approx(delong.mean_auc_interval(estimates, list(curves), 0.95))
    assert estimate.planned_bounds(estimate.value, 0.01) == pytest.approx(estimate.tail_bounds(0.01))


def test_perfect_auc_has_bounds():
    truth = np.arange(40) < 15
    estimates = delong.estimate_aucs([truth], [truth.astype(float)], np.arange(40))
    estimate = MeanAUCEstimate(estimates, (0,), (15.0, 25.0))
    assert estimate.tail_bounds(0.025) == pytest.approx(delong.mean_auc_interval(estimates, [0], 0.95))
    low, high = estimate.planned_bounds(0.8, 0.025)
    assert low < 0.8 < high


def test_binormal_variance_matches_simulation():
    random, distance = np.random.default_rng(0), np.sqrt(2) * stats.norm.ppf(0.8)
    truth = np.arange(60) < 20
    areas = [roc_auc_score(truth, random.normal(size=60) + distance * truth) for _ in range(3000)]
    assert np.mean(areas) == pytest.approx(0.8, abs=0.005)
    assert np.var(areas) == pytest.approx(binormal_variance(0.8, 20, 40), rel=0.08)


def test_small_shortfall_of_few_patients_is_not_significant():
    """20 of 23 against 72 of 77 in a demo; a bound that is not a number would give the smallest p-value."""
    subgroup, others = ProportionEstimate(20 / 23, 21.2, 11.0), ProportionEstimate(72 / 77, 58.3, 42.0)
    assert shortfall_p_value(subgroup, others, 0.0) == pytest.approx(0.267, abs=0.001)
