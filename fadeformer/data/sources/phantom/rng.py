"""Uniform draws, and what can be made of them exactly, so that a drawing has the same bytes on every machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float64]
Range = tuple[float, float]


class PortableRNG:
    """Draws of a generator of their own.

    Args:
        key: of the generator; other keys give independent draws.
    """

    def __init__(self, *key: int) -> None:
        self.generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))

    def uniform(self, bounds: Range) -> float:
        """Uniform in a range."""
        return bounds[0] + (bounds[1] - bounds[0]) * float(self.generator.random())

    def integer(self, bounds: tuple[int, int]) -> int:
        """A whole number, both bounds included."""
        return int(self.generator.integers(bounds[0], bounds[1] + 1))

    def unit_vector(self) -> tuple[float, float]:
        """A unit vector, by rejection."""
        while True:
            x, y = self.uniform((-1, 1)), self.uniform((-1, 1))
            square = x * x + y * y
            if 0.01 < square <= 1:
                length = float(np.sqrt(square))
                return x / length, y / length

    def approx_normal(self, shape: tuple[int, ...]) -> Plane:
        """Noise of mean 0 and variance 1, near normal: the sum of four uniform draws (Irwin-Hall)."""
        one, two, three, four = (self.generator.random(shape) for _ in range(4))
        return (one + two + three + four - 2.0) * float(np.sqrt(3.0))
