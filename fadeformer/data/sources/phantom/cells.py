"""Cells of the phantom's blood smears: what each kind looks like, and how it is painted.

Only operations are used that IEEE 754 defines to the last bit, as `fadeformer.data.sources.phantom.generate` explains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fadeformer.data.sources.phantom.rng import Plane, PortableRNG, Range

Color = tuple[float, float, float]
Point = tuple[float, float]
Ellipse = tuple[Point, Point, Point]  # middle, radii, and the unit vector along which the first radius points

CHUNK_PIXELS = 65_536  # pixels of ellipses that are computed together, as long as the processor's cache holds them

BACKGROUND: Color = (0.93, 0.91, 0.89)
RED_CELL: Color = (0.86, 0.64, 0.63)
TYPICAL_COLORS: dict[str, Color] = {"cytoplasm": (0.82, 0.77, 0.85), "nucleus": (0.43, 0.27, 0.56)}


@dataclass(frozen=True)
class CellType:
    """What a kind of cell looks like; lengths are fractions of half the image's side.

    Attributes:
        share: of all cells.
        radius: of the cell.
        nucleus: radius of the nucleus (of all lobes together) as a fraction of the cell's.
        lobes: fewest and most lobes.
        spread: distance of the lobes from the middle, as a fraction of the nucleus' radius.
        indent: depth of the dent in a nucleus of one lobe.
        granules: fewest and most.
        grain: radius of a granule.
        opacity: of granules.
        cytoplasm: its colour.
        nucleus_colour: its colour.
        granule_colour: its colour.
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
    """An image being painted; positions run from -1 to 1 in both directions."""

    def __init__(self, size: int, colour: Color) -> None:
        self.coordinates = (np.arange(size) + 0.5) * (2.0 / size) - 1.0  # middles of the pixels of a row or column
        self.pixel_size = 2.0 / size
        self.planes = np.repeat(colour, size * size).reshape(3, size, size)

    def iter_coverage(self, shapes: Sequence[Ellipse]) -> Iterator[Plane]:
        """Coverage in [0, 1] of each of some ellipses, its edge as wide as a pixel; of small images many at once."""
        many = max(1, CHUNK_PIXELS // (len(self.coordinates) * len(self.coordinates)))
        for first in range(0, len(shapes), many):
            some = np.array(shapes[first : first + many], dtype=np.float64)  # ellipses, 3, 2
            at, radii, along = some.transpose(1, 2, 0)[..., None, None]  # each 2, ellipses, 1, 1
            x, y = self.coordinates - at[0], self.coordinates[:, None] - at[1]
            u = (x * along[0] + y * along[1]) / radii[0]
            v = (y * along[0] - x * along[1]) / radii[1]
            distance = (1.0 - np.sqrt(u * u + v * v)) * np.minimum(radii[0], radii[1])
            yield from _smoothstep(distance / self.pixel_size + 0.5)

    def paint(self, cover: Plane, colour: Color) -> None:
        """Lays a colour over what is there."""
        self.planes += cover * (np.array(colour)[:, None, None] - self.planes)

    def blur(self, amount: float) -> None:
        """Mixes in the mean of the neighbours: 0 is sharp, 1 a [1 2 1] stencil in both directions."""
        last = len(self.coordinates) - 1
        before, after = (np.clip(np.arange(last + 1) + step, 0, last) for step in (-1, 1))
        for axis in (1, 2):
            around = self.planes.take(before, axis) + self.planes.take(after, axis)
            self.planes += amount * 0.25 * (around - 2.0 * self.planes)


def paint_white_cell(canvas: Canvas, kind: CellType, middle: Point, scale: float, chance: PortableRNG) -> None:
    """Paints a white cell near a place, of that fraction of its kind's size, with what touches it."""
    vivid = chance.uniform((0.15, 1.0))  # how far the cell took its own stain rather than any cell's
    at = middle[0] + chance.uniform((-0.16, 0.16)), middle[1] + chance.uniform((-0.16, 0.16))
    radius = scale * chance.uniform(kind.radius)
    along = chance.unit_vector()
    stretch = chance.uniform((0.85, 1.0))
    (cover,) = canvas.iter_coverage([(at, (radius, radius * stretch), along)])
    canvas.paint(0.95 * cover, _mix_colors(TYPICAL_COLORS["cytoplasm"], kind.cytoplasm, vivid))
    _paint_nucleus(canvas, kind, at, radius, _mix_colors(TYPICAL_COLORS["nucleus"], kind.nucleus_color, vivid), chance)
    _paint_granules(canvas, kind, at, radius, vivid, chance)
    paint_red_cells(canvas, int(chance.uniform((0.0, 1.6))), chance, neighbor=(at, radius))


def paint_red_cells(
    canvas: Canvas, count: int, chance: PortableRNG, neighbor: tuple[Point, float] | None = None
) -> None:
    """Paints red cells anywhere, or beside a cell of that middle and radius, where they touch it."""
    drawn = [_draw_red_cell(chance, neighbor) for _ in range(count)]
    covers = canvas.iter_coverage([shape for cell in drawn for shape in cell[:2]])
    for _, _, pallor in drawn:
        canvas.paint(0.9 * next(covers), RED_CELL)
        canvas.paint(pallor * next(covers), BACKGROUND)


def _draw_red_cell(chance: PortableRNG, beside: tuple[Point, float] | None) -> tuple[Ellipse, Ellipse, float]:
    """The cell, its pale middle, and how pale that is."""
    radius = chance.uniform((0.24, 0.34))
    along = chance.unit_vector()
    if beside is None:
        at = chance.uniform((-1.1, 1.1)), chance.uniform((-1.1, 1.1))
    else:
        (x, y), reach = beside
        gap = reach + radius * chance.uniform((0.75, 1.0))
        at = x + along[0] * gap, y + along[1] * gap
    radii = radius, radius * chance.uniform((0.8, 1.0))
    pallor = chance.uniform((0.1, 0.5))
    return (at, radii, along), (at, (radii[0] * 0.45, radii[1] * 0.45), along), pallor


def _paint_nucleus(
    canvas: Canvas, kind: CellType, at: Point, radius: float, colour: Color, chance: PortableRNG
) -> None:
    whole = radius * chance.uniform(kind.nucleus)
    lobes = chance.integer(kind.lobes)
    spread = chance.uniform(kind.spread)
    along = chance.unit_vector()
    shapes: list[Ellipse] = []
    for lobe in range(lobes):
        place = 0.0 if lobes == 1 else 2.0 * lobe / (lobes - 1) - 1.0  # from -1 to 1 along an arc
        bend = chance.uniform((0.3, 0.6)) * (1.0 - place * place)
        x = at[0] + whole * spread * (place * along[0] - bend * along[1])
        y = at[1] + whole * spread * (place * along[1] + bend * along[0])
        size = whole * (1.0 - 0.55 * spread if lobes > 1 else 1.0) * chance.uniform((0.85, 1.0))
        shapes.append(((x, y), (size, size * chance.uniform((0.75, 1.0))), chance.unit_vector()))
    cover = np.maximum.reduce(list(canvas.iter_coverage(shapes)))
    indent = chance.uniform(kind.indent)
    if lobes == 1 and indent > 0.05:
        dent = at[0] + whole * along[0], at[1] + whole * along[1]
        (bite,) = canvas.iter_coverage([(dent, (whole * indent, whole * indent), along)])
        cover = cover * (1.0 - bite)
    canvas.paint(chance.uniform((0.80, 0.95)) * cover, colour)


def _paint_granules(
    canvas: Canvas, kind: CellType, at: Point, radius: float, vivid: float, chance: PortableRNG
) -> None:
    opacity = chance.uniform(kind.opacity)
    colour = _mix_colors(TYPICAL_COLORS["cytoplasm"], kind.granule_color, 0.5 + 0.5 * vivid)
    shapes: list[Ellipse] = []
    for _ in range(chance.integer(kind.granules)):
        along = chance.unit_vector()
        reach = 0.9 * radius * float(np.sqrt(chance.uniform((0.0, 1.0))))
        grain = chance.uniform(kind.granule_radius)
        place = at[0] + along[0] * reach, at[1] + along[1] * reach
        shapes.append((place, (grain, grain), (1.0, 0.0)))
    for cover in canvas.iter_coverage(shapes):
        canvas.paint(opacity * cover, colour)


def _mix_colors(one: Color, other: Color, share: float) -> Color:
    red, green, blue = (a + share * (b - a) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _smoothstep(t: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 below 0, 1 above 1, and 3 t^2 - 2 t^3 between."""
    t = np.minimum(np.maximum(t, 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)
