"""A long table that is written piece by piece, so that what was made before a kill is not made again.

The pieces lie in a hidden folder beside the table (`.NAME.parts`), each of them whole, with a key: what decides the
table. When all are there the table is made of them, whole, and they are removed.
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
    """Pieces of one table.

    Args:
        table: where it will stand, .csv or .parquet.
        key: of all that decides its content; pieces with another key are removed.

    Attributes:
        stale: whether there were some.
        done: pieces that are there, from the first on.

    Raises:
        UserError: the table's ending is another one, or its folder is not there.
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
        """Keeps the next piece."""
        with atomic_write(self._chunk_path(self.num_chunks)) as temporary:
            rows.to_parquet(temporary, index=False)
        self.num_chunks += 1

    def __iter__(self) -> Iterator[pd.DataFrame]:
        """Each piece in turn."""
        return (pd.read_parquet(self._chunk_path(number)) for number in range(self.num_chunks))

    def finish(self) -> None:
        """Makes the table of the pieces, one in memory at a time, and removes them."""
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
        except (OSError, ValueError):  # killed before it was written
            return None


def check_table_path(table: Path) -> None:
    """Raises UserError for a table whose ending is none of ours, or whose folder is not there."""
    if table.suffix.lower() not in TABLE_SUFFIXES:
        raise UserError(f"{table}: must end in {' or '.join(TABLE_SUFFIXES)}")
    if not table.parent.is_dir():
        raise UserError(f"{table.parent}: no such folder; make it, or write the table elsewhere")
    if table.is_dir():
        raise UserError(f"{table}: is a folder; name a file in it")
