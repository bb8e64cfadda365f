"""Many images through a network, from files to rows of a table, in memory that does not grow with them.

Threads each take a batch, decode it and, on a CPU, run the network on it with one thread of torch's: so decoding and
network overlap without waiting for one another, and no sum depends on how many cores there are. On a GPU one batch at a
time goes through the network while the other threads decode. Which images make a batch depends on their row alone.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fadeformer.data.decode import Aspect, image_to_array
from fadeformer.errors import UnreadableImageError, UserError
from fadeformer.inference.classifier import Classifier, Floats, OperatingPoint, Pixels
from fadeformer.inference.inputs import InputImage
from fadeformer.inference.ood import OODDetector

BATCH_SIZE = 32  # images that go through the network at once
CHUNK_SIZE = 64 * BATCH_SIZE  # rows that are handed on at once
PREFETCH_BATCHES = (
    2  # batches for each thread that may wait, under way or as rows; their pixels are gone once they are rows
)
RESERVED_COLUMNS = ("name", "decision", "ood_distance", "is_ood", "error")  # columns beside those of the classes


def predict_chunks(
    classifier: Classifier,
    familiar: OODDetector,
    point: OperatingPoint,
    images: Sequence[InputImage],
    *,
    threads: int | None,
    start_row: int = 0,
    explain: Callable[[list[str], Pixels, NDArray[np.int64]], None] | None = None,
    extra_columns: Callable[[Pixels, NDArray[np.float32]], Mapping[str, NDArray[Any]]] | None = None,
) -> Iterator[pd.DataFrame]:
    """Predicts images in their order.

    Args:
        classifier: the model.
        familiar: its out-of-distribution statistics.
        point: operating point that decides.
        images: in the order of the rows.
        threads: that decode; None for one on each core. Memory grows with them, not with the images.
        start_row: row to begin with, a multiple of `PART`.
        explain: called with names, pixels and called classes of each batch, one batch at a time.
        extra_columns: gives further columns from pixels and what the classifier sees of a batch.

    Yields:
        `PART` rows at once, at the end fewer: `name`, a score for each class, `decision`, `unfamiliar` (distance),
        `is_unfamiliar` and `problem`. Of an image that cannot be read only name and problem are filled.

    Raises:
        UserError: a class is called as a column of its own.
    """
    if clash := set(RESERVED_COLUMNS) & set(point.classes):
        raise UserError(f"the class {clash.pop()!r} has the name of a column; train the model with another name for it")
    threads = threads or os.cpu_count() or 1
    alone = threading.Lock() if explain is not None or classifier.device.type != "cpu" else nullcontext()

    def work(some: Sequence[InputImage]) -> pd.DataFrame:
        pixels, problems = _decode_batch(some, **classifier.input_config)
        there = np.array([not problem for problem in problems])
        scores, far = np.full((len(some), len(point.classes)), np.nan), np.full(len(some), np.nan)
        further: Mapping[str, NDArray[Any]] = {}
        if there.any():
            readable = pixels[there]
            with alone:
                _, scores[there], features = classifier.predict(readable)
                if explain is not None:
                    names = [image.name for image, ok in zip(some, there, strict=True) if ok]
                    explain(names, readable, _top_class(point, scores[there]))
            far[there] = familiar.distance(features)
            further = extra_columns(readable, features) if extra_columns is not None else {}
        rows = _build_rows(some, scores, far, problems, point, familiar.threshold)
        columns = pd.DataFrame(dict(further), index=np.flatnonzero(there))
        return rows.join(columns) if extra_columns is not None else rows

    starts = iter(range(start_row, len(images), BATCH_SIZE))
    waiting: deque[Future[pd.DataFrame]] = deque()
    part: list[pd.DataFrame] = []
    with (
        _single_threaded_torch(classifier.device),
        ThreadPoolExecutor(threads, "predict") as pool,
        tqdm(total=len(images), initial=start_row, desc="predict", unit="image", disable=None) as progress,
    ):
        try:
            while True:
                wanted = PREFETCH_BATCHES * threads - len(waiting)
                waiting.extend(
                    pool.submit(work, images[start : start + BATCH_SIZE]) for start in islice(starts, wanted)
                )
                if not waiting:
                    break
                part.append(rows := waiting.popleft().result())
                progress.update(len(rows))
                if len(part) == CHUNK_SIZE // BATCH_SIZE:
                    yield pd.concat(part, ignore_index=True)
                    part = []
        finally:
            for future in waiting:
                future.cancel()
    if part:
        yield pd.concat(part, ignore_index=True)


def _decode_batch(
    some: Sequence[InputImage], image_size: int, channels: int, aspect: Aspect
) -> tuple[Pixels, list[str]]:
    """Pixels as in training, (images, side, side, channels), and of each image why it cannot be read, if it cannot."""
    pixels = np.zeros((len(some), image_size, image_size, channels), np.uint8)
    problems = []
    for place, image in enumerate(some):
        try:
            pixels[place] = image_to_array(image.read(), image_size, channels, aspect)
            problems.append("")
        except UnreadableImageError as error:
            problems.append(error.reason)
    return pixels, problems


def _top_class(point: OperatingPoint, scores: Floats) -> NDArray[np.int64]:
    """Return the class that is decided for, or of findings the one of the highest score."""
    return np.asarray((scores if point.multi_label else point.decide(scores)).argmax(axis=1), dtype=np.int64)


def _build_rows(
    some: Sequence[InputImage], scores: Floats, far: Floats, problems: list[str], point: OperatingPoint, limit: float
) -> pd.DataFrame:
    there = [not problem for problem in problems]
    words = iter(point.format_decisions(scores[np.array(there)]))
    columns = {
        "name": pd.array([image.name for image in some], dtype="string"),
        **{name: scores[:, c] for c, name in enumerate(point.classes)},
        "decision": pd.array([next(words) if ok else pd.NA for ok in there], dtype="string"),
        "ood_distance": far,
        "is_ood": pd.array([far[i] > limit if ok else pd.NA for i, ok in enumerate(there)], dtype="boolean"),
        "error": pd.array([problem or pd.NA for problem in problems], dtype="string"),
    }
    return pd.DataFrame(columns)


@contextmanager
def _single_threaded_torch(device: torch.device) -> Iterator[None]:
    """Lets torch compute with one thread in each of ours: the same sums for any number of them."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
