"""Scales, ticks and thinned lines of a drawing: numbers to places on a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from epi_ds.report import told
from epi_ds.report.charts import LineChart, Point, Unit


class Scale(NamedTuple):
    """A straight line from values to places."""

    low: float
    high: float
    start: float
    """Place of ``low``."""
    stop: float
    """Place of ``high``."""

    def at(self, value: float) -> float:
        """Return the place of a value."""
        if self.high == self.low:
            return (self.start + self.stop) / 2
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def ticks(low: float, high: float, *, most: int = 6, whole: bool = False, outside: bool = False) -> list[float]:
    """Return about so many round numbers from ``low`` to ``high``; whole ones for steps, and the next outside of both
    where these are not round.
    """
    if high <= low:
        return [low]
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    width = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    if whole:
        width = max(1.0, float(math.ceil(width)))
    down, up = (math.floor, math.ceil) if outside else (math.ceil, math.floor)
    first, last = down(low / width + (1e-9 if outside else -1e-9)), up(high / width - (1e-9 if outside else -1e-9))
    # Multiplied, and not added up: an error would be seen.
    return [place * width for place in range(first, last + 1)]


def said(value: float, unit: Unit, *, step: float | None = None) -> str:
    """Say a value of a chart; as the label of a tick, with the digits that ticks ``step`` apart need."""
    if unit is Unit.SHARE:
        digits = 2 if step is None else max(0, math.ceil(-math.log10(step * 100) - 1e-9)) if step else 0
        return told.percent(value, digits=digits)
    if unit is Unit.SECONDS and step is None:
        return told.seconds(value)
    return f"{value:g}" if step is not None else told.number(value)


class Axis(NamedTuple):
    """What lies where upwards, and the ticks there, which end it."""

    scale: Scale
    is_log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Return the place of a value."""
        return self.scale.at(math.log10(value) if self.is_log else value)

    @property
    def step(self) -> float:
        """What is between two ticks; of a logarithmic axis nothing in particular."""
        return self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0


def x_scale(chart: LineChart, start: float, stop: float) -> Scale:
    """Return the scale of a chart's steps, from its first point to the end of its last stage."""
    xs = [x for one in chart.series for x, _ in one.points]
    stops = [float(stop) for _, stop in chart.stages.values()]
    return Scale(min(xs, default=0.0), max([*xs, *stops], default=1.0), start, stop)


def y_axis(chart: LineChart, start: float, stop: float) -> Axis:
    """Return the axis of a chart's values: round numbers around all points, and the bounds that the chart wants."""
    ys = [y for one in chart.series for _, y in one.points if y is not None]
    if chart.is_log:
        powers = range(math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys))) + 1)
        found = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
        first, last = max(tick for tick in found if tick <= min(ys)), min(tick for tick in found if tick >= max(ys))
        scale = Scale(math.log10(first), math.log10(last), start, stop)
        decades = tuple(tick for tick in found[::3] if first <= tick <= last)
        return Axis(scale, True, decades if len(decades) > 2 else tuple(t for t in found if first <= t <= last))
    low = min(ys, default=0.0) if chart.low is None else chart.low
    high = max(ys, default=1.0) if chart.high is None else chart.high
    if high <= low:
        high = low + (abs(low) or 1.0)
    shown = tuple(ticks(low, high, most=5, outside=True))
    return Axis(Scale(shown[0], shown[-1], start, stop), False, shown)


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Return the smallest and the largest point of each of some stretches, so that no peak is lost, in order.

    Gaps stay gaps. Where there are no more than ``most`` points, all of them.
    """
    if len(points) <= most:
        return list(points)
    width = math.ceil(2 * len(points) / most)
    kept: list[Point] = []
    for first in range(0, len(points), width):
        part = points[first : first + width]
        known = [point for point in part if point[1] is not None]
        if len(known) < len(part):
            kept.append(next(point for point in part if point[1] is None))
        if known:
            ends = {min(known, key=lambda point: point[1] or 0.0), max(known, key=lambda point: point[1] or 0.0)}
            kept += ends
    return sorted(kept, key=lambda point: point[0])


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """Return the mean of every point and those around it, ``window`` in all; gaps are left out of it."""
    half, sums, counts = window // 2, [0.0], [0]
    for _, y in points:
        sums.append(sums[-1] + (y or 0.0))
        counts.append(counts[-1] + (y is not None))
    found: list[Point] = []
    for place, (x, _) in enumerate(points):
        first, stop = max(0, place - half), min(len(points), place + half + 1)
        count = counts[stop] - counts[first]
        found.append((x, (sums[stop] - sums[first]) / count if count else None))
    return found


def spread(count: int, most: int) -> list[int]:
    """Return places of ``range(count)``, evenly, both ends among them, at most ``most``."""
    if count <= most:
        return list(range(count))
    return sorted({round(place * (count - 1) / (most - 1)) for place in range(most)})
