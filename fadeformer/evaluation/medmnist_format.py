"""Result file in the MedMNIST format, for `python -m medmnist evaluate` (medmnist 3.0.2, `evaluator.py`)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fadeformer.evaluation.metrics import medmnist_accuracy, medmnist_auc
from fadeformer.evaluation.predictions import Predictions

README_TEXT = "Scores for `python -m medmnist evaluate`; only for MedMNIST data sets in their published split.\n"


def write(predictions: Predictions, folder: Path, *, flag: str, size: int, split: str, run: str) -> Path | None:
    """Write the scores of one split: no header; per row the index in the published arrays and the scores.

    Args:
        predictions: of one published split of a MedMNIST data set; the index follows the last / of each id.
        folder: output folder.
        flag: MedMNIST name of the data set.
        size: side of an image, pixels.
        split: train, val or test.
        run: suffix that identifies the run.

    Returns:
        The path, or None if the official AUC, which is part of the file name, is undefined because a class is absent.
    """
    auc = medmnist_auc(predictions.labels, predictions.scores, predictions.task.name)
    if auc is None:
        return None
    accuracy = medmnist_accuracy(predictions.labels, predictions.scores, predictions.task.name)
    size_suffix = "" if size == 28 else f"_{size}"
    path = folder / f"{flag}{size_suffix}_{split}_[AUC]{auc:.3f}_[ACC]{accuracy:.3f}@{run}.csv"
    index = predictions.frame["id"].str.rpartition("/")[2].astype(int)
    pd.DataFrame(predictions.scores, index=index).sort_index().to_csv(path, header=False)
    return path
