"""The pointing game, with boxes that are told in pixels of the original image."""

import numpy as np
import pytest
from PIL import Image

from fadeformer.decode import resize
from fadeformer.errors import UserError
from fadeformer.pointing import boxes_in_array, pointing, read_boxes

ASPECTS = ("squash", "crop", "pad")


def peaks(*places: tuple[int, int], grid: int = 4):
    """Maps (images, grid, grid) that are largest at the given row and column."""
    maps = np.random.default_rng(0).random((len(places), grid, grid))
    for one, place in zip(maps, places, strict=True):
        one[place] = 2.0
    return maps


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (301, 201), (1024, 1024), (77, 500)])
@pytest.mark.parametrize("side", [64, 97])
def test_boxes_go_where_resize_puts_the_pixels(aspect, width, height, side):
    x, y, w, h = width // 3, height // 3, width // 4, height // 5
    pixels = np.zeros((height, width), np.uint8)
    pixels[y : y + h, x : x + w] = 255
    array = np.asarray(resize(Image.fromarray(pixels), side, aspect)) / 255
    mapped = boxes_in_array([(x, y, w, h)], width, height, side, aspect)
    if len(mapped) == 0:
        assert array.sum() == 0
        return
    left, top, across, down = mapped[0]
    assert array.sum() == pytest.approx(across * down, rel=0.02, abs=1.5)
    rows, columns = (array.sum(axis=axis) / array.sum() for axis in (1, 0))
    middles = np.arange(side) + 0.5
    assert rows @ middles == pytest.approx(top + down / 2, abs=0.3)
    assert columns @ middles == pytest.approx(left + across / 2, abs=0.3)


def test_what_a_crop_cuts_off_is_cut_off():
    boxes = [(0, 0, 40, 100), (40, 0, 20, 50), (100, 10, 20, 20)]
    mapped = boxes_in_array(boxes, 200, 100, 50, "crop")  # the middle, x from 50 to 150, at half the size
    np.testing.assert_allclose(mapped, [(0, 0, 5, 25), (25, 5, 10, 10)])


def test_pointing_counts():
    maps = peaks((0, 0), (1, 2), (3, 3))
    boxes = [[(0, 0, 50, 50)], [(0, 0, 10, 10), (100, 50, 50, 50)], [(0, 0, 50, 50)]]
    told = pointing(maps, boxes, [(200, 200)] * 3, 28, "squash")
    assert (told.hits, told.images, told.share) == (2, 3, pytest.approx(2 / 3))
    assert told.chance == pytest.approx(1 / 16)
    assert (told.flat, told.unreachable, told.outside) == (0, 0, 0)


def test_width_and_height_are_not_mixed_up():
    maps = peaks((0, 3), (3, 0))
    right_above = [[(300, 0, 100, 50)]] * 2
    told = pointing(maps, right_above, [(400, 200)] * 2, 28, "squash")
    assert (told.hits, told.images) == (1, 2)
    below = pointing(maps, [[(0, 150, 100, 50)]] * 2, [(400, 200)] * 2, 28, "squash")
    assert (below.hits, below.images) == (1, 2)


def test_the_aspect_decides_where_a_box_lies():
    maps = peaks((0, 0))
    hits = {a: pointing(maps, [[(0, 0, 60, 50)]], [(400, 200)], 32, a).hits for a in ("squash", "pad")}
    assert hits == {"squash": 1, "pad": 0}  # padding moves the image's upper edge down by a quarter
    cropped = pointing(maps, [[(0, 0, 60, 50)]], [(400, 200)], 32, "crop")
    assert (cropped.images, cropped.outside, cropped.share, cropped.chance) == (0, 1, None, None)


def test_a_map_that_points_nowhere_hits_nothing():
    told = pointing(np.zeros((1, 4, 4)), [[(0, 0, 200, 200)]], [(200, 200)], 28, "squash")
    assert (told.hits, told.images, told.flat) == (0, 1, 1)
    assert told.chance == 1.0


def test_a_box_between_the_middles_of_patches_cannot_be_hit():
    maps = peaks((0, 0))
    small = [[(0, 0, 10, 10)]]
    told = pointing(maps, small, [(200, 200)], 28, "squash")
    assert (told.hits, told.unreachable) == (0, 1)
    wider = pointing(maps, small, [(200, 200)], 28, "squash", margin=3)
    assert (wider.hits, wider.unreachable) == (1, 0)


def test_upsampling_changes_no_hit():
    from fadeformer.explanations import upsample

    rng = np.random.default_rng(1)
    maps = rng.random((50, 7, 7))
    boxes = np.concatenate([rng.integers(0, 600, (50, 2)), np.full((50, 2), 400)], axis=1)[:, None]
    given = boxes, [(1024, 1024)] * 50
    coarse, fine = (pointing(part, *given, 28, "squash") for part in (maps, upsample(maps, 28)))
    assert abs(coarse.hits - fine.hits) <= 3  # where a box's edge passes between two pixels of one patch
    assert 0 < coarse.hits < 50


@pytest.mark.parametrize(
    ("boxes", "sizes", "aspect", "message"),
    [
        ([], [(9, 9)], "squash", "1 maps need as many boxes and sizes"),
        ([[(0, 0, 1, 1)]], [(9, 9, 3)], "squash", r"not 1 and \(1, 3\)"),
        ([[(0, 0, 1, 0)]], [(9, 9)], "squash", "w and h are above 0"),
        ([[(0, 0, 1)]], [(9, 9)], "squash", "rows of x, y, w and h"),
        ([[(0, np.nan, 1, 1)]], [(9, 9)], "squash", "rows of x, y, w and h"),
        ([[(0, 0, 1, 1)]], [(0, 9)], "squash", "0 x 9 pixels"),
        ([[(0, 0, 1, 1)]], [(9, 9)], "stretch", "aspect is 'stretch'"),
    ],
)
def test_what_does_not_fit_is_told(boxes, sizes, aspect, message):
    with pytest.raises(ValueError, match=message):
        pointing(peaks((0, 0)), boxes, sizes, 28, aspect)


HEADING = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
ROW = "00013118_008.png,Atelectasis,225.084745762712,547.019216763771,86.7796610169491,79.1864406779661,,,\n"


def test_nihs_boxes_are_read(tmp_path):
    path = tmp_path / "BBox_List_2017.csv"
    path.write_text(HEADING + ROW + "00014716_007.png,Infiltrate,686.1,131.5,185.49,313.49,,,\n")
    rows = read_boxes(path)
    assert list(rows.columns) == ["id", "finding", "x", "y", "w", "h"]
    assert rows["finding"].tolist() == ["Atelectasis", "Infiltration"]
    assert rows["id"].tolist() == ["00013118_008.png", "00014716_007.png"]
    assert rows.loc[1, ["x", "y", "w", "h"]].tolist() == [686.1, 131.5, 185.49, 313.49]
    assert (rows.dtypes[["x", "y", "w", "h"]] == np.float64).all()


@pytest.mark.parametrize(
    "heading", ["Image Index,Finding Label,Bbox [x,y,w,h]\n", HEADING.replace(",y,w,h", ", y, w, h")]
)
def test_other_editions_of_the_heading_are_read(tmp_path, heading):
    path = tmp_path / "boxes.csv"
    path.write_text(heading + ROW.replace(",,,", "," * (3 if ",,," in heading else 0)))
    assert read_boxes(path).loc[0, "h"] == pytest.approx(79.1864406779661)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as a table"),
        ("a,b\n1,2\n", "begins with the columns a, b"),
        (HEADING + ROW + ROW.replace("Atelectasis", "Gout"), "line 3 has a finding that is none of the fourteen"),
        (HEADING + ROW.replace("00013118_008.png", ""), "line 2 lacks an image or a finding"),
        (HEADING + ROW.replace("86.7796610169491", "0"), "line 2 has no box"),
        (HEADING + ROW.replace("225.084745762712", "left"), "line 2 has no box"),
        (HEADING + ROW.replace("225.084745762712", "-3"), "line 2 has no box"),
        (HEADING + ROW.replace("225.084745762712", "inf"), "line 2 has no box"),
    ],
)
def test_a_damaged_list_of_boxes_is_told(tmp_path, text, message):
    path = tmp_path / "BBox_List_2017.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_boxes(path)


def test_a_list_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match=r"BBox_List_2017\.csv: cannot be read"):
        read_boxes(tmp_path / "BBox_List_2017.csv")
