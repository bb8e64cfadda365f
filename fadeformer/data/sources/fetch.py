"""Fetch a data set by name: its verified files and its dataset card in one folder.

To add a source, add a branch to `fetch_dataset`, its name to `DatasetName` in fadeformer/config/schema.py, and its
reader to `TABLE_READERS` in fadeformer/data/manifest.py.
"""

from __future__ import annotations

import contextlib
import csv
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from fadeformer.data import dataset_card
from fadeformer.data.archives.reader import list_members
from fadeformer.data.dataset_card import SPLITS, DatasetCard
from fadeformer.data.decode import PixelRange
from fadeformer.data.download import download, lockfile
from fadeformer.data.download.download import RemoteFile, RemoteFileNotFoundError
from fadeformer.data.sources import chestxray14, folder, isic2019, medmnist, npz
from fadeformer.data.sources.phantom import generate, patients
from fadeformer.errors import UserError
from fadeformer.io.atomic import check_free_space, checksum, link_or_copy

EDITION_HINT = (
    "the published checksum is {}; if the file is damaged, fetch it again; if it is a sample or another edition, set"
    " dataset.edition: other"
)
CHECKSUM_HINT = "fetch the file again, or use it as your own data with dataset.name: npz"


def fetch_dataset(
    *,
    name: str,
    size: int,
    mirror: str | None,
    edition: str,
    archives: Sequence[int],
    root: str,
    classes: list[str] | None,
    pixel_range: Literal["ask", "auto"] | list[float],
    images: int,
    task: str | None,
    seed: int,
    downloads: Path,
    lock: Path,
    salt: Path,
    destination: Path,
) -> DatasetCard:
    """Fetch a data set into a folder and write its dataset card there.

    Most arguments are the keys of section `dataset` in params.yaml; some apply to certain sources only.

    Args:
        name: phantom, npz, folder, isic2019, chestxray14, or a MedMNIST flag.
        size: image side in pixels (MedMNIST, phantom).
        mirror: folder or URL with the files under their published names; None for the official URLs.
        edition: "published", or "other" for a sample or another edition under the published names, which is verified
            against the lock file only.
        archives: numbers of the image archives to fetch, 1 to 12 (chestxray14).
        root: path of the user's files (npz, folder).
        classes: class names, if any (npz, folder).
        pixel_range: [minimum, maximum] of images of more than 8 bits; "auto" to detect it, or "ask" to stop if they use
            fewer than 16 bits (folder); other sources have 8 bits.
        images: number of images (phantom).
        task: a key of `fadeformer.tasks.TASKS`, None for multi-class (phantom); ordinal-regression if the classes are
            ordered grades (npz, folder).
        seed: random seed (phantom).
        downloads: cache folder of verified downloads.
        lock: lock file with checksums of files whose authors publish none.
        salt: file with the secret key for hashing patient ids (folder).
        destination: an empty folder.

    Raises:
        UserError: a file is missing, cannot be downloaded, is damaged, or has another checksum or layout than expected,
            or a class name is reserved.
    """
    if name == "phantom":
        card = _generate_phantom(images, size, task or "multi-class", seed, destination)
    elif name == "npz":
        card = npz.import_archive(Path(root), classes, task, destination)
    elif name == "folder":
        rule = None if isinstance(pixel_range, list) else pixel_range
        card = folder.import_images(Path(root), classes, task, salt, destination, pixel_range=rule)
    elif name == "isic2019":
        remote = [RemoteFile(f"{isic2019.BASE_URL}/{file}", file) for file in isic2019.FILES]
        files = _fetch_files(remote, edition, mirror, downloads, lock, destination)
        card = isic2019.build_card(files, dataset_card.combined_digest(files), edition == "published")
    elif name == "chestxray14":
        numbers = sorted(set(archives))
        remote = [_chestxray14_archive(number) for number in numbers]
        remote += [RemoteFile(f"{chestxray14.TABLES_URL}/{file}", file) for file in chestxray14.TABLE_FILES]
        box_list = RemoteFile(f"{chestxray14.TABLES_URL}/{chestxray14.BOX_LIST}", chestxray14.BOX_LIST)
        files = _fetch_files(remote, edition, mirror, downloads, lock, destination, optional=[box_list])
        card = chestxray14.build_card(files, dataset_card.combined_digest(files), numbers, edition == "published")
    else:
        remote_archive = medmnist.remote_file(name, size)
        mismatch = f"{name} at {size} pixels is published with {{}}; {CHECKSUM_HINT}"
        files = _fetch_files(
            [remote_archive], "published", mirror, downloads, lock, destination, mismatch_hint=mismatch
        )
        card = medmnist.build_card(name, size, files[remote_archive.name])
    if not isinstance(pixel_range, str):
        card = replace(card, pixel_range=PixelRange(pixel_range[0], pixel_range[1], clips=True))
    dataset_card.check_class_names(card)
    dataset_card.write_card(card, destination)
    return card


def _chestxray14_archive(number: int) -> RemoteFile:
    link, md5 = chestxray14.ARCHIVES[number]
    return RemoteFile(f"{chestxray14.ARCHIVES_URL}/{link}.gz", chestxray14.archive_name(number), ("md5", md5))


def _fetch_files(
    remote_files: Sequence[RemoteFile],
    edition: str,
    mirror: str | None,
    downloads: Path,
    lock: Path,
    destination: Path,
    optional: Sequence[RemoteFile] = (),
    mismatch_hint: str = EDITION_HINT,
) -> dict[str, str]:
    """Download or copy files, verify or pin their checksums, and return the SHA-256 of each by name.

    An optional file that the mirror or server does not have is skipped. `mismatch_hint` ends the error message about a
    file in the mirror whose checksum is not the published one.
    """
    names = ", ".join(file.name for file in remote_files)
    remote_files, required = [*remote_files, *optional], {file.name for file in remote_files}
    if edition != "published":
        remote_files = [file._replace(checksum=None) for file in remote_files]
    if mirror is None or mirror.startswith(("http://", "https://")):
        if mirror:
            remote_files = [file._replace(url=f"{mirror.rstrip('/')}/{file.name}") for file in remote_files]
        hint = f"check the network, or set dataset.mirror to a folder that holds {names}"
        downloaded = download.fetch_files(
            [file for file in remote_files if file.name in required], downloads, hint=hint
        )
        for file in (file for file in remote_files if file.name not in required):
            with contextlib.suppress(RemoteFileNotFoundError):
                downloaded |= download.fetch_files([file], downloads, hint=hint)
        local_files = {name: (file.path, file.sha256, file.size) for name, file in downloaded.items()}
    else:
        local_files = {}
        for file in remote_files:
            path = Path(mirror).expanduser() / file.name
            if not path.is_file() and file.name not in required:
                continue
            if not path.is_file():
                raise UserError(f"{path}: no such file; dataset.mirror must be a folder or URL that holds {names}")
            if file.checksum is not None and (digest := checksum(path, file.checksum[0])) != file.checksum[1]:
                published = mismatch_hint.format(file.checksum[1])
                raise UserError(f"{path}: {file.checksum[0].upper()} is {digest}, but {published}")
            local_files[file.name] = (path, checksum(path, "sha256"), path.stat().st_size)
    unpublished = {file.name for file in remote_files if file.checksum is None}
    pins = {
        name: lockfile.Pin(sha256=sha, size=size, rows=_count_rows(path))
        for name, (path, sha, size) in local_files.items()
        if name in unpublished
    }
    lockfile.verify_or_pin(lock, pins)
    cached = {name for name, (path, _, _) in local_files.items() if path.parent == downloads}
    check_free_space(
        destination,
        sum(size for name, (_, _, size) in local_files.items() if name not in cached),
        "the copy of the data",
    )
    for name, (path, _, _) in local_files.items():
        if name in cached:
            link_or_copy(path, destination / name)
        else:
            shutil.copyfile(path, destination / name)  # with a hard link, changes made here would reach the user's file
    return {name: sha for name, (_, sha, _) in local_files.items()}


def _count_rows(path: Path) -> int | None:
    """Count the rows of a CSV file without its header, lines of a list, or members of a zip; None for a slow tar.gz."""
    if path.suffix == ".zip":
        return len(list_members(path))
    if path.suffix not in (".csv", ".txt"):
        return None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = sum(1 for row in csv.reader(file) if row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); fetch it again") from error
    if not rows:
        raise UserError(f"{path}: cannot be read as a table (it is empty); fetch it again")
    return rows - (path.suffix == ".csv")


def _generate_phantom(images: int, size: int, task: str, seed: int, destination: Path) -> DatasetCard:
    archive = destination / "phantom.npz"
    arrays = generate.draw_dataset(images, size, seed, task)
    np.savez(archive, **arrays)  # type: ignore[arg-type]
    slides = {split: np.unique(arrays[f"{split}_groups"]).astype(np.int64) for split in SPLITS}
    subjects = destination / patients.SUBJECTS_FILE
    patients.draw_patients(slides, seed).to_csv(subjects, index=False, lineterminator="\n")
    files = {path.name: checksum(path, "sha256") for path in (archive, subjects)}
    return DatasetCard(
        name="phantom",
        file=archive.name,
        sha256=files[archive.name],  # of the archive alone: image ids contain it
        task=task,
        classes=generate.class_names(task),
        size=size,
        channels=3,
        counts=None,
        license="MIT, as this project",
        note="Synthetic: every image is drawn by a program, and ages, sexes and sites are made up."
        " Results on it say nothing about patients.",
        layout="phantom",
        files=files,
    )
