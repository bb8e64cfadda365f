"""Which images a batch holds, drawn from the seed and the epoch alone, and how they reach the device.

A thread gathers the next batch from the memory-mapped array while the device is busy with the present one; where there
is a GPU it gathers into pinned memory, from which copying waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fadeformer.errors import UserError
from fadeformer.tasks import Task
from fadeformer.whole_batch import WholeBatch, share

Rows = NDArray[np.int64]
AHEAD = 2  # batches gathered before they are asked for


@dataclass(frozen=True)
class Batch:
    """A batch, and what of it goes through the network in this process.

    Attributes:
        rows: of all its images.
        places: of the images of each part of this process, in the batch.
        distributed: whether other processes have the rest.
    """

    rows: Rows
    places: list[Rows]
    distributed: bool

    @property
    def count(self) -> int:
        """Images in all."""
        return len(self.rows)

    @property
    def own(self) -> Rows:
        """Rows of the images of this process, part by part."""
        return self.rows[np.concatenate(self.places)]

    def split(self, images: Tensor) -> Iterator[tuple[Tensor, Rows]]:
        """The images of this process as parts, each with its places."""
        return zip(torch.split(images, [len(places) for places in self.places]), self.places, strict=True)

    def as_whole(self, places: Rows) -> AbstractContextManager[object]:
        """Lets a network do with the part at these places what it would do with the whole batch."""
        return nullcontext() if len(places) == self.count else WholeBatch(places, self.count, self.distributed)


def mix(*numbers: int) -> int:
    """A seed for each use of randomness, unlike all others: of the seed, the epoch and so on."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def draw(
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


def shared(order: Sequence[Rows], rank: int, world: int, accumulate: int) -> list[Batch]:
    """Shares batches between processes, and what each of them gets into parts that follow one another.

    Args:
        order: rows of each batch.
        rank: of this process.
        world: processes.
        accumulate: parts.

    Raises:
        UserError: a batch has too few images for that.
    """
    smallest, parts = min(map(len, order)), world * accumulate
    if (smallest + 1) // 2 < parts:  # images at both ends of a batch go together
        raise UserError(
            f"a batch of {smallest} images is too small for {world} device(s) and train.accumulate {accumulate}; raise"
            f" train.batch_size to {4 * parts} or more, or lower train.accumulate or train.devices"
        )
    own = range(rank * accumulate, (rank + 1) * accumulate)
    return [Batch(rows, [share(len(rows), part, parts) for part in own], world > 1) for rows in order]


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


def feed(pixels: NDArray[np.uint8], batches: Sequence[Batch], device: torch.device) -> Iterator[Tensor]:
    """This process's images of each batch on a device, gathered before they are asked for.

    Args:
        pixels: uint8, (images, height, width, channels), memory-mapped.
        batches: in their order.
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
        waiting: list[Future[Tensor]] = []
        try:
            for number in range(len(batches)):
                coming = batches[number + len(waiting) : number + AHEAD + 1]
                waiting.extend([pool.submit(gather, batch.own) for batch in coming])
                yield waiting.pop(0).result().to(device, non_blocking=True)
        finally:
            for future in waiting:
                future.cancel()
