"""Images that the user leaves out: `split.exclude`, a list of image ids."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fadeformer.data.sources.csv_text import decode_text, parse_rows
from fadeformer.data.sources.labels_csv import normalize_path
from fadeformer.errors import UserError

COLUMNS = ("id", "path")
MAX_NAMES = 5  # in a message


def read_excluded(path: Path, ids: pd.Series) -> pd.Series:
    """Return a mask of the images that a file lists.

    Args:
        path: a table with the column `id` or `path`, such as a part of `offending_rows.csv`, or one id per line.
        ids: ids of all images; those of the user's own files are their paths in the folder or archive.

    Raises:
        UserError: the file cannot be read, or lists an image that does not exist.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); split.exclude must be a list of images") from error
    names = [normalize_path(name) for name in _listed_names(data, str(path))]
    known = ids.map(normalize_path)
    unknown = sorted(set(names) - set(known))
    if unknown:
        more = f" and {len(unknown) - MAX_NAMES:,} more" if len(unknown) > MAX_NAMES else ""
        raise UserError(
            f"{path}: lists images that do not exist: {', '.join(unknown[:MAX_NAMES])}{more}; use ids such as"
            f" {ids.iloc[0]}"
        )
    return known.isin(names)


def write_excluded(path: Path, rows: pd.DataFrame) -> None:
    """Write a list of images with the reason for each; `rows` has the columns `id` and `expectation`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows[["id", "expectation"]].drop_duplicates("id").to_csv(path, index=False)


def _listed_names(data: bytes, name: str) -> list[str]:
    rows = [cells for _, cells in parse_rows(data, name, COLUMNS)]
    header = [cell.lower() for cell in rows[0]] if rows else []
    column = next((header.index(column) for column in COLUMNS if column in header), None)
    if column is None:
        return [line.strip() for line in decode_text(data, name).splitlines() if line.strip()]
    return [cells[column] for cells in rows[1:] if len(cells) > column and cells[column]]
