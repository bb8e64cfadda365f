"""Cell types of the phantom's blood smears: their appearance and how they are painted.

For reproducibility only operations that IEEE 754 defines exactly are used (`fadeformer.data.sources.phantom.generate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fadeformer.data.sources.phantom.rng import Plane, PortableRNG, Range

Color = tuple[float, float, float]
Point = tuple[float, float]
Ellipse = tuple[Point, Point, Point]  # center, radii, and unit vector along the first radius

CHUNK_PIXELS = 65_536  # pixels of ellipses computed at once; small enough for the CPU cache

BACKGROUND: Color = (0.93, 0.91, 0.89)
RED_CELL: Color = (0.86, 0.64, 0.63)
TYPICAL_COLORS: dict[str, Color] = {"cytoplasm": (0.82, 0.77, 0.85), "nucleus": (0.43, 0.27, 0.56)}


@dataclass(frozen=True)
class CellType:
    """Appearance of a cell type. Lengths are fractions of half the image side; ranges are (min, max).

    Attributes:
        share: fraction of all cells.
        radius: radius of the cell.
        nucleus: radius of the nucleus (all lobes together) relative to the cell.
        lobes: number of lobes.
        spread: distance of the lobes from the center, relative to the radius of the nucleus.
        indent: depth of the dent in a nucleus with one lobe.
        granules: number of granules.
        granule_radius: radius of a granule.
        opacity: opacity of the granules.
        cytoplasm: color of the cytoplasm.
        nucleus_color: color of the nucleus.
        granule_color: color of the granules.
    """

    share: float
    radius: Range
    nucleus: Range
    lobes: tuple[int, int]
    spread: Range
    indent: Range
    granules: tuple[int, int]
    granule_radius: Range
    opacity: Range
    cytoplasm: Color
    nucleus_color: Color
    granule_color: Color


CELL_TYPES: dict[str, CellType] = {
    "neutrophil": CellType(
        0.40, (0.50, 0.70), (0.52, 0.68), (2, 5), (0.45, 0.72), (0.0, 0.0), (6, 22), (0.025, 0.045), (0.05, 0.40),
        (0.90, 0.79, 0.83), (0.42, 0.26, 0.55), (0.80, 0.56, 0.66),
    ),
    "lymphocyte": CellType(
        0.25, (0.38, 0.62), (0.72, 0.92), (1, 1), (0.0, 0.0), (0.0, 0.35), (0, 5), (0.025, 0.04), (0.05, 0.35),
        (0.70, 0.77, 0.91), (0.37, 0.23, 0.53), (0.60, 0.40, 0.60),
    ),
    "monocyte": CellType(
        0.15, (0.52, 0.78), (0.60, 0.82), (1, 2), (0.15, 0.40), (0.10, 0.70), (0, 10), (0.02, 0.04), (0.05, 0.30),
        (0.76, 0.76, 0.85), (0.48, 0.34, 0.61), (0.66, 0.52, 0.66),
    ),
    "eosinophil": CellType(
        0.13, (0.50, 0.70), (0.50, 0.68), (2, 3), (0.45, 0.70), (0.0, 0.0), (14, 40), (0.04, 0.075), (0.15, 0.80),
        (0.91, 0.77, 0.76), (0.43, 0.27, 0.56), (0.89, 0.50, 0.38),
    ),
    "basophil": CellType(
        0.07, (0.46, 0.66), (0.52, 0.74), (1, 3), (0.20, 0.55), (0.0, 0.3), (12, 36), (0.04, 0.08), (0.20, 0.85),
        (0.82, 0.75, 0.87), (0.45, 0.31, 0.60), (0.30, 0.18, 0.48),
    ),
}  # fmt: skip


class Canvas:
    """Image being painted, with coordinates from -1 to 1 along both axes."""

    def __init__(self, size: int, color: Color) -> None:
        self.coordinates = (np.arange(size) + 0.5) * (2.0 / size) - 1.0  # pixel centers along an axis
        self.pixel_size = 2.0 / size
        self.planes = np.repeat(color, size * size).reshape(3, size, size)

    def iter_coverage(self, shapes: Sequence[Ellipse]) -> Iterator[Plane]:
        """Yield the coverage in [0, 1] of each ellipse, antialiased over one pixel, computed in batches."""
        per_batch = max(1, CHUNK_PIXELS // (len(self.coordinates) * len(self.coordinates)))
        for first in range(0, len(shapes), per_batch):
            batch = np.array(shapes[first : first + per_batch], dtype=np.float64)  # (ellipses, 3, 2)
            center, radii, direction = batch.transpose(1, 2, 0)[..., None, None]  # each (2, ellipses, 1, 1)
            x, y = self.coordinates - center[0], self.coordinates[:, None] - center[1]
            u = (x * direction[0] + y * direction[1]) / radii[0]
            v = (y * direction[0] - x * direction[1]) / radii[1]
            distance = (1.0 - np.sqrt(u * u + v * v)) * np.minimum(radii[0], radii[1])
            yield from _smoothstep(distance / self.pixel_size + 0.5)

    def paint(self, coverage: Plane, color: Color) -> None:
        """Blend a color over the image, weighted by the coverage."""
        self.planes += coverage * (np.array(color)[:, None, None] - self.planes)

    def blur(self, amount: float) -> None:
        """Blur the image: 0 leaves it unchanged, 1 applies a [1 2 1] / 4 kernel along both axes."""
        last = len(self.coordinates) - 1
        before, after = (np.clip(np.arange(last + 1) + step, 0, last) for step in (-1, 1))
        for axis in (1, 2):
            around = self.planes.take(before, axis) + self.planes.take(after, axis)
            self.planes += amount * 0.25 * (around - 2.0 * self.planes)


def paint_white_cell(canvas: Canvas, cell_type: CellType, position: Point, scale: float, rng: PortableRNG) -> None:
    """Paint a white cell near `position`, scaled by `scale`, and up to one adjacent red cell."""
    stain = rng.uniform((0.15, 1.0))  # stain uptake: 0 is the average color of all cells, 1 that of the cell type
    center = position[0] + rng.uniform((-0.16, 0.16)), position[1] + rng.uniform((-0.16, 0.16))
    radius = scale * rng.uniform(cell_type.radius)
    direction = rng.unit_vector()
    stretch = rng.uniform((0.85, 1.0))
    (coverage,) = canvas.iter_coverage([(center, (radius, radius * stretch), direction)])
    canvas.paint(0.95 * coverage, _mix_colors(TYPICAL_COLORS["cytoplasm"], cell_type.cytoplasm, stain))
    _paint_nucleus(
        canvas, cell_type, center, radius, _mix_colors(TYPICAL_COLORS["nucleus"], cell_type.nucleus_color, stain), rng
    )
    _paint_granules(canvas, cell_type, center, radius, stain, rng)
    paint_red_cells(canvas, int(rng.uniform((0.0, 1.6))), rng, neighbor=(center, radius))


def paint_red_cells(canvas: Canvas, count: int, rng: PortableRNG, neighbor: tuple[Point, float] | None = None) -> None:
    """Paint red cells at random positions, or touching the cell `neighbor` (center, radius)."""
    cells = [_draw_red_cell(rng, neighbor) for _ in range(count)]
    coverage = canvas.iter_coverage([shape for cell in cells for shape in cell[:2]])
    for _, _, pallor in cells:
        canvas.paint(0.9 * next(coverage), RED_CELL)
        canvas.paint(pallor * next(coverage), BACKGROUND)


def _draw_red_cell(rng: PortableRNG, neighbor: tuple[Point, float] | None) -> tuple[Ellipse, Ellipse, float]:
    """Draw the outline of a red cell, its pale center, and the opacity of the center."""
    radius = rng.uniform((0.24, 0.34))
    direction = rng.unit_vector()
    if neighbor is None:
        center = rng.uniform((-1.1, 1.1)), rng.uniform((-1.1, 1.1))
    else:
        (x, y), reach = neighbor
        gap = reach + radius * rng.uniform((0.75, 1.0))
        center = x + direction[0] * gap, y + direction[1] * gap
    radii = radius, radius * rng.uniform((0.8, 1.0))
    pallor = rng.uniform((0.1, 0.5))
    return (center, radii, direction), (center, (radii[0] * 0.45, radii[1] * 0.45), direction), pallor


def _paint_nucleus(
    canvas: Canvas, cell_type: CellType, center: Point, radius: float, color: Color, rng: PortableRNG
) -> None:
    nucleus_radius = radius * rng.uniform(cell_type.nucleus)
    lobes = rng.integer(cell_type.lobes)
    spread = rng.uniform(cell_type.spread)
    direction = rng.unit_vector()
    shapes: list[Ellipse] = []
    for lobe in range(lobes):
        t = 0.0 if lobes == 1 else 2.0 * lobe / (lobes - 1) - 1.0  # from -1 to 1 along an arc
        bend = rng.uniform((0.3, 0.6)) * (1.0 - t * t)
        x = center[0] + nucleus_radius * spread * (t * direction[0] - bend * direction[1])
        y = center[1] + nucleus_radius * spread * (t * direction[1] + bend * direction[0])
        size = nucleus_radius * (1.0 - 0.55 * spread if lobes > 1 else 1.0) * rng.uniform((0.85, 1.0))
        shapes.append(((x, y), (size, size * rng.uniform((0.75, 1.0))), rng.unit_vector()))
    coverage = np.maximum.reduce(list(canvas.iter_coverage(shapes)))
    indent = rng.uniform(cell_type.indent)
    if lobes == 1 and indent > 0.05:
        dent = center[0] + nucleus_radius * direction[0], center[1] + nucleus_radius * direction[1]
        (dent_coverage,) = canvas.iter_coverage([(dent, (nucleus_radius * indent, nucleus_radius * indent), direction)])
        coverage = coverage * (1.0 - dent_coverage)
    canvas.paint(rng.uniform((0.80, 0.95)) * coverage, color)


def _paint_granules(
    canvas: Canvas, cell_type: CellType, center: Point, radius: float, stain: float, rng: PortableRNG
) -> None:
    opacity = rng.uniform(cell_type.opacity)
    color = _mix_colors(TYPICAL_COLORS["cytoplasm"], cell_type.granule_color, 0.5 + 0.5 * stain)
    shapes: list[Ellipse] = []
    for _ in range(rng.integer(cell_type.granules)):
        direction = rng.unit_vector()
        distance = 0.9 * radius * float(np.sqrt(rng.uniform((0.0, 1.0))))
        granule_radius = rng.uniform(cell_type.granule_radius)
        position = center[0] + direction[0] * distance, center[1] + direction[1] * distance
        shapes.append((position, (granule_radius, granule_radius), (1.0, 0.0)))
    for coverage in canvas.iter_coverage(shapes):
        canvas.paint(opacity * coverage, color)


def _mix_colors(color: Color, target: Color, weight: float) -> Color:
    red, green, blue = (a + weight * (b - a) for a, b in zip(color, target, strict=True))
    return red, green, blue


def _smoothstep(t: NDArray[np.float64]) -> NDArray[np.float64]:
    """Smoothstep: 3 t^2 - 2 t^3 with t clamped to [0, 1]."""
    t = np.minimum(np.maximum(t, 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)
