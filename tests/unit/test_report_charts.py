"""Charts of a report: which there are, what they show on the page, and as figures for a paper."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from epi_ds.report import axes
from epi_ds.report.charts import LineChart, Series, Unit
from epi_ds.report.figures import write_figures
from epi_ds.report.page import charts_of
from epi_ds.report.svg import drawn
from tests.support.run_lines import LINES, run_of


def test_losses_are_drawn_by_source_and_gaps_stay_gaps() -> None:
    # Steps of an earlier release say nothing of sources; a loss that was not finite is a gap.
    found = [{"sums": 2.0}, {"sums": None, "own rows (replayed)": 3.0}]
    steps = [{**LINES[2], "step": step, "source_losses": losses} for step, losses in enumerate(found, 2)]
    charts = charts_of([run_of([*LINES, *steps])]).losses
    assert [chart.key for chart in charts] == ["loss", "loss-by-source"]
    assert charts[1].series[0].points == ((2.0, 2.0), (3.0, None))
    assert "sums: \N{EN DASH}" in drawn(charts[1])
    # One source is all there is in the chart of the loss.
    assert [chart.key for chart in charts_of([run_of([*LINES, steps[0]])]).losses] == ["loss"]


def test_points_on_the_edge_lie_inside_and_titles_say_what_the_metrics_say() -> None:
    chart = charts_of([run_of(LINES)]).scores[0]
    svg = drawn(chart)
    marks = [float(y) for y in re.findall(r'class="mark s\d" d="M[\d.]+ ([\d.]+)', svg)]
    bottom = float(re.findall(r'class="axis" x1="[\d.]+" y1="([\d.]+)"', svg)[0])
    assert (min(marks) > 24 + 4, max(marks) < bottom - 4) == (True, True)
    assert "step 2\na: 75.00%\nb: 0.00%" in unescape(svg)


def line_chart(*points: tuple[float, float | None], **given: Any) -> LineChart:
    return LineChart("k", "t", "l", Unit.NUMBER, (Series("s", points, 0),), {}, **given)


def test_axes_have_round_ends_and_no_point_outside() -> None:
    axis = axes.y_axis(line_chart((0, 0.123), (1, 0.987)), 100, 0)
    assert axis.ticks == pytest.approx((0, 0.2, 0.4, 0.6, 0.8, 1.0))
    assert (axis.at(0), axis.at(1)) == (100, 0)
    logarithmic = axes.y_axis(line_chart((0, 0.03), (1, 40.0), is_log=True), 100, 0)
    assert logarithmic.ticks == (0.1, 1, 10)
    assert 0 <= logarithmic.at(40.0) <= logarithmic.at(0.03) <= 100
    # One value alone, and none.
    assert axes.y_axis(line_chart((0, 5.0)), 100, 0).at(5.0) == 100
    assert axes.y_axis(line_chart(), 100, 0).ticks[-1] == 1
    assert axes.ticks(0, 3, whole=True) == [0, 1, 2, 3]


def test_thinning_keeps_peaks_and_gaps() -> None:
    points: list[tuple[float, float | None]] = [(float(x), 0.0) for x in range(10_000)]
    points[1234], points[7000], points[9000] = (1234.0, 9.0), (7000.0, -9.0), (9000.0, None)
    thinned = axes.thinned(points, 100)
    assert len(thinned) <= 110
    assert {points[1234], points[7000], points[9000]} <= set(thinned)
    assert thinned == sorted(thinned, key=lambda point: point[0])
    assert axes.smoothed([(0, 1.0), (1, None), (2, 4.0)], 3) == [(0, 1.0), (1, 2.5), (2, 4.0)]
    assert axes.spread(100, 5) == [0, 25, 50, 74, 99]


def test_figures_are_written_as_svg_and_png_and_are_the_same_every_time(tmp_path: Path) -> None:
    known = {
        "layer_importance": {"x": {"smallest": 0.0, "threshold": 0.5, "largest": 2.0, "largest_in": "x.w"}},
        "layer_flip_rate": {"x": 0.25, "y": None},
        "kind_numel": {"q": 50}, "kind_isolated": {"q": 5}, "jaccard": 0.75,
    }  # fmt: skip
    runs = [run_of([*LINES, {**LINES[4], **known, "step": 4}], name) for name in ("$one$", "two")]
    keys = {chart.key for chart in charts_of(runs).all}
    assert {"plane", "score-a", "loss", "isolated-share", "overlap-before", "isolated-by-kind"} <= keys
    assert {"run-1-isolated-by-layer", "run-2-flips-by-layer", "run-1-importance-by-layer"} <= keys
    # One of each kind: drawing takes a fifth of a second.
    kinds = list({type(chart): chart for chart in charts_of(runs).all}.values())
    written = write_figures(kinds, tmp_path / "one")
    assert {path.name for path in written} == {f"{chart.key}.{kind}" for chart in kinds for kind in ("svg", "png")}
    again = write_figures(kinds[:1], tmp_path / "two")
    assert [path.read_bytes() for path in again] == [(tmp_path / "one" / path.name).read_bytes() for path in again]
    assert (tmp_path / "one" / "plane.png").read_bytes().startswith(b"\x89PNG")
