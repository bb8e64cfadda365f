"""DICOM files to uint8 frames, and the little about the patient that may leave the file.

Only the elements of `TAGS` are parsed, so that a name, a birth date or an address is never in memory as such. Of the
patient there is a keyed hash to group images by, and subgroup fields that identify nobody. No error quotes a value of
the file: pydicom's own messages do, so they are neither passed on nor chained to.

The pixels go the way that DICOM describes (PS3.3 C.7.6.3, C.11.1, C.11.2): decompress, stored values, modality values
(rescaled or by table), the first window or table for display, 8 bits. Overlays, presentation states and colour profiles
are not applied.
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

MAX_PIXELS = 2**29  # of all frames of a file at most; while it is read each takes some 3 to 5 bytes
MAX_INFLATED_BYTES = 2**30  # bytes of a deflated data set
SALT_LENGTHS = range(16, 65)  # bytes; blake2b takes no longer key, and a shorter one can be guessed
MAX_AGE = 90  # years; above, an age identifies (45 CFR 164.514)
JP2_SIGNATURE = b"\0\0\0\x0cjP  "
PIXEL_DATA_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
NON_IMAGE_CLASSES = (  # SOP classes (PS3.6, table A-1) by how they begin
    "1.2.840.10008.1.3.10",  # directory of a disc
    "1.2.840.10008.5.1.4.1.1.88",  # reports, and selections of key objects
    "1.2.840.10008.5.1.4.1.1.11.",  # presentation states
    "1.2.840.10008.5.1.4.1.1.104",  # documents, as PDF
    "1.2.840.10008.5.1.4.1.1.9.",  # waveforms
    "1.2.840.10008.5.1.4.1.1.66",  # raw data, registrations, segmentations
    "1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.5.1.4.1.1.481.5",  # structures and plans of radiotherapy
)  # fmt: skip
COLORS = ("Red", "Green", "Blue")
PARSED_KEYWORDS = (
    *("PatientID", "StudyInstanceUID", "PatientSex", "PatientAge", "Modality", "ViewPosition", "Manufacturer"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", *PIXEL_DATA_KEYWORDS),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in COLORS),
    *(f"{colour}PaletteColorLookupTableData" for colour in COLORS),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in COLORS),
)  # fmt: skip
codecs.register_decoders()
# Which decoder reads what: one each, since another one may round a lossy image otherwise.
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
    """One file.

    Attributes:
        frames: uint8, (frames, height, width) or (frames, height, width, 3).
        scale: how they became 8 bits: `window`, `table` (a VOI LUT), `range` (smallest to largest value of the file)
            or `bits` (colour, by the bits it is stored with).
        group: hash of the patient (or of the study, if the patient is not named); None if neither is.
        sex: M, F or O; None if it is not told.
        age: in whole years, 90 for more; None if it is not told.
        modality: as CR, DX, CT, MR, US.
        view: as PA, AP, LL, CC, MLO.
        manufacturer: of the device.
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
    """Reads one file.

    The group is made of Patient ID alone: its issuer is left out, since a patient whose files name it only now and then
    would become two. Files whose IDs were all replaced by one placeholder are one group. Padding pixels become black.

    Args:
        data: the file's bytes.
        name: what errors call it.
        salt: the key of the hash, 16 to 64 random bytes that are kept secret and the same for the whole data set.

    Raises:
        UnreadableError: it is empty, cut off, damaged, too large, no DICOM, has no image or one of a kind that is not
            read.
        UserError: the salt is too short or too long.
    """
    if len(salt) not in SALT_LENGTHS:
        raise UserError(
            f"the salt has {len(salt)} bytes; it must be {SALT_LENGTHS.start} to {SALT_LENGTHS.stop - 1} random ones"
        )
    try:
        return _read_image(data, salt)
    except (_UnsupportedError, windowing.WindowError, codecs.JpegError) as refusal:
        reason = str(refusal)
    except Exception as error:  # a damaged file makes pydicom and its decoders stumble in any way
        reason = f"is damaged, or not built as DICOM wants it ({type(error).__name__}); fetch or export it again"
    raise UnreadableImageError(name, reason)  # here, so that no message of pydicom's hangs on it


def pseudonymize_patient(patient: str, *, salt: bytes) -> str:
    """The group of a patient whose ID is known from elsewhere: the same as of a file that has it."""
    return _keyed_hash("PatientID", patient.strip().encode(), salt)


def is_non_image(data: bytes) -> bool:
    """Whether a file says of itself that it is a directory, a report, a plan or the like."""
    try:
        meta, _ = _read_file_meta(data)
    except Exception:  # `read` tells what is wrong with it
        return False
    return str(meta.get("MediaStorageSOPClassUID", "")).startswith(NON_IMAGE_CLASSES)


class _UnsupportedError(Exception):
    """Why a file is not read."""


def _read_image(data: bytes, salt: bytes) -> DicomImage:
    dataset = _parse_dataset(data)
    keyword = next((keyword for keyword in PIXEL_DATA_KEYWORDS if keyword in dataset), None)
    if keyword is None:
        raise _UnsupportedError("holds no image, or is cut off before it; leave it out, or fetch it again")
    count = int(dataset.get("NumberOfFrames") or 1)
    pixels = dataset.Rows * dataset.Columns * count
    if not 0 < pixels <= MAX_PIXELS:
        size = f"{dataset.Columns:,} x {dataset.Rows:,} pixels in {count:,} frames"
        raise _UnsupportedError(f"has {size}; at least 1 and at most {MAX_PIXELS:,} in all are read")
    stored = list(_iter_stored_frames(dataset, keyword, count))
    if len(stored) != count:
        raise _UnsupportedError(f"says that it has {count} frames, but holds {len(stored)}; export it again")
    if dataset.SamplesPerPixel == 1 and dataset.PhotometricInterpretation != "PALETTE COLOR":
        frames, scale = windowing.to_8_bits(stored, dataset)
    else:
        frames, scale = np.stack([_color_to_8_bits(frame, dataset) for frame in stored]), "bits"
    return DicomImage(
        frames,
        scale,
        _patient_group(dataset, salt),
        _matching_value(dataset, "PatientSex", r"[MFO]"),
        _parse_age(_raw_value(dataset, "PatientAge")),
        _matching_value(dataset, "Modality", r"[A-Z0-9_]{1,16}"),
        _matching_value(dataset, "ViewPosition", r"[A-Z0-9_ ]{1,16}"),
        _matching_value(dataset, "Manufacturer", r"[^\x00-\x1f]{1,64}"),
    )


def _read_file_meta(data: bytes) -> tuple[Dataset, int]:
    """The group of file meta information, and where it ends."""
    file = BytesIO(data)
    file.seek(132 if data[128:132] == b"DICM" else 0)
    return read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2), file.tell()


def _parse_dataset(data: bytes) -> Dataset:
    """The elements of `TAGS`, none of them decoded yet."""
    if not data:
        raise _UnsupportedError("the file is empty; fetch it again")
    # Old files begin with their first element: of group 2 or 8, in either byte order.
    if data[128:132] != b"DICM" and data[:2] not in (b"\x02\0", b"\x08\0", b"\0\x02", b"\0\x08"):
        raise _UnsupportedError("is no DICOM file; leave it out")
    meta, end = _read_file_meta(data)
    if meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        size, rest = 0, data[end:]
        while rest and size <= MAX_INFLATED_BYTES:
            size += len(inflater.decompress(rest, 2**20))
            rest = inflater.unconsumed_tail
        if size > MAX_INFLATED_BYTES:
            raise _UnsupportedError(
                f"grows to more than {MAX_INFLATED_BYTES:,} bytes when it is inflated; it is refused as a bomb"
            )
    dataset = dcmread(BytesIO(data), force=True, specific_tags=list(PARSED_KEYWORDS))
    if "TransferSyntaxUID" not in dataset.file_meta:
        is_implicit, is_little = dataset.original_encoding
        plain = uid.ExplicitVRLittleEndian if is_little else uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if is_implicit else plain
    return dataset


def _iter_stored_frames(dataset: Dataset, keyword: str, count: int) -> Iterator[NDArray[Any]]:
    """Each frame as it is stored, decompressed, colour as RGB."""
    syntax = dataset.file_meta.TransferSyntaxUID
    plugin = ""
    if syntax not in uid.UncompressedTransferSyntaxes:
        plugin = _decoder_name(syntax)
        _check_frame_sizes(dataset, syntax, count)
    elif (found := len(dataset[keyword].value)) < (expected := get_expected_length(dataset)):
        raise _UnsupportedError(f"is cut off: it has {found:,} of {expected:,} bytes of pixels; fetch it again")
    for frame, properties in get_decoder(syntax).iter_array(dataset, decoding_plugin=plugin):
        colours = str(properties["photometric_interpretation"])
        if dataset.SamplesPerPixel == 3 and colours != "RGB":
            raise _UnsupportedError(
                "has colours that are neither RGB nor YBR_FULL, YBR_ICT, YBR_RCT; convert it with dcmconv"
            )
        yield frame


def _decoder_name(syntax: uid.UID) -> str:
    """The name of the decoder for a compressed image."""
    if syntax in DECODERS:
        return DECODERS[syntax]
    remedy = (
        "it is a video; export its frames" if syntax in uid.MPEGTransferSyntaxes else "convert it with gdcmconv --raw"
    )
    known = f"{syntax.name} ({syntax})" if syntax in uid.AllTransferSyntaxes else "of an unknown kind"
    raise _UnsupportedError(f"its transfer syntax {known} cannot be decoded here; {remedy}")


def _check_frame_sizes(dataset: Dataset, syntax: uid.UID, count: int) -> None:
    """Stops a compressed frame that would unpack to another size than the file's, perhaps a huge one."""
    if syntax == uid.RLELossless:  # has no size of its own
        return
    for frame in generate_frames(dataset.PixelData, number_of_frames=count):
        size = _jpeg_2000_size(frame) if syntax in uid.JPEG2000TransferSyntaxes else codecs.jpeg_size(frame)
        if size != (dataset.Columns, dataset.Rows):
            raise _UnsupportedError("has a compressed frame of another size than its header says; export it again")


def _jpeg_2000_size(frame: bytes) -> tuple[int, int]:
    """Width and height as the codestream tells them (ISO/IEC 15444-1, A.5.1), behind the boxes of a JP2 if any."""
    start = 0
    if frame.startswith(JP2_SIGNATURE):
        start = 12
        while frame[start + 4 : start + 8] != b"jp2c":
            length = int.from_bytes(frame[start : start + 4], "big")
            if length < 8:  # pydicom would wait at such a box for ever
                raise _UnsupportedError("has a compressed frame that is damaged; fetch or export it again")
            start += length
        start += 8
    width, height, left, top = struct.unpack_from(">4I", frame, start + 8)
    return width - left, height - top


def _color_to_8_bits(frame: NDArray[Any], dataset: Dataset) -> NDArray[np.uint8]:
    """RGB of 8 bits, by the bits it is stored with."""
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
    """An element as its bytes, without padding: pydicom quotes a value that it finds wrong in a warning."""
    element = dataset.get_item(Tag(keyword))
    value = element.value if element is not None else None
    return value.strip(b" \0") if isinstance(value, bytes) else b""


def _matching_value(dataset: Dataset, keyword: str, pattern: str) -> str | None:
    """An element that must look like this: anything else may be a name that stands in the wrong place."""
    value = _raw_value(dataset, keyword).decode("utf-8", errors="replace").strip()
    return value if re.fullmatch(pattern, value) else None


def _parse_age(value: bytes) -> int | None:
    found = re.fullmatch(rb"(\d{1,3})([DWMY])", value)
    if found is None:
        return None
    years = int(found[1]) // {b"D": 365, b"W": 52, b"M": 12, b"Y": 1}[found[2]]
    return min(years, MAX_AGE)
