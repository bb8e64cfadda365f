"""Augmentation of a whole batch on the device it is on, with its own random numbers for each image.

The published order: flip, rotation, brightness, contrast, saturation, normalisation, erasing; scale and translation
are ours and off in the paper preset. One `grid_sample` does all that moves pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

# ImageNet's mean and standard deviation of red, green and blue in [0, 1], as the published model uses them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
LUMA = (0.2989, 0.587, 0.114)  # weights of red, green and blue in grey, ITU-R BT.601, as torchvision has them


@dataclass(frozen=True)
class Augmentation:
    """How far each random change may go; the fields are the keys of `augment:` in params.yaml.

    Attributes:
        horizontal_flip: probability.
        rotation: largest angle either way, degrees.
        scale: largest change of size either way, fraction.
        translate: largest shift either way, fraction of the side.
        border: what comes in from outside: zeros (black), border (the edge goes on) or reflection.
        brightness: largest change of the factor either way, fraction; contrast and saturation likewise.
        contrast: see brightness.
        saturation: see brightness.
        erasing: probability.
        erasing_scale: smallest and largest erased area, fraction of the image.
    """

    horizontal_flip: float
    rotation: float
    scale: float
    translate: float
    border: Literal["zeros", "border", "reflection"]
    brightness: float
    contrast: float
    saturation: float
    erasing: float
    erasing_scale: tuple[float, float]

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augments and normalises.

        Args:
            images: uint8, (images, height, width, channels).
            generator: on the device of the images; the same state gives the same batch.

        Returns:
            float32, (images, channels, height, width).
        """
        batch = to_unit(images)
        batch = self._move(batch, generator)
        batch = self._jitter(batch, generator)
        return self._erase(normalise(batch), generator)

    def _move(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        n, device = len(batch), batch.device
        angle = math.radians(self.rotation) * _symmetric(n, generator, device)
        size = 1 + self.scale * _symmetric(n, generator, device)
        flip = 1 - 2 * (torch.rand(n, generator=generator, device=device) < self.horizontal_flip).float()
        shift = 2 * self.translate * torch.stack([_symmetric(n, generator, device) for _ in range(2)], dim=1)
        cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
        # Rows of the map from a target pixel to where it is read, in coordinates from -1 to 1.
        row_x = torch.stack([cos * flip, -sin, shift[:, 0]], dim=1)
        row_y = torch.stack([sin * flip, cos, shift[:, 1]], dim=1)
        grid = functional.affine_grid(torch.stack([row_x, row_y], dim=1), list(batch.shape), align_corners=False)
        return functional.grid_sample(batch, grid, mode="bilinear", padding_mode=self.border, align_corners=False)

    def _jitter(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        n, channels = batch.shape[:2]
        brightness, contrast, saturation = (
            1 + amount * _symmetric(n, generator, batch.device).view(n, 1, 1, 1)
            for amount in (self.brightness, self.contrast, self.saturation)
        )
        batch = (batch * brightness).clamp(0, 1)
        mean = grey(batch).mean(dim=(1, 2, 3), keepdim=True)
        batch = torch.lerp(mean.expand_as(batch), batch, contrast).clamp(0, 1)
        if channels == 3:
            batch = torch.lerp(grey(batch).expand_as(batch), batch, saturation).clamp(0, 1)
        return batch

    def _erase(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = batch.shape
        low, high = self.erasing_scale
        chance, area, aspect, top, left = torch.rand(5, n, generator=generator, device=batch.device)
        area = (low + (high - low) * area) * height * width
        aspect = torch.exp(math.log(0.3) + (math.log(3.3) - math.log(0.3)) * aspect)  # as published: 0.3 to 3.3
        tall = torch.sqrt(area * aspect).clamp(max=height)
        wide = torch.sqrt(area / aspect).clamp(max=width)
        top, left = top * (height - tall), left * (width - wide)
        y = torch.arange(height, device=batch.device).view(1, height, 1) + 0.5
        x = torch.arange(width, device=batch.device).view(1, 1, width) + 0.5
        inside_y = (y >= top.view(n, 1, 1)) & (y < (top + tall).view(n, 1, 1))
        inside_x = (x >= left.view(n, 1, 1)) & (x < (left + wide).view(n, 1, 1))
        erased = inside_y & inside_x & (chance < self.erasing).view(n, 1, 1)
        return batch.masked_fill(erased.unsqueeze(1), 0.0)


def to_unit(images: Tensor) -> Tensor:
    """uint8 (images, height, width, channels) to float32 (images, channels, height, width) in [0, 1]."""
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(255)


def normalise(batch: Tensor) -> Tensor:
    """Subtracts the mean and divides by the standard deviation of each channel; grey images take the means of both."""
    mean, std = (batch.new_tensor(values) for values in (MEAN, STD))
    if batch.shape[1] == 1:
        mean, std = mean.mean(dim=0, keepdim=True), std.mean(dim=0, keepdim=True)
    return (batch - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def grey(batch: Tensor) -> Tensor:
    """Luminance, (images, channels, height, width) to (images, 1, height, width)."""
    if batch.shape[1] == 1:
        return batch
    return (batch * batch.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def _symmetric(n: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Uniform in [-1, 1)."""
    return 2 * torch.rand(n, generator=generator, device=device) - 1
