"""Images as they come, files or pixels, to calibrated scores and decisions: what a packaged model does with them.

A package is a folder with `weights.safetensors`, `model.json` and `operating_points.json`, and needs no other. A file
is decoded and made a square by what preprocess uses, so its score is the one that `evaluate` would give.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fadeformer.decisions import listed
from fadeformer.decode import PIXELS, decode, fit
from fadeformer.errors import UnreadableError, UserError
from fadeformer.files import read_json
from fadeformer.model_files import DESCRIPTION, POINTS, WEIGHTS
from fadeformer.trained import Trained

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]

PROBABILITY = "probability."  # column of a class's calibrated score
POSITIVE = "positive."  # column of whether it reaches the operating point
DECISION = "decision"


class Scorer:
    """A packaged model, in float32 on the CPU, so that its scores do not depend on who serves them.

    Args:
        folder: the package.
        max_pixels: of one image; a file that tells of more is refused before it is unpacked.
        batch_size: images that go through the network at once.
    """

    def __init__(self, folder: Path, max_pixels: int = PIXELS, batch_size: int = 256) -> None:
        self.described = read_json(folder / DESCRIPTION)
        self.points: dict[str, dict[str, Any]] = read_json(folder / POINTS)["points"]
        self.trained = Trained(self.described, folder / WEIGHTS, torch.device("cpu"))
        self.classes: tuple[str, ...] = tuple(self.described["classes"])
        self.input = self.described["input"]
        self.max_pixels = max_pixels
        self.batch_size = batch_size

    def scores(self, pixels: Pixels) -> Floats:
        """uint8 images (images, side, side, channels) that fit the network to calibrated scores (images, classes)."""
        return self.trained.scores(pixels, self.batch_size)

    def pixels(self, images: Any) -> Pixels:
        """Images as the network sees them, (images, side, side, channels).

        Args:
            images: an array of integers from 0 to 255, (images, height, width) or (images, height, width, channels) of
                1 or 3 channels; or a sequence of which each is a file's bytes, these as base64 text, or such an array
                of one image. Of any size: what does not fit is made to, as preprocess does.

        Raises:
            UserError: there are none, or one cannot be used; it is told by its place, counted from 0, and why.
        """
        if isinstance(images, np.ndarray) and images.dtype.kind == "S":
            raise UserError("the images are of numpy's type S, which drops zero bytes at their end; use dtype=object")
        if (isinstance(images, np.ndarray) and images.ndim == 0) or isinstance(images, (str, bytes)):
            raise UserError("the images are not a list; one image is a list of one")
        if len(images) == 0:
            raise UserError("there are no images")
        if isinstance(images, np.ndarray) and images.ndim > 1:
            batch = _whole(images, "the array of images")
            if batch.ndim == 3:
                batch = batch[..., None]
            side, channels = self.input["image_size"], self.input["channels"]
            if batch.shape[1:] == (side, side, channels):
                return batch
            images = batch
        return np.stack([self._fitted(image, f"image {place}") for place, image in enumerate(images)])

    def _fitted(self, image: Any, name: str) -> Pixels:
        if isinstance(image, np.ndarray) and image.ndim == 0:  # MLflow wraps each value of some JSON
            image = image.item()
        if isinstance(image, str):
            image = _bytes(image, name)
        if isinstance(image, (bytes, bytearray, memoryview)):
            picture = decode(bytes(image), name, limit=self.max_pixels).image
        elif isinstance(image, (np.ndarray, Sequence)):
            picture = _picture(image, name, self.max_pixels)
        else:
            raise UnreadableError(name, "is neither bytes of a file, nor base64 text, nor an array of pixels")
        return fit(picture, self.input["image_size"], self.input["channels"], self.input["aspect"])

    def positive(self, scores: Floats, operating_point: str) -> NDArray[np.object_]:
        """Whether scores reach the thresholds of an operating point, (images, classes); None where there is none.

        Of two exclusive classes the last one has a threshold, and the first is positive where the last is not.

        Raises:
            UserError: there is no operating point of that name.
        """
        if operating_point not in self.points:
            raise UserError(f"operating_point is not one of this model's: {', '.join(sorted(self.points))}")
        found = np.full(scores.shape, None, dtype=object)
        for name, point in self.points[operating_point].items():
            if point is not None:
                place = self.classes.index(name)
                found[:, place] = scores[:, place] >= point["threshold"]
        if self._is_binary and found[0, 1] is not None:
            found[:, 0] = ~found[:, 1].astype(bool)
        return found

    @property
    def _is_binary(self) -> bool:
        return len(self.classes) == 2 and not self.trained.task.multi_label

    def decisions(self, scores: Floats, positive: NDArray[np.object_]) -> list[str | None]:
        """Findings that are positive, listed; of two exclusive classes the positive one; of more the likeliest.

        None stands where two classes have no threshold, since val or test has only one of them.
        """
        if self.trained.task.multi_label or self._is_binary:
            named = [[name for name, is_so in zip(self.classes, row, strict=True) if is_so] for row in positive]
            return [listed(names) if names or not self._is_binary else None for names in named]
        return [self.classes[place] for place in scores.argmax(axis=1)]

    def columns(self, images: Any, operating_point: str) -> dict[str, Any]:
        """All that is told of images, one value each, by column: probabilities, what is positive, the decision.

        Raises:
            UserError: an image cannot be used, or there is no such operating point.
        """
        scores = self.scores(self.pixels(images))
        positive = self.positive(scores, operating_point)
        return {
            **{f"{PROBABILITY}{name}": scores[:, place] for place, name in enumerate(self.classes)},
            **{f"{POSITIVE}{name}": positive[:, place] for place, name in enumerate(self.classes)},
            DECISION: self.decisions(scores, positive),
        }


def _bytes(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UnreadableError(name, "is text that is not base64 of a file's bytes") from error


def _picture(image: Any, name: str, max_pixels: int) -> Image.Image:
    pixels = _whole(image, name)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)) or not pixels.size:
        raise UnreadableError(
            name, f"has the shape {pixels.shape}; it must be (height, width), or (height, width, channels) of 1 or 3"
        )
    if pixels.shape[0] * pixels.shape[1] > max_pixels:
        raise UnreadableError(name, f"has more pixels than the limit of {max_pixels:,}; make it smaller")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _whole(values: Any, name: str) -> Pixels:
    """Integers from 0 to 255, such as JSON has them, as uint8."""
    try:
        given = np.asarray(values)
        if given.dtype == object:
            given = np.array(given.tolist())
    except ValueError as error:  # lists of several lengths
        raise UnreadableError(name, "is not an array: its rows differ in length") from error
    if given.dtype == np.uint8:
        return given
    if given.dtype.kind not in "iu" or (given.size and (given.min() < 0 or given.max() > 255)):
        raise UnreadableError(name, "is not made of whole numbers from 0 to 255")
    return given.astype(np.uint8)
