"""Append-only JSON Lines files that tolerate a killed writer or a full disk."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fadeformer.errors import UserError


def read_records(path: Path, remedy: str, *, truncate_partial: bool = False) -> list[dict[str, Any]]:
    """Read all records, skipping an incomplete last line; an absent file has no records.

    Args:
        path: JSON Lines file.
        remedy: what to do if the file is damaged, for the error message.
        truncate_partial: remove the incomplete last line from the file; only for a writer with exclusive access.

    Raises:
        UserError: a complete line is not valid JSON.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        if truncate_partial:
            os.truncate(path, sum(map(len, lines[:-1])))
        del lines[-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record atomically (a partial write is truncated); raises OSError if the disk is full."""
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file)
        except BaseException:
            file.truncate(size)
            raise
