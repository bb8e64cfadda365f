"""Convert images of a request (file bytes, base64 text or arrays) to the input array of a classifier.

Decoding and resizing use the functions of stage preprocess, so an image gets the same scores as in evaluation.
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

ImageArray = NDArray[np.uint8]


def prepare_images(
    images: Any,
    *,
    image_size: int,
    channels: int,
    aspect: Aspect,
    pixel_range: Sequence[Any] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> ImageArray:
    """Decode and resize images to a uint8 array, (images, side, side, channels).

    Args:
        images: array of integers from 0 to 255, (images, height, width) or (images, height, width, channels) with 1 or
            3 channels; or a sequence whose items are file bytes, base64 text of file bytes, or the array of one image.
            Images of another size are resized as in preprocess.
        image_size: side of the model input, pixels.
        channels: 1 (grayscale) or 3 (RGB).
        aspect: how a non-square image becomes square.
        pixel_range: of files of more than 8 bits, see `fadeformer.data.decode.decode_image`.
        max_pixels: limit per image; a file whose header states more is rejected before decoding.

    Raises:
        UserError: there are no images, or one is invalid; the message has its index from 0 and the reason.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind == "S":
        raise UserError("the images have numpy dtype S, which drops trailing zero bytes; use dtype=object")
    if (isinstance(images, np.ndarray) and images.ndim == 0) or isinstance(images, (str, bytes)):
        raise UserError("the images are not a list; send a single image as a list of length 1")
    if len(images) == 0:
        raise UserError("there are no images")
    if isinstance(images, np.ndarray) and images.ndim > 1:
        batch = _as_uint8(images, "the array of images")
        if batch.ndim == 3:
            batch = batch[..., None]
        if batch.shape[1:] == (image_size, image_size, channels):
            return batch
        images = batch
    decoded = (_to_image(image, f"image {index}", max_pixels, pixel_range) for index, image in enumerate(images))
    return np.stack([image_to_array(image, image_size, channels, aspect) for image in decoded])


def _to_image(image: Any, name: str, max_pixels: int, pixel_range: Sequence[Any] | None) -> Image.Image:
    if isinstance(image, np.ndarray) and image.ndim == 0:  # MLflow wraps some JSON values
        image = image.item()
    if isinstance(image, str):
        image = _decode_base64(image, name)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode_image(bytes(image), name, max_pixels=max_pixels, pixel_range=pixel_range)
    if isinstance(image, (np.ndarray, Sequence)):
        return _image_from_array(image, name, max_pixels)
    raise UnreadableImageError(name, "is neither file bytes, nor base64 text, nor an array of pixels")


def _decode_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UnreadableImageError(name, "is not valid base64 text") from error


def _image_from_array(image: Any, name: str, max_pixels: int) -> Image.Image:
    pixels = _as_uint8(image, name)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)) or not pixels.size:
        raise UnreadableImageError(
            name,
            f"has shape {pixels.shape}; expected (height, width) or (height, width, channels) with 1 or 3 channels",
        )
    if pixels.shape[0] * pixels.shape[1] > max_pixels:
        raise UnreadableImageError(name, f"has more pixels than the limit of {max_pixels:,}; make it smaller")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _as_uint8(values: Any, name: str) -> ImageArray:
    """Convert integers from 0 to 255 of any dtype to uint8."""
    try:
        array = np.asarray(values)
        if array.dtype == object:
            array = np.array(array.tolist())
    except ValueError as error:  # lists of different lengths
        raise UnreadableImageError(name, "is not an array: its rows differ in length") from error
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "iu" or (array.size and (array.min() < 0 or array.max() > 255)):
        raise UnreadableImageError(name, "has values other than integers from 0 to 255")
    return array.astype(np.uint8)
