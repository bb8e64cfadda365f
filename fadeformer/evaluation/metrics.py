"""Metrics for validation during training, metrics of the MedMNIST evaluator, and ROC and precision-recall curves.

All other metrics are in `fadeformer.evaluation.weighted_metrics`. Means leave out classes with fewer than two positives
or negatives. Undefined values are None, never NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_auc_score, roc_curve

from fadeformer.evaluation.predictions import Predictions
from fadeformer.evaluation.weighted_auc import RankedScores
from fadeformer.tasks import MIN_SCORE, TASKS, Task, one_versus_rest

Labels = NDArray[np.int64]
Scores = NDArray[np.float64]
MIN_AVERAGED_IMAGES = 2  # with, and without, a class that is in the mean AUC
MIN_SELECTING_IMAGES = 5  # with, and without, a class that counts in the selection of the epoch
MAX_CURVE_POINTS = 400  # per curve; keeps the tables small


def selecting_classes(labels: Labels, classes: int, task: Task) -> NDArray[np.bool_]:
    """Return the classes that count in the selection of the epoch: mask, (classes,).

    The metrics of a finding with one or two positives or negatives jump between epochs. Classes with fewer than
    `MIN_SELECTING_IMAGES` of either are left out, unless all are.

    Args:
        labels: of val, (images, labels).
        classes: number of classes or findings.
        task: classification task.
    """
    positives = one_versus_rest(labels, classes, task).sum(axis=0)
    counts = np.minimum(positives, len(labels) - positives) >= MIN_SELECTING_IMAGES
    return np.asarray(counts | ~counts.any())


def auc(labels: Labels, scores: Scores, task: Task, averaged: NDArray[np.bool_] | None = None) -> float | None:
    """Compute the macro-averaged ROC AUC, one class against the rest or over findings; in [0, 1].

    In binary tasks it is the AUC of the last class. Classes with fewer than two positives or negatives are left out;
    None if there is no other.

    Args:
        labels: (images, labels).
        scores: (images, classes).
        task: classification task.
        averaged: mask of the classes that may be averaged, (classes,); None for all.
    """
    truth, rows = one_versus_rest(labels, scores.shape[1], task), np.arange(len(scores))
    unit_weights = np.ones((1, len(scores)))
    classes = range(scores.shape[1]) if task.multi_label or scores.shape[1] > 2 else [1]
    aucs = [
        RankedScores(truth[:, c], scores[:, c], rows).auc_and_ap(unit_weights)[0]
        for c in classes
        if min(truth[:, c].sum(), (~truth[:, c]).sum()) >= MIN_AVERAGED_IMAGES and (averaged is None or averaged[c])
    ]
    return float(np.mean(aucs)) if aucs else None


def accuracy(labels: Labels, scores: Scores, task: Task) -> float:
    """Compute the accuracy over images, or over all findings of all images; in [0, 1]."""
    return float((task.decide(scores) == labels).mean())


def log_loss(labels: Labels, scores: Scores, task: Task) -> float:
    """Compute the mean cross-entropy over images, or over all findings of all images; in nats."""
    if task.multi_label:
        likelihood = np.where(labels.astype(bool), scores, 1 - scores)
    else:
        likelihood = np.take_along_axis(scores, labels, axis=1)
    return float(-np.log(np.maximum(likelihood, MIN_SCORE)).mean())


def medmnist_auc(labels: Labels, scores: Scores, task: str) -> float | None:
    """Compute AUC as the MedMNIST evaluator does (`medmnist/evaluator.py` 3.0.2).

    Args:
        labels: (images, labels), or (images,) for a single label.
        scores: (images, classes), or (images,) of the positive class.
        task: task name of MedMNIST.

    Returns:
        None if a class or finding lacks positives or negatives, where the evaluator returns NaN.
    """
    labels, scores = labels.squeeze(), scores.squeeze()
    if task == "binary-class":
        curves = [(labels, scores if scores.ndim == 1 else scores[:, -1])]
    elif TASKS[task].multi_label:
        curves = list(zip(labels.T, scores.T, strict=True))
    else:
        curves = [(labels == c, score) for c, score in enumerate(scores.T)]
    if any(len(np.unique(truth)) < 2 for truth, _ in curves):
        return None
    return float(sum(roc_auc_score(truth, score) for truth, score in curves) / len(curves))


def medmnist_accuracy(labels: Labels, scores: Scores, task: str) -> float:
    """Compute accuracy as the MedMNIST evaluator does; arguments as in `medmnist_auc`."""
    labels, scores = labels.squeeze(), scores.squeeze()
    if task == "binary-class":
        correct = labels == ((scores if scores.ndim == 1 else scores[:, -1]) > 0.5)
    elif TASKS[task].multi_label:
        correct = labels == (scores > 0.5)
    else:
        correct = labels == scores.argmax(axis=-1)
    return float(correct.mean())


def roc_curve_points(predictions: Predictions) -> pd.DataFrame:
    """Compute the ROC curves of all evaluable classes; columns class, fpr, tpr."""
    return _curves(predictions, "fpr", "tpr", lambda truth, score: roc_curve(truth, score)[:2])


def pr_curve_points(predictions: Predictions) -> pd.DataFrame:
    """Compute the precision-recall curves of all evaluable classes; columns class, recall, precision."""
    return _curves(predictions, "recall", "precision", _pr_curve)


def _pr_curve(truth: NDArray[np.bool_], score: Scores) -> tuple[Scores, Scores]:
    precision, recall, _ = precision_recall_curve(truth, score, drop_intermediate=True)
    return recall, precision


def _curves(predictions: Predictions, x: str, y: str, curve: Any) -> pd.DataFrame:
    truth = one_versus_rest(predictions.labels, len(predictions.classes), predictions.task)
    tables = [pd.DataFrame({"class": pd.Series(dtype="str"), x: pd.Series(dtype=float), y: pd.Series(dtype=float)})]
    for c in curve_classes(predictions):
        if truth[:, c].all() or not truth[:, c].any():
            continue
        points = pd.DataFrame(dict(zip((x, y), curve(truth[:, c], predictions.scores[:, c]), strict=True)))
        rows = np.unique(np.linspace(0, len(points) - 1, MAX_CURVE_POINTS).round().astype(int))
        tables.append(points.iloc[rows].assign(**{"class": predictions.classes[c]})[["class", x, y]])
    return pd.concat(tables[1:] or tables, ignore_index=True)


def curve_classes(predictions: Predictions) -> range:
    """Return the classes with a curve: all, but only the last in binary tasks, where the other is its mirror image."""
    count = len(predictions.classes)
    return range(count - 1, count) if count == 2 and not predictions.task.multi_label else range(count)
