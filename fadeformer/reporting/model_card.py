"""The model card (Mitchell et al. 2019, arXiv:1810.03993): what a model is, of which data, how good, and for what."""

from __future__ import annotations

from fadeformer.reporting import tables
from fadeformer.reporting.tables import ReportInputs, Table

INTENDED_USE = (
    "To try and to compare methods on images of the kind and population below. Not a medical device: no decision about"
    " a patient may rest on it. Images of other scanners, populations or views are out of its scope."
)
ESCAPED_BAR = "\\|"  # in a cell


def render_model_card(of: ReportInputs) -> str:
    """Writes the card in Markdown."""
    note, test = of.meta.dataset["note"], of.summary["test"]
    lines = [
        f"# {of.model_metadata['model']['backbone']} on {of.meta.dataset['name']}",
        "",
        *([f"> **{note}**", ""] if note else []),
        "## Intended use",
        "",
        INTENDED_USE,
        "",
        "## Data",
        "",
        *_markdown_table(tables.data(of)),
        "",
        "## Model",
        "",
        *_markdown_table(tables.model(of)),
        "",
        f"## Results on {test['images']:,} test images of the split {of.meta.split}",
        "",
        *_markdown_table(tables.metrics(of)),
        "",
        *_markdown_table(tables.per_class(of)),
        "",
        "## Operating points, chosen on validation and judged on test",
        "",
        *_markdown_table(tables.operating_points(of)),
        "",
        *_subgroup_section(of),
        "## Limits",
        "",
        " ".join(tables.limitations(of)),
        "",
    ]
    return "\n".join(lines)


def _subgroup_section(of: ReportInputs) -> list[str]:
    if not of.subgroups:
        return [tables.NO_SUBGROUPS, ""]
    verdict, sentences = tables.subgroup_findings(of)
    listed = ["", *(f"- {sentence}" for sentence in sentences)] if sentences else []
    return ["## Subgroups of the test images", "", *_markdown_table(tables.subgroups(of)), "", verdict, *listed, ""]


def _markdown_table(table: Table) -> list[str]:
    lines = [f"| {' | '.join(value.replace('|', ESCAPED_BAR) for value in row)} |" for row in (table.head, *table.rows)]
    return [lines[0], f"|{' --- |' * len(table.head)}", *lines[1:]]
