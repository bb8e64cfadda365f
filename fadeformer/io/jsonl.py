"""Files that only ever grow, a JSON record a line, of which a kill or a full disk leaves whole lines only."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fadeformer.errors import UserError


def read_records(path: Path, remedy: str, *, truncate_partial: bool = False) -> list[dict[str, Any]]:
    """The records of a file, none where there is no file; the half line of a writer that was killed is left out.

    Args:
        path: the file.
        remedy: what to do where it is damaged.
        truncate_partial: cut off the half line; for who is about to write, and alone.

    Raises:
        UserError: a line is damaged.
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
    """Appends a record, whole or not at all; raises OSError when the disk is full."""
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
