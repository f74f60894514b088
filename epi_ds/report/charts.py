"""Charts as frozen values: what is drawn, and not how. `svg` draws them for the page, `figures` for papers.

Two ways of drawing one chart, because a page wants text that grows with the reader's, colours of either scheme and
values that can be read off, and a paper wants a figure in the style of its field.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

Point = tuple[float, float | None]
"""x and y; a y of None is a gap."""


class Unit(StrEnum):
    """What the numbers of a chart are."""

    NUMBER = "number"
    SHARE = "share"
    SECONDS = "seconds"


class Series(NamedTuple):
    """One line."""

    name: str
    points: tuple[Point, ...]
    look: int
    """Which colour, dashes and marks it has: one number for one run throughout a page."""


class LineChart(NamedTuple):
    """Lines over the steps of a run."""

    key: str
    """Names its file."""
    title: str
    label: str
    """What is drawn upwards."""
    unit: Unit
    series: tuple[Series, ...]
    stages: Mapping[str, tuple[int, int]]
    """First and stop step of every stage; empty where the lines are of runs with other stages."""
    is_marked: bool = False
    """Whether points are marked: where they are few."""
    low: float | None = None
    """Where the axis begins; None for the smallest value."""
    high: float | None = None
    is_log: bool = False
    """Whether equal distances upwards are equal ratios; all values are positive then."""


class Look(NamedTuple):
    """What is drawn under one name."""

    name: str
    look: int
    """As a `Series` has it."""


class HeatMap(NamedTuple):
    """A share for every layer at every refresh."""

    key: str
    title: str
    label: str
    """What a cell holds."""
    rows: tuple[str, ...]
    columns: tuple[int, ...]
    """Steps."""
    cells: tuple[tuple[float | None, ...], ...]
    """By row."""
    high: float
    """The share that has the full colour."""
    look: int


class Extent(NamedTuple):
    """A row of a `RangeChart`."""

    name: str
    smallest: float
    threshold: float | None
    largest: float
    note: str
    """What else is known of it."""


class RangeChart(NamedTuple):
    """From where to where positive numbers go, on a logarithmic axis, and a mark among them."""

    key: str
    title: str
    label: str
    rows: tuple[Extent, ...]
    look: int


class Bar(NamedTuple):
    """A row of a `BarChart`."""

    name: str
    values: tuple[float | None, ...]
    """In the order of the chart's runs."""


class BarChart(NamedTuple):
    """Shares by name, of one run or of several."""

    key: str
    title: str
    label: str
    runs: tuple[Look, ...]
    rows: tuple[Bar, ...]


class Arrow(NamedTuple):
    """Where a run began and where it ended."""

    name: str
    start: tuple[float, float]
    """Learnt, kept; both of 0 to 1."""
    end: tuple[float, float]
    look: int


class Plane(NamedTuple):
    """What was learnt, to the right, against what was kept, upwards."""

    key: str
    title: str
    arrows: tuple[Arrow, ...]


Chart = LineChart | HeatMap | RangeChart | BarChart | Plane
