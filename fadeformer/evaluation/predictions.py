"""Model and arrays to the predictions table, the hinge of the pipeline: every number and figure is made from it.

`predictions.parquet` has one row per image: `split`, `id`, `group`, the labels (`label`, or `label_0 ... label_{L-1}`
for multi-label tasks), one score per class (`score_0 ... score_{C-1}`, float64), the same before calibration (`raw_0
...`), and what is known of the image beside its label (`subgroup_sex` and the like). The task and the names of the
classes travel in the table's metadata, so that the file can be read without any other.
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


@dataclass(frozen=True)
class Predictions:
    """Labels and scores of some images.

    Attributes:
        frame: the table as described above.
        task: what kind of classification it is.
        classes: the name of each class or finding, in the order of the scores.
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
        """What is known of each image beside its label, a column by name."""
        found = self.frame.filter(regex=f"^{SUBGROUP_PREFIX}")
        return found.rename(columns=lambda name: name.removeprefix(SUBGROUP_PREFIX))

    def select_split(self, split: str) -> Predictions:
        """The rows of one split, in their order."""
        return self.select_rows((self.frame["split"] == split).to_numpy())

    def select_rows(self, rows: NDArray[np.bool_]) -> Predictions:
        """Some of the rows, in their order."""
        return Predictions(self.frame[rows].reset_index(drop=True), self.task, self.classes)

    def before_calibration(self) -> Predictions:
        """The same with the scores as the network gave them."""
        frame = self.frame.copy()
        for c in range(len(self.classes)):
            frame[f"score_{c}"] = frame[f"raw_{c}"]
        return Predictions(frame, self.task, self.classes)

    def fingerprint(self) -> str:
        """SHA-256 of the ids and labels, in order of id: two tables with the same one judge the same images."""
        columns = ["id", *self.task.label_columns(len(self.classes))]
        rows = self.frame[columns].sort_values("id", kind="stable")
        return hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest()


def build_predictions(
    index: pd.DataFrame,
    labels: NDArray[np.int64],
    scores: NDArray[np.float64],
    task: Task,
    classes: tuple[str, ...],
    raw: NDArray[np.float64] | None = None,
    subgroups: pd.DataFrame | None = None,
) -> Predictions:
    """Joins what is known of the images with their scores.

    Args:
        index: columns `split`, `id`, `group`, one row per image.
        labels: (images, labels).
        scores: (images, classes).
        task: what kind of classification it is.
        classes: names in the order of the scores.
        raw: scores before calibration, likewise; None where there was none.
        subgroups: what else is known of the images, one row each.
    """
    frame = index[["split", "id", "group"]].reset_index(drop=True)
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
    """Writes the table as parquet."""
    frame = predictions.frame.copy()
    frame.attrs = {"task": predictions.task.name, "classes": list(predictions.classes)}
    frame.to_parquet(path, index=False)


def read(path: Path) -> Predictions:
    """Reads a table that `write` wrote.

    Raises:
        UserError: the file is not such a table.
    """
    try:
        frame = pd.read_parquet(path)
        task, classes = TASKS[frame.attrs["task"]], tuple(frame.attrs["classes"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a predictions table ({error}); run `dvc repro evaluate` to make it") from error
    return Predictions(frame, task, classes)
