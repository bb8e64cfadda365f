"""What a network sees of uint8 images, against torchvision."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import functional as published

from fadeformer.data.normalization import IMAGENET, Normalization, to_unit_range


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def of_torchvision(batch: torch.Tensor, normalisation: Normalization) -> torch.Tensor:
    pixels = torch.stack([published.to_tensor(image.numpy()) for image in batch])
    return published.normalize(pixels, list(normalisation.mean), list(normalisation.std))


@pytest.mark.parametrize(("channels", "normalisation"), [(3, IMAGENET), (1, IMAGENET.for_channels(1))])
def test_images_are_normalised_as_torchvision_does(channels, normalisation):
    batch = images(4, 7, 5, channels)
    before = batch.clone()
    found = normalisation(batch)
    assert (found.dtype, found.shape, found.is_contiguous()) == (torch.float32, (4, channels, 7, 5), True)
    torch.testing.assert_close(found, of_torchvision(batch, normalisation), rtol=0, atol=1e-6)
    assert torch.equal(batch, before)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 1)), min_size=1, max_size=4), st.integers(0, 99))
def test_any_number_of_channels_is_normalised(statistics, seed):
    normalisation = Normalization(*zip(*statistics, strict=True))
    batch = images(2, 3, 4, len(statistics), seed=seed)
    expected = (batch.double().numpy() / 255 - normalisation.mean) / normalisation.std
    np.testing.assert_allclose(normalisation(batch).permute(0, 2, 3, 1).numpy(), expected, rtol=1e-5, atol=1e-4)


def test_grey_images_have_the_means_of_three_channels():
    assert IMAGENET.for_channels(3) is IMAGENET
    grey = IMAGENET.for_channels(1)
    assert grey.mean == pytest.approx((np.mean(IMAGENET.mean),))
    assert grey.std == pytest.approx((np.mean(IMAGENET.std),))
    assert Normalization((0.5,), (0.2,)).for_channels(3) == Normalization((0.5,) * 3, (0.2,) * 3)


def test_images_in_unit_interval_are_torchvisions_and_the_bytes_stay_as_they_were():
    batch = images(4, 7, 5, 3)
    before = batch.clone()
    expected = torch.stack([published.to_tensor(image.numpy()) for image in batch])
    assert torch.equal(to_unit_range(batch), expected)
    assert torch.equal(batch, before)
    assert to_unit_range(batch[:, ::2]).is_contiguous()  # whatever the strides
