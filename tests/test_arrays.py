"""Arrays that are written once and mapped by everything after."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fadeformer import arrays
from fadeformer.errors import UserError

CARD = {"name": "own", "task": "multi-class", "classes": ["a", "b", "c"], "size": 10}


def write(folder, pixels, *, size=10, channels=3):
    folder.mkdir()
    rows = [(split, f"{split}/{i}", None, i % 3) for split, images in pixels.items() for i in range(len(images))]
    index = pd.DataFrame(rows, columns=["split", "id", "group", "label"])
    return arrays.write(
        CARD, index, pixels, image_size=size, channels=channels, cross_split_duplicates=2, folder=folder
    )


def pixels(channels, side=10):
    shape = (side, side, 3) if channels == 3 else (side, side)
    random = np.random.default_rng(0)
    return {s: random.integers(0, 256, (n, *shape), dtype=np.uint8) for s, n in (("train", 5), ("val", 3), ("test", 4))}


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_and_labels_come_back_as_they_were(tmp_path, channels):
    made = pixels(channels)
    meta = write(tmp_path / "a", made, channels=channels)
    assert arrays.read_meta(tmp_path / "a") == meta
    for split, expected in made.items():
        found = arrays.read(tmp_path / "a", split)
        assert isinstance(found.pixels, np.memmap)
        np.testing.assert_array_equal(found.pixels, expected.reshape(*expected.shape[:3], channels))
        assert found.labels.tolist() == [[i % 3] for i in range(len(expected))]
        assert found.index["id"].tolist() == [f"{split}/{i}" for i in range(len(expected))]


def test_grey_becomes_colour_and_colour_grey(tmp_path):
    grey = pixels(1)
    write(tmp_path / "a", grey, channels=3)
    np.testing.assert_array_equal(
        arrays.read(tmp_path / "a", "val").pixels, np.repeat(grey["val"][..., None], 3, axis=3)
    )
    colour = pixels(3)
    write(tmp_path / "b", colour, channels=1)
    expected = np.asarray(Image.fromarray(colour["val"][1]).convert("L"))
    np.testing.assert_array_equal(arrays.read(tmp_path / "b", "val").pixels[1, :, :, 0], expected)


@pytest.mark.parametrize("size", [5, 20, 23])
def test_images_are_resized_by_pillow(tmp_path, size):
    made = pixels(3)
    write(tmp_path / "a", made, size=size)
    expected = np.asarray(Image.fromarray(made["test"][2]).resize((size, size), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(arrays.read(tmp_path / "a", "test").pixels[2], expected)


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(UserError, match="run `dvc repro preprocess` first"):
        arrays.read_meta(tmp_path)
