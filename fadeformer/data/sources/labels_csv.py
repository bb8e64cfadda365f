"""What is known of a user's own images: from the folders that they lie in, or from a labels.csv.

The table has `path`, and `label` or one column of 0 and 1 for each finding; if known `group` (patient, lesion) and
`split`, and whatever else describes a subgroup (age, sex, centre).
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pandas as pd

from fadeformer.data.sources.user_table import IMAGES_FILE, LABELS_FILE, RESERVED_COLUMNS, UNPARSED_LABEL
from fadeformer.data.splits import TRAIN_VAL
from fadeformer.errors import UserError

SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
COLUMNS = ("path", "label", "group", "split")
GROUP_COLUMNS = ("patientid", "patient", "subjectid", "subject", "lesionid", "lesion")  # in place of a missing `group`
MISSING_VALUES = ("", "na", "n/a", "nan", "null")
IDENTIFYING_COLUMN = re.compile(
    "(patients?|subjects?|first|last|full)?(name|id)|patients?|(patients?)?(birth.*|dateofbirth|dob|address|phone.*)|surname|mrn|ssn"
    "|accession.*|medicalrecord.*|otherpatientids?"
)


class LabelTable(NamedTuple):
    """The table of `fadeformer.data.sources.user_table`, and what it is a table of.

    Attributes:
        rows: one per image.
        classes: name of each class or finding.
        multi_label: whether there is a column for each finding.
        note: what a reader should know besides.
    """

    rows: pd.DataFrame
    classes: list[str]
    multi_label: bool
    note: str


def labels_from_folders(root: Path, rows: pd.DataFrame, classes: list[str] | None) -> LabelTable:
    """Labels, and splits if any, from the folders that the images lie in.

    Args:
        root: what the user named, for messages.
        rows: `origin`, the path of each image's file, `member`, its name in the zip, and what its file says of it.
        classes: names in the order of the labels; None for those of the folders.

    Raises:
        UserError: an image lies in no class, or there are fewer than two.
    """
    split = _splits_from_folders(root, rows)
    depth = 2 if split.isna().all() else 3
    parts = rows["origin"].map(lambda name: PurePosixPath(name).parts)
    label = parts.map(lambda p: p[-2] if len(p) == depth else None)
    if label.isna().any():
        stray = rows.loc[label.isna(), "origin"].iloc[0]
        raise UserError(
            f"{root}: {stray} lies in no class; put images in CLASS/ or train|val|test/CLASS/, or write a {LABELS_FILE} with"
            " the columns path and label"
        )
    names = classes or _infer_classes(root, label)
    strange = sorted(set(label) - set(names))
    if strange:
        raise UserError(f"{root}: there is a folder {strange[0]}, but dataset.classes names {', '.join(names)}")
    numbers = label.map({name: i for i, name in enumerate(names)}).astype("Int64")
    nothing = pd.Series([None] * len(rows), dtype=object)
    described = _build_rows(rows, _complete_splits(split), rows.get("group", nothing), {"label": numbers}, rows)
    return LabelTable(described, names, False, "")


def labels_from_csv(
    root: Path,
    name: str,
    data: bytes,
    rows: pd.DataFrame,
    classes: list[str] | None,
    hashed: Callable[[str], str] | None,
) -> LabelTable:
    """Labels and all else from labels.csv; several frames of a file share its row.

    Args:
        root: what the user named, for messages.
        name: of the table in it.
        data: its bytes.
        rows: as `by_folders`.
        classes: names in the order of the labels, or of the columns of findings; None for the labels themselves.
        hashed: makes of a group what does not tell who it is; None where groups may be told.

    Raises:
        UserError: it is no table, or does not fit the images.
    """
    told = parse_labels_csv(root, name, data)
    origin = rows["origin"].map(_normalize_path)
    missing = set(told.index) - set(origin)
    if missing:
        raise UserError(f"{root}: {name} names {len(missing):,} files that are not there, such as {min(missing)}")
    strange = set(origin) - set(told.index)
    if strange:
        raise UserError(f"{root}: {len(strange):,} images are not in {name}, such as {min(strange)}")
    of = told.loc[origin].reset_index(drop=True)
    multi_label = "label" not in of
    names, labels = (
        _encode_findings(root, name, of, classes) if multi_label else _encode_classes(root, of["label"], classes)
    )
    alike = [(re.sub(r"[\W_]", "", column).lower(), column) for column in of.columns]
    grouping = next((column for known in ("group", *GROUP_COLUMNS) for one, column in alike if one == known), None)
    group = pd.Series([None] * len(of), dtype=object) if grouping is None else _integers_as_text(of[grouping])
    if hashed is not None:
        group = group.map(hashed, na_action="ignore")
    group = group.fillna(rows["group"]) if "group" in rows else group
    identifying = [one for known, one in alike if IDENTIFYING_COLUMN.fullmatch(known) and one not in (*names, grouping)]
    used = {"label", "group", "split", grouping, *(names if multi_label else []), *identifying}
    extras = of.drop(columns=[column for column in of.columns if column in used]).rename(columns=_avoid_reserved_name)
    for column in rows.columns.difference(["origin", "member", "group"]):
        extras[column] = extras[column].fillna(rows[column]) if column in extras else rows[column]
    lost = pd.DataFrame(labels).isna().any(axis=1)
    if lost.any():  # the data gate says what stands there
        extras[UNPARSED_LABEL] = _format_labels(of[names if multi_label else ["label"]]).where(lost, None)
    note = "" if grouping in ("group", None) else f" The group is the column {grouping}."
    if identifying:
        note += f" Left out, for they may tell who a patient is: the columns {', '.join(identifying)}."
    split = _splits_from_column(root, name, of, rows)
    return LabelTable(_build_rows(rows, split, group, labels, extras), names, multi_label, note)


def _format_labels(labels: pd.DataFrame) -> pd.Series:
    """What stands in the columns of the labels, for people."""
    of = labels.to_dict("records")
    return pd.Series([", ".join(f"{key} {value or 'none'}" for key, value in row.items()) for row in of], dtype=object)


def parse_labels_csv(root: Path, name: str, data: bytes) -> pd.DataFrame:
    """The table by path, as text; None where nothing is known.

    Raises:
        UserError: it cannot be read, has no column path, or names a file twice or not at all.
    """
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{root}: {name} cannot be read as a table ({error}); save it as CSV in UTF-8") from error
    if not lines:
        raise UserError(f"{root}: {name} is empty; write a line with path and label, and one for each image")
    headings = [cell.strip() for cell in lines[0][1]]
    headings = [cell.lower() if cell.lower() in COLUMNS else cell for cell in headings]
    if "path" not in headings:
        raise UserError(f"{root}: {name} has the columns {', '.join(headings)}; it needs path")
    twice = next((cell for i, cell in enumerate(headings) if cell and cell in headings[:i]), None)
    if twice:
        raise UserError(f"{root}: {name} has two columns {twice}")
    for number, row in lines[1:]:
        if len(row) != len(headings) and any(cell.strip() for cell in row[len(headings) :]):
            raise UserError(
                f"{root}: {name}, line {number} has {len(row)} fields, but there are {len(headings)} headings; put text"
                " with a comma in quotes"
            )
    cells = [([cell.strip() for cell in row] + [""] * len(headings))[: len(headings)] for _, row in lines[1:]]
    known = [[None if cell.lower() in MISSING_VALUES else cell for cell in row] for row in cells]
    told = pd.DataFrame(known, columns=headings, dtype=object)
    told = told.drop(columns="", errors="ignore")  # numbers of rows, as R writes them
    for (number, _), path in zip(lines[1:], told["path"], strict=True):
        if path is None:
            raise UserError(f"{root}: {name}, line {number}: no path")
    told["path"] = told["path"].map(lambda path: _normalize_path(path.replace("\\", "/")))
    if told["path"].duplicated().any():
        raise UserError(f"{root}: {name} names {told.loc[told['path'].duplicated(), 'path'].iloc[0]} twice")
    return told.set_index("path")


def _normalize_path(path: str) -> str:
    """A path in one form, however an accent was composed."""
    return unicodedata.normalize("NFC", str(PurePosixPath(path)))


def _infer_classes(root: Path, labels: pd.Series) -> list[str]:
    """Names of the classes in order, numbers by their value."""
    names = sorted(labels.dropna().unique(), key=lambda name: (len(name), name) if name.isdigit() else (0, name))
    same: dict[str, str] = {}
    for name in names:
        other = same.setdefault(" ".join(name.split()).casefold(), name)
        if other != name:
            raise UserError(
                f"{root}: has the classes {other} and {name}; give them one name, or names that differ more"
            )
    if len(names) < 2:
        found = f"all images have the label {names[0]}" if names else "no image has a label"
        raise UserError(f"{root}: {found}; there must be two classes or more")
    return names


def _encode_classes(root: Path, label: pd.Series, classes: list[str] | None) -> tuple[list[str], dict[str, pd.Series]]:
    """Classes, and the number of each image's."""
    label = _integers_as_text(label)
    names = classes or _infer_classes(root, label)
    by_name = label.map({name: i for i, name in enumerate(names)}).astype("Int64")
    if any(name.isdigit() for name in names):
        return names, {"label": by_name}
    return names, {"label": by_name.fillna(_parse_integers(label, len(names)))}


def _integers_as_text(values: pd.Series) -> pd.Series:
    """Names, or where all are whole numbers, these without a fraction: 1.0 is 1."""
    numbers = pd.to_numeric(values, errors="coerce")
    if (numbers.notna() != values.notna()).any() or (numbers.dropna() % 1 != 0).any() or (numbers.abs() > 2**53).any():
        return values
    return numbers.astype("Int64").astype("string").astype(object).where(values.notna(), None)


def _encode_findings(
    root: Path, name: str, of: pd.DataFrame, classes: list[str] | None
) -> tuple[list[str], dict[str, pd.Series]]:
    """Findings, and a column of 0 and 1 for each."""
    names = classes or []
    absent = [finding for finding in names if finding not in of]
    if absent or not names:
        raise UserError(
            f"{root}: {name} has no column {', '.join(absent) or 'label'}; its columns of 0 and 1 are findings if"
            " dataset.classes names them"
        )
    return names, {f"label_{i}": _parse_integers(of[finding], 2) for i, finding in enumerate(names)}


def _parse_integers(values: pd.Series, count: int) -> pd.Series:
    """Whole numbers below `count`; null for anything else, which the data gate names."""
    numbers = pd.to_numeric(values, errors="coerce")
    return numbers.where(numbers.isin(range(count))).astype("Int64")


def _splits_from_folders(root: Path, rows: pd.DataFrame) -> pd.Series:
    """The split of each image by the first folder of its path; null where none of them names one."""
    parts = rows["origin"].map(lambda name: PurePosixPath(name).parts)
    split = parts.map(lambda p: SPLIT_NAMES.get(p[0].lower()) if len(p) > 1 else None).astype(object)
    if split.notna().any() and not split.notna().all():
        stray = rows.loc[split.isna(), "origin"].iloc[0]
        raise UserError(f"{root}: {stray} lies in none of the folders train, val and test, though others do")
    return split


def _splits_from_column(root: Path, name: str, of: pd.DataFrame, rows: pd.DataFrame) -> pd.Series:
    """By the column split; where there is none, by folders."""
    if "split" not in of or of["split"].isna().all():
        return _complete_splits(_splits_from_folders(root, rows))
    known = {**SPLIT_NAMES, TRAIN_VAL: TRAIN_VAL}
    split = of["split"].map(lambda told: known.get(told.lower(), "?"), na_action="ignore").astype(object)
    wrong = (split == "?").to_numpy()
    if wrong.any():
        raise UserError(
            f"{root}: {name} gives {rows['origin'][wrong].iloc[0]} the split {of['split'][wrong].iloc[0]!r}"
        )
    return _complete_splits(split)


def _complete_splits(split: pd.Series) -> pd.Series:
    """Where the user gave train and test alone, val comes out of train; where train alone, it is no split."""
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
    described = pd.DataFrame({"path": IMAGES_FILE, "member": rows["member"], "split": split, "id": rows["member"]})
    described["group"] = group.to_numpy()
    for name, values in labels.items():
        described[name] = values.to_numpy()
    for name in extras.columns.difference(["origin", "member", "group"], sort=False):
        described[name] = extras[name].to_numpy()
    return described


def _avoid_reserved_name(name: str) -> str:
    return f"own_{name}" if name in (*RESERVED_COLUMNS, "origin") or name.startswith("label_") else name
