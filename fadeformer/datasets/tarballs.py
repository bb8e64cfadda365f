"""Tar files, plain or gzipped, as a stream from front to back.

tarfile takes a header that is damaged, or a file that ends at a header, for the end of the archive, and so loses images
without a word; and it reads an extended header of any size into memory. Here a tar ends with its end marker or is an
error, and all that is held is one header or one member.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
GZIP = b"\x1f\x8b"
CHUNK = 2**16  # bytes
FREE = 2**20  # bytes that may come out before a ratio is looked at
LARGEST_HEADER = 2**20  # bytes of an extended header; the longest path that a system knows has 4,096
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
PROBLEMS = {
    tarfile.SYMTYPE: "is a symbolic link",
    tarfile.LNKTYPE: "is a hard link",
    tarfile.CHRTYPE: "is a device",
    tarfile.BLKTYPE: "is a device",
    tarfile.FIFOTYPE: "is a pipe",
    tarfile.GNUTYPE_SPARSE: "is a sparse file",
}


class BombError(Exception):
    """Far more comes out of a gzip file than went in."""


class Entry(NamedTuple):
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
    content: Callable[[], bytes]


def is_header(block: bytes) -> bool:
    """Whether a tar could begin like this."""
    if block == bytes(BLOCK):  # of no files
        return True
    try:
        tarfile.TarInfo.frombuf(block, "latin-1", "strict")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def entries(file: BinaryIO, ratio: int) -> Iterator[Entry]:
    """Each entry in its order.

    Args:
        file: the tar or tar.gz, at its beginning.
        ratio: how many times as many bytes may come out of a tar.gz as went in.

    Raises:
        BombError: more came out.
        EOFError: it is truncated or damaged.
        ValueError: a header is.
        zlib.error: the gzip stream is.
    """
    is_gzip = file.read(len(GZIP)) == GZIP
    file.seek(0)
    stream = _Gunzip(file, ratio) if is_gzip else file
    for_all: dict[str, str] = {}
    for_next: dict[str, str] = {}
    while any(block := _exactly(stream, BLOCK)):  # zeros are the end marker
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except tarfile.HeaderError as error:
            raise EOFError(f"not a header of a file: {error}") from error
        extended = info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        long_name = info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        fields = {} if extended or long_name else for_all | for_next
        size = int(fields.get("size", info.size))
        if size < 0 or ((extended or long_name) and size > LARGEST_HEADER):
            raise EOFError(f"a header of {size} bytes")
        body = _Body(stream, size)
        if extended:
            (for_all if info.type == tarfile.XGLTYPE else for_next).update(_records(body.content()))
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            for_next["path"] = body.content().rstrip(b"\0").decode("utf-8")
        elif not long_name:
            kind = tarfile.GNUTYPE_SPARSE if any(key.startswith("GNU.sparse") for key in fields) else info.type
            known = kind in (*REGULAR, tarfile.DIRTYPE)
            problem = "" if known else PROBLEMS.get(kind, f"is an entry of the unknown kind {kind!r}")
            for_next = {}
            yield Entry(fields.get("path", info.name), size, kind == tarfile.DIRTYPE, problem, body.content)
        body.skip()
        _exactly(stream, -size % BLOCK)
    while rest := stream.read(CHUNK):  # to the end of the gzip stream, whose checksum stands there
        if rest.strip(b"\0"):
            raise EOFError("more data stands behind its end")


def _records(data: bytes) -> dict[str, str]:
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


class _Gunzip:
    """Inflates as a stream and stops as soon as far more came out than went in."""

    def __init__(self, file: BinaryIO, ratio: int) -> None:
        self.file = file
        self.ratio = ratio
        self.inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self.waiting = b""
        self.taken = 0
        self.given = 0

    def read(self, size: int) -> bytes:
        parts = []
        while size and (not self.inflater.eof or self._begin_next_stream()):
            self.waiting = self.waiting or self.file.read(CHUNK)
            part = self.inflater.decompress(self.waiting, size)
            if not part and not self.waiting and not self.inflater.eof:
                raise EOFError("it ends too early")
            rest = self.inflater.unused_data if self.inflater.eof else self.inflater.unconsumed_tail
            self.taken += len(self.waiting) - len(rest)
            self.waiting = rest
            self.given += len(part)
            if self.given > max(FREE, self.ratio * self.taken):
                raise BombError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _begin_next_stream(self) -> bool:
        """Goes on where one stream has ended: parallel gzip writes several. Zeros are the padding of a tape."""
        self.waiting = self.waiting.lstrip(b"\0")
        while not self.waiting:
            block = self.file.read(CHUNK)
            if not block:
                return False
            self.waiting = block.lstrip(b"\0")
        self.inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
        return True


class _Body:
    """The bytes of one entry."""

    def __init__(self, stream: BinaryIO | _Gunzip, size: int) -> None:
        self.stream = stream
        self.left = size

    def content(self) -> bytes:
        data = _exactly(self.stream, self.left)
        self.left = 0
        return data

    def skip(self) -> None:
        if self.left and not isinstance(self.stream, _Gunzip):
            self.stream.seek(self.left - 1, os.SEEK_CUR)
            self.left = 1  # read, since one may seek beyond the end
        while self.left:
            self.left -= len(_exactly(self.stream, min(self.left, CHUNK)))


def _exactly(stream: BinaryIO | _Gunzip, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError("it ends too early")
    return data
