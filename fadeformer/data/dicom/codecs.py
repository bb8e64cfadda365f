"""JPEG Lossless, JPEG-LS and JPEG of 12 bits for pydicom, which has no decoder of its own for them.

By imagecodecs (libjpeg-turbo, CharLS). GDCM reads the first two as well, but a damaged file can end the whole process.
pydicom calls this module as its guide to decoder plugins has it: `DECODER_DEPENDENCIES`, `is_available`, `decode`.
"""

from __future__ import annotations

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
# Start of frame, and no table: ISO/IEC 10918-1, table B.1, and for JPEG-LS ISO/IEC 14495-1, C.1.1.
SOF_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
STANDALONE_MARKERS = {0x01, *range(0xD0, 0xD9)}  # markers without a length


class JpegError(Exception):
    """Why a frame is not read."""


def register_decoders() -> None:
    """Makes pydicom's decoders know this module; once is enough."""
    for syntax in SYNTAXES:
        decoder = get_decoder(syntax)
        if PLUGIN not in decoder.available_plugins:
            decoder.add_plugin(PLUGIN, (__name__, "decode"))


def is_available(syntax: str) -> bool:
    """Whether a transfer syntax is decoded here."""
    return syntax in SYNTAXES


def decode(frame: bytes, runner: DecodeRunner) -> bytearray:
    """One frame, decompressed, its colours as they are stored; raises what imagecodecs does if it is damaged."""
    if runner.transfer_syntax in uid.JPEGLSTransferSyntaxes:
        pixels = imagecodecs.jpegls_decode(frame)
    else:
        colours = "GRAYSCALE" if runner.samples_per_pixel == 1 else "RGB"  # as in and as out: nothing is converted
        pixels = imagecodecs.jpeg8_decode(frame, colorspace=colours, outcolorspace=colours)
    bits = 8 * pixels.itemsize
    runner.set_option("bits_allocated", bits)
    if runner.pixel_representation == 1:  # the sign is in the highest of the stored bits
        spare = bits - runner.bits_stored
        pixels = (pixels << spare).view(f"i{pixels.itemsize}") >> spare
    if pixels.ndim == 3:
        runner.set_option("planar_configuration", 0)
    return bytearray(np.ascontiguousarray(pixels))


def jpeg_size(frame: bytes) -> tuple[int, int]:
    """Width and height as a JPEG or JPEG-LS frame tells them, pixels.

    Raises:
        JpegError: it is damaged or cut off.
    """
    at = 2 if frame.startswith(SOI) else len(frame)
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker in SOF_MARKERS:
            if not frame.rstrip(b"\0\xff").endswith(EOI):  # libjpeg would make up the rest
                raise JpegError("has a compressed frame that is cut off; fetch or export it again")
            return int.from_bytes(frame[at + 7 : at + 9], "big"), int.from_bytes(frame[at + 5 : at + 7], "big")
        if marker == 0xFF:  # fill bytes
            at += 1
        else:
            at += 2 if marker in STANDALONE_MARKERS else 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    raise JpegError("has a compressed frame that is damaged; fetch or export it again")
