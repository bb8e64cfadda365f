"""Synthetic data set `phantom`: generated blood smear images, so that the pipeline runs without any download.

Five types of white blood cell among red cells, imbalanced as in blood, differ as real ones do: in size, lobes of the
nucleus, granules and color of the cytoplasm. Stain and tint vary between slides, focus and stain uptake between images;
together with overlapping sizes and shapes this makes the classification hard. There is no label noise. Every image is
synthetic: results say nothing about patients.

Besides the cell type (multi-class) there are two more tasks: the Arneth (1904) class of a neutrophil, one to five lobes
(ordinal), and up to three cells per image, where each cell type is a finding (multi-label).

The same arguments give the same bytes on every machine. The code therefore uses only elementwise operations that IEEE
754 defines exactly (+ - * / sqrt, comparisons, floor) and uniform random draws: the results of exp, sin or a sum over
an axis depend on the CPU's vector instructions.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fadeformer.data.dataset_card import SPLITS
from fadeformer.data.sources.phantom.cells import (
    BACKGROUND,
    CELL_TYPES,
    Canvas,
    CellType,
    paint_red_cells,
    paint_white_cell,
)
from fadeformer.data.sources.phantom.rng import PortableRNG

IMAGES_PER_SLIDE = 5  # images; few, so that the test set has enough slides of every class to assess a model
SPLIT_SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}  # fractions of the slides
CLASSES: tuple[str, ...] = tuple(CELL_TYPES)
ARNETH_SHARES = {
    "one lobe": 0.10,
    "two lobes": 0.30,
    "three lobes": 0.38,
    "four lobes": 0.16,
    "five lobes": 0.06,
}  # class frequencies
CELL_CENTERS = ((-0.45, -0.45), (0.45, -0.45), (-0.45, 0.45), (0.45, 0.45))  # of cells in a multi-label image
FIELD_CELL_SCALE = 0.6  # size of these cells relative to the cell of a single-label image


def class_names(task: str) -> tuple[str, ...]:
    """Return the names of the classes or findings of a task; raises KeyError for other tasks."""
    return {"multi-class": CLASSES, "ordinal-regression": tuple(ARNETH_SHARES), "multi-label, binary-class": CLASSES}[
        task
    ]


def draw_dataset(
    images: int, size: int, seed: int, task: str = "multi-class"
) -> dict[str, NDArray[np.uint8 | np.int64]]:
    """Generate the data set.

    Args:
        images: number of images; about 70 % are train, 10 % val and 20 % test, split by slide.
        size: image side in pixels.
        seed: random seed.
        task: "multi-class", "ordinal-regression" or "multi-label, binary-class".

    Returns:
        For each split `{split}_images` (uint8, (N, size, size, 3)), `{split}_labels` (uint8, (N, 1), or (N, 5) if
        multi-label) and `{split}_groups` (int64, (N,): the slide).
    """
    slides = max(10, images // IMAGES_PER_SLIDE)
    bounds = {
        "train": round(slides * SPLIT_SHARES["train"]),
        "val": round(slides * (SPLIT_SHARES["train"] + SPLIT_SHARES["val"])),
    }
    groups = np.arange(images) * slides // images
    split_indices = np.where(groups < bounds["train"], 0, np.where(groups < bounds["val"], 1, 2))
    arrays: dict[str, NDArray[np.uint8 | np.int64]] = {}
    progress = tqdm(total=images, desc="phantom", unit="image", disable=None)
    for number, split in enumerate(SPLITS):
        indices = np.flatnonzero(split_indices == number)
        labels = _draw_labels(task, len(indices), PortableRNG(seed, 1, number))
        pixels = np.empty((len(indices), size, size, 3), np.uint8)
        for row, (image, label) in enumerate(zip(indices, labels, strict=True)):
            slide_rng, rng = PortableRNG(seed, 2, int(groups[image])), PortableRNG(seed, 3, int(image))
            pixels[row] = _render_image(_cells_for_label(task, label), size, slide_rng, rng)
            progress.update()
        arrays[f"{split}_images"] = pixels
        arrays[f"{split}_labels"] = labels
        arrays[f"{split}_groups"] = groups[indices]
    progress.close()
    return arrays


def _draw_labels(task: str, count: int, rng: PortableRNG) -> NDArray[np.uint8]:
    """Draw labels (count, L): classes by frequency, at least one of each, shuffled; or one to three findings."""
    if task == "multi-label, binary-class":
        cell_frequencies = np.array([cell_type.share for cell_type in CELL_TYPES.values()])
        present = np.zeros((count, len(CELL_TYPES)), np.uint8)
        for row in present:
            weights = np.array([rng.uniform((0.0, 1.0)) for _ in cell_frequencies]) * np.sqrt(cell_frequencies)
            row[np.argsort(-weights, kind="stable")[: rng.integer((1, 3))]] = 1
        return present
    frequencies = (
        list(ARNETH_SHARES.values())
        if task == "ordinal-regression"
        else [cell_type.share for cell_type in CELL_TYPES.values()]
    )
    counts = [max(1, int(share * count + 0.5)) for share in frequencies]
    counts[0] += count - sum(counts)
    labels = np.repeat(np.arange(len(frequencies), dtype=np.uint8), counts)
    return labels[np.argsort(rng.generator.random(count), kind="stable"), None]


def _cells_for_label(task: str, label: NDArray[np.uint8]) -> list[CellType]:
    """Return the types of the white cells in an image with that label."""
    if task == "ordinal-regression":
        return [replace(CELL_TYPES["neutrophil"], lobes=(int(label[0]) + 1,) * 2)]
    if task == "multi-label, binary-class":
        return [cell_type for cell_type, present in zip(CELL_TYPES.values(), label, strict=True) if present]
    return [CELL_TYPES[CLASSES[label[0]]]]


def _render_image(cell_types: list[CellType], size: int, slide_rng: PortableRNG, rng: PortableRNG) -> NDArray[np.uint8]:
    tint = tuple(slide_rng.uniform((0.92, 1.06)) for _ in range(3))
    strength = slide_rng.uniform((0.75, 1.05))
    canvas = Canvas(size, BACKGROUND)
    paint_red_cells(canvas, rng.integer((3, 8)), rng)
    if len(cell_types) == 1:
        paint_white_cell(canvas, cell_types[0], (0.0, 0.0), 1.0, rng)
    else:
        free_centers = list(CELL_CENTERS)
        for cell_type in cell_types:
            center = free_centers.pop(rng.integer((0, len(free_centers) - 1)))
            paint_white_cell(canvas, cell_type, center, FIELD_CELL_SCALE, rng)
    blur = rng.uniform((0.0, 1.0))
    for _ in range(max(1, size // 28)):
        canvas.blur(blur)
    exposure = rng.uniform((0.93, 1.05))
    noise = rng.uniform((0.01, 0.045))
    clear = np.array(BACKGROUND)[:, None, None]
    stained = clear + strength * (canvas.planes - clear)
    grain = np.stack([rng.approx_normal((size, size)) for _ in range(3)])
    image = stained * np.array(tint)[:, None, None] * exposure + noise * grain
    pixels: NDArray[np.uint8] = np.floor(np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return pixels.transpose(1, 2, 0)
