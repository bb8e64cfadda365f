"""Convert uint8 images to normalized float32 model input: channels first, standardized per channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor


@dataclass(frozen=True)
class Normalization:
    """Per-channel normalization of images scaled to [0, 1].

    Attributes:
        mean: mean per channel.
        std: standard deviation per channel, above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Normalize uint8 (images, height, width, channels) to float32 (images, channels, height, width)."""
        batch = to_unit_range(images)
        mean, std = (batch.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return batch.sub_(mean).div_(std)

    def for_channels(self, channels: int) -> Normalization:
        """Adapt to another number of channels by averaging over the existing ones, such as ImageNet to grayscale."""
        if len(self.mean) == channels:
            return self
        return Normalization((sum(self.mean) / len(self.mean),) * channels, (sum(self.std) / len(self.std),) * channels)


IMAGENET = Normalization(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def to_unit_range(images: Tensor) -> Tensor:
    """Scale uint8 (images, height, width, channels) to float32 (images, channels, height, width) in [0, 1]."""
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
