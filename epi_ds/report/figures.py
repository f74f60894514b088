"""Figures for papers and pictures, drawn by matplotlib: charts of a report, and the plane of several models."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from epi_ds.checkpoint.disk import writing
from epi_ds.report.charts import BarChart, Chart, HeatMap, LineChart, Plane, RangeChart, Unit

# Of the page's light scheme; told apart by eyes that do not see all colours, with dashes and marks besides.
_COLOURS = ("#0072b2", "#b84a00", "#007d5b", "#a8437f", "#8a6400", "#4f55b8", "#2b8296", "#555b64")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKS = ("o", "s", "^", "D")
# One column of a paper, in inches.
_WIDTH = 3.4
_STYLE = {
    "font.size": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    # Names are names, dollar signs and all.
    "text.parse_math": False,
    # No random ids: the same run gives the same file.
    "svg.hashsalt": "epi_ds",
}


def plane_axes(*, label: str) -> tuple[Figure, Axes]:
    """Return an empty plane of what was learnt, as ``label`` says it, against what was kept."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(label)
    axes.set_ylabel("kept (mean accuracy of what the base could)")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg_of(figure: Figure) -> str:
    """Return a figure as SVG text."""
    buffer = io.StringIO()
    # No date and no random ids: the same run gives the same page.
    with rc_context({"svg.hashsalt": "epi_ds"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def write_figures(charts: Iterable[Chart], folder: Path) -> list[Path]:
    """Write every chart as ``KEY.svg`` and ``KEY.png``, as wide as a column of a paper; return the files.

    Raises DiskError where they cannot be written.
    """
    written = []
    with writing(folder), rc_context(_STYLE):
        folder.mkdir(parents=True, exist_ok=True)
        for chart in charts:
            figure = _drawn(chart)
            for kind, metadata in (("svg", {"Date": None}), ("png", {})):
                path = folder / f"{chart.key}.{kind}"
                figure.savefig(path, dpi=300, metadata=metadata)
                written.append(path)
    return written


def _drawn(chart: Chart) -> Figure:
    match chart:
        case LineChart():
            return _lines(chart)
        case HeatMap():
            return _heat(chart)
        case RangeChart():
            return _ranges(chart)
        case BarChart():
            return _bars(chart)
        case Plane():
            return _plane(chart)


def _figure(height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=8, loc="left")
    return figure, axes


def _look(look: int) -> dict[str, Any]:
    return {"color": _COLOURS[look % len(_COLOURS)], "linestyle": _DASHES[look % len(_DASHES)]}


def _lines(chart: LineChart) -> Figure:
    figure, axes = _figure(2.2, chart.title)
    for series in chart.series:
        # On the edge of the plot a mark is whole, too.
        marks: dict[str, Any] = {"marker": _MARKS[series.look % len(_MARKS)], "markersize": 3.5}
        xs, ys = zip(*((x, math.nan if y is None else y) for x, y in series.points), strict=True)
        axes.plot(xs, ys, label=series.name, clip_on=False, **_look(series.look), **(marks if chart.is_marked else {}))
    for first, _ in list(chart.stages.values())[1:]:
        axes.axvline(first, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xlabel("step")
    axes.set_ylabel(chart.label)
    if chart.is_log:
        axes.set_yscale("log")
        _plain_decades(axes.yaxis)
    if chart.unit is Unit.SHARE:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if chart.low is not None:
        axes.set_ylim(bottom=chart.low)
    if chart.high is not None:
        axes.set_ylim(top=chart.high)
    if len(chart.series) > 1:
        figure.legend(loc="outside lower center", ncols=3)
    return figure


def _heat(chart: HeatMap) -> Figure:
    figure, axes = _figure(0.9 + 0.13 * len(chart.rows), chart.title)
    cells = [[math.nan if cell is None else cell for cell in row] for row in chart.cells]
    image = axes.imshow(cells, aspect="auto", cmap="viridis", vmin=0, vmax=chart.high, interpolation="nearest")
    axes.set_yticks(range(len(chart.rows)), chart.rows, fontsize=6)
    shown = range(0, len(chart.columns), max(1, len(chart.columns) // 6))
    axes.set_xticks(list(shown), [str(chart.columns[place]) for place in shown])
    axes.set_xlabel("refresh after step")
    figure.colorbar(image, ax=axes, label=chart.label, format=PercentFormatter(1.0))
    return figure


def _ranges(chart: RangeChart) -> Figure:
    figure, axes = _rows(chart.title, [row.name for row in chart.rows], chart.label)
    axes.set_xscale("log")
    _plain_decades(axes.xaxis)
    # An importance of zero has no place on the axis; the smallest that has one stands for it.
    lowest = min(value for row in chart.rows for value in (row.smallest, row.threshold, row.largest) if value)
    colour = _look(chart.look)["color"]
    for place, row in enumerate(chart.rows):
        axes.plot([row.smallest or lowest, row.largest], [place, place], color=colour, alpha=0.35, linewidth=3)
        if row.threshold is not None:
            axes.plot([row.threshold, row.largest], [place, place], color=colour, linewidth=3)
    return figure


def _plain_decades(axis: Axis) -> None:
    """Label decades by numbers: the powers that matplotlib writes are markup, which names must not be."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _bars(chart: BarChart) -> Figure:
    figure, axes = _rows(chart.title, [row.name for row in chart.rows], chart.label)
    height = 0.8 / len(chart.runs)
    for number, run in enumerate(chart.runs):
        places = [place + (number - (len(chart.runs) - 1) / 2) * height for place in range(len(chart.rows))]
        values = [row.values[number] or 0.0 for row in chart.rows]
        axes.barh(places, values, height, color=_look(run.look)["color"], label=run.name)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    if len(chart.runs) > 1:
        figure.legend(loc="outside lower center", ncols=3)
    return figure


def _rows(title: str, names: Sequence[str], label: str) -> tuple[Figure, Axes]:
    figure, axes = _figure(0.9 + 0.15 * len(names), title)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    return figure, axes


def _plane(chart: Plane) -> Figure:
    figure, axes = _figure(_WIDTH, chart.title)
    for arrow in chart.arrows:
        look, mark = _look(arrow.look), _MARKS[arrow.look % len(_MARKS)]
        axes.plot(*zip(arrow.start, arrow.end, strict=True), **look)
        axes.plot(*arrow.start, marker=mark, color=look["color"], markerfacecolor="white", clip_on=False)
        axes.plot(*arrow.end, marker=mark, color=look["color"], label=arrow.name, clip_on=False, linestyle="none")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="learnt (mean accuracy)", ylabel="kept (mean accuracy)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(loc="outside lower center", ncols=3)
    return figure
