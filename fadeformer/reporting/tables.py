"""Tables shared by the model card and the report: data, model, metrics and limitations as text cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fadeformer.data.arrays import ArrayMetadata
from fadeformer.data.near_duplicates import SEARCHED_COPIES
from fadeformer.inference import calibration
from fadeformer.inference.calibration import Calibration
from fadeformer.io.formatting import format_with_interval

METRIC_LABELS = {
    "auc": "AUC", "auc_micro": "AUC (micro)", "accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy",
    "precision": "Precision (macro)", "recall": "Sensitivity (macro)", "specificity": "Specificity (macro)",
    "f1": "F1 (macro)", "average_precision": "Average precision", "kappa": "Cohen's kappa",
    "quadratic_kappa": "Kappa, quadratic weights", "calibration_error": "Calibration error (15 bins)",
    "class_calibration_error": "Calibration error of each class's score, mean (15 bins)", "brier": "Brier score",
    "loss": "Loss, nats",
}  # fmt: skip
CLASS_METRICS = {
    "support": "Images", "auc": "AUC", "recall": "Sensitivity", "specificity": "Specificity", "precision": "Precision",
    "f1": "F1",
}  # fmt: skip
CLASS_CALIBRATION_METRICS = {
    "class_calibration_error": "Calibration error (15 bins)", "calibration_slope": "Slope (ideal: 1)",
    "calibration_intercept": "Intercept (ideal: 0)",
}  # fmt: skip
PUBLISHED_METRICS = {"auc": "AUC", "accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy"}
PREDICTIVE_VALUES = {
    "positive_predictive_value": "Positive predictive value", "negative_predictive_value": "Negative predictive value",
}  # fmt: skip
OPERATING_METRICS = ("Sensitivity", "Specificity", *PREDICTIVE_VALUES.values())
PREDICTIVE_VALUES_NOTE = (
    "Predictive values depend on the prevalence. Those of the operating points are at the case mix of the test set, as"
    " a random sample; evaluate.prevalence adds those at other prevalences."
)
CHECKPOINT_RULES = {
    "loss": "lowest validation loss", "accuracy": "highest validation accuracy",
    "auc": "highest validation AUC",
}  # fmt: skip


@dataclass(frozen=True)
class ReportInputs:
    """Everything that the model card and the report are rendered from.

    Attributes:
        meta: metadata of the preprocessed arrays.
        model_metadata: content of `models/model.json`.
        summary: metrics by split, from `fadeformer.evaluation.summary.summarize`.
        intervals: confidence intervals on test, from `fadeformer.evaluation.summary.confidence_intervals`.
        operating_points: content of `reports/operating_points.json`: `targets`, `confidence` and `points`.
        subgroups: results on test, from `fadeformer.evaluation.subgroups.evaluate_subgroups`.
        data_warnings: result of `data_warnings`.
    """

    meta: ArrayMetadata
    model_metadata: Mapping[str, Any]
    summary: Mapping[str, Any]
    intervals: Mapping[str, Any]
    operating_points: Mapping[str, Any]
    subgroups: Mapping[str, Any]
    data_warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Table:
    """Table of text cells, which may contain Markdown for code and bold.

    Attributes:
        head: column headers; empty strings for a table without headers.
        rows: cells of each row, as many as headers.
    """

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def data(results: ReportInputs) -> Table:
    """Return the table of the data that the model was trained and evaluated on."""
    meta, card = results.meta, results.meta.dataset
    class_names = {"classes" if not meta.task.multi_label else "findings": ", ".join(meta.classes)}
    return Table(
        ("", ""),
        [
            ("Data set", f"{card['name']} ({card['file']})"),
            ("SHA-256", f"`{card['sha256']}`"),
            ("License", str(card["license"])),
            ("Task", str(card["task"])),
            *((key.capitalize(), value) for key, value in class_names.items()),
            ("Images", ", ".join(f"{split} {count:,}" for split, count in meta.counts.items())),
            ("Split", meta.split),
            ("Input", f"{meta.image_size} x {meta.image_size} pixels, {meta.channels} channel(s), uint8"),
        ],
    )


def model(results: ReportInputs) -> Table:
    """Return the table of the model's architecture and training settings."""
    meta, metadata = results.meta, results.model_metadata
    architecture, params = metadata["model"], metadata["params"]
    fade, fitted = architecture["fade"], calibration.from_dict(metadata["calibration"])
    return Table(
        ("", ""),
        [
            ("Backbone", f"{architecture['backbone']}, {_weight_origin(metadata)}"),
            ("Fade layers", "none: the plain backbone" if fade is None else _format_fade_config(fade)),
            ("Training", ", ".join(f"{key} {value}" for key, value in params["train"].items())),
            ("Seed", str(params["seed"])),
            ("Calibration", _format_calibration(fitted)),
            ("Decision", meta.task.with_decision_weights(fitted.decision_weights).describe_decision(meta.classes)),
            ("Weights kept", f"epoch {metadata['best_epoch']}, {CHECKPOINT_RULES[params['train']['monitor']]}"),
        ],
    )


def metrics(results: ReportInputs) -> Table:
    """Return the table of overall metrics."""
    test, val = results.summary["test"]["overall"], results.summary["val"]["overall"]
    return Table(
        ("", f"Test ({100 * results.operating_points['confidence']:g} % interval)", "Validation"),
        [
            (label, format_with_interval(test[key], results.intervals["overall"][key]), _format_value(val[key]))
            for key, label in METRIC_LABELS.items()
            if key in test
        ],
    )


def per_class(results: ReportInputs) -> Table:
    """Return the table of metrics per class or finding."""
    pairs = zip(results.summary["test"]["per_class"].items(), results.intervals["per_class"].values(), strict=True)
    return Table(
        ("Class" if not results.meta.task.multi_label else "Finding", *CLASS_METRICS.values()),
        [
            (
                name,
                f"{values['support']:,}",
                *(format_with_interval(values[key], bounds[key]) for key in CLASS_METRICS if key in bounds),
            )
            for (name, values), bounds in pairs
        ],
    )


def class_calibration(results: ReportInputs) -> Table:
    """Return the table of calibration per class or finding: mean score against frequency, error, slope, intercept."""
    pairs = zip(results.summary["test"]["per_class"].items(), results.intervals["per_class"].values(), strict=True)
    return Table(
        (
            "Class" if not results.meta.task.multi_label else "Finding", "Mean score", "Observed frequency",
            *CLASS_CALIBRATION_METRICS.values(),
        ),
        [
            (
                name,
                f"{values['mean_score']:.4f}",
                f"{values['prevalence']:.4f}",
                *(format_with_interval(values[key], bounds[key]) for key in CLASS_CALIBRATION_METRICS),
            )
            for (name, values), bounds in pairs
        ],
    )  # fmt: skip


def operating_points(results: ReportInputs) -> Table:
    """Return the table of operating points: thresholds and their test metrics."""
    rules, rows = _describe_rules(results), []
    for rule, points in results.operating_points["points"].items():
        for name, point in points.items():
            values = [] if point is None else list(point["on_test"].values())
            cells = [_format_bounds(proportion) for proportion in values]
            threshold = "not evaluated" if point is None else f"{point['threshold']:.4f}"
            rows.append((rules[rule], name, threshold, *(cells or [""] * len(OPERATING_METRICS))))
    return Table(("Rule on validation", "Positive", "Threshold", *OPERATING_METRICS), rows)


def predictive_values(results: ReportInputs) -> Table | None:
    """Return the table of predictive values at the stated prevalences; None if none is stated."""
    rules = _describe_rules(results)
    rows = [
        (
            rules[rule],
            name,
            f"{100 * stated['prevalence']:g} %",
            *(_format_bounds(stated[key]) for key in PREDICTIVE_VALUES),
        )
        for rule, points in results.operating_points["points"].items()
        for name, point in points.items()
        for stated in (point or {}).get("at_prevalence", [])
    ]
    head = ("Rule on validation", "Positive", "Prevalence", *PREDICTIVE_VALUES.values())
    return Table(head, rows) if rows else None


def published(rows: pd.DataFrame, *, comparable: bool) -> Table:
    """Return the table of published scores: the comparable ones with caveats, or the others with reasons.

    Args:
        rows: from `fadeformer.evaluation.published.comparison_table`.
        comparable: True for the comparable scores.
    """
    cells = []
    for row in rows[rows["comparable"] == comparable].to_dict("records"):
        scores = ["" if pd.isna(row[key]) else f"{row[key]:g}" for key in PUBLISHED_METRICS]
        cells.append(
            (row["method"], row["resolution"], *scores, row["caveat" if comparable else "reason"], row["source"])
        )
    head = ("Method", "Pixels", *PUBLISHED_METRICS.values(), "Caveat" if comparable else "Reason", "Source")
    return Table(head, cells)


def pointing_game(results: Mapping[str, Any]) -> Table:
    """Return the table of pointing game hit rates in %, overall and per finding.

    Args:
        results: from `fadeformer.explain.pointing_game.evaluate_pointing`.
    """
    methods = list(results["methods"].values())
    groups = [("all", [method["overall"] for method in methods])]
    groups += [(name, [method["per_class"][name] for method in methods]) for name in methods[0]["per_class"]]
    rows = []
    for name, scores in groups:
        rates = [_format_percent(method["share"], method["interval"]) for method in scores]
        rows.append((name, f"{scores[0]['cases']:,}", _format_percent(scores[0]["chance"]), *rates))
    return Table(("Finding", "Cases", "Chance level", *(method["name"] for method in methods)), rows)


def data_warnings(validation: Mapping[str, Any]) -> list[str]:
    """List the checks of data validation that failed as warnings: a sentence part for each check.

    Args:
        validation: content of `reports/validation/validation.json`.
    """
    failed: dict[str, list[str]] = {}
    for entry in validation["expectations"]:
        if not entry["passed"] and entry["severity"] == "warn":
            images = f" ({entry['rows']:,} images)" if entry["rows"] else ""
            failed.setdefault(entry["check"], []).append(f"{entry['description']}{images}")
    return [f"{check}, not met: {'; '.join(descriptions)}" for check, descriptions in failed.items()]


def limitations(results: ReportInputs) -> list[str]:
    """List the limitations of the results in sentences that may contain Markdown."""
    meta, test, groups = results.meta, results.summary["test"], results.intervals["groups"]
    sentences = [
        "The validation images were used to select the epoch, so their metrics are optimistic.",
        "Confidence intervals cover the sampling of test images, not the variation between training runs.",
    ]
    if groups < test["images"]:
        sentences.append(
            f"The test images come from {groups:,} patients or lesions; the intervals resample these, not images."
        )
    if test["not_evaluated"]:
        sentences.append(
            f"Left out of means, fewer than two patients with or without it: {', '.join(test['not_evaluated'])}."
        )
    if calibration.from_dict(results.model_metadata["calibration"]).decision_weights:
        sentences.append(
            "Training weighted the classes, and so do the decisions: the decision on an image need not be its most"
            " probable class."
        )
    if meta.cross_split_duplicates:
        sentences.append(
            f"**{meta.cross_split_duplicates} images are in two splits**, as allowed by"
            " validate.max_cross_split_duplicates: the metrics may be optimistic."
        )
    sentences.append(f"Copies of one image in two splits were searched for: {SEARCHED_COPIES}.")
    sentences += [f"**Data validation warned** of {warning}." for warning in results.data_warnings]
    return sentences


def _format_fade_config(fade: Mapping[str, Any]) -> str:
    """Format the used settings: only `published` uses `K` and `alpha`, only `diffusion` uses `after_blocks`."""
    unused = ("after_blocks",) if fade["variant"] == "published" else ("K", "alpha")
    used = {key: value for key, value in fade.items() if key not in unused}
    return ", ".join(
        f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in used.items()
    )


def _weight_origin(metadata: Mapping[str, Any]) -> str:
    weights = metadata["weights"]
    if weights is not None:
        return f"from the weights of {weights['file']} (SHA-256 `{weights['sha256']}`)"
    return "pretrained" if metadata["model"]["pretrained"] else "from random weights"


def _format_calibration(fitted: Calibration) -> str:
    temperature = f"temperature {1 / fitted.slope[0]:.3g}"
    return {
        calibration.NONE: "none: uncalibrated scores",
        calibration.PLATT: "Platt scaling per finding, fitted on validation",
        calibration.TEMPERATURE: f"{temperature}, fitted on validation",
        calibration.PRIOR_CORRECTION: f"{temperature}, fitted on validation, and correction of the class weights in"
        " training to the class frequencies",
        calibration.OFFSETS: f"{temperature} and one offset per class, fitted on validation",
    }[fitted.method]


def _describe_rules(results: ReportInputs) -> dict[str, str]:
    targets = results.operating_points["targets"]
    labels = {rule: f"{rule} at least {target:g}" for rule, target in targets.items() if target is not None}
    return {"youden": "largest sensitivity + specificity", **labels}


def _format_bounds(proportion: Mapping[str, float | None]) -> str:
    low, high = proportion["low"], proportion["high"]
    return format_with_interval(proportion["value"], None if low is None or high is None else (low, high))


def _format_percent(share: float | None, bounds: tuple[float, float] | None = None) -> str:
    if share is None:
        return "undefined"
    return f"{100 * share:.0f}" + (f" ({100 * bounds[0]:.0f} to {100 * bounds[1]:.0f})" if bounds else "")


def _format_value(value: float | None) -> str:
    if value is None:
        return "undefined"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
