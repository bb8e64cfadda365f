"""Tables of any separator and encoding."""

import pytest

from fadeformer.data.sources.csv_text import parse_rows
from fadeformer.errors import UserError

COLUMNS = ("path", "label")
ROWS = [["path", "label"], ["Übersicht, links.png", "x; y"]]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_separators_and_encodings_are_recognized(separator, encoding, line_end):
    text = line_end.join(separator.join(f'"{cell}"' for cell in row) for row in ROWS)
    assert [cells for _, cells in parse_rows(text.encode(encoding), "x.csv", COLUMNS)] == ROWS


def test_separator_line_of_excel_is_skipped():
    assert parse_rows(b"sep=;\r\nPath;Label\r\n\r\na;b", "x.csv", COLUMNS) == [(2, ["Path", "Label"]), (4, ["a", "b"])]


def test_list_without_header_has_one_column():
    assert parse_rows(b"a/1 left.png\n", "x.txt", COLUMNS) == [(1, ["a/1 left.png"])]


def test_other_encoding_raises_error():
    with pytest.raises(UserError, match=r"^x.csv, line 2 is not text in UTF-8, but perhaps in Windows-1252 .* as CSV"):
        parse_rows("path;label\nü.png;a".encode("windows-1252"), "x.csv", COLUMNS)
