"""Predictions table, from which all metrics and figures are computed.

`predictions.parquet` has one row per image: `split`, `id`, `group`, `sha256` (of the pixels), the labels (`label`, or
`label_0 ... label_{L-1}` in multi-label tasks), one score per class (`score_0 ... score_{C-1}`, float64), the scores
before calibration (`raw_0 ...`) and subgroup columns (such as `subgroup_sex`). Task, class names and decision weights
are stored in the table metadata, so the file is self-contained.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fadeformer.errors import UserError
from fadeformer.tasks import TASKS, Task

SUBGROUP_PREFIX = "subgroup_"
CONTENT = "sha256"  # column with the content hash of each image


@dataclass(frozen=True)
class Predictions:
    """Labels and scores of a set of images.

    Attributes:
        frame: table as described in the module docstring.
        task: classification task, with the decision weights of the model.
        classes: names of the classes or findings, in the order of the scores.
    """

    frame: pd.DataFrame
    task: Task
    classes: tuple[str, ...]

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels, (images, 1), or (images, findings) of 0 and 1 for multi-label tasks."""
        return self.frame[self.task.label_columns(len(self.classes))].to_numpy(dtype=np.int64)

    @property
    def scores(self) -> NDArray[np.float64]:
        """Scores in [0, 1], (images, classes)."""
        return self.frame[[f"score_{c}" for c in range(len(self.classes))]].to_numpy(dtype=np.float64)

    @property
    def subgroups(self) -> pd.DataFrame:
        """Subgroup columns, without their prefix."""
        columns = self.frame.filter(regex=f"^{SUBGROUP_PREFIX}")
        return columns.rename(columns=lambda name: name.removeprefix(SUBGROUP_PREFIX))

    def select_split(self, split: str) -> Predictions:
        """Return the rows of one split, in order."""
        return self.select_rows((self.frame["split"] == split).to_numpy())

    def select_rows(self, rows: NDArray[np.bool_]) -> Predictions:
        """Return the rows of a mask, in order."""
        return Predictions(self.frame[rows].reset_index(drop=True), self.task, self.classes)

    def before_calibration(self) -> Predictions:
        """Return a copy with the scores and the decisions (the most probable class) before calibration."""
        frame = self.frame.copy()
        for c in range(len(self.classes)):
            frame[f"score_{c}"] = frame[f"raw_{c}"]
        return Predictions(frame, self.task.with_decision_weights(()), self.classes)

    def fingerprint(self) -> str:
        """Return the SHA-256 of ids, content and labels, sorted by id; equal for predictions on the same test set."""
        contents = [column for column in (CONTENT,) if column in self.frame]
        columns = ["id", *contents, *self.task.label_columns(len(self.classes))]
        rows = self.frame[columns].sort_values("id", kind="stable")
        return hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest()

    def content_fingerprint(self) -> str:
        """Return the SHA-256 of the images' contents in any order; equal for the same images under other names."""
        return hashlib.sha256("".join(sorted(self.frame[CONTENT])).encode()).hexdigest()


def build_predictions(
    index: pd.DataFrame,
    labels: NDArray[np.int64],
    scores: NDArray[np.float64],
    task: Task,
    classes: tuple[str, ...],
    raw: NDArray[np.float64] | None = None,
    subgroups: pd.DataFrame | None = None,
) -> Predictions:
    """Build a predictions table.

    Args:
        index: columns `split`, `id`, `group` and, if known, `sha256`, one row per image.
        labels: (images, labels).
        scores: (images, classes).
        task: classification task, with the decision weights of the model.
        classes: class names, in the order of the scores.
        raw: scores before calibration, (images, classes); None without calibration.
        subgroups: subgroup columns, one row per image.
    """
    frame = index[["split", "id", "group", *index.columns.intersection([CONTENT])]].reset_index(drop=True)
    for column, values in zip(task.label_columns(len(classes)), labels.T, strict=True):
        frame[column] = values
    for c in range(len(classes)):
        frame[f"score_{c}"] = scores[:, c]
    for c in range(len(classes)):
        frame[f"raw_{c}"] = (scores if raw is None else raw)[:, c]
    for name, values in subgroups.items() if subgroups is not None else ():
        frame[f"{SUBGROUP_PREFIX}{name}"] = values.to_numpy()
    return Predictions(frame, task, classes)


def write(predictions: Predictions, path: Path) -> None:
    """Write the table as Parquet."""
    frame = predictions.frame.copy()
    task = predictions.task
    frame.attrs = {
        "task": task.name, "classes": list(predictions.classes), "decision_weights": list(task.decision_weights)
    }  # fmt: skip
    frame.to_parquet(path, index=False)


def read(path: Path) -> Predictions:
    """Read a table that `write` wrote; those of earlier versions have no decision weights.

    Raises:
        UserError: the file is not a predictions table.
    """
    try:
        frame = pd.read_parquet(path)
        task, classes = TASKS[frame.attrs["task"]], tuple(frame.attrs["classes"])
        task = task.with_decision_weights(frame.attrs.get("decision_weights", ()))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a predictions table ({error}); run `dvc repro evaluate` to create it") from error
    return Predictions(frame, task, classes)
