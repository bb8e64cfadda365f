"""The model card (Mitchell et al. 2019, arXiv:1810.03993): what a model is, of which data, how good, and for what."""

from __future__ import annotations

from fadeformer.reporting import tables
from fadeformer.reporting.tables import Evidence, Table

INTENDED = (
    "To try and to compare methods on images of the kind and population below. Not a medical device: no decision about"
    " a patient may rest on it. Images of other scanners, populations or views are out of its scope."
)
BAR = "\\|"  # in a cell


def model_card(of: Evidence) -> str:
    """Writes the card in Markdown."""
    note, test = of.meta.dataset["note"], of.summary["test"]
    lines = [
        f"# {of.described['model']['backbone']} on {of.meta.dataset['name']}",
        "",
        *([f"> **{note}**", ""] if note else []),
        "## Intended use",
        "",
        INTENDED,
        "",
        "## Data",
        "",
        *_table(tables.data(of)),
        "",
        "## Model",
        "",
        *_table(tables.model(of)),
        "",
        f"## Results on {test['images']:,} test images of the split {of.meta.split}",
        "",
        *_table(tables.numbers(of)),
        "",
        *_table(tables.classes(of)),
        "",
        "## Operating points, chosen on validation and judged on test",
        "",
        *_table(tables.operating_points(of)),
        "",
        *_subgroups(of),
        "## Limits",
        "",
        " ".join(tables.limits(of)),
        "",
    ]
    return "\n".join(lines)


def _subgroups(of: Evidence) -> list[str]:
    if not of.subgroups:
        return [tables.UNDIVIDED, ""]
    verdict, sentences = tables.subgroups_verdict(of)
    listed = ["", *(f"- {sentence}" for sentence in sentences)] if sentences else []
    return ["## Subgroups of the test images", "", *_table(tables.subgroups(of)), "", verdict, *listed, ""]


def _table(table: Table) -> list[str]:
    lines = [f"| {' | '.join(value.replace('|', BAR) for value in row)} |" for row in (table.head, *table.rows)]
    return [lines[0], f"|{' --- |' * len(table.head)}", *lines[1:]]
