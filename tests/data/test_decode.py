"""Bytes to pixels: every kind of picture gives what its file stores, and every bad one its reason in plain words."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageOps

from fadeformer.data import decode
from fadeformer.data.archives import reader
from fadeformer.errors import UnreadableImageError, UserError


def resize(pixels: np.ndarray, *arguments: object) -> np.ndarray:
    return np.asarray(decode.resize_to_square(Image.fromarray(pixels), *arguments))


RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (5, 7), dtype=np.uint8)
RGB = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)
ALPHA = RANDOM.integers(0, 255, (5, 7), dtype=np.uint8)
DEEP = RANDOM.integers(0, 2**16, (5, 7), dtype=np.uint16)
SMOOTH = np.add.outer(np.arange(40), np.arange(48))[..., None].repeat(3, 2).astype(np.uint8) + np.uint8([0, 40, 90])


def saved(pixels, kind="PNG", mode=None, **options) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, colours: int, rows: bytes, key: bytes | None = None) -> bytes:
    """A PNG as its standard has it, for what Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">2I5B", width, height, bits, colours, 0, 0, 0)
    transparency = b"" if key is None else chunk(b"tRNS", key)
    parts = (chunk(b"IHDR", header), transparency, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(width: int, height: int, bits: int, photometric: int, content: bytes, kind: int = 1) -> bytes:
    """A TIFF of one strip of grey; `kind` is its sample format."""
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        273: 122,
        277: 1,
        279: len(content),
        339: kind,
    }
    entries = b"".join(struct.pack("<2HIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + content


def plain_ink(data: bytes) -> bytes:
    """Takes Adobe's mark out of a JPEG."""
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + struct.unpack_from(">H", data, start + 2)[0] :]


def pixels(data: bytes, **options):
    return np.asarray(decode.decode_image(data, "a.png", **options))


def on_black(colour, alpha):
    return np.round(colour * (alpha / 255)).astype(np.uint8)


INK = Image.fromarray(RANDOM.integers(0, 256, (16, 16, 4), dtype=np.uint8), "CMYK").resize((64, 64))
KEPT = {
    "PNG grey": (saved(GREY), GREY),
    "PNG colour": (saved(RGB), RGB),
    "PNG 1 bit": (saved((GREY > 99) * np.uint8(255), mode="1"), (GREY > 99) * np.uint8(255)),
    "PNG 4 bits": (png(2, 1, 4, 0, b"\0\x5f"), np.uint8([[85, 255]])),
    "PNG palette": (saved(Image.fromarray(GREY // 64).convert("P")), np.dstack([GREY // 64] * 3)),
    "PNG opaque": (saved(np.dstack([RGB, np.full((5, 7), 255, np.uint8)])), RGB),
    "PNG grey, opaque": (saved(np.dstack([GREY, np.full((5, 7), 255, np.uint8)]), mode="LA"), GREY),
    "PNG 16 bits": (saved(DEEP), np.round(DEEP / 257).astype(np.uint8)),
    "PNG 16 bits, grey and alpha": (png(1, 1, 16, 4, b"\0\x12\x34\xff\xff"), np.uint8([[0x12]])),
    "PNG 16 bits, colour": (png(1, 1, 16, 2, b"\0\x12\xff\x34\xff\x56\xff"), np.uint8([[[0x12, 0x34, 0x56]]])),
    "BMP grey": (saved(GREY, "BMP"), GREY),
    "BMP colour": (saved(RGB, "BMP"), RGB),
    "GIF": (saved(GREY, "GIF"), np.dstack([GREY] * 3)),
    "TIFF grey": (saved(GREY, "TIFF"), GREY),
    "TIFF colour": (saved(RGB, "TIFF", compression="tiff_lzw"), RGB),
    "TIFF 16 bits": (saved(DEEP, "TIFF"), np.round(DEEP / 257).astype(np.uint8)),
    "TIFF 16 bits, big-endian": (saved(Image.fromarray(DEEP.astype(">u2")), "TIFF"), np.round(DEEP / 257)),
    "TIFF 16 bits, 0 is white": (tiff(7, 5, 16, 0, DEEP.tobytes()), 255 - np.round(DEEP / 257)),
    "TIFF 8 bits, 0 is white": (tiff(7, 5, 8, 0, GREY.tobytes()), 255 - GREY),
    "TIFF 12 bits": (tiff(2, 1, 12, 1, b"\xff\xf8\x00"), np.uint8([[255, 128]])),
    "WebP colour": (saved(RGB, "WEBP", lossless=True), RGB),
    "another ending": (saved(RGB, "BMP"), RGB),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_pixels_are_those_of_the_file(case):
    data, expected = KEPT[case]
    np.testing.assert_array_equal(pixels(data), expected)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (saved(np.dstack([RGB, ALPHA])), on_black(RGB, ALPHA[..., None])),
        (saved(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])), on_black(GREY, ALPHA)),
        (saved(np.dstack([RGB, ALPHA]), "TIFF"), on_black(RGB, ALPHA[..., None])),
        (
            saved(Image.fromarray(GREY // 64).convert("P"), transparency=bytes([255, 9, 128])),
            np.dstack([on_black(GREY // 64, np.uint8([255, 9, 128, 255])[GREY // 64])] * 3),
        ),
        (
            saved(Image.fromarray(GREY // 64 + 1).convert("P"), transparency=2),
            np.dstack([np.where(GREY // 64 == 1, 0, GREY // 64 + 1)] * 3),
        ),
        (saved(GREY, transparency=int(GREY[0, 0])), np.where(GREY[0, 0] == GREY, 0, GREY)),
        (saved(RGB, transparency=tuple(RGB[0, 0].tolist())), np.where((RGB[0, 0] == RGB).all(2)[..., None], 0, RGB)),
        (png(3, 1, 4, 0, b"\0\x5f\x20", key=b"\0\x05"), [[0, 255, 34]]),
        (png(8, 1, 1, 0, b"\0\xf0", key=b"\0\x01"), [[0] * 8]),
        (png(2, 1, 16, 0, b"\0\x12\x34\x12\x35", key=b"\x12\x34"), [[0, 18]]),
    ],
)
def test_what_is_transparent_is_laid_on_black(data, expected):
    found = decode.decode_image(data, "a.png")
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_every_16_bit_value_is_rounded_to_the_nearest():
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(pixels(saved(values)), np.round(values / 257))


def test_a_jpeg_is_what_pillow_reads_of_it():
    for data, mode in (
        (saved(SMOOTH[..., 0], "JPEG"), "L"),
        (saved(SMOOTH, "JPEG"), "RGB"),
        (saved(SMOOTH, "JPEG", progressive=True), "RGB"),
    ):
        found = decode.decode_image(data, "a.jpg")
        np.testing.assert_array_equal(np.asarray(found), np.asarray(Image.open(io.BytesIO(data))))
        assert found.mode == mode
        assert np.abs(np.asarray(found).astype(int) - (SMOOTH if mode == "RGB" else SMOOTH[..., 0])).mean() < 3


def test_ink_is_read_the_way_round_in_which_it_is_stored():
    adobe = saved(INK, "JPEG", quality=95)  # stored inverted, and marked as Adobe's
    plain = plain_ink(saved(Image.fromarray(255 - np.asarray(INK), "CMYK"), "JPEG", quality=95))
    expected = np.asarray(INK.convert("RGB")).astype(int)
    for data in (adobe, plain, saved(INK, "TIFF")):
        found = decode.decode_image(data, "a.jpg")
        assert np.abs(np.asarray(found) - expected).mean() < 8


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(9))
def test_exifs_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[decode.EXIF_ORIENTATION] = orientation
    data = saved(SMOOTH, kind, exif=exif)
    found = decode.decode_image(data, "a")
    np.testing.assert_array_equal(np.asarray(found), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


def test_the_first_picture_of_a_phones_file_is_read():
    data = saved(SMOOTH, "MPO", save_all=True, append_images=[Image.fromarray(255 - SMOOTH)])
    np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))


def several(kind: str, **options: object) -> bytes:
    return saved(RGB, kind, save_all=True, append_images=[Image.fromarray(255 - RGB)], **options)


JPEG = saved(SMOOTH, "JPEG")
BAD = {
    "empty": (b"", "the file is empty; fetch it again"),
    "several frames in a PNG": (several("PNG"), "holds 2 frames or pages, where one is expected; save the one"),
    "several pages in a TIFF": (several("TIFF"), "holds 2 frames or pages"),
    "several frames in a WebP": (several("WEBP", lossless=True), "holds 2 frames or pages"),
    "DICOM": (bytes(128) + b"DICM", "is a DICOM file, no picture"),
    "HEIC": (b"\0\0\0\x18ftypheic", "is a HEIC or AVIF picture"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", "is a JPEG 2000; convert it to PNG"),
    "a JPEG cut in its header": (JPEG[:50], "is cut off; fetch it again"),
    "a JPEG cut before its size": (JPEG[:158], "its header gives no width, no height or no colours"),
    "a JPEG cut at its last byte": (JPEG[:-1], "is cut off; fetch it again"),
    "a JPEG without rows": (JPEG.replace(b"\x08\0\x28\0\x30", b"\x08\0\0\0\x30"), "its header gives no width"),
    "a PNG without its end": (saved(SMOOTH)[:-12], "is cut off; fetch it again"),
    "a PNG without columns": (png(0, 5, 8, 0, bytes(5)), "its header gives no width, no height"),
    "a PNG without rows": (png(5, 0, 8, 0, b""), "its header gives no width, no height"),
    "a PNG of the wrong length": (png(50, 50, 8, 0, bytes(9)), "is cut off"),
    "a PNG of an unknown kind": (png(5, 5, 7, 0, bytes(50)), "its header gives no width, no height or no colours"),
    "a PNG with a deep key": (png(1, 1, 16, 2, bytes(7), key=bytes(6)), "has a transparent colour of 16 bits"),
    "a large PNG": (png(20_000, 20_000, 1, 0, b""), "has 20,000 x 20,000 pixels, more than the limit of 89,478,485"),
    "a large TIFF": (tiff(60_000, 60_000, 8, 1, b"1"), "has 60,000 x 60,000 pixels, more than the limit"),
    "a BMP cut off": (saved(SMOOTH, "BMP")[:-999], "is cut off; fetch it again"),
    "a TIFF cut off": (saved(SMOOTH, "TIFF")[:-999], "is damaged|is cut off"),
    "a GIF cut off": (saved(SMOOTH, "GIF")[:-99], "is cut off; fetch it again"),
    "a WebP cut off": (saved(SMOOTH, "WEBP")[:-99], "is damaged, or of a kind that is not read"),
    "a RIFF that is no WebP": (b"RIFF\0\0\0\0WAVEfmt ", "is damaged, or of a kind that is not read"),
    "a TIFF of 32 bits": (tiff(1, 1, 32, 1, bytes(4)), "has pixels of the kind 'I'; convert it to 8 or 16 bits"),
    "a TIFF of signed numbers": (tiff(1, 1, 16, 1, bytes(2), kind=2), "has pixels of the kind 'I'"),
    "a TIFF of fractions": (tiff(1, 1, 32, 1, bytes(4), kind=3), "has pixels of the kind 'F'"),
    "a TIFF in LAB": (saved(RGB, "TIFF", "LAB"), "has pixels of the kind 'LAB'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_told_by_name_with_its_reason(case):
    data, message = BAD[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none is left to be printed
        with pytest.raises(UnreadableImageError, match=f"^folder/a b.png: {message}") as error:
            decode.decode_image(data, "folder/a b.png")
    assert isinstance(error.value, UserError)
    assert error.value.name == "folder/a b.png"
    assert str(error.value) == f"folder/a b.png: {error.value.reason}"


def test_the_limit_of_pixels_is_the_callers(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)  # no filter and no limit of the process is asked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(saved(RGB), limit=35).shape == RGB.shape
        with pytest.raises(UnreadableImageError, match=r"has 7 x 5 pixels, more than the limit of 34; make it smaller"):
            pixels(saved(RGB), limit=34)


WHOLE = {
    "PNG": saved(SMOOTH),
    "JPEG": JPEG,
    "progressive JPEG": saved(SMOOTH, "JPEG", progressive=True),
    "BMP": saved(SMOOTH, "BMP"),
    "GIF": saved(SMOOTH, "GIF"),
    "TIFF": saved(SMOOTH, "TIFF"),
    "LZW TIFF": saved(SMOOTH, "TIFF", compression="tiff_lzw"),
    "WEBP": saved(SMOOTH, "WEBP"),
}


def found_in(data):
    try:
        return pixels(data)
    except UnreadableImageError:
        return None


@given(kind=st.sampled_from(sorted(WHOLE)), share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_never_gives_other_pixels(kind, share):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = found_in(WHOLE[kind][: int(len(WHOLE[kind]) * share)])
    assert found is None or (found == pixels(WHOLE[kind])).all()


@given(
    kind=st.sampled_from(sorted(WHOLE)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_flipped_bytes_give_pixels_or_a_reason(kind, flips):
    data = bytearray(WHOLE[kind])
    for share, mask in flips:
        data[int(len(data) * share)] ^= mask
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = found_in(bytes(data))
    if found is None:
        return
    assert found.dtype == np.uint8
    assert found.ndim in (2, 3)
    assert kind != "PNG" or (found == SMOOTH).all()  # which has checksums


IMAGES = arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.just((9, 17, 3)))


@given(image=IMAGES, side=st.integers(1, 30), aspect=st.sampled_from(["squash", "crop", "pad"]))
def test_resizing_gives_a_square_and_the_same_bytes_again(image, side, aspect):
    found = resize(image, side, aspect)
    assert found.shape == (side, side, *image.shape[2:])
    assert found.tobytes() == resize(np.asfortranarray(image), side, aspect).tobytes()
    assert found.max() <= image.max()  # no halo
    assert aspect == "pad" or found.min() >= image.min()
    if image.shape[0] == image.shape[1]:
        np.testing.assert_array_equal(found, resize(image, side))


def test_the_three_ways_with_proportions():
    wide = np.zeros((10, 20), np.uint8)
    wide[:, 5:15] = 200
    np.testing.assert_array_equal(resize(wide, 10, "crop"), np.full((10, 10), 200))
    padded = resize(wide, 20, "pad")
    np.testing.assert_array_equal(padded[5:15], wide)
    assert not padded[:5].any()
    assert not padded[15:].any()
    squashed = resize(wide, 10)
    assert (squashed[:, 3:7] == 200).all()
    assert not squashed[:, :2].any()
    tall = resize(wide.T, 20, "pad")
    np.testing.assert_array_equal(tall, padded.T)
    np.testing.assert_array_equal(resize(GREY[:5, :5], 5), GREY[:5, :5])
    assert resize(np.full((1, 3000), 7, np.uint8), 10, "pad").any()  # one row is left


def test_fine_detail_is_averaged_and_not_picked():
    stripes = np.tile(np.uint8([0, 255]), (64, 32))
    inner = resize(stripes, 16)[2:-2, 2:-2]
    assert np.abs(inner.astype(int) - 128).max() <= 1


def test_the_published_radiographs_are_grey(real_data):
    for name, data in reader.iter_members(real_data / "chestxray14" / "images_001.tar.gz"):
        found = np.asarray(decode.decode_image(data, name))
        assert found.ndim == 2 or np.ptp(found, axis=2).max() == 0  # 21 have an alpha channel, all of them opaque
