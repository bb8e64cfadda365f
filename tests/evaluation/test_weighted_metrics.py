"""Metrics of weighted images equal those of repeated images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from fadeformer.evaluation import metrics, summary
from fadeformer.evaluation.predictions import Predictions
from fadeformer.evaluation.weighted_metrics import WeightedMetrics
from tests.evaluation.test_metrics import prediction_strategy, random_predictions


@given(prediction_strategy, st.integers(0, 1000))
def test_weight_equals_repeating_image(p, seed):
    weights = np.random.default_rng(seed).integers(0, 4, (3, len(p.frame))).astype(float)
    weights[:, 0] += 1
    result = WeightedMetrics(p).compute(weights)
    for sample, counts in enumerate(weights.astype(int)):
        repeated = Predictions(p.frame.loc[p.frame.index.repeat(counts)].reset_index(drop=True), p.task, p.classes)
        truth = metrics.one_versus_rest(repeated.labels, len(p.classes), p.task)
        for c in range(len(p.classes)):
            if truth[:, c].all() or not truth[:, c].any():
                assert not np.isfinite(result.per_class["auc"][sample, c])
                continue
            score = repeated.scores[:, c]
            assert result.per_class["auc"][sample, c] == pytest.approx(sk.roc_auc_score(truth[:, c], score))
            area = sk.average_precision_score(truth[:, c], score)
            assert result.per_class["average_precision"][sample, c] == pytest.approx(area)
        for name in ("accuracy", "loss", "brier"):
            expected = summary.summarize(repeated)["overall"][name]
            assert result.overall[name][sample] == pytest.approx(expected)


@given(prediction_strategy)
def test_training_auc_equals_evaluation_auc_exactly(p):
    assert metrics.auc(p.labels, p.scores, p.task) == summary.summarize(p)["overall"]["auc"]


def test_calibration_error_matches_manual_binning():
    """15 bins at the quantiles 1/15, 2/15, ... hold two of 30 scores each, so another number of bins would differ."""
    p = random_predictions("binary-class", 2, 30, 3)
    order = np.argsort(p.scores[:, 1])
    score, outcome = p.scores[order, 1], p.labels[order, 0]
    bins = np.searchsorted(np.quantile(score, np.arange(1, 15) / 15), score, side="right")
    gaps = [abs((score - outcome)[bins == b].sum()) for b in range(15)]
    assert len(np.unique(bins)) == 15
    assert summary.summarize(p)["overall"]["calibration_error"] == pytest.approx(sum(gaps) / 30)
