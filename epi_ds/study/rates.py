"""How wide the rates are at which a protection does no harm: people use rates that nobody knows to be too high.

[Note: width] Of the arms of one protection at several learning rates, both scores are taken to be linear in the
logarithm of the rate between neighbours. The rates at which `new` and `kept` are both at least 95 % of the best that
the protection reaches at any of them make intervals, and the width is that of the widest one, in doublings of the rate:
a single rate among them, or none, has the width 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

from epi_ds.errors import UserError
from epi_ds.study.cells import Cell, WorkFolder, recipe_of
from epi_ds.study.comparison import Results, over_seeds
from epi_ds.study.intervals import Interval
from epi_ds.study.models import Study
from epi_ds.study.result_lines import Status

TOLERANCE = 0.05


class RatePoint(NamedTuple):
    """What is learnt and kept at a learning rate."""

    rate: float
    new: float
    kept: float


class RatesRow(NamedTuple):
    """One protection, over the seeds of which all of its rates have run."""

    protection: str
    cells: int
    best_new: Interval
    kept_there: Interval
    """At the rate with the best new-task score."""
    width: Interval
    """In doublings of the rate. See [Note: width]."""


def width_of(points: Sequence[RatePoint], *, tolerance: float = TOLERANCE) -> float:
    """Return the width, in doublings, of the rates at which both scores are within a tolerance of their best.

    See [Note: width]. ``points`` are at rates that differ, in any order.
    """
    points = sorted(points)
    least_new = (1 - tolerance) * max(point.new for point in points)
    least_kept = (1 - tolerance) * max(point.kept for point in points)
    widest = reached = 0.0
    for low, high in pairwise(points):
        inside = [_above(low.new, high.new, least_new), _above(low.kept, high.kept, least_kept)]
        first, last = max(one[0] for one in inside), min(one[1] for one in inside)
        doublings = math.log2(high.rate / low.rate)
        # What reaches the end of one stretch goes on in the next.
        part = max(last - first, 0.0) * doublings
        reached = reached + part if first == 0.0 else part
        widest = max(widest, reached)
        if last < 1.0:
            reached = 0.0
    return widest


def _above(low: float, high: float, least: float) -> tuple[float, float]:
    """Return where, from 0 to 1, a line between two values is at or above a third; an empty stretch begins at 1."""
    if low >= least and high >= least:
        return 0.0, 1.0
    if low < least and high < least:
        return 1.0, 0.0
    crossing = (least - low) / (high - low)
    return (0.0, crossing) if low >= least else (crossing, 1.0)


def rates_rows(study: Study, results: Results, seeds: Sequence[int]) -> list[RatesRow]:
    """Return the protections of ``rates`` of which any seed has run at every rate.

    Raises UserError for two arms of one protection with the same rate.
    """
    rows = []
    for protection, arms in study.rates.items():
        widths: dict[Cell, float] = {}
        best: dict[Cell, RatePoint] = {}
        for seed in seeds:
            for target in study.targets:
                cells = [Cell(arm, seed, target) for arm in arms]
                if any(cell not in results or results[cell].status is not Status.OK for cell in cells):
                    continue
                points = [_point(study, results, cell) for cell in cells]
                if len({point.rate for point in points}) < len(points):
                    raise UserError(f"rates.{protection} has arms of the same learning rate; leave one of them out")
                widths[cells[0]] = width_of(points)
                best[cells[0]] = max(points, key=lambda point: point.new)
        new = over_seeds({cell: point.new for cell, point in best.items()})
        kept = over_seeds({cell: point.kept for cell, point in best.items()})
        width = over_seeds(widths)
        if new is not None and kept is not None and width is not None:
            rows.append(RatesRow(protection, len(widths), new, kept, width))
    return rows


def _point(study: Study, results: Results, cell: Cell) -> RatePoint:
    rate = recipe_of(study, cell, WorkFolder.nowhere())["train"]["learning_rate"]
    one = results[cell]
    return RatePoint(float(rate), cast(float, one.new), cast(float, one.kept))
