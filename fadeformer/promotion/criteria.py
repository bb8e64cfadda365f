"""Inputs of the promotion gate: the criteria, and the evaluation results of a challenger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fadeformer.evaluation.intervals import bootstrap
from fadeformer.evaluation.metrics import curve_classes
from fadeformer.evaluation.predictions import Predictions
from fadeformer.inference.operating_point import OperatingPoint
from fadeformer.promotion.alpha_spending import confidence_of_candidate
from fadeformer.promotion.decision import FAILED, PASSED, Check
from fadeformer.tasks import one_versus_rest

OperatingPoints = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class PromotionCriteria:
    """Promotion criteria; the fields are keys of `promote:` in params.yaml, None disables a check.

    Attributes:
        min_auc: minimum of the lower confidence bound of the test AUC.
        min_class_auc: minimum AUC of each class or finding; of two classes the last one.
        min_subgroup_auc: minimum AUC of each subgroup, for all columns or by column.
        min_cases: minimum number of positive, and of negative, patients, lesions or single images of a class; with
            fewer it is not assessed. Within a subgroup, classes need as many images.
        max_ece: maximum calibration error of each class.
        operating_point: `youden`, `sensitivity` or `specificity`: the decision rule of the deployed model.
        min_sensitivity: minimum of the lower confidence bound of each class's recall (sensitivity) by that rule.
        margin: non-inferiority margin, the largest acceptable loss of AUC against the champion and the best champion.
        class_margin: the same for the AUC of each class and each subgroup.
        recall_margin: the same for the recall of each class by the deployed decision.
        min_gain: minimum gain of AUC against the champion; replaces the margin.
        not_assessed: `refuse` a model with a check that was not assessed, or `allow` it.
    """

    min_auc: float
    min_class_auc: float | None
    min_subgroup_auc: float | Mapping[str, float] | None
    min_cases: int
    max_ece: float | None
    operating_point: str
    min_sensitivity: float | None
    margin: float
    class_margin: float | None
    recall_margin: float | None
    min_gain: float | None
    not_assessed: str


@dataclass(frozen=True)
class Challenger:
    """Evaluation results of a challenger.

    Attributes:
        test: predictions on the test images.
        confidence: level of the intervals of the first candidate on these test images.
        subgroups: output of `fadeformer.evaluation.subgroups.evaluate_subgroups` on test.
        age_bands: first year of each age band of the subgroups.
        operating_points: output of `fadeformer.evaluation.operating_points.select_operating_points`.
        is_data_valid: whether data validation passed.
        candidate: its number among the candidates that were judged on these test images, from 1.
        initial_weights: name of the file of its initial weights; None if it has none.
        initial_images: content hashes of the images that the initial weights were trained on; None if not recorded.
        rollback_reason: why this model was rolled back before; None if it was not.
        data_warnings: checks of data validation that failed as warnings, in words.
    """

    test: Predictions
    confidence: float
    subgroups: Mapping[str, Mapping[str, Any]]
    age_bands: Sequence[float]
    operating_points: OperatingPoints
    is_data_valid: bool
    candidate: int = 1
    initial_weights: str | None = None
    initial_images: frozenset[str] | None = field(default=None, repr=False)
    rollback_reason: str | None = None
    data_warnings: Sequence[str] = ()

    @property
    def paid_confidence(self) -> float:
        """Level of the gate's intervals: stricter for each candidate on the same test images."""
        return confidence_of_candidate(self.confidence, self.candidate)


def check_scores(name: str, requirement: str, predictions: Predictions) -> Check:
    """Check that every score is in [0, 1]."""
    scores = predictions.scores
    with np.errstate(invalid="ignore"):
        invalid = ~((scores >= 0) & (scores <= 1)).all(axis=1)
    if not len(scores):
        return Check(name, requirement, FAILED, "there are no test images")
    if not invalid.any():
        return Check(name, requirement, PASSED, f"{len(scores):,} images")
    first = predictions.frame["id"].to_numpy()[invalid][0]
    return Check(name, requirement, FAILED, f"{int(invalid.sum()):,} images with invalid scores, such as {first}")


def count_cases(predictions: Predictions) -> dict[str, int]:
    """Count the groups (patients, lesions or single images) of each class: the smaller of positives and negatives."""
    groups = bootstrap.encode_groups(predictions.frame["group"])
    truth = one_versus_rest(predictions.labels, len(predictions.classes), predictions.task)
    return {
        name: min(len(np.unique(groups[rows])) for rows in (truth[:, c], ~truth[:, c]))
        for c, name in enumerate(predictions.classes)
    }


def averaged_classes(predictions: Predictions) -> list[str]:
    """Return the classes of the mean AUC, including those with too few cases."""
    return [predictions.classes[c] for c in curve_classes(predictions)]


def decide_as_deployed(predictions: Predictions, points: OperatingPoints, name: str) -> NDArray[np.bool_]:
    """Return the decisions of the deployed model at an operating point, (images, classes)."""
    rule = OperatingPoint.from_thresholds(predictions.task, predictions.classes, points, name)
    return rule.decide(predictions.scores)
