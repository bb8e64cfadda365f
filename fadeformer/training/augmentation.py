"""Augmentation of a whole batch on the device it is on, where each image follows numbers of its own.

The order: RandAugment, flip, rotation with scale and translation, brightness with contrast and saturation,
normalisation, erasing; then mixup or cutmix of the finished batch. The published recipe is flip, rotation, jitter,
erasing; all else is ours and off in the paper preset. What an image undergoes is computed on the host from its row of
`draw`, so a batch may be shared between processes or cut into parts, and a GPU is waited for by none of this (but
for RandAugment's affine kernels, which are torchvision's).

Single changes equal torchvision's (`RandomHorizontalFlip`, `RandomRotation`, `ColorJitter`, `RandomErasing`) in
pixels and in distribution. Brightness b, contrast c and saturation s are one affine map of each pixel x,

    b c s x + b c (1 - s) grey(x) + b (1 - c) mean(grey)

which is clamped once. ColorJitter applies the three in random order and clamps after each; without clamping they
commute (but for torchvision's weights of grey, which add up to 0.9999), so only clipped pixels differ.
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

LUMA_WEIGHTS = (0.2989, 0.587, 0.114)  # weights of red, green and blue in grey, ITU-R BT.601, as torchvision has them
ERASING_ASPECT_RATIOS = (0.3, 3.3)  # smallest and largest height / width of what is erased, RandomErasing's default
ERASING_ATTEMPTS = 10  # RandomErasing gives up when so many rectangles in turn were larger than the image
# What the first columns of the draws decide; then come areas and aspects of TRIES erased rectangles, then RandAugment.
DRAW_COLUMNS = (
    "flip", "angle", "size", "shift_x", "shift_y", "brightness", "contrast", "saturation", "erase", "erase_top",
    "erase_left", "mix_kind", "mix_share", "cut_top", "cut_left",
)  # fmt: skip
# Worked on at once on a CPU: with four times as many, each pass goes to memory, and takes four times as long.
CPU_CHUNK_PIXELS = 2**17

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Augmentation:
    """How far each random change may go; the fields are the keys of `augment:` in params.yaml.

    Attributes:
        horizontal_flip: probability.
        rotation: largest angle either way, degrees.
        scale: largest change of size either way, fraction.
        translate: largest shift either way, fraction of the side.
        border: what comes in from outside: zeros (black), border (the edge goes on) or reflection.
        interpolation: between the pixels of what is moved: nearest (RandomRotation's default) or bilinear.
        brightness: largest change of the factor either way, fraction; contrast and saturation likewise.
        contrast: see brightness.
        saturation: see brightness; no effect on grey images.
        erasing: probability.
        erasing_scale: smallest and largest erased area, fraction of the image.
        randaugment_operations: how many random operations each image undergoes first; 0: none.
        randaugment_magnitude: their strength, 0 to 30.
        mixup: alpha of the Beta distribution of the share that an image keeps when mixed with another; 0: off.
        cutmix: likewise of the area it keeps when a rectangle of another is pasted; 0: off. If both are on, each
            image undergoes one or the other with equal chance.
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
        """Random numbers for a batch: row i decides all that happens to image i, on any device and in any part.

        Args:
            count: images.
            seed: only its lower 32 bits count, as torch's Mersenne Twister takes no more.

        Returns:
            float64, (count, numbers), uniform in [0, 1), on the CPU.
        """
        numbers = len(DRAW_COLUMNS) + 2 * ERASING_ATTEMPTS + self.randaugment_operations
        return torch.rand(count, numbers, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def __call__(self, images: Tensor, draws: Tensor, normalisation: Normalization) -> Tensor:
        """Augments and normalises.

        Args:
            images: uint8, (images, height, width, channels), one channel or three, on any device.
            draws: (images, numbers), their rows of `draw`, on the CPU.
            normalisation: of each channel.

        Returns:
            float32, (images, channels, height, width).
        """
        n, height, width, channels = images.shape
        if self.randaugment_operations and n:
            operations = draws[:, len(DRAW_COLUMNS) + 2 * ERASING_ATTEMPTS :]
            images = randaugment(images, operations, self.randaugment_magnitude)
        on_host = self.transform_parameters(draws, height, width)
        numbers = to_device(on_host, images.device)
        batch = images.new_empty((n, channels, height, width), dtype=torch.float32)
        on_cpu = images.device.type == "cpu"
        step = max(1, CPU_CHUNK_PIXELS // (height * width)) if on_cpu else max(1, n)
        for part in (slice(start, start + step) for start in range(0, n, step)):
            raw, here = images[part], numbers[part]
            moved = self._warp(raw, here[:, :6]) if self._has_affine() else self._flip(raw, draws[part])
            factors = here[:, 6:9] if self._has_color_jitter(channels) else None
            _jitter_and_normalize(moved, factors, normalisation.for_channels(channels), batch[part])
            if self.erasing and not on_cpu:
                batch[part].masked_fill_(_box_mask(here[:, 9:], height, width), 0.0)
        if self.erasing and on_cpu:  # a mask of every pixel would take as long as all the rest
            for image, (top, bottom, left, right) in zip(batch, on_host[:, 9:].astype(int).tolist(), strict=True):
                image[:, top:bottom, left:right] = 0.0
        return batch

    def transform_parameters(self, draws: Tensor, height: int, width: int) -> NDArray[np.float32]:
        """All that the device needs to know: `_maps`, `_colours` and `_boxes` side by side, (images, 6 + 3 + 4)."""
        maps, boxes = self._affine_matrices(draws, height, width), self._erasing_boxes(draws, height, width)
        return np.hstack([maps.reshape(len(draws), 6), self._color_factors(draws), boxes]).astype(np.float32)

    def mix_batch(self, images: Tensor, targets: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes image i and its target with image n - 1 - i, by mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899).

        The share that an image keeps is its own, from its own row; for cutmix it is that of the rectangle which was
        left after clipping at the edges. The middle one of an odd number stays as it is.

        Args:
            images: float, (images, channels, height, width), normalised.
            targets: float, (images, outputs), on the same device.
            draws: (images, numbers), their rows of `draw`, on the CPU.

        Returns:
            Both mixed, or the same objects if mixup and cutmix are off.
        """
        if not (self.mixup or self.cutmix):
            return images, targets
        n, _, height, width = images.shape
        u = _columns_by_name(draws)
        cuts = u["mix_kind"] < 0.5 if self.mixup and self.cutmix else np.full(n, bool(self.cutmix))
        alpha = np.where(cuts, self.cutmix, self.mixup)
        share = betaincinv(alpha, alpha, u["mix_share"])  # the Beta distribution's quantile
        edges = []
        for side, middle in ((height, u["cut_top"]), (width, u["cut_left"])):
            half = (side * np.sqrt(1 - share)).astype(int) // 2 * cuts
            middle = (side * middle).astype(int)
            edges += [np.clip(middle - half, 0, side), np.clip(middle + half, 0, side)]
        top, bottom, left, right = edges
        kept = np.where(cuts, 1 - (bottom - top) * (right - left) / (height * width), share)
        numbers = np.stack([np.where(cuts, 1.0, share), kept, *edges], axis=1)  # a cut image keeps its other pixels
        there = to_device(numbers.astype(np.float32), images.device)
        other, mixed = images.flip(0), images
        if self.mixup:
            mixed = torch.lerp(other, images, there[:, :1, None, None].to(images.dtype))
        if self.cutmix:
            mixed = torch.where(_box_mask(there[:, 2:], height, width), other, mixed)
        return mixed, torch.lerp(targets.flip(0), targets, there[:, 1:2].to(targets.dtype))

    def _has_affine(self) -> bool:
        return bool(self.rotation or self.scale or self.translate)

    def _has_color_jitter(self, channels: int) -> bool:
        return bool(self.brightness or self.contrast or (self.saturation and channels == 3))

    def _affine_matrices(self, draws: Tensor, height: int, width: int) -> FloatArray:
        """From a target pixel to where it is read, in coordinates from -1 to 1: (images, 2, 3) on (x, y, 1)."""
        u = _columns_by_name(draws)
        angle = np.radians(self.rotation) * (2 * u["angle"] - 1)  # anticlockwise, as torchvision's rotate
        size = 1 + self.scale * (2 * u["size"] - 1)
        flip = np.where(u["flip"] < self.horizontal_flip, -1, 1)
        x, y = (self.translate * side * (2 * u[name] - 1) for side, name in ((width, "shift_x"), (height, "shift_y")))
        cos, sin = np.cos(angle) / size, np.sin(angle) / size
        # In pixels, as no other unit is the same across and down; then in halves of the sides.
        row_x = np.stack([cos * width, -sin * height, -2 * (cos * x - sin * y)]) * flip / width  # flipped first
        row_y = np.stack([sin * width, cos * height, -2 * (sin * x + cos * y)]) / height
        return np.stack([row_x, row_y]).transpose(2, 0, 1)

    def _color_factors(self, draws: Tensor) -> FloatArray:
        """Factors of a pixel, of its grey and of the image's mean grey, which are added up: (images, 3)."""
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
        """Top, bottom, left, right of what is erased, by RandomErasing's rule: (images, 4); empty where nothing is."""
        u = _columns_by_name(draws)
        area, aspect = np.split(
            draws.numpy()[:, len(DRAW_COLUMNS) : len(DRAW_COLUMNS) + 2 * ERASING_ATTEMPTS], 2, axis=1
        )
        low, high = self.erasing_scale
        area = (low + (high - low) * area) * height * width  # (images, TRIES)
        aspect = (
            ERASING_ASPECT_RATIOS[0] * (ERASING_ASPECT_RATIOS[1] / ERASING_ASPECT_RATIOS[0]) ** aspect
        )  # uniform in its logarithm
        tall, wide = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (tall < height) & (wide < width)
        first = fits.argmax(axis=1)[:, None]
        erased = (u["erase"] < self.erasing) & fits.any(axis=1)
        tall, wide = (np.take_along_axis(sides, first, axis=1)[:, 0] for sides in (tall, wide))
        top, left = np.floor(u["erase_top"] * (height - tall + 1)), np.floor(u["erase_left"] * (width - wide + 1))
        return np.stack([top, top + tall, left, left + wide], axis=1) * erased[:, None]

    def _warp(self, images: Tensor, maps: Tensor) -> Tensor:
        """uint8 (images, height, width, channels) to float32 (images, channels, height, width) in [0, 255]."""
        n, height, width, _ = images.shape
        x, y = (torch.arange(1 - side, side, 2, device=images.device) / side for side in (width, height))
        rows = maps.view(n, 2, 3)
        across = rows[:, :, 0, None] * x  # (images, 2, width)
        down = rows[:, :, 1, None] * y + rows[:, :, 2, None]  # (images, 2, height)
        grid = across[:, :, None, :] + down[:, :, :, None]  # (images, 2, height, width)
        # The pixels are read as they lie, channels last: grid_sample takes any strides, and writes channels first.
        return functional.grid_sample(
            images.permute(0, 3, 1, 2).to(torch.float32), grid.permute(0, 2, 3, 1), mode=self.interpolation,
            padding_mode=self.border, align_corners=False,
        )  # fmt: skip

    def _flip(self, images: Tensor, draws: Tensor) -> Tensor:
        """What `_moved` gives where nothing turns, grows or shifts, without reading pixel by pixel."""
        batch = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        if self.horizontal_flip:
            flips = np.flatnonzero(_columns_by_name(draws)["flip"] < self.horizontal_flip)
            these = to_device(flips, images.device)
            batch.index_copy_(0, these, batch.index_select(0, these).flip(3))
        return batch


def _columns_by_name(draws: Tensor) -> dict[str, FloatArray]:
    """The columns that decide one thing each, (images,)."""
    return dict(zip(DRAW_COLUMNS, draws.numpy().T, strict=False))


def _jitter_and_normalize(batch: Tensor, factors: Tensor | None, normalisation: Normalization, out: Tensor) -> None:
    """Jitters, clamps and normalises pixels in [0, 255].

    Each step is a pass over one plane or one number per image, which torch has vectorised; a matrix product of three
    by three would be no faster, and on a GPU would lose bits where TF32 is allowed.

    Args:
        batch: float32, (images, channels, height, width).
        factors: of a pixel, its grey and the mean grey, (images, 3); None: no jitter.
        normalisation: of each channel.
        out: where the result goes, of the shape of `batch`.
    """
    if factors is not None:
        of_pixel, of_grey, of_mean = factors[:, :, None, None, None].unbind(1)  # each (images, 1, 1, 1)
        grey = luminance(batch)  # (images, 1, height, width)
        level = grey * of_grey + grey.mean(dim=(2, 3), keepdim=True) * of_mean
        batch = torch.mul(batch, of_pixel, out=out).add_(level).clamp_(0, 255)
    for channel, (mean, std) in enumerate(zip(normalisation.mean, normalisation.std, strict=True)):
        shift = torch.tensor(-mean / std)  # shift + scale * pixel is one pass; of the host, which no kernel waits for
        torch.add(shift, batch[:, channel], alpha=1 / (255 * std), out=out[:, channel])


def luminance(batch: Tensor) -> Tensor:
    """Grey of each pixel, (images, channels, height, width) to (images, 1, height, width)."""
    if batch.shape[1] == 1:
        return batch
    red, green, blue = (batch[:, channel : channel + 1] for channel in range(3))
    return torch.mul(red, LUMA_WEIGHTS[0]).add_(green, alpha=LUMA_WEIGHTS[1]).add_(blue, alpha=LUMA_WEIGHTS[2])


def _box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Which pixels lie in boxes of (images, 4): top, bottom, left, right; bool (images, 1, height, width)."""
    top, bottom, left, right = boxes[:, :, None, None, None].unbind(1)  # each (images, 1, 1, 1)
    y = torch.arange(height, device=boxes.device).view(1, 1, height, 1)
    x = torch.arange(width, device=boxes.device).view(1, 1, 1, width)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)
