"""Bytes of a picture to an image of 8 bits: grey (Pillow's mode L) where the file stores grey, RGB where colour.

Read are JPEG, PNG, BMP, TIFF, GIF and WebP, told by their content. Each of Pillow's readers is called directly, since
`Image.open` tries every format that any library has registered, and warns of large images by a filter that all threads
share. Colour profiles are not applied: data sets are published, and models trained, without.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from fadeformer.errors import UnreadableImageError

MAX_PIXELS = 89_478_485  # of one image at most: Pillow's own limit, 256 MiB of RGB
READERS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,  # the first picture too of the several that a phone may put into one file
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"BM": BmpImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
    b"II+\0": TiffImageFile,
    b"MM\0+": TiffImageFile,
    b"GIF87a": GifImageFile,
    b"GIF89a": GifImageFile,
    b"RIFF": WebPImageFile,
}
# What a file may be instead: where the mark stands, the mark, and what to say.
UNSUPPORTED_FORMATS = (
    (0, b"<", "is a web page or another text, no image: the download may have wanted a login"),
    (0, b"version https://git-lfs", "is a pointer of git-lfs, no image; run `git lfs pull`"),
    (0, b"%PDF", "is a PDF, no image; export its pictures as PNG"),
    (0, b"\xff\x4f\xff\x51", "is a JPEG 2000; convert it to PNG"),
    (4, b"jP  ", "is a JPEG 2000; convert it to PNG"),
    (4, b"ftyp", "is a HEIC or AVIF picture, or a video; convert it to PNG"),
    (128, b"DICM", "is a DICOM file, no picture"),
)
EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_ORIENTATION = 0x0112  # EXIF's tag
SUPPORTED_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
Aspect = Literal["squash", "crop", "pad"]


def decode_image(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads a file of one image, as Pillow's mode L or RGB, in memory.

    EXIF's orientation is applied. A palette counts as colour. An alpha that hides nothing is dropped, one that does is
    laid on black. Grey of more than 8 bits is scaled linearly, rounded to the nearest, so that 0 stays 0 and the
    largest value that its bits hold becomes 255; of 16-bit colour the high byte is kept.

    Args:
        data: the file's bytes.
        name: what errors call it.
        max_pixels: pixels that it may have.

    Raises:
        UnreadableError: it is empty, cut off, damaged, too large, no image or of a kind that is not read, or it holds
            several frames.
    """
    with _open_image(data, name) as image:
        count = getattr(image, "n_frames", 1)
        if count > 1:
            raise UnreadableImageError(
                name, f"holds {count} frames or pages, where one is expected; save the one wanted"
            )
        return _convert_image(image, data, name, max_pixels)


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Grey, by the luma of ITU-R BT.601, for 1, or colour for 3."""
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def resize_to_square(image: Image.Image, side: int, aspect: Aspect = "squash") -> Image.Image:
    """Makes an image a square; the same image gives the same bytes.

    The filter is Pillow's bilinear, whose support grows as the image shrinks, so that fine detail is averaged and does
    not alias; it makes no halos at sharp edges (Lanczos and bicubic do, and a marker on a radiograph is a sharp edge)
    and is smooth where the image grows (box is not). What the published sets at 28-224 pixels look like, it keeps.

    Args:
        image: of mode L or RGB.
        side: of the square, pixels.
        aspect: `squash` changes the proportions, `crop` keeps the middle of the longer side, `pad` puts the whole
            image into the middle of a black square.
    """
    width, height = image.size
    if aspect == "squash":
        return _resize_bilinear(image, side, side)
    if aspect == "crop":
        short = min(height, width)
        left, top = (width - short) // 2, (height - short) // 2
        return _resize_bilinear(image.crop((left, top, left + short, top + short)), side, side)
    long = max(height, width)
    inner_width, inner_height = (max(1, (2 * length * side + long) // (2 * long)) for length in image.size)
    square = Image.new(image.mode, (side, side))
    inner = _resize_bilinear(image, inner_height, inner_width)
    square.paste(inner, ((side - inner_width) // 2, (side - inner_height) // 2))
    return square


def image_to_array(image: Image.Image, side: int, channels: int, aspect: Aspect) -> NDArray[np.uint8]:
    """An image as it stands in the arrays, (side, side, channels); one that fits already stays as it is."""
    return np.asarray(resize_to_square(to_channels(image, channels), side, aspect)).reshape(side, side, channels)


def _resize_bilinear(image: Image.Image, height: int, width: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)


@contextmanager
def _open_image(data: bytes, name: str) -> Iterator[ImageFile.ImageFile]:
    if not data:
        raise UnreadableImageError(name, "the file is empty; fetch it again")
    reader = next((reader for magic, reader in READERS.items() if data.startswith(magic)), None)
    if reader is None:
        text = data.lstrip()
        found = (words for at, mark, words in UNSUPPORTED_FORMATS if (text if at == 0 else data)[at:].startswith(mark))
        raise UnreadableImageError(name, next(found, "is no JPEG, PNG, BMP, TIFF, GIF or WebP; only these are read"))
    try:
        if reader is PngImageFile:
            PngImageFile(BytesIO(data)).verify()  # the checksums, which are not looked at when pixels are read
        with reader(BytesIO(data)) as image:
            yield image
    except UnreadableImageError:
        raise
    except Exception as error:  # a damaged file makes a reader stumble in any way
        raise UnreadableImageError(name, _error_reason(error)) from error


def _error_reason(error: Exception) -> str:
    text = str(error)
    if "not identified by this driver" in text:  # said of a header that could be read
        return "its header gives no width, no height or no colours; fetch it again"
    cut = ("truncated", "Truncated", "cannot load this image")
    if isinstance(error.__cause__ or error, (EOFError, struct.error)) or any(word in text for word in cut):
        return "is cut off; fetch it again"
    if "checksum" in text:
        return "is damaged: a checksum in it is wrong; fetch it again"
    return f"is damaged, or of a kind that is not read ({text}); fetch it again, or convert it to PNG"


def _convert_image(image: ImageFile.ImageFile, data: bytes, name: str, limit: int) -> Image.Image:
    """The image as it is stored, but for what `decode` says."""
    if image.width * image.height > limit:
        raise UnreadableImageError(
            name, f"has {image.width:,} x {image.height:,} pixels, more than the limit of {limit:,}; make it smaller"
        )
    mode = image.mode
    image.load()
    bits = _bits_per_sample(image, data)
    key = image.info.get("transparency")
    turned: Image.Image = image
    orientation = image.getexif().get(EXIF_ORIENTATION)  # after loading: a TIFF is turned by Pillow then
    if orientation in EXIF_TRANSPOSES:
        turned = image.transpose(EXIF_TRANSPOSES[orientation])
    if mode.startswith("I;16"):
        values = np.asarray(turned)
        pixels = _scale_to_8_bits(values, 2**bits - 1, is_inverted=_is_white_zero(image))
        if key is not None:
            pixels[values == key] = 0
        return Image.fromarray(pixels)
    if mode in SUPPORTED_MODES:
        if bits > 8 and key is not None:  # compared with the high byte alone it would hide too much
            raise UnreadableImageError(name, "has a transparent colour of 16 bits; save it with 8 bits a channel")
        return _composite_alpha(_correct_pillow_modes(image, turned, data, bits))
    raise UnreadableImageError(name, f"has pixels of the kind {mode!r}; convert it to 8 or 16 bits, grey or RGB")


def _bits_per_sample(image: ImageFile.ImageFile, data: bytes) -> int:
    """Bits of a sample in the file, which Pillow's mode does not tell."""
    if isinstance(image, PngImageFile):
        return data[24]
    if isinstance(image, TiffImageFile):
        return int(max(image.tag_v2.get(BITSPERSAMPLE, (1,))))
    return 8


def _is_white_zero(image: ImageFile.ImageFile) -> bool:
    """Whether a TIFF says so of itself; Pillow inverts such grey of 8 bits, but not of 16."""
    return isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0


def _scale_to_8_bits(values: NDArray[np.uint16], largest: int, *, is_inverted: bool) -> NDArray[np.uint8]:
    """Grey of 9 to 16 bits by the rule of `decode`."""
    wide = values.astype(np.int64)
    wide = np.minimum(largest - wide if is_inverted else wide, largest)
    return ((2 * 255 * wide + largest) // (2 * largest)).astype(np.uint8)


def _correct_pillow_modes(image: ImageFile.ImageFile, turned: Image.Image, data: bytes, bits: int) -> Image.Image:
    """What Pillow read, with three of its readings put right."""
    if isinstance(image, JpegImageFile) and image.mode == "CMYK" and "adobe" not in image.info:
        return ImageChops.invert(turned)  # only Adobe stores ink the other way round, but Pillow takes all so
    if isinstance(image, PngImageFile) and image.mode == "RGBA" and data[25] == 4:
        return turned.convert("LA")  # grey and alpha of 16 bits, which Pillow reads as colour
    if isinstance(image, PngImageFile) and image.mode == "L" and "transparency" in image.info:
        turned.info["transparency"] = image.info["transparency"] * 255 // (2**bits - 1)  # as the pixels were scaled
    return turned


def _composite_alpha(image: Image.Image) -> Image.Image:
    """Grey or RGB, an alpha channel composited on black."""
    is_grey = image.mode in ("1", "L", "LA", "La")
    if "transparency" not in image.info and image.mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
        return to_channels(image, 1 if is_grey else 3)
    samples = np.array(image.convert("LA" if is_grey else "RGBA"))
    colour, alpha = samples[..., :-1], samples[..., -1:]
    if (alpha != 255).any():
        colour = ((colour.astype(np.uint16) * alpha + 127) // 255).astype(np.uint8)
    return Image.fromarray(colour[..., 0] if is_grey else colour)
