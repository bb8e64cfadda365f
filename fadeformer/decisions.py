"""Scores to words: which class or findings a model calls an image at an operating point."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fadeformer.errors import UserError
from fadeformer.tasks import Task

POINTS = ("youden", "sensitivity", "specificity")
HALF = 0.5
NOTHING = "no finding"
BETWEEN = "; "  # findings


@dataclass(frozen=True)
class Rule:
    """How scores become a decision.

    Attributes:
        task: what kind of classification it is.
        classes: names in the order of the scores.
        thresholds: above which the last of two classes, or each finding, is called; empty where the most probable class
            is.
        told: the same for people.
    """

    task: Task
    classes: tuple[str, ...]
    thresholds: tuple[float, ...]
    told: str

    def called(self, scores: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Scores (images, classes) to what each image is called, of the same shape."""
        if not self.thresholds:
            return np.asarray(self.task.decide(scores) == np.arange(len(self.classes)))
        if self.task.multi_label:
            return np.asarray(scores >= np.array(self.thresholds))
        last = scores[:, 1] >= self.thresholds[0]
        return np.stack([~last, last], axis=1)

    def words(self, scores: NDArray[np.float64]) -> list[str]:
        """The decision about each image: a class, or findings, which may be none."""
        names = np.array(self.classes, dtype=object)
        return [listed(names[row]) for row in self.called(scores)]


def listed(names: Iterable[str]) -> str:
    """What an image is called, as one text."""
    return BETWEEN.join(names) or NOTHING


def rule(task: Task, classes: tuple[str, ...], points: Mapping[str, Any] | None, point: str) -> Rule:
    """The rule of an operating point.

    Of more than two exclusive classes it is the most probable one, whatever the point.

    Args:
        task: what kind of classification it is.
        classes: names in the order of the scores.
        points: what `operating_points.json` holds; None for a model without.
        point: one of `POINTS`.

    Raises:
        UserError: the file is of another model, or has no such point.
    """
    if not task.multi_label and len(classes) != 2:
        return Rule(task, classes, (), "decided for the most probable class")
    judged = classes if task.multi_label else classes[1:]
    if points is None:
        return Rule(task, classes, (HALF,) * len(judged), "decided at 0.5, since the model carries no operating points")
    try:
        found = points["points"][point]
        limits = [found[name] and float(found[name]["threshold"]) for name in judged]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the operating points are not of this model, or have no {point} ({error}); take those of its evaluation"
        ) from error
    lacking = [name for name, limit in zip(judged, limits, strict=True) if limit is None]
    but = f", but at 0.5 for {', '.join(lacking)}, which val could not judge" if lacking else ""
    return Rule(
        task, classes, tuple(HALF if limit is None else limit for limit in limits),
        f"decided at the operating point {point}{but}",
    )  # fmt: skip
