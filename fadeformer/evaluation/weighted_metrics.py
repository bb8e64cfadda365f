"""Every measure of some predictions as a function of how much each image weighs.

With a weight of 1 each they are the measures of the images themselves; with how often each image was drawn, those of
bootstrap samples, many at a time. What is undefined is NaN here, and becomes None where numbers leave the library.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fadeformer.evaluation.predictions import Predictions
from fadeformer.evaluation.weighted_auc import RankedScores
from fadeformer.tasks import MIN_SCORE, ORDINAL, one_versus_rest

Floats = NDArray[np.float64]
Truth = NDArray[np.bool_]

CALIBRATION_BINS = 15  # of the calibration error


@dataclass(frozen=True)
class MetricSamples:
    """Measures of some samples.

    Attributes:
        overall: (samples,) by name.
        per_class: (samples, classes) by name.
    """

    overall: dict[str, Floats]
    per_class: dict[str, Floats]


class WeightedMetrics:
    """Predictions, sorted and counted once.

    Args:
        predictions: of one split.
    """

    def __init__(self, predictions: Predictions) -> None:
        labels, scores, self.task = predictions.labels, predictions.scores, predictions.task
        classes = scores.shape[1]
        decided = self.task.decide(scores)
        self.is_exclusive = not self.task.multi_label
        self.truth = one_versus_rest(labels, classes, self.task)
        self.predicted = one_versus_rest(decided, classes, self.task)
        self.scores = scores
        self.correct = (decided == labels).mean(axis=1)
        if self.is_exclusive:
            self.losses = -np.log(np.maximum(np.take_along_axis(scores, labels, axis=1)[:, 0], MIN_SCORE))
        else:
            self.losses = -np.log(np.maximum(np.where(self.truth, scores, 1 - scores), MIN_SCORE)).mean(axis=1)
        squares = (scores - self.truth) ** 2
        self.squared_errors = squares
        # of two classes the last one's, of more their sum (Brier 1950), of findings their mean
        if self.is_exclusive:
            self.brier = squares[:, 1] if classes == 2 else squares.sum(axis=1)
        else:
            self.brier = squares.mean(axis=1)
        self.evaluable: Truth = np.asarray(self.truth.any(axis=0) & ~self.truth.all(axis=0))
        self.present: Truth = np.asarray(self.truth.any(axis=0) | self.predicted.any(axis=0))

    @cached_property
    def _class_rankings(self) -> list[RankedScores | None]:
        everyone = np.arange(len(self.scores))
        return [
            RankedScores(self.truth[:, c], self.scores[:, c], everyone) if judged else None
            for c, judged in enumerate(self.evaluable)
        ]

    @cached_property
    def _pooled_ranking(self) -> RankedScores | None:
        judged = self.evaluable
        if not judged.any():
            return None
        rows = np.repeat(np.arange(len(self.scores)), int(judged.sum()))
        return RankedScores(self.truth[:, judged].ravel(), self.scores[:, judged].ravel(), rows)

    @cached_property
    def _summands(self) -> tuple[Floats, list[int]]:
        """What a sum over images is taken of, and how many columns each kind has."""
        gaps = self._calibration_gaps()
        parts = [
            self.truth, self.predicted, self.truth & self.predicted, self.squared_errors,
            np.stack([self.correct, self.losses, self.brier], axis=1), *gaps,
        ]  # fmt: skip
        return np.concatenate(parts, axis=1, dtype=np.float64), [part.shape[1] for part in parts]

    def _calibration_gaps(self) -> list[Floats]:
        """Score less outcome of each image, in the column of its bin: of the decision, or of each judged finding."""
        if not self.is_exclusive:
            return [_bin_gaps(self.scores[:, c], self.truth[:, c]) for c in np.flatnonzero(self.evaluable)]
        if self.scores.shape[1] == 2:
            return [_bin_gaps(self.scores[:, 1], self.truth[:, 1])]
        return [_bin_gaps(self.scores.max(axis=1), self.correct.astype(bool))]

    def compute(self, weights: NDArray[np.floating[Any]]) -> MetricSamples:
        """The measures of samples in which each image has a weight, a whole number, (samples, images)."""
        columns, widths = self._summands
        whole = weights.sum(axis=1, dtype=np.float64)  # samples
        sums = np.split(weights @ columns, np.cumsum(widths)[:-1], axis=1)
        (positives, alarms, hits, squares, scalars), gaps = sums[:5], sums[5:]
        with np.errstate(divide="ignore", invalid="ignore"):
            negatives = whole[:, None] - positives
            per_class = {
                "precision": hits / alarms,
                "recall": hits / positives,
                "specificity": (negatives - alarms + hits) / negatives,
                "f1": 2 * hits / (positives + alarms),
                "brier": squares / whole[:, None],
            }  # fmt: skip
            areas = self.compute_areas(weights)
            per_class |= areas.per_class
            accuracy, loss, brier = (scalars / whole[:, None]).T
            overall = {
                "loss": loss, "accuracy": accuracy, "balanced_accuracy": self._balanced_accuracy(per_class),
                **{name: _row_mean(np.nan_to_num(per_class[name][:, self.present])) for name in ("precision", "recall", "f1")},
                "specificity": _row_mean(per_class["specificity"][:, self.evaluable]),
                **{name: areas.overall[name] for name in ("auc", "average_precision")},
                "brier": brier,
                "calibration_error": _row_mean(np.stack([np.abs(g).sum(axis=1) / whole for g in gaps], axis=1))
                if gaps else np.full(len(whole), np.nan),
            }  # fmt: skip
            overall |= areas.overall
            if self.is_exclusive:
                overall |= self._kappas(weights, positives, alarms, accuracy, whole)
        return MetricSamples(overall, per_class)

    def compute_areas(self, weights: NDArray[np.floating[Any]]) -> MetricSamples:
        """AUCs and average precisions alone, likewise."""
        auc, average_precision = np.full((2, len(weights), len(self.evaluable)), np.nan)
        for c, ranked in enumerate(self._class_rankings):
            if ranked is not None:
                auc[:, c], average_precision[:, c] = ranked.auc_and_ap(weights)
        overall = {"auc": self._mean_auc(auc), "average_precision": _row_mean(average_precision[:, self.evaluable])}
        if self._pooled_ranking is not None and (len(self.evaluable) > 2 or not self.is_exclusive):
            overall["auc_micro"], overall["average_precision_micro"] = self._pooled_ranking.auc_and_ap(weights)
        return MetricSamples(overall, {"auc": auc, "average_precision": average_precision})

    def _mean_auc(self, per_class: Floats) -> Floats:
        if self.is_exclusive and per_class.shape[1] == 2:
            return per_class[:, -1]
        return _row_mean(per_class[:, self.evaluable])

    def _balanced_accuracy(self, per_class: dict[str, Floats]) -> Floats:
        """Mean recall of the classes, or mean over the findings of (sensitivity + specificity) / 2."""
        if self.is_exclusive:
            return _row_mean(per_class["recall"][:, self.truth.any(axis=0)])
        return _row_mean(((per_class["recall"] + per_class["specificity"]) / 2)[:, self.evaluable])

    def _kappas(
        self, weights: NDArray[np.floating[Any]], positives: Floats, alarms: Floats, accuracy: Floats, whole: Floats
    ) -> dict[str, Floats]:
        """Agreement beyond chance (Cohen 1960, doi:10.1177/001316446002000104; 1968 with quadratic weights)."""
        true, said = positives / whole[:, None], alarms / whole[:, None]
        chance = (true * said).sum(axis=1)
        kappas = {"kappa": (accuracy - chance) / (1 - chance)}
        if self.task.name == ORDINAL:
            grades = np.arange(true.shape[1])
            apart = (self.truth.argmax(axis=1) - self.predicted.argmax(axis=1)) ** 2.0
            by_chance = np.einsum("si,ij,sj->s", true, (grades[:, None] - grades) ** 2.0, said)
            kappas["quadratic_kappa"] = 1 - weights @ apart / whole / by_chance
        return kappas


def _bin_gaps(score: Floats, outcome: Truth) -> Floats:
    """Score less outcome, in bins of equal mass; equal scores share a bin. (images, bins)."""
    edges = np.unique(np.quantile(score, np.arange(1, CALIBRATION_BINS) / CALIBRATION_BINS))
    columns = np.zeros((len(score), len(edges) + 1))
    columns[np.arange(len(score)), np.searchsorted(edges, score, side="right")] = score - outcome
    return columns


def _row_mean(values: Floats) -> Floats:
    """Mean over the last axis; NaN of nothing."""
    return values.mean(axis=1) if values.shape[1] else np.full(len(values), np.nan)
