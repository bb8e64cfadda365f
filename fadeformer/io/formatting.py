"""Formatting of numbers in reports."""

from __future__ import annotations

import math


def format_with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    """Format a value with its confidence interval, rounded according to its width: 0.97 (0.95 to 0.98)."""
    if value is None:
        return "undefined"
    if interval is None:
        return f"{value:.4f}"
    width = interval[1] - interval[0]
    digits = 4 if width < 0.001 else max(2, math.ceil(-math.log10(width)))
    return f"{value:.{digits}f} ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
