"""Batch sampling, sharding and prefetching."""

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
from fadeformer.training import sampling

MULTI_CLASS, FINDINGS = TASKS["multi-class"], TASKS["multi-label, binary-class"]
CPU = torch.device("cpu")


def labels_of_counts(*counts: int) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)[:, None]


@given(st.integers(1, 100), st.integers(1, 40), st.integers(0, 2**63 - 1))
def test_uniform_batches_have_each_image_once(count, batch_size, seed):
    order = sampling.sample_batches(np.zeros((count, 1), np.int64), MULTI_CLASS, "uniform", batch_size, seed)
    assert sorted(np.concatenate(order).tolist()) == list(range(count))
    sizes = [len(rows) for rows in order]
    odd_pairs = batch_size == 2 and count % 2 == 1 and count > 1
    assert len(sizes) == math.ceil(count / batch_size) - odd_pairs == sampling.num_batches(count, batch_size)
    assert max(sizes) <= batch_size + odd_pairs
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(2, batch_size, count)


@pytest.mark.parametrize("method", ["uniform", "weighted"])
def test_order_depends_only_on_seed(method):
    labels = labels_of_counts(20, 7, 3)

    def order(seed: int) -> list[int]:
        return np.concatenate(sampling.sample_batches(labels, MULTI_CLASS, method, 8, seed)).tolist()

    first = order(5)
    assert order(5) == first
    assert order(6) != first
    assert first != sorted(first)


def test_weighted_batches_draw_classes_equally_often():
    labels = labels_of_counts(900, 90, 10)
    epochs = [sampling.sample_batches(labels, MULTI_CLASS, "weighted", 64, seed) for seed in range(9)]
    rows = np.concatenate([rows for order in epochs for rows in order])
    assert len(rows) == 9 * len(labels)
    assert stats.chisquare(np.bincount(labels[rows, 0])).pvalue > 0.01
    rare = np.bincount(rows, minlength=1000)[990:]
    assert stats.chisquare(rare).pvalue > 0.01  # images of a class are drawn equally often


def test_image_weight_is_that_of_rarest_finding():
    labels = np.array([[1, 0], [1, 0], [1, 1], [0, 0], [0, 0]])
    weights = sampling.sampling_weights(labels, FINDINGS)
    assert weights == pytest.approx([1 / 3, 1 / 3, 1, 1 / 2, 1 / 2])


def test_weights_without_negative_images_and_without_findings():
    assert sampling.sampling_weights(np.array([[1, 0], [1, 0]]), FINDINGS) == pytest.approx([1 / 2, 1 / 2])
    assert sampling.sampling_weights(np.zeros((4, 2), np.int64), FINDINGS) == pytest.approx([1 / 4] * 4)


@given(st.integers(0, 100), st.integers(1, 9))
def test_shards_partition_batch_evenly(count, parts):
    shards = [range(count)[sampling.shard_slice(count, part, parts)] for part in range(parts)]
    assert list(chain(*shards)) == list(range(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 40), st.integers(1, 200))
def test_suggested_batch_size_can_be_divided(world, accumulate, batch_size, count):
    labels = np.zeros((count, 1), np.int64)
    order = sampling.sample_batches(labels, MULTI_CLASS, "uniform", batch_size, 0)
    local_batches = [rows[sampling.shard_slice(len(rows), rank, world)] for rows in order for rank in range(world)]
    parts = [
        len(rows[sampling.shard_slice(len(rows), part, accumulate)])
        for rows in local_batches
        for part in range(accumulate)
    ]
    if world * accumulate == 1 or min(parts) >= 2:
        sampling.check_batch_size(order, world, accumulate, has_batch_norm=False)
        return
    with pytest.raises(UserError, match=rf"for {world} device\(s\) and train\.accumulate {accumulate}; raise") as error:
        sampling.check_batch_size(order, world, accumulate, has_batch_norm=False)
    larger = int(str(error.value).split("train.batch_size to ")[1].split()[0])
    assert larger > batch_size or count < larger
    if count >= max(larger, 2):
        batches = sampling.sample_batches(labels, MULTI_CLASS, "uniform", larger, 0)
        sampling.check_batch_size(batches, world, accumulate, has_batch_norm=True)


def test_batch_norm_needs_two_images():
    batches = sampling.sample_batches(np.zeros((5, 1), np.int64), MULTI_CLASS, "uniform", 1, 0)
    sampling.check_batch_size(batches, 1, 1, has_batch_norm=False)
    with pytest.raises(UserError, match="batches of one image, but the model has batch normalization"):
        sampling.check_batch_size(batches, 1, 1, has_batch_norm=True)


@pytest.fixture
def pixels(tmp_path) -> np.ndarray:
    """Return 20 memory-mapped images."""
    np.save(tmp_path / "pixels.npy", np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8))
    return np.load(tmp_path / "pixels.npy", mmap_mode="r")


def random_batches(sizes: list[int]) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(0, 20, size) for size in sizes]


@given(sizes=st.lists(st.integers(1, 9), max_size=8))
def test_prefetched_batches_match_array(tmp_path_factory, sizes):
    path = tmp_path_factory.mktemp("feed") / "pixels.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8))
    pixels = np.load(path, mmap_mode="r")
    order = random_batches(sizes)
    fetched = list(sampling.prefetch_batches(pixels, order, CPU))
    assert len(fetched) == len(sizes)
    for rows, images in zip(order, fetched, strict=True):
        assert images.dtype == torch.uint8
        np.testing.assert_array_equal(images.numpy(), pixels[rows])


def count_gather_threads() -> int:
    return sum(thread.name.startswith("gather") for thread in threading.enumerate())


@pytest.mark.parametrize("taken", [0, 1, 10])
def test_prefetch_thread_stops(pixels, taken):
    before = count_gather_threads()
    images = sampling.prefetch_batches(pixels, random_batches([4] * 10), CPU)
    for _ in range(taken):
        next(images)
    images.close()
    assert count_gather_threads() == before


def test_gather_error_reaches_consumer(pixels, monkeypatch):
    def failing_take(*_, **__):
        raise OSError("the disk is gone")

    monkeypatch.setattr(np, "take", failing_take)
    with pytest.raises(OSError, match="the disk is gone"):
        list(sampling.prefetch_batches(pixels, random_batches([4] * 10), CPU))
    assert count_gather_threads() == 0


def test_derived_seeds_are_unique():
    numbers = [(s, e, use, b) for s in range(3) for e in range(1, 9) for use in (1, 2) for b in range(20)]
    numbers += [(s, e, 0, 0) for s in range(3) for e in range(1, 9)]
    seeds = [sampling.derive_seed(*values) for values in numbers]
    assert seeds == [sampling.derive_seed(*values) for values in numbers]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)  # torch's CPU generator uses only 32 bits


def test_training_weights_are_of_sampling_and_loss():
    labels = labels_of_counts(900, 90, 10)
    equal, costs = np.ones(3), np.array([1.0, 2.0, 5.0])
    weights = sampling.training_weights(labels, MULTI_CLASS, "weighted", equal)
    assert weights * [900, 90, 10] == pytest.approx(np.full(3, weights[0] * 900))
    assert sampling.training_weights(labels, MULTI_CLASS, "weighted", costs) == pytest.approx(weights * costs)
    assert sampling.training_weights(labels, MULTI_CLASS, "uniform", equal).tolist() == [1, 1, 1]
    absent = sampling.training_weights(labels, MULTI_CLASS, "weighted", np.ones(4))
    assert absent[3] == 0
