"""Boxes of lesions that people have drawn, of the sources that have them: NIH ChestX-ray14 alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fadeformer.data.dataset_card import DatasetCard
from fadeformer.data.sources import chestxray14
from fadeformer.errors import UserError

COLUMNS = ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]")  # of NIH's list, as commas part them
FINDING_ALIASES = {"Infiltrate": "Infiltration"}  # of that list, to what all other tables of NIH's call it
NIH_IMAGE_SIZE = 1024  # pixels of a published image, in which the list is told whatever became of the images


def box_table(facts: DatasetCard, folder: Path) -> pd.DataFrame | None:
    """Every box of a data set, whether its image is there or not.

    Args:
        facts: of the data set.
        folder: where its files lie.

    Returns:
        One row per box: `id` (of the image), `class` (number of the finding), `x`, `y`, `w`, `h` (left and upper edge,
        width and height, pixels) and `frame_width`, `frame_height` (of the image that these pixels are of). None where
        none are known.

    Raises:
        UserError: the list is damaged.
    """
    if facts.layout != "chestxray14" or chestxray14.BOX_LIST not in facts.files:
        return None
    rows = read_nih_boxes(folder / chestxray14.BOX_LIST)
    number = {name: label for label, name in enumerate(facts.classes)}
    rows.insert(1, "class", rows.pop("finding").map(number).astype(np.int64))
    return rows.assign(frame_width=NIH_IMAGE_SIZE, frame_height=NIH_IMAGE_SIZE)


def read_nih_boxes(path: Path) -> pd.DataFrame:
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
    found = tuple(str(name).strip() for name in rows.columns[: len(COLUMNS)])
    if found != COLUMNS:
        raise UserError(
            f"{path}: begins with the columns {', '.join(found)}, where NIH's BBox_List_2017.csv has"
            f" {', '.join(COLUMNS)}; it is not that file"
        )
    rows = rows.iloc[:, : len(COLUMNS)].set_axis(["id", "finding", "x", "y", "w", "h"], axis=1)
    rows["finding"] = rows["finding"].replace(FINDING_ALIASES)
    _raise_if_any(path, rows["id"].isna() | rows["finding"].isna(), "lacks an image or a finding")
    _raise_if_any(path, ~rows["finding"].isin(chestxray14.FINDINGS), "has a finding that is none of the fourteen")
    numbers = rows[["x", "y", "w", "h"]].apply(pd.to_numeric, errors="coerce").astype(np.float64)
    values = numbers.to_numpy()
    is_box = np.isfinite(values).all(axis=1) & (values[:, :2] >= 0).all(axis=1) & (values[:, 2:] > 0).all(axis=1)
    _raise_if_any(path, ~is_box, "has no box: x and y are 0 or more, w and h above 0")
    return rows.assign(**{name: numbers[name] for name in numbers})


def _raise_if_any(path: Path, wrong: pd.Series[bool] | NDArray[np.bool_], reason: str) -> None:
    lines = np.flatnonzero(np.asarray(wrong)) + 2  # counted from 1, behind the heading
    if len(lines):
        raise UserError(f"{path}: line {lines[0]} {reason}; fetch it again")
