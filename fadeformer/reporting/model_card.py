"""Model card in Markdown (Mitchell et al. 2019, arXiv:1810.03993): intended use, data, model, results, limitations."""

from __future__ import annotations

from fadeformer.reporting import subgroup_tables, tables
from fadeformer.reporting.tables import ReportInputs, Table

INTENDED_USE = (
    "Research and comparison of methods on images of the kind and population below. Not a medical device: do not use it"
    " for decisions about patients. Images from other scanners, populations or views are out of scope."
)
ESCAPED_BAR = "\\|"  # within a table cell


def render_model_card(results: ReportInputs) -> str:
    """Render the model card as Markdown."""
    note, test = results.meta.dataset["note"], results.summary["test"]
    lines = [
        f"# {results.model_metadata['model']['backbone']} on {results.meta.dataset['name']}",
        "",
        *([f"> **{note}**", ""] if note else []),
        "## Intended use",
        "",
        INTENDED_USE,
        "",
        "## Data",
        "",
        *_markdown_table(tables.data(results)),
        "",
        "## Model",
        "",
        *_markdown_table(tables.model(results)),
        "",
        f"## Results on {test['images']:,} test images of the split {results.meta.split}",
        "",
        *_markdown_table(tables.metrics(results)),
        "",
        *_markdown_table(tables.per_class(results)),
        "",
        "## Calibration of each score on the test images",
        "",
        *_markdown_table(tables.class_calibration(results)),
        "",
        "## Operating points, chosen on validation and evaluated on test",
        "",
        *_markdown_table(tables.operating_points(results)),
        "",
        tables.PREDICTIVE_VALUES_NOTE,
        "",
        *_optional_table("Predictive values at stated prevalences", tables.predictive_values(results)),
        *_subgroup_section(results),
        "## Limitations",
        "",
        " ".join(tables.limitations(results)),
        "",
        # last, because the table is long with many classes, and a registry may truncate the card
        *_optional_table("Comparisons of subgroups with the other images", subgroup_tables.comparisons(results)),
    ]
    return "\n".join(lines)


def _subgroup_section(results: ReportInputs) -> list[str]:
    if not results.subgroups:
        return [subgroup_tables.NO_SUBGROUPS, ""]
    summary, findings = subgroup_tables.describe_findings(results)
    bullets = ["", *(f"- {sentence}" for sentence in findings)] if findings else []
    return [
        "## Subgroups of the test images",
        "",
        *_markdown_table(subgroup_tables.metrics(results)),
        "",
        summary,
        *bullets,
        "",
    ]


def _optional_table(title: str, table: Table | None) -> list[str]:
    return [] if table is None else [f"## {title}", "", *_markdown_table(table), ""]


def _markdown_table(table: Table) -> list[str]:
    lines = [f"| {' | '.join(value.replace('|', ESCAPED_BAR) for value in row)} |" for row in (table.head, *table.rows)]
    return [lines[0], f"|{' --- |' * len(table.head)}", *lines[1:]]
