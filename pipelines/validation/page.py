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

from fadeformer.data.dataset_card import SPLITS, Facts
from fadeformer.data.manifest import (
    EXAMPLES,
    Manifest,
    across_splits,
    label_names,
    near_across_splits,
    near_with_other_labels,
    usable,
    without_group,
)
from fadeformer.reporting import rendering
from pipelines.validation.suite import Check

PAIRS = 40  # shown side by side
SIZES = 12  # rows of the table of sizes
SHOWN = 500  # offending rows of one expectation; offending_rows.csv has all of them

Row = tuple[str, ...]


class Picture(NamedTuple):
    """An image of the data set, as a base64 PNG if there is one."""

    name: str
    png: str | None
    split: str = ""
    label: str = ""


class Pair(NamedTuple):
    """Two images side by side, and what they have in common."""

    note: str
    pictures: tuple[Picture, Picture]


def page(facts: Facts, found: Manifest, checks: Sequence[Check], data_docs: str) -> str:
    """Render the page.

    Args:
        facts: metadata of the data set.
        found: its manifest.
        checks: outcome of each expectation.
        data_docs: address of great-expectations' own page, relative to this one.
    """
    failed = sum(not check.passed for check in checks)
    stops = sum(check.stops for check in checks)
    verdict = (
        f"{failed} of {len(checks)} expectations do not hold" if failed else f"all {len(checks)} expectations hold"
    )
    if failed > stops:
        verdict += f", {failed - stops} of them only a warning" if stops else ": a warning, the gate is open"
    return rendering.template("validation.html").render(
        title=f"{facts.name}: {verdict}",
        facts=facts,
        checks=checks,
        counts=_counts(facts, found.rows),
        left_out=_left_out(facts, found.rows),
        split=found.split,
        without_group=without_group(found.rows).capitalize(),
        sizes=_sizes(found.rows),
        brightness=[_histogram(split, found.rows.loc[found.rows["split"] == split, "brightness"]) for split in SPLITS],
        examples=list(_examples(facts, found)),
        crossing=_in_two_splits(facts, found),
        conflicting=_with_two_labels(facts, found),
        offending=[(check.sentence, *_rows(facts, check.rows)) for check in checks if len(check.rows)],
        data_docs=data_docs,
    )


def _counts(facts: Facts, manifest: pd.DataFrame) -> tuple[Row, list[Row], Row]:
    """Head, rows and total of a table: usable images of each class or finding in each split."""
    kept, columns = manifest[usable(manifest, facts)], facts.kind.label_columns(len(facts.classes))

    def row(name: str, present: pd.Series) -> Row:
        return name, *(f"{int((present & (kept['split'] == split)).sum()):,}" for split in SPLITS)

    rows = []
    for label, name in enumerate(facts.classes):
        present = kept[columns[label]] == 1 if facts.kind.multi_label else kept[columns[0]] == label
        rows.append(row(name, present))
    if facts.kind.multi_label:
        rows.append(row("no finding", (kept[columns] == 0).all(axis=1)))
    head = ("Finding" if facts.kind.multi_label else "Class", *SPLITS)
    return head, rows, row("images", kept["split"].notna())


def _left_out(facts: Facts, manifest: pd.DataFrame) -> str:
    """How many images are not usable; empty if all are."""
    splits = manifest.loc[~usable(manifest, facts), "split"]
    counts = splits.value_counts()
    by_split = ", ".join(f"{counts[split]:,} of {split}" for split in SPLITS if split in counts)
    return f"{len(splits):,} images ({by_split})" if len(splits) else ""


def _sizes(rows: pd.DataFrame) -> list[Row]:
    """The most frequent heights, widths and modes, and how many images have others."""
    counts = rows.groupby(["height", "width", "mode"]).size().sort_values(ascending=False, kind="stable")
    shown = counts.head(SIZES).reset_index(name="images")
    table: list[Row] = [
        (f"{h:.0f} x {w:.0f}", mode, f"{count:,}") for h, w, mode, count in shown.itertuples(index=False)
    ]
    if len(counts) > SIZES:
        table.append((f"{len(counts) - SIZES:,} others", "", f"{counts.iloc[SIZES:].sum():,}"))
    return table


def _histogram(split: str, brightness: pd.Series) -> tuple[str, list[float], str]:
    """Heights of the bars, at most 60, and the mean."""
    counts, _ = np.histogram(brightness.dropna(), bins=32, range=(0, 256))
    mean = f"mean {brightness.mean():.1f}" if counts.any() else "no image"
    return split, [60 * float(count) / max(counts.max(), 1) for count in counts], mean


def _examples(facts: Facts, found: Manifest) -> Iterator[tuple[str, list[Picture]]]:
    """A row of images for each class or finding."""
    columns = facts.kind.label_columns(len(facts.classes))
    shown = found.rows[found.rows["id"].isin(found.examples)]
    for label, name in enumerate(facts.classes):
        of = shown[shown[columns[label]] == 1] if facts.kind.multi_label else shown[shown[columns[0]] == label]
        yield name, [Picture(one, _png(found.examples[one])) for one in of["id"].head(EXAMPLES)]


def _in_two_splits(facts: Facts, found: Manifest) -> tuple[int, list[Pair]]:
    """Images that are in two splits: exact copies, then near-duplicates."""
    copies = across_splits(found.rows).drop_duplicates(["sha256", "split"])
    exact = [(*group["id"].iloc[:2], "the same content") for _, group in copies.groupby("sha256", sort=False)]
    return _pairs(facts, found, exact + _similar(near_across_splits(found.rows, found.near)))


def _with_two_labels(facts: Facts, found: Manifest) -> tuple[int, list[Pair]]:
    """Near-duplicates within a split whose labels differ, the most similar first."""
    split = found.rows[usable(found.rows, facts)].set_index("id")["split"]
    near = near_with_other_labels(found.rows, found.near, facts)
    return _pairs(facts, found, _similar(near[near["first"].map(split) == near["second"].map(split)]))


def _similar(pairs: pd.DataFrame) -> list[tuple[str, str, str]]:
    return [(first, second, f"similarity {value:.3f}") for first, second, value in pairs.itertuples(index=False)]


def _pairs(facts: Facts, found: Manifest, pairs: Sequence[tuple[str, str, str]]) -> tuple[int, list[Pair]]:
    """The number of pairs, given as two ids and a note, and the first of them with pictures."""
    at = {name: row for row, name in enumerate(found.rows["id"])}
    of = found.rows[found.rows["id"].isin(found.examples)]
    examples = {content: found.examples[name] for name, content in zip(of["id"], of["sha256"], strict=True)}

    def picture(name: str) -> Picture:
        row, pixels = found.rows.iloc[[at[name]]], found.thumbnails[at[name]]
        pixels = examples.get(row["sha256"].iloc[0]) if pixels is None else pixels
        png = None if pixels is None else _png(pixels)
        return Picture(name, png, row["split"].iloc[0], label_names(row, facts).iloc[0])

    return len(pairs), [Pair(note, (picture(first), picture(second))) for first, second, note in pairs[:PAIRS]]


def _png(pixels: NDArray[np.uint8]) -> str:
    """A PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _rows(facts: Facts, rows: pd.DataFrame) -> tuple[list[str], list[Row], int]:
    """Head and first rows of a table of manifest rows, and how many more there are."""
    columns = ["id", "split", "group", "label", "height", "width", "mode", "sha256", "problem"]
    if rows["problem"].isna().all():
        columns.remove("problem")
    shown = rows.head(SHOWN)
    shown = shown.assign(sha256=shown["sha256"].str[:12], label=label_names(shown, facts))[columns].convert_dtypes()
    cells = shown.astype("string").fillna("").itertuples(index=False, name=None)
    return columns, list(cells), max(len(rows) - SHOWN, 0)
