"""Normalization of uint8 images, compared with torchvision."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import functional as transforms

from fadeformer.data.normalization import IMAGENET, Normalization, to_unit_range


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def normalize_with_torchvision(batch: torch.Tensor, normalization: Normalization) -> torch.Tensor:
    pixels = torch.stack([transforms.to_tensor(image.numpy()) for image in batch])
    return transforms.normalize(pixels, list(normalization.mean), list(normalization.std))


@pytest.mark.parametrize(("channels", "normalization"), [(3, IMAGENET), (1, IMAGENET.for_channels(1))])
def test_normalization_matches_torchvision(channels, normalization):
    batch = random_images(4, 7, 5, channels)
    before = batch.clone()
    result = normalization(batch)
    assert (result.dtype, result.shape, result.is_contiguous()) == (torch.float32, (4, channels, 7, 5), True)
    torch.testing.assert_close(result, normalize_with_torchvision(batch, normalization), rtol=0, atol=1e-6)
    assert torch.equal(batch, before)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 1)), min_size=1, max_size=4), st.integers(0, 99))
def test_any_number_of_channels_is_normalized(statistics, seed):
    normalization = Normalization(*zip(*statistics, strict=True))
    batch = random_images(2, 3, 4, len(statistics), seed=seed)
    expected = (batch.double().numpy() / 255 - normalization.mean) / normalization.std
    np.testing.assert_allclose(normalization(batch).permute(0, 2, 3, 1).numpy(), expected, rtol=1e-5, atol=1e-4)


def test_for_channels_averages_the_statistics():
    assert IMAGENET.for_channels(3) is IMAGENET
    gray = IMAGENET.for_channels(1)
    assert gray.mean == pytest.approx((np.mean(IMAGENET.mean),))
    assert gray.std == pytest.approx((np.mean(IMAGENET.std),))
    assert Normalization((0.5,), (0.2,)).for_channels(3) == Normalization((0.5,) * 3, (0.2,) * 3)


def test_unit_range_matches_torchvision_without_side_effects():
    batch = random_images(4, 7, 5, 3)
    before = batch.clone()
    expected = torch.stack([transforms.to_tensor(image.numpy()) for image in batch])
    assert torch.equal(to_unit_range(batch), expected)
    assert torch.equal(batch, before)
    assert to_unit_range(batch[:, ::2]).is_contiguous()  # for any strides
