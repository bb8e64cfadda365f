"""The few measures that training looks at, MedMNIST's own, and curves; all others are those of `fadeformer.evaluation.weighted_metrics`.

A class or finding without positives or without negatives is left out of means. No number is ever a NaN: what is
undefined is None.
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
MAX_CURVE_POINTS = 400  # of one curve, so that a table of curves stays small


def auc(labels: Labels, scores: Scores, task: Task) -> float | None:
    """Area under the ROC curve: the mean over classes, one against the rest, or over findings; in [0, 1].

    Of two exclusive classes it is the last one's, whose score decides. None where no class can be judged.
    """
    truth, everyone = one_versus_rest(labels, scores.shape[1], task), np.arange(len(scores))
    each_once = np.ones((1, len(scores)))
    shown = range(scores.shape[1]) if task.multi_label or scores.shape[1] > 2 else [1]
    found = [
        RankedScores(truth[:, c], scores[:, c], everyone).auc_and_ap(each_once)[0]
        for c in shown
        if truth[:, c].any() and not truth[:, c].all()
    ]
    return float(np.mean(found)) if found else None


def accuracy(labels: Labels, scores: Scores, task: Task) -> float:
    """Share of right decisions, over images, or over all findings of all images; in [0, 1]."""
    return float((task.decide(scores) == labels).mean())


def log_loss(labels: Labels, scores: Scores, task: Task) -> float:
    """Mean cross-entropy, over images, or over all findings of all images; nats."""
    if task.multi_label:
        likelihood = np.where(labels.astype(bool), scores, 1 - scores)
    else:
        likelihood = np.take_along_axis(scores, labels, axis=1)
    return float(-np.log(np.maximum(likelihood, MIN_SCORE)).mean())


def medmnist_auc(labels: Labels, scores: Scores, task: str) -> float | None:
    """AUC as MedMNIST's evaluator computes it (`medmnist/evaluator.py` 3.0.2).

    Args:
        labels: (images, labels), or (images,) where there is one.
        scores: (images, classes), or (images,) of the positive class.
        task: in MedMNIST's own words.

    Returns:
        None where a class or finding lacks positives or negatives: the evaluator gives NaN there.
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
    """Accuracy as MedMNIST's evaluator computes it; arguments are those of `medmnist_auc`."""
    labels, scores = labels.squeeze(), scores.squeeze()
    if task == "binary-class":
        right = labels == ((scores if scores.ndim == 1 else scores[:, -1]) > 0.5)
    elif TASKS[task].multi_label:
        right = labels == (scores > 0.5)
    else:
        right = labels == scores.argmax(axis=-1)
    return float(right.mean())


def roc_curve_points(predictions: Predictions) -> pd.DataFrame:
    """ROC curves of the classes that can be judged: class, fpr, tpr."""
    return _curves(predictions, "fpr", "tpr", lambda truth, score: roc_curve(truth, score)[:2])


def pr_curve_points(predictions: Predictions) -> pd.DataFrame:
    """Precision-recall curves of the classes that can be judged: class, recall, precision."""
    return _curves(predictions, "recall", "precision", _pr_curve)


def _pr_curve(truth: NDArray[np.bool_], score: Scores) -> tuple[Scores, Scores]:
    precision, recall, _ = precision_recall_curve(truth, score, drop_intermediate=True)
    return recall, precision


def _curves(predictions: Predictions, x: str, y: str, curve: Any) -> pd.DataFrame:
    truth = one_versus_rest(predictions.labels, len(predictions.classes), predictions.task)
    parts = [pd.DataFrame({"class": pd.Series(dtype="str"), x: pd.Series(dtype=float), y: pd.Series(dtype=float)})]
    for c in curve_classes(predictions):
        if truth[:, c].all() or not truth[:, c].any():
            continue
        points = pd.DataFrame(dict(zip((x, y), curve(truth[:, c], predictions.scores[:, c]), strict=True)))
        kept = np.unique(np.linspace(0, len(points) - 1, MAX_CURVE_POINTS).round().astype(int))
        parts.append(points.iloc[kept].assign(**{"class": predictions.classes[c]})[["class", x, y]])
    return pd.concat(parts[1:] or parts, ignore_index=True)


def curve_classes(predictions: Predictions) -> range:
    """The classes that have a curve of their own: all, but of two exclusive ones only the last, its mirror image."""
    count = len(predictions.classes)
    return range(count - 1, count) if count == 2 and not predictions.task.multi_label else range(count)
