"""The sources by name. Each ends in the same: files in a folder, and a card that says what they are."""

from __future__ import annotations

import contextlib
import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fadeformer.data import dataset_card
from fadeformer.data.archives.reader import list_members
from fadeformer.data.dataset_card import SPLITS, DatasetCard
from fadeformer.data.download import download, lockfile
from fadeformer.data.download.download import RemoteFile, RemoteFileNotFoundError
from fadeformer.data.sources import chestxray14, folder, isic2019, medmnist, npz
from fadeformer.data.sources.phantom import generate, patients
from fadeformer.errors import UserError
from fadeformer.io.atomic import check_free_space, checksum, link_or_copy

EDITION_HINT = (
    "{} is published; the file is damaged: fetch it again; or it is a sample or another edition: set dataset.edition:"
    " other"
)
CHECKSUM_HINT = "the file is damaged or another one: fetch it again, or use it as your own with dataset.name: npz"


def fetch_dataset(
    *,
    name: str,
    size: int,
    mirror: str | None,
    edition: str,
    archives: Sequence[int],
    root: str,
    classes: list[str] | None,
    images: int,
    task: str | None,
    seed: int,
    downloads: Path,
    lock: Path,
    salt: Path,
    destination: Path,
) -> DatasetCard:
    """Brings a data set into a folder, with its card.

    Args:
        name: phantom, npz, folder, isic2019, chestxray14, or a MedMNIST flag.
        size: MedMNIST, phantom: side of an image, pixels.
        mirror: folder or URL that holds the files by their published names; None for the published addresses.
        edition: published, or other: a sample or another edition under the published names, which is held against the
            pins alone.
        archives: chestxray14: which of the twelve.
        root: npz, folder: the user's own files.
        classes: npz, folder: names of the classes, if any.
        images: phantom: how many.
        task: phantom: a key of `fadeformer.tasks.TASKS`, None for multi-class; npz, folder: ordinal-regression where
            classes are grades in an order.
        seed: phantom: of the drawing.
        downloads: where verified downloads stay.
        lock: file of pins, of files without a published checksum.
        salt: folder: file of the secret that patients' ids are hashed with.
        destination: an empty folder.

    Raises:
        UserError: the data cannot be had, or are not what they should be.
    """
    if name == "phantom":
        found = _generate_phantom(images, size, task or "multi-class", seed, destination)
    elif name == "npz":
        found = npz.import_archive(Path(root), classes, task, destination)
    elif name == "folder":
        found = folder.import_images(Path(root), classes, task, salt, destination)
    elif name == "isic2019":
        remote = [RemoteFile(f"{isic2019.BASE_URL}/{file}", file) for file in isic2019.FILES]
        files = _fetch_files(remote, edition, mirror, downloads, lock, destination)
        found = isic2019.build_card(files, dataset_card.combined_digest(files), edition == "published")
    elif name == "chestxray14":
        numbers = sorted(set(archives))
        remote = [_chestxray14_archive(number) for number in numbers]
        remote += [RemoteFile(f"{chestxray14.TABLES_URL}/{file}", file) for file in chestxray14.TABLE_FILES]
        boxes = RemoteFile(f"{chestxray14.TABLES_URL}/{chestxray14.BOX_LIST}", chestxray14.BOX_LIST)
        files = _fetch_files(remote, edition, mirror, downloads, lock, destination, optional=[boxes])
        found = chestxray14.build_card(files, dataset_card.combined_digest(files), numbers, edition == "published")
    else:
        archive = medmnist.remote_file(name, size)
        mismatch = f"{name} at {size} pixels is published with {{}}; {CHECKSUM_HINT}"
        files = _fetch_files([archive], "published", mirror, downloads, lock, destination, mismatch_hint=mismatch)
        found = medmnist.build_card(name, size, files[archive.name])
    dataset_card.write_card(found, destination)
    return found


def _chestxray14_archive(number: int) -> RemoteFile:
    link, md5 = chestxray14.ARCHIVES[number]
    return RemoteFile(f"{chestxray14.ARCHIVES_URL}/{link}.gz", chestxray14.archive_name(number), ("md5", md5))


def _fetch_files(
    remote: Sequence[RemoteFile],
    edition: str,
    mirror: str | None,
    downloads: Path,
    lock: Path,
    into: Path,
    optional: Sequence[RemoteFile] = (),
    mismatch_hint: str = EDITION_HINT,
) -> dict[str, str]:
    """Brings files and compares those without a published checksum with their pins; SHA-256 of each by name.

    One of the optional files, which come last, is left out where there is none. `mismatch` is the end of the message
    about a file in the mirror that has another checksum than the published one.
    """
    names = ", ".join(file.name for file in remote)
    remote, needed = [*remote, *optional], {file.name for file in remote}
    if edition != "published":
        remote = [file._replace(checksum=None) for file in remote]
    if mirror is None or mirror.startswith(("http://", "https://")):
        if mirror:
            remote = [file._replace(url=f"{mirror.rstrip('/')}/{file.name}") for file in remote]
        remedy = f"check the network, or set dataset.mirror to a folder that holds {names}"
        had = download.fetch_files([file for file in remote if file.name in needed], downloads, hint=remedy)
        for file in (file for file in remote if file.name not in needed):
            with contextlib.suppress(RemoteFileNotFoundError):
                had |= download.fetch_files([file], downloads, hint=remedy)
        brought = {name: (file.path, file.sha256, file.size) for name, file in had.items()}
    else:
        brought = {}
        for file in remote:
            path = Path(mirror).expanduser() / file.name
            if not path.is_file() and file.name not in needed:
                continue
            if not path.is_file():
                raise UserError(f"{path}: no such file; dataset.mirror must be a folder or URL that holds {names}")
            if file.checksum is not None and (digest := checksum(path, file.checksum[0])) != file.checksum[1]:
                published = mismatch_hint.format(file.checksum[1])
                raise UserError(f"{path}: {file.checksum[0].upper()} is {digest}, but {published}")
            brought[file.name] = (path, checksum(path, "sha256"), path.stat().st_size)
    unpublished = {file.name for file in remote if file.checksum is None}
    found = {
        name: lockfile.Pin(sha256=sha, size=size, rows=_count_rows(path))
        for name, (path, sha, size) in brought.items()
        if name in unpublished
    }
    lockfile.verify_or_pin(lock, found)
    own = {name for name, (path, _, _) in brought.items() if path.parent == downloads}
    check_free_space(
        into, sum(size for name, (_, _, size) in brought.items() if name not in own), "the copy of the data"
    )
    for name, (path, _, _) in brought.items():
        if name in own:
            link_or_copy(path, into / name)
        else:
            shutil.copyfile(path, into / name)  # a link could let what happens here change the user's file
    return {name: sha for name, (_, sha, _) in brought.items()}


def _count_rows(path: Path) -> int | None:
    """Rows of a table without its headings, lines of a list, files of a zip; None of a tar.gz: that takes minutes."""
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


def _generate_phantom(images: int, size: int, task: str, seed: int, into: Path) -> DatasetCard:
    archive = into / "phantom.npz"
    drawn = generate.draw_dataset(images, size, seed, task)
    np.savez(archive, **drawn)  # type: ignore[arg-type]
    slides = {split: np.unique(drawn[f"{split}_groups"]).astype(np.int64) for split in SPLITS}
    subjects = into / patients.SUBJECTS_FILE
    patients.draw_patients(slides, seed).to_csv(subjects, index=False, lineterminator="\n")
    files = {path.name: checksum(path, "sha256") for path in (archive, subjects)}
    return DatasetCard(
        name="phantom",
        file=archive.name,
        sha256=files[archive.name],  # ids are made of it, and tell images and labels
        task=task,
        classes=generate.class_names(task),
        size=size,
        channels=3,
        counts=None,
        licence="MIT, as this project",
        note="Synthetic: every image is drawn by a program, and ages, sexes and sites are made up."
        " Results on it say nothing about patients.",
        layout="phantom",
        files=files,
    )
