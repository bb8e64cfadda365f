"""The model card (Mitchell et al. 2019, arXiv:1810.03993): what a model is, of which data, how good, and for what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fadeformer import evidence_tables
from fadeformer.arrays import Meta
from fadeformer.evidence_tables import Table

INTENDED = (
    "To try and to compare methods on images of the kind and population below. Not a medical device: no decision about"
    " a patient may rest on it. Images of other scanners, populations or views are out of its scope."
)
BAR = "\\|"  # in a cell


def model_card(
    meta: Meta,
    described: Mapping[str, Any],
    summary: Mapping[str, Any],
    intervals: Mapping[str, Any],
    operating: Mapping[str, Any],
    subgroups: Mapping[str, Any],
) -> str:
    """Writes the card in Markdown.

    Args:
        meta: of the arrays the model was trained and judged on.
        described: what `models/model.json` holds.
        summary: of `fadeformer.summary.summarise`, by split.
        intervals: of `fadeformer.summary.intervals`, of test.
        operating: what `reports/operating_points.json` holds: `wanted`, `confidence` and `points`.
        subgroups: of `fadeformer.subgroups.compare`, of test.
    """
    card, test = meta.dataset, summary["test"]
    lines = [
        f"# {described['model']['backbone']} on {card['name']}",
        "",
        *([f"> **{card['note']}**", ""] if card["note"] else []),
        "## Intended use",
        "",
        INTENDED,
        "",
        "## Data",
        "",
        *_table(evidence_tables.data(meta)),
        "",
        "## Model",
        "",
        *_table(evidence_tables.model(meta, described)),
        "",
        f"## Results on {test['images']:,} test images of the split {meta.split}",
        "",
        *_table(evidence_tables.numbers(summary, intervals, operating["confidence"])),
        "",
        *_table(evidence_tables.classes(meta, test, intervals)),
        "",
        "## Operating points, chosen on validation and judged on test",
        "",
        *_table(evidence_tables.operating_points(operating)),
        "",
        *_subgroups(subgroups),
        "## Limits",
        "",
        " ".join(evidence_tables.limits(meta, test, intervals["groups"])),
        "",
    ]
    return "\n".join(lines)


def _subgroups(subgroups: Mapping[str, Any]) -> list[str]:
    if not subgroups:
        return []
    verdict, sentences = evidence_tables.subgroups_verdict(subgroups)
    listed = ["", *(f"- {sentence}" for sentence in sentences)] if sentences else []
    table = _table(evidence_tables.subgroups(subgroups))
    return ["## Subgroups of the test images", "", *table, "", verdict, *listed, ""]


def _table(table: Table) -> list[str]:
    lines = [f"| {' | '.join(value.replace('|', BAR) for value in row)} |" for row in (table.head, *table.rows)]
    return [lines[0], f"|{' --- |' * len(table.head)}", *lines[1:]]
