"""Write a PNG with the attribution maps of the predicted class for each image."""

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
PANEL_INCHES = 2.2


def write_overlays(
    classifier: Classifier,
    folder: Path,
    names: list[str],
    pixels: NDArray[np.uint8],
    predicted: NDArray[np.int64],
) -> None:
    """Write one PNG per image: the image and an overlay of each attribution map.

    Args:
        classifier: the model.
        folder: destination folder; files are named after the images.
        names: names of the images, may include folders.
        pixels: images, uint8, (images, side, side, channels).
        predicted: class to explain for each image, (images,).

    Raises:
        UserError: the network has no spatial feature map.
    """
    try:
        maps = attribution_maps(classifier, pixels, predicted)
    except ValueError as error:
        raise UserError(f"this network cannot be explained: {error}; leave --explain out") from error
    for index, name in enumerate(names):
        figure = Figure(figsize=(PANEL_INCHES * (1 + len(maps)), PANEL_INCHES + 0.3), layout="constrained")
        first, *others = figure.subplots(1, 1 + len(maps))
        image = pixels[index].squeeze()
        first.imshow(image, cmap="gray", vmin=0, vmax=255)
        first.set_title(classifier.classes[predicted[index]], fontsize=8)
        first.set_axis_off()
        for axes, (title, method_maps) in zip(others, maps.items(), strict=True):
            draw_overlay(axes, image, method_maps[index])
            axes.set_title(title, fontsize=8)
            axes.set_axis_off()
        with atomic_write(overlay_path(folder, name)) as temporary:
            figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})


def overlay_path(folder: Path, name: str) -> Path:
    """Return the path of an image's overlay; `..` and absolute paths in the name cannot leave the folder."""
    parts = ["__" if part == ".." else part for part in PurePosixPath(name).parts if part not in ("/", ".")]
    return folder.joinpath(*parts[:-1], f"{parts[-1]}.png")
