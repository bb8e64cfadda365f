"""A user's own images: a folder or an archive, with or without splits, with or without a table.

Three layouts are read: `train|val|test/CLASS/file`, `CLASS/file` (the split is made later), and files in any order with
a `labels.csv`: `path`, `label` or one column of 0 and 1 for each finding, and if known `group` (patient, lesion),
`split`, and whatever else describes a subgroup (age, sex, centre).

What goes into the project is one zip of the images and one table. A DICOM file never does, for it names its patient:
its frames go in as PNG, and of the patient only a salted hash as the group, and sex and age.
"""

from __future__ import annotations

import io
import re
import secrets
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
from PIL import Image
from tqdm import tqdm

from fadeformer import dicom
from fadeformer.datasets import archives
from fadeformer.datasets.facts import Facts, digest, task_of
from fadeformer.datasets.packed import IMAGES, LABELS
from fadeformer.datasets.splits import TRAIN_VAL
from fadeformer.errors import UnreadableError, UserError
from fadeformer.files import check_room, checksum, whole_file

DICOM = {".dcm", ".dicom"}  # and any other file that has DICOM's mark
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".gif", ".webp", *DICOM}
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
SALT_BYTES = 32


def fetch(root: Path, classes: list[str] | None, task: str | None, salt: Path, folder: Path) -> Facts:
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
    if not root.exists():
        raise UserError(f"{root}: no such file or folder; dataset.root must name your images")
    found = archives.listing(root)
    check_room(folder, sum(member.size for member in found), "the copy of the images")
    names = [member.name for member in found]
    top = _common(names)
    tables = [name for name in names if name.removeprefix(top) == LABELS]
    left_out = [
        name for name in names if PurePosixPath(name).suffix.lower() not in {*SUFFIXES, ""} and name not in tables
    ]
    rows, no_images = _pack(root, top, {*left_out, *tables}, salt, folder / IMAGES)
    left_out += no_images
    if rows.empty:
        raise UserError(f"{root}: holds no image ({', '.join(sorted(SUFFIXES))})")
    if tables:
        described, classes, multi_label = _by_table(root, _table(root, tables[0]), rows, classes)
    else:
        described, classes = _by_folders(root, rows, classes)
        multi_label = False
    with whole_file(folder / LABELS) as path:
        described.to_csv(path, index=False)
    files = {name: checksum(folder / name, "sha256") for name in (IMAGES, LABELS)}
    return Facts(
        name="own-" + re.sub(r"[^\w.-]+", "-", root.resolve().name.split(".")[0]),
        file=IMAGES,
        sha256=digest(files),
        task=task_of(multi_label, len(classes), task, root),
        classes=tuple(classes),
        size=None,
        channels=None,
        counts=None,
        licence="the user's own",
        note="The user's own images, not a published set."
        + (f" {len(left_out):,} files are no images and are left out, such as {left_out[0]}." if left_out else ""),
        layout="packed",
        files=files,
    )


def _common(names: list[str]) -> str:
    """The folders that all files lie in, with a slash at the end; a folder that names a split is none of them."""
    top = ""
    while True:
        heads = {name.removeprefix(top).partition("/")[0] for name in names}
        inside = all("/" in name.removeprefix(top) for name in names)
        if len(heads) != 1 or not inside or (head := heads.pop()).lower() in SPLIT_NAMES:
            return top
        top += f"{head}/"


def _pack(root: Path, top: str, without: set[str], salt: Path, path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Writes the images into one zip, the same bytes for the same images.

    Returns:
        A row for each, and the names of files that nothing says are images: no suffix, and not DICOM's mark.
    """
    rows: list[dict[str, Any]] = []
    no_images: list[str] = []
    problems = []
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as packed:
        for name, data in tqdm(
            archives.members(root, lambda n: n not in without), desc=root.name, unit="file", disable=None
        ):
            short = name.removeprefix(top)
            suffix = PurePosixPath(name).suffix.lower()
            if data[128:132] != b"DICM" and not suffix:
                no_images.append(name)
                continue
            if data[128:132] != b"DICM" and suffix not in DICOM:
                packed.writestr(zipfile.ZipInfo(short), data)
                rows.append({"member": short, "origin": short})
                continue
            try:
                for member, png, known in _frames(data, short, _salt(salt)):
                    packed.writestr(zipfile.ZipInfo(member), png)
                    rows.append({"member": member, "origin": short, **known})
            except UnreadableError as error:
                problems.append(str(error))
    if problems:
        raise UserError("\n".join([f"{root}: {len(problems):,} DICOM files cannot be read", *problems[:20]]))
    return pd.DataFrame(rows), no_images


def _frames(data: bytes, name: str, salt: bytes) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Each frame of a DICOM file as PNG, its name, and what may be known of it."""
    scan = dicom.read(data, name, salt=salt)
    known = {
        "group": scan.group, "sex": scan.sex, "age": scan.age, "modality": scan.modality, "view": scan.view,
        "manufacturer": scan.manufacturer,
    }  # fmt: skip
    for number, pixels in enumerate(scan.frames, start=1):
        held = io.BytesIO()
        Image.fromarray(pixels).save(held, "PNG")
        frame = f"-{number:04}" if len(scan.frames) > 1 else ""
        yield f"{name}{frame}.png", held.getvalue(), known


def _salt(path: Path) -> bytes:
    if not path.exists():
        with whole_file(path) as temporary:
            temporary.write_bytes(secrets.token_bytes(SALT_BYTES))
    return path.read_bytes()


def _in_order(name: str) -> tuple[int, str]:
    """Numbers by their value, whatever their length."""
    return (len(name), name) if name.isdigit() else (0, name)


def _by_folders(root: Path, rows: pd.DataFrame, classes: list[str] | None) -> tuple[pd.DataFrame, list[str]]:
    """Labels, and splits if any, from the folders that the images lie in."""
    parts = rows["origin"].map(lambda name: PurePosixPath(name).parts)
    split = parts.map(lambda p: SPLIT_NAMES.get(p[0].lower()) if len(p) > 2 else None)
    has_splits = split.notna()
    if has_splits.any() and not has_splits.all():
        stray = rows.loc[~has_splits, "origin"].iloc[0]
        raise UserError(f"{root}: {stray} lies in none of the folders train, val and test, though others do")
    label = parts.map(lambda p: p[-2] if len(p) == (3 if has_splits.any() else 2) else None)
    if label.isna().any():
        stray = rows.loc[label.isna(), "origin"].iloc[0]
        raise UserError(
            f"{root}: {stray} lies in no class; put images in CLASS/ or train|val|test/CLASS/, or write a {LABELS} with"
            " the columns path and label"
        )
    names = classes or sorted(label.unique(), key=_in_order)
    strange = sorted(set(label) - set(names))
    if strange:
        raise UserError(f"{root}: there is a folder {strange[0]}, but dataset.classes names {', '.join(names)}")
    numbers = label.map({name: i for i, name in enumerate(names)}).astype("Int64")
    return _row(rows, _splits(split), rows.get("group"), {"label": numbers}, rows), names


def _by_table(
    root: Path, told: pd.DataFrame, rows: pd.DataFrame, classes: list[str] | None
) -> tuple[pd.DataFrame, list[str], bool]:
    """Labels and all else from labels.csv; several frames of a file share its row."""
    missing = set(told.index) - set(rows["origin"])
    if missing:
        raise UserError(f"{root}: {LABELS} names {len(missing):,} files that are not there, such as {min(missing)}")
    strange = set(rows["origin"]) - set(told.index)
    if strange:
        raise UserError(f"{root}: {len(strange):,} images are not in {LABELS}, such as {min(strange)}")
    of = told.loc[rows["origin"]].reset_index(drop=True)
    multi_label = "label" not in of
    if multi_label:
        findings = classes or []
        absent = [name for name in findings if name not in of]
        if absent or not findings:
            raise UserError(
                f"{root}: {LABELS} has no column {', '.join(absent) or 'label'}; its columns of 0 and 1 are findings if"
                " dataset.classes names them"
            )
        names = findings
        labels = {f"label_{i}": _numbers(of[name], 2) for i, name in enumerate(findings)}
    else:
        names = classes or sorted(of["label"].dropna().unique(), key=_in_order)
        by_name = {name: i for i, name in enumerate(names)}
        labels = {"label": of["label"].map(by_name).astype("Int64").fillna(_numbers(of["label"], len(names)))}
    group = of["group"] if "group" in of else rows.get("group")
    split = of["split"] if "split" in of else pd.Series([None] * len(of), dtype=object)
    wrong = of[split.notna() & ~split.str.lower().isin({*SPLIT_NAMES, TRAIN_VAL})] if split.notna().any() else of[:0]
    if len(wrong):
        raise UserError(
            f"{root}: {LABELS} gives {rows['origin'].iloc[wrong.index[0]]} the split {wrong['split'].iloc[0]!r}"
        )
    named = split.map(lambda s: {**SPLIT_NAMES, TRAIN_VAL: TRAIN_VAL}[s.lower()] if isinstance(s, str) else None)
    extras = of.drop(
        columns=[name for name in ("label", "group", "split", *(names if multi_label else [])) if name in of]
    )
    return _row(rows, _splits(named), group, labels, extras), names, multi_label


def _table(root: Path, name: str) -> pd.DataFrame:
    ((_, data),) = archives.members(root, lambda n: n == name)
    try:
        told = pd.read_csv(io.BytesIO(data), dtype=str, index_col=False, keep_default_na=False, na_values=[""])
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{root}: {name} cannot be read as a table ({error})") from error
    if "path" not in told:
        raise UserError(f"{root}: {name} has the columns {', '.join(told.columns)}; it needs path")
    if told["path"].isna().any():
        raise UserError(f"{root}: {name}, line {int(told['path'].isna().argmax()) + 2}: no path")
    told["path"] = told["path"].map(lambda path: str(PurePosixPath(path)))
    if told["path"].duplicated().any():
        raise UserError(f"{root}: {name} names {told.loc[told['path'].duplicated(), 'path'].iloc[0]} twice")
    return told.set_index("path")


def _numbers(values: pd.Series, count: int) -> pd.Series:
    """Whole numbers below `count`; null for anything else, which the data gate names."""
    numbers = pd.to_numeric(values, errors="coerce")
    return numbers.where(numbers.isin(range(count))).astype("Int64")


def _splits(split: pd.Series) -> pd.Series:
    """Where the user gave train and test alone, val comes out of train; where train alone, it is no split."""
    given = set(split.dropna())
    if given == {"train"}:
        return split.map(lambda _: None)
    return split.replace({"train": TRAIN_VAL}) if given == {"train", "test"} else split


def _row(
    rows: pd.DataFrame, split: pd.Series, group: pd.Series | None, labels: dict[str, pd.Series], extras: pd.DataFrame
) -> pd.DataFrame:
    described = pd.DataFrame({"path": IMAGES, "member": rows["member"], "split": split, "id": rows["member"]})
    described["group"] = None if group is None else group.to_numpy()
    for name, values in labels.items():
        described[name] = values.to_numpy()
    taken = {*described.columns, "origin"}
    for name in extras.columns:
        if name not in taken:
            described[name] = extras[name].to_numpy()
    return described
