"""Reference data of a model for drift detection, stored with the model so that no training images are needed.

One row per image: calibrated scores, OOD distance, penultimate features and pixel statistics of the model input.
Scores, distances and features are those of val, because a network is overconfident on train. Pixel statistics do not
depend on the network: those of train are added, because val often has few patients. The group (patient, lesion or
slide) is a number, so that the model names no patient.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fadeformer.errors import UserError
from fadeformer.evaluation.intervals import bootstrap

MAX_IMAGES = 2000  # rows of each split
SEED = 0  # of the random subset of more images
SCORE_PREFIX, IMAGE_PREFIX, FEATURE_PREFIX = "score ", "image ", "feature "  # of column names
OOD_DISTANCE = "OOD distance"
GROUP = "group"
IMAGES_PER_GROUP = "images_per_group"  # key of `DataFrame.attrs`, which is stored in the file

ImageArray = NDArray[np.uint8]
Columns = dict[str, NDArray[np.float64] | NDArray[np.float32]]


def pixel_statistics(images: ImageArray) -> Columns:
    """Compute pixel statistics, by column name, each (images,).

    Args:
        images: model input, uint8, (images, side, side, channels).
    """
    values = images.astype(np.float32)
    gray = values.mean(axis=3)
    dy, dx = np.abs(np.diff(gray, axis=1)), np.abs(np.diff(gray, axis=2))
    columns: Columns = {
        f"{IMAGE_PREFIX}brightness": gray.mean(axis=(1, 2)),
        f"{IMAGE_PREFIX}contrast": gray.std(axis=(1, 2)),
        f"{IMAGE_PREFIX}sharpness": (dy.mean(axis=(1, 2)) + dx.mean(axis=(1, 2))) / 2,
        f"{IMAGE_PREFIX}black": (gray < 1).mean(axis=(1, 2)),
    }
    if images.shape[3] == 3:
        for channel, name in enumerate(("red", "green", "blue")):
            columns[f"{IMAGE_PREFIX}{name}"] = values[..., channel].mean(axis=(1, 2)) - gray.mean(axis=(1, 2))
    return columns


def image_statistics(images: ImageArray, features: NDArray[np.float32]) -> Columns:
    """Compute pixel statistics and list the features, by column name.

    Args:
        images: model input, uint8, (images, side, side, channels).
        features: penultimate features, (images, features).
    """
    return pixel_statistics(images) | {f"{FEATURE_PREFIX}{index}": column for index, column in enumerate(features.T)}


def build_reference(
    images: ImageArray,
    scores: NDArray[np.float64],
    distances: NDArray[np.float64],
    features: NDArray[np.float32],
    classes: tuple[str, ...],
    train_images: ImageArray,
    groups: tuple[pd.Series, pd.Series],
) -> pd.DataFrame:
    """Build the reference table: one row per image; of val and of train a random subset if they exceed `MAX_IMAGES`.

    Args:
        images: model input of val, uint8, (images, side, side, channels).
        scores: calibrated, (images, classes).
        distances: OOD distances, (images,).
        features: penultimate features, (images, features).
        classes: class names, in the order of the scores.
        train_images: model input of train, uint8, (images, side, side, channels).
        groups: of the images of val and of train; an image whose group is missing is its own group.

    Returns:
        The columns of val; in the rows of train only pixel statistics and groups, the others are missing.
    """
    codes, images_per_group = _encode_groups(groups)
    rows, train_rows = (
        np.sort(np.random.default_rng(SEED).permutation(len(split))[:MAX_IMAGES]) for split in (images, train_images)
    )
    val = {
        **{f"{SCORE_PREFIX}{name}": scores[rows, c] for c, name in enumerate(classes)},
        OOD_DISTANCE: distances[rows],
        **image_statistics(np.asarray(images[rows]), features[rows]),
    }
    train = pixel_statistics(np.asarray(train_images[train_rows]))
    table = pd.concat([pd.DataFrame(val), pd.DataFrame(train)], ignore_index=True).astype(np.float32)
    table[GROUP] = np.concatenate([codes[rows], codes[len(images) + train_rows]])
    table.attrs = {IMAGES_PER_GROUP: images_per_group}
    return table


def _encode_groups(groups: tuple[pd.Series, pd.Series]) -> tuple[NDArray[np.int64], float]:
    """Return the group codes of val and train, and the mean number of images per group."""
    codes = bootstrap.encode_groups(pd.concat(groups, ignore_index=True))
    return codes, len(codes) / len(np.unique(codes))


def read(path: Path, model_name: str) -> pd.DataFrame:
    """Read the reference table of a model.

    Raises:
        UserError: the file is missing, damaged or without groups.
    """
    problem = "has no groups"
    try:
        table = pd.read_parquet(path)
        if GROUP in table and IMAGES_PER_GROUP in table.attrs:
            return table
    except (OSError, ValueError) as error:
        problem = type(error).__name__
    raise UserError(
        f"{model_name}: has no reference data for drift detection ({path.name}: {problem}); the model is damaged or was"
        " written by an older version of this program; train it again"
    )
