"""Read image archives (zip, tar, tar.gz) and plain folders without extracting them.

Nothing is written to disk, so path traversal is impossible. An archive with an unsafe member (a path that leaves the
archive, a link, a wrong size, a decompression bomb) is still rejected, with the name of the member. The format is
detected by the content, not by the file extension. One member is in memory at a time.

A link in a folder may point into the folder, or to an object of a content-addressed store, which replaces tracked files
by links: DVC's cache (`cache.type: symlink`) and git-annex. A shared folder thus cannot include other files of the
reader's machine.

Member names are normalized: parts joined by "/", without "." and repeated slashes. System files (`__MACOSX/`,
`Thumbs.db`, names that start with a dot) are skipped.
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

MAX_MEMBER_BYTES = 512 * 2**20  # bytes; maximum size of one member
MAX_COMPRESSION_RATIO = 1000  # above this it is a decompression bomb; deflate can reach 1,032, images stay below 100
READ_ERRORS = (
    OSError, EOFError, ValueError, OverflowError, NotImplementedError, struct.error, zlib.error, zipfile.BadZipFile
)  # fmt: skip
# DVC: .../files/md5/HH/H*30 (DVC 3) or .../HH/H*30; git-annex: .../.git/annex/objects/XX/YY/KEY/KEY
STORE_OBJECT = re.compile(r".*/[0-9a-f]{2}/[0-9a-f]{30}|.*/annex/objects/\w{2,3}/\w{2,3}/([^/]+)/\1")
SYSTEM_FILES = {"__MACOSX", "@eaDir", "thumbs.db", "desktop.ini"}
UNSUPPORTED_FORMATS = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"7z\xbc\xaf": "7-Zip",
    b"Rar!": "RAR",
    b"\x28\xb5\x2f\xfd": "zstd",
}


class ArchiveMember(NamedTuple):
    """Regular file in an archive.

    Attributes:
        name: normalized path in the archive.
        size: uncompressed size, bytes.
    """

    name: str
    size: int


MemberIterator = Iterator[tuple[ArchiveMember, Callable[[], bytes]]]


def list_members(path: Path) -> list[ArchiveMember]:
    """List the regular files of an archive in stored order, or of a folder sorted by name.

    A tar.gz has no directory and is decompressed completely.

    Args:
        path: archive or folder.

    Raises:
        UserError: the archive is corrupt, or rejected because of one of its members.
    """
    return [member for member, _ in _iter_checked(path)]


def iter_members(path: Path, include: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, bytes]]:
    """Stream name and content of selected files in stored order, or of a folder sorted by name.

    A zip is checked before its first member is yielded, a tar only while it is read: discard the members of a tar that
    ends in an error.

    Args:
        path: archive or folder.
        include: predicate on the name, such as the `__contains__` method of a set.

    Raises:
        UserError: the archive is corrupt, or rejected because of one of its members.
    """
    for member, content in _iter_checked(path):
        if include(member.name):
            yield member.name, _read_content(path, member, content)


def read_member(path: Path, name: str) -> bytes:
    """Read one file of a zip or folder; random access, thread-safe.

    Args:
        path: zip or folder.
        name: name as returned by `list_members`.

    Raises:
        UserError: the file is missing, rejected or corrupt, or the archive is a tar.
    """
    with _translate_errors(path):
        if path.is_dir():
            name = _checked_name(path, name)
            member, content = _folder_member(path, path.resolve(), path.resolve() / name)
        elif _format_reader(path) is _iter_zip:
            archive, files = _zip_directory(path)
            if name not in files:
                raise UserError(f"{path}: has no file {name!r}")
            member = ArchiveMember(name, files[name].file_size)
            content = partial(zip_checks.inflate_member, archive, files[name])
        else:
            raise UserError(f"{path}: a tar has no random access; extract it and give the folder instead")
    return _read_content(path, member, content)


def find_name_collisions(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of names that are the same file on Windows or macOS (case-insensitive, Unicode-normalizing)."""
    groups = defaultdict(set)
    for name in names:
        groups[unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())].add(name)
    return sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)


def _iter_checked(path: Path) -> MemberIterator:
    """Yield each file with a function that reads its content, to be called before the iterator advances."""
    seen: set[str] = set()
    with _translate_errors(path):
        for member, content in _format_reader(path)(path):
            if member.name in seen:
                raise _rejection(path, member.name, "occurs twice")
            seen.add(member.name)
            if not _is_system_file(member.name):
                yield member, content


def _format_reader(path: Path) -> Callable[[Path], MemberIterator]:
    if path.is_dir():
        return _iter_folder
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise UserError(f"{path}: is neither a file nor a folder; supported are zip, tar, tar.gz and folders")
    with path.open("rb") as file:
        start = file.read(tar_stream.BLOCK_BYTES)
    if not start:
        raise UserError(f"{path}: is empty; fetch the file again")
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _iter_zip
    if start.startswith(tar_stream.GZIP_MAGIC) or tar_stream.is_tar_header(start):
        return _iter_tar
    description = next(
        (f"is a {name} file" for magic, name in UNSUPPORTED_FORMATS.items() if start.startswith(magic)),
        "is not an archive",
    )
    raise UserError(f"{path}: {description}; supported are zip, tar, tar.gz and folders")


def _iter_folder(path: Path) -> MemberIterator:
    root = path.resolve()

    def stop(error: OSError) -> None:
        raise error  # os.walk would silently skip an unreadable folder

    for folder, folders, files in os.walk(root, onerror=stop):
        folders.sort()
        for name in folders:
            if (Path(folder) / name).is_symlink():
                raise _rejection(path, str(Path(folder, name).relative_to(root)), "is a symbolic link to a folder")
        for name in sorted(files):
            yield _folder_member(path, root, Path(folder) / name)


def _folder_member(path: Path, root: Path, file: Path) -> tuple[ArchiveMember, Callable[[], bytes]]:
    name = _checked_name(path, file.relative_to(root).as_posix())
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: cyclic links
        problem = "is a broken symbolic link" if file.is_symlink() else "does not exist"
        raise _rejection(path, name, problem) from error
    if not target.is_relative_to(root) and not STORE_OBJECT.fullmatch(target.as_posix()):
        raise _rejection(path, name, "is a symbolic link to a target outside the folder")
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


@lru_cache(maxsize=4)  # random access would otherwise parse the directory for every image
def _cached_zip_directory(path: Path, size: int, changed: int) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """Open a zip and return it with its files in stored order, after all checks that need no decompression."""
    archive = zip_checks.open_zip(path)
    files: dict[str, zipfile.ZipInfo] = {}
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        raw = info.orig_filename  # zipfile truncates `filename` at a NUL
        name = _checked_name(path, raw, is_folder=raw.endswith("/"))
        if problem := zip_checks.member_problem(info, MAX_COMPRESSION_RATIO):
            raise _rejection(path, name, problem)
        if raw.endswith("/"):
            continue
        if name in files:
            raise _rejection(path, name, "occurs twice")
        files[name] = info
    total = sum(info.file_size for info in files.values())
    if total > MAX_COMPRESSION_RATIO * size:  # overlapping members, each of which passes the check alone
        raise UserError(f"{path}: {size:,} bytes would decompress to {total:,}, like a zip bomb")
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
    """Normalize a member name; raises UserError if it is unsafe or names no file."""
    name = str(PurePosixPath(raw))
    if "\\" in raw:
        raise _rejection(path, raw, "has a backslash in its name")
    if raw.startswith("/") or re.match(r"[A-Za-z]:/", raw):
        raise _rejection(path, raw, "has an absolute path")
    if ".." in PurePosixPath(raw).parts:
        raise _rejection(path, raw, "has .. in its path")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in raw):
        raise _rejection(path, raw, "has an undecodable name or a control character in it")
    if not is_folder and (name == "." or raw.endswith("/")):
        raise _rejection(path, raw, "has no file name")
    return name


def _is_system_file(name: str) -> bool:
    parts = name.split("/")
    return any(part in SYSTEM_FILES or part.startswith(".") for part in parts) or parts[-1].lower() in SYSTEM_FILES


def _read_content(path: Path, member: ArchiveMember, content: Callable[[], bytes]) -> bytes:
    if member.size > MAX_MEMBER_BYTES:
        raise _rejection(path, member.name, f"has {member.size:,} bytes, more than the limit of {MAX_MEMBER_BYTES:,}")
    with _translate_errors(path):
        return content()


def _rejection(path: Path, name: str, problem: str) -> UserError:
    return UserError(f"{path}: {name!r} {problem}; remove it or repack the archive")


@contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    """Convert exceptions of zipfile, tarfile, zlib and the file system to UserError with the path and a hint."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file or folder") from error
    except tar_stream.DecompressionBombError as error:
        raise UserError(
            f"{path}: has a compression ratio above {MAX_COMPRESSION_RATIO:,}:1, like a decompression bomb"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: contains a name that cannot be decoded; repack the archive with UTF-8 names"
        ) from error
    except PermissionError as error:
        raise UserError(
            f"{error.filename or path}: cannot be read ({error.strerror}); change its permissions"
        ) from error
    except READ_ERRORS as error:
        raise UserError(f"{path}: truncated or corrupt ({error}); fetch the file again") from error
