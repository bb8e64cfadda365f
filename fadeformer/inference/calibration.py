"""Scores that mean what they say: what is fitted on val so that of images with a score of 0.8 about 80 % are positive.

Exclusive classes have one temperature (Guo et al. 2017, arXiv:1706.04599): a class's share is its score to the power of
`slope`, which changes no decision. Findings have vector scaling: sigmoid(slope logit(score) + offset) for each, which
changes no order. Both maximise the likelihood of val with the targets of Platt (1999), who counts one image more of
either kind: a val set without a mistake would otherwise ask for scores of 0 and 1.
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

SLOPE_BOUNDS = (
    0.05,
    20.0,
)  # a network that is unsure or overconfident beyond these has learned nothing, or val by heart
OFFSET_BOUNDS = (-20.0, 20.0)


@dataclass(frozen=True)
class Calibration:
    """How scores are changed.

    Attributes:
        slope: one, the reciprocal of the temperature, or one for each finding; above 0.
        offset: 0, or one for each finding, logits.
    """

    slope: tuple[float, ...] = (1.0,)
    offset: tuple[float, ...] = (0.0,)

    def __call__(self, scores: Floats, task: Task) -> Floats:
        """Scores (images, classes) as a network gave them to calibrated ones."""
        if self == IDENTITY:
            return scores
        slope, offset = np.array(self.slope), np.array(self.offset)
        if task.multi_label:
            return np.asarray(expit(slope * _logit(scores) + offset))
        return np.asarray(softmax(slope * _log(scores), axis=1))

    def to_dict(self) -> dict[str, list[float]]:
        """As plain values, for `model.json`."""
        return {name: list(values) for name, values in asdict(self).items()}


IDENTITY = Calibration()


def from_dict(described: Mapping[str, Any]) -> Calibration:
    """What `described` gave."""
    return Calibration(tuple(described["slope"]), tuple(described["offset"]))


def fit_calibration(labels: NDArray[np.int64], scores: Floats, task: Task) -> Calibration:
    """The calibration of the highest likelihood.

    Args:
        labels: of val, (images, labels).
        scores: of val, (images, classes), as the network gave them.
        task: what kind of classification it is.

    Returns:
        A finding that val cannot judge, for want of images with or without it, keeps slope 1 and offset 0.
    """
    truth = one_versus_rest(labels, scores.shape[1], task)
    if not task.multi_label:
        return Calibration((_fit_slope(truth, scores),))
    found = [_fit_slope_and_offset(truth[:, c], scores[:, c]) for c in range(scores.shape[1])]
    return Calibration(tuple(slope for slope, _ in found), tuple(offset for _, offset in found))


def _fit_slope(truth: NDArray[np.bool_], scores: Floats) -> float:
    images, classes = truth.shape
    right = (images + 1) / (images + 2)
    targets = np.where(truth, right, (1 - right) / max(1, classes - 1))
    logs = _log(scores)

    def loss(log_slope: float) -> float:
        return float(-(targets * log_softmax(np.exp(log_slope) * logs, axis=1)).sum(axis=1).mean())

    found = minimize_scalar(loss, bounds=np.log(SLOPE_BOUNDS), method="bounded", options={"xatol": 1e-8})
    return float(np.exp(found.x))


def _fit_slope_and_offset(truth: NDArray[np.bool_], score: Floats) -> tuple[float, float]:
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return 1.0, 0.0
    targets = np.where(truth, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    logits = _logit(score)

    def loss(at: Floats) -> tuple[float, Floats]:
        shifted = at[0] * logits + at[1]
        excess = expit(shifted) - targets
        value = (np.logaddexp(0.0, shifted) - targets * shifted).mean()
        return float(value), np.array([(excess * logits).mean(), excess.mean()])

    found = minimize(
        loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[SLOPE_BOUNDS, OFFSET_BOUNDS],
        options={"ftol": 1e-14, "gtol": 1e-9, "maxiter": 1000},
    )  # fmt: skip
    return float(found.x[0]), float(found.x[1])


def _log(scores: Floats) -> Floats:
    return np.asarray(np.log(np.maximum(scores, MIN_SCORE)))


def _logit(scores: Floats) -> Floats:
    inside = np.clip(scores, MIN_SCORE, 1 - np.finfo(np.float64).epsneg)
    return np.asarray(np.log(inside) - np.log1p(-inside))
