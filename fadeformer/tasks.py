"""Classification tasks: loss, probabilities and decision rule of each, in one table.

Labels are an integer array of shape (images, labels): one column with the class index, or for multi-label tasks one
binary column per finding. Scores (probabilities) have shape (images, classes). Task names are those of MedMNIST
(`medmnist/info.py`), so its metadata can be used unchanged.

A model is trained on soft targets (images, classes): one-hot or multi-hot until mixup, CutMix or label smoothing
changes them. Losses support class weights and focal modulation: each term is multiplied by (1 - p) ** gamma, where p
is the probability of the true class (Lin et al. 2017, arXiv:1708.02002).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit, softmax

from fadeformer.errors import UserError

if TYPE_CHECKING:  # importing torch takes seconds, and stages that only read predictions do not need it
    from torch import Tensor

ORDINAL = "ordinal-regression"
MIN_SCORE = float(np.finfo(np.float64).tiny)  # lower clip of probabilities, so that log loss is at most 708 nats


def _softmax_losses(logits: Tensor, targets: Tensor, weights: Tensor, gamma: float) -> Tensor:
    log_probs = logits.log_softmax(dim=1)  # (images, classes)
    complement = -log_probs.expm1()
    # clamped above 0, where the derivative of x ** gamma is infinite for gamma < 1
    focus = complement.clamp_min(float(np.finfo(np.float32).tiny)) ** gamma if gamma else 1.0
    return -(targets * weights * focus * log_probs).sum(dim=1)


def _sigmoid_losses(logits: Tensor, targets: Tensor, weights: Tensor, gamma: float) -> Tensor:
    return _binary_losses(logits, targets, weights, gamma).mean(dim=1)


def _cumulative_losses(logits: Tensor, targets: Tensor, weights: Tensor, gamma: float) -> Tensor:
    above = targets.flip(1).cumsum(dim=1).flip(1)[:, 1:]  # target P(grade > threshold)
    thresholds = _binary_losses(_cumulative_logits(logits), above, weights.new_ones(()), gamma)
    return thresholds.mean(dim=1) * (targets * weights).sum(dim=1)


def _binary_losses(logits: Tensor, targets: Tensor, weights: Tensor, gamma: float) -> Tensor:
    from torch.nn.functional import logsigmoid

    present, absent = logsigmoid(logits), logsigmoid(-logits)
    focus = ((gamma * absent).exp(), (gamma * present).exp()) if gamma else (1.0, 1.0)
    return -(weights * targets * focus[0] * present + (1 - targets) * focus[1] * absent)


def _cumulative_logits(logits: Tensor) -> Tensor:
    """Logits of P(grade > threshold), non-increasing: the first output minus cumulative softplus steps."""
    from torch.nn.functional import pad, softplus

    return logits[:, :1] - pad(softplus(logits[:, 1:]).cumsum(dim=1), (1, 0))


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    from torch.nn.functional import one_hot

    return one_hot(labels[:, 0], classes).float()


def _multi_hot(labels: Tensor, classes: int) -> Tensor:
    return labels.float()


def _correct_class(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == labels[:, 0]).float()


def _correct_findings(logits: Tensor, labels: Tensor) -> Tensor:
    return ((logits > 0) == labels.bool()).float().mean(dim=1)


def _correct_grade(logits: Tensor, labels: Tensor) -> Tensor:
    return (_cumulative_log_probabilities(logits).argmax(dim=1) == labels[:, 0]).float()


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(softmax(logits, axis=1))


def _cumulative_probabilities(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Grade probabilities sigmoid(a) - sigmoid(b) of adjacent thresholds a >= b, without cancellation.

    Computed as sigmoid(a) sigmoid(-b) (1 - exp(b - a)). Since a - b is the softplus of an output, the last factor is
    that output's sigmoid.
    """
    steps = np.cumsum(np.logaddexp(0.0, logits[:, 1:]), axis=1)
    above = logits[:, :1] - np.pad(steps, ((0, 0), (1, 0)))
    over = np.pad(log_expit(above), ((0, 0), (1, 0)))
    under = np.pad(log_expit(-above), ((0, 0), (0, 1)))
    between = np.pad(log_expit(logits[:, 1:]), ((0, 0), (1, 1)))
    return np.asarray(np.exp(over + under + between))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(dim=1)


def _identity(logits: Tensor) -> Tensor:
    return logits


def _cumulative_log_probabilities(logits: Tensor) -> Tensor:
    """Logarithm of the grade probabilities (see `_cumulative_probabilities`), in torch."""
    from torch.nn.functional import logsigmoid, pad

    above = _cumulative_logits(logits)
    return pad(logsigmoid(above), (1, 0)) + pad(logsigmoid(-above), (0, 1)) + pad(logsigmoid(logits[:, 1:]), (1, 1))


def _balanced_class_weights(labels: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Class weights n / (classes * n_class), as `class_weight="balanced"` in scikit-learn; 1 for an empty class."""
    counts = np.bincount(labels[:, 0], minlength=classes)
    return np.where(counts > 0, len(labels) / (classes * np.maximum(counts, 1)), 1.0)


def _positive_weights(labels: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Positive-class weights negatives / positives of each finding, as torch's `pos_weight`; 1 without positives."""
    counts = labels.sum(axis=0)
    return np.where(counts > 0, (len(labels) - counts) / np.maximum(counts, 1), 1.0)


@dataclass(frozen=True)
class Task:
    """Functions and properties of one classification task.

    Attributes:
        name: MedMNIST's name of the task.
        multi_label: whether an image can have any number of findings.
        num_omitted_outputs: number of classes minus number of model outputs (1 for cumulative logits, else 0).
        targets: labels (images, labels) and the number of classes to targets (images, classes).
        losses: logits (images, outputs), targets, class weights and focal gamma to per-image losses (images,).
        correct: logits and labels to the fraction of correct decisions per image (images,).
        probabilities: float64 logits (images, outputs) to scores (images, classes).
        calibration_logits: logits to the torch values that calibration scales: log-probabilities of exclusive classes,
            logits of findings.
        balanced_weights: labels and the number of classes to class weights (classes,) that compensate for imbalance.
        decision_weights: factor of each exclusive class in `decide`, above 0, in the order of the scores; empty if all
            are equal, and in multi-label tasks.
    """

    name: str
    multi_label: bool
    num_omitted_outputs: int
    targets: Callable[[Tensor, int], Tensor]
    losses: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    correct: Callable[[Tensor, Tensor], Tensor]
    probabilities: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    calibration_logits: Callable[[Tensor], Tensor]
    balanced_weights: Callable[[NDArray[np.int64], int], NDArray[np.float64]]
    decision_weights: tuple[float, ...] = ()

    def decide(self, scores: NDArray[np.float64]) -> NDArray[np.int64]:
        """Decide without operating points: scores (images, classes) to predicted labels (images, labels).

        A finding is present above a score of 0.5. Of exclusive classes the one with the largest product of score and
        decision weight is predicted, which without weights is the most probable one. Weights in proportion to
        1 / prevalence minimize the balanced error (Menon et al. 2021, arXiv:2007.07314); they are those of a training
        in which all classes are equally frequent (docs/explanation/decisions/46-calibrated-priors.md).
        """
        if self.multi_label:
            return (scores > 0.5).astype(np.int64)
        weighted = scores * np.array(self.decision_weights) if self.decision_weights else scores
        return np.asarray(weighted.argmax(axis=1)[:, None], dtype=np.int64)

    def describe_decision(self, classes: Sequence[str]) -> str:
        """Return the rule of `decide` in words; `classes` are the class names, in the order of the scores."""
        if self.multi_label:
            return "findings with a score above 0.5"
        if not self.decision_weights:
            return "most probable class"
        weights = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(classes, self.decision_weights, strict=True))
        return f"largest product of probability and decision weight ({weights})"

    def with_decision_weights(self, weights: Sequence[float]) -> Task:
        """Return the task with other decision weights; none for the most probable class."""
        return replace(self, decision_weights=tuple(weights))

    def label_columns(self, classes: int) -> list[str]:
        """Names of the label columns in every table: `label`, or `label_0` to `label_{classes-1}` for multi-label."""
        return [f"label_{c}" for c in range(classes)] if self.multi_label else ["label"]

    def smooth_targets(self, targets: Tensor, amount: float) -> Tensor:
        """Apply label smoothing: spread `amount` evenly over the classes, or over present and absent of a finding."""
        return targets * (1 - amount) + amount / (2 if self.multi_label else targets.shape[1])

    def with_head(self, head: str) -> Task:
        """Return the task with another classification head.

        `cumulative`, for ordinal regression: the outputs parametrize non-increasing cumulative logits P(grade >
        threshold) (McCullagh 1980, doi:10.1111/j.2517-6161.1980.tb01109.x, but with thresholds predicted for each
        image). `auto` returns the task unchanged.

        Raises:
            UserError: the head needs ordered grades, but this is not an ordinal task.
        """
        if head == "auto":
            return self
        if self.name != ORDINAL:
            raise UserError(
                f"params.yaml: model.head is {head}, which needs ordered grades, but the task is {self.name}; set"
                f" it to auto, or dataset.task to {ORDINAL} if the classes are grades"
            )
        changes = {
            "num_omitted_outputs": 1, "losses": _cumulative_losses, "correct": _correct_grade,
            "probabilities": _cumulative_probabilities, "calibration_logits": _cumulative_log_probabilities,
        }  # fmt: skip
        return replace(self, **changes)  # type: ignore[arg-type]


_SINGLE_LABEL = (
    False, 0, _one_hot, _softmax_losses, _correct_class, _softmax, _log_softmax, _balanced_class_weights
)  # fmt: skip
_MULTI_LABEL = (
    True, 0, _multi_hot, _sigmoid_losses, _correct_findings, expit, _identity, _positive_weights
)  # fmt: skip

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("binary-class", *_SINGLE_LABEL),
        Task("multi-class", *_SINGLE_LABEL),
        Task(ORDINAL, *_SINGLE_LABEL),
        Task("multi-label, binary-class", *_MULTI_LABEL),
    )
}


def one_versus_rest(labels: NDArray[np.int64], classes: int, task: Task) -> NDArray[np.bool_]:
    """Binarize labels one-vs-rest: (images, labels) to boolean (images, classes)."""
    return labels.astype(bool) if task.multi_label else labels == np.arange(classes)
