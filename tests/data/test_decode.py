"""Image decoding: pixels match the file, and corrupt or unsupported files raise a readable error."""

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
from PIL.PngImagePlugin import PngInfo

from fadeformer.data import decode
from fadeformer.data.archives import reader
from fadeformer.errors import UnreadableImageError, UserError


def resize(pixels: np.ndarray, *arguments: object) -> np.ndarray:
    return np.asarray(decode.resize_to_square(Image.fromarray(pixels), *arguments))


RANDOM = np.random.default_rng(0)
GRAY = RANDOM.integers(0, 256, (5, 7), dtype=np.uint8)
RGB = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)
ALPHA = RANDOM.integers(0, 255, (5, 7), dtype=np.uint8)
GRAY_16 = RANDOM.integers(0, 2**16, (5, 7), dtype=np.uint16)
SMOOTH = np.add.outer(np.arange(40), np.arange(48))[..., None].repeat(3, 2).astype(np.uint8) + np.uint8([0, 40, 90])


def encode_image(pixels, kind="PNG", mode=None, **options) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, color_type: int, rows: bytes, key: bytes | None = None) -> bytes:
    """Write a PNG by hand, for variants that Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">2I5B", width, height, bits, color_type, 0, 0, 0)
    transparency = b"" if key is None else chunk(b"tRNS", key)
    parts = (chunk(b"IHDR", header), transparency, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(width: int, height: int, bits: int, photometric: int, content: bytes, kind: int = 1) -> bytes:
    """Write a single-strip grayscale TIFF; `kind` is its sample format."""
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


def bmp_with_alpha(alpha: int) -> bytes:
    """Write `RGB` as a 32-bit BMP with a V4 header, which declares an alpha channel."""
    rows = np.dstack([RGB[::-1, :, ::-1], np.full((5, 7), alpha, np.uint8)]).tobytes()
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHH10I52x", 108, 7, 5, 1, 32, 3, len(rows), 0, 0, 0, 0, *masks)
    return struct.pack("<2sIHHI", b"BM", 122 + len(rows), 0, 0, 122) + header + rows


def png_with_text(**options: object) -> bytes:
    text = PngInfo()
    text.add_text("history", "x" * 2_000_000, zip=True)
    return encode_image(RGB, pnginfo=text, **options)


def four_channel_tiff() -> bytes:
    """Write a TIFF of one pixel whose four channels are no colors."""
    tags = {256: 1, 257: 1, 259: 1, 262: 1, 277: 4, 279: 4}
    entries = {tag: struct.pack("<2HIHH", tag, 3, 1, value, 0) for tag, value in tags.items()}
    entries[258] = struct.pack("<2HII", 258, 3, 4, 110)
    entries[273] = struct.pack("<2HIHH", 273, 3, 1, 118, 0)
    folder = b"".join(entries[tag] for tag in sorted(entries))
    return struct.pack("<2sHIH", b"II", 42, 8, 8) + folder + bytes(4) + struct.pack("<4H", 8, 8, 8, 8) + b"1234"


def without_adobe_marker(data: bytes) -> bytes:
    """Remove the Adobe marker segment from a JPEG."""
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + struct.unpack_from(">H", data, start + 2)[0] :]


def pixels(data: bytes, **options):
    return np.asarray(decode.decode_image(data, "a.png", **options))


def composite_on_black(color, alpha):
    return np.round(color * (alpha / 255)).astype(np.uint8)


CMYK_IMAGE = Image.fromarray(RANDOM.integers(0, 256, (16, 16, 4), dtype=np.uint8), "CMYK").resize((64, 64))
DECODED = {
    "grayscale PNG": (encode_image(GRAY), GRAY),
    "RGB PNG": (encode_image(RGB), RGB),
    "1-bit PNG": (encode_image((GRAY > 99) * np.uint8(255), mode="1"), (GRAY > 99) * np.uint8(255)),
    "4-bit PNG": (png(2, 1, 4, 0, b"\0\x5f"), np.uint8([[85, 255]])),
    "palette PNG": (encode_image(Image.fromarray(GRAY // 64).convert("P")), np.dstack([GRAY // 64] * 3)),
    "opaque RGBA PNG": (encode_image(np.dstack([RGB, np.full((5, 7), 255, np.uint8)])), RGB),
    "opaque LA PNG": (encode_image(np.dstack([GRAY, np.full((5, 7), 255, np.uint8)]), mode="LA"), GRAY),
    "16-bit PNG": (encode_image(GRAY_16), np.round(GRAY_16 / 257).astype(np.uint8)),
    "16-bit LA PNG": (png(1, 1, 16, 4, b"\0\x12\x34\xff\xff"), np.uint8([[0x12]])),
    "16-bit RGB PNG": (png(1, 1, 16, 2, b"\0\x12\xff\x34\xff\x56\xff"), np.uint8([[[0x12, 0x34, 0x56]]])),
    "grayscale BMP": (encode_image(GRAY, "BMP"), GRAY),
    "RGB BMP": (encode_image(RGB, "BMP"), RGB),
    "BMP without alpha values": (bmp_with_alpha(0), RGB),
    "opaque BMP": (bmp_with_alpha(255), RGB),
    "PNG with a text of 2 MB": (png_with_text(), RGB),
    "PNG with a color profile of 2 MB": (encode_image(RGB, icc_profile=bytes(2_000_000)), RGB),
    "GIF": (encode_image(GRAY, "GIF"), np.dstack([GRAY] * 3)),
    "grayscale TIFF": (encode_image(GRAY, "TIFF"), GRAY),
    "RGB TIFF": (encode_image(RGB, "TIFF", compression="tiff_lzw"), RGB),
    "16-bit TIFF": (encode_image(GRAY_16, "TIFF"), np.round(GRAY_16 / 257).astype(np.uint8)),
    "big-endian 16-bit TIFF": (encode_image(Image.fromarray(GRAY_16.astype(">u2")), "TIFF"), np.round(GRAY_16 / 257)),
    "16-bit WhiteIsZero TIFF": (tiff(7, 5, 16, 0, GRAY_16.tobytes()), 255 - np.round(GRAY_16 / 257)),
    "8-bit WhiteIsZero TIFF": (tiff(7, 5, 8, 0, GRAY.tobytes()), 255 - GRAY),
    "12-bit TIFF": (tiff(2, 1, 12, 1, b"\xff\xf8\x00"), np.uint8([[255, 128]])),
    "RGB WebP": (encode_image(RGB, "WEBP", lossless=True), RGB),
    "wrong file extension": (encode_image(RGB, "BMP"), RGB),
}  # fmt: skip


@pytest.mark.parametrize("case", DECODED)
def test_decoded_pixels_match_the_file(case):
    data, expected = DECODED[case]
    np.testing.assert_array_equal(pixels(data), expected)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode_image(np.dstack([RGB, ALPHA])), composite_on_black(RGB, ALPHA[..., None])),
        (
            encode_image(Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(ALPHA)])),
            composite_on_black(GRAY, ALPHA),
        ),
        (encode_image(np.dstack([RGB, ALPHA]), "TIFF"), composite_on_black(RGB, ALPHA[..., None])),
        (
            encode_image(Image.fromarray(GRAY // 64).convert("P"), transparency=bytes([255, 9, 128])),
            np.dstack([composite_on_black(GRAY // 64, np.uint8([255, 9, 128, 255])[GRAY // 64])] * 3),
        ),
        (
            encode_image(Image.fromarray(GRAY // 64 + 1).convert("P"), transparency=2),
            np.dstack([np.where(GRAY // 64 == 1, 0, GRAY // 64 + 1)] * 3),
        ),
        (encode_image(GRAY, transparency=int(GRAY[0, 0])), np.where(GRAY[0, 0] == GRAY, 0, GRAY)),
        (
            encode_image(RGB, transparency=tuple(RGB[0, 0].tolist())),
            np.where((RGB[0, 0] == RGB).all(2)[..., None], 0, RGB),
        ),
        (png(3, 1, 4, 0, b"\0\x5f\x20", key=b"\0\x05"), [[0, 255, 34]]),
        (png(8, 1, 1, 0, b"\0\xf0", key=b"\0\x01"), [[0] * 8]),
        (bmp_with_alpha(51), composite_on_black(RGB, np.uint8(51))),
        (png(2, 1, 16, 0, b"\0\x12\x34\x12\x35", key=b"\x12\x34"), [[0, 18]]),
    ],
)
def test_transparency_is_composited_on_black(data, expected):
    decoded = decode.decode_image(data, "a.png")
    np.testing.assert_array_equal(np.asarray(decoded), expected)


def test_all_16_bit_values_are_rounded_to_nearest():
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(pixels(encode_image(values)), np.round(values / 257))


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_pixel_range_scales_more_than_8_bits(bits, kind):
    values = RANDOM.integers(0, 2**bits, (5, 7)).astype(np.uint16)
    values[0, :2] = 0, 2**bits - 1
    data = encode_image(values, kind)
    assert decode.max_stored_value(data) == max(256, 2**bits - 1)
    scaled = pixels(data, pixel_range=[0, 2**bits - 1, False])
    np.testing.assert_array_equal(scaled, np.floor(values / (2**bits - 1) * 255 + 0.5))
    with pytest.raises(
        UnreadableImageError, match=r"has values from 0 to .*, but the data set 0 to 255 \(dataset.pixel"
    ):
        pixels(data, pixel_range=decode.EIGHT_BITS)
    clipped = pixels(data, pixel_range=(100, 200, True))
    np.testing.assert_array_equal(clipped, np.floor(np.clip((values - 100.0) / 100, 0, 1) * 255 + 0.5))


@pytest.mark.parametrize(("dtype", "kind"), [(np.int16, 2), (np.int32, 2), (np.float32, 3)])
def test_signed_and_float_pixels_need_a_clipping_range(dtype, kind):
    values = np.array([[-1000, 0, 500, 2000]], dtype)
    data = tiff(4, 1, values.itemsize * 8, 1, values.tobytes(), kind)
    assert pixels(data, pixel_range=(-1000, 1000, True)).tolist() == [[0, 128, 191, 255]]
    for pixel_range in (None, (0, 4095, False)):
        with pytest.raises(UnreadableImageError, match="signed, 32-bit or floating-point pixels; set dataset"):
            pixels(data, pixel_range=pixel_range)


def test_16_bit_color_needs_the_full_range():
    data = png(1, 1, 16, 2, b"\0\x0f\xff\x34\xff\x06\xff")
    assert decode.max_stored_value(data) == 0x34FF
    assert pixels(data, pixel_range=(0, 65535, False)).tolist() == [[[0x0F, 0x34, 0x06]]]
    with pytest.raises(UnreadableImageError, match="has 16-bit color, which needs the pixel range 0 to 65,535"):
        pixels(data, pixel_range=(0, 0x3FFF, False))


def test_jpeg_pixels_match_pillow():
    for data, mode in (
        (encode_image(SMOOTH[..., 0], "JPEG"), "L"),
        (encode_image(SMOOTH, "JPEG"), "RGB"),
        (encode_image(SMOOTH, "JPEG", progressive=True), "RGB"),
    ):
        decoded = decode.decode_image(data, "a.jpg")
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(Image.open(io.BytesIO(data))))
        assert decoded.mode == mode
        assert np.abs(np.asarray(decoded).astype(int) - (SMOOTH if mode == "RGB" else SMOOTH[..., 0])).mean() < 3


def test_cmyk_inversion_follows_the_adobe_marker():
    adobe = encode_image(CMYK_IMAGE, "JPEG", quality=95)  # stored inverted, with the Adobe marker
    plain = without_adobe_marker(
        encode_image(Image.fromarray(255 - np.asarray(CMYK_IMAGE), "CMYK"), "JPEG", quality=95)
    )
    expected = np.asarray(CMYK_IMAGE.convert("RGB")).astype(int)
    for data in (adobe, plain, encode_image(CMYK_IMAGE, "TIFF")):
        decoded = decode.decode_image(data, "a.jpg")
        assert np.abs(np.asarray(decoded) - expected).mean() < 8


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(9))
def test_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[decode.EXIF_ORIENTATION] = orientation
    data = encode_image(SMOOTH, kind, exif=exif)
    decoded = decode.decode_image(data, "a")
    np.testing.assert_array_equal(
        np.asarray(decoded), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    )


def test_orientation_in_png_text_is_kept():
    """ImageMagick and Photoshop store EXIF and XMP as texts."""
    exif = Image.Exif()
    exif[decode.EXIF_ORIENTATION] = 6
    content, text = exif.tobytes(), PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(content):8}\n{content.hex()}\n", zip=True)
    np.testing.assert_array_equal(pixels(encode_image(RGB, pnginfo=text)), np.rot90(RGB, -1))
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="3"/>')
    np.testing.assert_array_equal(pixels(encode_image(RGB, pnginfo=text)), RGB[::-1, ::-1])


def test_first_image_of_mpo_is_read():
    data = encode_image(SMOOTH, "MPO", save_all=True, append_images=[Image.fromarray(255 - SMOOTH)])
    np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))


def multi_frame(kind: str, **options: object) -> bytes:
    return encode_image(RGB, kind, save_all=True, append_images=[Image.fromarray(255 - RGB)], **options)


JPEG = encode_image(SMOOTH, "JPEG")
INVALID = {
    "empty": (b"", "the file is empty; fetch it again"),
    "multi-frame PNG": (multi_frame("PNG"), "has 2 frames or pages; save one of them"),
    "multi-page TIFF": (multi_frame("TIFF"), "has 2 frames or pages"),
    "multi-frame WebP": (multi_frame("WEBP", lossless=True), "has 2 frames or pages"),
    "DICOM": (bytes(128) + b"DICM", "is a DICOM file, not a regular image"),
    "HEIC": (b"\0\0\0\x18ftypheic", "is a HEIC or AVIF image"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", "is a JPEG 2000; convert it to PNG"),
    "JPEG truncated in its header": (JPEG[:50], "is truncated; fetch it again"),
    "JPEG truncated before its size": (JPEG[:158], "its header has no valid width, height or color type"),
    "JPEG without its last byte": (JPEG[:-1], "is truncated; fetch it again"),
    "JPEG of height 0": (JPEG.replace(b"\x08\0\x28\0\x30", b"\x08\0\0\0\x30"), "its header has no valid width"),
    "PNG without IEND": (encode_image(SMOOTH)[:-12], "is truncated; fetch it again"),
    "PNG of width 0": (png(0, 5, 8, 0, bytes(5)), "its header has no valid width, height"),
    "PNG of height 0": (png(5, 0, 8, 0, b""), "its header has no valid width, height"),
    "PNG with too little data": (png(50, 50, 8, 0, bytes(9)), "is truncated"),
    "PNG of invalid bit depth": (png(5, 5, 7, 0, bytes(50)), "its header has no valid width, height or color type"),
    "PNG with 16-bit transparency": (png(1, 1, 16, 2, bytes(7), key=bytes(6)), "has a 16-bit transparent color"),
    "too large PNG": (png(20_000, 20_000, 1, 0, b""), "has 20,000 x 20,000 pixels, more than the limit of 89,478,485"),
    "too large TIFF": (tiff(60_000, 60_000, 8, 1, b"1"), "has 60,000 x 60,000 pixels, more than the limit"),
    "truncated BMP": (encode_image(SMOOTH, "BMP")[:-999], "is truncated; fetch it again"),
    "truncated TIFF": (encode_image(SMOOTH, "TIFF")[:-999], "is corrupt|is truncated"),
    "truncated GIF": (encode_image(SMOOTH, "GIF")[:-99], "is truncated; fetch it again"),
    "truncated WebP": (encode_image(SMOOTH, "WEBP")[:-99], "is corrupt or of an unsupported type"),
    "RIFF that is not WebP": (b"RIFF\0\0\0\0WAVEfmt ", "is corrupt or of an unsupported type"),
    "32-bit TIFF": (tiff(1, 1, 32, 1, bytes(4)), "has signed, 32-bit or floating-point pixels; set dataset.pixel"),
    "signed TIFF": (tiff(1, 1, 16, 1, bytes(2), kind=2), "has signed, 32-bit or floating-point pixels"),
    "floating-point TIFF": (tiff(1, 1, 32, 1, bytes(4), kind=3), "has signed, 32-bit or floating-point pixels"),
    "TIFF with four channels": (four_channel_tiff(), r"is a TIFF with 4 channels of 8 bits \(color space 1\); save"),
    "camera raw file": (encode_image(RGB, "TIFF", tiffinfo={254: 1}), "starts with a thumbnail, as camera raw"),
    "transparent PNG": (encode_image(np.dstack([RGB, 0 * GRAY])), "is fully transparent; save it without its alpha"),
    "LAB TIFF": (encode_image(RGB, "TIFF", "LAB"), "has the unsupported pixel mode 'LAB'"),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID)
def test_bad_file_raises_with_name_and_reason(case):
    data, message = INVALID[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warnings would be printed
        with pytest.raises(UnreadableImageError, match=f"^folder/a b.png: {message}") as error:
            decode.decode_image(data, "folder/a b.png")
    assert isinstance(error.value, UserError)
    assert error.value.name == "folder/a b.png"
    assert str(error.value) == f"folder/a b.png: {error.value.reason}"


def test_max_pixels_is_set_by_the_caller(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)  # neither warning filters nor Pillow's global limit apply
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(encode_image(RGB), max_pixels=35).shape == RGB.shape
        with pytest.raises(UnreadableImageError, match=r"has 7 x 5 pixels, more than the limit of 34; resize it"):
            pixels(encode_image(RGB), max_pixels=34)


VALID = {
    "PNG": encode_image(SMOOTH),
    "JPEG": JPEG,
    "progressive JPEG": encode_image(SMOOTH, "JPEG", progressive=True),
    "BMP": encode_image(SMOOTH, "BMP"),
    "GIF": encode_image(SMOOTH, "GIF"),
    "TIFF": encode_image(SMOOTH, "TIFF"),
    "LZW TIFF": encode_image(SMOOTH, "TIFF", compression="tiff_lzw"),
    "WEBP": encode_image(SMOOTH, "WEBP"),
}


def pixels_or_none(data):
    try:
        return pixels(data)
    except UnreadableImageError:
        return None


@given(kind=st.sampled_from(sorted(VALID)), fraction=st.floats(0, 1, exclude_max=True))
def test_truncated_file_never_yields_wrong_pixels(kind, fraction):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoded = pixels_or_none(VALID[kind][: int(len(VALID[kind]) * fraction)])
    assert decoded is None or (decoded == pixels(VALID[kind])).all()


@given(
    kind=st.sampled_from(sorted(VALID)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_flipped_bytes_yield_pixels_or_an_error(kind, flips):
    data = bytearray(VALID[kind])
    for fraction, mask in flips:
        data[int(len(data) * fraction)] ^= mask
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoded = pixels_or_none(bytes(data))
    if decoded is None:
        return
    assert decoded.dtype == np.uint8
    assert decoded.ndim in (2, 3)
    assert kind != "PNG" or (decoded == SMOOTH).all()  # PNG has checksums


IMAGES = arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.just((9, 17, 3)))


@given(image=IMAGES, side=st.integers(1, 30), aspect=st.sampled_from(["squash", "crop", "pad"]))
def test_resize_is_square_and_deterministic(image, side, aspect):
    decoded = resize(image, side, aspect)
    assert decoded.shape == (side, side, *image.shape[2:])
    assert decoded.tobytes() == resize(np.asfortranarray(image), side, aspect).tobytes()
    assert decoded.max() <= image.max()  # no ringing
    assert aspect == "pad" or decoded.min() >= image.min()
    if image.shape[0] == image.shape[1]:
        np.testing.assert_array_equal(decoded, resize(image, side))


def test_squash_crop_and_pad_treat_aspect_ratio():
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
    np.testing.assert_array_equal(resize(GRAY[:5, :5], 5), GRAY[:5, :5])
    assert resize(np.full((1, 3000), 7, np.uint8), 10, "pad").any()  # one row remains


def test_downscaling_averages_fine_detail():
    stripes = np.tile(np.uint8([0, 255]), (64, 32))
    inner = resize(stripes, 16)[2:-2, 2:-2]
    assert np.abs(inner.astype(int) - 128).max() <= 1


def test_published_radiographs_decode_to_grayscale(real_data):
    for name, data in reader.iter_members(real_data / "chestxray14" / "images_001.tar.gz"):
        decoded = np.asarray(decode.decode_image(data, name))
        assert decoded.ndim == 2 or np.ptp(decoded, axis=2).max() == 0  # 21 have an opaque alpha channel
