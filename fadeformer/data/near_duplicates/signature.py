"""Content hashes and thumbnails of images."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]

THUMBNAIL_SIDE = 64  # pixels, maximum
MIN_SIDE = 16  # pixels; smaller images cannot be compared
MIN_GRAY_RANGE = 64  # of 255; images with a smaller range are contrast-stretched first


class ImageSignature(NamedTuple):
    """What the search for near-duplicates compares of an image.

    Attributes:
        thumbnail: grayscale, (side, side); the side is `THUMBNAIL_SIDE`, or less for a smaller image.
        aspect: width divided by height of the image, which the thumbnail does not keep.
    """

    thumbnail: Pixels
    aspect: float


def drop_equal_channels(pixels: Pixels) -> Pixels:
    """Reduce an image with identical channels to one channel; leave others unchanged."""
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        return pixels[..., 0]
    return pixels


def content_hash(pixels: Pixels) -> str:
    """SHA-256 of the decoded pixels, independent of the file format and of identical channels."""
    pixels = drop_equal_channels(pixels)
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def compute_signature(image: Image.Image) -> ImageSignature:
    """Compute the signature of an image.

    Raises:
        ValueError: the image is smaller than `MIN_SIDE`.
    """
    side = min(THUMBNAIL_SIDE, *image.size)
    if side < MIN_SIDE:
        raise ValueError(f"an image of {image.height} x {image.width} pixels is too small to compare")
    gray = image.convert("L")
    if np.ptp(np.asarray(gray)) < MIN_GRAY_RANGE:  # e.g. 16-bit images that use little of their range
        gray = ImageOps.autocontrast(gray)
    if gray.size != (side, side):
        gray = gray.resize((side, side), Image.Resampling.BOX)
    return ImageSignature(np.asarray(gray), image.width / image.height)
