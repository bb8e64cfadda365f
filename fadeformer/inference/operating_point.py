"""Decision rule of the deployed model: from calibrated scores to classes or findings.

`OperatingPoint` makes the decisions of `predict` and the served model, which the promotion gate checks; accuracy,
confusion matrix and error gallery use `Task.decide`, which is also the decision among more than two exclusive classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fadeformer.errors import UserError
from fadeformer.tasks import Task, one_versus_rest

Floats = NDArray[np.float64]

OPERATING_POINT_NAMES = ("youden", "sensitivity", "specificity")
DEFAULT_THRESHOLD = 0.5  # of findings and classes without a threshold in the operating point and without weights
NO_FINDING = "no finding"
SEPARATOR = "; "  # between the findings of one image


@dataclass(frozen=True)
class OperatingPoint:
    """Decision rule on calibrated scores.

    Attributes:
        task: of the model, with its decision weights.
        classes: class names, in the order of the scores.
        thresholds: minimum score of a positive, by class name. In binary tasks only the last class has a threshold; the
            first class is positive where the last one is not.
        description: the rule in words.
    """

    task: Task
    classes: tuple[str, ...]
    thresholds: Mapping[str, float]
    description: str

    @classmethod
    def from_thresholds(
        cls, task: Task, classes: tuple[str, ...], points: Mapping[str, Any] | None, name: str
    ) -> OperatingPoint:
        """Build the decision rule of one operating point.

        Args:
            task: of the model.
            classes: class names, in the order of the scores.
            points: thresholds by operating point and class, as in `operating_points.json`; None if the model has none.
            name: operating point to use.

        Raises:
            UserError: the model has no such operating point, or the thresholds are for other classes.
        """
        thresholded = classes[1:] if len(classes) == 2 and not task.multi_label else classes
        values: dict[str, float | None] = dict.fromkeys(thresholded)
        if points is not None:
            if name not in points:
                raise UserError(f"operating_point: unknown value; this model has {', '.join(sorted(points))}")
            try:
                values = {c: points[name][c] and float(points[name][c]["threshold"]) for c in thresholded}
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"the operating points are for other classes ({error}); use those of this model's evaluation"
                ) from error
        default = _default_threshold(task)
        if not task.multi_label and len(classes) > 2:
            description = f"decision: {task.describe_decision(classes)}"
        elif points is None:
            description = f"decision threshold {default:.3g}: the model has no operating points"
        else:
            missing = ", ".join(c for c, threshold in values.items() if threshold is None)
            fallback = f"; {default:.3g} for {missing} (no positives or no negatives in val or test)" if missing else ""
            description = f"decision at operating point {name}{fallback}"
        thresholds = {c: default if threshold is None else threshold for c, threshold in values.items()}
        return cls(task, classes, thresholds, description)

    def is_positive(self, scores: Floats) -> NDArray[np.bool_]:
        """Return True where a score reaches its threshold, (images, classes)."""
        if len(self.thresholds) < len(self.classes):
            last = scores[:, 1] >= self.thresholds[self.classes[1]]
            return np.stack([~last, last], axis=1)
        return np.asarray(scores >= np.array([self.thresholds[name] for name in self.classes]))

    def decide(self, scores: Floats) -> NDArray[np.bool_]:
        """Return the decisions as a mask, (images, classes).

        Multi-label: all positive findings. Binary: the class on its side of the threshold. Multi-class: `Task.decide`.
        """
        if self.task.multi_label or len(self.classes) == 2:
            return self.is_positive(scores)
        return one_versus_rest(self.task.decide(scores), len(self.classes), self.task)

    def format_decisions(self, scores: Floats) -> list[str]:
        """Return the decisions as text, one per image."""
        names = np.array(self.classes, dtype=object)
        return [SEPARATOR.join(names[row]) or NO_FINDING for row in self.decide(scores)]


def _default_threshold(task: Task) -> float:
    """Return the threshold of `Task.decide`: of the last of two classes with decision weights, otherwise 0.5."""
    weights = task.decision_weights
    return weights[0] / sum(weights) if len(weights) == 2 else DEFAULT_THRESHOLD
