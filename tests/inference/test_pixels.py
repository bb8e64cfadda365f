"""Images of a request: accepted types, agreement with preprocess, and errors."""

import base64
import io
from functools import partial

import numpy as np
import pytest
from PIL import Image

from fadeformer.data.decode import decode_image, image_to_array
from fadeformer.errors import UserError
from fadeformer.inference import inputs, pixels
from tests.packages import images, png

prepare_images = partial(pixels.prepare_images, image_size=16, channels=3, aspect="pad", max_pixels=10_000)


def test_bytes_base64_and_arrays_agree():
    expected = images(3)
    files = [png(image) for image in expected]
    for payload in (
        expected,
        expected.astype(np.int64),
        expected.astype(object),
        files,
        np.array(files, dtype=object),
        [base64.b64encode(file).decode() for file in files],
        [base64.encodebytes(file).decode() for file in files],
        expected.tolist(),
        [bytearray(files[0]), expected[1], expected[2].tolist()],
    ):
        np.testing.assert_array_equal(prepare_images(payload), expected)


def test_file_of_12_bits_is_scaled_as_in_predict(tmp_path):
    values = np.linspace(0, 4095, 256).astype(np.uint16).reshape(16, 16)
    path = tmp_path / "a.png"
    Image.fromarray(values).save(path)
    pixel_range = [0, 4095, False]  # as in model.json
    served = prepare_images([path.read_bytes()], pixel_range=pixel_range)[0]
    (image,), _ = inputs.list_inputs([str(path)])
    np.testing.assert_array_equal(served, image_to_array(image.read(pixel_range), 16, 3, "pad"))
    assert (served.min(), served.max()) == (0, 255)
    with pytest.raises(UserError, match="image 0: has values from 0 to 4,095, but the data set 0 to 255"):
        prepare_images([path.read_bytes()], pixel_range=[0, 255, False])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_file_matches_preprocess(mode):
    source = np.random.default_rng(1).integers(0, 256, (40, 23, 3), dtype=np.uint8)
    image = (
        Image.fromarray(source).convert("L").convert("I;16")
        if mode == "I;16"
        else Image.fromarray(source).convert(mode)
    )
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    expected = image_to_array(decode_image(buffer.getvalue(), "x"), 16, 3, "pad")
    np.testing.assert_array_equal(prepare_images([buffer.getvalue()])[0], expected)


@pytest.mark.parametrize("shape", [(2, 40, 23, 3), (2, 40, 23, 1), (2, 40, 23), (2, 16, 16)])
def test_arrays_are_resized_like_files(shape):
    payload = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(prepare_images(payload), prepare_images([png(image) for image in payload]))


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ([], "there are no images"),
        ("text", "the images are not a list"),
        (np.array(None), "the images are not a list"),
        (np.zeros((0, 16, 16, 3), np.uint8), "there are no images"),
        (np.zeros((2, 16, 16, 3)), "the array of images: has values other than integers from 0 to 255"),
        (np.full((2, 16, 16, 3), 256), "the array of images: has values other than integers from 0 to 255"),
        (np.full((2, 16, 16, 3), "a"), "the array of images: has values other than integers from 0 to 255"),
        (np.zeros((2, 16, 16, 4), np.uint8), r"image 0: has shape \(16, 16, 4\)"),
        (np.zeros((2, 0, 16, 3), np.uint8), r"image 0: has shape \(0, 16, 3\)"),
        (np.zeros((1, 101, 100), np.uint8), "image 0: has more pixels than the limit of 10,000"),
        ([png(np.zeros((101, 100), np.uint8))], "image 0: has 100 x 101 pixels, more than the limit of 10,000"),
        ([png(images(1)[0]), b"nothing"], "image 1: is not a JPEG, PNG"),
        ([png(images(1)[0])[:-30]], "image 0: is truncated|image 0: is corrupt"),
        ([b""], "image 0: the file is empty"),
        (["no base64!"], "image 0: is not valid base64"),
        (["ü"], "image 0: is not valid base64"),
        ([None], "image 0: is neither file bytes"),
        ([1.5], "image 0: is neither file bytes"),
        ([[[1, 2], [3]]], "image 0: is not an array: its rows differ in length"),
        (np.array([png(images(1)[0])]), "numpy dtype S"),
    ],
)
def test_invalid_image_is_reported_with_index(payload, reason):
    with pytest.raises(UserError, match=reason):
        prepare_images(payload)
