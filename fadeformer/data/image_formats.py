"""Recognize image files by their content, whatever their name; by their suffix if the content is damaged.

Formats that cannot be decoded are recognized, too, so that such a file is reported as unreadable and never left out.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

HEADER_BYTES = 4096  # enough for every signature, and for the head of a DICOM file
DICOM_SUFFIXES = {".dcm", ".dicom"}
READABLE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".webp"
}  # fmt: skip
UNSUPPORTED_SUFFIXES = {
    ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jpx", ".jxl", ".jxr", ".psd", ".exr", ".tga", ".pgm", ".ppm", ".pnm",
    ".nii", ".nrrd", ".mha", ".mhd", ".fits", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".raf",
}  # fmt: skip
IMAGE_SUFFIXES = READABLE_SUFFIXES | UNSUPPORTED_SUFFIXES
TEXT_SUFFIXES = {".csv", ".json", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml"}  # never images: not worth reading
# JPEG, PNG, TIFF, BigTIFF, GIF, WebP, BMP (with the length of a known header, because a table may start with BM)
READABLE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|II[*+]\0|MM\0[*+]|GIF8[79]a|RIFF....WEBP"
    rb"|BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0{3}",
    re.DOTALL,
)
UNSUPPORTED = (  # offset, signature, message
    (0, b"\xff\x4f\xff\x51", "is a JPEG 2000; convert it to PNG"),
    (4, b"jP  ", "is a JPEG 2000; convert it to PNG"),
    (4, b"ftyp", "is a HEIC or AVIF image, or a video; convert it to PNG"),
    (4, b"JXL \r\n", "is a JPEG XL; convert it to PNG"),
    (0, b"II\xbc\x01", "is a JPEG XR; convert it to PNG"),
    (0, b"8BPS", "is a Photoshop file; export it as PNG"),
    (0, b"v/1\x01", "is an OpenEXR image; convert it to PNG"),
    (0, b"FUJIFILM", "is a camera raw file; export it as PNG"),
    (0, b"IIU\0", "is a camera raw file; export it as PNG"),
    (0, b"IIRO", "is a camera raw file; export it as PNG"),
    (0, b"NRRD0", "is an NRRD volume; export its slices as PNG"),
    (344, b"n+1\0", "is a NIfTI volume; export its slices as PNG"),
    (344, b"ni1\0", "is a NIfTI header; export the slices of the volume as PNG"),
    (0, b"ObjectType = Image", "is a MetaImage volume; export its slices as PNG"),
    (0, b"SIMPLE  =", "is a FITS image; convert it to PNG"),
    (8, b"AVI LIST", "is a video; export its frames"),
)


def is_image(name: str, header: bytes) -> bool:
    """Return True if a file is an image other than DICOM, judged by its first `HEADER_BYTES` or its suffix."""
    return has_image_suffix(name) or READABLE.match(header) is not None or unsupported_format(header) is not None


def is_dicom(name: str, header: bytes) -> bool:
    """Return True if a file is DICOM, judged by its preamble, or by its suffix if it is no other image."""
    has_suffix = PurePosixPath(name).suffix.lower() in DICOM_SUFFIXES
    return header[128:132] == b"DICM" or (has_suffix and READABLE.match(header) is None)


def has_image_suffix(name: str) -> bool:
    """Return True if the suffix is that of an image format, also of one that cannot be decoded; not of DICOM."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES or name.lower().endswith(".nii.gz")


def unsupported_format(header: bytes) -> str | None:
    """Return the message about an image format that cannot be decoded; None for all other files."""
    return next((text for offset, magic, text in UNSUPPORTED if header.startswith(magic, offset)), None)
