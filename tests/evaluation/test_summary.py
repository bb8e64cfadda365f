"""Confidence intervals of all metrics: bias, stability, and missing intervals."""

import numpy as np
import pandas as pd
import pytest
from scipy import special
from sklearn.metrics import f1_score, precision_score, recall_score

from fadeformer.evaluation import predictions, summary
from fadeformer.evaluation.intervals.proportions import wilson_interval
from fadeformer.tasks import TASKS
from tests.evaluation.test_metrics import random_predictions

MULTI_LABEL = "multi-label, binary-class"


def test_average_precision_interval_is_bias_corrected():
    def log_odds(images: int, seed: int) -> tuple[float, float]:
        """Log odds of the average precision of a rare class and of the center of its interval."""
        random, labels = np.random.default_rng(seed), (np.arange(images) % 10 == 0).astype(np.int64)[:, None]
        score = special.expit(random.normal(size=images) + 1.5 * labels[:, 0])
        index = pd.DataFrame({"split": "test", "id": [str(i) for i in range(images)], "group": None})
        scores = np.stack([1 - score, score], axis=1)
        p = predictions.build_predictions(index, labels, scores, TASKS["binary-class"], ("a", "b"))
        value = summary.summarize(p)["per_class"]["b"]["average_precision"]
        if images > 1000:
            return float(special.logit(value)), np.nan
        bounds = summary.confidence_intervals(p, n_resamples=50, seed=0, confidence=0.95)["per_class"]["b"][
            "average_precision"
        ]
        return float(special.logit(value)), float(special.logit(bounds).mean())

    truth, _ = log_odds(100_000, 0)
    values, centers = np.array([log_odds(200, seed) for seed in range(1, 201)]).T
    bias = values.mean() - truth
    assert bias > 2 * values.std() / np.sqrt(len(values))
    assert abs(centers.mean() - truth) < bias / 2


@pytest.mark.parametrize(("task", "classes"), [("binary-class", 2), ("ordinal-regression", 5), (MULTI_LABEL, 4)])
def test_intervals_contain_values_and_are_stable(task, classes):
    p = random_predictions(task, classes, 300, 1)
    p.frame["group"] = [f"patient {i // 2}" if i < 40 else None for i in range(300)]
    result = summary.summarize(p)
    first, second = (summary.confidence_intervals(p, n_resamples=2000, seed=seed, confidence=0.95) for seed in (0, 1))
    again = summary.confidence_intervals(p, n_resamples=2000, seed=0, confidence=0.95)
    assert first == again
    pairs = [(result["overall"][name], first["overall"][name], second["overall"][name]) for name in result["overall"]]
    for name, values in result["per_class"].items():
        pairs += [
            (values[key], first["per_class"][name][key], second["per_class"][name][key])
            for key in first["per_class"][name]
        ]
    assert first["overall"].pop("calibration_error") is None
    assert first["overall"].pop("class_calibration_error") is None
    assert {"calibration_slope", "calibration_intercept"} <= first["per_class"]["class 0"].keys()
    defined = [pair for pair in pairs if pair[1] is not None]
    assert len(defined) > 8
    for value, (low, high), other_bounds in defined:
        assert low <= value <= high
        assert np.abs(np.subtract((low, high), other_bounds)).max() < 0.08 * (high - low)


def test_perfect_metrics_have_no_degenerate_interval():
    p = random_predictions("multi-class", 3, 60, 0)
    p.frame[[f"score_{c}" for c in range(3)]] = np.eye(3)[p.labels[:, 0]]
    result = summary.summarize(p)["overall"]
    bounds = summary.confidence_intervals(p, n_resamples=100, seed=0, confidence=0.95)
    for name in ("auc", "accuracy", "balanced_accuracy", "recall", "specificity"):
        assert result[name] == 1
        assert bounds["overall"][name][0] < 0.99
    for name in ("average_precision", "f1"):
        assert result[name] == 1
        assert bounds["overall"][name] is None
    assert bounds["per_class"]["class 0"]["recall"][0] < 0.95


def test_absent_class_has_no_interval():
    p = random_predictions("multi-class", 4, 60, 0, absent=1)
    result = summary.confidence_intervals(p, n_resamples=200, seed=0, confidence=0.95)
    assert result["per_class"]["class 1"]["auc"] is None
    assert result["per_class"]["class 1"]["recall"] is None
    assert result["overall"]["auc"] is not None


def test_absent_predicted_class_counts_as_zero_sensitivity():
    p = random_predictions("multi-class", 4, 60, 0, absent=1)
    values = summary.summarize(p)["overall"]
    bounds = summary.confidence_intervals(p, n_resamples=100, seed=0, confidence=0.95)["overall"]
    assert values["recall"] == pytest.approx(0.75 * values["balanced_accuracy"])
    assert bounds["recall"] == pytest.approx(tuple(0.75 * bound for bound in bounds["balanced_accuracy"]))


def test_precision_interval_is_that_of_random_sampling():
    p = random_predictions("binary-class", 2, 150, 0)
    bounds = summary.confidence_intervals(p, n_resamples=100, seed=0, confidence=0.95)["per_class"]["class 1"]
    predicted, truth = p.scores[:, 1] > 0.5, p.labels[:, 0] == 1
    assert bounds["precision"] == wilson_interval(int((predicted & truth).sum()), int(predicted.sum()))


def test_macro_means_of_findings_leave_out_unused_ones():
    """scikit-learn counts a finding that no image has and none is predicted to have as 0."""
    p = random_predictions(MULTI_LABEL, 4, 60, 0, absent=1)
    p.frame["score_1"] = 0.1
    values, decisions = summary.summarize(p)["overall"], (p.scores > 0.5).astype(int)
    for name, score in {"precision": precision_score, "recall": recall_score, "f1": f1_score}.items():
        expected = score(p.labels, decisions, average="macro", zero_division=0)
        assert values[name] == pytest.approx(expected * 4 / 3)
