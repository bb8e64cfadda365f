"""Decode and resize all images of a manifest into the arrays of `fadeformer.data.arrays`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
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

# Manifest columns that describe the image file; the content hash and all others (labels, age, sex, view, ...) go into
# index.parquet.
FILE_COLUMNS = (
    "path",
    "member",
    "index",
    "height",
    "width",
    "mode",
    "brightness",
    "contrast",
    "problem",
    UNPARSED_LABEL,
)
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
    """Write an array folder; resumes an interrupted call.

    Each image has a fixed position in its array, so the result does not depend on the number of threads or of
    interruptions. Progress is saved every `PROGRESS_INTERVAL` images, after the pixels are flushed to disk.

    Args:
        dataset: dataset card as a dictionary.
        manifest: one row per image, the rows of each split in array order.
        source: folder of the manifest's archives.
        image_size: image side in the arrays, pixels.
        channels: channels of the arrays, 1 (grayscale) or 3 (RGB).
        aspect: treatment of images that are not square.
        threads: number of decoding threads; None for one per core. Memory grows with the threads, not the dataset.
        split: name of the split, saved in `meta.json`.
        cross_split_duplicates: number of allowed duplicates across splits, saved in `meta.json`.
        folder: output folder: empty, or left by an interrupted call with the same arguments.

    Returns:
        The content of `meta.json`.

    Raises:
        UserError: an image is missing or cannot be decoded.
    """
    shape = (image_size, image_size, channels)
    positions = manifest.groupby("split").cumcount().to_numpy()
    counts = {str(split): int(count) for split, count in manifest["split"].value_counts(sort=False).items()}
    with contextlib.ExitStack() as stack:
        files = {
            split: stack.enter_context(_open_array_file(folder / f"{split}.npy", (n, *shape)))
            for split, n in counts.items()
        }
        starts = {split: file.tell() for split, file in files.items()}
        progress = folder / "done.npy"
        done = np.load(progress) if progress.exists() else np.zeros(len(manifest), bool)
        remaining = np.flatnonzero(~done)
        splits = manifest["split"].to_numpy()

        def work(_: int, image: Image.Image) -> NDArray[np.uint8]:
            return image_to_array(image, image_size, channels, aspect)

        results = image_stream.map_images(
            manifest.iloc[remaining],
            source,
            work,
            desc="arrays",
            threads=threads,
            pixel_range=dataset.get("pixel_range"),
        )
        for number, (position, pixels) in enumerate(results, start=1):
            row = remaining[position]
            if isinstance(pixels, UnreadableImageError):
                raise UserError(f"{pixels}; the data changed after validation: run `dvc repro validate`")
            file = files[splits[row]]
            file.seek(starts[splits[row]] + int(positions[row]) * pixels.nbytes)
            file.write(pixels.data)
            done[row] = True
            if number % PROGRESS_INTERVAL == 0:
                _save_progress(progress, done, files.values())
        _save_progress(progress, done, files.values())
    if not done.all():
        raise UserError(
            f"{source}: {int((~done).sum()):,} images of the manifest no longer exist; run `dvc repro validate`"
        )
    manifest.drop(columns=[*FILE_COLUMNS], errors="ignore").to_parquet(folder / "index.parquet", index=False)
    mean, std = channel_statistics(folder / "train.npy")
    metadata = ArrayMetadata(
        dict(dataset), image_size, channels, counts, split, cross_split_duplicates, mean, std, aspect
    )
    write_json(folder / "meta.json", asdict(metadata))
    progress.unlink()
    return metadata


def decode_to_memmap(
    manifest: pd.DataFrame,
    source: Path,
    path: Path,
    *,
    image_size: int,
    channels: int,
    aspect: Aspect,
    pixel_range: Sequence[Any] | None = None,
) -> NDArray[np.uint8]:
    """Decode all images of a manifest into one memory-mapped array (images, side, side, channels).

    Args:
        manifest: one row per image.
        source: folder of the manifest's archives.
        path: `.npy` file to create.
        image_size: image side in the array, pixels.
        channels: 1 (grayscale) or 3 (RGB).
        aspect: treatment of images that are not square.
        pixel_range: of images of more than 8 bits, see `fadeformer.data.decode.decode_image`.

    Raises:
        UserError: an image cannot be decoded.
    """
    arrays = np.lib.format.open_memmap(path, "w+", np.uint8, (len(manifest), image_size, image_size, channels))

    def work(_: int, image: Image.Image) -> NDArray[np.uint8]:
        return image_to_array(image, image_size, channels, aspect)

    for position, pixels in image_stream.map_images(manifest, source, work, desc="arrays", pixel_range=pixel_range):
        if isinstance(pixels, UnreadableImageError):
            raise pixels
        arrays[position] = pixels
    return arrays


def _open_array_file(path: Path, shape: tuple[int, ...]) -> BinaryIO:
    """Open a `.npy` file for writing, positioned at its first element; a new file is allocated at full length."""
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
    """Exact per-channel mean and standard deviation of a uint8 image array scaled to [0, 1], computed in chunks."""
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    _, height, width, channels = images.shape
    counts = np.zeros((channels, 256), np.int64)
    size = CHUNK_IMAGES * height * width * channels
    for start in range(0, images.size, size):
        # read from the file: pages of a memory map would count toward the memory of the process
        block = np.fromfile(path, np.uint8, size, offset=images.offset + start)
        rows = block.reshape((-1, width) if channels == 1 else (-1, width, channels))
        counts += np.array(Image.fromarray(rows).histogram()).reshape(counts.shape)
    values = np.arange(256) / 255
    frequencies = counts / max(1, counts[0].sum())
    mean = frequencies @ values
    return mean.tolist(), np.sqrt(np.maximum(frequencies @ values**2 - mean**2, 0)).tolist()
