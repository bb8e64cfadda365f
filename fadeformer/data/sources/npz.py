"""NumPy archives in MedMNIST's layout: `{train,val,test}_{images,labels}` and optionally `{split}_groups` (patients).

Images are uint8 of shape (images, S, S) or (images, S, S, 3), labels integers of shape (images, L). Arrays are streamed
in chunks of rows, so memory use does not depend on the file size (MedMNIST's largest is 16 GB uncompressed). Pickled
objects are rejected.
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
# zipfile raises RuntimeError for an encrypted member or an unsupported compression method
READ_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError)


def import_archive(source: Path, classes: list[str] | None, task: str | None, folder: Path) -> DatasetCard:
    """Validate a user's archive, copy it into `folder` and return its dataset card.

    Args:
        source: path of the archive.
        classes: class names in the order of the labels, or None.
        task: ordinal-regression if the classes are ordered grades; None to infer the task from the labels.
        folder: destination folder.

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
            raise UserError(f"{source}: {key} has the shape {shape}, so it is empty; save it again")
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
    num_classes = (
        labels["train"].shape[1] if multi_label else max(int(array.max(initial=1)) for array in labels.values()) + 1
    )
    if num_classes > MAX_CLASSES:
        raise UserError(f"{source}: has the label {num_classes - 1:,}; a label is the number of a class, from 0")
    if multi_label and task is None and all((array.sum(axis=1) == 1).all() for array in labels.values()):
        raise UserError(
            f"{source}: every image has exactly one of {num_classes} labels, as one-hot classes have; save their"
            " numbers (argmax), or set dataset.task: multi-label, binary-class if they are findings"
        )
    if classes is not None and len(classes) != num_classes:
        raise UserError(f"dataset.classes names {len(classes)} classes, but the labels of {source} have {num_classes}")
    for split in SPLITS:
        for _ in iter_row_chunks(source, f"{split}_images"):
            pass  # read every byte once to detect a damaged archive here
    check_free_space(folder, source.stat().st_size, "the copy of the data")
    name = f"{source.stem}.npz"
    shutil.copyfile(source, folder / name)
    image_shape = shapes["train_images"][0]
    return DatasetCard(
        name="own-" + re.sub(r"[^\w.-]+", "-", source.stem),
        file=name,
        sha256=checksum(folder / name, "sha256"),
        task=infer_task(multi_label, num_classes, task, source),
        classes=tuple(classes or (f"class {c}" for c in range(num_classes))),
        size=image_shape[1],
        channels=3 if len(image_shape) == 4 else 1,
        counts=None,
        license="the user's own",
        note="The user's own archive, not a published file.",
    )


def image_table(card: DatasetCard, folder: Path) -> pd.DataFrame:
    """Return one row per image: path, member, id, group, split and labels; raises UserError like `iter_row_chunks`."""
    archive = folder / card.file
    # a published data set has the same images in the same order at every size; ids of other archives contain a digest
    prefix = card.name if card.counts else f"{card.name}-{card.sha256[:8]}"
    columns = card.task_spec.label_columns(len(card.classes))
    tables = []
    for split in SPLITS:
        labels = read_array(archive, f"{split}_labels").astype("int64")
        split_rows = pd.DataFrame(labels.reshape(len(labels), len(columns)), columns=columns)
        split_rows.insert(0, "member", [f"{split}_images/{i}" for i in range(len(split_rows))])
        split_rows.insert(1, "split", split)
        split_rows.insert(2, "id", [f"{prefix}/{split}/{i}" for i in range(len(split_rows))])
        split_rows.insert(3, "group", read_groups(archive, split, len(split_rows)))
        tables.append(split_rows)
    rows = pd.concat(tables, ignore_index=True)
    rows.insert(0, "path", card.file)
    return rows


def array_header(archive: Path, key: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of an array without reading its data; raises UserError like `iter_row_chunks`."""
    with _open_array(archive, key) as file:
        return _parse_header(archive, key, file)


def read_array(archive: Path, key: str) -> NDArray[np.generic]:
    """Read an array into memory; raises UserError like `iter_row_chunks`."""
    shape, dtype = array_header(archive, key)
    return np.concatenate([np.empty((0, *shape[1:]), dtype), *iter_row_chunks(archive, key)])


def has_array(archive: Path, key: str) -> bool:
    """Return True if the archive has an array of that name."""
    with zipfile.ZipFile(archive) as file:
        return f"{key}.npy" in file.namelist()


def read_groups(archive: Path, split: str, count: int) -> pd.Series:
    """Return the group (patient, lesion) of each of `count` images of a split as text; null where unknown.

    Raises:
        UserError: the groups are not one name or integer per image.
    """
    key = f"{split}_groups"
    if not has_array(archive, key):
        return pd.Series([None] * count, dtype="string")
    values = read_array(archive, key)
    if values.shape != (count,) or values.dtype.kind not in "iufUS":
        raise UserError(
            f"{archive}: {key} is {values.dtype} {values.shape}; expected one name or integer for each of {count}"
            " images"
        )
    if values.dtype.kind == "f":  # integers stored as floats, with NaN for unknown
        numbers = values.astype(np.float64)
        finite = numbers[~np.isnan(numbers)]
        if (finite % 1 != 0).any() or (np.abs(finite) > 2**53).any():
            raise UserError(f"{archive}: {key} has non-integer numbers; a group is a name or an integer")
        return pd.Series(numbers).astype("Int64").astype("string")
    try:
        texts = [value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in values.tolist()]
        names = pd.Series(texts, dtype="string")
    except UnicodeDecodeError as error:
        raise UserError(f"{archive}: {key} has names that are not UTF-8; save them as text") from error
    return names.mask(names == "")


def iter_row_chunks(archive: Path, key: str) -> Iterator[NDArray[np.generic]]:
    """Yield an array in chunks of consecutive rows, each of shape (rows, ...).

    Raises:
        UserError: the archive is truncated or damaged, or the array is missing or contains Python objects.
    """
    with _open_array(archive, key) as file:
        shape, dtype = _parse_header(archive, key, file)
        row_bytes = prod(shape[1:]) * dtype.itemsize
        rows_per_chunk = max(1, CHUNK_BYTES // max(1, row_bytes))
        for start in range(0, shape[0], rows_per_chunk):
            count = min(rows_per_chunk, shape[0] - start)
            try:
                data = file.read(count * row_bytes)
            except READ_ERRORS as error:
                raise _damaged_error(archive, key, error) from error
            if len(data) != count * row_bytes:
                raise _damaged_error(archive, key, "unexpected end of data")
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
        raise UserError(
            f"{archive}: {key} must be a numeric or text array in C order; save numpy.ascontiguousarray of it"
        )
    return shape, dtype


def _damaged_error(archive: Path, key: str, reason: object) -> UserError:
    return UserError(f"{archive}: truncated or damaged at {key} ({reason}); fetch the file again")
