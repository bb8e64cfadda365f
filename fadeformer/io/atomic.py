"""Files and folders that appear whole or not at all, and their checksums."""

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

DISK_FULL_ERRNOS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
)  # the disk, the user's share of it, or the largest file allowed


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`, which takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut could leave the name without the bytes
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path`, which takes its place when the block ends well."""
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
    """Makes one file of this project appear under a second name, without a second copy where the disk can do that."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def check_free_space(folder: Path, needed: int, purpose: str) -> None:
    """Makes sure that a disk has room before anything is written.

    Args:
        folder: on that disk.
        needed: bytes.
        purpose: what they are for, for the message.

    Raises:
        UserError: there is too little.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: too little room for {purpose}: it needs {format_bytes(needed)} more, and {format_bytes(free)} are free;"
            " free some space, then run again"
        )


def format_bytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{tqdm.format_sizeof(count)}B"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole, the same bytes for the same value; raises ValueError for a NaN."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads what `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def checksum(path: Path, algorithm: str) -> str:
    """Hexadecimal digest of a file, by a name that hashlib knows."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
