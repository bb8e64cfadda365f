"""Collect the input images of a prediction from files, folders, zip archives and glob patterns.

Accepts images and DICOM files, recognized by content or suffix (`fadeformer.data.image_formats`). Other files in a
folder or zip are skipped, as are DICOM files without pixels. An image in a format that cannot be decoded and a file
named explicitly are always listed; if a file cannot be read, its row in the output holds the error.
"""

from __future__ import annotations

import glob
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fadeformer.data.archives import reader, tar_stream
from fadeformer.data.decode import decode_image
from fadeformer.data.dicom import dicom_image
from fadeformer.data.image_formats import HEADER_BYTES, has_image_suffix, is_dicom, is_image
from fadeformer.data.sources import labels_csv
from fadeformer.errors import UnreadableImageError, UserError

ZIP_SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06")
SALT = secrets.token_bytes(32)  # the DICOM reader hashes patient ids with it; the hashes are never written


@dataclass(frozen=True, slots=True)
class InputImage:
    """Location of one input image.

    Attributes:
        name: in the prediction table.
        path: image file, or the zip archive that contains it.
        member: name inside the archive; empty for a plain file.
        size: of the file or archive member, bytes.
        mtime_ns: modification time of the file, ns since 1970.
    """

    name: str
    path: Path
    member: str
    size: int
    mtime_ns: int

    def read(self, pixel_range: Sequence[Any] | None = None) -> Image.Image:
        """Decode to a Pillow image of mode L or RGB; DICOM with the window of the file.

        Args:
            pixel_range: of images of more than 8 bits, see `decode_image`.

        Raises:
            UnreadableImageError: the image cannot be read or has several frames.
        """
        data = self._bytes()
        if not is_dicom(self.member or self.path.name, data):
            return decode_image(data, self.name, pixel_range=pixel_range)
        frames = dicom_image.read_dicom(data, self.name, salt=SALT).frames
        if len(frames) > 1:
            raise UnreadableImageError(self.name, f"has {len(frames)} frames, expected 1; export the frame to predict")
        return Image.fromarray(frames[0])

    def read_group(self) -> str | None:
        """Hash the patient of a DICOM file; None for files with an image suffix and if the patient is unknown.

        The key of the hash differs between processes.
        """
        if has_image_suffix(self.member or self.path.name):
            return None
        try:
            data = self._bytes()
        except UnreadableImageError:
            return None
        return dicom_image.read_group(data, salt=SALT) if is_dicom(self.member or self.path.name, data) else None

    def _bytes(self) -> bytes:
        if self.size > reader.MAX_MEMBER_BYTES:
            raise UnreadableImageError(self.name, f"has {self.size:,} bytes; the limit is {reader.MAX_MEMBER_BYTES:,}")
        try:
            return reader.read_member(self.path, self.member) if self.member else self.path.read_bytes()
        except OSError as error:
            raise UnreadableImageError(self.name, f"cannot be read ({error.strerror}); repair the file") from error
        except UserError as error:
            raise UnreadableImageError(self.name, str(error).removeprefix(f"{self.path}: ")) from error


def list_inputs(arguments: Iterable[str]) -> tuple[list[InputImage], int]:
    """List the images of paths and glob patterns.

    For a single folder or zip, names are relative to it. For several paths, each name starts with its path as written.
    A pattern expands to the paths that match it.

    Args:
        arguments: paths and patterns (`*`, `?`, `[...]`, `**`).

    Returns:
        The unique images sorted by name, and the number of skipped files.

    Raises:
        UserError: a path does not exist, a pattern has no match, no image was found, or an archive was rejected.
    """
    paths = [path for argument in arguments for path in _expand(argument)]
    images: dict[str, InputImage] = {}
    num_skipped = 0
    for path in paths:
        for image in _list_path(path, is_single=len(paths) == 1):
            if image is None:
                num_skipped += 1
            else:
                images.setdefault(image.name, image)
    if not images:
        raise UserError(f"{', '.join(map(str, paths))}: no image found (JPEG, PNG, BMP, TIFF, GIF, WebP or DICOM)")
    return [images[name] for name in sorted(images)], num_skipped


def read_groups(images: Sequence[InputImage], table: Path | None) -> list[str | None]:
    """Read the group (patient, lesion or slide) of each image from a table, or from the headers of DICOM files.

    Args:
        images: the images.
        table: CSV file with the columns `path`, the name of the image, and `group` (or `patient`, `lesion`, ... as in
            labels.csv); None to read DICOM headers. An image whose group is empty is its own group.

    Returns:
        The group of each image; without a table, None if it is not a DICOM file with a patient.

    Raises:
        UserError: the table cannot be read, has no groups, or lacks an image.
    """
    if table is None:
        return [image.read_group() for image in images]
    rows = labels_csv.parse_labels_csv(table.parent, table.name, _read_table(table))
    column = labels_csv.find_group_column(rows)
    if column is None:
        raise UserError(f"{table}: has the columns {', '.join(['path', *rows.columns])}; it needs group")
    paths = [labels_csv.normalize_path(image.name) for image in images]
    if missing := [path for path in paths if path not in rows.index]:
        raise UserError(f"{table}: {len(missing):,} images are not in it, such as {missing[0]}")
    return [group or f"\0{path}" for path, group in zip(paths, rows.loc[paths, column], strict=True)]


def _read_table(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _expand(argument: str) -> list[Path]:
    if Path(argument).exists():
        return [Path(argument)]
    if not glob.has_magic(argument):
        raise UserError(f"{argument}: no such file or folder")
    matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
    if not matches:
        raise UserError(f"{argument}: no file matches this pattern")
    return [Path(path) for path in matches]


def _list_path(path: Path, *, is_single: bool) -> Iterator[InputImage | None]:
    """Yield the images of one path, and None for each skipped file."""
    prefix = "" if is_single else f"{path.as_posix()}/"
    if path.is_dir():
        for member in reader.list_members(path):
            file = path / member.name
            with file.open("rb") as stream:
                header = b"" if has_image_suffix(member.name) else stream.read(HEADER_BYTES)
            image = InputImage(prefix + member.name, file, "", member.size, file.stat().st_mtime_ns)
            yield image if _is_image(member.name, header) else None
        return
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe could block forever
        raise UserError(f"{path}: not a regular file or folder")
    with path.open("rb") as stream:
        header = stream.read(HEADER_BYTES)
    if header.startswith(ZIP_SIGNATURES):
        for member in reader.list_members(path):
            name = member.name
            member_header = b"" if has_image_suffix(name) else _read_member_header(path, name)
            image = InputImage(prefix + name, path, name, member.size, status.st_mtime_ns)
            yield image if _is_image(name, member_header) else None
    elif header.startswith(tar_stream.GZIP_MAGIC) or (
        len(header) >= tar_stream.BLOCK_BYTES
        and not is_dicom("", header)
        and tar_stream.is_tar_header(header[: tar_stream.BLOCK_BYTES])
    ):
        raise UserError(f"{path}: tar archives have no random access; unpack it and pass the folder instead")
    else:
        yield InputImage(path.name if is_single else path.as_posix(), path, "", status.st_size, status.st_mtime_ns)


def _is_image(name: str, header: bytes) -> bool:
    return is_image(name, header) or (is_dicom(name, header) and not dicom_image.is_non_image(header))


def _read_member_header(archive: Path, member: str) -> bytes:
    """Read the first bytes of a zip member; empty if it is unreadable, so that only its suffix can make it an image."""
    try:
        return reader.read_member(archive, member)[:HEADER_BYTES]
    except UserError:
        return b""
