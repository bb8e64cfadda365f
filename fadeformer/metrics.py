"""Predictions to numbers. A class or finding without positives or without negatives is left out of means, and named.

`auc` and `accuracy` are MedMNIST's official two (`medmnist/evaluator.py`); macro precision, recall and F1 are those of
scikit-learn with what is undefined counted as 0, as the published results have them. No number is ever a NaN: what is
undefined is None.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from fadeformer.predictions import Predictions
from fadeformer.tasks import Task

Labels = NDArray[np.int64]
Scores = NDArray[np.float64]
TINY = np.finfo(np.float64).tiny  # a score of 0 for what is true costs 708 nats, not infinity
CURVE_POINTS = 400  # of one curve, so that a table of curves stays small


def one_versus_rest(labels: Labels, classes: int, task: Task) -> NDArray[np.bool_]:
    """Which classes or findings each image has: labels (images, labels) to (images, classes)."""
    return labels.astype(bool) if task.multi_label else labels == np.arange(classes)


def auc(labels: Labels, scores: Scores, task: Task) -> float | None:
    """Area under the ROC curve: the mean over classes, one against the rest, or over findings; in [0, 1].

    Of two exclusive classes it is the last one's, whose score decides. None where no class can be judged.
    """
    found = [value for value in _aucs(labels, scores, task) if value is not None]
    if task.multi_label or scores.shape[1] > 2:
        return float(np.mean(found)) if found else None
    return _aucs(labels, scores, task)[-1]


def accuracy(labels: Labels, scores: Scores, task: Task) -> float:
    """Share of right decisions, over images, or over all findings of all images; in [0, 1]."""
    return float((task.decide(scores) == labels).mean())


def log_loss(labels: Labels, scores: Scores, task: Task) -> float:
    """Mean cross-entropy, over images, or over all findings of all images; nats."""
    if task.multi_label:
        likelihood = np.where(labels.astype(bool), scores, 1 - scores)
    else:
        likelihood = np.take_along_axis(scores, labels, axis=1)
    return float(-np.log(np.maximum(likelihood, TINY)).mean())


def summarise(predictions: Predictions) -> dict[str, Any]:
    """Every number of some predictions, as nested plain values.

    Returns:
        `images`, `overall`, `per_class` by class name, and `not_judged`: the classes that lack positives or negatives.
    """
    labels, scores, task = predictions.labels, predictions.scores, predictions.task
    truth = one_versus_rest(labels, len(predictions.classes), task)
    decided = one_versus_rest(task.decide(scores), len(predictions.classes), task)
    per_class = {
        name: _class_summary(truth[:, c], decided[:, c], scores[:, c]) for c, name in enumerate(predictions.classes)
    }
    seen = [values for values in per_class.values() if values["support"] or values["precision"] is not None]
    judged = [values for values in per_class.values() if values["auc"] is not None]
    overall = {
        "loss": log_loss(labels, scores, task),
        "accuracy": accuracy(labels, scores, task),
        "balanced_accuracy": _balanced_accuracy(list(per_class.values()), task),
        **{name: _mean([v[name] or 0.0 for v in seen]) for name in ("precision", "recall", "f1")},
        "auc": auc(labels, scores, task),
        "average_precision": _mean([values["average_precision"] for values in judged]),
    }
    absent = [name for name, values in per_class.items() if values["auc"] is None]
    return {"images": len(labels), "overall": overall, "per_class": per_class, "not_judged": absent}


def published_results(test: dict[str, Any], history: pd.DataFrame, config: dict[str, Any]) -> dict[str, Any]:
    """The published `results.json`, by its keys.

    Args:
        test: of `summarise`.
        history: one row per epoch.
        config: what the run was made with.
    """
    names = ("loss", "accuracy", "precision", "recall", "f1", "auc")
    columns = {
        "train_losses": "train_loss", "val_losses": "val_loss",
        "train_accuracies": "train_accuracy", "val_accuracies": "val_accuracy",
    }  # fmt: skip
    return {
        **{f"test_{name}": test["overall"][name] for name in names},
        **{key: history[column].tolist() for key, column in columns.items()},
        "config": config,
    }


def roc_points(predictions: Predictions) -> pd.DataFrame:
    """ROC curves of the classes that can be judged: class, fpr, tpr."""
    return _curves(predictions, "fpr", "tpr", lambda truth, score: roc_curve(truth, score)[:2])


def pr_points(predictions: Predictions) -> pd.DataFrame:
    """Precision-recall curves of the classes that can be judged: class, recall, precision."""
    return _curves(predictions, "recall", "precision", _pr_curve)


def _pr_curve(truth: NDArray[np.bool_], score: Scores) -> tuple[Scores, Scores]:
    precision, recall, _ = precision_recall_curve(truth, score, drop_intermediate=True)
    return recall, precision


def _curves(predictions: Predictions, x: str, y: str, curve: Any) -> pd.DataFrame:
    truth = one_versus_rest(predictions.labels, len(predictions.classes), predictions.task)
    parts = [pd.DataFrame({"class": pd.Series(dtype="str"), x: pd.Series(dtype=float), y: pd.Series(dtype=float)})]
    for c in shown_classes(predictions):
        if truth[:, c].all() or not truth[:, c].any():
            continue
        points = pd.DataFrame(dict(zip((x, y), curve(truth[:, c], predictions.scores[:, c]), strict=True)))
        kept = np.unique(np.linspace(0, len(points) - 1, CURVE_POINTS).round().astype(int))
        parts.append(points.iloc[kept].assign(**{"class": predictions.classes[c]})[["class", x, y]])
    return pd.concat(parts[1:] or parts, ignore_index=True)


def shown_classes(predictions: Predictions) -> range:
    """The classes that have a curve of their own: all, but of two exclusive ones only the last, its mirror image."""
    count = len(predictions.classes)
    return range(count - 1, count) if count == 2 and not predictions.task.multi_label else range(count)


def _class_summary(truth: NDArray[np.bool_], decided: NDArray[np.bool_], score: Scores) -> dict[str, Any]:
    positives, negatives = int(truth.sum()), int((~truth).sum())
    hits, alarms = int((truth & decided).sum()), int((~truth & decided).sum())
    judged = positives > 0 and negatives > 0
    return {
        "support": positives,
        "prevalence": _share(positives, positives + negatives),
        "precision": _share(hits, hits + alarms),
        "recall": _share(hits, positives),
        "specificity": _share(negatives - alarms, negatives),
        "f1": _share(2 * hits, positives + hits + alarms),
        "auc": float(roc_auc_score(truth, score)) if judged else None,
        "average_precision": float(average_precision_score(truth, score)) if judged else None,
    }


def _aucs(labels: Labels, scores: Scores, task: Task) -> list[float | None]:
    truth = one_versus_rest(labels, scores.shape[1], task)
    return [
        float(roc_auc_score(truth[:, c], scores[:, c])) if truth[:, c].any() and not truth[:, c].all() else None
        for c in range(scores.shape[1])
    ]


def _balanced_accuracy(per_class: list[dict[str, Any]], task: Task) -> float | None:
    """Mean recall of the classes, or mean over the findings of (sensitivity + specificity) / 2."""
    if not task.multi_label:
        return _mean([v["recall"] for v in per_class if v["recall"] is not None])
    return _mean([(v["recall"] + v["specificity"]) / 2 for v in per_class if v["auc"] is not None])


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
