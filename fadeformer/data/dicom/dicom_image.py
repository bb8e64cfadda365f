"""Read DICOM files as uint8 frames with de-identified patient metadata.

Only the elements in `PARSED_KEYWORDS` are parsed; names, birth dates and addresses are never parsed. The patient is
represented by a keyed hash for grouping and by non-identifying subgroup fields. Error messages never quote a value of
the file: pydicom's messages may, so they are neither passed on nor chained.

Pixels go through the DICOM pipeline (PS3.3 C.7.6.3, C.11.1, C.11.2): decompression, modality LUT or rescale, first VOI
window or VOI LUT, 8 bits. Overlays, presentation states and color profiles are not applied.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread, uid
from pydicom.encaps import generate_frames
from pydicom.filereader import read_dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import get_expected_length
from pydicom.tag import Tag

from fadeformer.data.dicom import codecs, windowing
from fadeformer.errors import UnreadableImageError, UserError

MAX_PIXELS = 2**29  # total over all frames of a file; decoding needs about 3 to 5 bytes per pixel
MAX_INFLATED_BYTES = 2**30  # of a deflated DICOM data set
SALT_LENGTHS = range(16, 65)  # bytes; blake2b accepts no longer key, and a shorter one can be brute-forced
MAX_AGE = 90  # years; higher ages are identifying (45 CFR 164.514)
JP2_SIGNATURE = b"\0\0\0\x0cjP  "
PIXEL_DATA_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
NON_IMAGE_CLASSES = (  # prefixes of SOP class UIDs (PS3.6, table A-1)
    "1.2.840.10008.1.3.10",  # media directory (DICOMDIR)
    "1.2.840.10008.5.1.4.1.1.88",  # structured reports and key object selections
    "1.2.840.10008.5.1.4.1.1.11.",  # presentation states
    "1.2.840.10008.5.1.4.1.1.104",  # encapsulated documents, such as PDF
    "1.2.840.10008.5.1.4.1.1.9.",  # waveforms
    "1.2.840.10008.5.1.4.1.1.66",  # raw data, registrations, surfaces
    "1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.5.1.4.1.1.481.5",  # radiotherapy structure sets and plans
)  # fmt: skip
MASK_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # segmentations, which have pixels
COLORS = ("Red", "Green", "Blue")
PARSED_KEYWORDS = (
    *("PatientID", "StudyInstanceUID", "PatientSex", "PatientAge", "Modality", "ViewPosition", "Manufacturer"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", *PIXEL_DATA_KEYWORDS),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *(f"{color}PaletteColorLookupTableDescriptor" for color in COLORS),
    *(f"{color}PaletteColorLookupTableData" for color in COLORS),
    *(f"Segmented{color}PaletteColorLookupTableData" for color in COLORS),
)  # fmt: skip
codecs.register_decoders()
# One fixed decoder per transfer syntax, because decoders round lossy images differently.
DECODERS = {
    uid.JPEGBaseline8Bit: "pillow",
    **dict.fromkeys(codecs.SYNTAXES, codecs.PLUGIN),
    uid.JPEG2000Lossless: "pylibjpeg",
    uid.JPEG2000: "pylibjpeg",
    uid.HTJ2KLossless: "pylibjpeg",
    uid.HTJ2KLosslessRPCL: "pylibjpeg",
    uid.HTJ2K: "pylibjpeg",
    uid.RLELossless: "pydicom",
}


@dataclass(frozen=True, eq=False)
class DicomImage:
    """Decoded frames and de-identified metadata of one DICOM file.

    Attributes:
        frames: uint8, (frames, height, width) or (frames, height, width, 3).
        scaling: how the values were scaled to 8 bits: `window`, `table` (VOI LUT), `range` (minimum to maximum of the
            file) or `bits` (color, by the stored bit depth).
        group: keyed hash of the patient ID, or of the study UID if there is none; None if both are missing.
        sex: M, F or O; None if missing.
        age: whole years, capped at 90; None if missing.
        modality: such as CR, DX, CT, MR, US.
        view: view position such as PA, AP, LL, CC, MLO.
        manufacturer: manufacturer of the device.
    """

    frames: NDArray[np.uint8]
    scaling: str
    group: str | None
    sex: str | None
    age: int | None
    modality: str | None
    view: str | None
    manufacturer: str | None


def read_dicom(data: bytes, name: str, *, salt: bytes) -> DicomImage:
    """Read one DICOM file.

    The group depends on Patient ID alone. Issuer of Patient ID is ignored, because a patient whose files name it only
    sometimes would become two groups. Files with the same placeholder ID are one group. Padding pixels become black.

    Args:
        data: content of the file.
        name: file name for error messages.
        salt: secret key of the patient hash, 16 to 64 random bytes, the same for the whole dataset.

    Raises:
        UnreadableImageError: the file is empty, truncated, corrupt, too large, not DICOM, or has no supported image.
        UserError: the salt is too short or too long.
    """
    if len(salt) not in SALT_LENGTHS:
        raise UserError(
            f"the salt has {len(salt)} bytes; use {SALT_LENGTHS.start} to {SALT_LENGTHS.stop - 1} random bytes"
        )
    try:
        return _read_image(data, salt)
    except (_UnsupportedError, windowing.WindowError, codecs.JpegError) as error:
        reason = str(error)
    except Exception as error:  # pydicom and its decoders raise arbitrary exceptions on corrupt files
        reason = f"is corrupt or does not conform to DICOM ({type(error).__name__}); fetch or export it again"
    raise UnreadableImageError(name, reason)  # outside the except block, so that no pydicom exception is chained to it


def pseudonymize_patient(patient: str, *, salt: bytes) -> str:
    """Hash a patient ID from another source to the same group as DICOM files with this ID."""
    return _keyed_hash("PatientID", patient.strip().encode(), salt)


def read_group(data: bytes, *, salt: bytes) -> str | None:
    """Return the group of `read_dicom` without decoding the image; None if it has none or the file cannot be read."""
    try:
        return _patient_group(_parse_dataset(data), salt)
    except Exception:  # `read_dicom` will report the error
        return None


def is_non_image(data: bytes) -> bool:
    """Whether the SOP class of a DICOM file has no pixels, such as a DICOMDIR, report or plan.

    A segmentation has pixels, but is a mask: it counts as an image, which `read_dicom` then rejects by name.
    """
    try:
        sop_class = _sop_class(_read_file_meta(data)[0])
    except Exception:  # `read_dicom` will report the error
        return False
    return sop_class.startswith(NON_IMAGE_CLASSES) and sop_class not in MASK_CLASSES


def _sop_class(meta: Dataset) -> str:
    return str(meta.get("MediaStorageSOPClassUID", ""))


class _UnsupportedError(Exception):
    """Reason why a file cannot be read."""


def _read_image(data: bytes, salt: bytes) -> DicomImage:
    dataset = _parse_dataset(data)
    if _sop_class(dataset.file_meta) in MASK_CLASSES:
        raise _UnsupportedError("is a segmentation (a mask), not an image; remove it")
    keyword = next((keyword for keyword in PIXEL_DATA_KEYWORDS if keyword in dataset), None)
    if keyword is None:
        raise _UnsupportedError("has no image, or is truncated before it; remove it or fetch it again")
    count = int(dataset.get("NumberOfFrames") or 1)
    pixels = dataset.Rows * dataset.Columns * count
    if not 0 < pixels <= MAX_PIXELS:
        size = f"{dataset.Columns:,} x {dataset.Rows:,} pixels in {count:,} frames"
        raise _UnsupportedError(f"has {size}; the total must be 1 to {MAX_PIXELS:,} pixels")
    stored = list(_iter_stored_frames(dataset, keyword, count))
    if len(stored) != count:
        raise _UnsupportedError(f"declares {count} frames but has {len(stored)}; export it again")
    if dataset.SamplesPerPixel == 1 and dataset.PhotometricInterpretation != "PALETTE COLOR":
        frames, scaling = windowing.to_8_bits(stored, dataset)
    else:
        frames, scaling = np.stack([_color_to_8_bits(frame, dataset) for frame in stored]), "bits"
    return DicomImage(
        frames,
        scaling,
        _patient_group(dataset, salt),
        _matching_value(dataset, "PatientSex", r"[MFO]"),
        _parse_age(_raw_value(dataset, "PatientAge")),
        _matching_value(dataset, "Modality", r"[A-Z0-9_]{1,16}"),
        _matching_value(dataset, "ViewPosition", r"[A-Z0-9_ ]{1,16}"),
        _matching_value(dataset, "Manufacturer", r"[^\x00-\x1f]{1,64}"),
    )


def _read_file_meta(data: bytes) -> tuple[Dataset, int]:
    """Read the file meta information (group 0002) and return it with its end position."""
    file = BytesIO(data)
    file.seek(132 if data[128:132] == b"DICM" else 0)
    return read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2), file.tell()


def _parse_dataset(data: bytes) -> Dataset:
    """Parse the elements of `PARSED_KEYWORDS`; their values are not decoded yet."""
    if not data:
        raise _UnsupportedError("the file is empty; fetch it again")
    # Old files have no preamble and start with an element of group 2 or 8, in either byte order.
    if data[128:132] != b"DICM" and data[:2] not in (b"\x02\0", b"\x08\0", b"\0\x02", b"\0\x08"):
        raise _UnsupportedError("is not a DICOM file; remove it")
    meta, end = _read_file_meta(data)
    if meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        size, rest = 0, data[end:]
        while rest and size <= MAX_INFLATED_BYTES:
            size += len(inflater.decompress(rest, 2**20))
            rest = inflater.unconsumed_tail
        if size > MAX_INFLATED_BYTES:
            raise _UnsupportedError(
                f"decompresses to more than {MAX_INFLATED_BYTES:,} bytes, like a decompression bomb"
            )
    dataset = dcmread(BytesIO(data), force=True, specific_tags=list(PARSED_KEYWORDS))
    if "TransferSyntaxUID" not in dataset.file_meta:
        is_implicit, is_little = dataset.original_encoding
        plain = uid.ExplicitVRLittleEndian if is_little else uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if is_implicit else plain
    return dataset


def _iter_stored_frames(dataset: Dataset, keyword: str, count: int) -> Iterator[NDArray[Any]]:
    """Yield the stored values of each frame, decompressed; color as RGB."""
    syntax = dataset.file_meta.TransferSyntaxUID
    plugin = ""
    if syntax not in uid.UncompressedTransferSyntaxes:
        plugin = _decoder_name(syntax)
        _check_frame_sizes(dataset, syntax, count)
    elif (size := len(dataset[keyword].value)) < (expected := get_expected_length(dataset)):
        raise _UnsupportedError(f"is truncated: it has {size:,} of {expected:,} bytes of pixel data; fetch it again")
    for frame, properties in get_decoder(syntax).iter_array(dataset, decoding_plugin=plugin):
        color_space = str(properties["photometric_interpretation"])
        if dataset.SamplesPerPixel == 3 and color_space != "RGB":
            raise _UnsupportedError(
                "has a color space other than RGB, YBR_FULL, YBR_ICT and YBR_RCT; convert it with dcmconv"
            )
        yield frame


def _decoder_name(syntax: uid.UID) -> str:
    """Name of the decoder plugin for a compressed transfer syntax."""
    if syntax in DECODERS:
        return DECODERS[syntax]
    remedy = (
        "it is a video; export its frames" if syntax in uid.MPEGTransferSyntaxes else "convert it with gdcmconv --raw"
    )
    name = f"{syntax.name} ({syntax})" if syntax in uid.AllTransferSyntaxes else "(unknown)"
    raise _UnsupportedError(f"its transfer syntax {name} is not supported; {remedy}")


def _check_frame_sizes(dataset: Dataset, syntax: uid.UID, count: int) -> None:
    """Reject compressed frames whose size differs from the header, which could be decompression bombs."""
    if syntax == uid.RLELossless:  # RLE frames have no size field
        return
    for frame in generate_frames(dataset.PixelData, number_of_frames=count):
        size = _jpeg_2000_size(frame) if syntax in uid.JPEG2000TransferSyntaxes else codecs.jpeg_size(frame)
        if size != (dataset.Columns, dataset.Rows):
            raise _UnsupportedError(
                "has a compressed frame with a different size than its header declares; export it again"
            )


def _jpeg_2000_size(frame: bytes) -> tuple[int, int]:
    """Width and height from a JPEG 2000 codestream (ISO/IEC 15444-1, A.5.1), after the boxes of a JP2 file, if any."""
    start = 0
    if frame.startswith(JP2_SIGNATURE):
        start = 12
        while frame[start + 4 : start + 8] != b"jp2c":
            length = int.from_bytes(frame[start : start + 4], "big")
            if length < 8:  # pydicom would loop forever on such a box
                raise _UnsupportedError("has a corrupt compressed frame; fetch or export it again")
            start += length
        start += 8
    width, height, left, top = struct.unpack_from(">4I", frame, start + 8)
    return width - left, height - top


def _color_to_8_bits(frame: NDArray[Any], dataset: Dataset) -> NDArray[np.uint8]:
    """Scale a color frame from its stored bit depth to 8-bit RGB, applying a palette."""
    bits = int(dataset.BitsStored)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        frame = apply_color_lut(frame, dataset)[..., :3]
        bits = dataset.RedPaletteColorLookupTableDescriptor[2]
    if bits == 8:
        return np.asarray(np.minimum(frame, 255), np.uint8)
    white = 2**bits - 1
    return np.asarray(np.floor(np.minimum(frame, white) / white * 255 + 0.5), np.uint8)


def _patient_group(dataset: Dataset, salt: bytes) -> str | None:
    for keyword in ("PatientID", "StudyInstanceUID"):
        value = _raw_value(dataset, keyword)
        if value:
            return _keyed_hash(keyword, value, salt)
    return None


def _keyed_hash(keyword: str, value: bytes, salt: bytes) -> str:
    return hashlib.blake2b(keyword.encode() + b"\0" + value, key=salt, digest_size=16).hexdigest()


def _raw_value(dataset: Dataset, keyword: str) -> bytes:
    """Raw bytes of an element without padding; converting it could quote an invalid value in a pydicom warning."""
    element = dataset.get_item(Tag(keyword))
    value = element.value if element is not None else None
    return value.strip(b" \0") if isinstance(value, bytes) else b""


def _matching_value(dataset: Dataset, keyword: str, pattern: str) -> str | None:
    """Value of an element if it matches the pattern, else None: other values may be a misplaced patient name."""
    value = _raw_value(dataset, keyword).decode("utf-8", errors="replace").strip()
    return value if re.fullmatch(pattern, value) else None


def _parse_age(value: bytes) -> int | None:
    match = re.fullmatch(rb"(\d{1,3})([DWMY])", value)
    if match is None:
        return None
    years = int(match[1]) // {b"D": 365, b"W": 52, b"M": 12, b"Y": 1}[match[2]]
    return min(years, MAX_AGE)
