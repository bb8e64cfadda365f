"""Map bounding boxes from original image coordinates to preprocessed array coordinates."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from fadeformer.data.decode import Aspect

FloatArray = NDArray[np.float64]

BOX_COLUMNS = ["x", "y", "w", "h"]


def map_boxes_to_arrays(boxes: pd.DataFrame, manifest: pd.DataFrame, side: int, aspect: Aspect) -> pd.DataFrame:
    """Map the boxes of all images in a manifest to array coordinates.

    Args:
        boxes: result of `fadeformer.data.sources.lesion_boxes.box_table`.
        manifest: one row per image, with `split` and `id`.
        side: image side in the arrays, pixels.
        aspect: aspect mode of the arrays.

    Returns:
        One row per box: `split`, `id`, `class`, and `x`, `y`, `w`, `h` in array pixels, NaN if the box is entirely
        outside the array.
    """
    annotated = manifest[["split", "id"]].merge(boxes, on="id", how="inner", validate="one_to_many")
    originals, frames = (
        annotated[BOX_COLUMNS].to_numpy(),
        annotated[["frame_width", "frame_height"]].to_numpy(dtype=np.int64),
    )
    mapped = np.full((len(annotated), len(BOX_COLUMNS)), np.nan)
    for width, height in np.unique(frames, axis=0).tolist():
        rows = (frames == (width, height)).all(axis=1)
        mapped[rows] = transform_boxes(originals[rows], width, height, side, aspect)
    return annotated[["split", "id", "class"]].assign(**dict(zip(BOX_COLUMNS, mapped.T, strict=True)))


def transform_boxes(boxes: ArrayLike, width: int, height: int, side: int, aspect: Aspect) -> FloatArray:
    """Map boxes of one image to the square that `fadeformer.data.decode.resize_to_square` makes of it.

    Args:
        boxes: x, y, width and height in original pixels, (boxes, 4).
        width: width of the original image, pixels.
        height: height of the original image, pixels.
        side: side of the square, pixels.
        aspect: aspect mode of `resize_to_square`.

    Returns:
        x, y, width and height in pixels of the square, (boxes, 4), clipped to the square; NaN for a box outside it.
    """
    original = np.asarray(boxes, dtype=np.float64)
    scale, offset = _resize_transform(width, height, side, aspect)
    start = np.clip(original[:, :2] * scale + offset, 0, side)
    end = np.clip((original[:, :2] + original[:, 2:]) * scale + offset, 0, side)
    is_visible = (end > start).all(axis=1, keepdims=True)
    return np.where(is_visible, np.concatenate([start, end - start], axis=1), np.nan)


def _resize_transform(width: int, height: int, side: int, aspect: Aspect) -> tuple[FloatArray, FloatArray]:
    """Scale and offset for x and y, exactly as `resize_to_square` computes them (compared in a test)."""
    size = np.array([width, height])
    if aspect == "squash":
        return side / size, np.zeros(2)
    if aspect == "crop":
        short = size.min()
        return np.full(2, side / short), -((size - short) // 2) * side / short
    long = size.max()
    inner = np.maximum(1, (2 * size * side + long) // (2 * long))
    return inner / size, ((side - inner) // 2).astype(np.float64)
