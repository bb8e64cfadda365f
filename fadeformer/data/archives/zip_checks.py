"""Zip checks that zipfile omits: a complete central directory, and type, size and compression ratio of each entry.

`reader` sets the limit of the ratio (zip bombs) and checks the total size.
"""

from __future__ import annotations

import os
import stat
import struct
import zipfile
from pathlib import Path

ENCRYPTED_FLAGS = 0x1 | 0x40 | 0x2000  # zip flags: encryption, strong encryption, encrypted directory
END_RECORD, END_RECORD_64 = b"PK\x05\x06", b"PK\x06\x06"
MAX_END_BYTES = 2**16 + 22 + 76  # both end records and the longest archive comment
NON_REGULAR_TYPES = {
    stat.S_IFLNK: "is a symbolic link",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
    stat.S_IFIFO: "is a pipe",
    stat.S_IFSOCK: "is a socket",
}


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip for reading from any thread.

    Raises:
        EOFError: the directory has fewer or more entries than the end record declares.
        BadZipFile: the zip is truncated or corrupt; zipfile may raise other exceptions as well.
        UnicodeDecodeError: a name does not match its declared encoding.
    """
    archive = zipfile.ZipFile(path)
    num_listed, count = len(archive.infolist()), _entry_count(path)
    if num_listed != count:  # zipfile ignores the declared count and may miss entries
        raise EOFError(f"{num_listed:,} of {count:,} entries found")
    return archive


def inflate_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Decompress one member; raises EOFError or BadZipFile if it is corrupt or does not match the directory."""
    data = archive.read(info)
    if len(data) != info.file_size:
        raise EOFError(f"{info.filename!r} has a different size than its header declares")
    return data


def member_problem(info: zipfile.ZipInfo, ratio: int) -> str:
    """Why a member is rejected; empty if it is accepted.

    Args:
        info: directory entry of the member.
        ratio: maximum compression ratio.
    """
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind in NON_REGULAR_TYPES:
        return NON_REGULAR_TYPES[kind]
    if info.flag_bits & ENCRYPTED_FLAGS:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"uses compression method {info.compress_type}; only deflate is supported"
    if info.file_size > ratio * info.compress_size:
        return f"has a compression ratio above {ratio:,}:1, like a zip bomb"
    # Deflate adds a few bytes to incompressible data, never an eighth.
    if info.compress_size > info.file_size + info.file_size // 8 + 1024:
        return "has a different size than its header declares"
    return ""


def _entry_count(path: Path) -> int:
    """Number of directory entries that the end record of a zip declares."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, MAX_END_BYTES), os.SEEK_END)
        tail = file.read()
    (count,) = struct.unpack_from("<H", tail, tail.rindex(END_RECORD) + 10)
    if count == 0xFFFF and END_RECORD_64 in tail:
        (count,) = struct.unpack_from("<Q", tail, tail.rindex(END_RECORD_64) + 32)
    return int(count)
