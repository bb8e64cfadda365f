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
import statistics
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pandas as pd
from PIL import Image
from tqdm import tqdm

from fadeformer.data.archives import reader
from fadeformer.data.dataset_card import DatasetCard, combined_digest, infer_task
from fadeformer.data.decode import EIGHT_BITS, PixelRange, max_stored_value
from fadeformer.data.dicom import dicom_image
from fadeformer.data.image_formats import DICOM_SUFFIXES, TEXT_SUFFIXES, has_image_suffix, is_dicom, is_image
from fadeformer.data.sources import labels_csv
from fadeformer.data.sources.labels_csv import SPLIT_NAMES
from fadeformer.data.sources.user_table import IMAGES_FILE, LABELS_FILE
from fadeformer.errors import UnreadableImageError, UserError
from fadeformer.io.atomic import atomic_write, check_free_space, checksum
from fadeformer.tasks import ORDINAL

SALT_BYTES = 32
SIXTEEN_BITS = 65_535
MAX_RANGE_RATIO = 8  # of the brightest image to the median one, 3 bits


def import_images(
    root: Path,
    classes: list[str] | None,
    task: str | None,
    salt: Path,
    folder: Path,
    *,
    pixel_range: Literal["ask", "auto"] | None = "auto",
) -> DatasetCard:
    """Import a user's images into `folder` and return the dataset card.

    Args:
        root: the folder, zip or tar.
        classes: class names in label order, or the finding columns of `labels.csv`; None to infer the classes.
        task: ordinal-regression if the classes are ordered grades; None to infer the task from the labels.
        salt: file with the secret key for hashing patient ids; it is created if it does not exist.
        folder: destination folder.
        pixel_range: "auto" to detect the pixel range of images of more than 8 bits; "ask" to stop if it is not that of
            16 bits; None to leave it to the caller.

    Raises:
        UserError: `root` does not exist or has no images, or its layout is not supported.
    """
    root = root.expanduser()
    if not root.exists():
        raise UserError(f"{root}: no such file or folder; dataset.root must name your images")
    members = reader.list_members(root)
    check_free_space(folder, sum(member.size for member in members), "the copy of the images")
    names = _image_names(root, members)
    prefix, table_name = _find_layout(members, names)
    rows, skipped, maxima = _write_zip(root, prefix, names, salt, folder / IMAGES_FILE)
    skipped = sorted([*skipped, *({member.name for member in members} - names - {table_name})])
    if rows.empty:
        raise UserError(f"{root}: no image found (JPEG, PNG, BMP, TIFF, GIF, WebP or DICOM)")
    if table_name is None:
        labels = labels_csv.labels_from_folders(root, rows, classes, task == ORDINAL)
    else:
        ((name, data),) = reader.iter_members(root, lambda name: name == table_name)
        hash_group = _patient_hasher(salt) if "group" in rows else None
        labels = labels_csv.labels_from_csv(
            root, name.removeprefix(prefix), data, rows, classes, hash_group, task == ORDINAL
        )
    with atomic_write(folder / LABELS_FILE) as path:
        labels.rows.to_csv(path, index=False)
    detected = _detect_pixel_range(root, maxima, asks=pixel_range == "ask") if pixel_range else EIGHT_BITS
    files = {name: checksum(folder / name, "sha256") for name in (IMAGES_FILE, LABELS_FILE)}
    note = f" {len(skipped):,} files are not images and were skipped, such as {skipped[0]}." if skipped else ""
    if maxima:
        note += f" {len(maxima):,} of {len(rows):,} images have more than 8 bits, with values up to {max(maxima):,}."
    if count := int(rows.get("problem", pd.Series(dtype=object)).notna().sum()):
        note += (
            f" DICOM files that cannot be read: {count:,}; `python -m pipelines.stages.download --names` prints the"
            " name behind each hash."
        )
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
        pixel_range=detected,
        files=files,
    )


def iter_dicom_names(root: Path, salt: Path) -> Iterator[tuple[str, str]]:
    """Yield (pseudonym, original path) of each DICOM file; this mapping is for the user only and must stay private.

    Args:
        root: the folder, zip or tar.
        salt: file with the secret key.
    """
    root = root.expanduser()
    members = reader.list_members(root)
    names = _image_names(root, members)
    prefix, _ = _find_layout(members, names)
    for name, data in reader.iter_members(root, names.__contains__):
        if is_dicom(name, data) and not dicom_image.is_non_image(data):
            yield _pseudonym(name.removeprefix(prefix), _load_or_create_salt(salt)), name


def _image_names(root: Path, members: Sequence[reader.ArchiveMember]) -> set[str]:
    """Return the names of all images, DICOM included; files without an image suffix are recognized by content."""
    names, unknown = set(), set()
    for name, size in members:
        suffix = PurePosixPath(name).suffix.lower()
        if has_image_suffix(name) or suffix in DICOM_SUFFIXES:
            names.add(name)
        elif suffix not in TEXT_SUFFIXES and size <= reader.MAX_MEMBER_BYTES:
            unknown.add(name)
    for name, data in reader.iter_members(root, unknown.__contains__) if unknown else ():
        if is_image(name, data) or is_dicom(name, data):
            names.add(name)
    return names


def _find_layout(members: Sequence[reader.ArchiveMember], images: set[str]) -> tuple[str, str | None]:
    """Return the common parent folder of all images, with a trailing slash, and the labels table in it, if any."""
    names = [member.name for member in members]
    tables = [name for name in names if PurePosixPath(name).name.lower() == LABELS_FILE]
    prefix = _common_prefix([*sorted(images), *tables] if images else names)
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
    root: Path, prefix: str, names: set[str], salt: Path, path: Path
) -> tuple[pd.DataFrame, list[str], list[int]]:
    """Write the images into one reproducible zip: the same images give the same bytes.

    Returns:
        A table with one row per image, the names of skipped files (DICOM files without pixels), and the largest value
        of each image of more than 8 bits. A DICOM file that cannot be read is not in the zip; its row has the reason in
        the column `problem`.
    """
    rows: list[dict[str, Any]] = []
    skipped = []
    maxima: list[int] = []
    origins: dict[str, str] = {}
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:

        def add_image(member: str, data: bytes, relative_name: str, metadata: dict[str, Any]) -> None:
            if (previous := origins.setdefault(member, relative_name)) != relative_name or member in archive.NameToInfo:
                raise UserError(f"{root}: {previous} and {relative_name} have the same name {member}; rename one")
            archive.writestr(zipfile.ZipInfo(member), data)
            rows.append({"member": member, "origin": relative_name, **metadata})

        files = reader.iter_members(root, names.__contains__)
        for name, data in tqdm(files, desc=root.name, unit="file", disable=None):
            relative_name = name.removeprefix(prefix)
            if not is_dicom(name, data):
                add_image(relative_name, data, relative_name, {})
                if (value := max_stored_value(data)) > 255:
                    maxima.append(value)
            elif dicom_image.is_non_image(data):
                skipped.append(name)
            else:
                key = _load_or_create_salt(salt)
                try:
                    for member, png, metadata in _dicom_frames(data, relative_name, key):
                        add_image(member, png, relative_name, metadata)
                except UnreadableImageError as error:  # data validation reports it
                    problem = {"group": dicom_image.read_group(data, salt=key), "problem": error.reason}
                    member = f"{_pseudonym(relative_name, key)}.png"
                    rows.append({"member": member, "origin": relative_name, **problem})
    return pd.DataFrame(rows), skipped, maxima


def _detect_pixel_range(root: Path, maxima: Sequence[int], *, asks: bool) -> PixelRange:
    """Return the range of the bits that the images of more than 8 bits use, from their largest values.

    Raises:
        UserError: most of them use a small part of the range of the brightest one, and would become nearly black; or
            `asks` is set, and they use fewer than 16 bits.
    """
    if not maxima:
        return EIGHT_BITS
    high, typical = (2 ** int(value).bit_length() - 1 for value in (max(maxima), statistics.median(maxima)))
    if typical < high / MAX_RANGE_RATIO:
        raise UserError(
            f"{root}: images of more than 8 bits have values up to {max(maxima):,}, but half of them only up to"
            f" {int(statistics.median(maxima)):,}; set dataset.pixel_range to [0, {typical}], which clips higher"
            f" values, or to [0, {high}]"
        )
    if asks and high < SIXTEEN_BITS:
        raise UserError(
            f"{root}: images of more than 8 bits have values up to {max(maxima):,} only, of {SIXTEEN_BITS:,} in 16"
            f" bits; set dataset.pixel_range to auto, which scales 0 to {high:,}, or to [minimum, maximum]"
        )
    return PixelRange(0, high)


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
