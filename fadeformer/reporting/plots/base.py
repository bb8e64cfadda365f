"""Training curves, confusion matrix and shared plotting code; functions return figures and change no global state."""

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

# Okabe-Ito palette, safe for color-blind readers; line styles distinguish curves with the same color
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
CHANCE_STYLE: dict[str, Any] = {"color": "0.6", "linestyle": (0, (1, 2))}
NAME_WIDTH = 26  # characters per line of a class name


def training_curves(history: pd.DataFrame, best_epoch: int) -> Figure:
    """Plot loss, accuracy and validation AUC by epoch.

    Args:
        history: one row per epoch: epoch, train_loss, val_loss, train_accuracy, val_accuracy, val_auc.
        best_epoch: epoch of the selected checkpoint.
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
        axes.axvline(best_epoch, color="0.4", linestyle=":", label=f"selected: epoch {best_epoch}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    return figure


def confusion_matrix(predictions: Predictions) -> Figure:
    """Plot a confusion matrix with row percentages; for multi-label tasks, the four outcomes of each finding."""
    num_classes = len(predictions.classes)
    truth = one_versus_rest(predictions.labels, num_classes, predictions.task)
    predicted = one_versus_rest(predictions.task.decide(predictions.scores), num_classes, predictions.task)
    names = [wrap_name(name) for name in predictions.classes]
    title = f"Confusion matrix, {len(truth)} images"
    if predictions.task.multi_label:
        outcomes = {
            "true\npositive": truth & predicted, "false\nnegative": truth & ~predicted,
            "false\npositive": ~truth & predicted, "true\nnegative": ~truth & ~predicted,
        }  # fmt: skip
        counts = np.stack([outcome.sum(axis=0) for outcome in outcomes.values()], axis=1)
        totals = np.repeat([counts[:, :2].sum(axis=1), counts[:, 2:].sum(axis=1)], 2, axis=0).T
        labels, legend = ("Finding", "Outcome at a score above 0.5"), "fraction of the positives or negatives"
        return _plot_heatmap(counts, _fractions(counts, totals), (names, list(outcomes)), labels, title, legend)
    counts = truth.T.astype(np.int64) @ predicted.astype(np.int64)
    totals = counts.sum(axis=1, keepdims=True).repeat(num_classes, axis=1)
    labels, legend = ("True class", "Predicted class"), "fraction of the true class"
    return _plot_heatmap(counts, _fractions(counts, totals), (names, names), labels, title, legend)


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Save a figure as PNG and SVG, reproducibly: the same figure gives the same bytes.

    The layout is computed once and reused, because matplotlib would recompute it, with a draw, for each format.
    """
    figure.dpi = dpi
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)
        figure.set_layout_engine(None)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png", metadata={"Software": None})
    # by default, SVG files contain random ids and the date
    with atomic_write(path.with_suffix(".svg")) as temporary, rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def panel_grid(
    count: int, *, panel_inches: float, single_panel_inches: float, share_x: bool = True, share_y: bool = True
) -> tuple[Figure, list[Axes]]:
    """Create a figure with a roughly square grid of panels.

    Args:
        count: number of panels.
        panel_inches: size of a panel.
        single_panel_inches: size of the panel if there is only one.
        share_x: True to share the x axis among all panels.
        share_y: True to share the y axis among all panels.
    """
    columns = max(1, min(6, math.ceil(math.sqrt(count))))
    rows = max(1, math.ceil(count / columns))
    inches = single_panel_inches if count <= 1 else panel_inches
    figure = Figure(figsize=(max(4.8, inches * columns), 0.9 + inches * 0.95 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share_x, sharey=share_y)
    for axes in list(grid.flat)[count:]:
        axes.set_axis_off()
    panels = list(grid.flat)[:count]
    for axes in panels[-columns:]:  # also the panels above an incomplete last row
        axes.tick_params(labelbottom=True)
    return figure, panels


def _plot_heatmap(
    counts: NDArray[np.int64],
    fractions: NDArray[np.float64],
    names: tuple[list[str], list[str]],
    labels: tuple[str, str],
    title: str,
    legend: str,
) -> Figure:
    """Plot counts colored by fraction; `names` and `labels` are (rows, columns)."""
    height, width = counts.shape
    cell = max(0.42, min(1.0, 9 / max(height, width)))  # inches
    figure = Figure(figsize=(3.2 + cell * max(width, 4), 1.7 + cell * max(height, 4)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    figure.colorbar(image, ax=axes, label=legend, shrink=0.8)
    has_room = cell > 0.6
    for (i, j), count in np.ndenumerate(counts):
        if count == 0 and not has_room:
            continue  # in a large matrix zeros would clutter the plot
        axes.text(
            j, i, f"{count}\n{100 * fractions[i, j]:.0f}%" if has_room else f"{count}", ha="center", va="center",
            fontsize=min(11.0, 18 * cell) * (0.9 if count < 1000 else 0.75),
            color="white" if fractions[i, j] > 0.55 else "black",
        )  # fmt: skip
    is_crowded = max(len(line) for name in names[1] for line in name.split("\n")) > 12 * cell
    axes.set_xticks(range(width), names[1], rotation=90 if is_crowded else 0, fontsize=9)
    axes.set_yticks(range(height), names[0], fontsize=9)
    axes.set(ylabel=labels[0], xlabel=labels[1], title=title)
    return figure


def _fractions(counts: NDArray[np.int64], totals: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)


def wrap_name(name: str) -> str:
    """Wrap a class name to at most two lines."""
    lines = textwrap.wrap(name.replace("(", " ("), NAME_WIDTH, max_lines=2, placeholder=" ...")
    return "\n".join(lines)
