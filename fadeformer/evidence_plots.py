"""Figures of how sure, how calibrated and how useful a model is; each function returns a matplotlib figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fadeformer import resampling
from fadeformer.metrics import one_versus_rest, shown_classes
from fadeformer.plots import COLOURS, short
from fadeformer.predictions import Predictions
from fadeformer.proportions import share_interval
from fadeformer.summary import told

BINS = 10  # of the reliability diagram, of equal mass
FLOOR = -0.05  # of net benefit in the figure: far below 0 no threshold is of use


def auc_forest(
    predictions: Predictions, summary: Mapping[str, Any], intervals: Mapping[str, Any], confidence: float
) -> Figure:
    """AUC of every class or finding with its interval and number of positives, the best first; below them the mean.

    Args:
        predictions: of one split.
        summary: of `fadeformer.summary.summarise`.
        intervals: of `fadeformer.summary.intervals`.
        confidence: of the intervals.
    """
    names = [predictions.classes[c] for c in shown_classes(predictions)]
    judged = [(name, summary["per_class"][name]) for name in names if summary["per_class"][name]["auc"] is not None]
    judged.sort(key=lambda item: -item[1]["auc"])
    rows = [
        (short(name), v["auc"], intervals["per_class"][name]["auc"], f"{v['support']:,} of {summary['images']:,}")
        for name, v in judged
    ]
    if len(judged) > 1:
        rows.append(("mean", summary["overall"]["auc"], intervals["overall"]["auc"], f"{summary['images']:,} images"))
    rows += [(short(name), None, None, "not judged") for name in names if name in summary["not_judged"]]
    figure = Figure(figsize=(9, 1.3 + 0.36 * max(len(rows), 2)), layout="constrained")
    axes = figure.add_subplot()
    lowest = min([0.5, *(bound[0] for _, _, bound, _ in rows if bound is not None), *(row[1] or 1 for row in rows)])
    axes.axvline(0.5, color="0.6", linestyle=(0, (1, 2)))
    for place, (name, area, bound, count) in enumerate(rows):
        whole = name == "mean" and count.endswith("images")
        colour = COLOURS[1] if whole else COLOURS[0]
        if area is not None:
            if bound is not None:
                axes.plot(bound, [place, place], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot([area], [place], color=colour, marker="D" if whole else "s", markersize=6)
        figures = "" if area is None else told(area, bound)
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


def reliability(predictions: Predictions, error: float | None, confidence: float) -> Figure:
    """Share that is right, or positive, against the score, in bins of equal mass with intervals.

    Below it the scores. Of two classes it is the last one's score, of more that of the decision, of findings those of
    all of them.

    Args:
        predictions: of one split.
        error: the calibration error, for the title.
        confidence: of the intervals.
    """
    scores, task = predictions.scores, predictions.task
    groups = resampling.group_numbers(predictions.frame["group"])
    truth = one_versus_rest(predictions.labels, scores.shape[1], task)
    if task.multi_label:
        score, outcome, what = scores.ravel(), truth.ravel(), "findings present"
        groups = groups.repeat(scores.shape[1])
    elif scores.shape[1] == 2:
        score, outcome, what = scores[:, 1], truth[:, 1], f"{predictions.classes[1]}"
    else:
        score = scores.max(axis=1)
        outcome, what = (task.decide(scores) == predictions.labels)[:, 0], "right decisions"
    bins = np.searchsorted(np.unique(np.quantile(score, np.arange(1, BINS) / BINS)), score, side="right")
    figure = Figure(figsize=(5.2, 6), layout="constrained")
    axes, below = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
    axes.plot([0, 1], [0, 1], color="0.6", linestyle=(0, (1, 2)), label="perfect calibration")
    found = []
    for number in np.unique(bins):
        inside = bins == number
        share = outcome[inside].mean()
        low, high = share_interval(outcome, inside, groups, confidence) or (share, share)
        found.append((score[inside].mean(), share, low, high))
    place, share, low, high = np.array(found).T
    errors = np.abs(np.stack([share - low, high - share]))
    label = f"share with {100 * confidence:g} % interval"
    axes.errorbar(place, share, yerr=errors, color=COLOURS[0], marker="o", markersize=4, capsize=2, label=label)
    title = "Reliability" if error is None else f"Reliability, calibration error {error:.3f}"
    axes.set(ylabel=f"Share: {short(what)}", title=title, ylim=(-0.02, 1.02), xlim=(-0.02, 1.02))
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    axes.grid(alpha=0.3)
    below.hist(score, bins=np.linspace(0, 1, 41).tolist(), color=COLOURS[0])
    below.set(xlabel="Score", ylabel="Count")
    return figure


def decision_curves(benefit: pd.DataFrame) -> Figure:
    """Net benefit by threshold probability, of the model, of calling all positive, and of calling none.

    Args:
        benefit: of `fadeformer.operating.net_benefit`.
    """
    names = list(benefit["class"].unique())
    columns = max(1, min(5, math.ceil(math.sqrt(len(names)))))
    rows = max(1, math.ceil(len(names) / columns))
    side = 4.6 if len(names) == 1 else 2.3
    figure = Figure(figsize=(max(4.8, side * columns), 0.9 + max(3.6 if rows == 1 else 0, side * 0.85 * rows)))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes, name in zip(grid.flat, names, strict=False):
        of_class = benefit[benefit["class"] == name]
        axes.plot(of_class["probability"], of_class["all"], color=COLOURS[1], linestyle="--", linewidth=1.2)
        axes.plot(of_class["probability"], of_class["model"], color=COLOURS[0], linewidth=1.6)
        axes.axhline(0, color="0.4", linestyle=(0, (1, 2)))
        top = max(0.02, 1.1 * max(of_class["model"].max(), of_class["all"].max()))
        axes.set(
            ylim=(max(FLOOR, -0.5 * top), top), xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1] if side > 3 else [0, 0.5, 1]
        )
        axes.set_title(short(name), fontsize=9 if len(names) > 1 else 11)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(names) :]:
        axes.set_axis_off()
    handles = [
        Line2D([], [], color=COLOURS[0], label="model"), Line2D([], [], color=COLOURS[1], linestyle="--", label="all"),
        Line2D([], [], color="0.4", linestyle=(0, (1, 2)), label="none"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.supxlabel("Threshold probability", fontsize=10)
    figure.supylabel("Net benefit per image", fontsize=10)
    return figure
