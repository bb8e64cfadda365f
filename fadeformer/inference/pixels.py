"""Images in memory (bytes of files, base64 text, arrays) to pixels as a network takes them, as a request holds them.

They are decoded and resized by the functions that preprocess uses, so that they get the scores that evaluation gives.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fadeformer.data.decode import MAX_PIXELS, Aspect, decode_image, image_to_array
from fadeformer.errors import UnreadableImageError, UserError

Pixels = NDArray[np.uint8]


def prepare_images(
    images: Any, *, image_size: int, channels: int, aspect: Aspect, max_pixels: int = MAX_PIXELS
) -> Pixels:
    """Return images as a network takes them, (images, side, side, channels).

    Args:
        images: an array of integers from 0 to 255, (images, height, width) or (images, height, width, channels) of 1 or
            3 channels; or a sequence of which each is a file's bytes, these as base64 text, or such an array of one
            image. Images of another size are resized as preprocess does.
        image_size: side that the network takes, pixels.
        channels: 1 (grey) or 3 (color).
        aspect: how an image that is not square is made a square.
        max_pixels: of one image; a file whose header states more is refused before it is decoded.

    Raises:
        UserError: there are no images, or one cannot be used; names its place, counted from 0, and the reason.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind == "S":
        raise UserError("the images are of numpy's type S, which drops zero bytes at their end; use dtype=object")
    if (isinstance(images, np.ndarray) and images.ndim == 0) or isinstance(images, (str, bytes)):
        raise UserError("the images are not a list; one image is a list of one")
    if len(images) == 0:
        raise UserError("there are no images")
    if isinstance(images, np.ndarray) and images.ndim > 1:
        batch = _as_uint8(images, "the array of images")
        if batch.ndim == 3:
            batch = batch[..., None]
        if batch.shape[1:] == (image_size, image_size, channels):
            return batch
        images = batch
    pictures = (_to_image(image, f"image {place}", max_pixels) for place, image in enumerate(images))
    return np.stack([image_to_array(picture, image_size, channels, aspect) for picture in pictures])


def _to_image(image: Any, name: str, max_pixels: int) -> Image.Image:
    if isinstance(image, np.ndarray) and image.ndim == 0:  # MLflow wraps each value of some JSON
        image = image.item()
    if isinstance(image, str):
        image = _decode_base64(image, name)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode_image(bytes(image), name, max_pixels=max_pixels)
    if isinstance(image, (np.ndarray, Sequence)):
        return _image_from_array(image, name, max_pixels)
    raise UnreadableImageError(name, "is neither bytes of a file, nor base64 text, nor an array of pixels")


def _decode_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UnreadableImageError(name, "is text that is not base64 of a file's bytes") from error


def _image_from_array(image: Any, name: str, max_pixels: int) -> Image.Image:
    pixels = _as_uint8(image, name)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)) or not pixels.size:
        raise UnreadableImageError(
            name, f"has the shape {pixels.shape}; it must be (height, width), or (height, width, channels) of 1 or 3"
        )
    if pixels.shape[0] * pixels.shape[1] > max_pixels:
        raise UnreadableImageError(name, f"has more pixels than the limit of {max_pixels:,}; make it smaller")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _as_uint8(values: Any, name: str) -> Pixels:
    """Return integers from 0 to 255, of whatever type JSON gives them, as uint8."""
    try:
        given = np.asarray(values)
        if given.dtype == object:
            given = np.array(given.tolist())
    except ValueError as error:  # lists of several lengths
        raise UnreadableImageError(name, "is not an array: its rows differ in length") from error
    if given.dtype == np.uint8:
        return given
    if given.dtype.kind not in "iu" or (given.size and (given.min() < 0 or given.max() > 255)):
        raise UnreadableImageError(name, "is not made of whole numbers from 0 to 255")
    return given.astype(np.uint8)
