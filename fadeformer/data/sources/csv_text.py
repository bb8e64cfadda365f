"""Rows of a CSV that a user wrote with any program: separator, encoding and line ends are recognized."""

from __future__ import annotations

import codecs
import csv
import io
import re

from fadeformer.errors import UserError

SEPARATORS = (",", ";", "\t")
ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
EXCEL_SEPARATOR = re.compile(r"sep=(.)\s*", re.IGNORECASE)  # first line that Excel writes and hides


def parse_rows(data: bytes, name: str, columns: tuple[str, ...]) -> list[tuple[int, list[str]]]:
    """Parse a table into rows of cells without outer spaces; empty rows are left out.

    The text is UTF-8, or UTF-16 with a byte order mark. The separator is the comma, semicolon or tab that splits the
    first row into cells of which most are in `columns`; a comma if none is.

    Args:
        data: content of the file.
        name: of the file, for messages.
        columns: expected headings in lower case.

    Returns:
        Line number in the file, from 1, and cells of each row.

    Raises:
        UserError: the file is in another encoding, or a quoted cell has no end.
    """
    text = decode_text(data, name)
    first, _, rest = text.partition("\n")
    separator, skipped = _find_separator(first, columns), 0
    if match := EXCEL_SEPARATOR.fullmatch(first):
        separator, text, skipped = match[1], rest, 1
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        rows = [(reader.line_num + skipped, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise UserError(f"{name} cannot be read as a table ({error}); save it as CSV in UTF-8") from error
    return [(line, cells) for line, cells in rows if any(cells)]


def decode_text(data: bytes, name: str) -> str:
    """Decode UTF-8, or UTF-16 with a byte order mark; raises UserError for another encoding."""
    encoding = next((encoding for mark, encoding in ENCODINGS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}, line {line} is not text in UTF-8, but perhaps in Windows-1252 (byte"
            f" 0x{data[error.start]:02x}); save the table as CSV in UTF-8"
        ) from error


def _find_separator(header: str, columns: tuple[str, ...]) -> str:
    def count(separator: str) -> int:
        return sum(cell.strip(' "\r').lower() in columns for cell in header.split(separator))

    return max(SEPARATORS, key=count)  # the first of equal ones
