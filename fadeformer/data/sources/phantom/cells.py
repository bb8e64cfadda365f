"""Cells of the phantom's blood smears: what each kind looks like, and how it is painted.

Only operations are used that IEEE 754 defines to the last bit, as `fadeformer.data.sources.phantom.generate` explains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fadeformer.data.sources.phantom.rng import Chance, Plane, Range

Colour = tuple[float, float, float]
Pair = tuple[float, float]
Ellipse = tuple[Pair, Pair, Pair]  # middle, radii, and the unit vector along which the first radius points

AT_ONCE = 65_536  # pixels of ellipses that are computed together, as long as the processor's cache holds them

BACKGROUND: Colour = (0.93, 0.91, 0.89)
RED_CELL: Colour = (0.86, 0.64, 0.63)
TYPICAL: dict[str, Colour] = {"cytoplasm": (0.82, 0.77, 0.85), "nucleus": (0.43, 0.27, 0.56)}


@dataclass(frozen=True)
class Kind:
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
    grain: Range
    opacity: Range
    cytoplasm: Colour
    nucleus_colour: Colour
    granule_colour: Colour


KINDS: dict[str, Kind] = {
    "neutrophil": Kind(
        0.40, (0.50, 0.70), (0.52, 0.68), (2, 5), (0.45, 0.72), (0.0, 0.0), (6, 22), (0.025, 0.045), (0.05, 0.40),
        (0.90, 0.79, 0.83), (0.42, 0.26, 0.55), (0.80, 0.56, 0.66),
    ),
    "lymphocyte": Kind(
        0.25, (0.38, 0.62), (0.72, 0.92), (1, 1), (0.0, 0.0), (0.0, 0.35), (0, 5), (0.025, 0.04), (0.05, 0.35),
        (0.70, 0.77, 0.91), (0.37, 0.23, 0.53), (0.60, 0.40, 0.60),
    ),
    "monocyte": Kind(
        0.15, (0.52, 0.78), (0.60, 0.82), (1, 2), (0.15, 0.40), (0.10, 0.70), (0, 10), (0.02, 0.04), (0.05, 0.30),
        (0.76, 0.76, 0.85), (0.48, 0.34, 0.61), (0.66, 0.52, 0.66),
    ),
    "eosinophil": Kind(
        0.13, (0.50, 0.70), (0.50, 0.68), (2, 3), (0.45, 0.70), (0.0, 0.0), (14, 40), (0.04, 0.075), (0.15, 0.80),
        (0.91, 0.77, 0.76), (0.43, 0.27, 0.56), (0.89, 0.50, 0.38),
    ),
    "basophil": Kind(
        0.07, (0.46, 0.66), (0.52, 0.74), (1, 3), (0.20, 0.55), (0.0, 0.3), (12, 36), (0.04, 0.08), (0.20, 0.85),
        (0.82, 0.75, 0.87), (0.45, 0.31, 0.60), (0.30, 0.18, 0.48),
    ),
}  # fmt: skip


class Canvas:
    """An image being painted; positions run from -1 to 1 in both directions."""

    def __init__(self, size: int, colour: Colour) -> None:
        self.steps = (np.arange(size) + 0.5) * (2.0 / size) - 1.0  # middles of the pixels of a row or column
        self.pixel = 2.0 / size
        self.planes = np.repeat(colour, size * size).reshape(3, size, size)

    def ellipses(self, shapes: Sequence[Ellipse]) -> Iterator[Plane]:
        """Coverage in [0, 1] of each of some ellipses, its edge as wide as a pixel; of small images many at once."""
        many = max(1, AT_ONCE // (len(self.steps) * len(self.steps)))
        for first in range(0, len(shapes), many):
            some = np.array(shapes[first : first + many], dtype=np.float64)  # ellipses, 3, 2
            at, radii, along = some.transpose(1, 2, 0)[..., None, None]  # each 2, ellipses, 1, 1
            x, y = self.steps - at[0], self.steps[:, None] - at[1]
            u = (x * along[0] + y * along[1]) / radii[0]
            v = (y * along[0] - x * along[1]) / radii[1]
            distance = (1.0 - np.sqrt(u * u + v * v)) * np.minimum(radii[0], radii[1])
            yield from _smooth(distance / self.pixel + 0.5)

    def paint(self, cover: Plane, colour: Colour) -> None:
        """Lays a colour over what is there."""
        self.planes += cover * (np.array(colour)[:, None, None] - self.planes)

    def blur(self, amount: float) -> None:
        """Mixes in the mean of the neighbours: 0 is sharp, 1 a [1 2 1] stencil in both directions."""
        last = len(self.steps) - 1
        before, after = (np.clip(np.arange(last + 1) + step, 0, last) for step in (-1, 1))
        for axis in (1, 2):
            around = self.planes.take(before, axis) + self.planes.take(after, axis)
            self.planes += amount * 0.25 * (around - 2.0 * self.planes)


def white_cell(canvas: Canvas, kind: Kind, middle: Pair, scale: float, chance: Chance) -> None:
    """Paints a white cell near a place, of that fraction of its kind's size, with what touches it."""
    vivid = chance.within((0.15, 1.0))  # how far the cell took its own stain rather than any cell's
    at = middle[0] + chance.within((-0.16, 0.16)), middle[1] + chance.within((-0.16, 0.16))
    radius = scale * chance.within(kind.radius)
    along = chance.direction()
    stretch = chance.within((0.85, 1.0))
    (cover,) = canvas.ellipses([(at, (radius, radius * stretch), along)])
    canvas.paint(0.95 * cover, _mix(TYPICAL["cytoplasm"], kind.cytoplasm, vivid))
    _nucleus(canvas, kind, at, radius, _mix(TYPICAL["nucleus"], kind.nucleus_colour, vivid), chance)
    _granules(canvas, kind, at, radius, vivid, chance)
    red_cells(canvas, int(chance.within((0.0, 1.6))), chance, beside=(at, radius))


def red_cells(canvas: Canvas, count: int, chance: Chance, beside: tuple[Pair, float] | None = None) -> None:
    """Paints red cells anywhere, or beside a cell of that middle and radius, where they touch it."""
    drawn = [_red_cell(chance, beside) for _ in range(count)]
    covers = canvas.ellipses([shape for cell in drawn for shape in cell[:2]])
    for _, _, pallor in drawn:
        canvas.paint(0.9 * next(covers), RED_CELL)
        canvas.paint(pallor * next(covers), BACKGROUND)


def _red_cell(chance: Chance, beside: tuple[Pair, float] | None) -> tuple[Ellipse, Ellipse, float]:
    """The cell, its pale middle, and how pale that is."""
    radius = chance.within((0.24, 0.34))
    along = chance.direction()
    if beside is None:
        at = chance.within((-1.1, 1.1)), chance.within((-1.1, 1.1))
    else:
        (x, y), reach = beside
        gap = reach + radius * chance.within((0.75, 1.0))
        at = x + along[0] * gap, y + along[1] * gap
    radii = radius, radius * chance.within((0.8, 1.0))
    pallor = chance.within((0.1, 0.5))
    return (at, radii, along), (at, (radii[0] * 0.45, radii[1] * 0.45), along), pallor


def _nucleus(canvas: Canvas, kind: Kind, at: Pair, radius: float, colour: Colour, chance: Chance) -> None:
    whole = radius * chance.within(kind.nucleus)
    lobes = chance.count(kind.lobes)
    spread = chance.within(kind.spread)
    along = chance.direction()
    shapes: list[Ellipse] = []
    for lobe in range(lobes):
        place = 0.0 if lobes == 1 else 2.0 * lobe / (lobes - 1) - 1.0  # from -1 to 1 along an arc
        bend = chance.within((0.3, 0.6)) * (1.0 - place * place)
        x = at[0] + whole * spread * (place * along[0] - bend * along[1])
        y = at[1] + whole * spread * (place * along[1] + bend * along[0])
        size = whole * (1.0 - 0.55 * spread if lobes > 1 else 1.0) * chance.within((0.85, 1.0))
        shapes.append(((x, y), (size, size * chance.within((0.75, 1.0))), chance.direction()))
    cover = np.maximum.reduce(list(canvas.ellipses(shapes)))
    indent = chance.within(kind.indent)
    if lobes == 1 and indent > 0.05:
        dent = at[0] + whole * along[0], at[1] + whole * along[1]
        (bite,) = canvas.ellipses([(dent, (whole * indent, whole * indent), along)])
        cover = cover * (1.0 - bite)
    canvas.paint(chance.within((0.80, 0.95)) * cover, colour)


def _granules(canvas: Canvas, kind: Kind, at: Pair, radius: float, vivid: float, chance: Chance) -> None:
    opacity = chance.within(kind.opacity)
    colour = _mix(TYPICAL["cytoplasm"], kind.granule_colour, 0.5 + 0.5 * vivid)
    shapes: list[Ellipse] = []
    for _ in range(chance.count(kind.granules)):
        along = chance.direction()
        reach = 0.9 * radius * float(np.sqrt(chance.within((0.0, 1.0))))
        grain = chance.within(kind.grain)
        place = at[0] + along[0] * reach, at[1] + along[1] * reach
        shapes.append((place, (grain, grain), (1.0, 0.0)))
    for cover in canvas.ellipses(shapes):
        canvas.paint(opacity * cover, colour)


def _mix(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (a + share * (b - a) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _smooth(t: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 below 0, 1 above 1, and 3 t^2 - 2 t^3 between."""
    t = np.minimum(np.maximum(t, 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)
