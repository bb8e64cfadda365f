"""Every image of a data set, once, in the order in which the archives hold them, decoded by all cores.

What is done with an image runs in threads: Pillow, numpy and hashlib let go of the interpreter while they work. No more
images are in memory than a few for each thread, however many the data set has.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

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

IMAGES_PER_JOB = 8  # images that are handed to a thread at once
JOBS_PER_THREAD = 3  # such hands for each thread that may wait or be under way


def map_images(
    table: pd.DataFrame,
    folder: Path,
    work: Callable[[int, Image.Image], Result],
    *,
    desc: str,
    threads: int | None = None,
) -> Iterator[tuple[int, Result | UnreadableImageError]]:
    """Does some work on every image.

    Args:
        table: one row per image: `path` (of the archive, in `folder`) and `member` (in the archive).
        folder: where the archives lie.
        work: what is done with the position of a row and its image, of Pillow's mode L or RGB.
        desc: is done, for the progress bar.
        threads: None for one on each core.

    Yields:
        Position of the row in the table and what the work returned, in the archives' order; of an image that cannot be
        read, why.

    Raises:
        UserError: an archive is missing or damaged as a whole.
    """
    threads = threads or os.cpu_count() or 1
    names = table["member"].astype(str).tolist()
    stored = ((row, image, names[row]) for row, image in _iter_stored(table, folder))
    waiting: deque[Future[list[tuple[int, Result | UnreadableImageError]]]] = deque()
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(table), desc=desc, unit="image", disable=None) as progress,
    ):
        while some := list(islice(stored, IMAGES_PER_JOB)):
            waiting.append(pool.submit(_process_job, work, some))
            if len(waiting) >= JOBS_PER_THREAD * threads:
                yield from (done := waiting.popleft().result())
                progress.update(len(done))
        while waiting:
            yield from (done := waiting.popleft().result())
            progress.update(len(done))


def _process_job(
    work: Callable[[int, Image.Image], Result], some: list[tuple[int, bytes | Pixels, str]]
) -> list[tuple[int, Result | UnreadableImageError]]:
    done: list[tuple[int, Result | UnreadableImageError]] = []
    for row, image, name in some:
        try:
            done.append(
                (row, work(row, decode_image(image, name) if isinstance(image, bytes) else Image.fromarray(image)))
            )
        except UnreadableImageError as error:
            done.append((row, error))
    return done


def _iter_stored(table: pd.DataFrame, folder: Path) -> Iterator[tuple[int, bytes | Pixels]]:
    """Rows and what the archives hold of them: bytes of a file, or pixels."""
    of_path: dict[str, dict[str, int]] = {}
    for row, (path, member) in enumerate(zip(table["path"], table["member"], strict=True)):
        of_path.setdefault(path, {})[member] = row
    for path, rows in of_path.items():
        if path.endswith(".npz"):
            yield from _iter_npz(folder / path, rows)
        else:
            for member, data in reader.iter_members(folder / path, rows.__contains__):
                yield rows[member], data


def _iter_npz(archive: Path, rows: dict[str, int]) -> Iterator[tuple[int, Pixels]]:
    """Rows of arrays by their names, such as `train_images/17`."""
    for key in dict.fromkeys(member.rsplit("/", 1)[0] for member in rows):
        start = 0
        for block in npz.iter_row_chunks(archive, key):
            for offset, pixels in enumerate(block):
                row = rows.get(f"{key}/{start + offset}")
                if row is not None:
                    yield row, pixels.astype(np.uint8, copy=False)
            start += len(block)
