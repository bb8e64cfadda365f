"""Figures of uncertainty, calibration and clinical utility; each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from fadeformer.evaluation.intervals import bootstrap
from fadeformer.evaluation.intervals.proportions import proportion_interval
from fadeformer.evaluation.metrics import curve_classes
from fadeformer.evaluation.predictions import Predictions
from fadeformer.io.formatting import format_with_interval
from fadeformer.reporting.plots.base import CHANCE_STYLE, COLORS, panel_grid, wrap_name
from fadeformer.tasks import one_versus_rest

N_BINS = 10  # of the reliability diagram, with equal numbers of scores
NET_BENEFIT_FLOOR = -0.05  # lower end of the y axis: thresholds with clearly negative net benefit are useless


def auc_forest(
    predictions: Predictions, summary: Mapping[str, Any], intervals: Mapping[str, Any], confidence: float
) -> Figure:
    """Plot the AUC of each class or finding with confidence interval and number of positives, best first; mean last.

    Args:
        predictions: predictions on one split.
        summary: from `fadeformer.evaluation.summary.summarize`.
        intervals: from `fadeformer.evaluation.summary.confidence_intervals`.
        confidence: confidence level of the intervals.
    """
    names = [predictions.classes[c] for c in curve_classes(predictions)]
    evaluated = [(name, summary["per_class"][name]) for name in names if summary["per_class"][name]["auc"] is not None]
    evaluated.sort(key=lambda item: -item[1]["auc"])
    rows = [
        (wrap_name(name), v["auc"], intervals["per_class"][name]["auc"], f"{v['support']:,} of {summary['images']:,}")
        for name, v in evaluated
    ]
    if len(evaluated) > 1:
        rows.append(("mean", summary["overall"]["auc"], intervals["overall"]["auc"], f"{summary['images']:,} images"))
    rows += [(wrap_name(name), None, None, "not evaluated") for name in names if name in summary["not_evaluated"]]
    figure = Figure(figsize=(9, 1.3 + 0.36 * max(len(rows), 2)), layout="constrained")
    axes = figure.add_subplot()
    lowest = min(
        [0.5, *(interval[0] for _, _, interval, _ in rows if interval is not None), *(row[1] or 1 for row in rows)]
    )
    axes.axvline(0.5, **CHANCE_STYLE)
    for y, (name, auc, interval, count) in enumerate(rows):
        is_mean = name == "mean" and count.endswith("images")
        color = COLORS[1] if is_mean else COLORS[0]
        if auc is not None:
            if interval is not None:
                axes.plot(interval, [y, y], color=color, linewidth=2, solid_capstyle="butt")
            axes.plot([auc], [y], color=color, marker="D" if is_mean else "s", markersize=6)
        auc_text = "" if auc is None else format_with_interval(auc, interval)
        axes.annotate(
            count if auc is None else f"{auc_text},  n = {count}", (1.0, y),
            xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9,
            annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=9)
    axes.set(
        xlim=(max(0.0, lowest - 0.03), 1.005), ylim=(len(rows) - 0.4, -0.6), xlabel="AUC",
        title=f"AUC with {100 * confidence:g} % intervals (dotted: chance)",
    )  # fmt: skip
    axes.grid(axis="x", alpha=0.3)
    return figure


def reliability_diagram(
    predictions: Predictions, errors: tuple[float | None, float | None], confidence: float
) -> Figure:
    """Plot observed frequency against score in bins of equal counts with intervals, and a histogram of the scores.

    For binary tasks this is the score of the last class, for multi-class tasks that of the predicted class, for
    multi-label tasks the scores of all findings together. Gray: before calibration.

    Args:
        predictions: predictions on one split.
        errors: calibration error before and after calibration, for the legend.
        confidence: confidence level of the intervals.
    """
    figure = Figure(figsize=(5.2, 6), layout="constrained")
    axes, histogram = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
    axes.plot([0, 1], [0, 1], **CHANCE_STYLE, label="perfect calibration")
    groups = bootstrap.encode_groups(predictions.frame["group"])
    raw = predictions.before_calibration()
    is_calibrated = not np.array_equal(raw.scores, predictions.scores)
    outcome_name = ""
    for variant, error, color, style, name in (
        (raw, errors[0], "0.45", "--", "before calibration"),
        (predictions, errors[1], COLORS[0], "-", "after calibration" if is_calibrated else "uncalibrated"),
    ):  # fmt: skip
        if variant is raw and not is_calibrated:
            continue
        score, outcome, image_groups, outcome_name = _calibration_scores(variant, groups)
        bins = np.searchsorted(np.unique(np.quantile(score, np.arange(1, N_BINS) / N_BINS)), score, side="right")
        points = []
        for bin_index in np.unique(bins):
            inside = bins == bin_index
            frequency = outcome[inside].mean()
            low, high = proportion_interval(outcome, inside, image_groups, confidence) or (frequency, frequency)
            points.append((score[inside].mean(), frequency, low, high))
        mean_score, frequency, low, high = np.array(points).T
        label = name if error is None else f"{name}, calibration error {error:.3f}"
        error_bars = None if variant is raw else np.abs(np.stack([frequency - low, high - frequency]))
        axes.errorbar(
            mean_score, frequency, yerr=error_bars, color=color, linestyle=style, marker="o", markersize=4, capsize=2,
            label=label,
        )  # fmt: skip
        histogram.hist(score, bins=np.linspace(0, 1, 41).tolist(), color=color, histtype="step", linestyle=style)
    title = f"Reliability with {100 * confidence:g} % intervals"
    axes.set(ylabel=f"Fraction: {wrap_name(outcome_name)}", title=title, ylim=(-0.02, 1.02), xlim=(-0.02, 1.02))
    figure.legend(loc="outside upper center", frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    histogram.set(xlabel="Score", ylabel="Count")
    return figure


def _calibration_scores(
    predictions: Predictions, groups: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64], str]:
    """Return the evaluated scores, their outcomes, the group of each, and the name of the outcome."""
    scores, task = predictions.scores, predictions.task
    truth = one_versus_rest(predictions.labels, scores.shape[1], task)
    if task.multi_label:
        return scores.ravel(), truth.ravel(), groups.repeat(scores.shape[1]), "findings present"
    if scores.shape[1] == 2:
        return scores[:, 1], truth[:, 1], groups, predictions.classes[1]
    decisions = task.decide(scores)
    score = np.take_along_axis(scores, decisions, axis=1)[:, 0]
    return score, (decisions == predictions.labels)[:, 0], groups, "correct predictions"


def score_histograms(predictions: Predictions) -> Figure:
    """Plot normalized histograms of the scores of images with and without each class or finding."""
    scores, task = predictions.scores, predictions.task
    truth = one_versus_rest(predictions.labels, scores.shape[1], task)
    shown = list(curve_classes(predictions))
    figure, plots = panel_grid(len(shown), panel_inches=2.1, single_panel_inches=4.2, share_y=False)
    edges = np.linspace(0, 1, 26)
    for axes, c in zip(plots, shown, strict=True):
        for rows, color, style in ((~truth[:, c], COLORS[1], "--"), (truth[:, c], COLORS[0], "-")):
            if rows.any():
                fractions = np.histogram(scores[rows, c], edges)[0] / rows.sum()
                axes.stairs(fractions, edges, color=color, linestyle=style, fill=False, linewidth=1.4)
                axes.stairs(fractions, edges, color=color, fill=True, alpha=0.15)
        axes.set_title(f"{wrap_name(predictions.classes[c])} ({int(truth[:, c].sum()):,})", fontsize=8)
        axes.set(xlim=(0, 1), xticks=[0, 0.5, 1])
        axes.tick_params(labelsize=8)
    handles = [
        Line2D([], [], color=COLORS[0], label="images with it"),
        Line2D([], [], color=COLORS[1], linestyle="--", label="images without it"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.supxlabel("Score", fontsize=10)
    figure.supylabel("Fraction of the images", fontsize=10)
    return figure


def subgroup_forest(
    summary: Mapping[str, Any], intervals: Mapping[str, Any], subgroups: Mapping[str, Any], confidence: float
) -> Figure:
    """Plot AUC and balanced accuracy of each subgroup and of all images with intervals; significantly worse is marked.

    Args:
        summary: from `fadeformer.evaluation.summary.summarize`.
        intervals: from `fadeformer.evaluation.summary.confidence_intervals`.
        subgroups: from `fadeformer.evaluation.subgroups.evaluate_subgroups`.
        confidence: confidence level of the intervals.
    """
    rows: list[tuple[str, Any, Any, str, bool]] = [
        ("all images", summary["overall"], intervals["overall"], f"{summary['images']:,}", False)
    ]
    for column, values in subgroups.items():
        for value, subgroup in values.items():
            is_flagged = any(comparison["worse"] for comparison in subgroup["comparisons"])
            count = f"{subgroup['images']:,}" + ("" if subgroup["comparisons"] else ", not tested")
            label, bounds = f"{column}: {wrap_name(value)}", subgroup["intervals"]["overall"]
            rows.append((label, subgroup["overall"], bounds, count, is_flagged))
    figure = Figure(figsize=(10.5, 1.5 + 0.34 * max(len(rows), 2)), layout="constrained")
    plots = figure.subplots(1, 2, sharey=True)
    for axes, (key, name) in zip(plots, {"auc": "AUC", "balanced_accuracy": "Balanced accuracy"}.items(), strict=True):
        if rows[0][1][key] is not None:
            axes.axvline(rows[0][1][key], **CHANCE_STYLE)
        for y, (_, numbers, bounds, _, is_flagged) in enumerate(rows):
            value, interval = numbers[key], bounds[key]
            if value is None:
                axes.annotate("not evaluated", (0.02, y), xycoords=("axes fraction", "data"), fontsize=8, va="center")
                continue
            color = COLORS[1] if is_flagged else COLORS[0]
            if interval is not None:
                axes.plot(interval, [y, y], color=color, linewidth=2, solid_capstyle="butt")
            axes.plot([value], [y], color=color, marker="v" if is_flagged else "s", markersize=6)
        low = min([b[key][0] for _, _, b, _, _ in rows if b[key] is not None] or [0.5])
        axes.set(xlabel=name, xlim=(max(-0.01, low - 0.05), 1.01), ylim=(len(rows) - 0.4, -0.6))
        axes.grid(axis="x", alpha=0.3)
    plots[0].set_yticks(range(len(rows)), [f"{row[0]} ({row[3]})" for row in rows], fontsize=9)
    handles = [
        Line2D([], [], color=COLORS[0], marker="s", label=f"with {100 * confidence:g} % interval"),
        Line2D([], [], color=COLORS[1], marker="v", label="significantly worse than the other images in some metric"),
        Line2D([], [], **CHANCE_STYLE, label="all images"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def decision_curves(benefit: pd.DataFrame) -> Figure:
    """Plot decision curves: net benefit by threshold probability of the model, treat all and treat none.

    Args:
        benefit: from `fadeformer.evaluation.operating_points.net_benefit`.
    """
    names = list(benefit["class"].unique())
    figure, plots = panel_grid(len(names), panel_inches=2.2, single_panel_inches=4.6, share_y=False)
    for axes, name in zip(plots, names, strict=True):
        curve = benefit[benefit["class"] == name]
        axes.plot(curve["probability"], curve["all"], color=COLORS[1], linestyle="--", linewidth=1.2)
        axes.plot(curve["probability"], curve["model"], color=COLORS[0], linewidth=1.6)
        axes.axhline(0, **CHANCE_STYLE)
        top = max(0.02, 1.1 * max(curve["model"].max(), curve["all"].max()))
        axes.set(ylim=(max(NET_BENEFIT_FLOOR, -0.5 * top), top), xlim=(0, 1), xticks=[0, 0.5, 1])
        axes.set_title(wrap_name(name), fontsize=9 if len(names) > 1 else 11)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    handles = [
        Line2D([], [], color=COLORS[0], label="model"), Line2D([], [], color=COLORS[1], linestyle="--", label="all"),
        Line2D([], [], **CHANCE_STYLE, label="none"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.supxlabel("Threshold probability", fontsize=10)
    figure.supylabel("Net benefit per image", fontsize=10)
    return figure
