"""NIH's list of boxes, in the editions in which it goes about."""

import numpy as np
import pytest

from fadeformer.data.sources.lesion_boxes import read_nih_boxes
from fadeformer.errors import UserError

HEADING = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
ROW = "00013118_008.png,Atelectasis,225.084745762712,547.019216763771,86.7796610169491,79.1864406779661,,,\n"


def test_nihs_boxes_are_read(tmp_path):
    path = tmp_path / "BBox_List_2017.csv"
    path.write_text(HEADING + ROW + "00014716_007.png,Infiltrate,686.1,131.5,185.49,313.49,,,\n")
    rows = read_nih_boxes(path)
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
    assert read_nih_boxes(path).loc[0, "h"] == pytest.approx(79.1864406779661)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as a table"),
        ("a,b\n1,2\n", "the first columns are a, b"),
        (HEADING + ROW + ROW.replace("Atelectasis", "Gout"), "line 3 has an unknown finding"),
        (HEADING + ROW.replace("00013118_008.png", ""), "line 2 has no image or no finding"),
        (HEADING + ROW.replace("86.7796610169491", "0"), "line 2 has no valid box"),
        (HEADING + ROW.replace("225.084745762712", "left"), "line 2 has no valid box"),
        (HEADING + ROW.replace("225.084745762712", "-3"), "line 2 has no valid box"),
        (HEADING + ROW.replace("225.084745762712", "inf"), "line 2 has no valid box"),
    ],
)
def test_a_damaged_list_of_boxes_is_told(tmp_path, text, message):
    path = tmp_path / "BBox_List_2017.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_nih_boxes(path)


def test_a_list_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match=r"BBox_List_2017\.csv: cannot be read"):
        read_nih_boxes(tmp_path / "BBox_List_2017.csv")
