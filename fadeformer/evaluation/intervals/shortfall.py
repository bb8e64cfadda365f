"""One-sided test of a shortfall between two estimates by their confidence bounds, and the smallest detectable one.

The bounds of the two estimates give those of their difference by variance estimates recovery (MOVER; Zou and Donner
2008, doi:10.1002/sim.3095), of proportions with exact bounds (Laud 2017, doi:10.1002/pst.1813). The p-value is the
tail probability at which the lower bound of the shortfall is 0. The variances are thus those near the null hypothesis,
not at the observed values: a sensitivity of 0 of 5 has an estimated variance of 0, but a wide interval.
"""

from __future__ import annotations

import math
from typing import Protocol

from scipy.optimize import brentq

MIN_TAIL = 1e-12  # smaller p-values are reported as this one
POWER = 0.8  # of the smallest detectable shortfall


class Estimate(Protocol):
    """Value in [0, 1] with confidence bounds, as `ProportionEstimate`."""

    @property
    def value(self) -> float:
        """Estimated value."""

    def tail_bounds(self, tail: float) -> tuple[float, float]:
        """Lower and upper confidence bound, each with tail probability `tail`, also a small one."""

    def planned_bounds(self, value: float, tail: float) -> tuple[float, float]:
        """The same bounds if the value was another one."""


def shortfall_p_value(subgroup: Estimate, others: Estimate, correlation: float) -> float:
    """Test whether the value of the subgroup is below that of the others.

    Args:
        subgroup: estimate that may be worse.
        others: estimate that it is compared with.
        correlation: of the two estimates; 0 if no patient or lesion is in both.

    Returns:
        The one-sided p-value, at least `MIN_TAIL`; 1 without a shortfall.
    """
    difference = others.value - subgroup.value
    if difference <= 0:
        return 1.0

    def lower_bound(log_tail: float) -> float:
        tail = math.exp(log_tail)
        below, above = others.value - others.tail_bounds(tail)[0], subgroup.tail_bounds(tail)[1] - subgroup.value
        return difference - _distance(below, above, correlation)

    smallest, largest = math.log(MIN_TAIL), math.log(0.5)
    if lower_bound(smallest) >= 0:
        return MIN_TAIL
    if lower_bound(largest) <= 0:
        return 0.5
    return math.exp(brentq(lower_bound, smallest, largest, xtol=1e-4))


def detectable_shortfall(subgroup: Estimate, others: Estimate, correlation: float, tail: float) -> float | None:
    """Compute the shortfall that a test of these sample sizes finds with a probability of `POWER`.

    The value of the subgroup that would just be significant is below that of the others by the distance of their bounds
    at `tail`; the true value is lower still, by the distance of the bounds at 1 - `POWER`. It depends on the observed
    value of the subgroup only through its effective size.

    Args:
        subgroup: estimate that may be worse.
        others: estimate that it is compared with.
        correlation: of the two estimates; 0 if no patient or lesion is in both.
        tail: p-value below which a shortfall is significant.

    Returns:
        None if not even a value of 0 would be found.
    """

    def excess(value: float) -> float:
        """Shortfall of a value minus the one that is just significant."""
        below, above = others.value - others.tail_bounds(tail)[0], subgroup.planned_bounds(value, tail)[1] - value
        return others.value - value - _distance(below, above, correlation)

    if excess(0.0) <= 0:
        return None
    value = float(brentq(excess, 0.0, others.value, xtol=1e-4))
    above = others.tail_bounds(1 - POWER)[1] - others.value
    below = value - subgroup.planned_bounds(value, 1 - POWER)[0]
    result = others.value - value + _distance(above, below, correlation)
    return result if result <= others.value else None


def _distance(first: float, second: float, correlation: float) -> float:
    """Distance of the bound of a difference from its value, from those of its two terms."""
    return math.sqrt(max(0.0, first * first + second * second - 2 * correlation * first * second))
