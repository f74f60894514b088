"""The plane of the demo's two ways, as SVG text and for a terminal: to the right learnt more, higher up kept more."""

from __future__ import annotations

from collections.abc import Sequence

from epi_ds.demo.comparison import Point
from epi_ds.report.figures import plane_axes, svg_of

_COLUMNS, _ROWS = 51, 11
_COLOURS, _MARKS = ("0.5", "C3", "C0"), "ox*"


def plane_figure(points: Sequence[Point]) -> str:
    """Return the plane: an arrow from the first point to each of the others."""
    figure, axes = plane_axes(label="learnt (mean accuracy on the stages' tasks)")
    base = points[0]
    for point, colour in zip(points, _COLOURS, strict=True):
        if point is not base:
            arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.5, "shrinkA": 6, "shrinkB": 6}
            axes.annotate("", (point.learnt, point.kept), (base.learnt, base.kept), arrowprops=arrow)
        axes.plot(point.learnt, point.kept, marker="o", color=colour, markersize=8)
        axes.annotate(point.name, (point.learnt, point.kept), xytext=(8, 6), textcoords="offset points", color=colour)
    axes.set_xlim(-0.02, 1.12)
    return svg_of(figure)


def text_plane(points: Sequence[Point]) -> str:
    """Return the plane as lines of text; of points at one place the last one is seen."""
    rows = [[" "] * _COLUMNS for _ in range(_ROWS)]
    for point, mark in zip(points, _MARKS, strict=True):
        column, row = round(point.learnt * (_COLUMNS - 1)), round((1.0 - point.kept) * (_ROWS - 1))
        rows[row][column] = mark
    labels = {0: "100%", _ROWS - 1: "  0%"}
    lines = [f"{labels.get(number, ''):>4} |{''.join(row).rstrip()}" for number, row in enumerate(rows)]
    legend = ", ".join(f"{mark} {point.name}" for point, mark in zip(points, _MARKS, strict=True))
    return "\n".join(
        (
            "kept",
            *lines,
            f"     +{'-' * _COLUMNS}",
            f"      0%{'learnt':^{_COLUMNS - 6}}100%",
            f"      {legend}",
        )
    )
