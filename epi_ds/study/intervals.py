"""Means over seeds with t-intervals, and Holm's correction for several comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.stats import t as student

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    half_width: float | None
    """None where one value says nothing of others."""
    p: float | None
    """Two-sided, of the mean being zero (Student's t); None as above."""
    seeds: int
    """How many values it is of."""

    @property
    def low(self) -> float | None:
        """Lower end."""
        return None if self.half_width is None else self.mean - self.half_width


def interval_of(values: Sequence[float]) -> Interval | None:
    """Return the mean of one value per seed with its t-interval; None without values.

    Of paired arms these are the differences.
    """
    if not values:
        return None
    count = len(values)
    mean = fmean(values)
    if count == 1:
        return Interval(mean, None, None, 1)
    error = stdev(values) / math.sqrt(count)
    width = float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    if error == 0:
        return Interval(mean, 0.0, 1.0 if mean == 0 else 0.0, count)
    return Interval(mean, width, float(2 * student.sf(abs(mean) / error, count - 1)), count)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values by name, corrected for their number (Holm 1979, step-down)."""
    corrected: dict[str, float] = {}
    highest = 0.0
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for position, name in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - position) * p_values[name]))
        corrected[name] = highest
    return {name: corrected[name] for name in p_values}
