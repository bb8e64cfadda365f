"""What zipfile does not check of a zip: whether its directory is complete, and what an entry claims to be."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
from pathlib import Path

ENCRYPTED_FLAGS = 0x1 | 0x40 | 0x2000  # zip's flags: encrypted, strongly so, and its directory too
END_RECORD, END_RECORD_64 = b"PK\x05\x06", b"PK\x06\x06"
MAX_END_BYTES = 2**16 + 22 + 76  # bytes of both end records, with a comment between them and the end of the file
NON_REGULAR_TYPES = {
    stat.S_IFLNK: "is a symbolic link",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
    stat.S_IFIFO: "is a pipe",
    stat.S_IFSOCK: "is a socket",
}


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip to read its members from any thread.

    Raises:
        EOFError: its directory has not as many entries as its end record says.
        BadZipFile: it is truncated or damaged; other errors of zipfile's too.
        UnicodeDecodeError: a name is not in the encoding that it claims.
    """
    archive = zipfile.ZipFile(path)
    found, count = len(archive.infolist()), _entry_count(path)
    if found != count:  # zipfile goes by the bytes alone, and may lose entries
        raise EOFError(f"{found:,} of {count:,} entries found")
    return archive


def inflate_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Inflate one member; raises EOFError or BadZipFile if it is damaged, or not what the directory says."""
    data = archive.read(info)
    if len(data) != info.file_size:
        raise EOFError(f"{info.filename!r} has another size than its header says")
    return data


def member_problem(info: zipfile.ZipInfo, ratio: int) -> str:
    """Why a member must not be read; empty if it may.

    Args:
        info: of the zip's directory.
        ratio: how many times as large as its compressed bytes a member may be.
    """
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind in NON_REGULAR_TYPES:
        return NON_REGULAR_TYPES[kind]
    if info.flag_bits & ENCRYPTED_FLAGS:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed by method {info.compress_type}, not by deflate"
    if info.file_size > ratio * info.compress_size:
        return f"would grow more than {ratio:,}:1, as a zip bomb does"
    # Deflate adds a few bytes to what it cannot shrink, never an eighth.
    if info.compress_size > info.file_size + info.file_size // 8 + 1024:
        return "has another size than its header says"
    return ""


def _entry_count(path: Path) -> int:
    """How many entries the end of a zip says that its directory has."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, MAX_END_BYTES), os.SEEK_END)
        tail = file.read()
    (count,) = struct.unpack_from("<H", tail, tail.rindex(END_RECORD) + 10)
    if count == 0xFFFF and END_RECORD_64 in tail:
        (count,) = struct.unpack_from("<Q", tail, tail.rindex(END_RECORD_64) + 32)
    return int(count)
