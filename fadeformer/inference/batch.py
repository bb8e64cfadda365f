"""Streaming batch prediction: image files to table rows, in constant memory.

A pool of threads decodes batches and, on a CPU, runs the network with one torch thread per worker: decoding and
inference overlap, and the results do not depend on the number of cores. On a GPU one batch at a time goes through the
network while the other threads decode. The images of a batch depend on their row numbers alone.
"""

from __future__ import annotations

import math
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

from fadeformer.data.dataset_card import RESERVED_CLASS_NAMES
from fadeformer.data.decode import Aspect, image_to_array
from fadeformer.errors import UnreadableImageError, UserError
from fadeformer.inference.classifier import Classifier, Floats, ImageArray
from fadeformer.inference.inputs import InputImage
from fadeformer.inference.ood import OODDetector
from fadeformer.inference.operating_point import OperatingPoint

Explain = Callable[[list[str], ImageArray, NDArray[np.int64]], None]
ExtraColumns = Callable[[ImageArray, NDArray[np.float32]], Mapping[str, NDArray[Any]]]

BATCH_SIZE = 32  # images per forward pass
CHUNK_SIZE = 64 * BATCH_SIZE  # rows per yielded table
PREFETCH_BATCHES = 2  # per thread, running or finished; a finished batch holds table rows only, no pixels


def predict_chunks(
    classifier: Classifier,
    detector: OODDetector,
    point: OperatingPoint,
    images: Sequence[InputImage],
    *,
    threads: int | None,
    start_row: int = 0,
    explain: Explain | None = None,
    extra_columns: ExtraColumns | None = None,
) -> Iterator[pd.DataFrame]:
    """Predict images in order and yield the results in chunks.

    Args:
        classifier: trained classifier.
        detector: its out-of-distribution detector.
        point: operating point of the decisions.
        images: in the order of the rows.
        threads: number of decoding threads; None for one per core. Memory grows with the threads, not with the images.
        start_row: first row to predict, a multiple of `CHUNK_SIZE`.
        explain: called with the names, pixels and predicted classes of each batch, one batch at a time.
        extra_columns: computes further columns from the pixels and features of a batch.

    Yields:
        Tables of `CHUNK_SIZE` rows, the last one shorter: `name`, one score per class, `decision`, `ood_distance`,
        `is_ood` and `error`. For an unreadable image only `name` and `error` are filled; `is_ood` is missing if the
        detector has no finite threshold.

    Raises:
        UserError: a class has the name of a reserved column.
    """
    if clash := set(RESERVED_CLASS_NAMES) & set(point.classes):
        raise UserError(
            f"class name {clash.pop()!r} is reserved for a column; rename the class and train the model again"
        )
    threads = threads or os.cpu_count() or 1
    predict_batch = _BatchPredictor(classifier, detector, point, explain, extra_columns)
    starts = iter(range(start_row, len(images), BATCH_SIZE))
    pending: deque[Future[pd.DataFrame]] = deque()
    chunk: list[pd.DataFrame] = []
    with (
        _single_threaded_torch(classifier.device),
        ThreadPoolExecutor(threads, "predict") as pool,
        tqdm(total=len(images), initial=start_row, desc="predict", unit="image", disable=None) as progress,
    ):
        try:
            while True:
                free = PREFETCH_BATCHES * threads - len(pending)
                pending.extend(
                    pool.submit(predict_batch, images[start : start + BATCH_SIZE]) for start in islice(starts, free)
                )
                if not pending:
                    break
                chunk.append(rows := pending.popleft().result())
                progress.update(len(rows))
                if len(chunk) == CHUNK_SIZE // BATCH_SIZE:
                    yield pd.concat(chunk, ignore_index=True)
                    chunk = []
        finally:
            for future in pending:
                future.cancel()
    if chunk:
        yield pd.concat(chunk, ignore_index=True)


class _BatchPredictor:
    """Predicts the rows of one batch; called by several threads at once.

    Args:
        classifier: trained classifier.
        detector: its out-of-distribution detector.
        point: operating point of the decisions.
        explain: see `predict_chunks`.
        extra_columns: see `predict_chunks`.
    """

    def __init__(
        self,
        classifier: Classifier,
        detector: OODDetector,
        point: OperatingPoint,
        explain: Explain | None,
        extra_columns: ExtraColumns | None,
    ) -> None:
        self.classifier, self.detector, self.point = classifier, detector, point
        self.explain, self.extra_columns = explain, extra_columns
        one_at_a_time = explain is not None or classifier.device.type != "cpu"
        self.model_lock = threading.Lock() if one_at_a_time else nullcontext()

    def __call__(self, inputs: Sequence[InputImage]) -> pd.DataFrame:
        """Decode and predict a batch of images."""
        pixels, errors = _decode_batch(inputs, **self.classifier.input_config)
        is_readable = np.array([not error for error in errors])
        scores, distances = np.full((len(inputs), len(self.point.classes)), np.nan), np.full(len(inputs), np.nan)
        extra: Mapping[str, NDArray[Any]] = {}
        if is_readable.any():
            readable = pixels[is_readable]
            with self.model_lock:
                _, scores[is_readable], features = self.classifier.predict(readable)
                if self.explain is not None:
                    names = [image.name for image, ok in zip(inputs, is_readable, strict=True) if ok]
                    self.explain(names, readable, _top_class(self.point, scores[is_readable]))
            distances[is_readable] = self.detector.distance(features)
            extra = self.extra_columns(readable, features) if self.extra_columns is not None else {}
        rows = _build_rows(inputs, scores, distances, errors, self.point, self.detector.threshold)
        columns = pd.DataFrame(dict(extra), index=np.flatnonzero(is_readable))
        return rows.join(columns) if self.extra_columns is not None else rows


def _decode_batch(
    inputs: Sequence[InputImage],
    image_size: int,
    channels: int,
    aspect: Aspect,
    pixel_range: Sequence[Any] | None = None,
) -> tuple[ImageArray, list[str]]:
    """Decode as in training: (images, side, side, channels), and one error message per image, empty if readable."""
    pixels = np.zeros((len(inputs), image_size, image_size, channels), np.uint8)
    errors = []
    for row, image in enumerate(inputs):
        try:
            pixels[row] = image_to_array(image.read(pixel_range), image_size, channels, aspect)
            errors.append("")
        except UnreadableImageError as error:
            errors.append(error.reason)
    return pixels, errors


def _top_class(point: OperatingPoint, scores: Floats) -> NDArray[np.int64]:
    """Return the decided class, or in multi-label tasks the finding with the highest score."""
    return np.asarray((scores if point.task.multi_label else point.decide(scores)).argmax(axis=1), dtype=np.int64)


def _build_rows(
    inputs: Sequence[InputImage],
    scores: Floats,
    distances: Floats,
    errors: list[str],
    point: OperatingPoint,
    ood_threshold: float,
) -> pd.DataFrame:
    is_readable = [not error for error in errors]
    decisions = iter(point.format_decisions(scores[np.array(is_readable)]))
    is_known = math.isfinite(ood_threshold)
    is_ood = [
        distance > ood_threshold if ok and is_known else pd.NA
        for distance, ok in zip(distances, is_readable, strict=True)
    ]
    columns = {
        "name": pd.array([image.name for image in inputs], dtype="string"),
        **{name: scores[:, c] for c, name in enumerate(point.classes)},
        "decision": pd.array([next(decisions) if ok else pd.NA for ok in is_readable], dtype="string"),
        "ood_distance": distances,
        "is_ood": pd.array(is_ood, dtype="boolean"),
        "error": pd.array([error or pd.NA for error in errors], dtype="string"),
    }
    return pd.DataFrame(columns)


@contextmanager
def _single_threaded_torch(device: torch.device) -> Iterator[None]:
    """Limit torch to one thread per worker thread on a CPU, so that sums do not depend on the number of threads."""
    previous = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
