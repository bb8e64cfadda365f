"""Import a user's own images from a folder or an archive, with or without splits, with or without a table.

Supported layouts: `train|val|test/CLASS/file`, `CLASS/file` (split later), and files in any folders with a `labels.csv`
(`fadeformer.data.sources.labels_csv`).

The images are copied into one zip, the labels into one table. DICOM files are de-identified, because their headers and
even their paths may name the patient: each frame becomes a PNG named by a keyed hash of the path; of the patient only a
keyed hash (the group), sex and age are kept.
"""

from __future__ import annotations

import hashlib
import io
import re
import secrets
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
from PIL import Image
from tqdm import tqdm

from fadeformer.data.archives import reader
from fadeformer.data.dataset_card import DatasetCard, combined_digest, infer_task
from fadeformer.data.dicom import dicom_image
from fadeformer.data.sources import labels_csv
from fadeformer.data.sources.labels_csv import SPLIT_NAMES
from fadeformer.data.sources.user_table import IMAGES_FILE, LABELS_FILE
from fadeformer.errors import UnreadableImageError, UserError
from fadeformer.io.atomic import atomic_write, check_free_space, checksum

DICOM_SUFFIXES = {".dcm", ".dicom"}  # other files count as DICOM if they have the DICM magic bytes
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".gif", ".webp", *DICOM_SUFFIXES}
SALT_BYTES = 32


def import_images(root: Path, classes: list[str] | None, task: str | None, salt: Path, folder: Path) -> DatasetCard:
    """Import a user's images into `folder` and return the dataset card.

    Args:
        root: the folder, zip or tar.
        classes: class names in label order, or the finding columns of `labels.csv`; None to infer the classes.
        task: ordinal-regression if the classes are ordered grades; None to infer the task from the labels.
        salt: file with the secret key for hashing patient ids; it is created if it does not exist.
        folder: destination folder.

    Raises:
        UserError: `root` does not exist or has no images, its layout is not supported, or a DICOM file cannot be read.
    """
    root = root.expanduser()
    if not root.exists():
        raise UserError(f"{root}: no such file or folder; dataset.root must name your images")
    members = reader.list_members(root)
    check_free_space(folder, sum(member.size for member in members), "the copy of the images")
    prefix, table_name = _find_layout([member.name for member in members])
    rows, skipped = _write_zip(root, prefix, members, table_name, salt, folder / IMAGES_FILE)
    if rows.empty:
        raise UserError(f"{root}: no image found ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if table_name is None:
        labels = labels_csv.labels_from_folders(root, rows, classes)
    else:
        ((name, data),) = reader.iter_members(root, lambda name: name == table_name)
        hash_group = _patient_hasher(salt) if "group" in rows else None
        labels = labels_csv.labels_from_csv(root, name.removeprefix(prefix), data, rows, classes, hash_group)
    with atomic_write(folder / LABELS_FILE) as path:
        labels.rows.to_csv(path, index=False)
    files = {name: checksum(folder / name, "sha256") for name in (IMAGES_FILE, LABELS_FILE)}
    note = f" {len(skipped):,} files are not images and were skipped, such as {skipped[0]}." if skipped else ""
    return DatasetCard(
        name="own-" + re.sub(r"[^\w.-]+", "-", re.sub(r"(?i)\.(zip|tar|tgz|tar\.gz)$", "", root.resolve().name)),
        file=IMAGES_FILE,
        sha256=combined_digest(files),
        task=infer_task(labels.multi_label, len(labels.classes), task, root),
        classes=tuple(labels.classes),
        size=None,
        channels=None,
        counts=None,
        license="the user's own",
        note=f"The user's own images, not a published set.{note}{labels.note}",
        layout="user_table",
        files=files,
    )


def iter_dicom_names(root: Path, salt: Path) -> Iterator[tuple[str, str]]:
    """Yield (pseudonym, original path) of each DICOM file; this mapping is for the user only and must stay private.

    Args:
        root: the folder, zip or tar.
        salt: file with the secret key.
    """
    root = root.expanduser()
    prefix, _ = _find_layout([member.name for member in reader.list_members(root)])
    for name, data in reader.iter_members(root):
        if is_dicom(name, data) and not dicom_image.is_non_image(data):
            yield _pseudonym(name.removeprefix(prefix), _load_or_create_salt(salt)), name


def _find_layout(names: list[str]) -> tuple[str, str | None]:
    """Return the common parent folder of all images, with a trailing slash, and the labels table in it, if any."""
    images = [name for name in names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    tables = [name for name in names if PurePosixPath(name).name.lower() == LABELS_FILE]
    prefix = _common_prefix([*images, *tables] if images else names)
    return prefix, next((name for name in tables if name.removeprefix(prefix).lower() == LABELS_FILE), None)


def _common_prefix(names: list[str]) -> str:
    """Return the common parent folder of all files with a trailing slash; it never includes a split folder."""
    prefix = ""
    while True:
        folders = {name.removeprefix(prefix).partition("/")[0] for name in names}
        inside = all("/" in name.removeprefix(prefix) for name in names)
        if len(folders) != 1 or not inside or (folder := folders.pop()).lower() in SPLIT_NAMES:
            return prefix
        prefix += f"{folder}/"


def _write_zip(
    root: Path, prefix: str, members: Sequence[reader.ArchiveMember], table_name: str | None, salt: Path, path: Path
) -> tuple[pd.DataFrame, list[str]]:
    """Write the images into one reproducible zip: the same images give the same bytes.

    Returns:
        A table with one row per image, and the names of skipped files: those with neither an image suffix nor DICOM
        magic bytes, and DICOM files without an image.
    """
    rows: list[dict[str, Any]] = []
    skipped = []
    errors = []
    origins: dict[str, str] = {}
    too_large = {  # skipped; a file of that size with an image suffix raises an error in the reader
        member.name
        for member in members
        if member.size > reader.MAX_MEMBER_BYTES and PurePosixPath(member.name).suffix.lower() not in IMAGE_SUFFIXES
    }
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:

        def add_image(member: str, data: bytes, relative_name: str, metadata: dict[str, Any]) -> None:
            if (previous := origins.setdefault(member, relative_name)) != relative_name or member in archive.NameToInfo:
                raise UserError(f"{root}: {previous} and {relative_name} have the same name {member}; rename one")
            archive.writestr(zipfile.ZipInfo(member), data)
            rows.append({"member": member, "origin": relative_name, **metadata})

        files = reader.iter_members(root, lambda name: name != table_name and name not in too_large)
        for name, data in tqdm(files, desc=root.name, unit="file", disable=None):
            relative_name = name.removeprefix(prefix)
            if not is_dicom(name, data):
                if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
                    add_image(relative_name, data, relative_name, {})
                else:
                    skipped.append(name)
            elif dicom_image.is_non_image(data):
                skipped.append(name)
            else:
                try:
                    for member, png, metadata in _dicom_frames(data, relative_name, _load_or_create_salt(salt)):
                        add_image(member, png, relative_name, metadata)
                except UnreadableImageError as error:
                    errors.append(str(error))
    if errors:
        raise UserError("\n".join([f"{root}: DICOM files that cannot be read: {len(errors):,}", *errors[:20]]))
    return pd.DataFrame(rows), sorted([*skipped, *too_large])


def is_dicom(name: str, data: bytes) -> bool:
    """Return True if a file is DICOM, judged by its suffix or its magic bytes."""
    return data[128:132] == b"DICM" or PurePosixPath(name).suffix.lower() in DICOM_SUFFIXES


def _dicom_frames(data: bytes, name: str, salt: bytes) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Yield (member name, PNG bytes, metadata) for each frame of a DICOM file."""
    dicom = dicom_image.read_dicom(data, name, salt=salt)
    pseudonym = _pseudonym(name, salt)
    is_multi_frame = len(dicom.frames) > 1
    metadata = {
        # without a patient id, the frames of one file still belong to one patient
        "group": dicom.group or (pseudonym if is_multi_frame else None),
        "sex": dicom.sex, "age": dicom.age, "modality": dicom.modality, "view": dicom.view,
        "manufacturer": dicom.manufacturer,
    }  # fmt: skip
    for number, pixels in enumerate(dicom.frames, start=1):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        yield f"{pseudonym}{f'-{number:04}' if is_multi_frame else ''}.png", buffer.getvalue(), metadata


def _pseudonym(name: str, salt: bytes) -> str:
    return "dicom/" + hashlib.blake2b(name.encode(), key=salt, digest_size=8).hexdigest()


def _patient_hasher(salt: Path) -> Callable[[str], str]:
    return partial(dicom_image.pseudonymize_patient, salt=_load_or_create_salt(salt))


def _load_or_create_salt(path: Path) -> bytes:
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_bytes(secrets.token_bytes(SALT_BYTES))
    return path.read_bytes()
