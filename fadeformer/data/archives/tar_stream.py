"""Stream tar and tar.gz files sequentially with strict error checks.

tarfile treats a corrupt header, or a file truncated at a header, as the end of the archive and silently loses images;
it also reads an extended header of any size into memory. Here a missing end marker is an error, and at most one header
or one member is in memory.
"""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO, NamedTuple

BLOCK_BYTES = tarfile.BLOCKSIZE
GZIP_MAGIC = b"\x1f\x8b"
CHUNK_BYTES = 2**16
RATIO_EXEMPT_BYTES = 2**20  # decompressed bytes below which the ratio is not checked
MAX_HEADER_BYTES = 2**20  # of an extended header; the longest path on Linux (PATH_MAX) has 4,096
REGULAR_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
UNSUPPORTED_TYPES = {
    tarfile.SYMTYPE: "is a symbolic link",
    tarfile.LNKTYPE: "is a hard link",
    tarfile.CHRTYPE: "is a device",
    tarfile.BLKTYPE: "is a device",
    tarfile.FIFOTYPE: "is a pipe",
    tarfile.GNUTYPE_SPARSE: "is a sparse file",
}


class DecompressionBombError(Exception):
    """The compression ratio of a gzip file exceeds the limit."""


class TarEntry(NamedTuple):
    """Entry of a tar.

    Attributes:
        name: name as stored.
        size: bytes.
        is_folder: whether the entry is a folder.
        problem: why the entry is neither a regular file nor a folder; empty if it is one.
        read_content: reads the content; must be called before the iterator advances.
    """

    name: str
    size: int
    is_folder: bool
    problem: str
    read_content: Callable[[], bytes]


def is_tar_header(block: bytes) -> bool:
    """Whether a block is a valid first block of a tar."""
    if block == bytes(BLOCK_BYTES):  # an empty tar
        return True
    try:
        tarfile.TarInfo.frombuf(block, "latin-1", "strict")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def iter_entries(file: BinaryIO, ratio: int) -> Iterator[TarEntry]:
    """Iterate over the entries in stored order.

    Args:
        file: tar or tar.gz, positioned at its start.
        ratio: maximum compression ratio of a tar.gz.

    Raises:
        DecompressionBombError: the ratio is exceeded.
        EOFError: the tar is truncated or corrupt.
        ValueError: a header is corrupt.
        OSError: the gzip stream is corrupt.
    """
    stream = _TarStream(file, ratio)
    global_fields: dict[str, str] = {}
    next_fields: dict[str, str] = {}
    while any(block := stream.read_exactly(BLOCK_BYTES)):  # a block of zeros is the end marker
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except tarfile.HeaderError as error:
            raise EOFError(f"invalid header: {error}") from error
        is_extended = info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        is_long_name = info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        fields = {} if is_extended or is_long_name else global_fields | next_fields
        size = int(fields.get("size", info.size))
        if size < 0 or ((is_extended or is_long_name) and size > MAX_HEADER_BYTES):
            raise EOFError(f"invalid header size of {size} bytes")
        content, end = partial(stream.read_exactly, size), stream.position() + size
        if is_extended:
            (global_fields if info.type == tarfile.XGLTYPE else next_fields).update(_parse_pax_records(content()))
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            next_fields["path"] = content().rstrip(b"\0").decode("utf-8")
        elif not is_long_name:
            entry_type = tarfile.GNUTYPE_SPARSE if any(key.startswith("GNU.sparse") for key in fields) else info.type
            is_supported = entry_type in (*REGULAR_TYPES, tarfile.DIRTYPE)
            problem = (
                "" if is_supported else UNSUPPORTED_TYPES.get(entry_type, f"has the unknown entry type {entry_type!r}")
            )
            next_fields = {}
            yield TarEntry(fields.get("path", info.name), size, entry_type == tarfile.DIRTYPE, problem, content)
        stream.skip_to(end + -size % BLOCK_BYTES)
    while rest := stream.read(CHUNK_BYTES):  # read to the end of the gzip stream to verify its checksum
        if rest.strip(b"\0"):
            raise EOFError("data after the end marker")


def _parse_pax_records(data: bytes) -> dict[str, str]:
    """Parse a pax extended header, newline-terminated records "length key=value"."""
    fields = {}
    while data:
        length, _, _ = data.partition(b" ")
        record, data = data[: int(length)], data[int(length) :]
        key, equals, value = record[len(length) + 1 : -1].partition(b"=")
        if not equals or record[-1:] != b"\n" or int(length) != len(record):
            raise EOFError("invalid extended header")
        fields[key.decode("utf-8")] = value.decode("utf-8")
    return fields


class _TarStream:
    """Byte stream of a tar or a decompressed tar.gz that enforces a maximum compression ratio."""

    def __init__(self, file: BinaryIO, ratio: int) -> None:
        is_gzip = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        file.seek(0)
        self.file, self.ratio = file, ratio
        self.inflated = gzip.GzipFile(fileobj=file, mode="rb") if is_gzip else file

    def position(self) -> int:
        return self.inflated.tell()

    def read(self, size: int) -> bytes:
        try:
            data = self.inflated.read(size)
        except EOFError as error:
            raise EOFError("unexpected end of file") from error
        if self.position() > max(RATIO_EXEMPT_BYTES, self.ratio * self.file.tell()):
            raise DecompressionBombError
        return data

    def read_exactly(self, size: int) -> bytes:
        data = self.read(size)
        if len(data) != size:
            raise EOFError("unexpected end of file")
        return data

    def skip_to(self, position: int) -> None:
        while (remaining := position - self.position()) > 0:
            self.read_exactly(min(remaining, CHUNK_BYTES))
