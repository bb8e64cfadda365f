"""Numbers against scikit-learn and against slow plain versions; what cannot be judged is None, and never a NaN."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from fadeformer.evaluation import metrics, predictions, summary
from fadeformer.evaluation.predictions import Predictions
from fadeformer.tasks import TASKS

EXCLUSIVE = ("binary-class", "multi-class", "ordinal-regression")


def made(
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


some = st.builds(
    made,
    task=st.sampled_from(["multi-class", "ordinal-regression", "multi-label, binary-class"]),
    classes=st.integers(3, 5), images=st.integers(5, 40), seed=st.integers(0, 10_000), coarse=st.booleans(),
    absent=st.one_of(st.none(), st.just(1)),
)  # fmt: skip


def pairs_auc(truth: np.ndarray, score: np.ndarray) -> float | None:
    """Share of pairs in the right order, ties counted half."""
    pairs = [(p, n) for p in score[truth] for n in score[~truth]]
    return float(np.mean([(p > n) + 0.5 * (p == n) for p, n in pairs])) if pairs else None


@given(some)
def test_auc_is_the_mean_share_of_pairs_in_order(p):
    truth = metrics.one_versus_rest(p.labels, len(p.classes), p.task)
    found = [pairs_auc(truth[:, c], p.scores[:, c]) for c in range(len(p.classes))]
    judged = [value for value in found if value is not None]
    expected = np.mean(judged) if judged else None
    assert metrics.auc(p.labels, p.scores, p.task) == (None if expected is None else pytest.approx(expected))


def test_binary_auc_is_that_of_the_last_class():
    p = made("binary-class", 2, 100, 0)
    expected = sk.roc_auc_score(p.labels[:, 0], p.scores[:, 1])
    assert metrics.auc(p.labels, p.scores, p.task) == pytest.approx(expected)


@pytest.mark.parametrize("task", EXCLUSIVE)
@pytest.mark.parametrize("seed", range(5))
def test_numbers_of_exclusive_classes_are_scikit_learns(task, seed):
    p = made(task, 2 if task == "binary-class" else 4, 60, seed)
    overall = summary.summarize(p)["overall"]
    truth, decided = p.labels[:, 0], p.scores.argmax(axis=1)
    expected = {
        "accuracy": sk.accuracy_score(truth, decided),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, decided),
        "precision": sk.precision_score(truth, decided, average="macro", zero_division=0),
        "recall": sk.recall_score(truth, decided, average="macro", zero_division=0),
        "f1": sk.f1_score(truth, decided, average="macro", zero_division=0),
        "loss": sk.log_loss(truth, p.scores, labels=range(len(p.classes))),
        "kappa": sk.cohen_kappa_score(truth, decided),
    }
    one_hot = np.eye(len(p.classes))[truth]
    if task == "ordinal-regression":
        expected["quadratic_kappa"] = sk.cohen_kappa_score(truth, decided, weights="quadratic")
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
def test_numbers_of_findings_are_scikit_learns(seed):
    p = made("multi-label, binary-class", 4, 80, seed)
    overall = summary.summarize(p)["overall"]
    decided = p.scores > 0.5
    assert overall["accuracy"] == pytest.approx((decided == p.labels).mean())
    for name, function in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
        assert overall[name] == pytest.approx(function(p.labels, decided, average="macro", zero_division=0))
    balanced = [sk.balanced_accuracy_score(p.labels[:, c], decided[:, c]) for c in range(4)]
    assert overall["balanced_accuracy"] == pytest.approx(np.mean(balanced))
    losses = [sk.log_loss(p.labels[:, c], p.scores[:, c], labels=[0, 1]) for c in range(4)]
    assert overall["loss"] == pytest.approx(np.mean(losses))


@given(some)
def test_a_summary_is_json_without_nan_and_names_what_it_cannot_judge(p):
    found = summary.summarize(p)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    truth = metrics.one_versus_rest(p.labels, len(p.classes), p.task)
    lacking = [name for c, name in enumerate(p.classes) if truth[:, c].all() or not truth[:, c].any()]
    assert found["not_evaluated"] == lacking
    assert all(found["per_class"][name]["auc"] is None for name in lacking)


@given(some, st.integers(0, 100))
def test_the_order_of_the_images_does_not_matter(p, seed):
    order = np.random.default_rng(seed).permutation(len(p.frame))
    shuffled = Predictions(p.frame.iloc[order].reset_index(drop=True), p.task, p.classes)
    one, other = summary.summarize(p)["overall"], summary.summarize(shuffled)["overall"]
    assert {k: v for k, v in one.items() if v is not None} == pytest.approx(
        {k: v for k, v in other.items() if v is not None}
    )
    assert p.identity() == shuffled.fingerprint()


def test_a_certain_mistake_costs_much_but_not_infinity():
    task = TASKS["multi-class"]
    loss = metrics.log_loss(np.array([[0]]), np.array([[0.0, 1.0, 0.0]]), task)
    assert math.isfinite(loss)
    assert loss > 100


@given(some)
def test_curves_end_in_the_corners_and_have_the_area(p):
    points = metrics.roc_curve_points(p)
    found = summary.summarize(p)["per_class"]
    assert set(points["class"]) == {name for name, values in found.items() if values["auc"] is not None}
    for name, curve in points.groupby("class"):
        assert (curve.iloc[0][["fpr", "tpr"]] == 0).all()
        assert (curve.iloc[-1][["fpr", "tpr"]] == 1).all()
        assert sk.auc(curve["fpr"], curve["tpr"]) == pytest.approx(found[name]["auc"])


def test_published_results_have_the_published_keys():
    history = pd.DataFrame(
        {"epoch": [1], "train_loss": [1.0], "val_loss": [2.0], "train_accuracy": [0.5], "val_accuracy": [0.25]}
    )
    results = summary.published_results(summary.summarize(made("multi-class", 3, 30, 0)), history, {"seed": 42})
    assert list(results) == [
        "test_loss", "test_accuracy", "test_precision", "test_recall", "test_f1", "test_auc",
        "train_losses", "val_losses", "train_accuracies", "val_accuracies", "config",
    ]  # fmt: skip
    assert results["train_losses"] == [1.0]


@pytest.mark.parametrize("task", [*EXCLUSIVE, "multi-label, binary-class"])
def test_predictions_come_back_as_they_were_written(task, tmp_path):
    p = made(task, 2, 10, 0)
    predictions.write(p, tmp_path / "p.parquet")
    back = predictions.read(tmp_path / "p.parquet")
    pd.testing.assert_frame_equal(back.frame, p.frame)
    assert (back.task, back.classes) == (p.task, p.classes)
    assert back.fingerprint() == p.fingerprint()
