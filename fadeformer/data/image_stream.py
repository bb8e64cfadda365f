"""Parallel streaming of all images of a dataset, decoded once and in archive order.

Images are processed in threads: Pillow, NumPy and hashlib release the GIL. Only a few images per thread are in memory
at any time, whatever the size of the dataset.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from fadeformer.data.archives import reader
from fadeformer.data.decode import decode_image
from fadeformer.data.sources import npz
from fadeformer.errors import UnreadableImageError

Pixels = NDArray[np.uint8]
Result = TypeVar("Result")

IMAGES_PER_JOB = 8  # images that a thread processes at a time
JOBS_PER_THREAD = 3  # maximum number of queued or running jobs per thread


def map_images(
    table: pd.DataFrame,
    folder: Path,
    work: Callable[[int, Image.Image], Result],
    *,
    desc: str,
    threads: int | None = None,
    pixel_range: Sequence[Any] | None = None,
) -> Iterator[tuple[int, Result | UnreadableImageError]]:
    """Apply a function to every image in a thread pool.

    Args:
        table: one row per image: `path` (archive in `folder`) and `member` (file in the archive).
        folder: folder of the archives.
        work: function of a row position and its decoded image (Pillow mode L or RGB).
        desc: label of the progress bar.
        threads: number of threads; None for one per core.
        pixel_range: of images of more than 8 bits, see `decode_image`.

    Yields:
        Row position and result of `work`, or the exception if the image cannot be decoded; in archive order.

    Raises:
        UserError: an archive is missing or corrupt.
    """
    threads = threads or os.cpu_count() or 1
    names = table["member"].astype(str).tolist()
    stored = ((row, image, names[row]) for row, image in _iter_stored(table, folder))
    futures: deque[Future[list[tuple[int, Result | UnreadableImageError]]]] = deque()
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(table), desc=desc, unit="image", disable=None) as progress,
    ):
        while batch := list(islice(stored, IMAGES_PER_JOB)):
            futures.append(pool.submit(_process_job, work, batch, pixel_range))
            if len(futures) >= JOBS_PER_THREAD * threads:
                yield from (results := futures.popleft().result())
                progress.update(len(results))
        while futures:
            yield from (results := futures.popleft().result())
            progress.update(len(results))


def _process_job(
    work: Callable[[int, Image.Image], Result],
    batch: list[tuple[int, bytes | Pixels, str]],
    pixel_range: Sequence[Any] | None,
) -> list[tuple[int, Result | UnreadableImageError]]:
    results: list[tuple[int, Result | UnreadableImageError]] = []
    for row, image, name in batch:
        try:
            if isinstance(image, bytes):
                decoded = decode_image(image, name, pixel_range=pixel_range)
            else:
                decoded = Image.fromarray(image)
            results.append((row, work(row, decoded)))
        except UnreadableImageError as error:
            results.append((row, error))
    return results


def _iter_stored(table: pd.DataFrame, folder: Path) -> Iterator[tuple[int, bytes | Pixels]]:
    """Yield row position and stored image: file content, or pixels of an .npz archive."""
    by_path: dict[str, dict[str, int]] = {}
    for row, (path, member) in enumerate(zip(table["path"], table["member"], strict=True)):
        by_path.setdefault(path, {})[member] = row
    for path, rows in by_path.items():
        if path.endswith(".npz"):
            yield from _iter_npz(folder / path, rows)
        else:
            for member, data in reader.iter_members(folder / path, rows.__contains__):
                yield rows[member], data


def _iter_npz(archive: Path, rows: dict[str, int]) -> Iterator[tuple[int, Pixels]]:
    """Yield row position and pixels of images in an .npz archive, by member names such as `train_images/17`."""
    for key in dict.fromkeys(member.rsplit("/", 1)[0] for member in rows):
        start = 0
        for block in npz.iter_row_chunks(archive, key):
            for offset, pixels in enumerate(block):
                row = rows.get(f"{key}/{start + offset}")
                if row is not None:
                    yield row, pixels.astype(np.uint8, copy=False)
            start += len(block)
