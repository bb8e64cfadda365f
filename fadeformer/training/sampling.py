"""Which images a batch holds, drawn from the seed and the epoch alone, and how they reach the device.

A thread gathers the next batches from the memory-mapped array while the device is busy with the present one; where
there is a GPU it gathers into pinned memory, from which copying waits for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fadeformer.errors import UserError
from fadeformer.tasks import Task

Rows = NDArray[np.int64]
PREFETCH_BATCHES = 2  # batches gathered before they are asked for


def derive_seed(*numbers: int) -> int:
    """A seed for each use of randomness, unlike all others: of the seed, the epoch and so on."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def sample_batches(
    labels: NDArray[np.int64], task: Task, sampling: Literal["weighted", "uniform"], batch_size: int, seed: int
) -> list[Rows]:
    """The batches of an epoch: as few as hold all draws, and as even as can be, so that none is left with one image.

    Args:
        labels: (images, labels).
        task: what kind of classification it is.
        sampling: weighted draws every class equally often, uniform every image once.
        batch_size: images of a batch at most.
        seed: of this epoch's draws.

    Returns:
        Rows of the images, in the order in which they are seen.
    """
    random, count = np.random.default_rng(seed), len(labels)
    if sampling == "uniform":
        order = random.permutation(count)
    else:
        weights = sampling_weights(labels, task)
        order = random.choice(count, size=count, replace=True, p=weights / weights.sum())
    return np.array_split(order, -(-count // batch_size))


def shard_slice(count: int, part: int, parts: int) -> slice:
    """The images of one of several parts of a batch, which are as even as can be.

    Args:
        count: images of the batch.
        part: 0 to parts - 1.
        parts: of the batch.
    """
    return slice(count * part // parts, count * (part + 1) // parts)


def check_batch_size(order: Sequence[Rows], devices: int, accumulate: int) -> None:
    """Check that each part of a batch has two images or more, which batch normalization and mixing need.

    Raises:
        UserError: a batch has too few images to be divided.
    """
    smallest, parts = min(map(len, order)), devices * accumulate
    if parts > 1 and smallest < 2 * parts:
        raise UserError(
            f"a batch of {smallest} images is too small for {devices} device(s) and train.accumulate {accumulate};"
            f" raise train.batch_size to {4 * parts} or more, or lower train.accumulate or train.devices"
        )


def sampling_weights(labels: NDArray[np.int64], task: Task) -> NDArray[np.float64]:
    """How often each image is drawn, relative to the others: the inverse of how common its class is.

    An image with several findings counts by its rarest, one with none by how many have none.

    Args:
        labels: (images, labels).
        task: what kind of classification it is.

    Returns:
        (images,), not normalised.
    """
    if not task.multi_label:
        return 1.0 / np.bincount(labels[:, 0])[labels[:, 0]]
    present = labels.astype(bool)
    rarity = np.where(present, 1.0 / np.maximum(present.sum(axis=0), 1), 0.0).max(axis=1)
    return np.where(present.any(axis=1), rarity, 1.0 / max(1, int((~present.any(axis=1)).sum())))


def prefetch_batches(pixels: NDArray[np.uint8], order: Sequence[Rows], device: torch.device) -> Iterator[Tensor]:
    """The images of each batch on a device, gathered before they are asked for.

    Args:
        pixels: uint8, (images, height, width, channels), memory-mapped.
        order: rows of each batch.
        device: where they go.

    Yields:
        uint8, (images, height, width, channels).
    """
    pinned = device.type == "cuda"

    def gather(rows: Rows) -> Tensor:
        batch = torch.empty((len(rows), *pixels.shape[1:]), dtype=torch.uint8, pin_memory=pinned)
        np.take(pixels, rows, axis=0, out=batch.numpy(), mode="clip")  # clip: else numpy makes one copy more
        return batch

    with ThreadPoolExecutor(1, "gather") as pool:
        waiting = deque(pool.submit(gather, rows) for rows in order[:PREFETCH_BATCHES])
        for number in range(len(order)):
            waiting.extend(
                pool.submit(gather, rows) for rows in order[number + PREFETCH_BATCHES : number + PREFETCH_BATCHES + 1]
            )
            yield waiting.popleft().result().to(device, non_blocking=True)
