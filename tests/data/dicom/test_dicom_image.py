"""DICOM to uint8: what pydicom's own steps give, no word of the patient, a reason for every file that is not read.

The files are those inside pydicom's wheel; nothing is ever downloaded.
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

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, of files that are wrong in some way


@cache
def shipped(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert path is not None, f"{name} is not in pydicom's wheel"
    assert Path(path).is_relative_to(PACKAGE)
    return Path(path).read_bytes()


def read(data: bytes, **options):
    return dicom_image.read_dicom(data, "a.dcm", salt=SALT, **options)


def made(pixels, syntax=pydicom.uid.ExplicitVRLittleEndian, **elements) -> bytes:
    """A file with these pixels, (height, width) or more; elements by keyword add to or replace what it would have."""
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


def by_pydicom(data: bytes):
    """The same frames by pydicom's functions over the whole array, one step after the other."""
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


SHIPPED = [
    "693_J2KI.dcm", "CT_small.dcm", "ExplVR_BigEnd.dcm", "GDCMJ2K_TextGBR.dcm", "J2K_pixelrep_mismatch.dcm",
    "JPEG2000.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm",
    "MR_small_jp2klossless.dcm", "MR_small_padded.dcm", "SC_jpeg_no_color_transform.dcm", "SC_rgb_dcmtk_+eb+cr.dcm",
    "SC_rgb_dcmtk_+eb+cy+n1.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_dcmtk_+eb+cy+s4.dcm", "SC_rgb_gdcm_KY.dcm",
    "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_rle.dcm", "SC_rgb_rle_16bit_2frame.dcm", "SC_rgb_rle_32bit.dcm",
    "SC_rgb_small_odd.dcm", "SC_rgb_small_odd_jpeg.dcm", "SC_ybr_full_422_uncompressed.dcm", "6154", "17106", "6293",
    "15820", "examples_jpeg2k.dcm", "examples_overlay.dcm", "examples_palette.dcm", "examples_rgb_color.dcm",
    "examples_ybr_color.dcm", "image_dfl.dcm", "liver_1frame.dcm", "rtdose.dcm", "rtdose_expb.dcm", "rtdose_rle.dcm",
]  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_frames_are_those_of_pydicoms_own_steps(name):
    found = read(shipped(name))
    expected, kind = by_pydicom(shipped(name))
    assert found.frames.dtype == np.uint8
    assert found.frames.shape == expected.shape
    assert found.scale == kind
    difference = np.abs(found.frames - expected)
    assert difference.max() <= 1  # where the last bit of a fraction decides how a half is rounded
    assert difference.mean() < 0.01


def test_jpeg_lossless_and_jpeg_ls_give_what_is_stored():
    plain = read(shipped("SC_rgb_rle.dcm")).frames
    np.testing.assert_array_equal(read(shipped("SC_rgb_jpeg_gdcm.dcm")).frames, plain)
    one, other = read(shipped("MR_small_jpeg_ls_lossless.dcm")), read(shipped("MR_small.dcm"))
    np.testing.assert_array_equal(one.frames, other.frames)
    near = [read(shipped(f"SC_rgb_jls_lossy_{order}.dcm")).frames.astype(int) for order in ("line", "sample")]
    np.testing.assert_array_equal(*near)
    assert np.abs(near[0] - plain).max() <= 5
    assert read(shipped("JPEGLSNearLossless_16.dcm")).frames.shape == (1, 50, 10)
    assert read(shipped("JPGExtended.dcm")).frames.shape == (1, 1024, 256)  # of 12 bits


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("syntax", [pydicom.uid.JPEGLosslessSV1, pydicom.uid.JPEGLSLossless])
@pytest.mark.parametrize("signed", [False, True])
def test_every_depth_comes_back_from_a_lossless_frame(bits, syntax, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    pixels = (
        np.random.default_rng(0).integers(low, low + 2**bits, (7, 9)).astype(f"{'i' if signed else 'u'}{bits // 9 + 1}")
    )
    stored = pixels.view(f"u{pixels.itemsize}") & (2**bits - 1)
    if syntax == pydicom.uid.JPEGLSLossless:
        frame = imagecodecs.jpegls_encode(stored)
    else:
        frame = imagecodecs.jpeg8_encode(stored, lossless=True, bitspersample=bits)
    plain = read(made(pixels, BitsStored=bits, HighBit=bits - 1))
    packed = read(made(pixels, syntax, BitsStored=bits, HighBit=bits - 1, PixelData=encapsulate([frame])))
    np.testing.assert_array_equal(packed.frames, plain.frames)


def test_subgroups_are_told():
    found = read(shipped("examples_overlay.dcm"))
    assert (found.sex, found.age, found.modality, found.view, found.manufacturer) == ("M", 58, "MR", None, "SIEMENS")
    found = read(made(np.zeros((2, 2), np.uint8), PatientSex="F", PatientAge="018M", Modality="DX", ViewPosition="PA"))
    assert (found.sex, found.age, found.modality, found.view, found.manufacturer) == ("F", 1, "DX", "PA", None)


@pytest.mark.parametrize(
    ("age", "years"),
    [("045Y", 45), ("090Y", 90), ("101Y", 90), ("023M", 1), ("060W", 1), ("006D", 0), ("", None), ("45", None)],
)
def test_an_age_is_whole_years_of_90_at_most(age, years):
    assert read(made(np.zeros((2, 2), np.uint8), PatientAge=age)).age == years


def test_the_group_is_a_keyed_hash_of_the_patient():
    black = np.zeros((2, 2), np.uint8)
    one = read(made(black, PatientID="4711", StudyInstanceUID="1.2.1"))
    same = read(made(black, PatientID=" 4711 ", StudyInstanceUID="1.2.2", IssuerOfPatientID="A"))
    other = read(made(black, PatientID="4712", StudyInstanceUID="1.2.1"))
    assert one.group == same.group != other.group
    expected = hashlib.blake2b(b"PatientID\x004711", key=SALT, digest_size=16).hexdigest()
    assert one.group == expected
    assert dicom_image.read_dicom(made(black, PatientID="4711"), "a", salt=SALT[::-1]).group != one.group
    study = read(made(black, PatientID="", StudyInstanceUID="1.2.1"))
    assert study.group not in (None, one.group)
    assert study.group == read(made(black, StudyInstanceUID="1.2.1")).group
    assert read(made(black)).group is None
    assert read(made(black, PatientID="1.2.1")).group != study.group


@pytest.mark.parametrize("salt", [b"", b"fifteen bytes..", b"x" * 65])
def test_a_salt_that_hides_nothing_is_refused(salt):
    with pytest.raises(UserError, match=f"the salt has {len(salt)} bytes; it must be 16 to 64 random ones"):
        dicom_image.read_dicom(shipped("CT_small.dcm"), "a.dcm", salt=salt)


PATIENTS = ("PatientName", "PatientID", "PatientBirthDate", "PatientAddress", "PatientComments", "OtherPatientNames")


def said_of(data: bytes, caplog) -> str:
    """All that leaves: what is handed out, errors with their chain, warnings and log."""
    caplog.clear()
    with warnings.catch_warnings(record=True) as told, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        try:
            found = read(data)
            said = repr(dataclasses.replace(found, frames=np.zeros(0)))
        except UnreadableImageError as error:
            said = "".join(traceback.format_exception(error)) + repr(error)
            assert (error.__cause__, error.__context__) == (None, None)  # noqa: PT017
    return said + caplog.text + " ".join(str(warning.message) for warning in told)


def names_in(data: bytes) -> set[str]:
    """Every value of the patient's group (0010,xxxx) but sex and age, and other people's names."""
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), force=True)
        elements = list(dataset.iterall())
    except Exception:
        return set()
    found = set()
    for element in elements:
        is_patients = element.tag.group == 0x0010 and element.keyword not in ("PatientSex", "PatientAge")
        if (is_patients or element.VR == "PN") and element.VR != "SQ":
            values = element.value if element.VM > 1 else [element.value]
            found |= {str(value) for value in values if value} | {str(value).split("^")[0] for value in values if value}
    return {name for name in found if len(name) > 3 or (len(name) == 3 and name.isupper())}


def test_no_file_of_the_wheel_gives_a_name_away(caplog):
    checked = 0
    for path in sorted((PACKAGE / "data").rglob("*")):
        if path.is_file() and path.parent.name != "palettes" and path.suffix not in (".py", ".pyc"):
            names = names_in(path.read_bytes())
            said = said_of(path.read_bytes(), caplog)
            assert [name for name in names if name in said] == []
            checked += bool(names)
    assert checked > 90


@pytest.mark.parametrize(
    "name", ["MR_small.dcm", "MR_small_implicit.dcm", "MR_truncated.dcm", "SC_rgb_rle.dcm", "rtplan.dcm"]
)
def test_no_name_leaves_even_from_a_wrong_place(name, caplog):
    dataset = pydicom.dcmread(io.BytesIO(shipped(name)), force=True)
    hidden = "Zyxwvut^Qwertz"
    for keyword in (*PATIENTS, "PatientAge", "PatientSex", "ViewPosition", "Modality", "InstitutionName", "StudyDate"):
        dataset.pop(keyword, None)
        dataset[keyword] = pydicom.DataElement(keyword, "LO", hidden + "x" * 70, validation_mode=0)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    assert hidden.encode() in buffer.getvalue()
    said = said_of(buffer.getvalue(), caplog)
    assert "Zyxwvut" not in said
    assert "Qwertz" not in said


RAMP = np.arange(-300, 300, dtype=np.int16).reshape(20, 30)


def level(values, low, high):
    return np.round((values - low) / (high - low) * 255)


@given(
    center=st.integers(-2000, 2000),
    width=st.integers(1, 3000),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID", None]),
    slope=st.sampled_from(["1", "0.684", "2"]),
    intercept=st.sampled_from(["-1024", "0", "200"]),
)
def test_every_window_is_pydicoms(center, width, function, slope, intercept):
    functions = {"VOILUTFunction": function} if function else {}
    data = made(
        RAMP, WindowCenter=center, WindowWidth=width, RescaleSlope=slope, RescaleIntercept=intercept, **functions
    )
    dataset = pydicom.dcmread(io.BytesIO(data))
    with np.errstate(over="ignore"):
        expected = apply_windowing(apply_modality_lut(RAMP, dataset), dataset)
    low, high = (end * float(slope) + float(intercept) for end in (-(2**15), 2**15 - 1))
    assert np.abs(read(data).frames[0] - level(expected, low, high)).max() <= 1


def lut(kind: str, values: list[int], first: int, bits: int) -> Dataset:
    """A lookup table for stored values from `first` on."""
    found = item(LUTData=values)
    found.add_new("LUTDescriptor", kind, [len(values), first, bits])
    found["LUTData"].VR = "US"
    return found


COLOUR = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
FRACTIONS = np.float32([[0, 0.25], [0.5, 1]])
LEVELS = np.repeat(np.uint8([10, 60, 110]), 4).tobytes()
SEVEN = np.full((3, 4), 7, np.uint8)
PIXELS = {
    "a modality table": (
        made(np.uint8([[0, 1, 2], [3, 4, 5]]), ModalityLUTSequence=[lut("US", [0, 10, 100, 1000], 1, 16)]),
        [[[0, 0, 3], [26, 255, 255]]],
    ),
    "a range of padding": (
        made(np.uint16([[0, 5, 9], [10, 60, 110]]), PixelPaddingValue=9, PixelPaddingRangeLimit=0),
        [[[0, 0, 0], [0, 128, 255]]],
    ),
    "one value": (made(SEVEN), np.zeros((1, 3, 4))),
    "nothing but padding": (made(SEVEN, PixelPaddingValue=7), np.zeros((1, 3, 4))),
    "color by planes": (made(COLOUR, PlanarConfiguration=1, PixelData=COLOUR.transpose(2, 0, 1).tobytes()), [COLOUR]),
    "fractions": (
        made(
            FRACTIONS.view(np.uint32), PixelData=None, FloatPixelData=FRACTIONS.tobytes(), BitsStored=None,
            HighBit=None,
        ),
        [[[0, 64], [128, 255]]],
    ),
    "frames that share one range": (
        made(np.zeros((2, 2), np.uint8), NumberOfFrames=3, PixelData=LEVELS),
        np.repeat([0, 128, 255], 4).reshape(3, 2, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PIXELS)
def test_stored_values_become_pixels(case):
    data, expected = PIXELS[case]
    np.testing.assert_array_equal(read(data).frames, expected)


def test_the_first_of_several_windows_counts_and_half_a_window_is_none():
    several = read(made(RAMP, WindowCenter=[0, 100], WindowWidth=[50, 600]))
    np.testing.assert_array_equal(several.frames, read(made(RAMP, WindowCenter=0, WindowWidth=50)).frames)
    assert several.scale == "window"
    assert read(made(RAMP, WindowCenter=1)).scale == "range"


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_table_for_display_comes_before_a_window(bits):
    table = lut("SS", np.linspace(2**bits - 1, 0, 512).astype(int).tolist(), -256, bits)
    data = made(RAMP, VOILUTSequence=[table], WindowCenter=0, WindowWidth=50, RescaleSlope="1", RescaleIntercept="0.5")
    dataset = pydicom.dcmread(io.BytesIO(data))
    found = read(data)
    assert found.scale == "table"
    np.testing.assert_array_equal(found.frames[0], level(apply_voi_lut(RAMP, dataset), 0, 2**bits - 1))


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_not_looked_at(kind):
    pixels = np.int16([[-2000, -2000, 0, 50], [100, -2000, 25, 75]])
    for value in (-2000, 63536):  # the latter is how many files write it
        data = made(pixels, PhotometricInterpretation=kind)
        dataset = pydicom.dcmread(io.BytesIO(data))
        dataset.add_new("PixelPaddingValue", "SS" if value < 0 else "US", value)
        buffer = io.BytesIO()
        dataset.save_as(buffer)
        found = read(buffer.getvalue()).frames[0]
        expected = np.array([[0, 0, 0, 128], [255, 0, 64, 191]])
        if kind == "MONOCHROME1":
            expected = np.where(pixels == -2000, 0, 255 - np.array([[0, 0, 0, 127.5], [255, 0, 63.75, 191.25]]))
        np.testing.assert_array_equal(found, np.floor(expected + 0.5))


def test_bits_that_are_not_stored_are_not_looked_at():
    signed = np.int16([[-2048, -1], [0, 2047]])
    dirty = (signed.view(np.uint16) & 0x0FFF) | 0x5000  # an overlay, as old files keep it
    found = read(made(dirty.view(np.int16), BitsStored=12, HighBit=11)).frames[0]
    np.testing.assert_array_equal(found, level(signed.astype(float), -2048, 2047))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_is_applied(bits):
    colours = {"Red": [0, 255, 10], "Green": [1, 128, 20], "Blue": [2, 0, 30]}
    scale = 257 if bits == 16 else 1
    elements = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, values in colours.items():
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [3, 0, bits]
        elements[f"{colour}PaletteColorLookupTableData"] = (np.array(values) * scale).astype(f"u{bits // 8}").tobytes()
    if bits == 8:
        elements = {key: value + b"\0" if isinstance(value, bytes) else value for key, value in elements.items()}
        elements |= {f"{colour}PaletteColorLookupTableDescriptor": [4, 0, 8] for colour in colours}
    found = read(made(np.uint8([[0, 1], [2, 1]]), **elements))
    np.testing.assert_array_equal(found.frames[0], np.array(list(colours.values())).T[[[0, 1], [2, 1]]])


def test_newer_files_have_a_window_for_each_frame():
    def window(center, width):
        return item(FrameVOILUTSequence=[item(WindowCenter=center, WindowWidth=width)])

    shared = item(PixelValueTransformationSequence=[item(RescaleSlope="2", RescaleIntercept="-10")])
    data = made(
        RAMP,
        NumberOfFrames=2,
        PixelData=RAMP.tobytes() * 2,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=[window(0, 50), window(100, 600)],
    )
    found = read(data)
    for frame, (center, width) in zip(found.frames, ((0, 50), (100, 600)), strict=True):
        rescale = {"RescaleSlope": "2", "RescaleIntercept": "-10"}
        np.testing.assert_array_equal(
            frame, read(made(RAMP, WindowCenter=center, WindowWidth=width, **rescale)).frames[0]
        )


def j2k(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "JPEG2000", no_jp2=True)
    return encapsulate([buffer.getvalue()])


def deflated(size: int) -> bytes:
    """A file of the deflated kind that grows to `size` bytes of nothing."""
    whole = made(np.zeros((2, 2), np.uint8), pydicom.uid.DeflatedExplicitVRLittleEndian)
    start = 144 + struct.unpack_from("<I", whole, 140)[0]
    deflate = zlib.compressobj(wbits=-15)
    block = bytes(2**20)
    return whole[:start] + b"".join(deflate.compress(block) for _ in range(size // len(block))) + deflate.flush()


BLACK = np.zeros((8, 8), np.uint8)
BAD = {
    "empty": (b"", "the file is empty; fetch it again"),
    "a text": (b"image,label\n", "is no DICOM file; leave it out"),
    "a report": (shipped("test-SR.dcm"), "holds no image, or is cut off before it; leave it out"),
    "cut off, colour": (shipped("SC_ybr_full_422_uncompressed.dcm")[:-99], "is cut off: it has .* of 20,000 bytes"),
    "cut off, compressed": (shipped("JPEG2000.dcm")[:-99], "holds no image, or is cut off before it"),
    "cut off, JPEG": (shipped("SC_rgb_jpeg_gdcm.dcm").replace(b"\xff\xd9", b"\1\1"), "a compressed frame that is cut"),
    "an unknown syntax": (
        made(BLACK).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"),
        "its transfer syntax of an unknown kind cannot be decoded here; convert it with gdcmconv --raw",
    ),
    "no rows": (made(BLACK, Rows=0), "has 8 x 0 pixels in 1 frames; at least 1 and at most 536,870,912 in all"),
    "too many frames": (made(BLACK, NumberOfFrames=10**8), "has 8 x 8 pixels in 100,000,000 frames; at least 1"),
    "a number that is none": (shipped("badVR.dcm"), r"is damaged, or not built as DICOM wants it \(ValueError\)"),
    "no width": (made(BLACK, Columns=None), r"not built as DICOM wants it \(AttributeError\); fetch or export"),
    "more frames than said": (made(BLACK, PixelData=bytes(192)), "says that it has 1 frames, but holds 3; export it"),
    "a window of no width": (made(BLACK, WindowCenter=0, WindowWidth=0), "has a window of no width, or of an unknown"),
    "an unknown window": (
        made(BLACK, WindowCenter=0, WindowWidth=9, VOILUTFunction="CUBIC"),
        "has a window of no width, or of an unknown function; export it again",
    ),
    "not a number": (
        made(
            np.zeros((1, 1), np.uint32), PixelData=None, FloatPixelData=struct.pack("<f", math.nan),
            BitsStored=None, HighBit=None,
        ),
        r"has pixels that are no numbers \(NaN or infinite\)",
    ),
    "other colours": (
        made(np.zeros((8, 8, 3), np.uint8), PhotometricInterpretation="YBR_PARTIAL_422"),
        "has colours that are neither RGB nor YBR_FULL",
    ),
    "a frame of another size": (
        made(BLACK, pydicom.uid.JPEG2000Lossless, PixelData=j2k(4000, 4000)),
        "has a compressed frame of another size than its header says",
    ),
    "a frame in a box of no length": (
        made(BLACK, pydicom.uid.JPEG2000Lossless, PixelData=encapsulate([dicom_image.JP2_SIGNATURE + bytes(20)])),
        "has a compressed frame that is damaged; fetch or export it again",
    ),
    "a frame that is none": (
        made(BLACK, pydicom.uid.JPEGBaseline8Bit, PixelData=encapsulate([b"no JPEG."])),
        "has a compressed frame that is damaged; fetch or export it again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_told_by_name_with_its_reason(case):
    data, message = BAD[case]
    with pytest.raises(UnreadableImageError, match=f"^folder/a b.dcm: .*{message}") as error:
        dicom_image.read_dicom(data, "folder/a b.dcm", salt=SALT)
    assert error.value.name == "folder/a b.dcm"
    assert (error.value.__cause__, error.value.__context__) == (None, None)


def test_a_bomb_is_told_before_it_is_inflated(monkeypatch):
    monkeypatch.setattr(dicom_image, "MAX_INFLATED_BYTES", 2**23)
    with pytest.raises(
        UnreadableImageError, match="grows to more than 8,388,608 bytes when it is inflated; it is refused as"
    ):
        read(deflated(2**24))


def test_too_many_pixels_are_refused(monkeypatch):
    monkeypatch.setattr(dicom_image, "MAX_PIXELS", 64)
    assert read(made(BLACK)).frames.shape == (1, 8, 8)
    monkeypatch.setattr(dicom_image, "MAX_PIXELS", 63)
    with pytest.raises(UnreadableImageError, match="at most 63 in all are read"):
        read(made(BLACK))


def test_old_files_without_a_preamble_are_read():
    for name in ("MR_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm"):
        dataset = pydicom.dcmread(io.BytesIO(shipped(name)))
        is_implicit, is_little = dataset.original_encoding
        buffer = io.BytesIO()
        del dataset.file_meta
        dataset.preamble = None
        dataset.save_as(buffer, implicit_vr=is_implicit, little_endian=is_little, enforce_file_format=False)
        assert buffer.getvalue()[128:132] != b"DICM"
        np.testing.assert_array_equal(read(buffer.getvalue()).frames, read(shipped(name)).frames)


def test_threads_give_what_one_gives_and_change_nothing():
    names = SHIPPED[:20]
    expected = [read(shipped(name)) for name in names]
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(lambda name: read(shipped(name)), names * 3), expected * 3, strict=True):
            np.testing.assert_array_equal(found.frames, wanted.frames)
            assert found.group == wanted.group
    assert before == list(warnings.filters)


WHOLE = [
    "MR_small.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "JPEG2000.dcm",
    "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_rle_2frame.dcm", "rtdose.dcm", "6154", "SC_rgb_small_odd.dcm", "image_dfl.dcm",
]  # fmt: skip


def found_in(data):
    try:
        return read(data).frames
    except UnreadableImageError:
        return None


@given(name=st.sampled_from(WHOLE), share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_never_gives_other_pixels(name, share):
    whole = shipped(name)
    found = found_in(whole[: int(len(whole) * share)])
    if found is not None:  # what was lost stands behind the pixels, or is their padding to an even length
        np.testing.assert_array_equal(found, read(whole).frames)


@given(
    name=st.sampled_from(WHOLE),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_flipped_bytes_give_pixels_or_a_reason(name, flips):
    data = bytearray(shipped(name))
    for share, mask in flips:
        data[int(len(data) * share)] ^= mask
    found = found_in(bytes(data))
    assert found is None or (found.dtype == np.uint8 and found.ndim in (3, 4))
