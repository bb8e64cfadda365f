"""All classification metrics as functions of image weights.

With unit weights these are the metrics of the images; with the counts of a bootstrap resample, those of the resample,
many resamples at a time. Undefined values are NaN here and become None in the output of
`fadeformer.evaluation.summary`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fadeformer.evaluation.intervals import bootstrap
from fadeformer.evaluation.predictions import Predictions
from fadeformer.evaluation.weighted_auc import RankedScores
from fadeformer.tasks import MIN_SCORE, ORDINAL, one_versus_rest

Floats = NDArray[np.float64]
Truth = NDArray[np.bool_]

CALIBRATION_BINS = 15  # of the calibration error
MIN_AVERAGED_GROUPS = 2  # patients, lesions or single images with, and without, a class that is in the means


@dataclass(frozen=True)
class MetricSamples:
    """Metric values of several weighted samples.

    Attributes:
        overall: (samples,) by metric name.
        per_class: (samples, classes) by metric name.
    """

    overall: dict[str, Floats]
    per_class: dict[str, Floats]


class WeightedMetrics:
    """Metrics of predictions as a function of image weights; sorting and per-image terms are computed once.

    Args:
        predictions: of one split.
    """

    def __init__(self, predictions: Predictions) -> None:
        labels, scores, self.task = predictions.labels, predictions.scores, predictions.task
        classes = scores.shape[1]
        decisions = self.task.decide(scores)
        self.is_exclusive = not self.task.multi_label
        self.truth = one_versus_rest(labels, classes, self.task)
        self.predicted = one_versus_rest(decisions, classes, self.task)
        self.scores = scores
        self.correct = (decisions == labels).mean(axis=1)
        if self.is_exclusive:
            self.losses = -np.log(np.maximum(np.take_along_axis(scores, labels, axis=1)[:, 0], MIN_SCORE))
        else:
            self.losses = -np.log(np.maximum(np.where(self.truth, scores, 1 - scores), MIN_SCORE)).mean(axis=1)
        self.squared_errors = (scores - self.truth) ** 2
        # binary: of the last class; multi-class: sum over classes (Brier 1950); multi-label: mean over findings
        if self.is_exclusive:
            self.brier = self.squared_errors[:, 1] if classes == 2 else self.squared_errors.sum(axis=1)
        else:
            self.brier = self.squared_errors.mean(axis=1)
        self.evaluable: Truth = np.asarray(self.truth.any(axis=0) & ~self.truth.all(axis=0))
        groups = bootstrap.encode_groups(predictions.frame["group"])
        counts = [[len(np.unique(groups[side])) for side in (column, ~column)] for column in self.truth.T]
        # an AUC of positives or negatives of a single patient or lesion has no interval, and neither would the mean
        self.averaged: Truth = np.array(counts).min(axis=1) >= MIN_AVERAGED_GROUPS
        self.present: Truth = np.asarray(self.truth.any(axis=0) | self.predicted.any(axis=0))

    @cached_property
    def _class_rankings(self) -> list[RankedScores | None]:
        rows = np.arange(len(self.scores))
        return [
            RankedScores(self.truth[:, c], self.scores[:, c], rows) if is_evaluable else None
            for c, is_evaluable in enumerate(self.evaluable)
        ]

    @cached_property
    def _pooled_ranking(self) -> RankedScores | None:
        classes = self.evaluable
        if not classes.any():
            return None
        rows = np.repeat(np.arange(len(self.scores)), int(classes.sum()))
        return RankedScores(self.truth[:, classes].ravel(), self.scores[:, classes].ravel(), rows)

    @cached_property
    def _summands(self) -> tuple[Floats, list[int]]:
        """Per-image terms whose weighted sums give the metrics, and the number of columns of each kind."""
        gaps = self._calibration_gaps()
        blocks = [
            self.truth, self.predicted, self.truth & self.predicted, self.squared_errors,
            np.stack([self.correct, self.losses, self.brier], axis=1), *gaps,
        ]  # fmt: skip
        return np.concatenate(blocks, axis=1, dtype=np.float64), [block.shape[1] for block in blocks]

    def _calibration_gaps(self) -> list[Floats]:
        """Return score minus outcome per image and bin: of the last of two classes, decision of more, each finding."""
        if not self.is_exclusive:
            return [_bin_gaps(self.scores[:, c], self.truth[:, c]) for c in np.flatnonzero(self.evaluable)]
        if self.scores.shape[1] == 2:
            return [_bin_gaps(self.scores[:, 1], self.truth[:, 1])]
        return [_bin_gaps(self.scores[self.predicted], self.correct.astype(bool))]

    def class_calibration_errors(self) -> Floats:
        """Compute the calibration error of the score of each class, one versus rest, with unit weights; (classes,).

        Kumar et al. 2019 (arXiv:1909.10155, marginal calibration) with bins of equal mass (Nixon et al. 2019,
        arXiv:1904.01685). NaN for a class without positives or without negatives.
        """
        errors = np.full(len(self.evaluable), np.nan)
        for c in np.flatnonzero(self.evaluable):
            gaps = _bin_gaps(self.scores[:, c], self.truth[:, c]).sum(axis=0)
            errors[c] = np.abs(gaps).sum() / len(self.scores)
        return errors

    def compute(self, weights: NDArray[np.floating[Any]]) -> MetricSamples:
        """Compute all metrics for integer weights, (samples, images)."""
        columns, widths = self._summands
        total = weights.sum(axis=1, dtype=np.float64)  # samples
        sums = np.split(weights @ columns, np.cumsum(widths)[:-1], axis=1)
        (positives, predicted, hits, squares, scalars), gaps = sums[:5], sums[5:]
        with np.errstate(divide="ignore", invalid="ignore"):
            negatives = total[:, None] - positives
            per_class = {
                "precision": hits / predicted,
                "recall": hits / positives,
                "specificity": (negatives - predicted + hits) / negatives,
                "f1": 2 * hits / (positives + predicted),
                "brier": squares / total[:, None],
            }  # fmt: skip
            areas = self.compute_areas(weights)
            per_class |= areas.per_class
            accuracy, loss, brier = (scalars / total[:, None]).T
            macro = {
                name: _row_mean(np.nan_to_num(per_class[name][:, self.present]))
                for name in ("precision", "recall", "f1")
            }
            overall = {
                "loss": loss, "accuracy": accuracy, "balanced_accuracy": self._balanced_accuracy(per_class), **macro,
                "specificity": _row_mean(per_class["specificity"][:, self.averaged]),
                **{name: areas.overall[name] for name in ("auc", "average_precision")},
                "brier": brier,
                "calibration_error": _row_mean(np.stack([np.abs(g).sum(axis=1) / total for g in gaps], axis=1))
                if gaps else np.full(len(total), np.nan),
            }  # fmt: skip
            overall |= areas.overall
            if self.is_exclusive:
                overall |= self._kappas(weights, positives, predicted, accuracy, total)
        return MetricSamples(overall, per_class)

    def compute_areas(self, weights: NDArray[np.floating[Any]]) -> MetricSamples:
        """Compute only ROC AUC and average precision for integer weights, (samples, images)."""
        auc, average_precision = np.full((2, len(weights), len(self.evaluable)), np.nan)
        for c, ranking in enumerate(self._class_rankings):
            if ranking is not None:
                auc[:, c], average_precision[:, c] = ranking.auc_and_ap(weights)
        overall = {"auc": self.class_mean(auc), "average_precision": _row_mean(average_precision[:, self.averaged])}
        if self._pooled_ranking is not None and (len(self.evaluable) > 2 or not self.is_exclusive):
            overall["auc_micro"], overall["average_precision_micro"] = self._pooled_ranking.auc_and_ap(weights)
        return MetricSamples(overall, {"auc": auc, "average_precision": average_precision})

    def class_mean(self, per_class: Floats) -> Floats:
        """Average (samples, classes) over the evaluable classes; of two exclusive classes return the last one."""
        if self.is_exclusive and per_class.shape[1] == 2:
            return per_class[:, -1] if self.averaged[-1] else np.full(len(per_class), np.nan)
        return _row_mean(per_class[:, self.averaged])

    def _balanced_accuracy(self, per_class: dict[str, Floats]) -> Floats:
        """Return the mean recall over classes; multi-label: the mean of (sensitivity + specificity) / 2."""
        if self.is_exclusive:
            return _row_mean(per_class["recall"][:, self.truth.any(axis=0)])
        return _row_mean(((per_class["recall"] + per_class["specificity"]) / 2)[:, self.averaged])

    def _kappas(
        self, weights: NDArray[np.floating[Any]], positives: Floats, called: Floats, accuracy: Floats, total: Floats
    ) -> dict[str, Floats]:
        """Compute Cohen's kappa (1960, doi:10.1177/001316446002000104); ordinal: also with quadratic weights (1968)."""
        true_shares, predicted_shares = positives / total[:, None], called / total[:, None]
        expected_agreement = (true_shares * predicted_shares).sum(axis=1)
        kappas = {"kappa": (accuracy - expected_agreement) / (1 - expected_agreement)}
        if self.task.name == ORDINAL:
            grades = np.arange(true_shares.shape[1])
            observed = (self.truth.argmax(axis=1) - self.predicted.argmax(axis=1)) ** 2.0
            costs = (grades[:, None] - grades) ** 2.0
            expected = np.einsum("si,ij,sj->s", true_shares, costs, predicted_shares)
            kappas["quadratic_kappa"] = 1 - weights @ observed / total / expected
        return kappas


def _bin_gaps(score: Floats, outcome: Truth) -> Floats:
    """Return score minus outcome in the column of its equal-mass bin, (images, bins); equal scores share a bin."""
    edges = np.unique(np.quantile(score, np.arange(1, CALIBRATION_BINS) / CALIBRATION_BINS))
    columns = np.zeros((len(score), len(edges) + 1))
    columns[np.arange(len(score)), np.searchsorted(edges, score, side="right")] = score - outcome
    return columns


def _row_mean(values: Floats) -> Floats:
    """Average over the last axis; NaN if it is empty."""
    return values.mean(axis=1) if values.shape[1] else np.full(len(values), np.nan)
