"""The data gate's page: what was expected and what was found, readable without a network, unlike Data Docs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import pandas as pd

from fadeformer.datasets.facts import SPLITS, Facts
from fadeformer.datasets.manifest import without_group
from pipelines.expectations import Check

SHOWN = 500  # offending rows of one expectation; all of them stand in offending_rows.csv
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .5em 0 1.5em } th, td { padding: .25em .9em; text-align: left }
tr { border-bottom: 1px solid #ddd } td.number { text-align: right } td { white-space: nowrap }
.holds { color: #00664b } .fails { color: #b03a00; font-weight: bold } code { font-size: 90% }
"""


def page(facts: Facts, manifest: pd.DataFrame, checks: Sequence[Check], data_docs: str) -> str:
    """Writes the page.

    Args:
        facts: what is known of the data set.
        manifest: one row per image.
        checks: outcome of each expectation.
        data_docs: address of great-expectations' own page, from this one.
    """
    failed = sum(not check.passed for check in checks)
    verdict = (
        f"{failed} of {len(checks)} expectations do not hold" if failed else f"all {len(checks)} expectations hold"
    )
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(facts.name)}: {verdict}</title>",
        f"<style>{STYLE}</style><h1>{escape(facts.name)}: {verdict}</h1>",
        f"<p>{escape(facts.note)} <code>{escape(facts.file)}</code>, SHA-256 <code>{facts.sha256}</code>,"
        f" licence: {escape(facts.licence)}.",
        "<h2>Expectations</h2>",
        _table(("", "Expectation", "Rows named"), [_row(check) for check in checks]),
        "<h2>Images</h2>",
        _counts(facts, manifest),
        f"<p>{without_group(manifest)}",
    ]
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
    mark = "<span class=holds>holds</span>" if check.passed else "<span class=fails>FAILS</span>"
    return mark, escape(check.sentence), str(len(check.rows) or "")


def _counts(facts: Facts, manifest: pd.DataFrame) -> str:
    """Images of each class or finding in each split."""
    columns = facts.kind.label_columns(len(facts.classes))
    rows = []
    for label, name in enumerate(facts.classes):
        present = manifest[columns[label]] == 1 if facts.kind.multi_label else manifest[columns[0]] == label
        rows.append((escape(name), *(f"{int((present & (manifest['split'] == s)).sum()):,}" for s in SPLITS)))
    rows.append(("<b>images</b>", *(f"<b>{int((manifest['split'] == s).sum()):,}</b>" for s in SPLITS)))
    return _table(("Finding" if facts.kind.multi_label else "Class", *SPLITS), rows)


def _rows(rows: pd.DataFrame) -> str:
    columns = ["id", "group", *rows.filter(regex="^label").columns, "height", "width", "mode", "sha256"]
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
