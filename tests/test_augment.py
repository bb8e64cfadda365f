"""Augmentation of batches: each image by itself, within the bounds, the same for the same generator."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fadeformer.augment import MEAN, STD, Augmentation, normalise, to_unit

OFF = {
    "horizontal_flip": 0.0, "rotation": 0.0, "scale": 0.0, "translate": 0.0, "border": "zeros", "brightness": 0.0,
    "contrast": 0.0, "saturation": 0.0, "erasing": 0.0, "erasing_scale": (0.02, 0.12),
}  # fmt: skip


def images(count: int = 4, side: int = 12, channels: int = 3) -> torch.Tensor:
    random = np.random.default_rng(0)
    return torch.from_numpy(random.integers(0, 256, (count, side, side, channels), dtype=np.uint8))


def augmented(batch: torch.Tensor, seed: int = 0, **changes: object) -> torch.Tensor:
    return Augmentation(**{**OFF, **changes})(batch, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 3])
def test_with_all_off_it_only_normalises(channels):
    batch = images(channels=channels)
    torch.testing.assert_close(augmented(batch), normalise(to_unit(batch)), atol=1e-5, rtol=0)


def test_normalising_is_by_the_published_mean_and_deviation():
    batch = to_unit(images())
    expected = (batch - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    torch.testing.assert_close(normalise(batch), expected)


def test_a_flip_mirrors_left_and_right():
    torch.testing.assert_close(augmented(images(), horizontal_flip=1.0), augmented(images()).flip(3), atol=1e-5, rtol=0)


def test_half_of_a_large_batch_is_flipped_each_by_itself():
    batch = images(1).expand(400, -1, -1, -1)
    flipped = augmented(batch, horizontal_flip=0.5)
    plain = augmented(batch)
    share = (flipped - plain).abs().amax(dim=(1, 2, 3)).gt(0.1).float().mean()
    assert 0.4 < share < 0.6


@pytest.mark.parametrize("angle", [10.0, 90.0])
def test_rotation_stays_within_its_angle(angle):
    side = 33
    spot = torch.zeros(200, side, side, 1, dtype=torch.uint8)
    spot[:, 16, 29] = 255  # 13 pixels right of the middle
    turned = augmented(spot, rotation=angle)
    place = turned[:, 0].flatten(1).argmax(dim=1)
    dy, dx = 16 - place // side, place % side - 16
    found = torch.rad2deg(torch.atan2(dy.float(), dx.float()))
    assert found.abs().max() <= angle + 5
    assert found.max() > angle / 2
    assert found.min() < -angle / 2


def test_translation_stays_within_its_fraction():
    spot = torch.zeros(300, 32, 32, 1, dtype=torch.uint8)
    spot[:, 16, 16] = 255
    place = augmented(spot, translate=0.25)[:, 0].flatten(1).argmax(dim=1)
    shift = torch.stack([place // 32 - 16, place % 32 - 16]).abs()
    assert 6 <= shift.max() <= 9


@given(amount=st.floats(0.05, 0.9), name=st.sampled_from(["brightness", "contrast", "saturation"]))
def test_colour_stays_within_its_factor(amount, name):
    batch = torch.full((64, 4, 4, 3), 120, dtype=torch.uint8)
    batch[:, :2, :, 0] = 180
    unit = to_unit(batch)
    found = augmented(batch, **{name: amount}) * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(
        1, 3, 1, 1
    )
    assert found.min() >= -1e-5
    assert found.max() <= 1 + 1e-5
    middle = {"brightness": torch.zeros_like(unit), "contrast": 0.5 * torch.ones_like(unit), "saturation": unit}[name]
    assert ((found - unit).abs() <= amount * torch.maximum((unit - middle).abs(), torch.tensor(0.5)) + 1e-4).all()


def test_erasing_takes_a_rectangle_of_the_published_size():
    batch = torch.full((500, 60, 60, 3), 255, dtype=torch.uint8)
    erased = augmented(batch, erasing=1.0)[:, 0].abs() < 1e-6
    area = erased.flatten(1).float().mean(dim=1)
    assert 0.015 <= area.min() < 0.04
    assert 0.1 < area.max() <= 0.13
    one = erased[0]
    rows, columns = one.any(dim=1).nonzero(), one.any(dim=0).nonzero()
    assert one.sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    share = (augmented(batch, erasing=0.4)[:, 0].abs() < 1e-6).flatten(1).any(dim=1).float().mean()
    assert 0.33 < share < 0.47


def test_the_same_generator_gives_the_same_batch():
    changes = {"rotation": 15.0, "horizontal_flip": 0.5, "brightness": 0.15, "erasing": 0.4}
    assert torch.equal(augmented(images(), 3, **changes), augmented(images(), 3, **changes))
    assert not torch.equal(augmented(images(), 3, **changes), augmented(images(), 4, **changes))


@pytest.mark.parametrize(("border", "dark"), [("zeros", True), ("border", False), ("reflection", False)])
def test_the_border_is_as_asked(border, dark):
    batch = torch.full((50, 20, 20, 1), 200, dtype=torch.uint8)
    lowest = functional.relu(augmented(batch, translate=0.3, border=border) - normalise(torch.zeros(1, 1, 1, 1))).amin()
    assert (lowest < 0.1) == dark
