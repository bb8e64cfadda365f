"""The tables that model card and report share: what the model is, of which data, and how good, cell by cell as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fadeformer.data.arrays import ArrayMetadata
from fadeformer.evaluation.subgroups import ALL_CLASSES, underperforming
from fadeformer.inference.calibration import IDENTITY, from_dict
from fadeformer.io.formatting import format_with_interval
from fadeformer.tasks import Task

METRIC_LABELS = {
    "auc": "AUC", "auc_micro": "AUC (micro)", "accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy",
    "precision": "Precision (macro)", "recall": "Sensitivity (macro)", "specificity": "Specificity (macro)",
    "f1": "F1 (macro)", "average_precision": "Average precision", "kappa": "Cohen's kappa",
    "quadratic_kappa": "Kappa, quadratic weights", "calibration_error": "Calibration error (15 bins)",
    "brier": "Brier score", "loss": "Loss, nats",
}  # fmt: skip
CLASS_METRICS = {
    "support": "Images", "auc": "AUC", "recall": "Sensitivity", "specificity": "Specificity", "precision": "Precision",
    "f1": "F1",
}  # fmt: skip
SUBGROUP_METRICS = ("auc", "balanced_accuracy", "recall", "specificity", "calibration_error")
NO_SUBGROUPS = "The images are not divided into subgroups: nothing is known to divide them by, or it was not asked for."
TESTED_METRICS = {"auc": "AUC", "recall": "sensitivity", "specificity": "specificity"}
PUBLISHED_METRICS = {"auc": "AUC", "accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy"}
OPERATING_METRICS = ("Sensitivity", "Specificity", "Positive predictive value", "Negative predictive value")
CHECKPOINT_RULES = {
    "loss": "of the lowest validation loss", "accuracy": "of the highest validation accuracy",
    "auc": "of the highest validation AUC",
}  # fmt: skip


@dataclass(frozen=True)
class ReportInputs:
    """What model card and report are made of.

    Attributes:
        meta: of the arrays the model was trained and judged on.
        described: what `models/model.json` holds.
        summary: of `fadeformer.evaluation.summary.summarize`, by split.
        intervals: of `fadeformer.evaluation.summary.confidence_intervals`, of test.
        operating: what `reports/operating_points.json` holds: `wanted`, `confidence` and `points`.
        subgroups: of `fadeformer.evaluation.subgroups.evaluate_subgroups`, of test.
    """

    meta: ArrayMetadata
    model_metadata: Mapping[str, Any]
    summary: Mapping[str, Any]
    intervals: Mapping[str, Any]
    operating_points: Mapping[str, Any]
    subgroups: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; a cell may hold Markdown's marks of code and of strong words.

    Attributes:
        head: of each column; empty strings where the rows name themselves.
        rows: as many cells each.
    """

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def data(of: ReportInputs) -> Table:
    """What the model was trained and judged on."""
    meta, card = of.meta, of.meta.dataset
    names = {"classes" if not meta.task.multi_label else "findings": ", ".join(meta.classes)}
    return Table(
        ("", ""),
        [
            ("Data set", f"{card['name']} ({card['file']})"),
            ("SHA-256", f"`{card['sha256']}`"),
            ("Licence", str(card["licence"])),
            ("Task", str(card["task"])),
            *((key.capitalize(), value) for key, value in names.items()),
            ("Images", ", ".join(f"{split} {count:,}" for split, count in meta.counts.items())),
            ("Split", meta.split),
            ("Input", f"{meta.image_size} x {meta.image_size} pixels, {meta.channels} channel(s), uint8"),
        ],
    )


def model(of: ReportInputs) -> Table:
    """What the model is, and how it was trained."""
    meta, described = of.meta, of.model_metadata
    network, settings = described["model"], described["params"]
    fade = network["fade"]
    return Table(
        ("", ""),
        [
            ("Backbone", f"{network['backbone']}, {_weight_origin(described)}"),
            ("Fade layers", "none: the plain backbone" if fade is None else _format_fade_config(fade)),
            ("Training", ", ".join(f"{key} {value}" for key, value in settings["train"].items())),
            ("Seed", str(settings["seed"])),
            ("Calibration", _format_calibration(described, meta.task)),
            ("Weights kept", f"epoch {described['best_epoch']}, {CHECKPOINT_RULES[settings['train']['monitor']]}"),
        ],
    )


def metrics(of: ReportInputs) -> Table:
    """Every number over all classes."""
    test, val = of.summary["test"]["overall"], of.summary["val"]["overall"]
    return Table(
        ("", f"Test ({100 * of.operating_points['confidence']:g} % interval)", "Validation"),
        [
            (label, format_with_interval(test[key], of.intervals["overall"][key]), _format_value(val[key]))
            for key, label in METRIC_LABELS.items()
            if key in test
        ],
    )


def per_class(of: ReportInputs) -> Table:
    """Numbers of each class or finding."""
    pairs = zip(of.summary["test"]["per_class"].items(), of.intervals["per_class"].values(), strict=True)
    return Table(
        ("Class" if not of.meta.task.multi_label else "Finding", *CLASS_METRICS.values()),
        [
            (
                name,
                f"{values['support']:,}",
                *(format_with_interval(values[key], bounds[key]) for key in CLASS_METRICS if key in bounds),
            )
            for (name, values), bounds in pairs
        ],
    )


def operating_points(of: ReportInputs) -> Table:
    """Thresholds and what they give."""
    operating = of.operating_points
    rules = {"youden": "largest sensitivity + specificity"}
    rules |= {name: f"{name} at least {least:g}" for name, least in operating["targets"].items() if least is not None}
    rows = []
    for rule, of_classes in operating["points"].items():
        for name, point in of_classes.items():
            shares = [] if point is None else list(point["on_test"].values())
            cells = [
                format_with_interval(s["value"], None if s["low"] is None else (s["low"], s["high"])) for s in shares
            ]
            limit = "not evaluated" if point is None else f"{point['threshold']:.4f}"
            rows.append((rules[rule], name, limit, *(cells or [""] * len(OPERATING_METRICS))))
    return Table(("Rule on validation", "Positive", "Score from", *OPERATING_METRICS), rows)


def subgroups(of: ReportInputs) -> Table:
    """Numbers of each subgroup."""
    rows = [
        (
            column, value, f"{one['images']:,}", f"{one['groups']:,}",
            *(format_with_interval(one["overall"][key], one["intervals"]["overall"][key]) for key in SUBGROUP_METRICS),
        )
        for column, values in of.subgroups.items()
        for value, one in values.items()
    ]  # fmt: skip
    return Table(
        ("", "Value", "Images", "Patients or lesions", *(METRIC_LABELS[key] for key in SUBGROUP_METRICS)), rows
    )


def subgroup_findings(of: ReportInputs) -> tuple[str, list[str]]:
    """Whether a subgroup is worse than the whole, and a sentence for each measure in which one is."""
    tests = sum(len(one["comparisons"]) for values in of.subgroups.values() for one in values.values())
    verdicts = [
        f"{one['column']} {one['subgroup']}: {TESTED_METRICS[one['metric']]} {_class_phrase(one['class'])} {one['value']:.3f}, in the"
        f" whole {one['overall']:.3f} (adjusted p {one['p']:.2g})"
        for one in underperforming(of.subgroups)
    ]
    told_of = f"Compared with the whole in {tests:,} measures, and adjusted for that many:"
    if not tests:
        return "No subgroup has images enough to be compared with the whole.", []
    return f"{told_of} {'worse beyond chance are' if verdicts else 'none is worse beyond chance.'}", verdicts


def _class_phrase(name: str) -> str:
    return name if name == ALL_CLASSES else f"of {name}"


def published(rows: pd.DataFrame, *, comparable: bool) -> Table:
    """Published scores beside which ours may stand, or those that may not, with why.

    Args:
        rows: of `fadeformer.evaluation.published.comparison_table`.
        comparable: which of them.
    """
    cells = []
    for row in rows[rows["comparable"] == comparable].to_dict("records"):
        scores = ["" if pd.isna(row[key]) else f"{row[key]:g}" for key in PUBLISHED_METRICS]
        cells.append(
            (row["method"], row["resolution"], *scores, row["caveat" if comparable else "reason"], row["source"])
        )
    head = ("Method", "Pixels", *PUBLISHED_METRICS.values(), "To bear in mind" if comparable else "Why not", "Source")
    return Table(head, cells)


def pointing_game(found: Mapping[str, Any]) -> Table:
    """How often each explanation points into boxes, of each finding, in %.

    Args:
        found: of `fadeformer.explain.pointing_game.evaluate_pointing`.
    """
    methods = list(found["methods"].values())
    parts = [("all", [of["overall"] for of in methods])]
    parts += [(name, [of["per_class"][name] for of in methods]) for name in methods[0]["per_class"]]
    rows = []
    for name, each in parts:
        shares = [_format_percent(of["share"], of["interval"]) for of in each]
        rows.append((name, f"{each[0]['cases']:,}", _format_percent(each[0]["chance"]), *shares))
    return Table(("Finding", "Images with a box", "Anywhere", *(of["name"] for of in methods)), rows)


def limitations(of: ReportInputs) -> list[str]:
    """What a reader must bear in mind, in sentences that may hold Markdown's marks."""
    meta, test, groups = of.meta, of.summary["test"], of.intervals["groups"]
    found = [
        "The validation images chose the epoch, so their numbers flatter.",
        "Intervals tell what other test images would do, not another training.",
    ]
    if groups < test["images"]:
        found.append(f"The test images come from {groups:,} patients or lesions, and so few are the intervals made of.")
    if test["not_evaluated"]:
        found.append(f"Not evaluated, for want of positives or negatives: {', '.join(test['not_evaluated'])}.")
    if meta.cross_split_duplicates:
        found.append(
            f"**{meta.cross_split_duplicates} images stand in two splits**, as validate.max_cross_split_duplicates"
            " allowed: the numbers may flatter."
        )
    return found


def _format_fade_config(fade: Mapping[str, Any]) -> str:
    """What decides the layers: `K` and `alpha` are the published variant's alone, `after_blocks` the other's."""
    unused = ("after_blocks",) if fade["variant"] == "published" else ("K", "alpha")
    told = {key: value for key, value in fade.items() if key not in unused}
    return ", ".join(
        f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in told.items()
    )


def _weight_origin(described: Mapping[str, Any]) -> str:
    weights = described["weights"]
    if weights is not None:
        return f"from the weights of {weights['file']} (SHA-256 `{weights['sha256']}`)"
    return "pretrained" if described["model"]["pretrained"] else "from random weights"


def _format_calibration(described: Mapping[str, Any], task: Task) -> str:
    found = from_dict(described["calibration"])
    if found == IDENTITY:
        return "none: scores as the network gives them"
    if task.multi_label:
        return "vector scaling of each finding, fitted on validation"
    return f"temperature {1 / found.slope[0]:.3g}, fitted on validation"


def _format_percent(share: float | None, bounds: tuple[float, float] | None = None) -> str:
    if share is None:
        return "undefined"
    return f"{100 * share:.0f}" + (f" ({100 * bounds[0]:.0f} to {100 * bounds[1]:.0f})" if bounds else "")


def _format_value(value: float | None) -> str:
    if value is None:
        return "undefined"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
