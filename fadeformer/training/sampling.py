"""Deterministic batch sampling from (seed, epoch), and prefetching of batches to the device.

A background thread gathers the next batches from the memory-mapped array while the device computes; for a GPU it
gathers into pinned memory, so that copies are asynchronous.
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
PREFETCH_BATCHES = 2  # batches gathered in advance


def derive_seed(*numbers: int) -> int:
    """Derive an independent seed from numbers such as (seed, epoch, purpose, batch)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def num_batches(count: int, batch_size: int) -> int:
    """Return the number of batches of an epoch: as few as possible, without a batch of one image if `batch_size` > 1.

    Args:
        count: images of an epoch.
        batch_size: maximum number of images in a batch, exceeded by one if `batch_size` is 2 and `count` is odd.
    """
    batches = -(-count // batch_size)
    return batches - 1 if batch_size > 1 and 1 < count < 2 * batches else batches


def sample_batches(
    labels: NDArray[np.int64], task: Task, sampling: Literal["weighted", "uniform"], batch_size: int, seed: int
) -> list[Rows]:
    """Sample the batches of an epoch; their sizes differ by at most one, so that no small batch is left at the end.

    Args:
        labels: (images, labels).
        task: classification task.
        sampling: weighted draws images with replacement by `sampling_weights`, exclusive classes thus equally often;
            uniform draws each image once.
        batch_size: maximum number of images in a batch; see `num_batches`.
        seed: seed of this epoch.

    Returns:
        Row numbers of the images of each batch.
    """
    random, count = np.random.default_rng(seed), len(labels)
    if sampling == "uniform":
        order = random.permutation(count)
    else:
        weights = sampling_weights(labels, task)
        order = random.choice(count, size=count, replace=True, p=weights / weights.sum())
    return np.array_split(order, num_batches(count, batch_size))


def shard_slice(count: int, part: int, parts: int) -> slice:
    """Return the slice of one of several parts of a batch; the parts' sizes differ by at most one.

    Args:
        count: images of the batch.
        part: number of the part, 0 to parts - 1.
        parts: number of parts (processes or micro-batches).
    """
    return slice(count * part // parts, count * (part + 1) // parts)


def check_batch_size(batches: Sequence[Rows], devices: int, accumulate: int, *, has_batch_norm: bool) -> None:
    """Check that each part of a batch has at least two images, which batch normalization and mixup need.

    Args:
        batches: row numbers of the images of each batch.
        devices: number of processes.
        accumulate: micro-batches per step.
        has_batch_norm: the model has batch normalization, so that undivided batches are checked, too.

    Raises:
        UserError: a batch has one image, or too few images to be divided among devices and micro-batches.
    """
    smallest, parts = min(map(len, batches)), devices * accumulate
    if has_batch_norm and smallest < 2:
        raise UserError(
            "params.yaml: train.batch_size gives batches of one image, but the model has batch normalization, which"
            " needs two or more; raise train.batch_size, or use a model without it, such as a ViT"
        )
    if parts > 1 and smallest < 2 * parts:
        raise UserError(
            f"a batch of {smallest} images is too small for {devices} device(s) and train.accumulate {accumulate};"
            f" raise train.batch_size to {4 * parts} or more, or lower train.accumulate or train.devices"
        )


def sampling_weights(labels: NDArray[np.int64], task: Task) -> NDArray[np.float64]:
    """Return sampling weights of the images: the inverse frequency of their class.

    Exclusive classes are thus drawn equally often. An image with several findings has the weight of its rarest one, and
    images without a finding form a class: rare findings are drawn more often than they occur, but not equally often, as
    a common finding also comes with the images of the rare ones.

    Args:
        labels: (images, labels).
        task: classification task.

    Returns:
        (images,), not normalized.
    """
    if not task.multi_label:
        return 1.0 / np.bincount(labels[:, 0])[labels[:, 0]]
    present = labels.astype(bool)
    rarity = np.where(present, 1.0 / np.maximum(present.sum(axis=0), 1), 0.0).max(axis=1)
    return np.where(present.any(axis=1), rarity, 1.0 / max(1, int((~present.any(axis=1)).sum())))


def training_weights(
    labels: NDArray[np.int64], task: Task, sampling: Literal["weighted", "uniform"], class_weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the weight of an image of each exclusive class in training: in sampling, times in the loss.

    A network learns the scores of a data set in which the classes are as frequent as their number of images times this
    weight: with weighted sampling and equal class weights, equally frequent.

    Args:
        labels: of train, (images, 1).
        task: classification task with exclusive classes.
        sampling: as in `sample_batches`.
        class_weights: weights of the loss, (classes,).

    Returns:
        (classes,), not normalized; 0 for a class without images.
    """
    weights = np.zeros(len(class_weights))
    weights[labels[:, 0]] = sampling_weights(labels, task) if sampling == "weighted" else 1.0
    return weights * class_weights


def prefetch_batches(images: NDArray[np.uint8], batches: Sequence[Rows], device: torch.device) -> Iterator[Tensor]:
    """Yield the images of each batch on a device; the next batches are gathered in a background thread.

    Args:
        images: uint8, (images, height, width, channels), memory-mapped.
        batches: row numbers of each batch.
        device: target device.

    Yields:
        uint8, (images, height, width, channels).
    """
    pinned = device.type == "cuda"

    def gather(rows: Rows) -> Tensor:
        batch = torch.empty((len(rows), *images.shape[1:]), dtype=torch.uint8, pin_memory=pinned)
        np.take(images, rows, axis=0, out=batch.numpy(), mode="clip")  # other modes make a temporary copy
        return batch

    with ThreadPoolExecutor(1, "gather") as pool:
        pending = deque(pool.submit(gather, rows) for rows in batches[:PREFETCH_BATCHES])
        for number in range(len(batches)):
            upcoming = batches[number + PREFETCH_BATCHES : number + PREFETCH_BATCHES + 1]
            pending.extend(pool.submit(gather, rows) for rows in upcoming)
            yield pending.popleft().result().to(device, non_blocking=True)
