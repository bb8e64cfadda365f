"""Hand-drawn bounding boxes of lesions, for the sources that have them: only NIH ChestX-ray14."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fadeformer.data.dataset_card import DatasetCard
from fadeformer.data.sources import chestxray14
from fadeformer.errors import UserError

COLUMNS = ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]")  # NIH's header row, split at its commas
FINDING_ALIASES = {"Infiltrate": "Infiltration"}  # name in the box list: name in all other NIH tables
NIH_IMAGE_SIZE = 1024  # side of the published images; boxes are in these pixels even if the images were resized


def box_table(card: DatasetCard, folder: Path) -> pd.DataFrame | None:
    """Return all bounding boxes of a data set, including those whose image was not fetched.

    Args:
        card: the dataset card.
        folder: folder of the raw files.

    Returns:
        One row per box: `id` (of the image), `class` (index of the finding), `x`, `y`, `w`, `h` (left and upper edge,
        width and height, pixels) and `frame_width`, `frame_height` (size of the image in these pixels). None if the
        data set has no boxes.

    Raises:
        UserError: the box list is damaged.
    """
    if card.layout != "chestxray14" or chestxray14.BOX_LIST not in card.files:
        return None
    rows = read_nih_boxes(folder / chestxray14.BOX_LIST)
    class_index = {name: label for label, name in enumerate(card.classes)}
    rows.insert(1, "class", rows.pop("finding").map(class_index).astype(np.int64))
    return rows.assign(frame_width=NIH_IMAGE_SIZE, frame_height=NIH_IMAGE_SIZE)


def read_nih_boxes(path: Path) -> pd.DataFrame:
    """Read NIH's `BBox_List_2017.csv` of hand-drawn boxes.

    Its header is `Image Index,Finding Label,Bbox [x,y,w,h],,,`, so the commas inside the brackets separate columns.
    Boxes are in pixels of the published 1024 x 1024 images.

    Returns:
        One row per box: `id` (the file name), `finding`, and `x`, `y`, `w`, `h`.

    Raises:
        UserError: the file does not exist, or a row is damaged.
    """
    try:
        rows = pd.read_csv(path, dtype=str, index_col=False, skipinitialspace=True)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); fetch BBox_List_2017.csv again") from error
    header = tuple(str(name).strip() for name in rows.columns[: len(COLUMNS)])
    if header != COLUMNS:
        raise UserError(
            f"{path}: the first columns are {', '.join(header)}, but NIH's BBox_List_2017.csv has"
            f" {', '.join(COLUMNS)}; fetch BBox_List_2017.csv again"
        )
    rows = rows.iloc[:, : len(COLUMNS)].set_axis(["id", "finding", "x", "y", "w", "h"], axis=1)
    rows["finding"] = rows["finding"].replace(FINDING_ALIASES)
    _raise_if_any(path, rows["id"].isna() | rows["finding"].isna(), "has no image or no finding")
    _raise_if_any(path, ~rows["finding"].isin(chestxray14.FINDINGS), "has an unknown finding")
    boxes = rows[["x", "y", "w", "h"]].apply(pd.to_numeric, errors="coerce").astype(np.float64)
    values = boxes.to_numpy()
    is_valid = np.isfinite(values).all(axis=1) & (values[:, :2] >= 0).all(axis=1) & (values[:, 2:] > 0).all(axis=1)
    _raise_if_any(path, ~is_valid, "has no valid box: x and y must be at least 0, w and h above 0")
    return rows.assign(**{name: boxes[name] for name in boxes})


def _raise_if_any(path: Path, is_invalid: pd.Series[bool] | NDArray[np.bool_], reason: str) -> None:
    lines = np.flatnonzero(np.asarray(is_invalid)) + 2  # 1-based, after the header line
    if len(lines):
        raise UserError(f"{path}: line {lines[0]} {reason}; fetch it again")
