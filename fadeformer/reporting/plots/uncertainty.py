"""Figures of how sure, how calibrated and how useful a model is; each function returns a matplotlib figure."""

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

N_BINS = 10  # of the reliability diagram, of equal mass
NET_BENEFIT_FLOOR = -0.05  # of net benefit in the figure: far below 0 no threshold is of use


def auc_forest(
    predictions: Predictions, summary: Mapping[str, Any], intervals: Mapping[str, Any], confidence: float
) -> Figure:
    """AUC of every class or finding with its interval and number of positives, the best first; below them the mean.

    Args:
        predictions: of one split.
        summary: of `fadeformer.evaluation.summary.summarize`.
        intervals: of `fadeformer.evaluation.summary.confidence_intervals`.
        confidence: of the intervals.
    """
    names = [predictions.classes[c] for c in curve_classes(predictions)]
    judged = [(name, summary["per_class"][name]) for name in names if summary["per_class"][name]["auc"] is not None]
    judged.sort(key=lambda item: -item[1]["auc"])
    rows = [
        (wrap_name(name), v["auc"], intervals["per_class"][name]["auc"], f"{v['support']:,} of {summary['images']:,}")
        for name, v in judged
    ]
    if len(judged) > 1:
        rows.append(("mean", summary["overall"]["auc"], intervals["overall"]["auc"], f"{summary['images']:,} images"))
    rows += [(wrap_name(name), None, None, "not evaluated") for name in names if name in summary["not_evaluated"]]
    figure = Figure(figsize=(9, 1.3 + 0.36 * max(len(rows), 2)), layout="constrained")
    axes = figure.add_subplot()
    lowest = min([0.5, *(bound[0] for _, _, bound, _ in rows if bound is not None), *(row[1] or 1 for row in rows)])
    axes.axvline(0.5, **CHANCE_STYLE)
    for place, (name, area, bound, count) in enumerate(rows):
        whole = name == "mean" and count.endswith("images")
        colour = COLORS[1] if whole else COLORS[0]
        if area is not None:
            if bound is not None:
                axes.plot(bound, [place, place], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot([area], [place], color=colour, marker="D" if whole else "s", markersize=6)
        figures = "" if area is None else format_with_interval(area, bound)
        axes.annotate(
            count if area is None else f"{figures},  n = {count}", (1.0, place),
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
    """Share that is right, or positive, against the score, in bins of equal mass with intervals; grey: uncalibrated.

    Below it the scores. Of two classes it is the last one's score, of more that of the decision, of findings those of
    all of them.

    Args:
        predictions: of one split.
        errors: the calibration error before calibration and after it, for the legend.
        confidence: of the intervals.
    """
    figure = Figure(figsize=(5.2, 6), layout="constrained")
    axes, below = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
    axes.plot([0, 1], [0, 1], **CHANCE_STYLE, label="perfect calibration")
    groups = bootstrap.encode_groups(predictions.frame["group"])
    raw = predictions.before_calibration()
    changed = not np.array_equal(raw.scores, predictions.scores)
    what = ""
    for part, error, colour, style, name in (
        (raw, errors[0], "0.45", "--", "before calibration"),
        (predictions, errors[1], COLORS[0], "-", "after calibration" if changed else "share"),
    ):  # fmt: skip
        if part is raw and not changed:
            continue
        score, outcome, of_image, what = _calibration_scores(part, groups)
        bins = np.searchsorted(np.unique(np.quantile(score, np.arange(1, N_BINS) / N_BINS)), score, side="right")
        found = []
        for number in np.unique(bins):
            inside = bins == number
            share = outcome[inside].mean()
            low, high = proportion_interval(outcome, inside, of_image, confidence) or (share, share)
            found.append((score[inside].mean(), share, low, high))
        place, share, low, high = np.array(found).T
        label = name if error is None else f"{name}, calibration error {error:.3f}"
        spread = None if part is raw else np.abs(np.stack([share - low, high - share]))
        axes.errorbar(
            place, share, yerr=spread, color=colour, linestyle=style, marker="o", markersize=4, capsize=2, label=label
        )
        below.hist(score, bins=np.linspace(0, 1, 41).tolist(), color=colour, histtype="step", linestyle=style)
    title = f"Reliability with {100 * confidence:g} % intervals"
    axes.set(ylabel=f"Share: {wrap_name(what)}", title=title, ylim=(-0.02, 1.02), xlim=(-0.02, 1.02))
    figure.legend(loc="outside upper center", frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    below.set(xlabel="Score", ylabel="Count")
    return figure


def _calibration_scores(
    predictions: Predictions, groups: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64], str]:
    """Scores whose calibration is looked at, what came true, the group of each, and what that is."""
    scores, task = predictions.scores, predictions.task
    truth = one_versus_rest(predictions.labels, scores.shape[1], task)
    if task.multi_label:
        return scores.ravel(), truth.ravel(), groups.repeat(scores.shape[1]), "findings present"
    if scores.shape[1] == 2:
        return scores[:, 1], truth[:, 1], groups, predictions.classes[1]
    return scores.max(axis=1), (task.decide(scores) == predictions.labels)[:, 0], groups, "right decisions"


def score_histograms(predictions: Predictions) -> Figure:
    """Scores of the images of each class or finding, and of all others, each as a share of its own."""
    scores, task = predictions.scores, predictions.task
    truth = one_versus_rest(predictions.labels, scores.shape[1], task)
    shown = list(curve_classes(predictions))
    figure, plots = panel_grid(len(shown), panel_inches=2.1, single_panel_inches=4.2, share_y=False)
    edges = np.linspace(0, 1, 26)
    for axes, c in zip(plots, shown, strict=True):
        for rows, colour, style in ((~truth[:, c], COLORS[1], "--"), (truth[:, c], COLORS[0], "-")):
            if rows.any():
                shares = np.histogram(scores[rows, c], edges)[0] / rows.sum()
                axes.stairs(shares, edges, color=colour, linestyle=style, fill=False, linewidth=1.4)
                axes.stairs(shares, edges, color=colour, fill=True, alpha=0.15)
        axes.set_title(f"{wrap_name(predictions.classes[c])} ({int(truth[:, c].sum()):,})", fontsize=8)
        axes.set(xlim=(0, 1), xticks=[0, 0.5, 1])
        axes.tick_params(labelsize=8)
    handles = [
        Line2D([], [], color=COLORS[0], label="images with it"),
        Line2D([], [], color=COLORS[1], linestyle="--", label="images without it"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.supxlabel("Score", fontsize=10)
    figure.supylabel("Share of the images", fontsize=10)
    return figure


def subgroup_forest(
    summary: Mapping[str, Any], intervals: Mapping[str, Any], subgroups: Mapping[str, Any], confidence: float
) -> Figure:
    """AUC and balanced accuracy of every subgroup with intervals, beside those of the whole; marked where worse.

    Args:
        summary: of `fadeformer.evaluation.summary.summarize`.
        intervals: of `fadeformer.evaluation.summary.confidence_intervals`.
        subgroups: of `fadeformer.evaluation.subgroups.evaluate_subgroups`.
        confidence: of the intervals.
    """
    rows: list[tuple[str, Any, Any, str, bool]] = [
        ("all images", summary["overall"], intervals["overall"], f"{summary['images']:,}", False)
    ]
    for column, values in subgroups.items():
        for value, of in values.items():
            flagged = any(one["worse"] for one in of["comparisons"])
            count = f"{of['images']:,}" + ("" if of["comparisons"] else ", not compared")
            rows.append((f"{column}: {wrap_name(value)}", of["overall"], of["intervals"]["overall"], count, flagged))
    figure = Figure(figsize=(10.5, 1.5 + 0.34 * max(len(rows), 2)), layout="constrained")
    plots = figure.subplots(1, 2, sharey=True)
    for axes, (key, name) in zip(plots, {"auc": "AUC", "balanced_accuracy": "Balanced accuracy"}.items(), strict=True):
        if rows[0][1][key] is not None:
            axes.axvline(rows[0][1][key], **CHANCE_STYLE)
        for place, (_, numbers, bounds, _, flagged) in enumerate(rows):
            value, bound = numbers[key], bounds[key]
            if value is None:
                axes.annotate("not evaluated", (0.02, place), xycoords=("axes fraction", "data"), fontsize=8, va="center")
                continue
            colour = COLORS[1] if flagged else COLORS[0]
            if bound is not None:
                axes.plot(bound, [place, place], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot([value], [place], color=colour, marker="v" if flagged else "s", markersize=6)
        low = min([b[key][0] for _, _, b, _, _ in rows if b[key] is not None] or [0.5])
        axes.set(xlabel=name, xlim=(max(-0.01, low - 0.05), 1.01), ylim=(len(rows) - 0.4, -0.6))
        axes.grid(axis="x", alpha=0.3)
    plots[0].set_yticks(range(len(rows)), [f"{row[0]} ({row[3]})" for row in rows], fontsize=9)
    handles = [
        Line2D([], [], color=COLORS[0], marker="s", label=f"with {100 * confidence:g} % interval"),
        Line2D([], [], color=COLORS[1], marker="v", label="in some measure worse than the whole beyond chance"),
        Line2D([], [], **CHANCE_STYLE, label="all images"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def decision_curves(benefit: pd.DataFrame) -> Figure:
    """Net benefit by threshold probability, of the model, of calling all positive, and of calling none.

    Args:
        benefit: of `fadeformer.evaluation.operating_points.net_benefit`.
    """
    names = list(benefit["class"].unique())
    figure, plots = panel_grid(len(names), panel_inches=2.2, single_panel_inches=4.6, share_y=False)
    for axes, name in zip(plots, names, strict=True):
        of_class = benefit[benefit["class"] == name]
        axes.plot(of_class["probability"], of_class["all"], color=COLORS[1], linestyle="--", linewidth=1.2)
        axes.plot(of_class["probability"], of_class["model"], color=COLORS[0], linewidth=1.6)
        axes.axhline(0, **CHANCE_STYLE)
        top = max(0.02, 1.1 * max(of_class["model"].max(), of_class["all"].max()))
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
