"""uint8 images to what a network sees: channels first, in [0, 1], less a mean and over a deviation for each channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each channel, of pixels in [0, 1].

    Attributes:
        mean: (channels,).
        std: (channels,), above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (images, height, width, channels) to float32 (images, channels, height, width)."""
        batch = to_unit_range(images)
        mean, std = (batch.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return batch.sub_(mean).div_(std)

    def for_channels(self, channels: int) -> Normalization:
        """The same for grey images too: of one channel it is the means of the three."""
        if len(self.mean) == channels:
            return self
        return Normalization((sum(self.mean) / len(self.mean),) * channels, (sum(self.std) / len(self.std),) * channels)


IMAGENET = Normalization(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 (images, height, width, channels) to float32 (images, channels, height, width) in [0, 1]."""
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
