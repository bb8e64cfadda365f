"""Labels, splits and metadata of a user's own images, from folder names or from a labels.csv.

The CSV has the column `path`, and `label` or one 0/1 column per finding; optionally `group` (patient, lesion), `split`,
and any columns that define subgroups (age, sex, center).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pandas as pd

from fadeformer.data.sources.csv_text import parse_rows
from fadeformer.data.sources.user_table import IMAGES_FILE, LABELS_FILE, RESERVED_COLUMNS, UNPARSED_LABEL
from fadeformer.data.splits import TRAIN_VAL
from fadeformer.errors import UserError

SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
COLUMNS = ("path", "label", "group", "split")
GROUP_COLUMNS = (
    "patientid",
    "patient",
    "subjectid",
    "subject",
    "lesionid",
    "lesion",
)  # used if there is no column `group`
MISSING_VALUES = ("", "na", "n/a", "nan", "null", "none")
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
IDENTIFYING_COLUMN = re.compile(
    "(patients?|subjects?|first|last|full)?(name|id)|patients?|(patients?)?(birth.*|dateofbirth|dob|address|phone.*)|surname|mrn|ssn"
    "|accession.*|medicalrecord.*|otherpatientids?"
)


class LabelTable(NamedTuple):
    """Labels of all images.

    Attributes:
        rows: one row per image, with the columns of `fadeformer.data.sources.user_table`.
        classes: name of each class or finding.
        multi_label: True if there is one 0/1 column per finding.
        note: further text for the dataset card, empty or starting with a space.
    """

    rows: pd.DataFrame
    classes: list[str]
    multi_label: bool
    note: str


def labels_from_folders(root: Path, rows: pd.DataFrame, classes: list[str] | None, ordered: bool = False) -> LabelTable:
    """Derive labels, and splits if there are split folders, from the folder names.

    Args:
        root: the user's folder or archive, for messages.
        rows: `origin` (path of the image file), `member` (its name in the zip) and any metadata from the file.
        classes: class names in label order; None for the folder names.
        ordered: whether the classes are grades: names that are not numbers then have to be in `classes`.

    Raises:
        UserError: an image is not in a class folder, there are fewer than two classes, or their order is not known.
    """
    split = _splits_from_folders(root, rows)
    depth = 2 if split.isna().all() else 3
    parts = rows["origin"].map(lambda name: PurePosixPath(name).parts)
    label = parts.map(lambda p: p[-2] if len(p) == depth else None)
    if label.isna().any():
        misplaced = rows.loc[label.isna(), "origin"].iloc[0]
        raise UserError(
            f"{root}: {misplaced} is not in a class folder; put images in CLASS/ or train|val|test/CLASS/, or write a"
            f" {LABELS_FILE} with the columns path and label"
        )
    names = classes or _infer_classes(root, label, ordered)
    unknown = sorted(set(label) - set(names))
    if unknown:
        raise UserError(f"{root}: the folder {unknown[0]} is none of dataset.classes: {', '.join(names)}")
    indices = label.map({name: i for i, name in enumerate(names)}).astype("Int64")
    no_group = pd.Series([None] * len(rows), dtype=object)
    table = _build_rows(rows, _complete_splits(split), rows.get("group", no_group), {"label": indices}, rows)
    return LabelTable(table, names, False, "")


def labels_from_csv(
    root: Path,
    name: str,
    data: bytes,
    rows: pd.DataFrame,
    classes: list[str] | None,
    hash_group: Callable[[str], str] | None,
    ordered: bool = False,
) -> LabelTable:
    """Read labels, groups, splits and metadata from labels.csv; all frames of a file share its row.

    Args:
        root: the user's folder or archive, for messages.
        name: path of the table in it.
        data: content of the table.
        rows: as for `labels_from_folders`.
        classes: class names in label order, or the finding columns; None to use the labels themselves.
        hash_group: pseudonymizes a group, since it may identify a patient; None to keep groups unchanged.
        ordered: as for `labels_from_folders`.

    Raises:
        UserError: the table cannot be parsed, its paths are not those of the images, or the order of grades is not
            known.
    """
    table = parse_labels_csv(root, name, data)
    origin = rows["origin"].map(normalize_path)
    missing = set(table.index) - set(origin)
    if missing:
        raise UserError(f"{root}: {name} lists {len(missing):,} files that do not exist, such as {min(missing)}")
    unlisted = set(origin) - set(table.index)
    if unlisted:
        raise UserError(f"{root}: {len(unlisted):,} images are not in {name}, such as {min(unlisted)}")
    metadata = table.loc[origin].reset_index(drop=True)
    multi_label = "label" not in metadata
    names, labels = (
        _encode_findings(root, name, metadata, classes)
        if multi_label
        else _encode_classes(root, metadata["label"], classes, ordered)
    )
    normalized = _normalize_columns(metadata)
    group_column = find_group_column(metadata)
    group = (
        pd.Series([None] * len(metadata), dtype=object)
        if group_column is None
        else _integers_as_text(metadata[group_column])
    )
    if hash_group is not None:
        group = group.map(hash_group, na_action="ignore")
    group = group.fillna(rows["group"]) if "group" in rows else group
    identifying = [
        column
        for key, column in normalized
        if IDENTIFYING_COLUMN.fullmatch(key) and column not in (*names, group_column)
    ]
    used = {"label", "group", "split", group_column, *(names if multi_label else []), *identifying}
    extras = metadata.drop(columns=[column for column in metadata.columns if column in used]).rename(
        columns=_avoid_reserved_name
    )
    for column in rows.columns.difference(["origin", "member", "group"]):
        extras[column] = extras[column].fillna(rows[column]) if column in extras else rows[column]
    is_unparsed = pd.DataFrame(labels).isna().any(axis=1)
    if is_unparsed.any():  # data validation reports the original text
        extras[UNPARSED_LABEL] = _format_labels(metadata[names if multi_label else ["label"]]).where(is_unparsed, None)
    note = "" if group_column in ("group", None) else f" The group is the column {group_column}."
    if identifying:
        note += f" Columns removed because they may identify a patient: {', '.join(identifying)}."
    split = _splits_from_column(root, name, metadata, rows)
    return LabelTable(_build_rows(rows, split, group, labels, extras), names, multi_label, note)


def find_group_column(table: pd.DataFrame) -> str | None:
    """Return the column with the patient or lesion of each image: `group`, or one named such as `Patient ID`."""
    normalized = _normalize_columns(table)
    candidates = (column for known_key in ("group", *GROUP_COLUMNS) for key, column in normalized if key == known_key)
    return next(candidates, None)


def _normalize_columns(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Return each column's name in lower case without spaces and punctuation, and as it is."""
    return [(re.sub(r"[\W_]", "", column).lower(), column) for column in table.columns]


def _format_labels(labels: pd.DataFrame) -> pd.Series:
    """Format the original text of the label columns for messages."""
    records = labels.to_dict("records")
    return pd.Series(
        [", ".join(f"{key} {value or 'none'}" for key, value in row.items()) for row in records], dtype=object
    )


def parse_labels_csv(root: Path, name: str, data: bytes) -> pd.DataFrame:
    """Parse labels.csv into a table of strings indexed by path; missing values are None.

    Raises:
        UserError: the file cannot be parsed or has no column path, or a path is missing or duplicated.
    """
    lines = parse_rows(data, f"{root}: {name}", COLUMNS)
    if not lines:
        raise UserError(f"{root}: {name} is empty; write a line with path and label, and one for each image")
    header = [cell.lower() if cell.lower() in COLUMNS else cell for cell in lines[0][1]]
    if "path" not in header:
        raise UserError(f"{root}: {name} has the columns {', '.join(header)}; it needs path")
    duplicate = next((cell for i, cell in enumerate(header) if cell and cell in header[:i]), None)
    if duplicate:
        raise UserError(f"{root}: {name} has two columns {duplicate}")
    for number, row in lines[1:]:
        if any(row[len(header) :]):
            raise UserError(
                f"{root}: {name}, line {number} has {len(row)} fields, but there are {len(header)} columns; put text"
                " with a separator in quotes"
            )
    cells = [(row + [""] * len(header))[: len(header)] for _, row in lines[1:]]
    table = pd.DataFrame(cells, columns=header, dtype=object)
    table = table.drop(columns="", errors="ignore")  # unnamed column of row numbers, as R writes it
    for column in table:
        missing = ("",) if column in ("path", "label") else MISSING_VALUES  # NA or null may be the name of a class
        values = [None if cell.lower() in missing else cell for cell in table[column]]
        table[column] = pd.Series(values, dtype=object)
    for (number, _), path in zip(lines[1:], table["path"], strict=True):
        if path is None:
            raise UserError(f"{root}: {name}, line {number}: the path is missing")
    table["path"] = table["path"].map(lambda path: normalize_path(path.replace("\\", "/")))
    if table["path"].duplicated().any():
        raise UserError(f"{root}: {name} lists {table.loc[table['path'].duplicated(), 'path'].iloc[0]} twice")
    return table.set_index("path")


def normalize_path(path: str) -> str:
    """Normalize a path, including its Unicode form: composed and decomposed accents become equal."""
    return unicodedata.normalize("NFC", str(PurePosixPath(path)))


def _infer_classes(root: Path, labels: pd.Series, ordered: bool) -> list[str]:
    """Return the sorted class names; numeric names are sorted by value.

    Raises:
        UserError: there are fewer than two classes, two of them are hardly different, or their order is not known.
    """
    names = sorted(labels.dropna().unique())
    numbers = [name for name in names if NUMBER.fullmatch(name)]
    others = [name for name in names if name not in numbers]
    names = sorted(numbers, key=float) + others
    if ordered and others:
        raise UserError(
            f"{root}: the order of the grades {', '.join(names)} is not known; list them from the lowest to the highest"
            " in dataset.classes"
        )
    if numbers and others and all(name.lower() in MISSING_VALUES for name in others):
        raise UserError(
            f"{root}: the label {others[0]} may be a class or a missing label, as the other labels are numbers; leave"
            " the cell empty, or list all classes in dataset.classes"
        )
    canonical: dict[str, str] = {}
    for name in names:
        key = str(float(name)) if name in numbers else " ".join(name.split()).casefold()
        previous = canonical.setdefault(key, name)
        if previous != name:
            raise UserError(
                f"{root}: the classes {previous} and {name} differ only in case, spaces or leading zeros; use one name,"
                " or names that differ more"
            )
    if len(names) < 2:
        reason = f"all images have the label {names[0]}" if names else "no image has a label"
        raise UserError(f"{root}: {reason}; there must be at least two classes")
    return names


def _encode_classes(
    root: Path, label: pd.Series, classes: list[str] | None, ordered: bool
) -> tuple[list[str], dict[str, pd.Series]]:
    """Return the class names and each image's class index; null for an unknown label."""
    label = _integers_as_text(label)
    names = classes or _infer_classes(root, label, ordered)
    by_name = label.map({name: i for i, name in enumerate(names)}).astype("Int64")
    if any(name.isdigit() for name in names):
        return names, {"label": by_name}
    return names, {"label": by_name.fillna(_parse_integers(label, len(names)))}


def _integers_as_text(values: pd.Series) -> pd.Series:
    """Return the values unchanged, or without the decimal point if all are integers: 1.0 becomes 1."""
    if not values.dropna().str.fullmatch(r"-?(0|[1-9]\d*)(\.0+)?").all():  # 007 and 1e5 are names
        return values
    return values.str.replace(r"\.0+$", "", regex=True).astype(object).where(values.notna(), None)


def _encode_findings(
    root: Path, name: str, metadata: pd.DataFrame, classes: list[str] | None
) -> tuple[list[str], dict[str, pd.Series]]:
    """Return the finding names and a 0/1 column for each."""
    names = classes or []
    missing = [finding for finding in names if finding not in metadata]
    if missing or not names:
        raise UserError(
            f"{root}: {name} has no column {', '.join(missing) or 'label'}; to use 0/1 columns as findings, list"
            " them in dataset.classes"
        )
    return names, {f"label_{i}": _parse_integers(metadata[finding], 2) for i, finding in enumerate(names)}


def _parse_integers(values: pd.Series, count: int) -> pd.Series:
    """Parse integers from 0 to `count` - 1; anything else becomes null, which data validation reports."""
    numbers = pd.to_numeric(values, errors="coerce")
    return numbers.where(numbers.isin(range(count))).astype("Int64")


def _splits_from_folders(root: Path, rows: pd.DataFrame) -> pd.Series:
    """Return the split named by the first folder of each path, or null for all if there are no split folders."""
    parts = rows["origin"].map(lambda name: PurePosixPath(name).parts)
    split = parts.map(lambda p: SPLIT_NAMES.get(p[0].lower()) if len(p) > 1 else None).astype(object)
    if split.notna().any() and not split.notna().all():
        misplaced = rows.loc[split.isna(), "origin"].iloc[0]
        raise UserError(f"{root}: {misplaced} is in none of the folders train, val and test, but others are")
    return split


def _splits_from_column(root: Path, name: str, metadata: pd.DataFrame, rows: pd.DataFrame) -> pd.Series:
    """Return the splits from the column `split`; if it is missing or empty, from the folder names."""
    if "split" not in metadata or metadata["split"].isna().all():
        return _complete_splits(_splits_from_folders(root, rows))
    split_names = {**SPLIT_NAMES, TRAIN_VAL: TRAIN_VAL}
    split = metadata["split"].map(lambda text: split_names.get(text.lower(), "?"), na_action="ignore").astype(object)
    is_unknown = (split == "?").to_numpy()
    if is_unknown.any():
        value, image = metadata["split"][is_unknown].iloc[0], rows["origin"][is_unknown].iloc[0]
        raise UserError(f"{root}: {name}: unknown split {value!r} of {image}; use train, val or test")
    return _complete_splits(split)


def _complete_splits(split: pd.Series) -> pd.Series:
    """Mark for splitting the images that the user did not split: all if only train is given, else as train_val."""
    given = set(split.dropna())
    split = split.where(split.notna(), None)
    if given == {"train"}:
        return split.map(lambda _: None)
    if given == {"test"}:
        return split.map(lambda name: name or TRAIN_VAL)
    return split.replace({"train": TRAIN_VAL}) if given == {"train", "test"} else split


def _build_rows(
    rows: pd.DataFrame, split: pd.Series, group: pd.Series, labels: dict[str, pd.Series], extras: pd.DataFrame
) -> pd.DataFrame:
    table = pd.DataFrame({"path": IMAGES_FILE, "member": rows["member"], "split": split, "id": rows["member"]})
    table["group"] = group.to_numpy()
    for name, values in labels.items():
        table[name] = values.to_numpy()
    for name in extras.columns.difference(["origin", "member", "group"], sort=False):
        table[name] = extras[name].to_numpy()
    return table


def _avoid_reserved_name(name: str) -> str:
    return f"own_{name}" if name in (*RESERVED_COLUMNS, "origin") or name.startswith("label_") else name
