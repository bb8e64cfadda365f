"""What a model has seen, kept with it in numbers, so that new images can be compared with it where its data are not.

Of images of val, which are like those of train but which the network has not learned by heart (of these its scores are
too sure): the calibrated score of each class, the distance from what the network knows, what the classifier sees, and
statistics of the pixels as the network gets them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fadeformer.errors import UserError

MAX_IMAGES = 2000  # images that are kept
SEED = 0  # of the choice among more
SCORE_PREFIX, IMAGE_PREFIX, FEATURE_PREFIX = "score ", "image ", "feature "  # what names of columns begin with
OOD_DISTANCE = "OOD distance"

Pixels = NDArray[np.uint8]


def image_statistics(
    pixels: Pixels, features: NDArray[np.float32]
) -> dict[str, NDArray[np.float64] | NDArray[np.float32]]:
    """Statistics of images, and their features, by column.

    Args:
        pixels: as the network gets them, uint8, (images, side, side, channels).
        features: what the classifier sees, (images, features).
    """
    wide = pixels.astype(np.float32)
    grey = wide.mean(axis=3)
    down, across = np.abs(np.diff(grey, axis=1)), np.abs(np.diff(grey, axis=2))
    found: dict[str, NDArray[np.float64] | NDArray[np.float32]] = {
        f"{IMAGE_PREFIX}brightness": grey.mean(axis=(1, 2)),
        f"{IMAGE_PREFIX}contrast": grey.std(axis=(1, 2)),
        f"{IMAGE_PREFIX}sharpness": (down.mean(axis=(1, 2)) + across.mean(axis=(1, 2))) / 2,
        f"{IMAGE_PREFIX}black": (grey < 1).mean(axis=(1, 2)),
    }
    if pixels.shape[3] == 3:
        for channel, name in enumerate(("red", "green", "blue")):
            found[f"{IMAGE_PREFIX}{name}"] = wide[..., channel].mean(axis=(1, 2)) - grey.mean(axis=(1, 2))
    return found | {f"{FEATURE_PREFIX}{number}": column for number, column in enumerate(features.T)}


def build_reference(
    pixels: Pixels,
    scores: NDArray[np.float64],
    distances: NDArray[np.float64],
    features: NDArray[np.float32],
    classes: tuple[str, ...],
) -> pd.DataFrame:
    """What is kept of some images: one row each, at most `MOST`, drawn at random.

    Args:
        pixels: uint8, (images, side, side, channels).
        scores: calibrated, (images, classes).
        distances: from what the network knows, (images,).
        features: what the classifier sees, (images, features).
        classes: names in the order of the scores.
    """
    rows = np.sort(np.random.default_rng(SEED).permutation(len(pixels))[:MAX_IMAGES])
    return pd.DataFrame(
        {
            **{f"{SCORE_PREFIX}{name}": scores[rows, c] for c, name in enumerate(classes)},
            OOD_DISTANCE: distances[rows],
            **image_statistics(np.asarray(pixels[rows]), features[rows]),
        }
    ).astype(np.float32)


def read(path: Path, called: str) -> pd.DataFrame:
    """What `table` gave and a model carries.

    Raises:
        UserError: it is not there, or damaged.
    """
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{called}: carries no numbers of what it has seen ({path.name}: {type(error).__name__}), as a model of an"
            " older version of this program, or a damaged one; train it again"
        ) from error
