"""What a user wants predictions of: files, folders, zips and patterns, as a list of images in one order.

Read are the pictures of `fadeformer.data.decode` and DICOM files, which are told by their mark where the name does not
tell. Of a folder or a zip what is neither is left out, as are DICOM files that are no images; a file that was named is
an image, and if it cannot be read, that is told.
"""

from __future__ import annotations

import glob
import secrets
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from fadeformer.data.archives import reader, tar_stream
from fadeformer.data.decode import decode_image
from fadeformer.data.dicom import dicom_image
from fadeformer.data.sources.folder import DICOM_SUFFIXES, IMAGE_SUFFIXES, is_dicom
from fadeformer.errors import UnreadableImageError, UserError

HEADER_BYTES = 4096  # bytes of a file, in which DICOM says what it holds
ZIP_SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06")
SALT = secrets.token_bytes(32)  # the reader of DICOM hashes patients with it; nothing of them is kept here


@dataclass(frozen=True, slots=True)
class InputImage:
    """One image.

    Attributes:
        name: in the table.
        path: the file, or the zip that it lies in.
        member: its name in the zip; empty if it lies in none.
        size: bytes of the file, or of the member.
        changed: when the file was, ns since 1970.
    """

    name: str
    path: Path
    member: str
    size: int
    mtime_ns: int

    def read(self) -> Image.Image:
        """The image, of Pillow's mode L or RGB; of DICOM as windowed by the file.

        Raises:
            UnreadableError: it cannot be read, or holds several frames.
        """
        data = self._bytes()
        if not is_dicom(self.member or self.path.name, data):
            return decode_image(data, self.name)
        frames = dicom_image.read_dicom(data, self.name, salt=SALT).frames
        if len(frames) > 1:
            raise UnreadableImageError(
                self.name, f"holds {len(frames)} frames, where one is expected; export the one wanted"
            )
        return Image.fromarray(frames[0])

    def _bytes(self) -> bytes:
        if self.size > reader.MAX_MEMBER_BYTES:
            raise UnreadableImageError(
                self.name, f"has {self.size:,} bytes; an image may have {reader.MAX_MEMBER_BYTES:,}"
            )
        try:
            return reader.read_member(self.path, self.member) if self.member else self.path.read_bytes()
        except OSError as error:
            raise UnreadableImageError(self.name, f"cannot be read ({error.strerror}); mend the file") from error
        except UserError as error:
            raise UnreadableImageError(self.name, str(error).removeprefix(f"{self.path}: ")) from error


def list_inputs(named: Iterable[str]) -> tuple[list[InputImage], int]:
    """Lists the images.

    A single folder or zip gives names as they stand in it. Of several arguments each gives names that begin with
    itself, as it was written; a pattern stands for the paths that match it.

    Args:
        named: paths and patterns (`*`, `?`, `[...]`, `**`).

    Returns:
        The images sorted by name, each once, and how many other files were left out.

    Raises:
        UserError: there is no such path, a pattern matches nothing, there is no image, or an archive is refused.
    """
    given = [path for argument in named for path in _expand(argument)]
    images: dict[str, InputImage] = {}
    left_out = 0
    for path in given:
        for image in _list_path(path, is_single=len(given) == 1):
            if image is None:
                left_out += 1
            else:
                images.setdefault(image.name, image)
    if not images:
        raise UserError(f"{', '.join(map(str, given))}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [images[name] for name in sorted(images)], left_out


def _expand(argument: str) -> list[Path]:
    if Path(argument).exists():
        return [Path(argument)]
    if not glob.has_magic(argument):
        raise UserError(f"{argument}: no such file or folder")
    found = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207  Path's own takes no absolute pattern
    if not found:
        raise UserError(f"{argument}: no file matches this pattern")
    return [Path(path) for path in found]


def _list_path(path: Path, *, is_single: bool) -> Iterator[InputImage | None]:
    """The images of one argument, and None for each file that is left out."""
    prefix = "" if is_single else f"{path.as_posix()}/"
    if path.is_dir():
        for member in reader.list_members(path):
            file = path / member.name
            with file.open("rb") as opened:
                head = b"" if _has_image_suffix(member.name) else opened.read(HEADER_BYTES)
            changed = file.stat().st_mtime_ns
            yield (
                InputImage(prefix + member.name, file, "", member.size, changed)
                if _is_image(member.name, head)
                else None
            )
        return
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would never end
        raise UserError(f"{path}: is no file and no folder")
    with path.open("rb") as opened:
        head = opened.read(HEADER_BYTES)
    if head.startswith(ZIP_SIGNATURES):
        for member in reader.list_members(path):
            name = member.name
            part = b"" if _has_image_suffix(name) else _read_member_header(path, name)
            yield (
                InputImage(prefix + name, path, name, member.size, status.st_mtime_ns)
                if _is_image(name, part)
                else None
            )
    elif head.startswith(tar_stream.GZIP_MAGIC) or (
        len(head) >= tar_stream.BLOCK_BYTES
        and not is_dicom("", head)
        and tar_stream.is_tar_header(head[: tar_stream.BLOCK_BYTES])
    ):
        raise UserError(f"{path}: a tar is read from front to back only; unpack it, and name the folder instead")
    else:
        yield InputImage(path.name if is_single else path.as_posix(), path, "", status.st_size, status.st_mtime_ns)


def _has_image_suffix(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES - DICOM_SUFFIXES


def _is_image(name: str, head: bytes) -> bool:
    return _has_image_suffix(name) or (is_dicom(name, head) and not dicom_image.is_non_image(head))


def _read_member_header(archive: Path, member: str) -> bytes:
    """How a member of a zip begins; nothing, of one that cannot be read: it is an image only if its name says so."""
    try:
        return reader.read_member(archive, member)[:HEADER_BYTES]
    except UserError:
        return b""
