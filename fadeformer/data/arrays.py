"""Images as arrays: decoded and resized once (`fadeformer.data.preprocess`), then memory-mapped by all that reads them.

A folder of arrays holds, for each split, `{split}.npy` (uint8, images x side x side x channels), beside `index.parquet`
(one row per image: split, id, group, labels, and what else is known of it, such as age, sex and view), `meta.json`
(what a model and a reader must know of them) and, where people have drawn boxes of lesions, `boxes.parquet` (as
`fadeformer.data.boxes.map_boxes_to_arrays` gives them).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fadeformer.errors import UserError
from fadeformer.io.atomic import read_json
from fadeformer.tasks import TASKS, Task

BOXES_FILE = "boxes.parquet"


@dataclass(frozen=True)
class ArrayMetadata:
    """What a model and a reader must know of a folder of arrays.

    Attributes:
        dataset: the data set's card, as plain values.
        image_size: side of an image, pixels.
        channels: 1 (grey) or 3 (colour).
        counts: images of each split.
        split: name of the split: published, or that of the file in which it is written down.
        cross_split_duplicates: images that stand in two splits by content, as the data gate was told to allow.
        channel_mean: of the pixels of train, by channel, in [0, 1].
        channel_std: their standard deviation, likewise.
        aspect: what became of images that are not square, as `fadeformer.data.decode.resize_to_square` names it.
    """

    dataset: dict[str, Any]
    image_size: int
    channels: int
    counts: dict[str, int]
    split: str
    cross_split_duplicates: int
    channel_mean: list[float]
    channel_std: list[float]
    aspect: str

    @property
    def task(self) -> Task:
        """The kind of classification."""
        return TASKS[self.dataset["task"]]

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each class or finding."""
        return tuple(self.dataset["classes"])


@dataclass(frozen=True)
class SplitArrays:
    """One split.

    Attributes:
        pixels: uint8, (images, side, side, channels), memory-mapped.
        labels: (images, labels).
        index: split, id and group of each image, and what else is known of it.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    index: pd.DataFrame


def read_metadata(folder: Path) -> ArrayMetadata:
    """Reads `meta.json`.

    Raises:
        UserError: there is none.
    """
    try:
        return ArrayMetadata(**read_json(folder / "meta.json"))
    except OSError as error:
        raise UserError(f"{folder / 'meta.json'}: not found; run `dvc repro preprocess` first") from error


def load_split(folder: Path, split: str) -> SplitArrays:
    """Maps one split into memory."""
    meta = read_metadata(folder)
    index = pd.read_parquet(folder / "index.parquet")
    index = index[index["split"] == split].reset_index(drop=True)
    columns = meta.task.label_columns(len(meta.classes))
    labels = index[columns].to_numpy(dtype=np.int64)
    pixels = np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)
    return SplitArrays(pixels, labels, index.drop(columns=columns))


def read_boxes(folder: Path, split: str) -> pd.DataFrame | None:
    """The boxes of one split's images; None where the data set has none."""
    if not (folder / BOXES_FILE).is_file():
        return None
    boxes = pd.read_parquet(folder / BOXES_FILE)
    return boxes[boxes["split"] == split].reset_index(drop=True)
