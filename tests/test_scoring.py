"""What an image may be, that it is scored as the pipeline scores it, and what is decided about it."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from fadeformer.decisions import BETWEEN, NOTHING
from fadeformer.decode import fit
from fadeformer.errors import UserError
from fadeformer.scoring import Scorer
from tests.packages import KINDS, gather, images, png, write_model


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> Scorer:
    return Scorer(gather(write_model(tmp_path_factory.mktemp("binary"))), max_pixels=10_000)


def test_files_text_and_pixels_of_an_image_are_the_same(scorer):
    pixels = images(3)
    files = [png(image) for image in pixels]
    for given in (
        pixels,
        pixels.astype(np.int64),
        pixels.astype(object),
        files,
        np.array(files, dtype=object),
        [base64.b64encode(file).decode() for file in files],
        [base64.encodebytes(file).decode() for file in files],
        pixels.tolist(),
        [bytearray(files[0]), pixels[1], pixels[2].tolist()],
    ):
        np.testing.assert_array_equal(scorer.pixels(given), pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_file_of_any_size_and_mode_becomes_what_preprocess_makes_of_it(scorer, mode):
    big = np.random.default_rng(1).integers(0, 256, (40, 23, 3), dtype=np.uint8)
    image = Image.fromarray(big).convert("L").convert("I;16") if mode == "I;16" else Image.fromarray(big).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    from fadeformer.decode import decode

    expected = fit(decode(buffer.getvalue(), "x").image, 16, 3, "pad")
    np.testing.assert_array_equal(scorer.pixels([buffer.getvalue()])[0], expected)


@pytest.mark.parametrize("shape", [(2, 40, 23, 3), (2, 40, 23, 1), (2, 40, 23), (2, 16, 16)])
def test_pixels_of_another_size_are_made_to_fit_as_files_are(scorer, shape):
    pixels = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(scorer.pixels(pixels), scorer.pixels([png(image) for image in pixels]))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], "there are no images"),
        ("text", "the images are not a list"),
        (np.array(None), "the images are not a list"),
        (np.zeros((0, 16, 16, 3), np.uint8), "there are no images"),
        (np.zeros((2, 16, 16, 3)), "the array of images: is not made of whole numbers from 0 to 255"),
        (np.full((2, 16, 16, 3), 256), "the array of images: is not made of whole numbers from 0 to 255"),
        (np.full((2, 16, 16, 3), "a"), "the array of images: is not made of whole numbers from 0 to 255"),
        (np.zeros((2, 16, 16, 4), np.uint8), r"image 0: has the shape \(16, 16, 4\)"),
        (np.zeros((2, 0, 16, 3), np.uint8), r"image 0: has the shape \(0, 16, 3\)"),
        (np.zeros((1, 101, 100), np.uint8), "image 0: has more pixels than the limit of 10,000"),
        ([png(np.zeros((101, 100), np.uint8))], "image 0: has 100 x 101 pixels, more than the limit of 10,000"),
        ([png(images(1)[0]), b"nothing"], "image 1: is no JPEG, PNG"),
        ([png(images(1)[0])[:-30]], "image 0: is cut off|image 0: is damaged"),
        ([b""], "image 0: the file is empty"),
        (["no base64!"], "image 0: is text that is not base64"),
        (["ü"], "image 0: is text that is not base64"),
        ([None], "image 0: is neither bytes"),
        ([1.5], "image 0: is neither bytes"),
        ([[[1, 2], [3]]], "image 0: is not an array: its rows differ in length"),
        (np.array([png(images(1)[0])]), "numpy's type S"),
    ],
)
def test_what_cannot_be_used_is_told_with_its_place(scorer, given, reason):
    with pytest.raises(UserError, match=reason):
        scorer.pixels(given)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_hold_probabilities_and_decisions(kind, tmp_path):
    scorer = Scorer(gather(write_model(tmp_path, kind)))
    columns = scorer.columns(images(20), "youden")
    _, _, classes, _ = KINDS[kind]
    scores = np.stack([columns[f"probability.{name}"] for name in classes], axis=1)
    np.testing.assert_allclose(scores, scorer.trained.scores(images(20), 7), atol=1e-6)
    assert kind == "grades" or len(set(columns["decision"])) > 1
    for name, score in zip(classes, scores.T, strict=True):
        if name in scorer.points["youden"]:
            expected = score >= scorer.points["youden"][name]["threshold"]
            assert columns[f"positive.{name}"].tolist() == expected.tolist()
    for row, decision in enumerate(columns["decision"]):
        positive = [name for name in classes if columns[f"positive.{name}"][row]]
        if kind == "binary":
            assert positive == [decision]
        elif kind == "findings":
            assert decision == (BETWEEN.join(positive) or NOTHING)
        else:
            assert decision == classes[scores[row].argmax()]


def test_an_operating_point_is_chosen_by_name(scorer):
    assert set(scorer.columns(images(5), "sensitivity")["decision"]) == {"malignant"}
    nothing = scorer.columns(images(5), "specificity")  # which val or test could not judge
    assert nothing["decision"] == [None] * 5
    assert nothing["positive.benign"].tolist() == [None] * 5
    with pytest.raises(UserError, match="not one of this model's: sensitivity, specificity, youden"):
        scorer.columns(images(5), "best")
