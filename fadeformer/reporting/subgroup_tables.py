"""Tables of subgroups for the model card and the report: their metrics, and comparisons with the other images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fadeformer.evaluation.subgroup_comparisons import ALL_CLASSES
from fadeformer.evaluation.subgroups import underperforming
from fadeformer.io.formatting import format_with_interval
from fadeformer.reporting.tables import METRIC_LABELS, ReportInputs, Table

METRICS = ("auc", "balanced_accuracy", "recall", "specificity", "calibration_error")
COMPARED_METRICS = {"auc": "AUC", "recall": "sensitivity", "specificity": "specificity"}
NO_SUBGROUPS = "No subgroup analysis: the data set has no subgroup columns, or the analysis is switched off."
UNDETECTABLE = "none: too few images"


def metrics(results: ReportInputs) -> Table:
    """Return the table of metrics per subgroup."""
    rows = [
        (
            column, value, f"{subgroup['images']:,}", f"{subgroup['groups']:,}",
            *(
                format_with_interval(subgroup["overall"][key], subgroup["intervals"]["overall"][key])
                for key in METRICS
            ),
        )
        for column, values in results.subgroups.items()
        for value, subgroup in values.items()
    ]  # fmt: skip
    return Table(("", "Value", "Images", "Patients or lesions", *(METRIC_LABELS[key] for key in METRICS)), rows)


def describe_findings(results: ReportInputs) -> tuple[str, list[str]]:
    """Summarize the subgroup tests in a sentence, and describe each subgroup that is significantly worse."""
    tests = [row for _, _, row in _iter_comparisons(results)]
    findings = [
        f"{row['column']} {row['subgroup']}: {COMPARED_METRICS[row['metric']]} {_class_phrase(row['class'])}"
        f" {row['value']:.3f}, other images {row['others']:.3f} (adjusted p {row['p']:.2g})"
        for row in underperforming(results.subgroups)
    ]
    if not tests:
        return "Too few patients to compare subgroups with the other images.", []
    limits = [row["detectable_shortfall"] for row in tests if row["detectable_shortfall"] is not None]
    power = f"smallest detectable shortfall: {min(limits):.2f} to {max(limits):.2f}" if limits else UNDETECTABLE
    if limits and len(limits) < len(tests):
        power += f", in {len(tests) - len(limits):,} {UNDETECTABLE}"
    tested = f"{len(tests):,} comparisons of subgroups with the other images, corrected for multiple testing ({power}):"
    return f"{tested} {'significantly worse are' if findings else 'none is significantly worse.'}", findings


def comparisons(results: ReportInputs) -> Table | None:
    """Return the table of all comparisons of subgroups with the other images; None if there are none."""
    rows: list[tuple[str, ...]] = [
        (
            column, value, f"{COMPARED_METRICS[row['metric']]} {_class_phrase(row['class'])}", f"{row['value']:.3f}",
            f"{row['others']:.3f}", f"{row['p']:.2g}",
            UNDETECTABLE if row["detectable_shortfall"] is None else f"{row['detectable_shortfall']:.2f}",
        )
        for column, value, row in _iter_comparisons(results)
    ]  # fmt: skip
    head = ("", "Value", "Metric", "Subgroup", "Other images", "Adjusted p", "Smallest detectable shortfall")
    return Table(head, rows) if rows else None


def _iter_comparisons(results: ReportInputs) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for column, values in results.subgroups.items():
        for value, subgroup in values.items():
            for row in subgroup["comparisons"]:
                yield column, value, row


def _class_phrase(name: str) -> str:
    return name if name == ALL_CLASSES else f"of {name}"
