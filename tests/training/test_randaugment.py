"""RandAugment operations against torchvision, pixel by pixel."""

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms.autoaugment import _apply_op

from fadeformer.training.randaugment import OPERATIONS, randaugment
from tests.training.test_augmentation import random_images

SIGNED = {name for name, operation in OPERATIONS.items() if operation.signed}


def draw_of(name: str, sign: int) -> float:
    """Return the center of the interval of uniform draws for an operation and sign."""
    return (2 * list(OPERATIONS).index(name) + (sign < 0) + 0.5) / (2 * len(OPERATIONS))


def apply_operation(batch: torch.Tensor, draws: list[float], magnitude: int) -> torch.Tensor:
    """Apply one operation to each image; channels first."""
    draws = torch.tensor(draws, dtype=torch.float64).unsqueeze(1)
    return randaugment(batch, draws, magnitude).permute(0, 3, 1, 2)


def torchvision_operation(image: torch.Tensor, name: str, sign: int, magnitude: int) -> torch.Tensor:
    """Apply an operation as RandAugment.forward does; channels first."""
    magnitudes, signed = RandAugment()._augmentation_space(31, tuple(image.shape[1:]))[name]
    strength = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
    return _apply_op(image, name, -strength if signed and sign < 0 else strength, InterpolationMode.NEAREST, None)


def test_operations_match_torchvision():
    space = RandAugment()._augmentation_space(31, (40, 30))
    assert list(space) == list(OPERATIONS)
    assert {name for name, (_, signed) in space.items() if signed} == SIGNED
    for name, (magnitudes, _) in space.items():
        expected = [float(value) for value in magnitudes] if magnitudes.ndim else [0.0] * 31
        strengths = [OPERATIONS[name].strength(magnitude, (40, 30)) for magnitude in range(31)]
        assert (list(map(round, strengths)) if name == "Posterize" else strengths) == expected  # strength in bits


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_operation_matches_torchvision_pixels(name, magnitude, channels):
    for size in ((32, 32), (37, 45)):
        batch = random_images(4, *size, channels)
        batch[1] = 255 - batch[1]
        batch[2] = 128  # a constant image has no contrast
        batch[3] = torch.randint(0, 256, batch[3].shape, generator=torch.Generator().manual_seed(1))
        for sign in (1, -1):
            expected = torch.stack(
                [torchvision_operation(image, name, sign, magnitude) for image in batch.permute(0, 3, 1, 2)]
            )
            assert torch.equal(apply_operation(batch, [draw_of(name, sign)] * 4, magnitude), expected)


def test_operations_are_applied_per_image_in_order():
    names = list(OPERATIONS)
    batch = random_images(40, 20, 20)
    random = np.random.default_rng(0)
    operations_per_image = [
        [(names[random.integers(len(names))], random.choice([1, -1])) for _ in range(2)] for _ in batch
    ]
    draws = torch.tensor(
        [[draw_of(*operation_and_sign) for operation_and_sign in operations] for operations in operations_per_image],
        dtype=torch.float64,
    )
    actual = randaugment(batch, draws, 9)
    assert actual.shape == batch.shape
    for image, operations, result in zip(
        batch.permute(0, 3, 1, 2), operations_per_image, actual.permute(0, 3, 1, 2), strict=True
    ):
        expected = image
        for name, sign in operations:
            expected = torchvision_operation(expected, name, sign, 9)
        assert torch.equal(result, expected)
