"""Predictions or history to figures; each function returns a matplotlib figure and touches no global state."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fadeformer.evaluation.predictions import Predictions
from fadeformer.io.atomic import atomic_write
from fadeformer.tasks import one_versus_rest

# Okabe and Ito's colours, told apart with every kind of colour vision; line styles tell apart what repeats a colour.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
CHANCE_STYLE: dict[str, Any] = {"color": "0.6", "linestyle": (0, (1, 2))}
NAME_WIDTH = 26  # characters of a class name in one line


def training_curves(history: pd.DataFrame, best_epoch: int) -> Figure:
    """Loss, accuracy and validation AUC by epoch.

    Args:
        history: one row per epoch: epoch, train_loss, val_loss, train_accuracy, val_accuracy, val_auc.
        best_epoch: the epoch whose weights were kept.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    marker = {"marker": "o", "markersize": 3}
    epochs = history["epoch"]
    left.plot(epochs, history["train_loss"], color=COLORS[0], label="train", **marker)
    left.plot(epochs, history["val_loss"], color=COLORS[1], linestyle="--", label="validation", **marker)
    left.set(xlabel="Epoch", ylabel="Loss (cross-entropy, nats)", title="Loss")
    right.plot(epochs, history["train_accuracy"], color=COLORS[0], label="train accuracy", **marker)
    right.plot(epochs, history["val_accuracy"], color=COLORS[1], linestyle="--", label="validation accuracy", **marker)
    if history["val_auc"].notna().any():
        right.plot(epochs, history["val_auc"], color=COLORS[2], linestyle="-.", label="validation AUC", **marker)
    right.set(xlabel="Epoch", ylabel="Accuracy, AUC", title="Accuracy and AUC")
    for axes in (left, right):
        axes.axvline(best_epoch, color="0.4", linestyle=":", label=f"kept: epoch {best_epoch}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    return figure


def confusion_matrix(predictions: Predictions) -> Figure:
    """Counts, and their share of each row: true against predicted class, or the four outcomes of each finding."""
    count = len(predictions.classes)
    truth = one_versus_rest(predictions.labels, count, predictions.task)
    decided = one_versus_rest(predictions.task.decide(predictions.scores), count, predictions.task)
    names = [wrap_name(name) for name in predictions.classes]
    title = f"Confusion matrix, {len(truth)} images"
    if predictions.task.multi_label:
        outcomes = {
            "true\npositive": truth & decided, "false\nnegative": truth & ~decided,
            "false\npositive": ~truth & decided, "true\nnegative": ~truth & ~decided,
        }  # fmt: skip
        counts = np.stack([outcome.sum(axis=0) for outcome in outcomes.values()], axis=1)
        wholes = np.repeat([counts[:, :2].sum(axis=1), counts[:, 2:].sum(axis=1)], 2, axis=0).T
        labels, legend = ("Finding", "Outcome at a score above 0.5"), "share of the positives or negatives"
        return _plot_heatmap(counts, _fractions(counts, wholes), (names, list(outcomes)), labels, title, legend)
    counts = truth.T.astype(np.int64) @ decided.astype(np.int64)
    wholes = counts.sum(axis=1, keepdims=True).repeat(count, axis=1)
    labels, legend = ("True class", "Predicted class"), "share of the true class"
    return _plot_heatmap(counts, _fractions(counts, wholes), (names, names), labels, title, legend)


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Writes a PNG, and an SVG beside it, the same bytes for the same figure.

    The layout is made once, for both: matplotlib would make it anew, and draw the figure in vain, for each of the two.
    """
    figure.dpi = dpi
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)
        figure.set_layout_engine(None)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png", metadata={"Software": None})
    # else every SVG has identifiers and a date of its own
    with atomic_write(path.with_suffix(".svg")) as temporary, rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def panel_grid(
    count: int, *, panel_inches: float, single_panel_inches: float, share_x: bool = True, share_y: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each of some classes, in as many rows as columns.

    Args:
        count: of panels.
        panel_inches: of one of many, inches.
        single_panel_inches: of a single one.
        share_x: whether all have one scale below.
        share_y: whether all have one scale beside.
    """
    columns = max(1, min(6, math.ceil(math.sqrt(count))))
    rows = max(1, math.ceil(count / columns))
    inches = single_panel_inches if count <= 1 else panel_inches
    figure = Figure(figsize=(max(4.8, inches * columns), 0.9 + inches * 0.95 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share_x, sharey=share_y)
    for axes in list(grid.flat)[count:]:
        axes.set_axis_off()
    shown = list(grid.flat)[:count]
    for axes in shown[-columns:]:  # also where none is below, since the last row is not full
        axes.tick_params(labelbottom=True)
    return figure, shown


def _plot_heatmap(
    counts: NDArray[np.int64],
    shares: NDArray[np.float64],
    names: tuple[list[str], list[str]],
    labels: tuple[str, str],
    title: str,
    legend: str,
) -> Figure:
    """Draws counts coloured by share; names and labels are those of the rows, then of the columns."""
    height, width = counts.shape
    cell = max(0.42, min(1.0, 9 / max(height, width)))  # inches
    figure = Figure(figsize=(3.2 + cell * max(width, 4), 1.7 + cell * max(height, 4)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    figure.colorbar(image, ax=axes, label=legend, shrink=0.8)
    roomy = cell > 0.6
    for (i, j), count in np.ndenumerate(counts):
        if count == 0 and not roomy:
            continue  # in a large table the zeros would hide the rest
        axes.text(
            j, i, f"{count}\n{100 * shares[i, j]:.0f}%" if roomy else f"{count}", ha="center", va="center",
            fontsize=min(11.0, 18 * cell) * (0.9 if count < 1000 else 0.75),
            color="white" if shares[i, j] > 0.55 else "black",
        )  # fmt: skip
    crowded = max(len(line) for name in names[1] for line in name.split("\n")) > 12 * cell
    axes.set_xticks(range(width), names[1], rotation=90 if crowded else 0, fontsize=9)
    axes.set_yticks(range(height), names[0], fontsize=9)
    axes.set(ylabel=labels[0], xlabel=labels[1], title=title)
    return figure


def _fractions(counts: NDArray[np.int64], wholes: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(counts, wholes, out=np.zeros(counts.shape), where=wholes > 0)


def wrap_name(name: str) -> str:
    """A class name in at most two lines."""
    lines = textwrap.wrap(name.replace("(", " ("), NAME_WIDTH, max_lines=2, placeholder=" ...")
    return "\n".join(lines)
