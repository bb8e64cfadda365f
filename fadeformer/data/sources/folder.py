"""A user's own images: a folder or an archive, with or without splits, with or without a table.

Three layouts are read: `train|val|test/CLASS/file`, `CLASS/file` (the split is made later), and files in any order with
a `labels.csv` (`fadeformer.data.sources.labels_csv`).

What goes into the project is one zip of the images and one table. A DICOM file never does, for it names its patient,
and so may its path: its frames go in as PNG under a keyed hash of the path, and of the patient only such a hash as the
group, and sex and age.
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

DICOM_SUFFIXES = {".dcm", ".dicom"}  # and any other file that has DICOM's mark
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".gif", ".webp", *DICOM_SUFFIXES}
SALT_BYTES = 32


def import_images(root: Path, classes: list[str] | None, task: str | None, salt: Path, folder: Path) -> DatasetCard:
    """Brings a user's images into `folder`.

    Args:
        root: the folder, zip or tar.
        classes: names in the order of the labels, or of the finding columns of `labels.csv`; None to find them.
        task: ordinal-regression where classes are grades in an order; None for what the labels say.
        salt: file of the secret that patients' ids are hashed with; it is made where there is none.
        folder: where they go.

    Raises:
        UserError: there is nothing there, the layout is none of the three, or a file cannot be taken.
    """
    root = root.expanduser()
    if not root.exists():
        raise UserError(f"{root}: no such file or folder; dataset.root must name your images")
    found = reader.list_members(root)
    check_free_space(folder, sum(member.size for member in found), "the copy of the images")
    top, table = _find_layout([member.name for member in found])
    rows, left_out = _write_zip(root, top, found, table, salt, folder / IMAGES_FILE)
    if rows.empty:
        raise UserError(f"{root}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if table is None:
        described = labels_csv.labels_from_folders(root, rows, classes)
    else:
        ((name, data),) = reader.iter_members(root, lambda name: name == table)
        hashed = _patient_hasher(salt) if "group" in rows else None
        described = labels_csv.labels_from_csv(root, name.removeprefix(top), data, rows, classes, hashed)
    with atomic_write(folder / LABELS_FILE) as path:
        described.rows.to_csv(path, index=False)
    files = {name: checksum(folder / name, "sha256") for name in (IMAGES_FILE, LABELS_FILE)}
    note = f" {len(left_out):,} files are no images and are left out, such as {left_out[0]}." if left_out else ""
    return DatasetCard(
        name="own-" + re.sub(r"[^\w.-]+", "-", re.sub(r"(?i)\.(zip|tar|tgz|tar\.gz)$", "", root.resolve().name)),
        file=IMAGES_FILE,
        sha256=combined_digest(files),
        task=infer_task(described.multi_label, len(described.classes), task, root),
        classes=tuple(described.classes),
        size=None,
        channels=None,
        counts=None,
        license="the user's own",
        note=f"The user's own images, not a published set.{note}{described.note}",
        layout="user_table",
        files=files,
    )


def iter_dicom_names(root: Path, salt: Path) -> Iterator[tuple[str, str]]:
    """The name in the project of each DICOM file, but for frames, and its path: for the user alone.

    Args:
        root: the folder, zip or tar.
        salt: file of the secret.
    """
    root = root.expanduser()
    top, _ = _find_layout([member.name for member in reader.list_members(root)])
    for name, data in reader.iter_members(root):
        if is_dicom(name, data) and not dicom_image.is_non_image(data):
            yield _pseudonym(name.removeprefix(top), _load_or_create_salt(salt)), name


def _find_layout(names: list[str]) -> tuple[str, str | None]:
    """The folders that all images lie in, with a slash at the end, and the table beside them."""
    images = [name for name in names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    tables = [name for name in names if PurePosixPath(name).name.lower() == LABELS_FILE]
    top = _common_prefix([*images, *tables] if images else names)
    return top, next((name for name in tables if name.removeprefix(top).lower() == LABELS_FILE), None)


def _common_prefix(names: list[str]) -> str:
    """The folders that all files lie in, with a slash at the end; a folder that names a split is none of them."""
    top = ""
    while True:
        heads = {name.removeprefix(top).partition("/")[0] for name in names}
        inside = all("/" in name.removeprefix(top) for name in names)
        if len(heads) != 1 or not inside or (head := heads.pop()).lower() in SPLIT_NAMES:
            return top
        top += f"{head}/"


def _write_zip(
    root: Path, top: str, found: Sequence[reader.ArchiveMember], table: str | None, salt: Path, path: Path
) -> tuple[pd.DataFrame, list[str]]:
    """Writes the images into one zip, the same bytes for the same images.

    Returns:
        A row for each, and the names of files that are no images: neither by their names nor by DICOM's mark, or DICOM
        that is none.
    """
    rows: list[dict[str, Any]] = []
    left_out = []
    problems = []
    origins: dict[str, str] = {}
    too_large = {  # for an image; what might be one by its name is refused
        member.name
        for member in found
        if member.size > reader.MAX_MEMBER_BYTES and PurePosixPath(member.name).suffix.lower() not in IMAGE_SUFFIXES
    }
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as packed:

        def put(member: str, data: bytes, short: str, known: dict[str, Any]) -> None:
            if (other := origins.setdefault(member, short)) != short or member in packed.NameToInfo:
                raise UserError(f"{root}: {other} and {short} would both be called {member}; rename one")
            packed.writestr(zipfile.ZipInfo(member), data)
            rows.append({"member": member, "origin": short, **known})

        wanted = reader.iter_members(root, lambda name: name != table and name not in too_large)
        for name, data in tqdm(wanted, desc=root.name, unit="file", disable=None):
            short = name.removeprefix(top)
            if not is_dicom(name, data):
                if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
                    put(short, data, short, {})
                else:
                    left_out.append(name)
            elif dicom_image.is_non_image(data):
                left_out.append(name)
            else:
                try:
                    for member, png, known in _dicom_frames(data, short, _load_or_create_salt(salt)):
                        put(member, png, short, known)
                except UnreadableImageError as error:
                    problems.append(str(error))
    if problems:
        raise UserError("\n".join([f"{root}: DICOM files that cannot be read: {len(problems):,}", *problems[:20]]))
    return pd.DataFrame(rows), sorted([*left_out, *too_large])


def is_dicom(name: str, data: bytes) -> bool:
    """Whether a file is DICOM, by its name or its first bytes."""
    return data[128:132] == b"DICM" or PurePosixPath(name).suffix.lower() in DICOM_SUFFIXES


def _dicom_frames(data: bytes, name: str, salt: bytes) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Each frame of a DICOM file as PNG, its name, and what may be known of it."""
    scan = dicom_image.read_dicom(data, name, salt=salt)
    hidden = _pseudonym(name, salt)
    many = len(scan.frames) > 1
    known = {
        # frames of a file that names nobody show one patient all the same
        "group": scan.group or (hidden if many else None), "sex": scan.sex, "age": scan.age, "modality": scan.modality,
        "view": scan.view, "manufacturer": scan.manufacturer,
    }  # fmt: skip
    for number, pixels in enumerate(scan.frames, start=1):
        held = io.BytesIO()
        Image.fromarray(pixels).save(held, "PNG")
        yield f"{hidden}{f'-{number:04}' if many else ''}.png", held.getvalue(), known


def _pseudonym(name: str, salt: bytes) -> str:
    return "dicom/" + hashlib.blake2b(name.encode(), key=salt, digest_size=8).hexdigest()


def _patient_hasher(salt: Path) -> Callable[[str], str]:
    return partial(dicom_image.pseudonymize_patient, salt=_load_or_create_salt(salt))


def _load_or_create_salt(path: Path) -> bytes:
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_bytes(secrets.token_bytes(SALT_BYTES))
    return path.read_bytes()
