"""Archives in MedMNIST's layout: `{train,val,test}_{images,labels}` and, if the patient is known, `_groups`.

Images are uint8 of shape (images, S, S) or (images, S, S, 3), labels integers of shape (images, L). An array is read
as a stream of rows, so that the largest of MedMNIST's files (16 GB when unpacked) needs no more memory than the
smallest. Nothing is ever unpickled.
"""

from __future__ import annotations

import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
from numpy.lib import format as npy
from numpy.typing import NDArray

from fadeformer.data.dataset_card import SPLITS, DatasetCard, infer_task
from fadeformer.errors import UserError
from fadeformer.io.atomic import check_free_space, checksum

CHUNK_BYTES = 64 * 2**20  # bytes
MAX_CLASSES = 1000
# RuntimeError: of an encrypted member, or one that is compressed in an odd way
READ_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError)


def import_archive(source: Path, classes: list[str] | None, task: str | None, folder: Path) -> DatasetCard:
    """Copies a user's own archive into `folder`.

    Args:
        source: the archive.
        classes: names in the order of the labels, or None.
        task: ordinal-regression where they are grades in an order; None for what the labels say.
        folder: where it goes.

    Raises:
        UserError: the archive is missing, damaged or not in MedMNIST's layout, or `classes` has the wrong length.
    """
    source = source.expanduser()
    if not source.is_file():
        raise UserError(f"{source}: no such file; dataset.root must name your .npz in MedMNIST's layout")
    shapes = {key: array_header(source, key) for split in SPLITS for key in (f"{split}_images", f"{split}_labels")}
    for key, (shape, dtype) in shapes.items():
        if key.endswith("_images") and (dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (3,))):
            raise UserError(f"{source}: {key} is {dtype} {shape}; expected uint8 of shape (N, S, S) or (N, S, S, 3)")
        if 0 in shape[1:]:
            raise UserError(f"{source}: {key} has the shape {shape}, so nothing in it; save it again")
        if key.endswith("_labels") and (dtype.kind not in "iu" or len(shape) not in (1, 2)):
            raise UserError(f"{source}: {key} is {dtype} {shape}; expected integers of shape (N, L)")
        if shape[0] != shapes[key.replace("_images", "_labels")][0][0]:
            raise UserError(
                f"{source}: {key} has {shape[0]} rows but its labels {shapes[key.replace('_images', '_labels')][0][0]}"
            )
    if len({shapes[f"{split}_labels"][0][1:] for split in SPLITS}) > 1:
        raise UserError(f"{source}: the labels of train, val and test have different numbers of columns")
    for split in SPLITS:
        read_groups(source, split, shapes[f"{split}_images"][0][0])
    labels = {split: read_array(source, f"{split}_labels") for split in SPLITS}
    multi_label = labels["train"].ndim == 2 and labels["train"].shape[1] > 1
    number = (
        labels["train"].shape[1] if multi_label else max(int(array.max(initial=1)) for array in labels.values()) + 1
    )
    if number > MAX_CLASSES:
        raise UserError(f"{source}: has the label {number - 1:,}; a label is the number of a class, from 0")
    if multi_label and task is None and all((array.sum(axis=1) == 1).all() for array in labels.values()):
        raise UserError(
            f"{source}: every image has exactly one of {number} labels, as one-hot classes have; save their numbers"
            " (argmax), or set dataset.task: multi-label, binary-class if they are findings"
        )
    if classes is not None and len(classes) != number:
        raise UserError(f"dataset.classes names {len(classes)} classes, but the labels of {source} have {number}")
    for split in SPLITS:
        for _ in iter_row_chunks(source, f"{split}_images"):
            pass  # reads every byte once, so that a damaged archive is found here
    check_free_space(folder, source.stat().st_size, "the copy of the data")
    name = f"{source.stem}.npz"
    shutil.copyfile(source, folder / name)
    image_shape = shapes["train_images"][0]
    return DatasetCard(
        name="own-" + re.sub(r"[^\w.-]+", "-", source.stem),
        file=name,
        sha256=checksum(folder / name, "sha256"),
        task=infer_task(multi_label, number, task, source),
        classes=tuple(classes or (f"class {c}" for c in range(number))),
        size=image_shape[1],
        channels=3 if len(image_shape) == 4 else 1,
        counts=None,
        licence="the user's own",
        note="The user's own archive, not a published file.",
    )


def image_table(facts: DatasetCard, folder: Path) -> pd.DataFrame:
    """One row per image: path, member, id, group, split and labels; raises UserError as `rows` does."""
    archive = folder / facts.file
    # A published set has the same images in the same order at every size; anything else is told by its content.
    prefix = facts.name if facts.counts else f"{facts.name}-{facts.sha256[:8]}"
    columns = facts.task_spec.label_columns(len(facts.classes))
    parts = []
    for split in SPLITS:
        labels = read_array(archive, f"{split}_labels").astype("int64")
        part = pd.DataFrame(labels.reshape(len(labels), len(columns)), columns=columns)
        part.insert(0, "member", [f"{split}_images/{i}" for i in range(len(part))])
        part.insert(1, "split", split)
        part.insert(2, "id", [f"{prefix}/{split}/{i}" for i in range(len(part))])
        part.insert(3, "group", read_groups(archive, split, len(part)))
        parts.append(part)
    rows = pd.concat(parts, ignore_index=True)
    rows.insert(0, "path", facts.file)
    return rows


def array_header(archive: Path, key: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of one array, without reading it; raises UserError as `rows` does."""
    with _open_array(archive, key) as file:
        return _parse_header(archive, key, file)


def read_array(archive: Path, key: str) -> NDArray[np.generic]:
    """One array whole; raises UserError as `rows` does."""
    shape, dtype = array_header(archive, key)
    return np.concatenate([np.empty((0, *shape[1:]), dtype), *iter_row_chunks(archive, key)])


def has_array(archive: Path, key: str) -> bool:
    """Whether the archive holds an array of that name."""
    with zipfile.ZipFile(archive) as file:
        return f"{key}.npy" in file.namelist()


def read_groups(archive: Path, split: str, count: int) -> pd.Series:
    """The group (patient, lesion) of each of `count` images of a split, as text; null where it is not known.

    Raises:
        UserError: they are not one name or whole number for each image.
    """
    key = f"{split}_groups"
    if not has_array(archive, key):
        return pd.Series([None] * count, dtype="string")
    values = read_array(archive, key)
    if values.shape != (count,) or values.dtype.kind not in "iufUS":
        raise UserError(
            f"{archive}: {key} is {values.dtype} {values.shape}; expected one name or number for each of {count} images"
        )
    if values.dtype.kind == "f":  # whole numbers that were stored as fractions, with NaN where there is none
        numbers = values.astype(np.float64)
        known = numbers[~np.isnan(numbers)]
        if (known % 1 != 0).any() or (np.abs(known) > 2**53).any():
            raise UserError(f"{archive}: {key} holds fractions; a group is a name or a whole number")
        return pd.Series(numbers).astype("Int64").astype("string")
    try:
        texts = [value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in values.tolist()]
        names = pd.Series(texts, dtype="string")
    except UnicodeDecodeError as error:
        raise UserError(f"{archive}: {key} holds names that are no UTF-8; save them as text") from error
    return names.mask(names == "")


def iter_row_chunks(archive: Path, key: str) -> Iterator[NDArray[np.generic]]:
    """Streams one array in pieces of some rows, (rows, ...).

    Raises:
        UserError: the archive is truncated or damaged, or has no such array, or it holds Python objects.
    """
    with _open_array(archive, key) as file:
        shape, dtype = _parse_header(archive, key, file)
        row_bytes = prod(shape[1:]) * dtype.itemsize
        at_once = max(1, CHUNK_BYTES // max(1, row_bytes))
        for start in range(0, shape[0], at_once):
            count = min(at_once, shape[0] - start)
            try:
                data = file.read(count * row_bytes)
            except READ_ERRORS as error:
                raise _damaged_error(archive, key, error) from error
            if len(data) != count * row_bytes:
                raise _damaged_error(archive, key, "it ends too early")
            yield np.frombuffer(data, dtype).reshape(count, *shape[1:])


def _open_array(archive: Path, key: str) -> IO[bytes]:
    try:
        return zipfile.ZipFile(archive).open(f"{key}.npy")
    except KeyError as error:
        raise UserError(
            f"{archive}: has no array {key}; MedMNIST's layout needs images and labels of train, val and test"
        ) from error
    except READ_ERRORS as error:
        raise _damaged_error(archive, key, error) from error


def _parse_header(archive: Path, key: str, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = npy.read_magic(file)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
    except READ_ERRORS as error:
        raise _damaged_error(archive, key, error) from error
    if dtype.hasobject or fortran or not shape:
        raise UserError(f"{archive}: {key} must hold numbers or text in C order; save numpy.ascontiguousarray of it")
    return shape, dtype


def _damaged_error(archive: Path, key: str, reason: object) -> UserError:
    return UserError(f"{archive}: truncated or damaged at {key} ({reason}); fetch the file again")
