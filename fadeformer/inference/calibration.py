"""Probability calibration, fitted on val: temperature, prior correction and offsets of classes, Platt scaling.

Calibrated scores of exclusive classes are softmax(slope * log(score) + offset). A network that saw rare classes more
often than they occur (`train.sampling: weighted`, `train.class_weights`) overstates them, by the ratio of their weights
in training, whatever the slope (Saerens et al. 2002, doi:10.1162/089976602753284446). Three candidates are compared:

- temperature (Guo et al. 2017, arXiv:1706.04599): slope = 1 / temperature, no offsets;
- prior correction: a slope, and as offsets the negative logarithms of the weights in training, which are known;
- offsets: a slope and one fitted offset per class (bias-corrected temperature scaling, Alexandari et al. 2020,
  arXiv:1901.06852), with a Gaussian prior around the offsets of the default, so that a class with few images keeps it.

The default is the prior correction if classes were weighted in training, otherwise the temperature. It is replaced only
by a candidate whose cross-validated log loss on val is lower by more than one standard error (Breiman et al. 1984, ISBN
978-0-412-04841-8), with all images of a patient or lesion in one fold.

In multi-label tasks each finding has Platt scaling (1999), sigmoid(slope * logit(score) + offset), which keeps the
ranking. All fits maximize the likelihood with smoothed targets, because a val set without errors would otherwise push
the scores to 0 and 1: Platt's for findings, and for classes the labels with one image in n + 2 relabeled at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax, softmax

from fadeformer.tasks import MIN_SCORE, Task, one_versus_rest

Floats = NDArray[np.float64]

SLOPE_BOUNDS = (0.05, 20.0)  # beyond these bounds the network has learned nothing, or has memorized val
OFFSET_BOUNDS = (-20.0, 20.0)
OFFSET_STD = 2.0  # of the Gaussian prior of a class's offset, in logits: a factor of 7 in the odds
NUM_FOLDS = 5
FOLD_SEED = 0
NONE, TEMPERATURE, PRIOR_CORRECTION, OFFSETS, PLATT = (
    "none", "temperature", "prior correction", "offsets", "Platt scaling",
)  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """Map from raw to calibrated scores, and the decision rule that belongs to them.

    Attributes:
        slope: reciprocal of the temperature, or one slope per finding; above 0.
        offset: 0, or one offset per class or finding, in logits.
        method: how the parameters were fitted, one of the constants of this module.
        decision_weights: of exclusive classes, see `Task.decide`; they sum to 1. Empty if the most probable class is
            the decision.
    """

    slope: tuple[float, ...] = (1.0,)
    offset: tuple[float, ...] = (0.0,)
    method: str = NONE
    decision_weights: tuple[float, ...] = ()

    def __call__(self, scores: Floats, task: Task) -> Floats:
        """Calibrate raw scores, (images, classes)."""
        if self == IDENTITY:
            return scores
        slope, offset = np.array(self.slope), np.array(self.offset)
        if task.multi_label:
            return np.asarray(expit(slope * _logit(scores) + offset))
        return np.asarray(softmax(slope * _log(scores) + offset, axis=1))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `model.json`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


IDENTITY = Calibration()


def from_dict(values: Mapping[str, Any]) -> Calibration:
    """Create a calibration from the output of `Calibration.to_dict`.

    Models of earlier versions have slope and offset only: they were temperatures or Platt scaling, and the decision was
    the most probable class.
    """
    slope, offset = tuple(values["slope"]), tuple(values["offset"])
    earlier = NONE if (slope, offset) == ((1.0,), (0.0,)) else TEMPERATURE if offset == (0.0,) else PLATT
    return Calibration(slope, offset, values.get("method", earlier), tuple(values.get("decision_weights", ())))


def fit_calibration(
    labels: NDArray[np.int64],
    scores: Floats,
    task: Task,
    *,
    groups: NDArray[np.int64] | None = None,
    training_weights: Floats | None = None,
) -> Calibration:
    """Fit a calibration by maximum likelihood.

    Args:
        labels: of val, (images, labels).
        scores: raw scores on val, (images, classes).
        task: classification task.
        groups: code of the patient or lesion of each image of val, (images,), negative for images without one; None if
            all images are independent.
        training_weights: mean weight of an image of each exclusive class in training, (classes,), up to a factor: its
            sampling weight times the weight of its class in the loss; 0 for a class without images. None if all are
            equal, and in multi-label tasks, where the offset of Platt scaling corrects a shifted prevalence.

    Returns:
        The calibration. A finding without positives or without negatives in val keeps slope 1 and offset 0; so do
        exclusive classes if val has images of one class only, except for the prior correction. If classes were weighted
        in training, the decision weights undo the offsets: calibration then changes no decision.
    """
    truth = one_versus_rest(labels, scores.shape[1], task)
    if task.multi_label:
        parameters = [_fit_platt(truth[:, c], scores[:, c]) for c in range(scores.shape[1])]
        slopes, offsets = zip(*parameters, strict=True)
        return Calibration(slopes, offsets, PLATT)
    known = _known_offsets(training_weights, scores.shape[1])
    method = _select_method(truth, _log(scores), _fold_of_images(truth, groups), known)
    slope, offset = _fit_exclusive(method, truth, _log(scores), known)
    weights = softmax(-offset).tolist() if known.any() and offset.any() else []
    return Calibration((slope,), tuple(offset.tolist()) if offset.any() else (0.0,), method, tuple(weights))


class _Folds(NamedTuple):
    """Cross-validation folds: group code and fold of each image, both (images,), and the number of folds."""

    groups: NDArray[np.int64]
    of_images: NDArray[np.int64]
    number: int


def _known_offsets(training_weights: Floats | None, classes: int) -> Floats:
    """Return the offsets of the prior correction, with mean 0; 0 for classes without weight, which were not learned."""
    if training_weights is None:
        return np.zeros(classes)
    learned = training_weights > 0
    offsets = np.where(learned, -np.log(np.where(learned, training_weights, 1.0)), 0.0)
    offsets[learned] -= offsets[learned].mean()
    return np.where(np.abs(offsets) > 1e-12, offsets, 0.0)  # of equal weights, exactly 0


def _fold_of_images(truth: NDArray[np.bool_], groups: NDArray[np.int64] | None) -> _Folds:
    """Assign whole groups to folds, in turn among the groups with the same rarest class."""
    images = np.arange(len(truth))
    codes = images if groups is None else np.where(groups >= 0, groups, groups.max() + 1 + images)
    codes = np.unique(codes, return_inverse=True)[1]
    rarity = np.argsort(np.argsort(-truth.sum(axis=0), kind="stable"), kind="stable")  # rank of each class
    rarest = np.zeros(int(codes.max()) + 1, dtype=np.int64)
    np.maximum.at(rarest, codes, (truth * rarity).max(axis=1))
    order = np.lexsort((np.random.default_rng(FOLD_SEED).permutation(len(rarest)), rarest))
    number = min(NUM_FOLDS, len(rarest))
    fold = np.empty(len(rarest), dtype=np.int64)
    fold[order] = np.arange(len(rarest)) % number
    return _Folds(codes, fold[codes], number)


def _select_method(truth: NDArray[np.bool_], log_scores: Floats, folds: _Folds, known: Floats) -> str:
    """Return the default, or the candidate with the lowest loss if it is better by more than one standard error."""
    default = PRIOR_CORRECTION if known.any() else TEMPERATURE
    if folds.number < 2 or truth.any(axis=0).sum() < 2:
        return default
    candidates = [default, *(name for name in (TEMPERATURE, OFFSETS) if name != default)]
    losses = np.empty((len(candidates), len(truth)))
    for fold in range(folds.number):
        held_out = folds.of_images == fold
        for row, name in enumerate(candidates):
            slope, offset = _fit_exclusive(name, truth[~held_out], log_scores[~held_out], known)
            calibrated = log_softmax(slope * log_scores[held_out] + offset, axis=1)
            losses[row, held_out] = -calibrated[truth[held_out]]
    gains = np.stack([np.bincount(folds.groups, losses[0] - loss) for loss in losses[1:]])  # candidates, groups
    errors = gains.std(axis=1, ddof=1) * np.sqrt(gains.shape[1])
    excess = np.where(gains.sum(axis=1) > errors, gains.sum(axis=1), 0.0)
    return candidates[1 + int(excess.argmax())] if excess.any() else default


def _fit_exclusive(method: str, truth: NDArray[np.bool_], log_scores: Floats, known: Floats) -> tuple[float, Floats]:
    """Fit slope and offsets of exclusive classes; `known` are the offsets of the prior correction."""
    start = np.zeros_like(known) if method == TEMPERATURE else known
    if truth.any(axis=0).sum() < 2:
        return 1.0, start
    targets = _smooth_labels(truth)

    def loss(log_slope: float) -> float:
        return float(-(targets * log_softmax(np.exp(log_slope) * log_scores + start, axis=1)).sum(axis=1).mean())

    result = minimize_scalar(loss, bounds=np.log(SLOPE_BOUNDS), method="bounded", options={"xatol": 1e-8})
    slope = float(np.exp(result.x))
    return _fit_offsets(targets, log_scores, slope, start) if method == OFFSETS else (slope, start)


def _fit_offsets(targets: Floats, log_scores: Floats, slope: float, start: Floats) -> tuple[float, Floats]:
    """Fit slope and offsets together; the prior centers the offsets around `start`, and keeps their mean."""

    def loss_and_gradient(parameters: Floats) -> tuple[float, Floats]:
        deviations = parameters[1:] - start
        log_probabilities = log_softmax(parameters[0] * log_scores + parameters[1:], axis=1)
        residuals = np.exp(log_probabilities) - targets
        value = -(targets * log_probabilities).sum() + (deviations**2).sum() / (2 * OFFSET_STD**2)
        gradient = np.append((residuals * log_scores).sum(), residuals.sum(axis=0) + deviations / OFFSET_STD**2)
        return float(value) / len(targets), gradient / len(targets)

    bounds = [SLOPE_BOUNDS, *([OFFSET_BOUNDS] * len(start))]
    result = minimize(
        loss_and_gradient, np.append(slope, start), jac=True, method="L-BFGS-B", bounds=bounds,
        options={"ftol": 1e-14, "gtol": 1e-9, "maxiter": 1000},
    )  # fmt: skip
    return float(result.x[0]), np.asarray(result.x[1:])


def _smooth_labels(truth: NDArray[np.bool_]) -> Floats:
    """Relabel images at random with the frequencies of the classes, so many that one in n + 2 gets another class.

    The sum of the targets of each class is its number of images: smoothing shifts no frequency.
    """
    frequencies = truth.mean(axis=0)
    relabeled = 1 / ((len(truth) + 2) * (1 - (frequencies**2).sum()))
    return np.asarray((1 - relabeled) * truth + relabeled * frequencies)


def _fit_platt(truth: NDArray[np.bool_], score: Floats) -> tuple[float, float]:
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
