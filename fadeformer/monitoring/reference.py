"""Reference data of a model for drift detection, stored with the model so that no training images are needed.

One row per val image: calibrated scores, OOD distance, penultimate features and pixel statistics of the model input.
Val is used because the scores on train are overconfident.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fadeformer.errors import UserError

MAX_IMAGES = 2000  # rows of the table
SEED = 0  # of the random subset of more images
SCORE_PREFIX, IMAGE_PREFIX, FEATURE_PREFIX = "score ", "image ", "feature "  # of column names
OOD_DISTANCE = "OOD distance"

ImageArray = NDArray[np.uint8]


def image_statistics(
    images: ImageArray, features: NDArray[np.float32]
) -> dict[str, NDArray[np.float64] | NDArray[np.float32]]:
    """Compute pixel statistics and list the features, by column name.

    Args:
        images: model input, uint8, (images, side, side, channels).
        features: penultimate features, (images, features).
    """
    values = images.astype(np.float32)
    gray = values.mean(axis=3)
    dy, dx = np.abs(np.diff(gray, axis=1)), np.abs(np.diff(gray, axis=2))
    columns: dict[str, NDArray[np.float64] | NDArray[np.float32]] = {
        f"{IMAGE_PREFIX}brightness": gray.mean(axis=(1, 2)),
        f"{IMAGE_PREFIX}contrast": gray.std(axis=(1, 2)),
        f"{IMAGE_PREFIX}sharpness": (dy.mean(axis=(1, 2)) + dx.mean(axis=(1, 2))) / 2,
        f"{IMAGE_PREFIX}black": (gray < 1).mean(axis=(1, 2)),
    }
    if images.shape[3] == 3:
        for channel, name in enumerate(("red", "green", "blue")):
            columns[f"{IMAGE_PREFIX}{name}"] = values[..., channel].mean(axis=(1, 2)) - gray.mean(axis=(1, 2))
    return columns | {f"{FEATURE_PREFIX}{index}": column for index, column in enumerate(features.T)}


def build_reference(
    images: ImageArray,
    scores: NDArray[np.float64],
    distances: NDArray[np.float64],
    features: NDArray[np.float32],
    classes: tuple[str, ...],
) -> pd.DataFrame:
    """Build the reference table: one row per image, a random subset of `MAX_IMAGES` if there are more.

    Args:
        images: model input, uint8, (images, side, side, channels).
        scores: calibrated, (images, classes).
        distances: OOD distances, (images,).
        features: penultimate features, (images, features).
        classes: class names, in the order of the scores.
    """
    rows = np.sort(np.random.default_rng(SEED).permutation(len(images))[:MAX_IMAGES])
    return pd.DataFrame(
        {
            **{f"{SCORE_PREFIX}{name}": scores[rows, c] for c, name in enumerate(classes)},
            OOD_DISTANCE: distances[rows],
            **image_statistics(np.asarray(images[rows]), features[rows]),
        }
    ).astype(np.float32)


def read(path: Path, model_name: str) -> pd.DataFrame:
    """Read the reference table of a model.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model_name}: has no reference data for drift detection ({path.name}: {type(error).__name__}); the model"
            " is damaged or was written by an older version of this program; train it again"
        ) from error
