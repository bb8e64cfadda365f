"""Metrics against scikit-learn and naive implementations; undefined metrics are None, never NaN."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from fadeformer.evaluation import error_gallery, metrics, predictions, summary
from fadeformer.evaluation.predictions import Predictions
from fadeformer.reporting.plots import base
from fadeformer.tasks import TASKS

EXCLUSIVE = ("binary-class", "multi-class", "ordinal-regression")


def random_predictions(
    task: str, classes: int, images: int, seed: int, *, coarse: bool = False, absent: int | None = None
) -> Predictions:
    """Random predictions; coarse scores have ties, an absent class has no image."""
    random = np.random.default_rng(seed)
    kind = TASKS[task]
    if kind.multi_label:
        labels = (random.random((images, classes)) < 0.3).astype(np.int64)
        if absent is not None:
            labels[:, absent] = 0
        logits = random.normal(size=(images, classes)) + labels
    else:
        labels = random.choice([c for c in range(classes) if c != absent], size=(images, 1))
        logits = random.normal(size=(images, classes)) + 1.5 * (labels == np.arange(classes))
    scores = kind.probabilities(np.round(logits) if coarse else logits)
    index = pd.DataFrame({"split": "test", "id": [f"test/{i}" for i in range(images)], "group": None})
    return predictions.build_predictions(index, labels, scores, kind, tuple(f"class {c}" for c in range(classes)))


prediction_strategy = st.builds(
    random_predictions,
    task=st.sampled_from(["multi-class", "ordinal-regression", "multi-label, binary-class"]),
    classes=st.integers(3, 5), images=st.integers(5, 40), seed=st.integers(0, 10_000), coarse=st.booleans(),
    absent=st.one_of(st.none(), st.just(1)),
)  # fmt: skip


def pairs_auc(truth: np.ndarray, score: np.ndarray) -> float | None:
    """Fraction of correctly ordered pairs; ties count half."""
    pairs = [(p, n) for p in score[truth] for n in score[~truth]]
    return float(np.mean([(p > n) + 0.5 * (p == n) for p, n in pairs])) if pairs else None


@given(prediction_strategy)
def test_auc_equals_fraction_of_ordered_pairs(p):
    truth = metrics.one_versus_rest(p.labels, len(p.classes), p.task)
    aucs = [pairs_auc(column, score) for column, score in zip(truth.T, p.scores.T, strict=True)]
    averaged = [min(column.sum(), (~column).sum()) > 1 for column in truth.T]
    defined = [value for value, is_averaged in zip(aucs, averaged, strict=True) if is_averaged]
    expected = np.mean(defined) if defined else None
    assert metrics.auc(p.labels, p.scores, p.task) == (None if expected is None else pytest.approx(expected))


def test_binary_auc_is_of_last_class():
    p = random_predictions("binary-class", 2, 100, 0)
    expected = sk.roc_auc_score(p.labels[:, 0], p.scores[:, 1])
    assert metrics.auc(p.labels, p.scores, p.task) == pytest.approx(expected)


@pytest.mark.parametrize("task", EXCLUSIVE)
@pytest.mark.parametrize("seed", range(5))
def test_exclusive_metrics_match_sklearn(task, seed):
    p = random_predictions(task, 2 if task == "binary-class" else 4, 60, seed)
    overall = summary.summarize(p)["overall"]
    truth, predicted = p.labels[:, 0], p.scores.argmax(axis=1)
    expected = {
        "accuracy": sk.accuracy_score(truth, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, predicted),
        "precision": sk.precision_score(truth, predicted, average="macro", zero_division=0),
        "recall": sk.recall_score(truth, predicted, average="macro", zero_division=0),
        "f1": sk.f1_score(truth, predicted, average="macro", zero_division=0),
        "loss": sk.log_loss(truth, p.scores, labels=range(len(p.classes))),
        "kappa": sk.cohen_kappa_score(truth, predicted),
    }
    one_hot = np.eye(len(p.classes))[truth]
    if task == "ordinal-regression":
        expected["quadratic_kappa"] = sk.cohen_kappa_score(truth, predicted, weights="quadratic")
    if task == "binary-class":
        expected["brier"] = sk.brier_score_loss(truth, p.scores[:, 1])
    else:
        expected["brier"] = ((p.scores - one_hot) ** 2).sum(axis=1).mean()
        expected["auc_micro"] = sk.roc_auc_score(one_hot.ravel(), p.scores.ravel())
        expected["average_precision_micro"] = sk.average_precision_score(one_hot, p.scores, average="micro")
        expected["average_precision"] = sk.average_precision_score(one_hot, p.scores, average="macro")
    assert ("quadratic_kappa" in overall) == (task == "ordinal-regression")
    assert {key: overall[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_multi_label_metrics_match_sklearn(seed):
    p = random_predictions("multi-label, binary-class", 4, 80, seed)
    overall = summary.summarize(p)["overall"]
    predicted = p.scores > 0.5
    assert overall["accuracy"] == pytest.approx((predicted == p.labels).mean())
    for name, function in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
        assert overall[name] == pytest.approx(function(p.labels, predicted, average="macro", zero_division=0))
    balanced = [sk.balanced_accuracy_score(p.labels[:, c], predicted[:, c]) for c in range(4)]
    assert overall["balanced_accuracy"] == pytest.approx(np.mean(balanced))
    losses = [sk.log_loss(p.labels[:, c], p.scores[:, c], labels=[0, 1]) for c in range(4)]
    assert overall["loss"] == pytest.approx(np.mean(losses))


@given(prediction_strategy)
def test_summary_is_json_and_lists_unevaluated_classes(p):
    result = summary.summarize(p)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    truth = metrics.one_versus_rest(p.labels, len(p.classes), p.task)
    counts = dict(zip(p.classes, np.minimum(truth.sum(axis=0), (~truth).sum(axis=0)), strict=True))
    assert result["not_evaluated"] == [name for name, count in counts.items() if count < 2]
    assert all((result["per_class"][name]["auc"] is None) == (count == 0) for name, count in counts.items())


@given(prediction_strategy, st.integers(0, 100))
def test_metrics_ignore_image_order(p, seed):
    order = np.random.default_rng(seed).permutation(len(p.frame))
    shuffled = Predictions(p.frame.iloc[order].reset_index(drop=True), p.task, p.classes)
    original, reordered = summary.summarize(p)["overall"], summary.summarize(shuffled)["overall"]
    assert {k: v for k, v in original.items() if v is not None} == pytest.approx(
        {k: v for k, v in reordered.items() if v is not None}
    )
    assert p.fingerprint() == shuffled.fingerprint()


def test_confident_error_has_finite_loss():
    task = TASKS["multi-class"]
    loss = metrics.log_loss(np.array([[0]]), np.array([[0.0, 1.0, 0.0]]), task)
    assert math.isfinite(loss)
    assert loss > 100


@given(prediction_strategy)
def test_curves_reach_corners_and_match_auc(p):
    points = metrics.roc_curve_points(p)
    per_class = summary.summarize(p)["per_class"]
    assert set(points["class"]) == {name for name, values in per_class.items() if values["auc"] is not None}
    for name, curve in points.groupby("class"):
        assert (curve.iloc[0][["fpr", "tpr"]] == 0).all()
        assert (curve.iloc[-1][["fpr", "tpr"]] == 1).all()
        assert sk.auc(curve["fpr"], curve["tpr"]) == pytest.approx(per_class[name]["auc"])


def test_results_json_has_published_keys():
    history = pd.DataFrame(
        {"epoch": [1], "train_loss": [1.0], "val_loss": [2.0], "train_accuracy": [0.5], "val_accuracy": [0.25]}
    )
    results = summary.published_results(
        summary.summarize(random_predictions("multi-class", 3, 30, 0)), history, {"seed": 42}
    )
    assert list(results) == [
        "test_loss", "test_accuracy", "test_precision", "test_recall", "test_f1", "test_auc",
        "train_losses", "val_losses", "train_accuracies", "val_accuracies", "config",
    ]  # fmt: skip
    assert results["train_losses"] == [1.0]


@pytest.mark.parametrize("task", [*EXCLUSIVE, "multi-label, binary-class"])
def test_predictions_round_trip(task, tmp_path):
    p = random_predictions(task, 2, 10, 0)
    predictions.write(p, tmp_path / "p.parquet")
    restored = predictions.read(tmp_path / "p.parquet")
    pd.testing.assert_frame_equal(restored.frame, p.frame)
    assert (restored.task, restored.classes) == (p.task, p.classes)
    assert restored.fingerprint() == p.fingerprint()


def test_predictions_keep_decision_weights(tmp_path):
    p = random_predictions("multi-class", 3, 50, 0)
    weighted = Predictions(p.frame, p.task.with_decision_weights((0.1, 0.3, 0.6)), p.classes)
    predictions.write(weighted, tmp_path / "p.parquet")
    restored = predictions.read(tmp_path / "p.parquet").select_rows(np.arange(50) < 40)
    assert restored.task == weighted.task
    assert restored.before_calibration().task.decision_weights == ()
    frame = pd.read_parquet(tmp_path / "p.parquet")
    del frame.attrs["decision_weights"]  # a table of an earlier version
    frame.to_parquet(tmp_path / "earlier.parquet")
    assert predictions.read(tmp_path / "earlier.parquet").task == TASKS["multi-class"]


def test_gallery_and_confusion_matrix_use_decision_weights():
    p = random_predictions("multi-class", 3, 200, 0)
    task = p.task.with_decision_weights((0.1, 0.3, 0.6))
    weighted = Predictions(p.frame, task, p.classes)
    wrong = task.decide(p.scores)[:, 0] != p.labels[:, 0]
    errors = error_gallery.most_confident_errors(weighted, 200)
    assert sorted(errors["row"]) == np.flatnonzero(wrong).tolist()
    assert (errors["class"].to_numpy() == task.decide(p.scores)[errors["row"], 0]).all()
    counts = sk.confusion_matrix(p.labels[:, 0], task.decide(p.scores)[:, 0])
    texts = [text.get_text().split("\n")[0] for text in base.confusion_matrix(weighted).axes[0].texts]
    assert texts == [str(count) for count in counts.ravel()]


@pytest.mark.parametrize(
    ("positives", "expected"),
    [([10, 4, 26, 5], [True, False, False, True]), ([2, 1, 30, 0], [True] * 4)],
)
def test_rare_findings_do_not_count_in_selection(positives, expected):
    labels = (np.arange(30)[:, None] < positives).astype(np.int64)
    task = TASKS["multi-label, binary-class"]
    assert metrics.selecting_classes(labels, 4, task).tolist() == expected


def test_gallery_without_errors_has_integer_rows():
    p = random_predictions("multi-class", 3, 20, 0)
    right = p.frame.assign(**{f"score_{c}": (p.labels[:, 0] == c).astype(float) for c in range(3)})
    errors = error_gallery.most_confident_errors(Predictions(right, p.task, p.classes), 20)
    assert np.arange(5)[errors["row"].to_numpy()].size == 0
