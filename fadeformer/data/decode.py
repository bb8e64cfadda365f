"""Decode an encoded image to 8-bit grayscale (Pillow mode L) or RGB, as stored in the file; resize to a square.

Supports JPEG, PNG, BMP, TIFF, GIF and WebP, detected by their magic bytes. The Pillow plugins are called directly,
because `Image.open` tries every format that any library has registered and warns about large images through a filter
that all threads share. Color profiles are not applied: public datasets and models do not apply them either.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLESPERPIXEL,
    ImageFileDirectory_v2,
    TiffImageFile,
)
from PIL.WebPImagePlugin import WebPImageFile

from fadeformer.data.image_formats import unsupported_format
from fadeformer.errors import UnreadableImageError

MAX_PIXELS = 89_478_485  # Pillow's own limit for one image, 256 MiB of RGB
READERS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,  # also MPO files of phones, of which only the first image is read
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
OTHER_FILES = (  # start of a file that is no image, and message
    (b"<", "is a web page or other text, not an image: the download may require a login"),
    (b"version https://git-lfs", "is a git-lfs pointer, not an image; run `git lfs pull`"),
    (b"%PDF", "is a PDF, not an image; export its images as PNG"),
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
EXIF_ORIENTATION = 0x0112  # EXIF tag
NEW_SUBFILE_TYPE = 254  # TIFF tag; bit 0: a smaller version of another image in the file
# PNG chunks that are not needed for the pixels and that Pillow limits to 1 MiB; it reads an orientation from those two.
PNG_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
PNG_ORIENTATION = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
MAX_PNG_METADATA = 2**16  # bytes as stored, of a text with an orientation
SUPPORTED_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
Aspect = Literal["squash", "crop", "pad"]


class PixelRange(NamedTuple):
    """Stored values that become black and white in grayscale of more than 8 bits; the same for all images of a dataset.

    Attributes:
        low: value that becomes 0.
        high: value that becomes 255.
        clips: whether values outside the range are clipped; otherwise a file with such a value is unreadable, because
            the range was detected on other images.
    """

    low: float
    high: float
    clips: bool = False


EIGHT_BITS = PixelRange(0, 255)  # of a dataset without images of more than 8 bits


def decode_image(
    data: bytes, name: str, *, max_pixels: int = MAX_PIXELS, pixel_range: Sequence[Any] | None = None
) -> Image.Image:
    """Decode a single-image file to Pillow mode L or RGB.

    Applies the EXIF orientation. Palette images become RGB. An opaque alpha channel is dropped, any other is composited
    on black. An alpha channel of zeros is dropped from a BMP, whose writers often leave the fourth byte empty; other
    formats define it as invisible, and such a file is rejected. Grayscale of more than 8 bits is scaled linearly from
    the pixel range to [0, 255] and rounded to nearest; of 16-bit color the high byte is kept, which is correct only for
    the range [0, 65535]. Signed, 32-bit and floating-point grayscale needs a range that clips.

    Args:
        data: content of the file.
        name: file name for error messages.
        max_pixels: maximum number of pixels.
        pixel_range: fields of a `PixelRange`; None for the bit depth of the file, from 0 to 2**bits - 1.

    Raises:
        UnreadableImageError: the file is empty, truncated, corrupt, too large, not a supported image, or has several
            frames.
    """
    with _open_image(data, name) as image:
        if isinstance(image, TiffImageFile) and image.tag_v2.get(NEW_SUBFILE_TYPE, 0) & 1:
            raise UnreadableImageError(name, "starts with a thumbnail, as camera raw files do; export it as PNG")
        count = getattr(image, "n_frames", 1)
        if count > 1:
            raise UnreadableImageError(name, f"has {count} frames or pages; save one of them as a single image")
        return _convert_image(image, data, name, max_pixels, PixelRange(*pixel_range) if pixel_range else None)


def max_stored_value(data: bytes) -> int:
    """Return the largest value that an image of more than 8 bits stores, or its declared maximum from 9 to 15 bits.

    For color, whose low bytes Pillow does not read, an upper bound. Returns 255 for images of 8 bits and for files that
    cannot be read or that need a pixel range.
    """
    is_png = data.startswith(b"\x89PNG") and data[24:25] == b"\x10"
    if not is_png and not data.startswith((b"II", b"MM")):
        return 255
    try:
        with _open_image(data, "") as image:
            bits = _bits_per_sample(image, data)
            if bits <= 8 or image.width * image.height > MAX_PIXELS:
                return 255
            if image.mode.startswith("I;16"):
                values = np.asarray(image)
                visible = values[values != image.info.get("transparency", -1)]
                return int(visible.max(initial=255)) if bits == 16 else 2**bits - 1
            if image.mode in SUPPORTED_MODES:
                colors = np.asarray(image)[..., : 4 if image.mode == "CMYK" else 3]
                return int(colors.max()) * 256 + 255
    except UnreadableImageError:  # data validation reports it
        return 255
    return 255


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert to grayscale (1, ITU-R BT.601 luma) or RGB (3)."""
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def resize_to_square(image: Image.Image, side: int, aspect: Aspect = "squash") -> Image.Image:
    """Resize an image to a square, deterministically.

    Uses Pillow's antialiased bilinear filter: its support grows with the downscaling factor, so fine detail is
    averaged and does not alias. Unlike Lanczos and bicubic it causes no ringing at sharp edges, such as markers on
    radiographs, and unlike box it is smooth when upscaling. It matches the look of published datasets at 28 to 224
    pixels.

    Args:
        image: image of mode L or RGB.
        side: side of the square, pixels.
        aspect: `squash` changes the aspect ratio, `crop` center-crops to a square, `pad` letterboxes with black.
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
    """Convert and resize an image to a uint8 array (side, side, channels); a no-op if mode and size already match."""
    return np.asarray(resize_to_square(to_channels(image, channels), side, aspect)).reshape(side, side, channels)


def _resize_bilinear(image: Image.Image, height: int, width: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)


@contextmanager
def _open_image(data: bytes, name: str) -> Iterator[ImageFile.ImageFile]:
    if not data:
        raise UnreadableImageError(name, "the file is empty; fetch it again")
    reader = next((reader for magic, reader in READERS.items() if data.startswith(magic)), None)
    if reader is None:
        start = data.lstrip()
        reason = next((text for magic, text in OTHER_FILES if start.startswith(magic)), unsupported_format(data))
        if data[128:132] == b"DICM":
            reason = "is a DICOM file, not a regular image"
        raise UnreadableImageError(name, reason or "is not a JPEG, PNG, BMP, TIFF, GIF or WebP image")
    try:
        if reader is PngImageFile:
            data = _without_png_metadata(data)
            PngImageFile(BytesIO(data)).verify()  # checks the CRCs, which decoding ignores
        with reader(BytesIO(data)) as image:
            yield image
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow plugins raise arbitrary exceptions on corrupt files
        raise UnreadableImageError(name, _error_reason(error, data)) from error


def _without_png_metadata(data: bytes) -> bytes:
    """Remove texts and the color profile of a PNG, of any length, except a short text that may hold an orientation."""
    parts, start = [data[:8]], 8
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        has_orientation = length <= MAX_PNG_METADATA and data.startswith(PNG_ORIENTATION, start + 8)
        if kind not in PNG_METADATA or end > len(data) or has_orientation:
            parts.append(data[start:end])
        start = end
    return b"".join([*parts, data[start:]])


def _error_reason(error: Exception, data: bytes) -> str:
    text = str(error)
    if "unknown pixel mode" in text or "unknown data organization" in text:
        tags = ImageFileDirectory_v2(data[:8])
        file = BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        return (
            f"is a TIFF with {tags.get(SAMPLESPERPIXEL, 1)} channels of {tags.get(BITSPERSAMPLE, (1,))[0]} bits (color"
            f" space {tags.get(PHOTOMETRIC_INTERPRETATION)}); save the channels to use as grayscale, RGB or CMYK"
        )
    if "not identified by this driver" in text:  # Pillow raises this for a readable header with invalid values
        return "its header has no valid width, height or color type; fetch it again"
    truncated = ("truncated", "Truncated", "cannot load this image")
    if isinstance(error.__cause__ or error, (EOFError, struct.error)) or any(word in text for word in truncated):
        return "is truncated; fetch it again"
    if "checksum" in text:
        return "is corrupt: a checksum does not match; fetch it again"
    return f"is corrupt or of an unsupported type ({text}); fetch it again, or convert it to PNG"


def _convert_image(
    image: ImageFile.ImageFile, data: bytes, name: str, max_pixels: int, pixel_range: PixelRange | None
) -> Image.Image:
    """Convert an opened image to mode L or RGB as `decode_image` describes."""
    if image.width * image.height > max_pixels:
        raise UnreadableImageError(
            name, f"has {image.width:,} x {image.height:,} pixels, more than the limit of {max_pixels:,}; resize it"
        )
    mode = image.mode
    image.load()
    bits = _bits_per_sample(image, data)
    key = image.info.get("transparency")
    transposed: Image.Image = image
    orientation = image.getexif().get(EXIF_ORIENTATION)  # after load(), which already transposes a TIFF
    if orientation in EXIF_TRANSPOSES:
        transposed = image.transpose(EXIF_TRANSPOSES[orientation])
    if mode.startswith("I;16") or (mode in ("I", "F") and pixel_range is not None and pixel_range.clips):
        values = np.asarray(transposed)
        is_visible = np.full(values.shape, True) if key is None else values != key
        pixels = _scale_to_8_bits(
            values, is_visible, name, pixel_range or PixelRange(0, 2**bits - 1), is_inverted=_is_white_zero(image)
        )
        return Image.fromarray(pixels)
    if mode in ("I", "F"):
        raise UnreadableImageError(
            name, "has signed, 32-bit or floating-point pixels; set dataset.pixel_range to [minimum, maximum]"
        )
    if mode in SUPPORTED_MODES and bits > 8 and pixel_range not in (None, *((0, 65535, clips) for clips in (0, 1))):
        raise UnreadableImageError(
            name, f"has {bits}-bit color, which needs the pixel range 0 to 65,535; save it with 8 bits per channel"
        )
    if mode in SUPPORTED_MODES:
        if bits > 8 and key is not None:  # comparing only the high byte would make too many pixels transparent
            raise UnreadableImageError(name, "has a 16-bit transparent color; save it with 8 bits per channel")
        return _composite_alpha(_correct_pillow_modes(image, transposed, data, bits), image, name)
    raise UnreadableImageError(
        name, f"has the unsupported pixel mode {mode!r}; convert it to 8 or 16-bit grayscale or RGB"
    )


def _bits_per_sample(image: ImageFile.ImageFile, data: bytes) -> int:
    """Bits per sample in the file, which Pillow's mode does not give for PNG and TIFF."""
    if isinstance(image, PngImageFile):
        return data[24]
    if isinstance(image, TiffImageFile):
        return int(max(image.tag_v2.get(BITSPERSAMPLE, (1,))))
    return 8


def _is_white_zero(image: ImageFile.ImageFile) -> bool:
    """Whether a TIFF is WhiteIsZero; Pillow inverts 8-bit images of this kind, but not 16-bit ones."""
    return isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0


def _scale_to_8_bits(
    values: NDArray[Any], is_visible: NDArray[np.bool_], name: str, pixel_range: PixelRange, *, is_inverted: bool
) -> NDArray[np.uint8]:
    """Scale grayscale of more than 8 bits to 8 bits, rounded to nearest; invisible pixels become black."""
    low, high, clips = pixel_range
    if not np.isfinite(values).all():
        raise UnreadableImageError(name, "has pixels that are NaN or infinite; save it without them")
    visible = values[is_visible]
    if visible.size and not clips and (visible.min() < low or visible.max() > high):
        raise UnreadableImageError(
            name,
            f"has values from {visible.min():,} to {visible.max():,}, but the data set {low:,} to {high:,}"
            " (dataset.pixel_range); save it with the bit depth of the data set",
        )
    units = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)
    pixels = np.floor((1 - units if is_inverted else units) * 255 + 0.5).astype(np.uint8)
    return np.where(is_visible, pixels, np.uint8(0))


def _correct_pillow_modes(image: ImageFile.ImageFile, transposed: Image.Image, data: bytes, bits: int) -> Image.Image:
    """Correct three cases that Pillow decodes wrongly: CMYK JPEG, 16-bit LA PNG, transparency of low-bit PNG."""
    if isinstance(image, JpegImageFile) and image.mode == "CMYK" and "adobe" not in image.info:
        return ImageChops.invert(transposed)  # Pillow inverts all CMYK JPEGs, but only Adobe's are stored inverted
    if isinstance(image, PngImageFile) and image.mode == "RGBA" and data[25] == 4:
        return transposed.convert("LA")  # 16-bit grayscale with alpha, which Pillow opens as RGBA
    if isinstance(image, PngImageFile) and image.mode == "L" and "transparency" in image.info:
        transposed.info["transparency"] = image.info["transparency"] * 255 // (2**bits - 1)  # scaled like the pixels
    return transposed


def _composite_alpha(image: Image.Image, source: ImageFile.ImageFile, name: str) -> Image.Image:
    """Convert to mode L or RGB, compositing an alpha channel on black, as `decode_image` describes."""
    is_gray = image.mode in ("1", "L", "LA", "La")
    if "transparency" not in image.info and image.mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
        return to_channels(image, 1 if is_gray else 3)
    samples = np.array(image.convert("LA" if is_gray else "RGBA"))
    color, alpha = samples[..., :-1], samples[..., -1:]
    if not alpha.any() and not isinstance(source, BmpImageFile):
        raise UnreadableImageError(name, "is fully transparent; save it without its alpha channel")
    if alpha.any() and (alpha != 255).any():
        color = ((color.astype(np.uint16) * alpha + 127) // 255).astype(np.uint8)
    return Image.fromarray(color[..., 0] if is_gray else color)
