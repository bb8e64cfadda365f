"""RandAugment: random operations of one magnitude, drawn independently for each image.

Cubuk et al. 2020 (arXiv:1909.13719), with the operations, strengths (31 magnitudes), nearest-neighbor interpolation and
black fill of torchvision.transforms.RandAugment. All kernels are torchvision's and process batches, so images with the
same operation and sign are grouped. Three kernels are from torchvision's v1 transforms: their v2 versions differ by a
gray level of rounding, and published results of `RandAugment` used v1. The others are equal in both, and faster in v2.

Grayscale images get the same operations; Color leaves them unchanged, as in torchvision.
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

NUM_MAGNITUDES = 31  # 0 to 30


@dataclass(frozen=True)
class Operation:
    """A RandAugment operation and the range of its strength.

    Attributes:
        apply: function of a batch, uint8 (images, channels, height, width), and the strength.
        weakest: strength at magnitude 0.
        strongest: strength at magnitude 30; linear in between.
        signed: True if the strength is negated for half of the images.
        side: index into (height, width) if the strength is a fraction of that side, else None.
    """

    apply: Callable[[Tensor, float], Tensor]
    min_strength: float = 0.0
    max_strength: float = 0.0
    signed: bool = False
    side: int | None = None

    def strength(self, magnitude: int, size: tuple[int, int]) -> float:
        """Return the strength at a magnitude (0 to 30) for images of (height, width), in float32 precision."""
        unit = 1.0 if self.side is None else size[self.side]
        return float(torch.linspace(self.min_strength, self.max_strength * unit, NUM_MAGNITUDES)[magnitude])


def _affine(images: Tensor, shear: tuple[float, float] = (0, 0), shift: tuple[float, float] = (0, 0)) -> Tensor:
    """Shear by tan(angle) along (x, y) about the upper left corner, then shift by whole pixels."""
    degrees = [math.degrees(math.atan(by)) for by in shear]
    pixels = [int(by) for by in shift]
    moved: Tensor = v2.affine(images, angle=0.0, translate=pixels, scale=1.0, shear=degrees, center=[0, 0])
    return moved


def _adjust_sharpness(images: Tensor, factor: float) -> Tensor:
    """Adjust sharpness in channels-last format, which is twice as fast on a CPU and gives identical pixels."""
    sharpened: Tensor = v1.adjust_sharpness(images.contiguous(memory_format=torch.channels_last), factor)
    return sharpened


# In torchvision's order. Its affine kernels synchronize with a GPU when they copy their matrix to it.
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
    """Apply one random operation per column of `draws` to each image.

    Args:
        images: uint8, (images, height, width, channels), on any device.
        draws: uniform in [0, 1), (images, operations), on the CPU.
        magnitude: magnitude of the operations, 0 to 30.

    Returns:
        uint8, (images, height, width, channels), a view with channels first in memory.
    """
    table = list(OPERATIONS.values())
    batch = images.permute(0, 3, 1, 2).contiguous()  # (images, channels, height, width), contiguous for the kernels
    height, width = batch.shape[2:]
    for column in draws.numpy().T:
        codes = (column * 2 * len(table)).astype(np.int64)  # 2 * operation + sign
        order = np.argsort(codes, kind="stable")
        unique_codes, counts = np.unique(codes, return_counts=True)
        grouping, inverse = to_device(np.stack([order, np.argsort(order)]), batch.device)
        groups = batch.index_select(0, grouping).tensor_split(np.cumsum(counts)[:-1].tolist())
        outputs = []
        for code, group in zip(unique_codes.tolist(), groups, strict=True):
            operation = table[code // 2]
            strength = operation.strength(magnitude, (height, width))
            outputs.append(operation.apply(group, -strength if operation.signed and code % 2 else strength))
        batch = torch.cat(outputs).index_select(0, inverse)
    return batch.permute(0, 2, 3, 1)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device without synchronizing with it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
