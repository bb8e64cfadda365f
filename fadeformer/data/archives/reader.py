"""Archives of images (zip, tar, tar.gz) and plain folders, read without ever being unpacked.

Nothing is written, so no member can leave its folder; still, an archive that tries to (or that lies about a size, or
holds a link, or blows up when it is inflated) is refused as a whole, by the member's name. The kind is told by the
content, never by the extension. One member is in memory at a time.

Names come in one form: parts joined by "/", without "." and doubled slashes. What an operating system left behind
(`__MACOSX/`, `Thumbs.db`, whatever begins with a dot) is passed over.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fadeformer.data.archives import tar_stream, zip_checks
from fadeformer.errors import UserError

MAX_MEMBER_BYTES = 512 * 2**20  # bytes of one member
MAX_COMPRESSION_RATIO = 1000  # a bomb's; what deflate can do at most is 1,032, what an image needs is below 100
READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    NotImplementedError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)
SYSTEM_FILES = {"__MACOSX", "@eaDir", "thumbs.db", "desktop.ini"}
UNSUPPORTED_FORMATS = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"7z\xbc\xaf": "7-Zip",
    b"Rar!": "RAR",
    b"\x28\xb5\x2f\xfd": "zstd",
}


class ArchiveMember(NamedTuple):
    """A regular file in an archive.

    Attributes:
        name: its path in the archive.
        size: bytes, inflated.
    """

    name: str
    size: int


MemberIterator = Iterator[tuple[ArchiveMember, Callable[[], bytes]]]


def list_members(path: Path) -> list[ArchiveMember]:
    """Every regular file of an archive, in its order; a folder's sorted by name.

    A tar.gz has no directory: all of it is inflated to find the names.

    Args:
        path: the archive or folder.

    Raises:
        UserError: it is damaged, or refused for one of its members.
    """
    return [member for member, _ in _iter_checked(path)]


def iter_members(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, bytes]]:
    """Streams name and content of the wanted files, in the archive's order; a folder's sorted by name.

    A zip is judged before its first member is given out; a tar only as it is read, so that what came out of one that
    ends in an error must not be kept.

    Args:
        path: the archive or folder.
        wanted: says of a name whether to read the file; the `__contains__` of a set will do.

    Raises:
        UserError: it is damaged, or refused for one of its members.
    """
    for member, content in _iter_checked(path):
        if wanted(member.name):
            yield member.name, _read_content(path, member, content)


def read_member(path: Path, name: str) -> bytes:
    """One file of a zip or a folder, in any order and from any thread.

    Args:
        path: the zip or folder.
        name: as `listing` gives it.

    Raises:
        UserError: there is no such file, it is refused or damaged, or the archive is a tar.
    """
    with _translate_errors(path):
        if path.is_dir():
            name = _checked_name(path, name)
            member, content = _folder_member(path, path.resolve(), path.resolve() / name)
        elif _format_reader(path) is _iter_zip:
            archive, files = _zip_directory(path)
            if name not in files:
                raise UserError(f"{path}: has no file {name!r}")
            member, content = (
                ArchiveMember(name, files[name].file_size),
                partial(zip_checks.inflate_member, archive, files[name]),
            )
        else:
            raise UserError(f"{path}: a tar is read from front to back only; unpack it, and name the folder instead")
    return _read_content(path, member, content)


def find_name_collisions(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Names that are one file where case, or how an accent is composed, makes no difference (Windows, macOS)."""
    same = defaultdict(set)
    for name in names:
        same[unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())].add(name)
    return sorted(tuple(sorted(group)) for group in same.values() if len(group) > 1)


def _iter_checked(path: Path) -> MemberIterator:
    """Each file with a function that gives its content, to be called before the next is asked for."""
    seen: set[str] = set()
    with _translate_errors(path):
        for member, content in _format_reader(path)(path):
            if member.name in seen:
                raise _rejection(path, member.name, "stands in it twice")
            seen.add(member.name)
            if not _is_system_file(member.name):
                yield member, content


def _format_reader(path: Path) -> Callable[[Path], MemberIterator]:
    if path.is_dir():
        return _iter_folder
    if path.exists() and not path.is_file():  # a pipe would never end
        raise UserError(f"{path}: is no file and no folder; a zip, a tar, a tar.gz or a folder is read")
    with path.open("rb") as file:
        start = file.read(tar_stream.BLOCK_BYTES)
    if not start:
        raise UserError(f"{path}: is empty; fetch the file again")
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _iter_zip
    if start.startswith(tar_stream.GZIP_MAGIC) or tar_stream.is_tar_header(start):
        return _iter_tar
    kind = next(
        (f"is a {kind} file" for magic, kind in UNSUPPORTED_FORMATS.items() if start.startswith(magic)), "is no archive"
    )
    raise UserError(f"{path}: {kind}; a zip, a tar, a tar.gz or a folder is read")


def _iter_folder(path: Path) -> MemberIterator:
    root = path.resolve()

    def stop(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that it may not read

    for folder, folders, files in os.walk(root, onerror=stop):
        folders.sort()
        for name in folders:
            if (Path(folder) / name).is_symlink():
                raise _rejection(path, str(Path(folder, name).relative_to(root)), "is a link to a folder")
        for name in sorted(files):
            yield _folder_member(path, root, Path(folder) / name)


def _folder_member(path: Path, root: Path, file: Path) -> tuple[ArchiveMember, Callable[[], bytes]]:
    name = _checked_name(path, file.relative_to(root).as_posix())
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        problem = "is a link that leads nowhere" if file.is_symlink() else "is not there"
        raise _rejection(path, name, problem) from error
    if not target.is_relative_to(root):
        raise _rejection(path, name, "is a symbolic link that leaves the folder")
    status = target.stat()
    if not stat.S_ISREG(status.st_mode):
        raise _rejection(path, name, zip_checks.NON_REGULAR_TYPES.get(stat.S_IFMT(status.st_mode), "is a folder"))

    def content() -> bytes:
        with target.open("rb") as opened:
            data = opened.read(status.st_size + 1)
        if len(data) != status.st_size:
            raise _rejection(path, name, "changed while it was read")
        return data

    return ArchiveMember(name, status.st_size), content


def _iter_zip(path: Path) -> MemberIterator:
    archive, files = _zip_directory(path)
    for name, info in files.items():
        yield ArchiveMember(name, info.file_size), partial(zip_checks.inflate_member, archive, info)


def _zip_directory(path: Path) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    status = path.stat()
    return _cached_zip_directory(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4)  # random access would read the directory anew for every image
def _cached_zip_directory(path: Path, size: int, changed: int) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """An opened zip and its files in its order, with every claim checked that needs no inflating."""
    archive = zip_checks.open_zip(path)
    files: dict[str, zipfile.ZipInfo] = {}
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        raw = info.orig_filename  # zipfile cuts `filename` at a NUL
        name = _checked_name(path, raw, is_folder=raw.endswith("/"))
        if problem := zip_checks.member_problem(info, MAX_COMPRESSION_RATIO):
            raise _rejection(path, name, problem)
        if raw.endswith("/"):
            continue
        if name in files:
            raise _rejection(path, name, "stands in it twice")
        files[name] = info
    total = sum(info.file_size for info in files.values())
    if total > MAX_COMPRESSION_RATIO * size:  # members that share their bytes: each is harmless alone
        raise UserError(f"{path}: {size:,} bytes would grow to {total:,}, as a zip bomb does; it is refused")
    return archive, files


def _iter_tar(path: Path) -> MemberIterator:
    with path.open("rb") as file:
        for entry in tar_stream.iter_entries(file, MAX_COMPRESSION_RATIO):
            name = _checked_name(path, entry.name, is_folder=entry.is_folder)
            if entry.problem:
                raise _rejection(path, name, entry.problem)
            if not entry.is_folder:
                yield ArchiveMember(name, entry.size), entry.read_content


def _checked_name(path: Path, raw: str, *, is_folder: bool = False) -> str:
    """The name in its one form; raises UserError for one that could name a file elsewhere, or none."""
    name = str(PurePosixPath(raw))
    if "\\" in raw:
        raise _rejection(path, raw, "has a backslash in its name")
    if raw.startswith("/") or re.match(r"[A-Za-z]:", raw):
        raise _rejection(path, raw, "has an absolute name")
    if ".." in PurePosixPath(raw).parts:
        raise _rejection(path, raw, "leaves its folder by ..")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in raw):
        raise _rejection(path, raw, "has a name that cannot be decoded, or a control character in it")
    if not is_folder and (name == "." or raw.endswith("/")):
        raise _rejection(path, raw, "has no name of a file")
    return name


def _is_system_file(name: str) -> bool:
    parts = name.split("/")
    return any(part in SYSTEM_FILES or part.startswith(".") for part in parts) or parts[-1].lower() in SYSTEM_FILES


def _read_content(path: Path, member: ArchiveMember, content: Callable[[], bytes]) -> bytes:
    if member.size > MAX_MEMBER_BYTES:
        raise _rejection(path, member.name, f"has {member.size:,} bytes; an image may have {MAX_MEMBER_BYTES:,}")
    with _translate_errors(path):
        return content()


def _rejection(path: Path, name: str, problem: str) -> UserError:
    return UserError(f"{path}: {name!r} {problem}; all of it is refused: take that out, or pack it anew")


@contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    """Says of whatever a damaged file makes zipfile, tarfile and zlib raise which file it is and what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file or folder") from error
    except tar_stream.DecompressionBombError as error:
        raise UserError(
            f"{path}: grows more than {MAX_COMPRESSION_RATIO:,}:1, as a bomb does; it is refused"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: holds a name that cannot be decoded; pack the archive anew with UTF-8 names"
        ) from error
    except PermissionError as error:
        raise UserError(
            f"{error.filename or path}: cannot be read ({error.strerror}); change its permissions"
        ) from error
    except READ_ERRORS as error:
        raise UserError(f"{path}: truncated or damaged ({error}); fetch the file again") from error
