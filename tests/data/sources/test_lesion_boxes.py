"""NIH's list of bounding boxes in its published variants."""

import numpy as np
import pytest

from fadeformer.data.sources.lesion_boxes import read_nih_boxes
from fadeformer.errors import UserError

HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
ROW = "00013118_008.png,Atelectasis,225.084745762712,547.019216763771,86.7796610169491,79.1864406779661,,,\n"


def test_read_nih_boxes(tmp_path):
    path = tmp_path / "BBox_List_2017.csv"
    path.write_text(HEADER + ROW + "00014716_007.png,Infiltrate,686.1,131.5,185.49,313.49,,,\n")
    rows = read_nih_boxes(path)
    assert list(rows.columns) == ["id", "finding", "x", "y", "w", "h"]
    assert rows["finding"].tolist() == ["Atelectasis", "Infiltration"]
    assert rows["id"].tolist() == ["00013118_008.png", "00014716_007.png"]
    assert rows.loc[1, ["x", "y", "w", "h"]].tolist() == [686.1, 131.5, 185.49, 313.49]
    assert (rows.dtypes[["x", "y", "w", "h"]] == np.float64).all()


@pytest.mark.parametrize(
    "header", ["Image Index,Finding Label,Bbox [x,y,w,h]\n", HEADER.replace(",y,w,h", ", y, w, h")]
)
def test_header_variants_are_read(tmp_path, header):
    path = tmp_path / "boxes.csv"
    path.write_text(header + ROW.replace(",,,", "," * (3 if ",,," in header else 0)))
    assert read_nih_boxes(path).loc[0, "h"] == pytest.approx(79.1864406779661)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as a table"),
        ("a,b\n1,2\n", "the first columns are a, b"),
        (HEADER + ROW + ROW.replace("Atelectasis", "Gout"), "line 3 has an unknown finding"),
        (HEADER + ROW.replace("00013118_008.png", ""), "line 2 has no image or no finding"),
        (HEADER + ROW.replace("86.7796610169491", "0"), "line 2 has no valid box"),
        (HEADER + ROW.replace("225.084745762712", "left"), "line 2 has no valid box"),
        (HEADER + ROW.replace("225.084745762712", "-3"), "line 2 has no valid box"),
        (HEADER + ROW.replace("225.084745762712", "inf"), "line 2 has no valid box"),
    ],
)
def test_damaged_box_list_raises_error(tmp_path, text, message):
    path = tmp_path / "BBox_List_2017.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_nih_boxes(path)


def test_missing_box_list_raises_error(tmp_path):
    with pytest.raises(UserError, match=r"BBox_List_2017\.csv: cannot be read"):
        read_nih_boxes(tmp_path / "BBox_List_2017.csv")
