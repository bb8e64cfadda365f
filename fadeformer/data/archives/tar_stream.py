"""Tar files, plain or gzipped, as a stream from front to back.

tarfile takes a header that is damaged, or a file that ends at a header, for the end of the archive, and so loses images
without a word; and it reads an extended header of any size into memory. Here a tar ends with its end marker or is an
error, and all that is held is one header or one member.
"""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO, NamedTuple

BLOCK_BYTES = tarfile.BLOCKSIZE
GZIP_MAGIC = b"\x1f\x8b"
CHUNK_BYTES = 2**16  # bytes
RATIO_EXEMPT_BYTES = 2**20  # bytes that may come out before a ratio is looked at
MAX_HEADER_BYTES = 2**20  # bytes of an extended header; the longest path that a system knows has 4,096
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
    """Far more comes out of a gzip file than went in."""


class TarEntry(NamedTuple):
    """One entry of a tar.

    Attributes:
        name: as it stands there.
        size: bytes.
        is_folder: whether it is a folder, and no file.
        problem: why it is neither a regular file nor a folder; empty if it is.
        content: gives its bytes; to be called, if at all, before the next entry is asked for.
    """

    name: str
    size: int
    is_folder: bool
    problem: str
    read_content: Callable[[], bytes]


def is_tar_header(block: bytes) -> bool:
    """Whether a tar could begin like this."""
    if block == bytes(BLOCK_BYTES):  # of no files
        return True
    try:
        tarfile.TarInfo.frombuf(block, "latin-1", "strict")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def iter_entries(file: BinaryIO, ratio: int) -> Iterator[TarEntry]:
    """Each entry in its order.

    Args:
        file: the tar or tar.gz, at its beginning.
        ratio: how many times as many bytes may come out of a tar.gz as went in.

    Raises:
        BombError: more came out.
        EOFError: it is truncated or damaged.
        ValueError: a header is.
        OSError: the gzip stream is.
    """
    stream = _TarStream(file, ratio)
    for_all: dict[str, str] = {}
    for_next: dict[str, str] = {}
    while any(block := stream.read_exactly(BLOCK_BYTES)):  # zeros are the end marker
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except tarfile.HeaderError as error:
            raise EOFError(f"not a header of a file: {error}") from error
        extended = info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        long_name = info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        fields = {} if extended or long_name else for_all | for_next
        size = int(fields.get("size", info.size))
        if size < 0 or ((extended or long_name) and size > MAX_HEADER_BYTES):
            raise EOFError(f"a header of {size} bytes")
        content, end = partial(stream.read_exactly, size), stream.position() + size
        if extended:
            (for_all if info.type == tarfile.XGLTYPE else for_next).update(_parse_pax_records(content()))
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            for_next["path"] = content().rstrip(b"\0").decode("utf-8")
        elif not long_name:
            kind = tarfile.GNUTYPE_SPARSE if any(key.startswith("GNU.sparse") for key in fields) else info.type
            known = kind in (*REGULAR_TYPES, tarfile.DIRTYPE)
            problem = "" if known else UNSUPPORTED_TYPES.get(kind, f"is an entry of the unknown kind {kind!r}")
            for_next = {}
            yield TarEntry(fields.get("path", info.name), size, kind == tarfile.DIRTYPE, problem, content)
        stream.skip_to(end + -size % BLOCK_BYTES)
    while rest := stream.read(CHUNK_BYTES):  # to the end of the gzip stream, whose checksum stands there
        if rest.strip(b"\0"):
            raise EOFError("more data stands behind its end")


def _parse_pax_records(data: bytes) -> dict[str, str]:
    """The fields of an extended header, each "length key=value" and a newline."""
    fields = {}
    while data:
        length, _, _ = data.partition(b" ")
        record, data = data[: int(length)], data[int(length) :]
        key, equals, value = record[len(length) + 1 : -1].partition(b"=")
        if not equals or record[-1:] != b"\n" or int(length) != len(record):
            raise EOFError("not an extended header")
        fields[key.decode("utf-8")] = value.decode("utf-8")
    return fields


class _TarStream:
    """The bytes of a tar, or of a tar.gz as it is inflated; stops when far more came out than went in."""

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
            raise EOFError("it ends too early") from error
        if self.position() > max(RATIO_EXEMPT_BYTES, self.ratio * self.file.tell()):
            raise DecompressionBombError
        return data

    def read_exactly(self, size: int) -> bytes:
        data = self.read(size)
        if len(data) != size:
            raise EOFError("it ends too early")
        return data

    def skip_to(self, place: int) -> None:
        while (left := place - self.position()) > 0:
            self.read_exactly(min(left, CHUNK_BYTES))
