"""Probability calibration, fitted on val: temperature scaling and Platt scaling.

Exclusive classes share one temperature (Guo et al. 2017, arXiv:1706.04599): the calibrated score is proportional to
score ** slope with slope = 1 / temperature, which changes no argmax. In multi-label tasks each finding has Platt
scaling, sigmoid(slope * logit(score) + offset), which keeps the ranking. Both maximize the likelihood on val with the
smoothed targets of Platt (1999), who adds one positive and one negative: a val set without errors would otherwise push
the scores to 0 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax, softmax

from fadeformer.tasks import MIN_SCORE, Task, one_versus_rest

Floats = NDArray[np.float64]

SLOPE_BOUNDS = (0.05, 20.0)  # beyond these bounds the network has learned nothing, or has memorized val
OFFSET_BOUNDS = (-20.0, 20.0)


@dataclass(frozen=True)
class Calibration:
    """Map from raw to calibrated scores.

    Attributes:
        slope: reciprocal of the temperature, or one slope per finding; above 0.
        offset: 0, or one offset per finding, in logits.
    """

    slope: tuple[float, ...] = (1.0,)
    offset: tuple[float, ...] = (0.0,)

    def __call__(self, scores: Floats, task: Task) -> Floats:
        """Calibrate raw scores, (images, classes)."""
        if self == IDENTITY:
            return scores
        slope, offset = np.array(self.slope), np.array(self.offset)
        if task.multi_label:
            return np.asarray(expit(slope * _logit(scores) + offset))
        return np.asarray(softmax(slope * _log(scores), axis=1))

    def to_dict(self) -> dict[str, list[float]]:
        """Return plain values for `model.json`."""
        return {name: list(values) for name, values in asdict(self).items()}


IDENTITY = Calibration()


def from_dict(values: Mapping[str, Any]) -> Calibration:
    """Create a calibration from the output of `Calibration.to_dict`."""
    return Calibration(tuple(values["slope"]), tuple(values["offset"]))


def fit_calibration(labels: NDArray[np.int64], scores: Floats, task: Task) -> Calibration:
    """Fit a calibration by maximum likelihood.

    Args:
        labels: of val, (images, labels).
        scores: raw scores on val, (images, classes).
        task: classification task.

    Returns:
        The calibration. A finding without positives or without negatives in val keeps slope 1 and offset 0.
    """
    truth = one_versus_rest(labels, scores.shape[1], task)
    if not task.multi_label:
        return Calibration((_fit_slope(truth, scores),))
    parameters = [_fit_slope_and_offset(truth[:, c], scores[:, c]) for c in range(scores.shape[1])]
    return Calibration(tuple(slope for slope, _ in parameters), tuple(offset for _, offset in parameters))


def _fit_slope(truth: NDArray[np.bool_], scores: Floats) -> float:
    images, classes = truth.shape
    target = (images + 1) / (images + 2)
    targets = np.where(truth, target, (1 - target) / max(1, classes - 1))
    log_scores = _log(scores)

    def loss(log_slope: float) -> float:
        return float(-(targets * log_softmax(np.exp(log_slope) * log_scores, axis=1)).sum(axis=1).mean())

    result = minimize_scalar(loss, bounds=np.log(SLOPE_BOUNDS), method="bounded", options={"xatol": 1e-8})
    return float(np.exp(result.x))


def _fit_slope_and_offset(truth: NDArray[np.bool_], score: Floats) -> tuple[float, float]:
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return 1.0, 0.0
    targets = np.where(truth, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    logits = _logit(score)

    def loss_and_gradient(parameters: Floats) -> tuple[float, Floats]:
        scaled = parameters[0] * logits + parameters[1]
        residuals = expit(scaled) - targets
        value = (np.logaddexp(0.0, scaled) - targets * scaled).mean()
        return float(value), np.array([(residuals * logits).mean(), residuals.mean()])

    result = minimize(
        loss_and_gradient, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[SLOPE_BOUNDS, OFFSET_BOUNDS],
        options={"ftol": 1e-14, "gtol": 1e-9, "maxiter": 1000},
    )  # fmt: skip
    return float(result.x[0]), float(result.x[1])


def _log(scores: Floats) -> Floats:
    return np.asarray(np.log(np.maximum(scores, MIN_SCORE)))


def _logit(scores: Floats) -> Floats:
    clipped = np.clip(scores, MIN_SCORE, 1 - np.finfo(np.float64).epsneg)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))
