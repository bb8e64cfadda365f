"""Which images a batch holds, who gets which of them, and how they come."""

import math
import threading
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fadeformer.errors import UserError
from fadeformer.tasks import TASKS
from fadeformer.training import sampling as batches

MULTI_CLASS, FINDINGS = TASKS["multi-class"], TASKS["multi-label, binary-class"]
CPU = torch.device("cpu")


def of_classes(*counts: int) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)[:, None]


@given(st.integers(1, 100), st.integers(1, 40), st.integers(0, 2**63 - 1))
def test_uniform_batches_hold_each_image_once_and_are_as_even_as_can_be(count, batch_size, seed):
    order = batches.sample_batches(np.zeros((count, 1), np.int64), MULTI_CLASS, "uniform", batch_size, seed)
    assert sorted(np.concatenate(order).tolist()) == list(range(count))
    sizes = [len(rows) for rows in order]
    assert len(sizes) == math.ceil(count / batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("sampling", ["uniform", "weighted"])
def test_the_order_hangs_on_the_seed_alone(sampling):
    labels = of_classes(20, 7, 3)

    def order(seed: int) -> list[int]:
        return np.concatenate(batches.sample_batches(labels, MULTI_CLASS, sampling, 8, seed)).tolist()

    first = order(5)
    assert order(5) == first
    assert order(6) != first
    assert first != sorted(first)


def test_weighted_batches_draw_every_class_equally_often():
    labels = of_classes(900, 90, 10)
    epochs = [batches.sample_batches(labels, MULTI_CLASS, "weighted", 64, seed) for seed in range(9)]
    rows = np.concatenate([rows for order in epochs for rows in order])
    assert len(rows) == 9 * len(labels)
    assert stats.chisquare(np.bincount(labels[rows, 0])).pvalue > 0.01
    rare = np.bincount(rows, minlength=1000)[990:]
    assert stats.chisquare(rare).pvalue > 0.01  # and every image of a class


def test_an_image_with_findings_counts_by_its_rarest():
    labels = np.array([[1, 0], [1, 0], [1, 1], [0, 0], [0, 0]])
    weights = batches.sampling_weights(labels, FINDINGS)
    assert weights == pytest.approx([1 / 3, 1 / 3, 1, 1 / 2, 1 / 2])


def test_images_may_all_have_findings_and_findings_may_be_absent():
    assert batches.sampling_weights(np.array([[1, 0], [1, 0]]), FINDINGS) == pytest.approx([1 / 2, 1 / 2])
    assert batches.sampling_weights(np.zeros((4, 2), np.int64), FINDINGS) == pytest.approx([1 / 4] * 4)


@given(st.integers(0, 100), st.integers(1, 9))
def test_shares_partition_a_batch_evenly(count, parts):
    shares = [range(count)[batches.shard_slice(count, part, parts)] for part in range(parts)]
    assert list(chain(*shares)) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 40), st.integers(1, 200))
def test_a_batch_too_small_to_be_shared_is_told_with_a_remedy_that_helps(world, accumulate, batch_size, count):
    labels = np.zeros((count, 1), np.int64)
    order = batches.sample_batches(labels, MULTI_CLASS, "uniform", batch_size, 0)
    own = [rows[batches.shard_slice(len(rows), rank, world)] for rows in order for rank in range(world)]
    parts = [len(rows[batches.shard_slice(len(rows), part, accumulate)]) for rows in own for part in range(accumulate)]
    if world * accumulate == 1 or min(parts) >= 2:
        batches.check_batch_size(order, world, accumulate)
        return
    with pytest.raises(UserError, match=rf"for {world} device\(s\) and train\.accumulate {accumulate}; raise") as told:
        batches.check_batch_size(order, world, accumulate)
    larger = int(str(told.value).split("train.batch_size to ")[1].split()[0])
    assert larger > batch_size or count < larger
    if count >= larger:
        batches.check_batch_size(batches.sample_batches(labels, MULTI_CLASS, "uniform", larger, 0), world, accumulate)


@pytest.fixture
def pixels(tmp_path) -> np.ndarray:
    """Twenty images in a memory-mapped file."""
    np.save(tmp_path / "pixels.npy", np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8))
    return np.load(tmp_path / "pixels.npy", mmap_mode="r")


def some_batches(sizes: list[int]) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(0, 20, size) for size in sizes]


@given(sizes=st.lists(st.integers(1, 9), max_size=8))
def test_images_come_as_they_lie_in_the_file(tmp_path_factory, sizes):
    path = tmp_path_factory.mktemp("feed") / "pixels.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8))
    pixels = np.load(path, mmap_mode="r")
    order = some_batches(sizes)
    found = list(batches.prefetch_batches(pixels, order, CPU))
    assert len(found) == len(sizes)
    for rows, images in zip(order, found, strict=True):
        assert images.dtype == torch.uint8
        np.testing.assert_array_equal(images.numpy(), pixels[rows])


def threads() -> int:
    return sum(thread.name.startswith("gather") for thread in threading.enumerate())


@pytest.mark.parametrize("taken", [0, 1, 10])
def test_no_thread_is_left_behind(pixels, taken):
    before = threads()
    images = batches.prefetch_batches(pixels, some_batches([4] * 10), CPU)
    for _ in range(taken):
        next(images)
    images.close()
    assert threads() == before


def test_an_error_while_gathering_reaches_the_consumer(pixels, monkeypatch):
    def broken(*_, **__):
        raise OSError("the disk is gone")

    monkeypatch.setattr(np, "take", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        list(batches.prefetch_batches(pixels, some_batches([4] * 10), CPU))
    assert threads() == 0


def test_every_use_of_randomness_has_a_seed_of_its_own():
    numbers = [(s, e, use, b) for s in range(3) for e in range(1, 9) for use in (1, 2) for b in range(20)]
    numbers += [(s, e, 0, 0) for s in range(3) for e in range(1, 9)]
    seeds = [batches.derive_seed(*few) for few in numbers]
    assert seeds == [batches.derive_seed(*few) for few in numbers]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)  # of which torch's generator on CPUs takes no more
