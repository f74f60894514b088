"""Charts with a row for every layer, as SVG: heat maps, ranges of importance, and bars."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import takewhile

from epi_ds.report import axes, told
from epi_ds.report.axes import Scale
from epi_ds.report.charts import BarChart, HeatMap, RangeChart

_LEFT, _RIGHT = 134, 14
_TOP, _BOTTOM = 8, 36
_ROW = 16
_BAR = 13
# Characters of a name that fit to the left.
_MOST = 18


def heat_rows(chart: HeatMap, width: int) -> tuple[int, Iterable[str]]:
    """Return the height of a heat map, and its parts."""
    bottom = _TOP + _ROW * len(chart.rows)
    return bottom + _BOTTOM, _heat_parts(chart, width, bottom)


def _heat_parts(chart: HeatMap, width: int, bottom: int) -> Iterable[str]:
    cell = (width - _LEFT - _RIGHT) / len(chart.columns)
    yield from _names(chart.rows, [_TOP + _ROW * row for row in range(len(chart.rows))])
    for row, (name, cells) in enumerate(zip(chart.rows, chart.cells, strict=True)):
        top = _TOP + _ROW * row
        for column, (step, value) in enumerate(zip(chart.columns, cells, strict=True)):
            place = f'x="{_LEFT + cell * column:.1f}" y="{top}" width="{cell + 0.3:.1f}" height="{_ROW - 1}"'
            shown = f"{name}, after step {step}: {told.percent(value, digits=2)}"
            heat = "none" if value is None else f"{100 * value / chart.high:.0f}"
            look = 'class="cell none"' if value is None else f'class="cell s{chart.look % 8}" style="--v:{heat}%"'
            yield f"<rect {look} {place}><title>{escape(shown)}</title></rect>"
    for column in axes.spread(len(chart.columns), 6):
        middle = min(_LEFT + cell * (column + 0.5), width - 22)
        yield f'<text x="{middle:.1f}" y="{bottom + 14}" text-anchor="middle">{chart.columns[column]}</text>'
    yield f'<text x="{(_LEFT + width - _RIGHT) / 2}" y="{bottom + 31}" text-anchor="middle">refresh after step</text>'


def range_rows(chart: RangeChart, width: int) -> tuple[int, Iterable[str]]:
    """Return the height of a chart of ranges, and its parts."""
    bottom = _TOP + _ROW * len(chart.rows)
    return bottom + _BOTTOM, _range_parts(chart, width, bottom)


def _range_parts(chart: RangeChart, width: int, bottom: int) -> Iterable[str]:
    look = f"s{chart.look % 8}"
    values = [v for row in chart.rows for v in (row.smallest, row.threshold, row.largest) if v]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    scale = Scale(low, max(high, low + 1), _LEFT + 4, width - _RIGHT - 4)
    for decade in axes.ticks(scale.low, scale.high, most=6, whole=True):
        place = scale.at(decade)
        yield f'<line class="grid" x1="{place:.1f}" y1="{_TOP}" x2="{place:.1f}" y2="{bottom}"/>'
        yield f'<text x="{place:.1f}" y="{bottom + 14}" text-anchor="middle">1e{decade:g}</text>'
    yield from _names([one.name for one in chart.rows], [_TOP + _ROW * row for row in range(len(chart.rows))])
    for row, one in enumerate(chart.rows):
        top = _TOP + _ROW * row
        # An importance of zero is at the left end.
        begin, end = (scale.at(math.log10(v)) if v else scale.start for v in (one.smallest, one.largest))
        shown = f"{one.name}\nsmallest {told.number(one.smallest)}, largest {told.number(one.largest)}"
        shown += f"\nisolated from {told.number(one.threshold)} on" if one.threshold else "\nno threshold"
        yield f'<g class="hit"><title>{escape(f"{shown}{chr(10)}{one.note}")}</title>'
        yield _bar(f"{look} soft", begin, end, top + 3)
        if one.threshold:
            place = scale.at(math.log10(one.threshold))
            yield _bar(look, place, end, top + 3)
            yield f'<line class="threshold" x1="{place:.1f}" y1="{top + 1}" x2="{place:.1f}" y2="{top + 14}"/>'
        yield "</g>"
    yield f'<text x="{(_LEFT + width - _RIGHT) / 2}" y="{bottom + 31}" text-anchor="middle">{chart.label}</text>'


def bar_rows(chart: BarChart, width: int) -> tuple[int, Iterable[str]]:
    """Return the height of a chart of bars, and its parts."""
    bottom = _TOP + _row_height(chart) * len(chart.rows)
    return bottom + _BOTTOM, _bar_parts(chart, width, bottom)


def _row_height(chart: BarChart) -> int:
    return 4 + _BAR * len(chart.runs)


def _bar_parts(chart: BarChart, width: int, bottom: int) -> Iterable[str]:
    high = max((value for row in chart.rows for value in row.values if value is not None), default=0.0) or 1.0
    scale = Scale(0, high, _LEFT, width - _RIGHT - 48)
    tops = [_TOP + _row_height(chart) * row for row in range(len(chart.rows))]
    yield from _names([one.name for one in chart.rows], [top + (_row_height(chart) - _ROW) / 2 for top in tops])
    for one, top in zip(chart.rows, tops, strict=True):
        for place, (run, value) in enumerate(zip(chart.runs, one.values, strict=True)):
            if value is None:
                continue
            y = top + 3 + _BAR * place
            shown = f"{one.name}, {run.name}: {told.percent(value, digits=3)}"
            yield f'<g class="hit"><title>{escape(shown)}</title>'
            end = scale.at(value)
            yield _bar(f"s{run.look % 8}", _LEFT, end, y)
            yield f'<text class="small" x="{end + 4:.1f}" y="{y + 8}">{100 * value:.3g}%</text></g>'
    yield f'<line class="axis" x1="{_LEFT}" y1="{_TOP}" x2="{_LEFT}" y2="{bottom}"/>'
    middle = (_LEFT + width - _RIGHT) / 2
    yield f'<text x="{middle}" y="{bottom + 18}" text-anchor="middle">{escape(chart.label)}</text>'


def _bar(look: str, begin: float, end: float, top: float) -> str:
    # What is nearly nothing is seen, too.
    return f'<rect class="bar {look}" x="{begin:.1f}" y="{top}" width="{max(1.0, end - begin):.1f}" height="9"/>'


def _names(names: Sequence[str], tops: Sequence[float]) -> Iterable[str]:
    """What rows are called, without what all of their names begin with."""
    parts = [name.split(".") for name in names]
    shared = 0
    if len(names) > 1:
        shared = len(list(takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))))
    for part, top in zip(parts, tops, strict=True):
        name = ".".join(part[min(shared, len(part) - 1) :])
        # Of layers and matrices the end says which it is.
        shown = name if len(name) <= _MOST else f"…{name[1 - _MOST :]}"
        yield f'<text class="small" x="{_LEFT - 6}" y="{top + 11:.1f}" text-anchor="end">{escape(shown)}</text>'
