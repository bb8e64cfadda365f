"""Large tables written in chunks, so that an interrupted command can resume.

The chunks are Parquet files in a hidden folder next to the table (`.NAME.parts`), with a key: a fingerprint of the
inputs and settings. When all chunks are there, they are joined into the table atomically and removed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fadeformer.errors import UserError
from fadeformer.io.atomic import atomic_write, read_json, write_json

KEY_FILE = "key.json"
TABLE_SUFFIXES = (".csv", ".parquet")


class ChunkedTable:
    """Chunks of one table; iterating yields them in order as DataFrames.

    Args:
        table: path of the finished table, .csv or .parquet.
        key: fingerprint of everything that determines the table; chunks with another key are deleted.

    Attributes:
        had_stale_chunks: whether chunks with another key were deleted.
        num_chunks: number of consecutive chunks on disk.

    Raises:
        UserError: the table has another suffix, or its folder does not exist.
    """

    def __init__(self, table: Path, key: str) -> None:
        check_table_path(table)
        self.table = table
        self.folder = table.with_name(f".{table.name}.parts")
        self.had_stale_chunks = self.folder.exists() and self._stored_key() != key
        if self.had_stale_chunks:
            shutil.rmtree(self.folder)
        if not self.folder.exists():
            self.folder.mkdir()
            write_json(self.folder / KEY_FILE, key)
        self.num_chunks = 0
        while self._chunk_path(self.num_chunks).exists():
            self.num_chunks += 1

    def add_chunk(self, rows: pd.DataFrame) -> None:
        """Write the next chunk."""
        with atomic_write(self._chunk_path(self.num_chunks)) as temporary:
            rows.to_parquet(temporary, index=False)
        self.num_chunks += 1

    def __iter__(self) -> Iterator[pd.DataFrame]:
        """Yield each chunk in order."""
        return (pd.read_parquet(self._chunk_path(number)) for number in range(self.num_chunks))

    def finish(self) -> None:
        """Join the chunks into the table, one in memory at a time, and delete them."""
        with atomic_write(self.table) as temporary:
            if self.table.suffix.lower() == ".csv":
                for number, rows in enumerate(self):
                    rows.to_csv(temporary, mode="a", header=number == 0, index=False, lineterminator="\n")
            else:
                schema = pq.read_schema(self._chunk_path(0))
                with pq.ParquetWriter(temporary, schema) as writer:
                    for rows in self:
                        writer.write_table(pa.Table.from_pandas(rows, schema, preserve_index=False))
        shutil.rmtree(self.folder)

    def _chunk_path(self, number: int) -> Path:
        return self.folder / f"{number:06}.parquet"

    def _stored_key(self) -> str | None:
        try:
            return str(read_json(self.folder / KEY_FILE))
        except (OSError, ValueError):  # the process was killed before the key was written
            return None


def check_table_path(table: Path) -> None:
    """Raise UserError if the table has an unsupported suffix, is a folder, or its folder does not exist."""
    if table.suffix.lower() not in TABLE_SUFFIXES:
        raise UserError(f"{table}: must end in {' or '.join(TABLE_SUFFIXES)}")
    if not table.parent.is_dir():
        raise UserError(f"{table.parent}: no such folder; create it, or write the table elsewhere")
    if table.is_dir():
        raise UserError(f"{table}: is a folder; give the path of a file")
