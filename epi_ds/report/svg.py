"""Charts as SVG for the page: colours by class, so that either scheme has its own, and a ``<title>`` to read off."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise

from markupsafe import Markup

from epi_ds.report import axes, told
from epi_ds.report.axes import Axis, Scale
from epi_ds.report.charts import BarChart, Chart, HeatMap, LineChart, Plane, Point, RangeChart, Series, Unit
from epi_ds.report.svg_rows import bar_rows, heat_rows, range_rows

WIDTH = 440
_HEIGHT = 246
# Points on the edge of the plot lie this far inside of it, marks and all.
_ROOM = 8
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 24, 42
_MOST_POINTS = 800
_MOST_BANDS = 120
# Before so many points nothing is smoothed.
_NOISY = 60


def drawn(chart: Chart) -> Markup:
    """Return a chart as SVG text, in which nothing of a run's names is markup."""
    match chart:
        case LineChart():
            height, parts = _HEIGHT, _line_parts(chart)
        case Plane():
            height, parts = WIDTH, _plane_parts(chart)
        case HeatMap():
            height, parts = heat_rows(chart, WIDTH)
        case RangeChart():
            height, parts = range_rows(chart, WIDTH)
        case BarChart():
            height, parts = bar_rows(chart, WIDTH)
    body = "\n".join(parts)
    name = escape(chart.title)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height}" role="group" aria-label="{name}">\n{body}\n</svg>')


def swatch(look: int) -> Markup:
    """Return what lines of a look are like, for a legend."""
    line = f'<path class="line s{look % 8}" d="M0 6H28"/>{_mark(14, 6, look)}'
    return Markup(f'<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true">{line}</svg>')


def is_smoothed(chart: LineChart) -> bool:
    """Whether a chart has a mean of its neighbours drawn over every line."""
    return not chart.is_marked and chart.unit is not Unit.SHARE and any(len(s.points) >= _NOISY for s in chart.series)


def window_of(points: Sequence[Point]) -> int:
    """Return over how many neighbours the mean of a line is."""
    return max(3, len(points) // 40)


def _line_parts(chart: LineChart) -> Iterable[str]:
    x = axes.x_scale(chart, _LEFT + _ROOM, WIDTH - _RIGHT - _ROOM)
    y = axes.y_axis(chart, _HEIGHT - _BOTTOM - _ROOM, _TOP + _ROOM)
    yield from _stage_parts(chart, x)
    yield from _axis_parts(chart, x, y)
    for series in chart.series:
        points = axes.thinned(series.points, _MOST_POINTS)
        is_faint = is_smoothed(chart) and len(series.points) >= _NOISY
        yield f'<path class="line s{series.look % 8}{" faint" if is_faint else ""}" d="{_path(points, x, y)}"/>'
        if is_faint:
            mean = axes.thinned(axes.smoothed(series.points, window_of(series.points)), _MOST_POINTS)
            yield f'<path class="line s{series.look % 8}" d="{_path(mean, x, y)}"/>'
        if chart.is_marked or len(series.points) == 1:
            yield from (_mark(x.at(px), y.at(py), series.look) for px, py in series.points if py is not None)
    yield from _band_parts(chart, x)


def _stage_parts(chart: LineChart, x: Scale) -> Iterable[str]:
    """Where stages begin and what they are called."""
    bottom = _HEIGHT - _BOTTOM
    for name, (first, stop) in chart.stages.items():
        begin, end = x.at(max(first, x.low)), x.at(stop)
        if first > x.low:
            yield f'<line class="stage" x1="{begin:.1f}" y1="{_TOP}" x2="{begin:.1f}" y2="{bottom}"/>'
        shown = shortened(name, int((end - begin) / 6.8))
        if shown:
            yield f'<text class="small" x="{(begin + end) / 2:.1f}" y="{_TOP - 8}" text-anchor="middle">{shown}</text>'


def _axis_parts(chart: LineChart, x: Scale, y: Axis) -> Iterable[str]:
    bottom, right = _HEIGHT - _BOTTOM, WIDTH - _RIGHT
    for tick in y.ticks:
        place = y.at(tick)
        yield f'<line class="grid" x1="{_LEFT}" y1="{place:.1f}" x2="{right}" y2="{place:.1f}"/>'
        label = axes.said(tick, chart.unit, step=y.step)
        yield f'<text x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{label}</text>'
    yield f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>'
    for tick in axes.ticks(x.low, x.high, whole=True):
        yield f'<text x="{x.at(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{tick:g}</text>'
    yield f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">step</text>'
    middle = (_TOP + bottom) / 2
    yield f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(chart.label)}</text>'


def _path(points: Iterable[Point], x: Scale, y: Axis) -> str:
    parts, pen = [], "M"
    for px, py in points:
        if py is None:
            pen = "M"
            continue
        parts.append(f"{pen}{x.at(px):.1f} {y.at(py):.1f}")
        pen = "L"
    return "".join(parts)


def _mark(x: float, y: float, look: int, extra: str = "") -> str:
    """A mark whose form says the same as its colour."""
    r, d = 3.6, 5.0
    outlines = (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z",
        f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}Z",
        f"M{x:.1f} {y - 1.3 * r:.1f}l{1.2 * r:.1f} {2.2 * r:.1f}h{-2.4 * r:.1f}Z",
        f"M{x - d:.1f} {y:.1f}l{d:.1f} {d:.1f}l{d:.1f} {-d:.1f}l{-d:.1f} {-d:.1f}Z",
    )
    return f'<path class="mark s{look % 8}{extra}" d="{outlines[look % len(outlines)]}"/>'


def _band_parts(chart: LineChart, x: Scale) -> Iterable[str]:
    """Strips from top to bottom that say what every line is there."""
    places = sorted({px for series in chart.series for px, _ in series.points})
    shown = [places[place] for place in axes.spread(len(places), _MOST_BANDS)]
    edges = [_LEFT, *((x.at(a) + x.at(b)) / 2 for a, b in pairwise(shown)), WIDTH - _RIGHT]
    height = _HEIGHT - _BOTTOM - _TOP
    for place, (left, right) in zip(shown, pairwise(edges), strict=True):
        lines = [f"step {place:g}", *(_read_off(series, place, chart.unit) for series in chart.series)]
        yield (
            f'<rect class="band" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{height}">'
            f"<title>{escape(chr(10).join(lines))}</title></rect>"
        )


def _read_off(series: Series, x: float, unit: Unit) -> str:
    """What a line is at a step, or at the step nearest to it that it has."""
    steps = [px for px, _ in series.points]
    near = bisect_left(steps, x)
    if near == len(steps) or (near > 0 and x - steps[near - 1] < steps[near] - x):
        near -= 1
    found, value = series.points[near]
    shown = told.NOTHING if value is None else axes.said(value, unit)
    return f"{series.name}: {shown}" + ("" if found == x else f" (step {found:g})")


def _plane_parts(chart: Plane) -> Iterable[str]:
    bottom = WIDTH - _BOTTOM
    x = Scale(0, 1, _LEFT + _ROOM, WIDTH - _RIGHT - _ROOM)
    y = Scale(0, 1, bottom - _ROOM, _TOP + _ROOM)
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        for scale, ends in ((x, (_TOP, bottom)), (y, (_LEFT, WIDTH - _RIGHT))):
            at = scale.at(tick)
            line = (at, ends[0], at, ends[1]) if scale is x else (ends[0], at, ends[1], at)
            yield '<line class="grid" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'.format(*line)
        yield f'<text x="{x.at(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{tick:.0%}</text>'
        yield f'<text x="{_LEFT - 6}" y="{y.at(tick) + 4:.1f}" text-anchor="end">{tick:.0%}</text>'
    middle = 'text-anchor="middle"'
    yield f'<text x="{(_LEFT + WIDTH) / 2}" y="{WIDTH - 6}" {middle}>learnt (mean accuracy of its stages)</text>'
    yield f'<text transform="translate(12 {WIDTH / 2}) rotate(-90)" {middle}>kept (mean accuracy)</text>'
    for arrow in chart.arrows:
        (x0, y0), (x1, y1) = ((x.at(px), y.at(py)) for px, py in (arrow.start, arrow.end))
        told_ = f"{arrow.name}\n" + "\n".join(
            f"{what}: {told.percent(before)} → {told.percent(after)}"
            for what, before, after in zip(("learnt", "kept"), arrow.start, arrow.end, strict=True)
        )
        yield f'<g class="hit"><title>{escape(told_)}</title>'
        yield f'<path class="line s{arrow.look % 8}" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>'
        yield _mark(x0, y0, arrow.look, " hollow") + _mark(x1, y1, arrow.look) + "</g>"


def shortened(text: str, most: int) -> str:
    """Return escaped text of at most so many characters, with an ellipsis where it is cut; nothing for under three."""
    if most < 3:
        return ""
    return escape(text if len(text) <= most else text[: most - 1] + "…")
