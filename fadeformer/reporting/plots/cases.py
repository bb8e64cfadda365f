"""Figures of single images: the mistakes made with most confidence, and where images lie by their features."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fadeformer.evaluation.predictions import Predictions
from fadeformer.reporting.plots.base import COLORS, NAME_WIDTH, wrap_name
from fadeformer.tasks import one_versus_rest

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAX_SHARED_CLASSES = 7  # classes that colours tell apart
GALLERY_COLUMNS = 6  # images in a row
CAPTION_WIDTH = 20  # characters in a line below an image


def case_gallery(wrong: pd.DataFrame, pixels: NDArray[np.uint8], maps: Mapping[str, NDArray[np.float64]]) -> Figure:
    """The most wrong images with what was called, and below each what the model looked at.

    Args:
        wrong: of `fadeformer.evaluation.error_gallery.most_confident_errors`.
        pixels: of these images, uint8, (images, side, side, channels).
        maps: by name, (images, side, side); what speaks against the class is below 0.
    """
    if wrong.empty:
        figure = Figure(figsize=(4.8, 1.2), layout="constrained")
        figure.text(0.5, 0.5, "No test image is wrong", ha="center", va="center")
        return figure
    columns, strips = min(GALLERY_COLUMNS, max(3, len(wrong))), 1 + len(maps)
    blocks = math.ceil(len(wrong) / columns)
    figure = Figure(figsize=(1.75 * columns, blocks * (0.75 + 1.65 * strips) + 0.4), layout="constrained")
    grid = figure.subplots(blocks * strips, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for place, (_, row) in enumerate(wrong.iterrows()):
        block, column = divmod(place, columns)
        image = pixels[place].squeeze()
        top = grid[block * strips, column]
        top.imshow(image, cmap="gray", vmin=0, vmax=255)
        lines = [f"predicted: {row['predicted']}, {row['score']:.2f}", f"true: {row['true']}"]
        top.set_title("\n".join(_wrap_caption(line) for line in lines), fontsize=7)
        for below, (name, of) in enumerate(maps.items(), start=1):
            axes = grid[block * strips + below, column]
            draw_overlay(axes, image, of[place])
            if column == 0:
                axes.set_title(name, fontsize=7, loc="left")
    return figure


def draw_overlay(axes: Axes, image: NDArray[np.uint8], found: NDArray[np.float64]) -> None:
    """A map laid on its image in grey: orange speaks for the class, purple against it.

    Args:
        axes: where it is drawn.
        image: (side, side) or (side, side, 3).
        found: (side, side).
    """
    most = max(float(np.abs(found).max()), np.finfo(float).tiny)
    axes.imshow(image if image.ndim == 2 else image.mean(axis=2), cmap="gray", vmin=0, vmax=255)
    axes.imshow(found, cmap="PuOr_r", vmin=-most, vmax=most, alpha=0.6)


def embedding_scatter(predictions: Predictions, places: pd.DataFrame, explained: Sequence[float]) -> Figure:
    """Where images lie by the features that the classifier sees, in the two directions of most spread.

    Args:
        predictions: of one split.
        places: columns x and y, one row per image in the same order.
        explained: share of the variance that each direction holds.
    """
    names, task = predictions.classes, predictions.task
    truth = one_versus_rest(predictions.labels, len(names), task)
    kinds = {name: truth[:, c] for c, name in enumerate(names) if truth[:, c].any()}
    if task.multi_label:
        kinds["no finding"] = np.asarray(~truth.any(axis=1))
    together = len(kinds) <= MAX_SHARED_CLASSES and not task.multi_label
    columns = 1 if together else min(6, math.ceil(math.sqrt(len(kinds))))
    rows = 1 if together else math.ceil(len(kinds) / columns)
    size = (6.8, 4.6) if together else (max(4.8, 1.9 * columns), 0.8 + 1.9 * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    dot = {"s": 12.0 if len(truth) < 1500 else 4.0, "linewidths": 0, "rasterized": True}
    for axes in list(grid.flat)[1 if together else len(kinds) :]:
        axes.set_axis_off()
    for number, (name, inside) in enumerate(kinds.items()):
        axes = grid.flat[0 if together else number]
        of_kind = places[inside]
        if together:
            axes.scatter(
                of_kind["x"], of_kind["y"], color=COLORS[number], marker=MARKERS[number], alpha=0.65,
                label=f"{wrap_name(name)} ({int(inside.sum()):,})", **dot,
            )  # fmt: skip
        else:
            axes.scatter(places["x"], places["y"], color="0.85", **dot)
            axes.scatter(of_kind["x"], of_kind["y"], color=COLORS[0], alpha=0.65, **dot)
            axes.set_title(f"{wrap_name(name)} ({int(inside.sum()):,})", fontsize=8)
        axes.tick_params(labelsize=7)
    if together:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False, markerscale=2)
    figure.supxlabel(f"First direction ({100 * explained[0]:.0f} % of the variance)", fontsize=9)
    figure.supylabel(f"Second direction ({100 * explained[1]:.0f} %)", fontsize=9)
    figure.suptitle("Features of the test images (PCA)", fontsize=10)
    return figure


def _wrap_caption(line: str) -> str:
    return "\n".join(textwrap.wrap(line, max(CAPTION_WIDTH, NAME_WIDTH - 2), max_lines=2, placeholder=" ..."))
