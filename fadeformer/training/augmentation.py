"""Batch augmentation on the device of the images, with independent random parameters for each image.

Order: RandAugment; flip; rotation with scale and translation; brightness, contrast and saturation; normalization;
erasing; then mixup or cutmix of the batch. The published recipe is flip, rotation, jitter and erasing; the paper preset
turns the rest off. The transform parameters of an image are computed on the host from its row of `draw_uniforms`, so
that a batch may be sharded between processes or split into micro-batches, and nothing synchronizes with a GPU (except
RandAugment's affine kernels, which are torchvision's).

Each transform on its own equals torchvision's (`RandomHorizontalFlip`, `RandomRotation`, `ColorJitter`,
`RandomErasing`) in pixels and in distribution. Brightness b, contrast c and saturation s are one affine map of pixel x,

    b c s x + b c (1 - s) gray(x) + b (1 - c) mean(gray)

clamped once. ColorJitter applies the three in random order and clamps after each; without clamping they commute (except
that torchvision's weights of gray sum to 0.9999), so only clipped pixels differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv
from torch import Tensor
from torch.nn import functional

from fadeformer.data.normalization import Normalization
from fadeformer.training.randaugment import randaugment, to_device

LUMA_WEIGHTS = (0.2989, 0.587, 0.114)  # weights of red, green and blue in gray, ITU-R BT.601, as in torchvision
ERASING_ASPECT_RATIOS = (0.3, 3.3)  # minimum and maximum height / width of the erased box, RandomErasing's default
ERASING_ATTEMPTS = 10  # RandomErasing erases nothing if this many boxes in turn do not fit into the image
# First columns of the draws. Areas and aspect ratios of ERASING_ATTEMPTS boxes follow, then RandAugment.
DRAW_COLUMNS = (
    "flip", "angle", "size", "shift_x", "shift_y", "brightness", "contrast", "saturation", "erase", "erase_top",
    "erase_left", "mix_kind", "mix_share", "cut_top", "cut_left",
)  # fmt: skip
# Pixels processed at once on a CPU; four times as many exceed the cache, and each pass is four times slower.
CPU_CHUNK_PIXELS = 2**17

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Augmentation:
    """Strengths and probabilities of the transforms; the fields are the keys of `augment:` in params.yaml.

    Attributes:
        horizontal_flip: probability.
        rotation: maximum angle in both directions, degrees.
        scale: maximum relative change of size in both directions.
        translate: maximum shift in both directions, fraction of the side.
        border: padding mode: zeros (black), border (repeats the edge pixels) or reflection.
        interpolation: nearest (RandomRotation's default) or bilinear.
        brightness: the factor is drawn from 1 - brightness to 1 + brightness.
        contrast: the same for contrast.
        saturation: the same for saturation; no effect on grayscale images.
        erasing: probability.
        erasing_scale: minimum and maximum erased area, fraction of the image.
        randaugment_operations: number of RandAugment operations per image; 0 disables it.
        randaugment_magnitude: their magnitude, 0 to 30.
        mixup: alpha of the Beta distribution of the mixing weight; 0 disables mixup.
        cutmix: alpha of the Beta distribution of the area that an image keeps; 0 disables cutmix. If both are on, each
            is applied with probability 0.5.
    """

    horizontal_flip: float
    rotation: float
    scale: float
    translate: float
    border: Literal["zeros", "border", "reflection"]
    interpolation: Literal["nearest", "bilinear"]
    brightness: float
    contrast: float
    saturation: float
    erasing: float
    erasing_scale: tuple[float, float]
    randaugment_operations: int
    randaugment_magnitude: int
    mixup: float
    cutmix: float

    def draw_uniforms(self, count: int, seed: int) -> Tensor:
        """Draw random numbers for a batch: row i determines the transforms of image i, on any device and in any part.

        Args:
            count: number of images.
            seed: only its lower 32 bits are used, by torch's Mersenne Twister.

        Returns:
            float64, (count, columns), uniform in [0, 1), on the CPU.
        """
        columns = len(DRAW_COLUMNS) + 2 * ERASING_ATTEMPTS + self.randaugment_operations
        return torch.rand(count, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def __call__(self, images: Tensor, draws: Tensor, normalization: Normalization) -> Tensor:
        """Augment and normalize a batch.

        Args:
            images: uint8, (images, height, width, channels), one channel or three, on any device.
            draws: (images, columns), their rows of `draw_uniforms`, on the CPU.
            normalization: channel means and standard deviations.

        Returns:
            float32, (images, channels, height, width).
        """
        n, height, width, channels = images.shape
        if self.randaugment_operations and n:
            operations = draws[:, len(DRAW_COLUMNS) + 2 * ERASING_ATTEMPTS :]
            images = randaugment(images, operations, self.randaugment_magnitude)
        parameters = self.transform_parameters(draws, height, width)
        device_parameters = to_device(parameters, images.device)
        batch = images.new_empty((n, channels, height, width), dtype=torch.float32)
        on_cpu = images.device.type == "cpu"
        step = max(1, CPU_CHUNK_PIXELS // (height * width)) if on_cpu else max(1, n)
        for chunk in (slice(start, start + step) for start in range(0, n, step)):
            pixels, params = images[chunk], device_parameters[chunk]
            pixels = self._warp(pixels, params[:, :6]) if self._has_affine() else self._flip(pixels, draws[chunk])
            factors = params[:, 6:9] if self._has_color_jitter(channels) else None
            _jitter_and_normalize(pixels, factors, normalization.for_channels(channels), batch[chunk])
            if self.erasing and not on_cpu:
                batch[chunk].masked_fill_(_box_mask(params[:, 9:], height, width), 0.0)
        if self.erasing and on_cpu:  # faster than a mask of all pixels
            for image, (top, bottom, left, right) in zip(batch, parameters[:, 9:].astype(int).tolist(), strict=True):
                image[:, top:bottom, left:right] = 0.0
        return batch

    def transform_parameters(self, draws: Tensor, height: int, width: int) -> NDArray[np.float32]:
        """Return affine matrices, color factors and erasing boxes in the columns of one array, (images, 6 + 3 + 4)."""
        matrices, boxes = self._affine_matrices(draws, height, width), self._erasing_boxes(draws, height, width)
        return np.hstack([matrices.reshape(len(draws), 6), self._color_factors(draws), boxes]).astype(np.float32)

    def mix_batch(self, images: Tensor, targets: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Mix image i and its target with image n - 1 - i, by mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899).

        Each image has its own mixing weight, from its row of draws; for cutmix it is computed from the pasted box after
        clipping at the edges. For an odd number of images the middle one is unchanged.

        Args:
            images: float, (images, channels, height, width), normalized.
            targets: float, (images, outputs), on the same device.
            draws: (images, columns), their rows of `draw_uniforms`, on the CPU.

        Returns:
            Mixed images and targets, or the same objects if mixup and cutmix are off.
        """
        if not (self.mixup or self.cutmix):
            return images, targets
        n, _, height, width = images.shape
        u = _columns_by_name(draws)
        use_cutmix = u["mix_kind"] < 0.5 if self.mixup and self.cutmix else np.full(n, bool(self.cutmix))
        alpha = np.where(use_cutmix, self.cutmix, self.mixup)
        weight = betaincinv(alpha, alpha, u["mix_share"])  # quantile function of the Beta distribution
        edges = []
        for side, center in ((height, u["cut_top"]), (width, u["cut_left"])):
            half = (side * np.sqrt(1 - weight)).astype(int) // 2 * use_cutmix
            center = (side * center).astype(int)
            edges += [np.clip(center - half, 0, side), np.clip(center + half, 0, side)]
        top, bottom, left, right = edges
        target_weight = np.where(use_cutmix, 1 - (bottom - top) * (right - left) / (height * width), weight)
        pixel_weight = np.where(use_cutmix, 1.0, weight)  # outside the pasted box, cutmix keeps the pixels
        params = np.stack([pixel_weight, target_weight, *edges], axis=1)
        params_on_device = to_device(params.astype(np.float32), images.device)
        other, mixed = images.flip(0), images
        if self.mixup:
            mixed = torch.lerp(other, images, params_on_device[:, :1, None, None].to(images.dtype))
        if self.cutmix:
            mixed = torch.where(_box_mask(params_on_device[:, 2:], height, width), other, mixed)
        return mixed, torch.lerp(targets.flip(0), targets, params_on_device[:, 1:2].to(targets.dtype))

    def _has_affine(self) -> bool:
        return bool(self.rotation or self.scale or self.translate)

    def _has_color_jitter(self, channels: int) -> bool:
        return bool(self.brightness or self.contrast or (self.saturation and channels == 3))

    def _affine_matrices(self, draws: Tensor, height: int, width: int) -> FloatArray:
        """Return the maps from output to input coordinates in [-1, 1], (images, 2, 3), applied to (x, y, 1)."""
        u = _columns_by_name(draws)
        angle = np.radians(self.rotation) * (2 * u["angle"] - 1)  # counterclockwise, as torchvision's rotate
        size = 1 + self.scale * (2 * u["size"] - 1)
        flip = np.where(u["flip"] < self.horizontal_flip, -1, 1)
        x, y = (self.translate * side * (2 * u[name] - 1) for side, name in ((width, "shift_x"), (height, "shift_y")))
        cos, sin = np.cos(angle) / size, np.sin(angle) / size
        # Computed in pixels, the same unit along both axes, then converted to units of half a side.
        row_x = np.stack([cos * width, -sin * height, -2 * (cos * x - sin * y)]) * flip / width  # flipped first
        row_y = np.stack([sin * width, cos * height, -2 * (sin * x + cos * y)]) / height
        return np.stack([row_x, row_y]).transpose(2, 0, 1)

    def _color_factors(self, draws: Tensor) -> FloatArray:
        """Return the factors of the terms x, gray(x) and mean(gray) of the module's formula, (images, 3)."""
        u = _columns_by_name(draws)
        brightness, contrast, saturation = (
            1 + amount * (2 * u[name] - 1)
            for name, amount in (
                ("brightness", self.brightness), ("contrast", self.contrast), ("saturation", self.saturation),
            )
        )  # fmt: skip
        return brightness[:, None] * np.stack(
            [contrast * saturation, contrast * (1 - saturation), 1 - contrast], axis=1
        )

    def _erasing_boxes(self, draws: Tensor, height: int, width: int) -> FloatArray:
        """Return top, bottom, left, right of the boxes to erase, drawn as in RandomErasing, (images, 4); or zeros."""
        u = _columns_by_name(draws)
        area, aspect = np.split(
            draws.numpy()[:, len(DRAW_COLUMNS) : len(DRAW_COLUMNS) + 2 * ERASING_ATTEMPTS], 2, axis=1
        )
        low, high = self.erasing_scale
        area = (low + (high - low) * area) * height * width  # (images, TRIES)
        aspect = (
            ERASING_ASPECT_RATIOS[0] * (ERASING_ASPECT_RATIOS[1] / ERASING_ASPECT_RATIOS[0]) ** aspect
        )  # log-uniform
        tall, wide = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (tall < height) & (wide < width)
        first = fits.argmax(axis=1)[:, None]
        erased = (u["erase"] < self.erasing) & fits.any(axis=1)
        tall, wide = (np.take_along_axis(sides, first, axis=1)[:, 0] for sides in (tall, wide))
        top, left = np.floor(u["erase_top"] * (height - tall + 1)), np.floor(u["erase_left"] * (width - wide + 1))
        return np.stack([top, top + tall, left, left + wide], axis=1) * erased[:, None]

    def _warp(self, images: Tensor, maps: Tensor) -> Tensor:
        """Apply affine maps; uint8 (images, height, width, channels) to float32 (images, channels, height, width)."""
        n, height, width, _ = images.shape
        x, y = (torch.arange(1 - side, side, 2, device=images.device) / side for side in (width, height))
        rows = maps.view(n, 2, 3)
        across = rows[:, :, 0, None] * x  # (images, 2, width)
        down = rows[:, :, 1, None] * y + rows[:, :, 2, None]  # (images, 2, height)
        grid = across[:, :, None, :] + down[:, :, :, None]  # (images, 2, height, width)
        # grid_sample reads channels-last strides without a copy, and writes channels first.
        return functional.grid_sample(
            images.permute(0, 3, 1, 2).to(torch.float32), grid.permute(0, 2, 3, 1), mode=self.interpolation,
            padding_mode=self.border, align_corners=False,
        )  # fmt: skip

    def _flip(self, images: Tensor, draws: Tensor) -> Tensor:
        """Flip and convert as `_warp` does, faster, if rotation, scale and translation are off."""
        batch = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        if self.horizontal_flip:
            flips = np.flatnonzero(_columns_by_name(draws)["flip"] < self.horizontal_flip)
            these = to_device(flips, images.device)
            batch.index_copy_(0, these, batch.index_select(0, these).flip(3))
        return batch


def _columns_by_name(draws: Tensor) -> dict[str, FloatArray]:
    """Return the columns of `DRAW_COLUMNS` by name, each (images,)."""
    return dict(zip(DRAW_COLUMNS, draws.numpy().T, strict=False))


def _jitter_and_normalize(batch: Tensor, factors: Tensor | None, normalization: Normalization, out: Tensor) -> None:
    """Apply color jitter, clamp, and normalize pixels in [0, 255].

    Each step is a vectorized operation on one channel; a 3 x 3 matrix product would not be faster, and would lose
    precision on a GPU with TF32.

    Args:
        batch: float32, (images, channels, height, width).
        factors: factors of pixel, gray and mean gray, (images, 3); None for no jitter.
        normalization: channel means and standard deviations.
        out: output, of the shape of `batch`.
    """
    if factors is not None:
        pixel_factor, gray_factor, mean_factor = factors[:, :, None, None, None].unbind(1)  # each (images, 1, 1, 1)
        gray = luminance(batch)  # (images, 1, height, width)
        offset = gray * gray_factor + gray.mean(dim=(2, 3), keepdim=True) * mean_factor
        batch = torch.mul(batch, pixel_factor, out=out).add_(offset).clamp_(0, 255)
    for channel, (mean, std) in enumerate(zip(normalization.mean, normalization.std, strict=True)):
        shift = torch.tensor(-mean / std)  # shift + scale * pixel in one pass; a CPU scalar needs no copy to the device
        torch.add(shift, batch[:, channel], alpha=1 / (255 * std), out=out[:, channel])


def luminance(batch: Tensor) -> Tensor:
    """Convert to grayscale, (images, channels, height, width) to (images, 1, height, width)."""
    if batch.shape[1] == 1:
        return batch
    red, green, blue = (batch[:, channel : channel + 1] for channel in range(3))
    return torch.mul(red, LUMA_WEIGHTS[0]).add_(green, alpha=LUMA_WEIGHTS[1]).add_(blue, alpha=LUMA_WEIGHTS[2])


def _box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return the mask of the pixels in boxes (top, bottom, left, right), bool (images, 1, height, width)."""
    top, bottom, left, right = boxes[:, :, None, None, None].unbind(1)  # each (images, 1, 1, 1)
    y = torch.arange(height, device=boxes.device).view(1, 1, height, 1)
    x = torch.arange(width, device=boxes.device).view(1, 1, 1, width)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)
