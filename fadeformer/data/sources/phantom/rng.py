"""Random numbers that are bitwise reproducible on every machine: uniform draws and exact arithmetic on them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float64]
Range = tuple[float, float]


class PortableRNG:
    """Random generator with its own stream.

    Args:
        key: integers that seed the generator; different keys give independent streams.
    """

    def __init__(self, *key: int) -> None:
        self.generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))

    def uniform(self, bounds: Range) -> float:
        """Draw a float uniformly from a range."""
        return bounds[0] + (bounds[1] - bounds[0]) * float(self.generator.random())

    def integer(self, bounds: tuple[int, int]) -> int:
        """Draw an integer uniformly, both bounds included."""
        return int(self.generator.integers(bounds[0], bounds[1] + 1))

    def unit_vector(self) -> tuple[float, float]:
        """Draw a 2D unit vector by rejection sampling."""
        while True:
            x, y = self.uniform((-1, 1)), self.uniform((-1, 1))
            square = x * x + y * y
            if 0.01 < square <= 1:
                length = float(np.sqrt(square))
                return x / length, y / length

    def approx_normal(self, shape: tuple[int, ...]) -> Plane:
        """Draw approximately normal noise of mean 0 and variance 1: the sum of four uniform draws (Irwin-Hall)."""
        a, b, c, d = (self.generator.random(shape) for _ in range(4))
        return (a + b + c + d - 2.0) * float(np.sqrt(3.0))
