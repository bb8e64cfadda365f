"""The validation report: one HTML page that, unlike Data Docs, loads nothing from the network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from fadeformer.data.dataset_card import SPLITS, DatasetCard
from fadeformer.data.manifest import (
    EXAMPLES_PER_CLASS,
    Manifest,
    conflicting_near_duplicates,
    cross_split_duplicates,
    cross_split_near_duplicates,
    describe_ungrouped,
    is_usable,
    label_names,
)
from fadeformer.data.near_duplicates import SEARCHED_COPIES
from fadeformer.evaluation.intervals import expected_precision
from fadeformer.reporting import rendering
from pipelines.validation.remedies import remedy
from pipelines.validation.suite import Check

MAX_PAIRS = 40  # pairs of images side by side
MAX_SIZES = 12  # rows of the table of sizes
MAX_ROWS = 500  # offending rows of one expectation; offending_rows.csv has all of them

TableRow = tuple[str, ...]


class Picture(NamedTuple):
    """An image of the data set; `png` is base64, None if the image has no thumbnail."""

    name: str
    png: str | None
    split: str = ""
    label: str = ""


class PicturePair(NamedTuple):
    """Two images to show side by side; `note` is their relation."""

    note: str
    pictures: tuple[Picture, Picture]


def render_validation_page(card: DatasetCard, data: Manifest, checks: Sequence[Check], data_docs: str) -> str:
    """Render the report as HTML.

    Args:
        card: The dataset card.
        data: The manifest.
        checks: The outcome of each expectation.
        data_docs: URL of Great Expectations' Data Docs, relative to this page.
    """
    failed = sum(not check.passed for check in checks)
    blocking = sum(check.is_blocking for check in checks)
    summary = f"{failed} of {len(checks)} expectations failed" if failed else f"all {len(checks)} expectations passed"
    if failed > blocking:
        summary += f", {failed - blocking} of them only a warning" if blocking else ": warnings only"
    return rendering.load_template("validation.html").render(
        title=f"{card.name}: {summary}",
        card=card,
        checks=checks,
        counts=_class_counts(card, data.rows),
        unusable=_unusable_summary(card, data.rows),
        num_excluded=data.excluded,
        split=data.split,
        without_group=describe_ungrouped(data.rows).capitalize(),
        searched_copies=SEARCHED_COPIES,
        precision=_precision_table(card, data.rows),
        sizes=_size_counts(data.rows),
        brightness=[_histogram(split, data.rows.loc[data.rows["split"] == split, "brightness"]) for split in SPLITS],
        examples=list(_examples(card, data)),
        crossing=_cross_split_pairs(card, data),
        conflicting=_label_conflict_pairs(card, data),
        offending=[(check.description, *_row_table(card, check.rows)) for check in checks if len(check.rows)],
        remedies={check.name: remedy(check.name, data) for check in checks if not check.passed},
        data_docs=data_docs,
    )


def _class_counts(card: DatasetCard, manifest: pd.DataFrame) -> tuple[TableRow, list[TableRow], TableRow]:
    """Return head, rows and total of a table: usable images of each class or finding in each split."""
    usable, columns = manifest[is_usable(manifest, card)], card.task_spec.label_columns(len(card.classes))

    def row(name: str, present: pd.Series) -> TableRow:
        return name, *(f"{int((present & (usable['split'] == split)).sum()):,}" for split in SPLITS)

    rows = []
    for label, name in enumerate(card.classes):
        present = usable[columns[label]] == 1 if card.task_spec.multi_label else usable[columns[0]] == label
        rows.append(row(name, present))
    if card.task_spec.multi_label:
        rows.append(row("no finding", (usable[columns] == 0).all(axis=1)))
    head = ("Finding" if card.task_spec.multi_label else "Class", *SPLITS)
    return head, rows, row("images", usable["split"].notna())


def _precision_table(card: DatasetCard, manifest: pd.DataFrame) -> tuple[TableRow, list[TableRow]]:
    """Return head and rows of a table: cases of each class or finding in val and test, and the precision they allow."""
    usable, columns = manifest[is_usable(manifest, card)], card.task_spec.label_columns(len(card.classes))
    rows = []
    for label, name in enumerate(card.classes):
        present = usable[columns[label]] == 1 if card.task_spec.multi_label else usable[columns[0]] == label
        counts = {split: _count_cases(usable, present, split) for split in ("val", "test")}
        rows.append((
            name, *(f"{with_class:,} / {without:,}" for with_class, without in counts.values()),
            *_format_precision(expected_precision.expected_precision(*counts["test"])),
        ))  # fmt: skip
    aucs = (f"AUC {auc:g}" for auc in expected_precision.AUCS)
    sensitivity = f"Sensitivity {expected_precision.SENSITIVITY:g}"
    return (
        "Class",
        "val: with / without",
        "test: with / without",
        *aucs,
        sensitivity,
        "Detectable AUC difference",
    ), rows


def _count_cases(rows: pd.DataFrame, present: pd.Series, split: str) -> tuple[int, int]:
    """Count the groups of a split with images of a class, and with images of others; an image may be its own group."""
    counts = []
    for mask in (present, ~present):
        groups = rows.loc[mask.astype(bool) & (rows["split"] == split), "group"]
        counts.append(groups.nunique() + int(groups.isna().sum()))
    return counts[0], counts[1]


def _format_precision(precision: expected_precision.ExpectedPrecision | None) -> TableRow:
    if precision is None:
        return ("too few cases",) * (len(expected_precision.AUCS) + 2)
    intervals = (*precision.auc_intervals, precision.sensitivity_interval)
    return *(f"{low:.2f} to {high:.2f}" for low, high in intervals), f"{precision.detectable_difference:.3f}"


def _unusable_summary(card: DatasetCard, manifest: pd.DataFrame) -> str:
    """Return the number of unusable images, in total and by split; empty if all are usable."""
    splits = manifest.loc[~is_usable(manifest, card), "split"]
    counts = splits.value_counts()
    by_split = ", ".join(f"{counts[split]:,} of {split}" for split in SPLITS if split in counts)
    return f"{len(splits):,} images ({by_split})" if len(splits) else ""


def _size_counts(rows: pd.DataFrame) -> list[TableRow]:
    """Return the most frequent combinations of height, width and mode with their counts, and a row for all others."""
    counts = rows.groupby(["height", "width", "mode"]).size().sort_values(ascending=False, kind="stable")
    shown = counts.head(MAX_SIZES).reset_index(name="images")
    table: list[TableRow] = [
        (f"{h:.0f} x {w:.0f}", mode, f"{count:,}") for h, w, mode, count in shown.itertuples(index=False)
    ]
    if len(counts) > MAX_SIZES:
        table.append((f"{len(counts) - MAX_SIZES:,} others", "", f"{counts.iloc[MAX_SIZES:].sum():,}"))
    return table


def _histogram(split: str, brightness: pd.Series) -> tuple[str, list[float], str]:
    """Return the split, the heights of the bars (at most 60), and the mean as text."""
    counts, _ = np.histogram(brightness.dropna(), bins=32, range=(0, 256))
    mean = f"mean {brightness.mean():.1f}" if counts.any() else "no image"
    return split, [60 * float(count) / max(counts.max(), 1) for count in counts], mean


def _examples(card: DatasetCard, data: Manifest) -> Iterator[tuple[str, list[Picture]]]:
    """Yield a row of example images for each class or finding."""
    columns = card.task_spec.label_columns(len(card.classes))
    shown = data.rows[data.rows["id"].isin(data.examples)]
    for label, name in enumerate(card.classes):
        members = shown[shown[columns[label]] == 1] if card.task_spec.multi_label else shown[shown[columns[0]] == label]
        yield (
            name,
            [
                Picture(image_id, _encode_png(data.examples[image_id]))
                for image_id in members["id"].head(EXAMPLES_PER_CLASS)
            ],
        )


def _cross_split_pairs(card: DatasetCard, data: Manifest) -> tuple[int, list[PicturePair]]:
    """Return the number of image pairs across splits, and the first ones: exact copies, then near-duplicates."""
    copies = cross_split_duplicates(data.rows).drop_duplicates(["sha256", "split"])
    exact = [(*group["id"].iloc[:2], "the same content") for _, group in copies.groupby("sha256", sort=False)]
    return _picture_pairs(
        card, data, exact + _similarity_notes(cross_split_near_duplicates(data.rows, data.near_duplicates))
    )


def _label_conflict_pairs(card: DatasetCard, data: Manifest) -> tuple[int, list[PicturePair]]:
    """Return the near-duplicates within a split whose labels differ, the most similar first."""
    split = data.rows[is_usable(data.rows, card)].set_index("id")["split"]
    near = conflicting_near_duplicates(data.rows, data.near_duplicates, card)
    return _picture_pairs(card, data, _similarity_notes(near[near["first"].map(split) == near["second"].map(split)]))


def _similarity_notes(pairs: pd.DataFrame) -> list[tuple[str, str, str]]:
    return [(first, second, f"similarity {value:.3f}") for first, second, value in pairs.itertuples(index=False)]


def _picture_pairs(
    card: DatasetCard, data: Manifest, pairs: Sequence[tuple[str, str, str]]
) -> tuple[int, list[PicturePair]]:
    """Return the number of pairs (two ids and a note), and the first of them with pictures."""
    positions = {name: row for row, name in enumerate(data.rows["id"])}
    shown = data.rows[data.rows["id"].isin(data.examples)]
    examples = {sha256: data.examples[name] for name, sha256 in zip(shown["id"], shown["sha256"], strict=True)}

    def picture(name: str) -> Picture:
        row, pixels = data.rows.iloc[[positions[name]]], data.thumbnails[positions[name]]
        pixels = examples.get(row["sha256"].iloc[0]) if pixels is None else pixels
        png = None if pixels is None else _encode_png(pixels)
        return Picture(name, png, row["split"].iloc[0], label_names(row, card).iloc[0])

    return len(pairs), [
        PicturePair(note, (picture(first), picture(second))) for first, second, note in pairs[:MAX_PAIRS]
    ]


def _encode_png(pixels: NDArray[np.uint8]) -> str:
    """Encode an image as PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _row_table(card: DatasetCard, rows: pd.DataFrame) -> tuple[list[str], list[TableRow], int]:
    """Return head and first rows of a table of manifest rows, and the number of further rows."""
    columns = ["id", "split", "group", "label", "height", "width", "mode", "sha256", "problem"]
    if rows["problem"].isna().all():
        columns.remove("problem")
    shown = rows.head(MAX_ROWS)
    shown = shown.assign(sha256=shown["sha256"].str[:12], label=label_names(shown, card))[columns].convert_dtypes()
    cells = shown.astype("string").fillna("").itertuples(index=False, name=None)
    return columns, list(cells), max(len(rows) - MAX_ROWS, 0)
