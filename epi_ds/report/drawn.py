"""Which charts a report has. Runs are told apart by colour; of one run alone, its tasks and sources are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from epi_ds.report.charts import (
    Arrow,
    Bar,
    BarChart,
    Extent,
    HeatMap,
    LineChart,
    Look,
    Plane,
    Point,
    RangeChart,
    Series,
    Unit,
)
from epi_ds.report.outcome import outcome_of
from epi_ds.report.run import Layer, Refresh, Run
from epi_ds.report.scores import TaskRow

# As many columns as a phone shows; of more refreshes some are left out.
_MOST_COLUMNS = 48
# Losses that differ by this factor are drawn on a logarithmic axis.
_FAR = 10


def plane(runs: Sequence[Run]) -> Plane | None:
    """Return the plane of several runs; None for one, and where no accuracy says what was learnt and what was kept."""
    arrows = []
    for look, run in enumerate(runs):
        outcome = outcome_of(run)
        learnt, kept = outcome.learnt_mean, outcome.kept_mean
        if learnt is not None and kept is not None:
            arrows.append(Arrow(run.name, (learnt.before, kept.before), (learnt.after, kept.after), look))
    if len(runs) < 2 or not arrows:
        return None
    return Plane("plane", "Learnt against kept", tuple(arrows))


def score_charts(runs: Sequence[Run]) -> list[LineChart]:
    """Return the course of scores: of one run accuracies and losses, of several a chart for every task."""
    if len(runs) == 1:
        run = runs[0]
        kinds = (("accuracy", "Accuracy", True), ("task-loss", "Loss of tasks", False))
        charts = [
            _score_chart(
                key, title, [(row.name, row, run) for row in run.history.rows if row.higher_is_better is higher], runs
            )
            for key, title, higher in kinds
        ]
        return [chart for chart in charts if chart.series]
    names = dict.fromkeys(row.name for run in runs for row in run.history.rows)
    rows = {
        name: [(run.name, row, run) for run in runs for row in run.history.rows if row.name == name] for name in names
    }
    return [_score_chart(f"score-{_slug(name)}", name, rows[name], runs) for name in names]


def _score_chart(key: str, title: str, rows: Sequence[tuple[str, TaskRow, Run]], runs: Sequence[Run]) -> LineChart:
    series = []
    is_share = all(row.higher_is_better for _, row, _ in rows)
    for place, (name, row, run) in enumerate(rows):
        points = tuple(
            (float(step), score.value) for step, score in zip(run.history.steps, row.scores, strict=True) if score
        )
        series.append(Series(name, points, place if len(runs) == 1 else runs.index(run)))
    # Scores of lm-evaluation-harness may be larger than 1.
    values = [y for one in series for _, y in one.points if y is not None]
    bounded = is_share and all(0 <= value <= 1 for value in values)
    return LineChart(
        key,
        title,
        "accuracy" if is_share else "loss",
        Unit.SHARE if bounded else Unit.NUMBER,
        tuple(series),
        _stages(runs),
        is_marked=True,
        low=0.0 if bounded else None,
        high=1.0 if bounded else None,
    )


def loss_charts(runs: Sequence[Run]) -> list[LineChart]:
    """Return training losses: of all tokens, and of one run with several sources those of each."""
    losses = {run.name: [(float(step.step), step.loss) for step in run.steps] for run in runs}
    charts = [_lines("loss", "Training loss", "loss", losses, runs)]
    if len(runs) == 1 and len(names := _sources(runs[0])) > 1:
        by_source: dict[str, list[Point]] = {
            name: [(float(s.step), s.source_losses[name]) for s in runs[0].steps if name in s.source_losses]
            for name in names
        }
        charts.append(_lines("loss-by-source", "Training loss by source", "loss", by_source, runs))
    return [_logarithmic(chart) for chart in charts if chart.series]


def _logarithmic(chart: LineChart) -> LineChart:
    """Return a chart of losses on a logarithmic axis where they fall far: a straight one would show the fall alone."""
    values = [y for one in chart.series for _, y in one.points if y is not None]
    is_log = bool(values) and min(values) > 0 and max(values) >= _FAR * min(values)
    return chart._replace(is_log=is_log, label="loss, logarithmic") if is_log else chart


def _sources(run: Run) -> list[str]:
    """Names of the sources whose losses the steps have, in the order of their first; earlier releases wrote none."""
    return list(dict.fromkeys(name for step in run.steps for name in step.source_losses))


def share_chart(runs: Sequence[Run]) -> LineChart | None:
    """Return the isolated share of every step; None where nothing was isolated."""
    shares = {run.name: [(float(step.step), step.isolated_share) for step in run.steps] for run in runs}
    chart = _lines("isolated-share", "Isolated share", "isolated share", shares, runs, unit=Unit.SHARE, low=0.0)
    return chart if any(run.active_share for run in runs) else None


def drift_charts(runs: Sequence[Run]) -> list[LineChart]:
    """Return the overlaps of masks with the one before and with the first one, and the gradient that was held."""
    fields: tuple[tuple[str, str, str, Callable[[Refresh], float | None]], ...] = (
        ("overlap-before", "Overlap with the mask before", "overlap", lambda one: one.jaccard),
        ("overlap-first", "Overlap with the first mask", "overlap", lambda one: one.jaccard_first),
        ("held-gradient", "Share of the squared gradient that was held", "share", lambda one: one.held_gradient_energy),
    )
    charts = []
    for key, title, label, field in fields:
        found = {
            run.name: [(float(one.step), field(one)) for one in run.refreshes if field(one) is not None] for run in runs
        }
        charts.append(_lines(key, title, label, found, runs, unit=Unit.SHARE, is_marked=True, low=0.0, high=1.0))
    return [chart for chart in charts if chart.series]


def seconds_chart(runs: Sequence[Run]) -> LineChart | None:
    """Return what steps took; None where that is not known."""
    found = {run.name: [(float(s.step), s.seconds) for s in run.steps if s.seconds is not None] for run in runs}
    chart = _lines("seconds", "Time of a step", "seconds", found, runs, unit=Unit.SECONDS, low=0.0)
    return chart if chart.series else None


def layer_maps(run: Run, key: str, *, look: int) -> list[HeatMap]:
    """Return two maps of layers and refreshes: what of each is isolated, and what of that was released."""
    if not run.refreshes:
        return []
    shown = _thinned(run.refreshes)
    maps = [
        _map(f"{key}isolated-by-layer", "Isolated share by layer", shown, look, lambda layer: layer.share),
        _map(f"{key}flips-by-layer", "Released by layer (flip rate)", shown, look, lambda layer: layer.flip_rate),
    ]
    return [one for one in maps if any(cell is not None for row in one.cells for cell in row)]


def _thinned(refreshes: Sequence[Refresh]) -> list[Refresh]:
    count = len(refreshes)
    if count <= _MOST_COLUMNS:
        return list(refreshes)
    return [refreshes[round(place * (count - 1) / (_MOST_COLUMNS - 1))] for place in range(_MOST_COLUMNS)]


def _map(
    key: str, title: str, refreshes: Sequence[Refresh], look: int, share: Callable[[Layer], float | None]
) -> HeatMap:
    names = tuple(layer.name for layer in refreshes[-1].layers)
    found = [{layer.name: share(layer) for layer in refresh.layers} for refresh in refreshes]
    cells = tuple(tuple(one.get(name) for one in found) for name in names)
    high = max((cell for row in cells for cell in row if cell is not None), default=0.0)
    return HeatMap(key, title, "share", names, tuple(one.step for one in refreshes), cells, high or 1.0, look)


def importance_chart(run: Run, key: str, *, look: int) -> RangeChart | None:
    """Return where the importance of every layer lies at the last refresh; None where that is not known."""
    layers = run.refreshes[-1].layers if run.refreshes else ()
    rows = tuple(
        Extent(layer.name, layer.smallest or 0.0, layer.threshold, layer.largest, _held(layer))
        for layer in layers
        if layer.largest
    )
    if not rows:
        return None
    title = f"Importance by layer after step {run.refreshes[-1].step}"
    return RangeChart(f"{key}importance-by-layer", title, "importance, logarithmic", rows, look)


def _held(layer: Layer) -> str:
    return f"{layer.share:.2%} isolated" + (f"; the largest is in {layer.largest_in}" if layer.largest_in else "")


def kind_chart(runs: Sequence[Run]) -> BarChart | None:
    """Return what of every kind of matrix the last masks isolate; None where that is not known."""
    found = [{kind.name: kind.share for kind in run.refreshes[-1].kinds} if run.refreshes else {} for run in runs]
    return _bars("isolated-by-kind", "Isolated share by kind of matrix", "isolated share", runs, found)


def displacement_chart(runs: Sequence[Run]) -> BarChart | None:
    """Return how far layers went; None where nobody measured."""
    found = [run.displacement or {} for run in runs]
    return _bars("displacement", "Displacement by layer", "distance / length", runs, found)


def _bars(
    key: str, title: str, label: str, runs: Sequence[Run], found: Sequence[Mapping[str, float]]
) -> BarChart | None:
    known = [(Look(run.name, look), one) for look, (run, one) in enumerate(zip(runs, found, strict=True)) if one]
    names = dict.fromkeys(name for _, one in known for name in one)
    rows = tuple(Bar(name, tuple(one.get(name) for _, one in known)) for name in names)
    return BarChart(key, title, label, tuple(run for run, _ in known), rows) if rows else None


def _lines(
    key: str,
    title: str,
    label: str,
    found: Mapping[str, Sequence[Point]],
    runs: Sequence[Run],
    *,
    unit: Unit = Unit.NUMBER,
    is_marked: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> LineChart:
    series = tuple(Series(name, tuple(points), look) for look, (name, points) in enumerate(found.items()) if points)
    return LineChart(key, title, label, unit, series, _stages(runs), is_marked, low, high)


def _stages(runs: Sequence[Run]) -> Mapping[str, tuple[int, int]]:
    """Return the stages that all runs have."""
    stages = runs[0].stages
    return stages if all(run.stages == stages for run in runs) else {}


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "task"
