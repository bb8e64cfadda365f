"""The directory and the members of a zip, with nothing believed that can be checked.

zipfile reads the directory. The members are inflated here, since zipfile cuts one that is longer than its header says
and so hides that the archive lies.
"""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

ENCRYPTED = 0x1 | 0x40 | 0x2000  # zip's flags: encrypted, strongly so, and its directory too
UTF_8 = 0x800  # zip's flag: the name is UTF-8, and else in the code page of MS-DOS
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
END, END_64 = b"PK\x05\x06", b"PK\x06\x06"
LONGEST_END = 2**16 + 22 + 76  # bytes of both end records, with a comment between them and the end of the file
NOT_FILES = {
    stat.S_IFLNK: "is a symbolic link",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
    stat.S_IFIFO: "is a pipe",
    stat.S_IFSOCK: "is a socket",
}


class Entry(NamedTuple):
    """What a zip's directory says of one entry.

    Attributes:
        name: as it stands there.
        size: bytes, inflated.
        is_folder: whether it is a folder, and no file.
        problem: why it must not be read; empty if it may.
        offset: where the member stands.
        method: how it is compressed.
        compressed: bytes, as it stands there.
        checksum: CRC-32 of what it inflates to.
    """

    name: str
    size: int
    is_folder: bool
    problem: str
    offset: int
    method: int
    compressed: int
    checksum: int


def entries(path: Path, ratio: int) -> list[Entry]:
    """Each entry in the order in which they stand in the file.

    Args:
        path: the zip.
        ratio: how many times as large as its compressed bytes a member may be.

    Raises:
        EOFError: its directory has not as many entries as its end record says.
        BadZipFile: it is truncated or damaged; other errors of zipfile's too.
        UnicodeDecodeError: a name is not in the encoding that it claims.
    """
    with zipfile.ZipFile(path) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    if len(infos) != (count := _count(path)):  # zipfile goes by the bytes alone, and may lose entries
        raise EOFError(f"{len(infos):,} of {count:,} entries found")
    return [
        Entry(
            info.orig_filename,  # zipfile cuts `filename` at a NUL
            info.file_size,
            info.orig_filename.endswith("/"),
            _problem(info, ratio),
            info.header_offset,
            info.compress_type,
            info.compress_size,
            info.CRC,
        )
        for info in infos
    ]


def content(file: BinaryIO, entry: Entry) -> bytes:
    """Inflates one member.

    Args:
        file: the zip.
        entry: what its directory says of the member.

    Raises:
        EOFError: it is truncated, damaged or of another size than the directory says.
        zlib.error: the same, found while it is inflated.
    """
    file.seek(entry.offset)
    signature, _, flags, *_, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    raw_name = entry.name.encode("utf-8" if flags & UTF_8 else "cp437", errors="replace")
    if signature != b"PK\x03\x04" or file.read(name_length) != raw_name:
        raise EOFError(f"{entry.name!r} is not where the directory says")
    file.seek(extra_length, os.SEEK_CUR)
    data = file.read(entry.compressed)
    if len(data) != entry.compressed:
        raise EOFError(f"{entry.name!r} ends too early")
    is_whole = True
    if entry.method == zipfile.ZIP_DEFLATED:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        data = inflater.decompress(data, entry.size + 1)
        is_whole = inflater.eof and not inflater.unused_data
    if not is_whole or len(data) != entry.size:
        raise EOFError(f"{entry.name!r} has another size than its header says")
    if zlib.crc32(data) != entry.checksum:
        raise EOFError(f"the checksum of {entry.name!r} is wrong")
    return data


def _count(path: Path) -> int:
    """How many entries the end of a zip says that its directory has."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, LONGEST_END), os.SEEK_END)
        tail = file.read()
    (count,) = struct.unpack_from("<H", tail, tail.rindex(END) + 10)
    if count == 0xFFFF and END_64 in tail:
        (count,) = struct.unpack_from("<Q", tail, tail.rindex(END_64) + 32)
    return int(count)


def _problem(info: zipfile.ZipInfo, ratio: int) -> str:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind in NOT_FILES:
        return NOT_FILES[kind]
    if info.flag_bits & ENCRYPTED:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed by method {info.compress_type}, not by deflate"
    if info.file_size > ratio * info.compress_size:
        return f"would grow more than {ratio:,}:1, as a zip bomb does"
    # Deflate adds a few bytes to what it cannot shrink, never an eighth.
    if info.compress_size > info.file_size + info.file_size // 8 + 1024:
        return "has another size than its header says"
    return ""
