"""Mapping of boxes to resized arrays."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fadeformer.data.boxes import map_boxes_to_arrays, transform_boxes
from fadeformer.data.decode import resize_to_square

ASPECTS = ("squash", "crop", "pad")


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (301, 201), (1024, 1024), (77, 500)])
@pytest.mark.parametrize("side", [64, 97])
def test_boxes_match_resized_pixels(aspect, width, height, side):
    x, y, w, h = width // 3, height // 3, width // 4, height // 5
    pixels = np.zeros((height, width), np.uint8)
    pixels[y : y + h, x : x + w] = 255
    array = np.asarray(resize_to_square(Image.fromarray(pixels), side, aspect)) / 255
    mapped = transform_boxes([(x, y, w, h)], width, height, side, aspect)
    if np.isnan(mapped).all():
        assert array.sum() == 0
        return
    left, top, box_width, box_height = mapped[0]
    assert array.sum() == pytest.approx(box_width * box_height, rel=0.02, abs=1.5)
    rows, columns = (array.sum(axis=axis) / array.sum() for axis in (1, 0))
    centers = np.arange(side) + 0.5
    assert rows @ centers == pytest.approx(top + box_height / 2, abs=0.3)
    assert columns @ centers == pytest.approx(left + box_width / 2, abs=0.3)


def test_boxes_are_clipped_to_the_crop():
    boxes = [(100, 10, 20, 20), (0, 0, 40, 100), (40, 0, 20, 50)]
    mapped = transform_boxes(boxes, 200, 100, 50, "crop")  # center crop, x from 50 to 150, scaled by 0.5
    np.testing.assert_allclose(mapped, [(25, 5, 10, 10), (np.nan,) * 4, (0, 0, 5, 25)])


def test_boxes_of_manifest_images_are_mapped_to_arrays():
    boxes = pd.DataFrame(
        [("b", 3, 0, 512, 512, 256), ("b", 1, 512, 0, 64, 64), ("z", 3, 1, 1, 1, 1)],
        columns=["id", "class", "x", "y", "w", "h"],
    ).assign(frame_width=1024, frame_height=1024)
    rows = pd.DataFrame({"split": ["train", "test"], "id": ["a", "b"], "group": ["1", "2"]})
    mapped = map_boxes_to_arrays(boxes, rows, 64, "squash")
    assert mapped.to_dict("records") == [
        {"split": "test", "id": "b", "class": 3, "x": 0, "y": 32, "w": 32, "h": 16},
        {"split": "test", "id": "b", "class": 1, "x": 32, "y": 0, "w": 4, "h": 4},
    ]
    empty = map_boxes_to_arrays(boxes, rows.iloc[:1], 64, "squash")
    assert list(empty.columns) == ["split", "id", "class", "x", "y", "w", "h"]


def test_boxes_are_scaled_by_each_image_size():
    boxes = pd.DataFrame(
        [("a", 0, 10, 10, 20, 20, 100, 100), ("b", 0, 10, 10, 20, 20, 200, 100), ("a", 0, 0, 0, 50, 50, 100, 100)],
        columns=["id", "class", "x", "y", "w", "h", "frame_width", "frame_height"],
    )
    rows = pd.DataFrame({"split": ["val", "val"], "id": ["a", "b"]})
    mapped = map_boxes_to_arrays(boxes, rows, 50, "squash").set_index("id")
    np.testing.assert_allclose(mapped.loc[["b"], ["x", "y", "w", "h"]], [(2.5, 5, 5, 10)])
    np.testing.assert_allclose(mapped.loc["a", ["x", "y", "w", "h"]], [(5, 5, 10, 10), (0, 0, 25, 25)])
