"""Atomic writes of files and folders, JSON, checksums and disk space checks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fadeformer.errors import UserError

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota or file size limit exceeded


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path and renames it to `path` on success; deletes it on error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # otherwise a power failure could leave an empty file after the rename
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary folder and replaces `path` with it on success; deletes it on error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `source` to `target`, or copy it if the file system does not support hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def check_free_space(folder: Path, needed: int, purpose: str) -> None:
    """Check free disk space before writing.

    Args:
        folder: any folder on the disk.
        needed: required bytes.
        purpose: what will be written, for the error message.

    Raises:
        UserError: not enough space is free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: not enough disk space for {purpose}: {format_bytes(needed)} are needed, but only"
            f" {format_bytes(free)} are free; free some space, then run again"
        )


def format_bytes(count: int) -> str:
    """Format a number of bytes with an SI prefix, such as `1.50GB`."""
    return f"{tqdm.format_sizeof(count)}B"


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically and deterministically; raises ValueError for NaN."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def checksum(path: Path, algorithm: str) -> str:
    """Hexadecimal digest of a file; `algorithm` is a name known to hashlib."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
