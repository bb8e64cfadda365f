"""Every image of a manifest decoded and resized once, into the arrays of `fadeformer.data.arrays`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from fadeformer.data import image_stream
from fadeformer.data.arrays import ArrayMetadata
from fadeformer.data.decode import Aspect, image_to_array
from fadeformer.data.sources.user_table import UNPARSED_LABEL
from fadeformer.errors import UnreadableImageError, UserError
from fadeformer.io.atomic import atomic_write, write_json

# Columns of a manifest that are of the files; all others go into the index: labels, and age, sex, view and the like.
FILE_COLUMNS = (
    "path", "member", "index", "sha256", "height", "width", "mode", "brightness", "contrast", "problem", UNPARSED_LABEL
)  # fmt: skip
PROGRESS_INTERVAL = 1000  # images
CHUNK_IMAGES = 64


def write_arrays(
    dataset: Mapping[str, Any],
    manifest: pd.DataFrame,
    source: Path,
    *,
    image_size: int,
    channels: int,
    aspect: Aspect,
    threads: int | None,
    split: str,
    cross_split_duplicates: int,
    folder: Path,
) -> ArrayMetadata:
    """Writes a folder of arrays; one that was begun before is gone on with.

    An image has its place from the start, so the arrays are the same for any number of threads, and after any number of
    interruptions. What is done is noted every `NOTED_EVERY` images, after it has reached the disk.

    Args:
        dataset: the data set's card, as plain values.
        manifest: one row per image, each split's in the order of its array.
        source: where the manifest's archives lie.
        image_size: side of the arrays, pixels.
        channels: 1 (grey) or 3 (colour) of the arrays.
        aspect: what becomes of an image that is not square.
        threads: that decode; None for one on each core. Memory grows with them, not with the data set.
        split: its name goes into `meta.json`, so that every result can tell it.
        cross_split_duplicates: likewise.
        folder: where they go: empty, or left by an earlier call with the same arguments.

    Raises:
        UserError: an image cannot be read.
    """
    shape = (image_size, image_size, channels)
    places = manifest.groupby("split").cumcount().to_numpy()
    counts = {str(split): int(count) for split, count in manifest["split"].value_counts(sort=False).items()}
    with contextlib.ExitStack() as stack:
        files = {
            split: stack.enter_context(_open_array_file(folder / f"{split}.npy", (n, *shape)))
            for split, n in counts.items()
        }
        starts = {split: file.tell() for split, file in files.items()}
        noted = folder / "done.npy"
        done = np.load(noted) if noted.exists() else np.zeros(len(manifest), bool)
        left = np.flatnonzero(~done)
        splits = manifest["split"].to_numpy()

        def work(_: int, image: Image.Image) -> NDArray[np.uint8]:
            return image_to_array(image, image_size, channels, aspect)

        found = image_stream.map_images(manifest.iloc[left], source, work, desc="arrays", threads=threads)
        for number, (position, pixels) in enumerate(found, start=1):
            row = left[position]
            if isinstance(pixels, UnreadableImageError):
                raise UserError(f"{pixels}; run `dvc repro validate`: the data have changed since they were checked")
            file = files[splits[row]]
            file.seek(starts[splits[row]] + int(places[row]) * pixels.nbytes)
            file.write(pixels.data)
            done[row] = True
            if number % PROGRESS_INTERVAL == 0:
                _save_progress(noted, done, files.values())
        _save_progress(noted, done, files.values())
    if not done.all():
        raise UserError(f"{source}: {int((~done).sum()):,} images of the manifest are gone; run `dvc repro validate`")
    manifest.drop(columns=[*FILE_COLUMNS], errors="ignore").to_parquet(folder / "index.parquet", index=False)
    mean, std = channel_statistics(folder / "train.npy")
    meta = ArrayMetadata(dict(dataset), image_size, channels, counts, split, cross_split_duplicates, mean, std, aspect)
    write_json(folder / "meta.json", asdict(meta))
    noted.unlink()
    return meta


def decode_to_memmap(
    manifest: pd.DataFrame, source: Path, path: Path, *, image_size: int, channels: int, aspect: Aspect
) -> NDArray[np.uint8]:
    """Every image of a manifest as one array, (images, side, side, channels), mapped into memory.

    Args:
        manifest: one row per image.
        source: where the manifest's archives lie.
        path: of the array, a `.npy`.
        image_size: side of the array, pixels.
        channels: 1 (grey) or 3 (colour).
        aspect: what becomes of an image that is not square.

    Raises:
        UserError: an image cannot be read.
    """
    found = np.lib.format.open_memmap(path, "w+", np.uint8, (len(manifest), image_size, image_size, channels))

    def work(_: int, image: Image.Image) -> NDArray[np.uint8]:
        return image_to_array(image, image_size, channels, aspect)

    for position, pixels in image_stream.map_images(manifest, source, work, desc="arrays", threads=None):
        if isinstance(pixels, UnreadableImageError):
            raise pixels
        found[position] = pixels
    return found


def _open_array_file(path: Path, shape: tuple[int, ...]) -> BinaryIO:
    """An array's file, at the place of its first element; a new one has its whole length at once."""
    exists = path.exists()
    file = path.open("r+b" if exists else "w+b")
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    if not exists:
        file.truncate(file.tell() + prod(shape))
    return file


def _save_progress(path: Path, done: NDArray[np.bool_], files: Iterable[BinaryIO]) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    with atomic_write(path) as temporary:
        np.save(temporary, done)


def channel_statistics(path: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in [0, 1], of an array of images; exact, and block by block."""
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    _, height, width, channels = images.shape
    counts = np.zeros((channels, 256), np.int64)
    size = CHUNK_IMAGES * height * width * channels
    for start in range(0, images.size, size):
        # not of the map: what is read of it counts as the process's memory
        block = np.fromfile(path, np.uint8, size, offset=images.offset + start)
        rows = block.reshape((-1, width) if channels == 1 else (-1, width, channels))
        counts += np.array(Image.fromarray(rows).histogram()).reshape(counts.shape)
    values = np.arange(256) / 255
    shares = counts / max(1, counts[0].sum())
    mean = shares @ values
    return mean.tolist(), np.sqrt(np.maximum(shares @ values**2 - mean**2, 0)).tolist()
