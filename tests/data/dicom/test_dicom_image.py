"""DICOM decoding: frames match pydicom, no patient data leaks, and every unreadable file gets a reason.

The test files are those in pydicom's wheel; nothing is downloaded.
"""

import dataclasses
import hashlib
import io
import logging
import math
import struct
import traceback
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut, apply_windowing

from fadeformer.data.dicom import dicom_image
from fadeformer.errors import UnreadableImageError, UserError

SALT = b"sixteen bytes ok"
PACKAGE = Path(pydicom.__file__).parent

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom warns about invalid files


@cache
def pydicom_file(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert path is not None, f"{name} is not in pydicom's wheel"
    assert Path(path).is_relative_to(PACKAGE)
    return Path(path).read_bytes()


def read(data: bytes, **options):
    return dicom_image.read_dicom(data, "a.dcm", salt=SALT, **options)


def make_dicom(pixels, syntax=pydicom.uid.ExplicitVRLittleEndian, **elements) -> bytes:
    """Write a DICOM file with these pixels, (height, width) or more; keywords add or replace elements, None removes."""
    dataset = Dataset()
    dataset.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = "1.2.3"
    pixels = np.asarray(pixels)
    bits = 8 * pixels.dtype.itemsize
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes() + bytes(pixels.nbytes % 2)
    for keyword, value in elements.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset["PixelData" if "PixelData" in dataset else "FloatPixelData"].VR = "OW" if "PixelData" in dataset else "OF"
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def item(**elements) -> Dataset:
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def decode_with_pydicom(data: bytes):
    """Compute the same frames step by step with pydicom's functions."""
    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    stored = dataset.pixel_array
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        white = 2 ** (8 * stored.dtype.itemsize) - 1
        return np.round(stored / white * 255)[None], "bits"
    if dataset.SamplesPerPixel == 3:
        frames = np.round(stored / (2.0**dataset.BitsStored - 1) * 255)
        return frames.reshape(-1, *frames.shape[-3:]), "bits"
    values = apply_modality_lut(stored, dataset).astype(float)
    padding = np.zeros(stored.shape, bool)
    if "PixelPaddingValue" in dataset:
        padding = stored == dataset.PixelPaddingValue
    if "WindowCenter" in dataset:
        kind = "window"
        ends = np.array([0, 2**dataset.BitsStored - 1]) - dataset.PixelRepresentation * 2 ** (dataset.BitsStored - 1)
        low, high = ends * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
        values = apply_voi_lut(values, dataset)
    else:
        kind = "range"
        low, high = values[~padding].min(), values[~padding].max()
    units = np.clip((values - low) / (high - low), 0, 1)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        units = 1 - units
    units[padding] = 0
    return np.round(units * 255).reshape(-1, *stored.shape[-2:]), kind


TEST_FILES = [
    "693_J2KI.dcm", "CT_small.dcm", "ExplVR_BigEnd.dcm", "GDCMJ2K_TextGBR.dcm", "J2K_pixelrep_mismatch.dcm",
    "JPEG2000.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm",
    "MR_small_jp2klossless.dcm", "MR_small_padded.dcm", "SC_jpeg_no_color_transform.dcm", "SC_rgb_dcmtk_+eb+cr.dcm",
    "SC_rgb_dcmtk_+eb+cy+n1.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_dcmtk_+eb+cy+s4.dcm", "SC_rgb_gdcm_KY.dcm",
    "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_rle.dcm", "SC_rgb_rle_16bit_2frame.dcm", "SC_rgb_rle_32bit.dcm",
    "SC_rgb_small_odd.dcm", "SC_rgb_small_odd_jpeg.dcm", "SC_ybr_full_422_uncompressed.dcm", "6154", "17106", "6293",
    "15820", "examples_jpeg2k.dcm", "examples_overlay.dcm", "examples_palette.dcm", "examples_rgb_color.dcm",
    "examples_ybr_color.dcm", "image_dfl.dcm", "rtdose.dcm", "rtdose_expb.dcm", "rtdose_rle.dcm",
]  # fmt: skip


@pytest.mark.parametrize("name", TEST_FILES)
def test_frames_match_pydicom_reference_pipeline(name):
    image = read(pydicom_file(name))
    expected, kind = decode_with_pydicom(pydicom_file(name))
    assert image.frames.dtype == np.uint8
    assert image.frames.shape == expected.shape
    assert image.scaling == kind
    difference = np.abs(image.frames - expected)
    assert difference.max() <= 1  # rounding of .5 may depend on the last bit
    assert difference.mean() < 0.01


def test_jpeg_lossless_and_jpeg_ls_decode_exactly():
    plain = read(pydicom_file("SC_rgb_rle.dcm")).frames
    np.testing.assert_array_equal(read(pydicom_file("SC_rgb_jpeg_gdcm.dcm")).frames, plain)
    compressed, original = read(pydicom_file("MR_small_jpeg_ls_lossless.dcm")), read(pydicom_file("MR_small.dcm"))
    np.testing.assert_array_equal(compressed.frames, original.frames)
    lossy = [read(pydicom_file(f"SC_rgb_jls_lossy_{order}.dcm")).frames.astype(int) for order in ("line", "sample")]
    np.testing.assert_array_equal(*lossy)
    assert np.abs(lossy[0] - plain).max() <= 5
    assert read(pydicom_file("JPEGLSNearLossless_16.dcm")).frames.shape == (1, 50, 10)
    assert read(pydicom_file("JPGExtended.dcm")).frames.shape == (1, 1024, 256)  # 12-bit


@pytest.mark.parametrize("center", [b"NaN ", b"inf ", b"none", b"-inf"])
def test_window_without_finite_number_is_ignored(center):
    data = make_dicom(np.arange(64, dtype=np.uint16).reshape(8, 8), WindowCenter="9999", WindowWidth="50")
    assert data.count(b"9999") == 1
    image = read(data.replace(b"9999", center))
    assert (image.scaling, image.frames.min(), image.frames.max()) == ("range", 0, 255)


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("syntax", [pydicom.uid.JPEGLosslessSV1, pydicom.uid.JPEGLSLossless])
@pytest.mark.parametrize("signed", [False, True])
def test_lossless_codecs_preserve_every_bit_depth(bits, syntax, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    pixels = (
        np.random.default_rng(0).integers(low, low + 2**bits, (7, 9)).astype(f"{'i' if signed else 'u'}{bits // 9 + 1}")
    )
    stored = pixels.view(f"u{pixels.itemsize}") & (2**bits - 1)
    if syntax == pydicom.uid.JPEGLSLossless:
        frame = imagecodecs.jpegls_encode(stored)
    else:
        frame = imagecodecs.jpeg8_encode(stored, lossless=True, bitspersample=bits)
    plain = read(make_dicom(pixels, BitsStored=bits, HighBit=bits - 1))
    packed = read(make_dicom(pixels, syntax, BitsStored=bits, HighBit=bits - 1, PixelData=encapsulate([frame])))
    np.testing.assert_array_equal(packed.frames, plain.frames)


def test_subgroup_fields_are_read():
    image = read(pydicom_file("examples_overlay.dcm"))
    assert (image.sex, image.age, image.modality, image.view, image.manufacturer) == ("M", 58, "MR", None, "SIEMENS")
    image = read(
        make_dicom(np.zeros((2, 2), np.uint8), PatientSex="F", PatientAge="018M", Modality="DX", ViewPosition="PA")
    )
    assert (image.sex, image.age, image.modality, image.view, image.manufacturer) == ("F", 1, "DX", "PA", None)


@pytest.mark.parametrize(
    ("age", "years"),
    [("045Y", 45), ("090Y", 90), ("101Y", 90), ("023M", 1), ("060W", 1), ("006D", 0), ("", None), ("45", None)],
)
def test_age_is_in_years_capped_at_90(age, years):
    assert read(make_dicom(np.zeros((2, 2), np.uint8), PatientAge=age)).age == years


def test_group_is_a_keyed_hash_of_the_patient():
    black = np.zeros((2, 2), np.uint8)
    one = read(make_dicom(black, PatientID="4711", StudyInstanceUID="1.2.1"))
    same = read(make_dicom(black, PatientID=" 4711 ", StudyInstanceUID="1.2.2", IssuerOfPatientID="A"))
    other = read(make_dicom(black, PatientID="4712", StudyInstanceUID="1.2.1"))
    assert one.group == same.group != other.group
    expected = hashlib.blake2b(b"PatientID\x004711", key=SALT, digest_size=16).hexdigest()
    assert one.group == expected
    assert dicom_image.read_dicom(make_dicom(black, PatientID="4711"), "a", salt=SALT[::-1]).group != one.group
    study = read(make_dicom(black, PatientID="", StudyInstanceUID="1.2.1"))
    assert study.group not in (None, one.group)
    assert study.group == read(make_dicom(black, StudyInstanceUID="1.2.1")).group
    assert read(make_dicom(black)).group is None
    assert read(make_dicom(black, PatientID="1.2.1")).group != study.group


@pytest.mark.parametrize("salt", [b"", b"fifteen bytes..", b"x" * 65])
def test_salt_of_wrong_length_is_rejected(salt):
    with pytest.raises(UserError, match=f"the salt has {len(salt)} bytes; use 16 to 64 random bytes"):
        dicom_image.read_dicom(pydicom_file("CT_small.dcm"), "a.dcm", salt=salt)


PATIENTS = ("PatientName", "PatientID", "PatientBirthDate", "PatientAddress", "PatientComments", "OtherPatientNames")


def all_output(data: bytes, caplog) -> str:
    """Collect all output: results, errors with their chain, warnings and log."""
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        try:
            image = read(data)
            output = repr(dataclasses.replace(image, frames=np.zeros(0)))
        except UnreadableImageError as error:
            output = "".join(traceback.format_exception(error)) + repr(error)
            assert (error.__cause__, error.__context__) == (None, None)  # noqa: PT017
    return output + caplog.text + " ".join(str(warning.message) for warning in caught)


def patient_names(data: bytes) -> set[str]:
    """All values of the patient group (0010,xxxx) except sex and age, and all other person names."""
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), force=True)
        elements = list(dataset.iterall())
    except Exception:
        return set()
    names = set()
    for element in elements:
        is_patient_element = element.tag.group == 0x0010 and element.keyword not in ("PatientSex", "PatientAge")
        if (is_patient_element or element.VR == "PN") and element.VR != "SQ":
            values = element.value if element.VM > 1 else [element.value]
            names |= {str(value) for value in values if value} | {str(value).split("^")[0] for value in values if value}
    return {name for name in names if len(name) > 3 or (len(name) == 3 and name.isupper())}


def test_pydicom_test_files_leak_no_names(caplog):
    checked = 0
    for path in sorted((PACKAGE / "data").rglob("*")):
        if path.is_file() and path.parent.name != "palettes" and path.suffix not in (".py", ".pyc"):
            names = patient_names(path.read_bytes())
            output = all_output(path.read_bytes(), caplog)
            assert [name for name in names if name in output] == []
            checked += bool(names)
    assert checked > 90


@pytest.mark.parametrize(
    "name", ["MR_small.dcm", "MR_small_implicit.dcm", "MR_truncated.dcm", "SC_rgb_rle.dcm", "rtplan.dcm"]
)
def test_misplaced_names_are_not_leaked(name, caplog):
    dataset = pydicom.dcmread(io.BytesIO(pydicom_file(name)), force=True)
    marker = "Zyxwvut^Qwertz"
    for keyword in (*PATIENTS, "PatientAge", "PatientSex", "ViewPosition", "Modality", "InstitutionName", "StudyDate"):
        dataset.pop(keyword, None)
        dataset[keyword] = pydicom.DataElement(keyword, "LO", marker + "x" * 70, validation_mode=0)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    assert marker.encode() in buffer.getvalue()
    output = all_output(buffer.getvalue(), caplog)
    assert "Zyxwvut" not in output
    assert "Qwertz" not in output


RAMP = np.arange(-300, 300, dtype=np.int16).reshape(20, 30)


def scale_to_8_bits(values, low, high):
    return np.round((values - low) / (high - low) * 255)


@given(
    center=st.integers(-2000, 2000),
    width=st.integers(1, 3000),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID", None]),
    slope=st.sampled_from(["1", "0.684", "2"]),
    intercept=st.sampled_from(["-1024", "0", "200"]),
)
def test_windows_match_pydicom(center, width, function, slope, intercept):
    functions = {"VOILUTFunction": function} if function else {}
    data = make_dicom(
        RAMP, WindowCenter=center, WindowWidth=width, RescaleSlope=slope, RescaleIntercept=intercept, **functions
    )
    dataset = pydicom.dcmread(io.BytesIO(data))
    with np.errstate(over="ignore"):
        expected = apply_windowing(apply_modality_lut(RAMP, dataset), dataset)
    low, high = (end * float(slope) + float(intercept) for end in (-(2**15), 2**15 - 1))
    assert np.abs(read(data).frames[0] - scale_to_8_bits(expected, low, high)).max() <= 1


def lut(kind: str, values: list[int], first: int, bits: int) -> Dataset:
    """Lookup table whose first entry is for the stored value `first`."""
    table = item(LUTData=values)
    table.add_new("LUTDescriptor", kind, [len(values), first, bits])
    table["LUTData"].VR = "US"
    return table


COLOR = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
FLOAT_PIXELS = np.float32([[0, 0.25], [0.5, 1]])
LEVELS = np.repeat(np.uint8([10, 60, 110]), 4).tobytes()
SEVEN = np.full((3, 4), 7, np.uint8)
PIXELS = {
    "modality LUT": (
        make_dicom(np.uint8([[0, 1, 2], [3, 4, 5]]), ModalityLUTSequence=[lut("US", [0, 10, 100, 1000], 1, 16)]),
        [[[0, 0, 3], [26, 255, 255]]],
    ),
    "padding range": (
        make_dicom(np.uint16([[0, 5, 9], [10, 60, 110]]), PixelPaddingValue=9, PixelPaddingRangeLimit=0),
        [[[0, 0, 0], [0, 128, 255]]],
    ),
    "constant image": (make_dicom(SEVEN), np.zeros((1, 3, 4))),
    "only padding": (make_dicom(SEVEN, PixelPaddingValue=7), np.zeros((1, 3, 4))),
    "planar color": (make_dicom(COLOR, PlanarConfiguration=1, PixelData=COLOR.transpose(2, 0, 1).tobytes()), [COLOR]),
    "float pixels": (
        make_dicom(
            FLOAT_PIXELS.view(np.uint32), PixelData=None, FloatPixelData=FLOAT_PIXELS.tobytes(), BitsStored=None,
            HighBit=None,
        ),
        [[[0, 64], [128, 255]]],
    ),
    "frames share one range": (
        make_dicom(np.zeros((2, 2), np.uint8), NumberOfFrames=3, PixelData=LEVELS),
        np.repeat([0, 128, 255], 4).reshape(3, 2, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PIXELS)
def test_stored_values_are_scaled_to_pixels(case):
    data, expected = PIXELS[case]
    np.testing.assert_array_equal(read(data).frames, expected)


def test_first_window_is_used_and_incomplete_window_ignored():
    image = read(make_dicom(RAMP, WindowCenter=[0, 100], WindowWidth=[50, 600]))
    np.testing.assert_array_equal(image.frames, read(make_dicom(RAMP, WindowCenter=0, WindowWidth=50)).frames)
    assert image.scaling == "window"
    assert read(make_dicom(RAMP, WindowCenter=1)).scaling == "range"


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_voi_lut_takes_precedence_over_window(bits):
    table = lut("SS", np.linspace(2**bits - 1, 0, 512).astype(int).tolist(), -256, bits)
    data = make_dicom(
        RAMP, VOILUTSequence=[table], WindowCenter=0, WindowWidth=50, RescaleSlope="1", RescaleIntercept="0.5"
    )
    dataset = pydicom.dcmread(io.BytesIO(data))
    image = read(data)
    assert image.scaling == "table"
    np.testing.assert_array_equal(image.frames[0], scale_to_8_bits(apply_voi_lut(RAMP, dataset), 0, 2**bits - 1))


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_excluded_from_range(kind):
    pixels = np.int16([[-2000, -2000, 0, 50], [100, -2000, 25, 75]])
    for value in (-2000, 63536):  # 63536 is -2000 stored as unsigned, as in many files
        data = make_dicom(pixels, PhotometricInterpretation=kind)
        dataset = pydicom.dcmread(io.BytesIO(data))
        dataset.add_new("PixelPaddingValue", "SS" if value < 0 else "US", value)
        buffer = io.BytesIO()
        dataset.save_as(buffer)
        frame = read(buffer.getvalue()).frames[0]
        expected = np.array([[0, 0, 0, 128], [255, 0, 64, 191]])
        if kind == "MONOCHROME1":
            expected = np.where(pixels == -2000, 0, 255 - np.array([[0, 0, 0, 127.5], [255, 0, 63.75, 191.25]]))
        np.testing.assert_array_equal(frame, np.floor(expected + 0.5))


def test_bits_above_bits_stored_are_ignored():
    signed = np.int16([[-2048, -1], [0, 2047]])
    dirty = (signed.view(np.uint16) & 0x0FFF) | 0x5000  # an overlay in the high bits, as in old files
    frame = read(make_dicom(dirty.view(np.int16), BitsStored=12, HighBit=11)).frames[0]
    np.testing.assert_array_equal(frame, scale_to_8_bits(signed.astype(float), -2048, 2047))


@pytest.mark.parametrize("bits", [8, 16])
def test_palette_is_applied(bits):
    colors = {"Red": [0, 255, 10], "Green": [1, 128, 20], "Blue": [2, 0, 30]}
    scale = 257 if bits == 16 else 1
    elements = {"PhotometricInterpretation": "PALETTE COLOR"}
    for color, values in colors.items():
        elements[f"{color}PaletteColorLookupTableDescriptor"] = [3, 0, bits]
        elements[f"{color}PaletteColorLookupTableData"] = (np.array(values) * scale).astype(f"u{bits // 8}").tobytes()
    if bits == 8:
        elements = {key: value + b"\0" if isinstance(value, bytes) else value for key, value in elements.items()}
        elements |= {f"{color}PaletteColorLookupTableDescriptor": [4, 0, 8] for color in colors}
    image = read(make_dicom(np.uint8([[0, 1], [2, 1]]), **elements))
    np.testing.assert_array_equal(image.frames[0], np.array(list(colors.values())).T[[[0, 1], [2, 1]]])


def test_per_frame_windows_are_applied():
    def window(center, width):
        return item(FrameVOILUTSequence=[item(WindowCenter=center, WindowWidth=width)])

    shared = item(PixelValueTransformationSequence=[item(RescaleSlope="2", RescaleIntercept="-10")])
    data = make_dicom(
        RAMP,
        NumberOfFrames=2,
        PixelData=RAMP.tobytes() * 2,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=[window(0, 50), window(100, 600)],
    )
    image = read(data)
    for frame, (center, width) in zip(image.frames, ((0, 50), (100, 600)), strict=True):
        rescale = {"RescaleSlope": "2", "RescaleIntercept": "-10"}
        np.testing.assert_array_equal(
            frame, read(make_dicom(RAMP, WindowCenter=center, WindowWidth=width, **rescale)).frames[0]
        )


def j2k(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "JPEG2000", no_jp2=True)
    return encapsulate([buffer.getvalue()])


def deflated(size: int) -> bytes:
    """Deflated DICOM file that decompresses to `size` zero bytes."""
    data = make_dicom(np.zeros((2, 2), np.uint8), pydicom.uid.DeflatedExplicitVRLittleEndian)
    start = 144 + struct.unpack_from("<I", data, 140)[0]
    deflate = zlib.compressobj(wbits=-15)
    block = bytes(2**20)
    return data[:start] + b"".join(deflate.compress(block) for _ in range(size // len(block))) + deflate.flush()


BLACK = np.zeros((8, 8), np.uint8)
INVALID = {
    "empty": (b"", "the file is empty; fetch it again"),
    "text file": (b"image,label\n", "is not a DICOM file; remove it"),
    "report": (pydicom_file("test-SR.dcm"), "has no image, or is truncated before it; remove it"),
    "truncated, uncompressed": (
        pydicom_file("SC_ybr_full_422_uncompressed.dcm")[:-99],
        "is truncated: it has .* of 20,000 bytes",
    ),
    "truncated, compressed": (pydicom_file("JPEG2000.dcm")[:-99], "has no image, or is truncated before it"),
    "truncated JPEG": (
        pydicom_file("SC_rgb_jpeg_gdcm.dcm").replace(b"\xff\xd9", b"\1\1"),
        "has a truncated compressed frame",
    ),
    "unknown transfer syntax": (
        make_dicom(BLACK).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"),
        r"its transfer syntax \(unknown\) is not supported; convert it with gdcmconv --raw",
    ),
    "no rows": (make_dicom(BLACK, Rows=0), "has 8 x 0 pixels in 1 frames; the total must be 1 to 536,870,912 pixels"),
    "too many frames": (
        make_dicom(BLACK, NumberOfFrames=10**8),
        "has 8 x 8 pixels in 100,000,000 frames; the total must be 1",
    ),
    "invalid number": (pydicom_file("badVR.dcm"), r"is corrupt or does not conform to DICOM \(ValueError\)"),
    "no width": (make_dicom(BLACK, Columns=None), r"does not conform to DICOM \(AttributeError\); fetch or export"),
    "more frames than declared": (make_dicom(BLACK, PixelData=bytes(192)), "declares 1 frames but has 3; export it"),
    "zero-width window": (
        make_dicom(BLACK, WindowCenter=0, WindowWidth=0),
        "has a window of zero width or with an unknown",
    ),
    "unknown window function": (
        make_dicom(BLACK, WindowCenter=0, WindowWidth=9, VOILUTFunction="CUBIC"),
        "has a window of zero width or with an unknown function; export it again",
    ),
    "NaN pixel": (
        make_dicom(
            np.zeros((1, 1), np.uint32), PixelData=None, FloatPixelData=struct.pack("<f", math.nan),
            BitsStored=None, HighBit=None,
        ),
        "has pixels that are NaN or infinite",
    ),
    "unsupported color space": (
        make_dicom(np.zeros((8, 8, 3), np.uint8), PhotometricInterpretation="YBR_PARTIAL_422"),
        "has a color space other than RGB, YBR_FULL",
    ),
    "wrong frame size": (
        make_dicom(BLACK, pydicom.uid.JPEG2000Lossless, PixelData=j2k(4000, 4000)),
        "has a compressed frame with a different size than its header declares",
    ),
    "zero-length JP2 box": (
        make_dicom(BLACK, pydicom.uid.JPEG2000Lossless, PixelData=encapsulate([dicom_image.JP2_SIGNATURE + bytes(20)])),
        "has a corrupt compressed frame; fetch or export it again",
    ),
    "invalid frame": (
        make_dicom(BLACK, pydicom.uid.JPEGBaseline8Bit, PixelData=encapsulate([b"no JPEG."])),
        "has a corrupt compressed frame; fetch or export it again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID)
def test_bad_file_raises_with_name_and_reason(case):
    data, message = INVALID[case]
    with pytest.raises(UnreadableImageError, match=f"^folder/a b.dcm: .*{message}") as error:
        dicom_image.read_dicom(data, "folder/a b.dcm", salt=SALT)
    assert error.value.name == "folder/a b.dcm"
    assert (error.value.__cause__, error.value.__context__) == (None, None)


def test_decompression_bomb_is_rejected(monkeypatch):
    monkeypatch.setattr(dicom_image, "MAX_INFLATED_BYTES", 2**23)
    with pytest.raises(
        UnreadableImageError, match="decompresses to more than 8,388,608 bytes, like a decompression bomb"
    ):
        read(deflated(2**24))


def test_too_many_pixels_are_rejected(monkeypatch):
    monkeypatch.setattr(dicom_image, "MAX_PIXELS", 64)
    assert read(make_dicom(BLACK)).frames.shape == (1, 8, 8)
    monkeypatch.setattr(dicom_image, "MAX_PIXELS", 63)
    with pytest.raises(UnreadableImageError, match="the total must be 1 to 63 pixels"):
        read(make_dicom(BLACK))


def test_files_without_preamble_are_read():
    for name in ("MR_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm"):
        dataset = pydicom.dcmread(io.BytesIO(pydicom_file(name)))
        is_implicit, is_little = dataset.original_encoding
        buffer = io.BytesIO()
        del dataset.file_meta
        dataset.preamble = None
        dataset.save_as(buffer, implicit_vr=is_implicit, little_endian=is_little, enforce_file_format=False)
        assert buffer.getvalue()[128:132] != b"DICM"
        np.testing.assert_array_equal(read(buffer.getvalue()).frames, read(pydicom_file(name)).frames)


def test_reading_is_thread_safe():
    names = TEST_FILES[:20]
    expected = [read(pydicom_file(name)) for name in names]
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        for image, reference in zip(
            pool.map(lambda name: read(pydicom_file(name)), names * 3), expected * 3, strict=True
        ):
            np.testing.assert_array_equal(image.frames, reference.frames)
            assert image.group == reference.group
    assert before == list(warnings.filters)


VALID_FILES = [
    "MR_small.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "JPEG2000.dcm",
    "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_rle_2frame.dcm", "rtdose.dcm", "6154", "SC_rgb_small_odd.dcm", "image_dfl.dcm",
]  # fmt: skip


def frames_or_none(data):
    try:
        return read(data).frames
    except UnreadableImageError:
        return None


@given(name=st.sampled_from(VALID_FILES), fraction=st.floats(0, 1, exclude_max=True))
def test_truncated_file_never_yields_wrong_pixels(name, fraction):
    data = pydicom_file(name)
    frames = frames_or_none(data[: int(len(data) * fraction)])
    if frames is not None:  # only bytes after the pixel data, or its padding, were lost
        np.testing.assert_array_equal(frames, read(data).frames)


@given(
    name=st.sampled_from(VALID_FILES),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_flipped_bytes_yield_pixels_or_an_error(name, flips):
    data = bytearray(pydicom_file(name))
    for fraction, mask in flips:
        data[int(len(data) * fraction)] ^= mask
    frames = frames_or_none(bytes(data))
    assert frames is None or (frames.dtype == np.uint8 and frames.ndim in (3, 4))
