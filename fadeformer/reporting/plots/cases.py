"""Figures of single images: gallery of the most confident errors, overlays of maps, and a feature embedding."""

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
MAX_SHARED_CLASSES = 7  # classes that colors can distinguish
GALLERY_COLUMNS = 6  # images per row
CAPTION_WIDTH = 20  # characters per line below an image


def case_gallery(errors: pd.DataFrame, pixels: NDArray[np.uint8], maps: Mapping[str, NDArray[np.float64]]) -> Figure:
    """Plot the most confident errors with their predicted classes, and the attribution maps below each.

    Args:
        errors: from `fadeformer.evaluation.error_gallery.most_confident_errors`.
        pixels: images of these rows, uint8, (images, side, side, channels).
        maps: attribution maps by name, (images, side, side); negative values are evidence against the class.
    """
    if errors.empty:
        figure = Figure(figsize=(4.8, 1.2))
        figure.text(0.5, 0.5, "No errors on test", ha="center", va="center")
        return figure
    columns, panels_per_image = min(GALLERY_COLUMNS, max(3, len(errors))), 1 + len(maps)
    blocks = math.ceil(len(errors) / columns)
    figure = Figure(figsize=(1.75 * columns, blocks * (0.75 + 1.65 * panels_per_image) + 0.4), layout="constrained")
    grid = figure.subplots(blocks * panels_per_image, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for index, (_, row) in enumerate(errors.iterrows()):
        block, column = divmod(index, columns)
        image = pixels[index].squeeze()
        image_axes = grid[block * panels_per_image, column]
        image_axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        lines = [f"predicted: {row['predicted']}, {row['score']:.2f}", f"true: {row['true']}"]
        image_axes.set_title("\n".join(_wrap_caption(line) for line in lines), fontsize=7)
        for offset, (name, method_maps) in enumerate(maps.items(), start=1):
            axes = grid[block * panels_per_image + offset, column]
            draw_overlay(axes, image, method_maps[index])
            if column == 0:
                axes.set_title(name, fontsize=7, loc="left")
    return figure


def draw_overlay(axes: Axes, image: NDArray[np.uint8], heatmap: NDArray[np.float64]) -> None:
    """Draw an attribution map over its grayscale image: orange is evidence for the class, purple against it.

    Args:
        axes: axes to draw on.
        image: (side, side) or (side, side, 3).
        heatmap: attribution map, (side, side).
    """
    limit = max(float(np.abs(heatmap).max()), np.finfo(float).tiny)
    axes.imshow(image if image.ndim == 2 else image.mean(axis=2), cmap="gray", vmin=0, vmax=255)
    axes.imshow(heatmap, cmap="PuOr_r", vmin=-limit, vmax=limit, alpha=0.6)


def embedding_scatter(
    predictions: Predictions, coordinates: pd.DataFrame, explained_variance: Sequence[float]
) -> Figure:
    """Plot the images in the plane of the first two principal components of their features, colored by label.

    Args:
        predictions: predictions on one split.
        coordinates: columns x and y, one row per image in the same order.
        explained_variance: explained variance ratio of each component.
    """
    names, task = predictions.classes, predictions.task
    truth = one_versus_rest(predictions.labels, len(names), task)
    members = {name: truth[:, c] for c, name in enumerate(names) if truth[:, c].any()}
    if task.multi_label:
        members["no finding"] = np.asarray(~truth.any(axis=1))
    is_shared = len(members) <= MAX_SHARED_CLASSES and not task.multi_label
    columns = 1 if is_shared else min(6, math.ceil(math.sqrt(len(members))))
    rows = 1 if is_shared else math.ceil(len(members) / columns)
    size = (6.8, 4.6) if is_shared else (max(4.8, 1.9 * columns), 0.8 + 1.9 * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    marker_style = {"s": 12.0 if len(truth) < 1500 else 4.0, "linewidths": 0, "rasterized": True}
    for axes in list(grid.flat)[1 if is_shared else len(members) :]:
        axes.set_axis_off()
    for number, (name, is_member) in enumerate(members.items()):
        axes = grid.flat[0 if is_shared else number]
        points = coordinates[is_member]
        if is_shared:
            axes.scatter(
                points["x"], points["y"], color=COLORS[number], marker=MARKERS[number], alpha=0.65,
                label=f"{wrap_name(name)} ({int(is_member.sum()):,})", **marker_style,
            )  # fmt: skip
        else:
            axes.scatter(coordinates["x"], coordinates["y"], color="0.85", **marker_style)
            axes.scatter(points["x"], points["y"], color=COLORS[0], alpha=0.65, **marker_style)
            axes.set_title(f"{wrap_name(name)} ({int(is_member.sum()):,})", fontsize=8)
        axes.tick_params(labelsize=7)
    if is_shared:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False, markerscale=2)
    figure.supxlabel(f"First component ({100 * explained_variance[0]:.0f} % of the variance)", fontsize=9)
    figure.supylabel(f"Second component ({100 * explained_variance[1]:.0f} %)", fontsize=9)
    figure.suptitle("Features of the test images (PCA)", fontsize=10)
    return figure


def _wrap_caption(line: str) -> str:
    return "\n".join(textwrap.wrap(line, max(CAPTION_WIDTH, NAME_WIDTH - 2), max_lines=2, placeholder=" ..."))
