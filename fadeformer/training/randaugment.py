"""RandAugment: each image undergoes a few operations drawn at random, all of one strength.

Cubuk et al. 2020 (arXiv:1909.13719), with the operations, strengths (31 steps), nearest neighbour and black fill of
torchvision.transforms.RandAugment. Every kernel is torchvision's own and takes a batch, so the images that drew the
same operation and sign go through it together. Three are of its v1, the others of its v2: where the two differ, by
one grey level from rounding, v1 is what `RandAugment` has meant since it came out; where they agree, v2 is faster.

Grey images undergo the same operations; Color leaves them as they are, as in torchvision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import functional as v1  # type: ignore[import-untyped]
from torchvision.transforms.v2 import functional as v2  # type: ignore[import-untyped]

NUM_MAGNITUDES = 31  # strengths, 0 to 30


@dataclass(frozen=True)
class Operation:
    """A kernel and how its strength follows from the magnitude.

    Attributes:
        apply: of a batch, uint8 (images, channels, height, width), and the strength.
        weakest: strength at magnitude 0.
        strongest: strength at magnitude 30, linear in between.
        signed: whether the strength is negative for half of the images.
        side: the strength is a fraction of this side, an index of (height, width); None: it is no length.
    """

    apply: Callable[[Tensor, float], Tensor]
    min_strength: float = 0.0
    max_strength: float = 0.0
    signed: bool = False
    side: int | None = None

    def strength(self, magnitude: int, size: tuple[int, int]) -> float:
        """At a magnitude from 0 to 30, for images of (height, width) pixels; rounded to float32 as torchvision's."""
        unit = 1.0 if self.side is None else size[self.side]
        return float(torch.linspace(self.min_strength, self.max_strength * unit, NUM_MAGNITUDES)[magnitude])


def _affine(images: Tensor, shear: tuple[float, float] = (0, 0), shift: tuple[float, float] = (0, 0)) -> Tensor:
    """Sheared by pixels per pixel (x, y) about the upper left corner, then shifted by whole pixels."""
    degrees = [math.degrees(math.atan(by)) for by in shear]
    pixels = [int(by) for by in shift]
    moved: Tensor = v2.affine(images, angle=0.0, translate=pixels, scale=1.0, shear=degrees, center=[0, 0])
    return moved


def _adjust_sharpness(images: Tensor, factor: float) -> Tensor:
    """With the channels last, as its convolution of single channels is twice as fast so on a CPU, to the same bytes."""
    sharpened: Tensor = v1.adjust_sharpness(images.contiguous(memory_format=torch.channels_last), factor)
    return sharpened


# In torchvision's order. On a GPU its affine kernels send their six numbers in a copy that waits for the device.
OPERATIONS = {
    "Identity": Operation(lambda images, _: images),
    "ShearX": Operation(lambda images, by: _affine(images, shear=(by, 0)), 0, 0.3, signed=True),
    "ShearY": Operation(lambda images, by: _affine(images, shear=(0, by)), 0, 0.3, signed=True),
    "TranslateX": Operation(lambda images, by: _affine(images, shift=(by, 0)), 0, 150 / 331, signed=True, side=1),
    "TranslateY": Operation(lambda images, by: _affine(images, shift=(0, by)), 0, 150 / 331, signed=True, side=0),
    "Rotate": Operation(lambda images, degrees: v2.rotate(images, degrees), 0, 30, signed=True),
    "Brightness": Operation(lambda images, by: v2.adjust_brightness(images, 1 + by), 0, 0.9, signed=True),
    "Color": Operation(lambda images, by: v1.adjust_saturation(images, 1 + by), 0, 0.9, signed=True),
    "Contrast": Operation(lambda images, by: v2.adjust_contrast(images, 1 + by), 0, 0.9, signed=True),
    "Sharpness": Operation(lambda images, by: _adjust_sharpness(images, 1 + by), 0, 0.9, signed=True),
    "Posterize": Operation(lambda images, bits: v2.posterize(images, round(bits)), 8, 4),
    "Solarize": Operation(lambda images, threshold: v2.solarize(images, threshold), 255, 0),
    "AutoContrast": Operation(lambda images, _: v1.autocontrast(images)),
    "Equalize": Operation(lambda images, _: v2.equalize(images)),
}


def randaugment(images: Tensor, draws: Tensor, magnitude: int) -> Tensor:
    """As many operations on each image as `draws` has columns.

    Args:
        images: uint8, (images, height, width, channels), on any device.
        draws: uniform in [0, 1), (images, operations), on the CPU.
        magnitude: strength, 0 to 30.

    Returns:
        uint8, (images, height, width, channels), a view of channels first.
    """
    table = list(OPERATIONS.values())
    batch = images.permute(0, 3, 1, 2).contiguous()  # (images, channels, height, width), which the kernels like best
    height, width = batch.shape[2:]
    for column in draws.numpy().T:
        drawn = (column * 2 * len(table)).astype(np.int64)  # 2 * operation + sign
        order = np.argsort(drawn, kind="stable")
        kinds, counts = np.unique(drawn, return_counts=True)
        there, back = to_device(np.stack([order, np.argsort(order)]), batch.device)
        groups = batch.index_select(0, there).tensor_split(np.cumsum(counts)[:-1].tolist())
        done = []
        for kind, group in zip(kinds.tolist(), groups, strict=True):
            operation = table[kind // 2]
            strength = operation.strength(magnitude, (height, width))
            done.append(operation.apply(group, -strength if operation.signed and kind % 2 else strength))
        batch = torch.cat(done).index_select(0, back)
    return batch.permute(0, 2, 3, 1)


def to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Numbers of the host on the device, without waiting for what the device has still to do."""
    held = torch.from_numpy(numbers)
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held.to(device)
