"""ROC and precision-recall curves with confidence bands; each function returns a matplotlib figure.

Up to three curves share one plot; with more classes each gets a panel, because overlapping bands are unreadable.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fadeformer.evaluation.metrics import pr_curve_points, roc_curve_points
from fadeformer.evaluation.predictions import Predictions
from fadeformer.io.formatting import format_with_interval
from fadeformer.reporting.plots.base import CHANCE_STYLE, COLORS, LINE_STYLES, panel_grid, wrap_name

MAX_SHARED_CURVES = 3  # curves in one plot
BAND_ALPHA = 0.18  # opacity


def roc_curves(
    predictions: Predictions, summary: Mapping[str, Any], intervals: Mapping[str, Any], bands: pd.DataFrame
) -> Figure:
    """Plot the ROC curve of each class with its AUC and confidence band.

    Args:
        predictions: predictions on one split.
        summary: from `fadeformer.evaluation.summary.summarize`.
        intervals: from `fadeformer.evaluation.summary.confidence_intervals`.
        bands: from `fadeformer.evaluation.intervals.curve_bands.compute_bands`.
    """
    points = roc_curve_points(predictions).rename(columns={"fpr": "x", "tpr": "y"})
    labels = {
        name: ("AUC", format_with_interval(*pair)) for name, pair in _class_values(summary, intervals, "auc").items()
    }
    figure, plots = _plot_curves(points, bands[bands["curve"] == "roc"], labels, legend_loc="lower right")
    for axes in plots:
        axes.plot([0, 1], [0, 1], **CHANCE_STYLE)
    title = "ROC" + _mean_label(summary, intervals, "auc", "AUC", len(labels))
    return _add_labels(
        figure, title, summary, ("1 - specificity (false positive rate)", "Sensitivity (true positive rate)")
    )


def pr_curves(
    predictions: Predictions, summary: Mapping[str, Any], intervals: Mapping[str, Any], bands: pd.DataFrame
) -> Figure:
    """Plot the precision-recall curve of each class with average precision, confidence band and prevalence (dotted).

    Arguments are those of `roc_curves`.
    """
    points = pr_curve_points(predictions).rename(columns={"recall": "x", "precision": "y"})
    labels = {
        name: ("AP", format_with_interval(*pair))
        for name, pair in _class_values(summary, intervals, "average_precision").items()
    }
    figure, plots = _plot_curves(points, bands[bands["curve"] == "pr"], labels, legend_loc="lower left")
    names = list(points["class"].unique())
    for index, name in enumerate(names):
        prevalence = summary["per_class"][name]["prevalence"]
        axes = plots[index] if len(plots) > 1 else plots[0]
        color = COLORS[index % len(COLORS)] if len(plots) == 1 else CHANCE_STYLE["color"]
        axes.axhline(prevalence, color=color, linestyle=CHANCE_STYLE["linestyle"], linewidth=1)
    mean = _mean_label(summary, intervals, "average_precision", "AP", len(labels))
    return _add_labels(
        figure, f"Precision-recall{mean}", summary, ("Recall (sensitivity)", "Precision (positive predictive value)"),
        dotted_label="prevalence (chance)",
    )  # fmt: skip


def _class_values(summary: Mapping[str, Any], intervals: Mapping[str, Any], key: str) -> dict[str, tuple[Any, Any]]:
    return {
        name: (values[key], intervals["per_class"][name][key])
        for name, values in summary["per_class"].items()
        if values[key] is not None
    }


def _mean_label(
    summary: Mapping[str, Any], intervals: Mapping[str, Any], key: str, metric: str, num_classes: int
) -> str:
    value = summary["overall"][key]
    if value is None or num_classes < 3:
        return ": no class can be evaluated" if value is None else ""
    return f", mean {metric} {format_with_interval(value, intervals['overall'][key])}"


def _plot_curves(
    points: pd.DataFrame,
    bands: pd.DataFrame,
    labels: Mapping[str, tuple[str, str]],
    *,
    legend_loc: Literal["lower right", "lower left"],
) -> tuple[Figure, list[Axes]]:
    names = list(points["class"].unique())
    is_shared = len(names) <= MAX_SHARED_CURVES
    figure, plots = panel_grid(1 if is_shared else len(names), panel_inches=2.2, single_panel_inches=4.6)
    for index, name in enumerate(names):
        axes = plots[0 if is_shared else index]
        color = COLORS[index % len(COLORS)] if is_shared else COLORS[0]
        class_points, band = points[points["class"] == name], bands[bands["class"] == name]
        metric, value = labels[name]
        style = LINE_STYLES[index] if is_shared else "-"
        axes.fill_between(band["x"], band["low"], band["high"], color=color, alpha=BAND_ALPHA, linewidth=0)
        axes.plot(
            class_points["x"],
            class_points["y"],
            color=color,
            linestyle=style,
            label=f"{wrap_name(name)}\n{metric} {value}",
        )
        if not is_shared:
            axes.set_title(f"{wrap_name(name)}\n{value}", fontsize=8)
    if is_shared and names:
        plots[0].legend(loc=legend_loc, fontsize=8, framealpha=0.85)
    ticks = [0, 0.25, 0.5, 0.75, 1] if is_shared else [0, 0.5, 1]
    for axes in plots:
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal", xticks=ticks, yticks=ticks)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    return figure, plots


def _add_labels(
    figure: Figure, title: str, summary: Mapping[str, Any], labels: tuple[str, str], dotted_label: str = "chance"
) -> Figure:
    figure.supxlabel(labels[0], fontsize=10)
    figure.supylabel(labels[1], fontsize=10)
    handles = [
        Line2D([], [], color=COLORS[0], label="curve"), Patch(color=COLORS[0], alpha=BAND_ALPHA, label="interval"),
        Line2D([], [], **CHANCE_STYLE, label=dotted_label),
    ]  # fmt: skip
    not_evaluated = ", ".join(wrap_name(name).replace("\n", " ") for name in summary["not_evaluated"])
    lines = [title, *textwrap.wrap(f"not evaluated: {not_evaluated}", 80)] if not_evaluated else [title]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=8, title="\n".join(lines),
        title_fontsize=10,
    )  # fmt: skip
    return figure
