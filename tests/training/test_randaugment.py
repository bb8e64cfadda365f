"""RandAugment: every operation gives torchvision's bytes, each as often as torchvision's."""

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms.autoaugment import _apply_op

from fadeformer.training.randaugment import OPERATIONS, randaugment
from tests.training.test_augmentation import images

SIGNED = {name for name, operation in OPERATIONS.items() if operation.signed}


def drawn(name: str, sign: int) -> float:
    """The middle of the interval of uniform numbers that stands for an operation and its sign."""
    return (2 * list(OPERATIONS).index(name) + (sign < 0) + 0.5) / (2 * len(OPERATIONS))


def ours(batch: torch.Tensor, numbers: list[float], magnitude: int) -> torch.Tensor:
    """One operation for each image, channels first."""
    draws = torch.tensor(numbers, dtype=torch.float64).unsqueeze(1)
    return randaugment(batch, draws, magnitude).permute(0, 3, 1, 2)


def published(image: torch.Tensor, name: str, sign: int, magnitude: int) -> torch.Tensor:
    """As RandAugment.forward calls it; image of channels first."""
    magnitudes, signed = RandAugment()._augmentation_space(31, tuple(image.shape[1:]))[name]
    strength = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
    return _apply_op(image, name, -strength if signed and sign < 0 else strength, InterpolationMode.NEAREST, None)


def test_the_table_is_torchvisions():
    space = RandAugment()._augmentation_space(31, (40, 30))
    assert list(space) == list(OPERATIONS)
    assert {name for name, (_, signed) in space.items() if signed} == SIGNED
    for name, (magnitudes, _) in space.items():
        expected = [float(value) for value in magnitudes] if magnitudes.ndim else [0.0] * 31
        strengths = [OPERATIONS[name].strength(magnitude, (40, 30)) for magnitude in range(31)]
        assert (list(map(round, strengths)) if name == "Posterize" else strengths) == expected  # its kernel takes bits


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_every_operation_gives_torchvisions_bytes(name, magnitude, channels):
    for size in ((32, 32), (37, 45)):
        batch = images(4, *size, channels)
        batch[1] = 255 - batch[1]
        batch[2] = 128  # a plain image has no contrast to stretch
        batch[3] = torch.randint(0, 256, batch[3].shape, generator=torch.Generator().manual_seed(1))
        for sign in (1, -1):
            expected = torch.stack([published(image, name, sign, magnitude) for image in batch.permute(0, 3, 1, 2)])
            assert torch.equal(ours(batch, [drawn(name, sign)] * 4, magnitude), expected)


def test_each_image_undergoes_its_own_operations_one_after_the_other():
    names = list(OPERATIONS)
    batch = images(40, 20, 20)
    random = np.random.default_rng(0)
    chosen = [[(names[random.integers(len(names))], random.choice([1, -1])) for _ in range(2)] for _ in batch]
    draws = torch.tensor([[drawn(*one) for one in pair] for pair in chosen], dtype=torch.float64)
    found = randaugment(batch, draws, 9)
    assert found.shape == batch.shape
    for image, pair, result in zip(batch.permute(0, 3, 1, 2), chosen, found.permute(0, 3, 1, 2), strict=True):
        expected = image
        for name, sign in pair:
            expected = published(expected, name, sign, 9)
        assert torch.equal(result, expected)
