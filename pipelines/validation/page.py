"""The validation page: expectations and results, readable without a network, unlike Data Docs."""

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
from fadeformer.reporting import rendering
from pipelines.validation.suite import Check

MAX_PAIRS = 40  # shown side by side
MAX_SIZES = 12  # rows of the table of sizes
MAX_ROWS = 500  # offending rows of one expectation; offending_rows.csv has all of them

TableRow = tuple[str, ...]


class Picture(NamedTuple):
    """An image of the data set, as a base64 PNG if there is one."""

    name: str
    png: str | None
    split: str = ""
    label: str = ""


class PicturePair(NamedTuple):
    """Two images side by side, and what they have in common."""

    note: str
    pictures: tuple[Picture, Picture]


def render_validation_page(facts: DatasetCard, found: Manifest, checks: Sequence[Check], data_docs: str) -> str:
    """Render the page.

    Args:
        facts: metadata of the data set.
        found: its manifest.
        checks: outcome of each expectation.
        data_docs: address of great-expectations' own page, relative to this one.
    """
    failed = sum(not check.passed for check in checks)
    stops = sum(check.is_blocking for check in checks)
    verdict = (
        f"{failed} of {len(checks)} expectations do not hold" if failed else f"all {len(checks)} expectations hold"
    )
    if failed > stops:
        verdict += f", {failed - stops} of them only a warning" if stops else ": a warning, the gate is open"
    return rendering.load_template("validation.html").render(
        title=f"{facts.name}: {verdict}",
        facts=facts,
        checks=checks,
        counts=_class_counts(facts, found.rows),
        left_out=_unusable_summary(facts, found.rows),
        split=found.split,
        without_group=describe_ungrouped(found.rows).capitalize(),
        sizes=_size_counts(found.rows),
        brightness=[_histogram(split, found.rows.loc[found.rows["split"] == split, "brightness"]) for split in SPLITS],
        examples=list(_examples(facts, found)),
        crossing=_cross_split_pairs(facts, found),
        conflicting=_label_conflict_pairs(facts, found),
        offending=[(check.description, *_row_table(facts, check.rows)) for check in checks if len(check.rows)],
        data_docs=data_docs,
    )


def _class_counts(facts: DatasetCard, manifest: pd.DataFrame) -> tuple[TableRow, list[TableRow], TableRow]:
    """Head, rows and total of a table: usable images of each class or finding in each split."""
    kept, columns = manifest[is_usable(manifest, facts)], facts.task_spec.label_columns(len(facts.classes))

    def row(name: str, present: pd.Series) -> TableRow:
        return name, *(f"{int((present & (kept['split'] == split)).sum()):,}" for split in SPLITS)

    rows = []
    for label, name in enumerate(facts.classes):
        present = kept[columns[label]] == 1 if facts.task_spec.multi_label else kept[columns[0]] == label
        rows.append(row(name, present))
    if facts.task_spec.multi_label:
        rows.append(row("no finding", (kept[columns] == 0).all(axis=1)))
    head = ("Finding" if facts.task_spec.multi_label else "Class", *SPLITS)
    return head, rows, row("images", kept["split"].notna())


def _unusable_summary(facts: DatasetCard, manifest: pd.DataFrame) -> str:
    """How many images are not usable; empty if all are."""
    splits = manifest.loc[~is_usable(manifest, facts), "split"]
    counts = splits.value_counts()
    by_split = ", ".join(f"{counts[split]:,} of {split}" for split in SPLITS if split in counts)
    return f"{len(splits):,} images ({by_split})" if len(splits) else ""


def _size_counts(rows: pd.DataFrame) -> list[TableRow]:
    """The most frequent heights, widths and modes, and how many images have others."""
    counts = rows.groupby(["height", "width", "mode"]).size().sort_values(ascending=False, kind="stable")
    shown = counts.head(MAX_SIZES).reset_index(name="images")
    table: list[TableRow] = [
        (f"{h:.0f} x {w:.0f}", mode, f"{count:,}") for h, w, mode, count in shown.itertuples(index=False)
    ]
    if len(counts) > MAX_SIZES:
        table.append((f"{len(counts) - MAX_SIZES:,} others", "", f"{counts.iloc[MAX_SIZES:].sum():,}"))
    return table


def _histogram(split: str, brightness: pd.Series) -> tuple[str, list[float], str]:
    """Heights of the bars, at most 60, and the mean."""
    counts, _ = np.histogram(brightness.dropna(), bins=32, range=(0, 256))
    mean = f"mean {brightness.mean():.1f}" if counts.any() else "no image"
    return split, [60 * float(count) / max(counts.max(), 1) for count in counts], mean


def _examples(facts: DatasetCard, found: Manifest) -> Iterator[tuple[str, list[Picture]]]:
    """A row of images for each class or finding."""
    columns = facts.task_spec.label_columns(len(facts.classes))
    shown = found.rows[found.rows["id"].isin(found.examples)]
    for label, name in enumerate(facts.classes):
        of = shown[shown[columns[label]] == 1] if facts.task_spec.multi_label else shown[shown[columns[0]] == label]
        yield name, [Picture(one, _encode_png(found.examples[one])) for one in of["id"].head(EXAMPLES_PER_CLASS)]


def _cross_split_pairs(facts: DatasetCard, found: Manifest) -> tuple[int, list[PicturePair]]:
    """Images that are in two splits: exact copies, then near-duplicates."""
    copies = cross_split_duplicates(found.rows).drop_duplicates(["sha256", "split"])
    exact = [(*group["id"].iloc[:2], "the same content") for _, group in copies.groupby("sha256", sort=False)]
    return _picture_pairs(
        facts, found, exact + _similarity_notes(cross_split_near_duplicates(found.rows, found.near_duplicates))
    )


def _label_conflict_pairs(facts: DatasetCard, found: Manifest) -> tuple[int, list[PicturePair]]:
    """Near-duplicates within a split whose labels differ, the most similar first."""
    split = found.rows[is_usable(found.rows, facts)].set_index("id")["split"]
    near = conflicting_near_duplicates(found.rows, found.near_duplicates, facts)
    return _picture_pairs(facts, found, _similarity_notes(near[near["first"].map(split) == near["second"].map(split)]))


def _similarity_notes(pairs: pd.DataFrame) -> list[tuple[str, str, str]]:
    return [(first, second, f"similarity {value:.3f}") for first, second, value in pairs.itertuples(index=False)]


def _picture_pairs(
    facts: DatasetCard, found: Manifest, pairs: Sequence[tuple[str, str, str]]
) -> tuple[int, list[PicturePair]]:
    """The number of pairs, given as two ids and a note, and the first of them with pictures."""
    at = {name: row for row, name in enumerate(found.rows["id"])}
    of = found.rows[found.rows["id"].isin(found.examples)]
    examples = {content: found.examples[name] for name, content in zip(of["id"], of["sha256"], strict=True)}

    def picture(name: str) -> Picture:
        row, pixels = found.rows.iloc[[at[name]]], found.thumbnails[at[name]]
        pixels = examples.get(row["sha256"].iloc[0]) if pixels is None else pixels
        png = None if pixels is None else _encode_png(pixels)
        return Picture(name, png, row["split"].iloc[0], label_names(row, facts).iloc[0])

    return len(pairs), [
        PicturePair(note, (picture(first), picture(second))) for first, second, note in pairs[:MAX_PAIRS]
    ]


def _encode_png(pixels: NDArray[np.uint8]) -> str:
    """A PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _row_table(facts: DatasetCard, rows: pd.DataFrame) -> tuple[list[str], list[TableRow], int]:
    """Head and first rows of a table of manifest rows, and how many more there are."""
    columns = ["id", "split", "group", "label", "height", "width", "mode", "sha256", "problem"]
    if rows["problem"].isna().all():
        columns.remove("problem")
    shown = rows.head(MAX_ROWS)
    shown = shown.assign(sha256=shown["sha256"].str[:12], label=label_names(shown, facts))[columns].convert_dtypes()
    cells = shown.astype("string").fillna("").itertuples(index=False, name=None)
    return columns, list(cells), max(len(rows) - MAX_ROWS, 0)
