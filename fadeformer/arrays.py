"""Images as arrays: decoded and resized once, then memory-mapped by everything that reads them.

A folder of arrays holds, for each split, `{split}.npy` (uint8, images x side x side x channels), beside `index.parquet`
(one row per image: split, id, group and labels) and `meta.json` (what a model and a reader must know of them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from fadeformer.errors import UserError
from fadeformer.files import read_json, write_json
from fadeformer.tasks import TASKS, Task


@dataclass(frozen=True)
class Meta:
    """What a model and a reader must know of a folder of arrays.

    Attributes:
        dataset: the data set's card, as plain values.
        image_size: side of an image, pixels.
        channels: 1 (grey) or 3 (colour).
        counts: images of each split.
        cross_split_duplicates: images that stand in two splits by content, as the data gate was told to allow.
    """

    dataset: dict[str, Any]
    image_size: int
    channels: int
    counts: dict[str, int]
    cross_split_duplicates: int

    @property
    def task(self) -> Task:
        """The kind of classification."""
        return TASKS[self.dataset["task"]]

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each class or finding."""
        return tuple(self.dataset["classes"])


@dataclass(frozen=True)
class Images:
    """One split.

    Attributes:
        pixels: uint8, (images, side, side, channels), memory-mapped.
        labels: (images, labels).
        index: split, id and group of each image.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    index: pd.DataFrame


def write(
    dataset: Mapping[str, Any],
    index: pd.DataFrame,
    images: Mapping[str, Iterable[NDArray[np.uint8]]],
    *,
    image_size: int,
    channels: int,
    cross_split_duplicates: int,
    folder: Path,
) -> Meta:
    """Writes a folder of arrays.

    Args:
        dataset: the data set's card, as plain values.
        index: one row per image: split, id, group and the label columns of the task.
        images: the pixels of each split, in the index's order, (height, width) or (height, width, 3).
        image_size: side of the arrays, pixels.
        channels: 1 (grey) or 3 (colour) of the arrays.
        cross_split_duplicates: goes into `meta.json`, so that every result can tell it.
        folder: where they go.
    """
    counts = {split: int((index["split"] == split).sum()) for split in images}
    for split, count in counts.items():
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, image_size, image_size, channels)}
        progress = tqdm(images[split], total=count, desc=f"arrays {split}", unit="image", disable=None)
        with (folder / f"{split}.npy").open("wb") as file:  # a memory map would die of a full disk without a message
            np.lib.format.write_array_header_1_0(file, header)
            for _, pixels in zip(range(count), progress, strict=True):
                file.write(_fit(pixels, image_size, channels).tobytes())
    index.to_parquet(folder / "index.parquet", index=False)
    meta = Meta(dict(dataset), image_size, channels, counts, cross_split_duplicates)
    write_json(folder / "meta.json", asdict(meta))
    return meta


def read_meta(folder: Path) -> Meta:
    """Reads `meta.json`.

    Raises:
        UserError: there is none.
    """
    try:
        return Meta(**read_json(folder / "meta.json"))
    except OSError as error:
        raise UserError(f"{folder / 'meta.json'}: not found; run `dvc repro preprocess` first") from error


def read(folder: Path, split: str) -> Images:
    """Maps one split into memory."""
    meta = read_meta(folder)
    index = pd.read_parquet(folder / "index.parquet")
    index = index[index["split"] == split].reset_index(drop=True)
    labels = index[meta.task.label_columns(len(meta.classes))].to_numpy(dtype=np.int64)
    pixels = np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)
    return Images(pixels, labels, index[["split", "id", "group"]])


def _fit(pixels: NDArray[np.uint8], side: int, channels: int) -> NDArray[np.uint8]:
    """Converts between grey and colour and resizes, bilinear; pixels that fit already stay as they are."""
    if pixels.shape[:2] == (side, side) and (pixels.ndim == 3) == (channels == 3):
        return pixels.reshape(side, side, channels)
    image = Image.fromarray(pixels).convert("RGB" if channels == 3 else "L")
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8).reshape(side, side, channels)
