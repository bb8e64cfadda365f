"""The pointing game: whether the largest value of a map lies on the lesion (Zhang et al. 2018).

"Top-down neural attention by excitation backprop", Int. J. Comput. Vis. 126, doi:10.1007/s11263-017-1059-x. Boxes are
x, y, w, h: left and upper edge, width and height, in pixels of the original image, whose left upper corner is 0, 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from fadeformer.datasets.chestxray14 import FINDINGS
from fadeformer.decode import Aspect
from fadeformer.errors import UserError
from fadeformer.explanations import Floats, is_flat

BOX_COLUMNS = ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]")  # as commas part them
RENAMED = {"Infiltrate": "Infiltration"}  # of the box list, to what all other tables of NIH's call it


@dataclass(frozen=True)
class Pointing:
    """How often maps point at the right place.

    Attributes:
        hits: images whose map is largest inside a box.
        images: that were judged.
        share: hits of them; None if there are none.
        chance: the share to expect of maps that point anywhere on their grid; None likewise.
        flat: judged images whose map has one value everywhere, which points nowhere: no hits.
        unreachable: judged images in whose boxes no middle of a patch lies, so that no map of this grid could hit.
        outside: images that are not judged, since nothing of their boxes is in the array (aspect `crop`).
    """

    hits: int
    images: int
    share: float | None
    chance: float | None
    flat: int
    unreachable: int
    outside: int


def pointing(
    maps: Floats,
    boxes: Sequence[ArrayLike],
    sizes: ArrayLike,
    side: int,
    aspect: Aspect,
    margin: float = 0.0,
) -> Pointing:
    """Counts the images whose map is largest inside one of their boxes.

    The map's largest value stands at the middle of its patch, and so does that of its bilinear upsampling; of equal
    ones the first in reading order counts.

    Args:
        maps: (images, height, width), of a grid of patches or upsampled.
        boxes: of each image, (1 or more, 4), in pixels of the original.
        sizes: (images, 2), width and height of each original, pixels.
        side: of the arrays that the maps were made from, pixels.
        aspect: with which the arrays were made.
        margin: pixels of the array around a box that count as well; Zhang et al. allow 15 pixels of the original.

    Raises:
        ValueError: boxes or sizes do not fit the maps, or are no boxes or sizes.
    """
    sizes = np.asarray(sizes, dtype=np.float64)
    if len(boxes) != len(maps) or sizes.shape != (len(maps), 2):
        raise ValueError(f"{len(maps)} maps need as many boxes and sizes, not {len(boxes)} and {sizes.shape}")
    height, width = maps.shape[1:]
    down, across = ((np.arange(n) + 0.5) * side / n for n in (height, width))  # middles of the patches
    hits, chances, flat, outside = 0, [], 0, 0
    for one, given, (original_width, original_height), is_empty in zip(maps, boxes, sizes, is_flat(maps), strict=True):
        mapped = boxes_in_array(given, int(original_width), int(original_height), side, aspect)
        if len(mapped) == 0:
            outside += 1
            continue
        x, y, w, h = mapped.T[..., None]  # each boxes, 1
        in_rows = (down >= y - margin) & (down < y + h + margin)  # boxes, height
        in_columns = (across >= x - margin) & (across < x + w + margin)  # boxes, width
        inside = (in_rows[:, :, None] & in_columns[:, None, :]).any(axis=0)  # height, width
        chances.append(float(inside.mean()))
        flat += int(is_empty)
        hits += int(not is_empty and inside.flat[one.argmax()])
    images = len(chances)
    return Pointing(
        hits=hits,
        images=images,
        share=hits / images if images else None,
        chance=float(np.mean(chances)) if images else None,
        flat=flat,
        unreachable=chances.count(0.0),
        outside=outside,
    )


def boxes_in_array(boxes: ArrayLike, width: int, height: int, side: int, aspect: Aspect) -> Floats:
    """Boxes of an original image to pixels of the square that `fadeformer.decode.resize` makes of it.

    Args:
        boxes: (boxes, 4).
        width: of the original, pixels.
        height: of the original, pixels.
        side: of the square, pixels.
        aspect: as there.

    Returns:
        (boxes, 4), each cut at the square's edges; a box of which nothing is left is left out.

    Raises:
        ValueError: these are no boxes, no size or no aspect.
    """
    given = np.asarray(boxes, dtype=np.float64)
    if given.ndim != 2 or given.shape[1:] != (4,) or not np.isfinite(given).all() or (given[:, 2:] <= 0).any():
        raise ValueError("boxes are rows of x, y, w and h, of which w and h are above 0")
    if min(width, height, side) < 1:
        raise ValueError(f"an image of {width} x {height} pixels, or an array of {side}, there is not")
    scale, offset = _geometry(width, height, side, aspect)
    begin = np.clip(given[:, :2] * scale + offset, 0, side)
    end = np.clip((given[:, :2] + given[:, 2:]) * scale + offset, 0, side)
    return np.concatenate([begin, end - begin], axis=1)[(end > begin).all(axis=1)]


def _geometry(width: int, height: int, side: int, aspect: Aspect) -> tuple[Floats, Floats]:
    """Scale and offset, each of x and y, to the last pixel as `resize` computes them (a test compares)."""
    size = np.array([width, height])
    if aspect == "squash":
        return side / size, np.zeros(2)
    if aspect == "crop":
        short = size.min()
        return np.full(2, side / short), -((size - short) // 2) * side / short
    if aspect == "pad":
        long = size.max()
        inner = np.maximum(1, (2 * size * side + long) // (2 * long))
        return inner / size, ((side - inner) // 2).astype(np.float64)
    raise ValueError(f"aspect is {aspect!r}; it must be 'squash', 'crop' or 'pad'")


def read_boxes(path: Path) -> pd.DataFrame:
    """Reads NIH's `BBox_List_2017.csv`: boxes of lesions that were drawn by hand, for some hundred images.

    Its heading is `Image Index,Finding Label,Bbox [x,y,w,h],,,`, so its commas part it as they do the rows. Boxes are
    in pixels of the published images, of 1024 x 1024. Its `Infiltrate` is `Infiltration` in all other tables.

    Returns:
        One row per box: `id` (the file's name), `finding`, and `x`, `y`, `w`, `h`.

    Raises:
        UserError: there is no such table, or a row of it is damaged.
    """
    try:
        rows = pd.read_csv(path, dtype=str, index_col=False, skipinitialspace=True)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); fetch BBox_List_2017.csv again") from error
    found = tuple(str(name).strip() for name in rows.columns[: len(BOX_COLUMNS)])
    if found != BOX_COLUMNS:
        raise UserError(
            f"{path}: begins with the columns {', '.join(found)}, where NIH's BBox_List_2017.csv has"
            f" {', '.join(BOX_COLUMNS)}; it is not that file"
        )
    rows = rows.iloc[:, : len(BOX_COLUMNS)].set_axis(["id", "finding", "x", "y", "w", "h"], axis=1)
    rows["finding"] = rows["finding"].replace(RENAMED)
    _refuse(path, rows["id"].isna() | rows["finding"].isna(), "lacks an image or a finding")
    _refuse(path, ~rows["finding"].isin(FINDINGS), "has a finding that is none of the fourteen")
    numbers = rows[["x", "y", "w", "h"]].apply(pd.to_numeric, errors="coerce").astype(np.float64)
    values = numbers.to_numpy()
    is_box = np.isfinite(values).all(axis=1) & (values[:, :2] >= 0).all(axis=1) & (values[:, 2:] > 0).all(axis=1)
    _refuse(path, ~is_box, "has no box: x and y are 0 or more, w and h above 0")
    return rows.assign(**{name: numbers[name] for name in numbers})


def _refuse(path: Path, wrong: pd.Series[bool] | NDArray[np.bool_], reason: str) -> None:
    lines = np.flatnonzero(np.asarray(wrong)) + 2  # counted from 1, behind the heading
    if len(lines):
        raise UserError(f"{path}: line {lines[0]} {reason}; fetch it again")
