"""For each image a PNG of what the network looked at when it called it what it did."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fadeformer.errors import UserError
from fadeformer.explain.cases import attribution_maps
from fadeformer.inference.classifier import Classifier
from fadeformer.io.atomic import atomic_write
from fadeformer.reporting.plots.cases import draw_overlay

DPI = 100
PANEL_INCHES = 2.2  # of a panel, inches


def write_overlays(
    classifier: Classifier,
    folder: Path,
    names: list[str],
    pixels: NDArray[np.uint8],
    called: NDArray[np.int64],
) -> None:
    """Writes the overlays of some images.

    Args:
        classifier: the model.
        folder: where they go, under the images' own names.
        names: of the images.
        pixels: uint8, (images, side, side, channels).
        called: the class that is explained, (images,).

    Raises:
        UserError: the network cannot be explained.
    """
    try:
        maps = attribution_maps(classifier, pixels, called)
    except ValueError as error:
        raise UserError(f"this network cannot be explained: {error}; leave --explain out") from error
    for place, name in enumerate(names):
        figure = Figure(figsize=(PANEL_INCHES * (1 + len(maps)), PANEL_INCHES + 0.3), layout="constrained")
        first, *others = figure.subplots(1, 1 + len(maps))
        image = pixels[place].squeeze()
        first.imshow(image, cmap="gray", vmin=0, vmax=255)
        first.set_title(classifier.classes[called[place]], fontsize=8)
        first.set_axis_off()
        for axes, (told, of) in zip(others, maps.items(), strict=True):
            draw_overlay(axes, image, of[place])
            axes.set_title(told, fontsize=8)
            axes.set_axis_off()
        with atomic_write(overlay_path(folder, name)) as temporary:
            figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})


def overlay_path(folder: Path, name: str) -> Path:
    """Where an image's overlay stands; a name that leads out of the folder stays in it."""
    parts = ["__" if part == ".." else part for part in PurePosixPath(name).parts if part not in ("/", ".")]
    return folder.joinpath(*parts[:-1], f"{parts[-1]}.png")
