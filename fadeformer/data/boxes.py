"""Boxes in pixels of an original image to pixels of the array that was made of it."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from fadeformer.data.decode import Aspect

FloatArray = NDArray[np.float64]

BOX_COLUMNS = ["x", "y", "w", "h"]


def map_boxes_to_arrays(boxes: pd.DataFrame, manifest: pd.DataFrame, side: int, aspect: Aspect) -> pd.DataFrame:
    """The boxes of the images of a manifest, where they lie in its arrays.

    Args:
        boxes: of `fadeformer.data.sources.lesion_boxes.box_table`.
        manifest: one row per image, with `split` and `id`.
        side: of the arrays, pixels.
        aspect: with which they are made.

    Returns:
        One row per box: `split`, `id`, `class`, and `x`, `y`, `w`, `h` in pixels of the array, null where nothing of
        the box is in it.
    """
    known = manifest[["split", "id"]].merge(boxes, on="id", how="inner", validate="one_to_many")
    given, frames = known[BOX_COLUMNS].to_numpy(), known[["frame_width", "frame_height"]].to_numpy(dtype=np.int64)
    placed = np.full((len(known), len(BOX_COLUMNS)), np.nan)
    for width, height in np.unique(frames, axis=0).tolist():
        rows = (frames == (width, height)).all(axis=1)
        placed[rows] = transform_boxes(given[rows], width, height, side, aspect)
    return known[["split", "id", "class"]].assign(**dict(zip(BOX_COLUMNS, placed.T, strict=True)))


def transform_boxes(boxes: ArrayLike, width: int, height: int, side: int, aspect: Aspect) -> FloatArray:
    """Boxes of an original image to pixels of the square that `fadeformer.data.decode.resize_to_square` makes of it.

    Args:
        boxes: (boxes, 4).
        width: of the original, pixels.
        height: of the original, pixels.
        side: of the square, pixels.
        aspect: as there.

    Returns:
        (boxes, 4), each cut at the square's edges; NaN of a box of which nothing is left.
    """
    given = np.asarray(boxes, dtype=np.float64)
    scale, offset = _resize_transform(width, height, side, aspect)
    begin = np.clip(given[:, :2] * scale + offset, 0, side)
    end = np.clip((given[:, :2] + given[:, 2:]) * scale + offset, 0, side)
    is_left = (end > begin).all(axis=1, keepdims=True)
    return np.where(is_left, np.concatenate([begin, end - begin], axis=1), np.nan)


def _resize_transform(width: int, height: int, side: int, aspect: Aspect) -> tuple[FloatArray, FloatArray]:
    """Scale and offset, each of x and y, to the last pixel as `resize` computes them (a test compares)."""
    size = np.array([width, height])
    if aspect == "squash":
        return side / size, np.zeros(2)
    if aspect == "crop":
        short = size.min()
        return np.full(2, side / short), -((size - short) // 2) * side / short
    long = size.max()
    inner = np.maximum(1, (2 * size * side + long) // (2 * long))
    return inner / size, ((side - inner) // 2).astype(np.float64)
