"""Preprocessed image arrays, written once by `fadeformer.data.preprocess` and memory-mapped by all readers.

An array folder contains `{split}.npy` for each split (uint8, images x side x side x channels), `index.parquet` (one row
per image: split, id, group, content hash, labels and metadata such as age, sex and view), `meta.json` (see
`ArrayMetadata`) and, if the dataset has lesion annotations, `boxes.parquet` (see
`fadeformer.data.boxes.map_boxes_to_arrays`).
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
    """Metadata of an array folder.

    Attributes:
        dataset: dataset card as a dictionary.
        image_size: image side, pixels.
        channels: 1 (grayscale) or 3 (RGB).
        counts: number of images in each split.
        split: name of the split: `published`, or the name of the split file.
        cross_split_duplicates: number of exact duplicates across splits that data validation allowed.
        channel_mean: per-channel mean of the training pixels, in [0, 1].
        channel_std: per-channel standard deviation of the training pixels.
        aspect: treatment of images that are not square, see `fadeformer.data.decode.resize_to_square`.
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
    def input_config(self) -> dict[str, Any]:
        """How an image file becomes the input of a model, stored with the model."""
        return {
            "image_size": self.image_size, "channels": self.channels, "aspect": self.aspect,
            "pixel_range": self.dataset.get("pixel_range"),
        }  # fmt: skip

    @property
    def task(self) -> Task:
        """Classification task."""
        return TASKS[self.dataset["task"]]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes or findings."""
        return tuple(self.dataset["classes"])


@dataclass(frozen=True)
class SplitArrays:
    """Images, labels and metadata of one split.

    Attributes:
        images: uint8, (images, side, side, channels), memory-mapped.
        labels: (images, labels).
        index: one row per image: split, id, group, sha256 and other metadata, without the labels.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    index: pd.DataFrame


def read_metadata(folder: Path) -> ArrayMetadata:
    """Read `meta.json`.

    Raises:
        UserError: the file does not exist.
    """
    try:
        return ArrayMetadata(**read_json(folder / "meta.json"))
    except OSError as error:
        raise UserError(f"{folder / 'meta.json'}: not found; run `dvc repro preprocess` first") from error


def load_split(folder: Path, split: str) -> SplitArrays:
    """Load one split; its images are memory-mapped."""
    metadata = read_metadata(folder)
    index = pd.read_parquet(folder / "index.parquet")
    index = index[index["split"] == split].reset_index(drop=True)
    columns = metadata.task.label_columns(len(metadata.classes))
    labels = index[columns].to_numpy(dtype=np.int64)
    images = np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)
    return SplitArrays(images, labels, index.drop(columns=columns))


def read_boxes(folder: Path, split: str) -> pd.DataFrame | None:
    """Lesion boxes of one split; None if the dataset has no boxes."""
    if not (folder / BOXES_FILE).is_file():
        return None
    boxes = pd.read_parquet(folder / BOXES_FILE)
    return boxes[boxes["split"] == split].reset_index(drop=True)
