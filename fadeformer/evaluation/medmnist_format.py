"""MedMNIST's standard result file, which `python -m medmnist evaluate` reads (medmnist 3.0.2, `evaluator.py`)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fadeformer.evaluation.metrics import medmnist_accuracy, medmnist_auc
from fadeformer.evaluation.predictions import Predictions

README_TEXT = "Scores as `python -m medmnist evaluate` reads them, of MedMNIST's sets in their published split only.\n"


def write(predictions: Predictions, folder: Path, *, flag: str, size: int, split: str, run: str) -> Path | None:
    """Writes one split's scores: no heading, and in each row an image's index in the published arrays and its scores.

    Args:
        predictions: of one split of a MedMNIST set as it is published, the index behind the last / of each id.
        folder: where the file goes.
        flag: MedMNIST's name of the set.
        size: side of an image, pixels.
        split: train, val or test.
        run: what tells this file from those of other runs.

    Returns:
        Its path, or None where the official AUC does not exist, since a class is absent: the name holds it.
    """
    area = medmnist_auc(predictions.labels, predictions.scores, predictions.task.name)
    if area is None:
        return None
    share = medmnist_accuracy(predictions.labels, predictions.scores, predictions.task.name)
    of_size = "" if size == 28 else f"_{size}"
    path = folder / f"{flag}{of_size}_{split}_[AUC]{area:.3f}_[ACC]{share:.3f}@{run}.csv"
    index = predictions.frame["id"].str.rpartition("/")[2].astype(int)
    pd.DataFrame(predictions.scores, index=index).sort_index().to_csv(path, header=False)
    return path
