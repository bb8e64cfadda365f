"""pydicom decoder plugin for JPEG Lossless, JPEG-LS and 12-bit JPEG, which pydicom cannot decode itself.

Uses imagecodecs (libjpeg-turbo, CharLS). GDCM also decodes the first two, but a corrupt file can crash the process.
pydicom's plugin interface requires the names `DECODER_DEPENDENCIES`, `is_available` and `decode`.
"""

from __future__ import annotations

import struct

import imagecodecs
import numpy as np
from pydicom import uid
from pydicom.pixels.decoders.base import DecodeRunner, get_decoder

PLUGIN = "imagecodecs"
SYNTAXES = (
    uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEGLSNearLossless,
)  # fmt: skip
DECODER_DEPENDENCIES = dict.fromkeys(SYNTAXES, ("imagecodecs",))
SOI, EOI = b"\xff\xd8", b"\xff\xd9"
# Start-of-frame markers: ISO/IEC 10918-1, table B.1, without DHT, JPG and DAC; for JPEG-LS ISO/IEC 14495-1, C.1.1.
SOF_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
STANDALONE_MARKERS = {0x01, *range(0xD0, 0xD9)}  # markers without a length


class JpegError(Exception):
    """Reason why a frame cannot be decoded."""


def register_decoders() -> None:
    """Register this module with pydicom's decoders; idempotent."""
    for syntax in SYNTAXES:
        decoder = get_decoder(syntax)
        if PLUGIN not in decoder.available_plugins:
            decoder.add_plugin(PLUGIN, (__name__, "decode"))


def is_available(syntax: str) -> bool:
    """Whether this plugin decodes a transfer syntax."""
    return syntax in SYNTAXES


def decode(frame: bytes, runner: DecodeRunner) -> bytearray:
    """Decompress a frame without color conversion; exceptions of imagecodecs pass through."""
    if runner.transfer_syntax in uid.JPEGLSTransferSyntaxes:
        pixels = imagecodecs.jpegls_decode(frame)
    else:
        # the same color space for input and output, so that nothing is converted
        color_space = "GRAYSCALE" if runner.samples_per_pixel == 1 else "RGB"
        pixels = imagecodecs.jpeg8_decode(frame, colorspace=color_space, outcolorspace=color_space)
    bits = 8 * pixels.itemsize
    runner.set_option("bits_allocated", bits)
    if runner.pixel_representation == 1:  # the sign bit is the highest stored bit
        unused = bits - runner.bits_stored
        pixels = (pixels << unused).view(f"i{pixels.itemsize}") >> unused
    if pixels.ndim == 3:
        runner.set_option("planar_configuration", 0)
    return bytearray(np.ascontiguousarray(pixels))


def jpeg_size(frame: bytes) -> tuple[int, int]:
    """Width and height in the header of a JPEG or JPEG-LS frame, pixels.

    Raises:
        JpegError: the frame is corrupt or truncated.
    """
    offset = 2 if frame.startswith(SOI) else len(frame)
    while offset + 9 <= len(frame) and frame[offset] == 0xFF:
        marker = frame[offset + 1]
        if marker in SOF_MARKERS:
            if not frame.rstrip(b"\0\xff").endswith(EOI):  # libjpeg would fill in the missing rows
                raise JpegError("has a truncated compressed frame; fetch or export it again")
            height, width = struct.unpack_from(">2H", frame, offset + 5)
            return width, height
        if marker == 0xFF:  # fill bytes
            offset += 1
        else:
            offset += 2 if marker in STANDALONE_MARKERS else 2 + int.from_bytes(frame[offset + 2 : offset + 4], "big")
    raise JpegError("has a corrupt compressed frame; fetch or export it again")
