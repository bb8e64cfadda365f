"""DeLong covariance and intervals against the formulas of the paper and a bootstrap."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fadeformer.evaluation.intervals import bootstrap, delong
from fadeformer.evaluation.intervals.proportions import wilson_interval
from fadeformer.evaluation.weighted_metrics import WeightedMetrics
from tests.evaluation.test_metrics import random_predictions


def naive_delong(truth, scores):
    """Formulas of the paper, evaluated pair by pair."""
    kernel = [np.array([[(p > n) + 0.5 * (p == n) for n in s[~truth]] for p in s[truth]], dtype=float) for s in scores]
    over_negatives, over_positives = ([k.mean(axis=axis) for k in kernel] for axis in (1, 0))
    spread = np.cov(over_negatives) / truth.sum() + np.cov(over_positives) / (~truth).sum()
    return np.array([k.mean() for k in kernel]), spread


@given(st.integers(0, 10_000), st.integers(6, 40), st.booleans())
def test_delong_matches_paper_formula(seed, images, coarse):
    random = np.random.default_rng(seed)
    truth = np.arange(images) % 3 == 0
    scores = [random.normal(size=images) + truth for _ in range(2)]
    scores = [np.round(s) for s in scores] if coarse else scores
    result = delong.estimate_aucs([truth, truth], scores)
    values, covariance = naive_delong(truth, scores)
    np.testing.assert_allclose(result.areas, values, rtol=0, atol=1e-10)
    np.testing.assert_allclose(result.covariance, covariance, rtol=0, atol=1e-10)


@pytest.mark.parametrize("images_per_group", [1, 3])
def test_delong_matches_group_bootstrap(images_per_group):
    """With 20,000 resamples the relative standard error of a standard deviation is 0.5 %."""
    random = np.random.default_rng(5)
    groups = np.repeat(np.arange(150), images_per_group)
    shared = random.normal(size=150)[groups]
    truth = (np.arange(150) % 2 == 0)[groups] if images_per_group > 1 else np.arange(150) % 2 == 0
    score = truth + shared + 0.5 * random.normal(size=len(groups))
    result = delong.estimate_aucs([truth], [score], groups)
    p = random_predictions("binary-class", 2, len(groups), 0)
    p.frame["label"], p.frame["score_1"] = truth.astype(int), score
    weighted = WeightedMetrics(p)
    strata = bootstrap.assign_strata(weighted.truth, groups)
    parts = bootstrap.map_resamples(lambda w: weighted.compute(w).per_class["auc"][:, 1], groups, strata, 20_000, 0)
    # the bootstrap variance lacks the factor n / (n - 1), here with 75 groups per class
    spread = np.concatenate(parts).std() * np.sqrt(75 / 74)
    assert np.sqrt(result.covariance[0, 0]) == pytest.approx(spread, rel=0.03)
    if images_per_group > 1:
        assert np.sqrt(delong.estimate_aucs([truth], [score]).covariance[0, 0]) < 0.8 * spread


def test_degrees_of_freedom_match_brunner_munzel():
    """The Brunner-Munzel test of SciPy, whose relative effect is the AUC, gives the same p-value."""
    random = np.random.default_rng(0)
    truth = np.arange(40) < 9
    score = random.normal(size=40) + truth
    result = delong.estimate_aucs([truth], [score])
    p = stats.brunnermunzel(score[~truth], score[truth]).pvalue
    error = np.sqrt(result.covariance[0, 0])
    assert 2 * stats.t.sf(abs(result.areas[0] - 0.5) / error, result.degrees_of_freedom[0]) == pytest.approx(p)


def test_identical_rankings_have_zero_difference():
    truth, score = np.array([True, False, True, False]), np.array([0.9, 0.4, 0.3, 0.1])
    same = delong.auc_difference([truth], [score], [2 * score])
    assert (same.value, same.low, same.high) == (0, 0, 0)
    better = delong.auc_difference([truth], [np.array([0.9, 0.4, 0.6, 0.1])], [score])
    assert better.value == 0.25
    assert better.low < 0.25 < better.high


def test_delong_needs_two_groups_per_class():
    truth, score = np.array([True, False, False]), np.array([0.9, 0.5, 0.1])
    result = delong.estimate_aucs([truth], [score])
    assert result.areas == [1.0]
    assert delong.mean_auc_interval(result, [0], 0.95) is None
    with pytest.raises(ValueError, match="positives and negatives"):
        delong.estimate_aucs([np.array([True, True])], [np.array([0.1, 0.2])])
    with pytest.raises(ValueError, match="two groups"):
        delong.auc_difference([truth], [score], [score])


def test_perfect_auc_has_wilson_interval():
    truth = np.arange(40) % 2 == 0
    result = delong.estimate_aucs([truth], [truth.astype(float)])
    low, high = delong.mean_auc_interval(result, [0], 0.95)
    assert (low, high) == wilson_interval(20, 20)
    assert 0.8 < low < 0.9
