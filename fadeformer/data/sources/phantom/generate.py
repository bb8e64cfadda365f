"""`phantom`: stained blood smears drawn by a program, so that the pipeline runs without any download.

Five kinds of white blood cell lie among red ones, imbalanced as in blood, and differ as the real ones do: size, lobes
of the nucleus, granules, colour of the cytoplasm. Slides differ in stain and tint, single cells in focus and in how
well they took the stain; that, and overlapping sizes and shapes, is what makes the set hard. No label is ever wrong.
Every image is synthetic: results say nothing about patients.

Besides the kinds of cell (multi-class) there are two other tasks, of the same drawing: the class of neutrophils after
Arneth (1904), one to five lobes (ordinal), and up to three cells in a field, each kind of them a finding (multi-label).

The same arguments give the same bytes on every machine. So only operations are used that IEEE 754 defines to the last
bit, on single elements: + - * / sqrt, comparisons and floor, and of the generator only uniform draws. exp, sin or a sum
over an axis would differ with the processor's vector units.
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

IMAGES_PER_SLIDE = 50  # images
SPLIT_SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}  # of the slides
CLASSES: tuple[str, ...] = tuple(CELL_TYPES)
ARNETH_SHARES = {
    "one lobe": 0.10,
    "two lobes": 0.30,
    "three lobes": 0.38,
    "four lobes": 0.16,
    "five lobes": 0.06,
}  # and shares
CELL_CENTERS = ((-0.45, -0.45), (0.45, -0.45), (-0.45, 0.45), (0.45, 0.45))  # of cells in a field
FIELD_CELL_SCALE = 0.6  # size of a cell in a field, of one that is alone


def class_names(task: str) -> tuple[str, ...]:
    """Names of the classes or findings of a task by its name, or KeyError."""
    return {"multi-class": CLASSES, "ordinal-regression": tuple(ARNETH_SHARES), "multi-label, binary-class": CLASSES}[
        task
    ]


def draw_dataset(
    images: int, size: int, seed: int, task: str = "multi-class"
) -> dict[str, NDArray[np.uint8 | np.int64]]:
    """Draws the set.

    Args:
        images: how many; about 70 % are train, 10 % val, 20 % test, whole slides each.
        size: side of an image, pixels.
        seed: of everything that is drawn.
        task: what the labels say: multi-class, ordinal-regression or multi-label, binary-class.

    Returns:
        For each split `{split}_images` (uint8, N x size x size x 3), `{split}_labels` (uint8, N x 1, or N x 5 where
        multi-label) and `{split}_groups` (int64, N: the slide).
    """
    slides = max(10, images // IMAGES_PER_SLIDE)
    ends = {
        "train": round(slides * SPLIT_SHARES["train"]),
        "val": round(slides * (SPLIT_SHARES["train"] + SPLIT_SHARES["val"])),
    }
    groups = np.arange(images) * slides // images
    split_of = np.where(groups < ends["train"], 0, np.where(groups < ends["val"], 1, 2))
    made: dict[str, NDArray[np.uint8 | np.int64]] = {}
    progress = tqdm(total=images, desc="phantom", unit="image", disable=None)
    for number, split in enumerate(SPLITS):
        members = np.flatnonzero(split_of == number)
        labels = _draw_labels(task, len(members), PortableRNG(seed, 1, number))
        pixels = np.empty((len(members), size, size, 3), np.uint8)
        for row, (image, label) in enumerate(zip(members, labels, strict=True)):
            slide, chance = PortableRNG(seed, 2, int(groups[image])), PortableRNG(seed, 3, int(image))
            pixels[row] = _render_image(_cells_for_label(task, label), size, slide, chance)
            progress.update()
        made[f"{split}_images"] = pixels
        made[f"{split}_labels"] = labels
        made[f"{split}_groups"] = groups[members]
    progress.close()
    return made


def _draw_labels(task: str, count: int, chance: PortableRNG) -> NDArray[np.uint8]:
    """(count, labels): every class by its share, at least one of each, in random order; or one to three findings."""
    if task == "multi-label, binary-class":
        shares = np.array([kind.share for kind in CELL_TYPES.values()])
        present = np.zeros((count, len(CELL_TYPES)), np.uint8)
        for row in present:
            weights = np.array([chance.uniform((0.0, 1.0)) for _ in shares]) * np.sqrt(shares)
            row[np.argsort(-weights, kind="stable")[: chance.integer((1, 3))]] = 1
        return present
    parts = (
        list(ARNETH_SHARES.values()) if task == "ordinal-regression" else [kind.share for kind in CELL_TYPES.values()]
    )
    counts = [max(1, int(share * count + 0.5)) for share in parts]
    counts[0] += count - sum(counts)
    labels = np.repeat(np.arange(len(parts), dtype=np.uint8), counts)
    return labels[np.argsort(chance.generator.random(count), kind="stable"), None]


def _cells_for_label(task: str, label: NDArray[np.uint8]) -> list[CellType]:
    """The white cells that an image of that label shows."""
    if task == "ordinal-regression":
        return [replace(CELL_TYPES["neutrophil"], lobes=(int(label[0]) + 1,) * 2)]
    if task == "multi-label, binary-class":
        return [kind for kind, present in zip(CELL_TYPES.values(), label, strict=True) if present]
    return [CELL_TYPES[CLASSES[label[0]]]]


def _render_image(kinds: list[CellType], size: int, slide: PortableRNG, chance: PortableRNG) -> NDArray[np.uint8]:
    tint = tuple(slide.uniform((0.92, 1.06)) for _ in range(3))
    strength = slide.uniform((0.75, 1.05))
    canvas = Canvas(size, BACKGROUND)
    paint_red_cells(canvas, chance.integer((3, 8)), chance)
    if len(kinds) == 1:
        paint_white_cell(canvas, kinds[0], (0.0, 0.0), 1.0, chance)
    else:
        free = list(CELL_CENTERS)
        for kind in kinds:
            paint_white_cell(canvas, kind, free.pop(chance.integer((0, len(free) - 1))), FIELD_CELL_SCALE, chance)
    blur = chance.uniform((0.0, 1.0))
    for _ in range(max(1, size // 28)):
        canvas.blur(blur)
    exposure = chance.uniform((0.93, 1.05))
    noise = chance.uniform((0.01, 0.045))
    clear = np.array(BACKGROUND)[:, None, None]
    stained = clear + strength * (canvas.planes - clear)
    grain = np.stack([chance.approx_normal((size, size)) for _ in range(3)])
    seen = stained * np.array(tint)[:, None, None] * exposure + noise * grain
    pixels: NDArray[np.uint8] = np.floor(np.clip(seen, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return pixels.transpose(1, 2, 0)
