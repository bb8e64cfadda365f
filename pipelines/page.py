"""The data gate's page: what was expected and what was found, readable without a network, unlike Data Docs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from fadeformer.datasets.facts import SPLITS, Facts
from fadeformer.datasets.manifest import (
    EXAMPLES,
    Manifest,
    across_splits,
    label_names,
    near_across_splits,
    near_with_other_labels,
    usable,
    without_group,
)
from pipelines.expectations import Check

PAIRS = 40  # shown side by side
NO_PICTURE = "no picture: too small or of one value"
SIZES = 12  # told one by one
SHOWN = 500  # offending rows of one expectation; all of them stand in offending_rows.csv
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
body { overflow-wrap: anywhere } h1, h2 { line-height: 1.25 } code { font-size: 90% }
.wide { overflow-x: auto; margin: .5em 0 1.5em } table { border-collapse: collapse }
th, td { padding: .25em .9em .25em 0; text-align: left; vertical-align: top } tr { border-bottom: 1px solid #ddd }
th, td { max-width: min(19em, 55vw); overflow-wrap: break-word } td.number { text-align: right; white-space: nowrap }
.checks td { max-width: min(44em, 55vw) }
.holds { color: #00664b } .fails { color: #b03a00; font-weight: bold } .warns { color: #8a5a00 }
.strip { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; margin: 6px 0 }
.strip p { width: 14em; margin: 0; flex: none } .strip img, .none { width: 72px; height: 72px; display: block }
.none { font-size: 70%; line-height: 1.3; color: #555; border: 1px dashed #aaa; box-sizing: border-box; padding: 3px }
figure { margin: 0 1em 0 0; display: inline-block; max-width: 100% } .strip figure { width: 20em; align-self: start }
figcaption { font-size: 85%; color: #555 } svg { max-width: 100% } svg rect { fill: #4c78a8 } svg line { stroke: #888 }
@media (max-width: 45em) { .strip p { width: 100% } .strip figure { width: calc(50% - 1em - 6px) } }
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
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>{escape(facts.name)}: {verdict}</title>",
        f"<style>{STYLE}</style><h1>{escape(facts.name)}: {verdict}</h1>",
        f"<p>{escape(facts.note)} <code>{escape(facts.file)}</code>, SHA-256 <code>{facts.sha256}</code>,"
        f" licence: {escape(facts.licence)}.",
        "<h2>Expectations</h2>",
        f"<div class=checks>{_table(('', 'Expectation', 'Rows named'), [_row(check) for check in checks])}</div>",
        "<h2>Images of each split</h2>",
        _counts(facts, rows),
        f"<p>Split: {escape(found.split)}. {without_group(rows).capitalize()}",
        "<h2>Sizes</h2>",
        _sizes(rows),
        "<h2>Brightness</h2>",
        "<p>Share of images by the mean of their pixels, 0 (black) to 255 (white).</p>",
        *(_histogram(split, rows.loc[rows["split"] == split, "brightness"]) for split in SPLITS),
        "<h2>Examples</h2>",
        _examples(facts, found),
    ]
    parts += _in_two_splits(facts, found)
    parts += _with_two_labels(facts, found)
    for check in checks:
        if len(check.rows):
            parts += [f"<h2>Against: {escape(check.sentence)}</h2>", _rows(facts, check.rows)]
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
    """Images of each class or finding in each split, of those that will be used; how many will not."""
    used = usable(manifest, facts)
    kept, columns = manifest[used], facts.kind.label_columns(len(facts.classes))

    def row(name: str, present: pd.Series) -> tuple[str, ...]:
        return name, *(f"{int((present & (kept['split'] == split)).sum()):,}" for split in SPLITS)

    rows = []
    for label, name in enumerate(facts.classes):
        present = kept[columns[label]] == 1 if facts.kind.multi_label else kept[columns[0]] == label
        rows.append(row(escape(name), present))
    if facts.kind.multi_label:
        rows.append(row("no finding", (kept[columns] == 0).all(axis=1)))
    name, *counts = row("images", kept["split"].notna())
    rows.append((f"<b>{name}</b>", *(f"<b>{count}</b>" for count in counts)))
    table = _table(("Finding" if facts.kind.multi_label else "Class", *SPLITS), rows)
    if used.all():
        return table
    left_out = manifest.loc[~used, "split"].value_counts()
    told = ", ".join(f"{left_out[split]:,} of {split}" for split in SPLITS if split in left_out)
    return f"{table}\n<p>Left out, for they cannot be read or have no label: {(~used).sum():,} images ({told})."


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


def _in_two_splits(facts: Facts, found: Manifest) -> list[str]:
    """Images that stand in two splits, side by side: exact copies, then near ones."""
    copies = across_splits(found.rows).drop_duplicates(["sha256", "split"])
    exact = [(*group["id"].iloc[:2], "the same content") for _, group in copies.groupby("sha256", sort=False)]
    pairs = exact + _told(near_across_splits(found.rows, found.near))
    if not pairs:
        return []
    parts = [f"<h2>{len(pairs)} pairs of images that stand in two splits</h2>", *_strips(facts, found, pairs)]
    if len(pairs) > PAIRS:
        parts.append(f"<p>... and {len(pairs) - PAIRS:,} more in near_duplicates.csv and offending_rows.csv")
    return parts


def _with_two_labels(facts: Facts, found: Manifest) -> list[str]:
    """Near duplicates within a split whose labels differ, side by side, the most alike first."""
    split = found.rows[usable(found.rows, facts)].set_index("id")["split"]
    near = near_with_other_labels(found.rows, found.near, facts)
    pairs = _told(near[near["first"].map(split) == near["second"].map(split)])
    if not pairs:
        return []
    parts = [
        "<h2>Near duplicates with different labels</h2>",
        f"<p>{len(pairs):,} pairs within a split: one of the two labels may be wrong.",
        *_strips(facts, found, pairs),
    ]
    if len(pairs) > PAIRS:
        parts.append(f"<p>... and {len(pairs) - PAIRS:,} more in near_duplicates.csv")
    return parts


def _told(pairs: pd.DataFrame) -> list[tuple[str, str, str]]:
    return [(first, second, f"similarity {alike:.3f}") for first, second, alike in pairs.itertuples(index=False)]


def _strips(facts: Facts, found: Manifest, pairs: Sequence[tuple[str, str, str]]) -> Iterable[str]:
    """The first pairs: what is told of each, and both images with id, split and label."""
    at = {name: row for row, name in enumerate(found.rows["id"])}
    of = found.rows[found.rows["id"].isin(found.examples)]
    examples = {content: found.examples[name] for name, content in zip(of["id"], of["sha256"], strict=True)}
    for first, second, told in pairs[:PAIRS]:
        figures = []
        for name in (first, second):
            row, pixels = found.rows.iloc[[at[name]]], found.thumbnails[at[name]]
            pixels = examples.get(row["sha256"].iloc[0]) if pixels is None else pixels
            image = f"<div class=none>{NO_PICTURE}</div>" if pixels is None else _image(pixels, name)
            caption = f"{escape(name)}<br>{row['split'].iloc[0]}: {escape(label_names(row, facts).iloc[0])}"
            figures.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        yield f"<div class=strip><p>{told}</p>{''.join(figures)}</div>"


def _image(pixels: NDArray[np.uint8], name: str) -> str:
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    data = base64.b64encode(held.getvalue()).decode()
    return (
        f"<img src='data:image/png;base64,{data}' alt='{escape(name, quote=True)}' title='{escape(name, quote=True)}'>"
    )


def _rows(facts: Facts, rows: pd.DataFrame) -> str:
    columns = ["id", "split", "group", "label", "height", "width", "mode", "sha256", "problem"]
    if rows["problem"].isna().all():
        columns.remove("problem")
    shown = rows.head(SHOWN)
    shown = shown.assign(sha256=shown["sha256"].str[:12], label=label_names(shown, facts))[columns].convert_dtypes()
    cells = shown.astype("string").fillna("").itertuples(index=False)
    more = f"<p>... and {len(rows) - SHOWN:,} more in offending_rows.csv" if len(rows) > SHOWN else ""
    return _table(columns, [tuple(escape(cell) for cell in row) for row in cells]) + more


def _table(head: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    """A table of heads, which are text, and cells, which are HTML."""

    def cell(value: str) -> str:
        numeric = value.replace(",", "").removeprefix("<b>").removesuffix("</b>").isdigit()
        return f"<td{' class=number' if numeric else ''}>{value}</td>"

    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<div class=wide><table><tr>{heads}</tr>\n{body}</table></div>"
