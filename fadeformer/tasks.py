"""The kinds of classification task: loss, probabilities and decision of each, in one table.

Labels are always an integer array of shape (images, labels): one column that holds the class, or for multi-label
tasks one column of 0 and 1 per finding. Scores are always of shape (images, classes). Names of tasks are MedMNIST's
own (`medmnist/info.py`), so that a data set's facts can be read as they are published.

A network is trained on targets (images, classes): the share of each class or finding, 0 and 1 until images are mixed
or labels smoothed. The loss of a class or finding may be weighed, and focal: multiplied by the share of likelihood that
is missing, to the power gamma (Lin et al. 2017, arXiv:1708.02002).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit, softmax

from fadeformer.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and the stages that only read predictions do without it
    from torch import Tensor

ORDINAL = "ordinal-regression"
MIN_SCORE = float(np.finfo(np.float64).tiny)  # a score of 0 for what is true costs 708 nats, not infinity


def _softmax_losses(logits: Tensor, targets: Tensor, weights: Tensor, gamma: float) -> Tensor:
    likelihood = logits.log_softmax(dim=1)  # images, classes
    missing = -likelihood.expm1()
    # held above 0, where the derivative of a power below 1 is infinite
    focus = missing.clamp_min(float(np.finfo(np.float32).tiny)) ** gamma if gamma else 1.0
    return -(targets * weights * focus * likelihood).sum(dim=1)


def _sigmoid_losses(logits: Tensor, targets: Tensor, weights: Tensor, gamma: float) -> Tensor:
    return _binary_losses(logits, targets, weights, gamma).mean(dim=1)


def _cumulative_losses(logits: Tensor, targets: Tensor, weights: Tensor, gamma: float) -> Tensor:
    above = targets.flip(1).cumsum(dim=1).flip(1)[:, 1:]  # share of the grades above each threshold
    thresholds = _binary_losses(_cumulative_logits(logits), above, weights.new_ones(()), gamma)
    return thresholds.mean(dim=1) * (targets * weights).sum(dim=1)


def _binary_losses(logits: Tensor, targets: Tensor, weights: Tensor, gamma: float) -> Tensor:
    from torch.nn.functional import logsigmoid

    present, absent = logsigmoid(logits), logsigmoid(-logits)
    focus = ((gamma * absent).exp(), (gamma * present).exp()) if gamma else (1.0, 1.0)
    return -(weights * targets * focus[0] * present + (1 - targets) * focus[1] * absent)


def _cumulative_logits(logits: Tensor) -> Tensor:
    """Logits of being above each threshold, which never rise: the first output less a positive step for each other."""
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
    """Sigmoid(a) - sigmoid(b) for neighbours a >= b, as sigmoid(a) sigmoid(-b) (1 - exp(b - a)), which never cancels.

    Since a - b is softplus of an output, the last factor is that output's sigmoid.
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
    """The logarithm of `_grades`."""
    from torch.nn.functional import logsigmoid, pad

    above = _cumulative_logits(logits)
    return pad(logsigmoid(above), (1, 0)) + pad(logsigmoid(-above), (0, 1)) + pad(logsigmoid(logits[:, 1:]), (1, 1))


def _argmax(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.asarray(scores.argmax(axis=1)[:, None], dtype=np.int64)


def _threshold_at_half(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    return (scores > 0.5).astype(np.int64)


def _balanced_class_weights(labels: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Images / (classes * images of the class), as scikit-learn's `balanced`; 1 where there are none."""
    counts = np.bincount(labels[:, 0], minlength=classes)
    return np.where(counts > 0, len(labels) / (classes * np.maximum(counts, 1)), 1.0)


def _positive_weights(labels: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Images without a finding for each with it, so that both weigh the same; 1 where there are none."""
    counts = labels.sum(axis=0)
    return np.where(counts > 0, (len(labels) - counts) / np.maximum(counts, 1), 1.0)


@dataclass(frozen=True)
class Task:
    """One kind of classification.

    Attributes:
        name: as MedMNIST writes it.
        multi_label: whether an image may have several findings, or none.
        spare_outputs: how many outputs fewer than classes a network has.
        targets: labels (images, labels) and the number of classes to targets (images, classes).
        losses: logits (images, outputs), targets, weights of the classes and the focal gamma to losses (images,).
        right: logits and labels to the share of right decisions on each image (images,).
        probabilities: float64 logits (images, outputs) to scores (images, classes).
        logs: the same in torch, as logarithms; of findings as logits.
        decide: scores (images, classes) to predicted labels (images, labels).
        balance: labels and the number of classes to weights (classes,) that even out how common they are.
    """

    name: str
    multi_label: bool
    num_omitted_outputs: int
    targets: Callable[[Tensor, int], Tensor]
    losses: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    correct: Callable[[Tensor, Tensor], Tensor]
    probabilities: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    calibration_logits: Callable[[Tensor], Tensor]
    decide: Callable[[NDArray[np.float64]], NDArray[np.int64]]
    balanced_weights: Callable[[NDArray[np.int64], int], NDArray[np.float64]]

    def label_columns(self, classes: int) -> list[str]:
        """Names of the label columns in every table: `label`, or `label_0 ... label_{classes-1}` where multi-label."""
        return [f"label_{c}" for c in range(classes)] if self.multi_label else ["label"]

    def smooth_targets(self, targets: Tensor, amount: float) -> Tensor:
        """Targets of which a share is spread over the classes, or for findings over present and absent."""
        return targets * (1 - amount) + amount / (2 if self.multi_label else targets.shape[1])

    def with_head(self, head: str) -> Task:
        """The same task with another kind of output.

        `cumulative`, for grades in an order: the outputs say how likely an image lies above each threshold between two
        grades, ever less from one to the next (McCullagh 1980, doi:10.1111/j.2517-6161.1980.tb01109.x, but with
        thresholds of each image's own). `auto` is the task as it stands.

        Raises:
            UserError: it needs grades, and the task has none.
        """
        if head == "auto":
            return self
        if self.name != ORDINAL:
            raise UserError(
                f"params.yaml: model.head is {head}, which needs grades in an order, but the task is {self.name}; set"
                f" it to auto, or dataset.task to {ORDINAL} if the classes are grades"
            )
        changes = {
            "spare_outputs": 1, "losses": _cumulative_losses, "right": _correct_grade, "probabilities": _cumulative_probabilities,
            "logs": _cumulative_log_probabilities,
        }  # fmt: skip
        return replace(self, **changes)  # type: ignore[arg-type]


_SINGLE_LABEL = (
    False,
    0,
    _one_hot,
    _softmax_losses,
    _correct_class,
    _softmax,
    _log_softmax,
    _argmax,
    _balanced_class_weights,
)
_MULTI_LABEL = (
    True,
    0,
    _multi_hot,
    _sigmoid_losses,
    _correct_findings,
    expit,
    _identity,
    _threshold_at_half,
    _positive_weights,
)

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
    """Which classes or findings each image has: labels (images, labels) to (images, classes)."""
    return labels.astype(bool) if task.multi_label else labels == np.arange(classes)
