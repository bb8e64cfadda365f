"""The kinds of classification task: loss, probabilities and decision of each, in one table.

Labels are always an integer array of shape (images, labels): one column that holds the class, or for multi-label
tasks one column of 0 and 1 per finding. Scores are always of shape (images, classes). Names of tasks are MedMNIST's
own (`medmnist/info.py`), so that a data set's facts can be read as they are published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # torch takes seconds to import, and the stages that only read predictions do without it
    from torch import Tensor


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.cross_entropy(logits, labels[:, 0])


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.exp(-np.logaddexp(0.0, -logits)))


def _most_likely(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.asarray(scores.argmax(axis=1)[:, None], dtype=np.int64)


def _above_half(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    return (scores > 0.5).astype(np.int64)


@dataclass(frozen=True)
class Task:
    """One kind of classification.

    Attributes:
        name: as MedMNIST writes it.
        multi_label: whether an image may have several findings, or none.
        loss: logits (images, classes) and labels (images, labels) to the mean loss.
        probabilities: float64 logits to scores, both (images, classes).
        decide: scores (images, classes) to predicted labels (images, labels).
    """

    name: str
    multi_label: bool
    loss: Callable[[Tensor, Tensor], Tensor]
    probabilities: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    decide: Callable[[NDArray[np.float64]], NDArray[np.int64]]

    def label_columns(self, classes: int) -> list[str]:
        """Names of the label columns in every table: `label`, or `label_0 ... label_{classes-1}` where multi-label."""
        return [f"label_{c}" for c in range(classes)] if self.multi_label else ["label"]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("binary-class", False, _cross_entropy, _softmax, _most_likely),
        Task("multi-class", False, _cross_entropy, _softmax, _most_likely),
        Task("ordinal-regression", False, _cross_entropy, _softmax, _most_likely),
        Task("multi-label, binary-class", True, _binary_cross_entropy, _sigmoid, _above_half),
    )
}
