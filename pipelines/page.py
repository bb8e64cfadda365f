"""The data gate's page: what was expected and what was found, readable without a network, unlike Data Docs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from fadeformer.datasets.facts import SPLITS, Facts
from fadeformer.datasets.manifest import EXAMPLES, Manifest, across_splits, near_across_splits, without_group
from pipelines.expectations import Check

PAIRS = 40  # shown side by side
SIZES = 12  # told one by one
SHOWN = 500  # offending rows of one expectation; all of them stand in offending_rows.csv
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .5em 0 1.5em } th, td { padding: .25em .9em; text-align: left }
tr { border-bottom: 1px solid #ddd } td.number { text-align: right } td { white-space: nowrap }
.holds { color: #00664b } .fails { color: #b03a00; font-weight: bold } .warns { color: #8a5a00 } code { font-size: 90% }
.strip { display: flex; gap: 6px; align-items: center; margin: 6px 0 } .strip p { width: 14em; margin: 0; flex: none }
.strip img { width: 72px; height: 72px; image-rendering: auto } figure { margin: 0 1em 0 0; display: inline-block }
figcaption { font-size: 85%; color: #555 } svg rect { fill: #4c78a8 } svg line { stroke: #888 }
"""


def page(facts: Facts, found: Manifest, checks: Sequence[Check], data_docs: str) -> str:
    """Writes the page.

    Args:
        facts: what is known of the data set.
        found: its manifest.
        checks: outcome of each expectation.
        data_docs: address of great-expectations' own page, from this one.
    """
    failed = sum(not check.passed for check in checks)
    stops = sum(check.stops for check in checks)
    verdict = (
        f"{failed} of {len(checks)} expectations do not hold" if failed else f"all {len(checks)} expectations hold"
    )
    if failed > stops:
        verdict += f", {failed - stops} of them only a warning" if stops else ": a warning, the gate is open"
    rows = found.rows
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(facts.name)}: {verdict}</title>",
        f"<style>{STYLE}</style><h1>{escape(facts.name)}: {verdict}</h1>",
        f"<p>{escape(facts.note)} <code>{escape(facts.file)}</code>, SHA-256 <code>{facts.sha256}</code>,"
        f" licence: {escape(facts.licence)}.",
        "<h2>Expectations</h2>",
        _table(("", "Expectation", "Rows named"), [_row(check) for check in checks]),
        "<h2>Images of each split</h2>",
        _counts(facts, rows),
        f"<p>Split: {escape(found.split)}. {without_group(rows)}",
        "<h2>Sizes</h2>",
        _sizes(rows),
        "<h2>Brightness</h2>",
        "<p>Share of images by the mean of their pixels, 0 (black) to 255 (white).</p>",
        *(_histogram(split, rows.loc[rows["split"] == split, "brightness"]) for split in SPLITS),
        "<h2>Examples</h2>",
        _examples(facts, found),
    ]
    parts += _pairs(found)
    for check in checks:
        if len(check.rows):
            parts += [f"<h2>Against: {escape(check.sentence)}</h2>", _rows(check.rows)]
    parts.append(
        f"<p>The same as <a href='{escape(data_docs)}'>great-expectations' Data Docs</a> (their style and icons come"
        " from the network), as <a href='validation.json'>JSON</a>, and"
        " <a href='offending_rows.csv'>every row named, as CSV</a>.</html>"
    )
    return "\n".join(parts)


def _row(check: Check) -> tuple[str, ...]:
    fails = "<span class=fails>FAILS</span>" if check.stops else "<span class=warns>warning</span>"
    mark = "<span class=holds>holds</span>" if check.passed else fails
    return mark, escape(check.sentence), f"{len(check.rows):,}" if len(check.rows) else ""


def _counts(facts: Facts, manifest: pd.DataFrame) -> str:
    """Images of each class or finding in each split."""
    columns = facts.kind.label_columns(len(facts.classes))
    rows = []
    for label, name in enumerate(facts.classes):
        present = manifest[columns[label]] == 1 if facts.kind.multi_label else manifest[columns[0]] == label
        rows.append((escape(name), *(f"{int((present & (manifest['split'] == s)).sum()):,}" for s in SPLITS)))
    if facts.kind.multi_label:
        none = (manifest[columns] == 0).all(axis=1)
        rows.append(("no finding", *(f"{int((none & (manifest['split'] == s)).sum()):,}" for s in SPLITS)))
    rows.append(("<b>images</b>", *(f"<b>{int((manifest['split'] == s).sum()):,}</b>" for s in SPLITS)))
    return _table(("Finding" if facts.kind.multi_label else "Class", *SPLITS), rows)


def _sizes(rows: pd.DataFrame) -> str:
    """The most frequent heights, widths and modes, and how many images have others."""
    counts = rows.groupby(["height", "width", "mode"]).size().sort_values(ascending=False, kind="stable")
    told = [(f"{h:.0f} x {w:.0f}", mode, f"{count:,}") for (h, w, mode), count in counts.head(SIZES).items()]
    if len(counts) > SIZES:
        told.append((f"{len(counts) - SIZES:,} others", "", f"{counts.iloc[SIZES:].sum():,}"))
    return _table(("Height x width", "Mode", "Images"), told)


def _histogram(split: str, brightness: pd.Series) -> str:
    """Bars as SVG, each of 8 levels."""
    counts, _ = np.histogram(brightness.dropna(), bins=32, range=(0, 256))
    tallest = max(counts.max(), 1)
    bars = "".join(
        f"<rect x={10 * i} y={60 - 60 * count / tallest:.1f} width=9 height={60 * count / tallest:.1f} />"
        for i, count in enumerate(counts)
    )
    mean = f"mean {brightness.mean():.1f}" if counts.any() else "no image"
    return (
        f"<figure><svg viewBox='0 0 320 60' width=320 height=60 role=img aria-label='brightness of {split}'>{bars}"
        f"<line x1=0 y1=60 x2=320 y2=60 /></svg><figcaption>{split}: {mean}</figcaption></figure>"
    )


def _examples(facts: Facts, found: Manifest) -> str:
    """A row of images for each class or finding."""
    columns = facts.kind.label_columns(len(facts.classes))
    shown = found.rows[found.rows["id"].isin(found.examples)]
    parts = []
    for label, name in enumerate(facts.classes):
        of = shown[shown[columns[label]] == 1] if facts.kind.multi_label else shown[shown[columns[0]] == label]
        images = "".join(_image(found.examples[one], one) for one in of["id"].head(EXAMPLES))
        parts.append(f"<div class=strip><p>{escape(name)}</p>{images or 'no image'}</div>")
    return "\n".join(parts)


def _pairs(found: Manifest) -> list[str]:
    """Images that stand in two splits, side by side: exact copies, then near ones."""
    by_id = {name: row for row, name in enumerate(found.rows["id"])}
    copies = across_splits(found.rows)
    exact = [(*group["id"].iloc[[0, -1]], 1.0) for _, group in copies.groupby("sha256", sort=False)]
    near = near_across_splits(found.rows, found.near).itertuples(index=False)
    pairs = [*exact, *map(tuple, near)]
    if not pairs:
        return []
    parts = [f"<h2>{len(pairs)} pairs of images that stand in two splits</h2>"]
    for first, second, similarity in pairs[:PAIRS]:
        told = "the same content" if similarity == 1 else f"similarity {similarity:.3f}"
        images = "".join(
            f"<figure>{_image(thumbnail, name) if (thumbnail := found.thumbnails[by_id[name]]) is not None else ''}"
            f"<figcaption>{escape(name)}<br>{found.rows['split'].iloc[by_id[name]]}</figcaption></figure>"
            for name in (first, second)
        )
        parts.append(f"<div class=strip><p>{told}</p>{images}</div>")
    if len(pairs) > PAIRS:
        parts.append(f"<p>... and {len(pairs) - PAIRS:,} more in near_duplicates.csv and offending_rows.csv")
    return parts


def _image(pixels: NDArray[np.uint8], name: str) -> str:
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    data = base64.b64encode(held.getvalue()).decode()
    return (
        f"<img src='data:image/png;base64,{data}' alt='{escape(name, quote=True)}' title='{escape(name, quote=True)}'>"
    )


def _rows(rows: pd.DataFrame) -> str:
    columns = ["id", "group", *rows.filter(regex="^label").columns, "height", "width", "mode", "sha256", "problem"]
    if rows["problem"].isna().all():
        columns.remove("problem")
    shown = rows[columns].head(SHOWN).assign(sha256=rows["sha256"].str[:12])
    cells = shown.astype("string").fillna("").itertuples(index=False)
    more = f"<p>... and {len(rows) - SHOWN:,} more in offending_rows.csv" if len(rows) > SHOWN else ""
    return _table(columns, [tuple(escape(cell) for cell in row) for row in cells]) + more


def _table(head: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    def cell(value: str) -> str:
        numeric = value.replace(",", "").removeprefix("<b>").removesuffix("</b>").isdigit()
        return f"<td{' class=number' if numeric else ''}>{value}</td>"

    body = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>\n{body}</table>"
