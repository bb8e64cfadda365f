"""Metrics of weighted images equal those of repeated images."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from fadeformer.evaluation import metrics, predictions, summary
from fadeformer.evaluation.predictions import Predictions
from fadeformer.evaluation.recalibration import recalibrate
from fadeformer.evaluation.weighted_metrics import WeightedMetrics
from fadeformer.tasks import TASKS
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


def test_class_calibration_error_is_one_versus_rest():
    p = random_predictions("multi-class", 3, 90, 3)
    result, expected = summary.summarize(p), []
    for c, name in enumerate(p.classes):
        score, truth = p.scores[:, c], p.labels[:, 0] == c
        bins = np.searchsorted(np.quantile(score, np.arange(1, 15) / 15), score, side="right")
        expected.append(sum(abs((score - truth)[bins == b].sum()) for b in range(15)) / 90)
        values = result["per_class"][name]
        assert values["class_calibration_error"] == pytest.approx(expected[-1])
        assert values["mean_score"] == pytest.approx(score.mean())
        fitted = recalibrate(truth, score)
        assert (values["calibration_slope"], values["calibration_intercept"]) == fitted
    assert result["overall"]["class_calibration_error"] == pytest.approx(np.mean(expected))


@pytest.mark.parametrize(("task", "classes"), [("binary-class", 2), ("multi-label, binary-class", 3)])
def test_class_calibration_error_equals_calibration_error(task, classes):
    """Of two classes and of findings, the calibration error is that of the scores already."""
    overall = summary.summarize(random_predictions(task, classes, 80, 3))["overall"]
    assert overall["class_calibration_error"] == pytest.approx(overall["calibration_error"])


def test_overstated_rare_class_is_visible():
    """Its share of the images is too small for the calibration error of the decisions."""
    random = np.random.default_rng(0)
    labels = random.choice(3, 4000, p=[0.7, 0.285, 0.015])[:, None]
    logits = 2 * random.normal(size=(4000, 3)) + 4 * (labels == np.arange(3)) + np.log([0.7, 0.285, 0.015])
    overstated = TASKS["multi-class"].probabilities(logits + np.log([1, 1, 4]))
    index = pd.DataFrame({"split": "test", "id": np.arange(4000).astype(str), "group": None})
    p = predictions.build_predictions(index, labels, overstated, TASKS["multi-class"], ("a", "b", "rare"))
    rare = summary.summarize(p)["per_class"]["rare"]
    assert rare["mean_score"] > 1.5 * rare["prevalence"]
    assert np.exp(-rare["calibration_intercept"]) == pytest.approx(4, rel=0.3)
    low, high = summary.confidence_intervals(p, n_resamples=100, seed=0, confidence=0.95)["per_class"]["rare"][
        "calibration_intercept"
    ]
    assert low < -np.log(4) < high < 0


def test_calibration_error_is_of_the_decided_class():
    """With decision weights, the score of the decision need not be the largest one."""
    p = random_predictions("multi-class", 3, 200, 3)
    weighted = Predictions(p.frame, p.task.with_decision_weights((0.1, 0.3, 0.6)), p.classes)
    decided = weighted.task.decide(p.scores)
    score, correct = np.take_along_axis(p.scores, decided, axis=1)[:, 0], (decided == p.labels)[:, 0]
    bins = np.searchsorted(np.quantile(score, np.arange(1, 15) / 15), score, side="right")
    expected = sum(abs((score - correct)[bins == b].sum()) for b in range(15)) / 200
    overall = summary.summarize(weighted)["overall"]
    assert overall["calibration_error"] == pytest.approx(expected)
    assert overall["accuracy"] == pytest.approx(correct.mean())
    assert overall["accuracy"] != summary.summarize(p)["overall"]["accuracy"]
