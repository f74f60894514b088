"""``report.html``: one page of one run or of several, that opens without a network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from epi_ds.checkpoint.disk import writing
from epi_ds.checkpoint.durable import write_text
from epi_ds.report import drawn, told
from epi_ds.report.charts import BarChart, Chart, LineChart, Look, Plane
from epi_ds.report.effort import effort_of
from epi_ds.report.findings import findings_of
from epi_ds.report.outcome import outcome_of, side_by_side
from epi_ds.report.run import Run
from epi_ds.report.scores import TaskScore
from epi_ds.report.settings import environment_rows, setting_rows
from epi_ds.report.svg import drawn as svg_of
from epi_ds.report.svg import is_smoothed, swatch
from epi_ds.report.words import WORDS, term

_FILES = Path(__file__).parent


class Charts(NamedTuple):
    """All charts of a page, by what they are about; of a run alone those that have a row for every layer."""

    plane: Plane | None
    scores: list[LineChart]
    losses: list[LineChart]
    isolation: list[Chart]
    layers: list[tuple[Look, list[Chart]]]
    """By run."""
    drift: list[LineChart]
    displacement: BarChart | None
    seconds: LineChart | None

    @property
    def all(self) -> list[Chart]:
        """Every one, in the order of the page."""
        one = [self.plane, *self.scores, *self.losses, *self.isolation]
        one += [chart for _, charts in self.layers for chart in charts]
        one += [*self.drift, self.displacement, self.seconds]
        return [chart for chart in one if chart is not None]


def charts_of(runs: Sequence[Run]) -> Charts:
    """Return all charts of a report."""
    layers: list[tuple[Look, list[Chart]]] = []
    for look, run in enumerate(runs):
        key = "" if len(runs) == 1 else f"run-{look + 1}-"
        importance = drawn.importance_chart(run, key, look=look)
        found: list[Chart] = [*drawn.layer_maps(run, key, look=look), *([] if importance is None else [importance])]
        if found:
            layers.append((Look(run.name, look), found))
    isolation = (drawn.share_chart(runs), drawn.kind_chart(runs))
    return Charts(
        plane=drawn.plane(runs),
        scores=drawn.score_charts(runs),
        losses=drawn.loss_charts(runs),
        isolation=[chart for chart in isolation if chart is not None],
        layers=layers,
        drift=drawn.drift_charts(runs),
        displacement=drawn.displacement_chart(runs),
        seconds=drawn.seconds_chart(runs),
    )


def write_report(runs: Sequence[Run], path: Path, *, title: str) -> None:
    """Write the page of one run, or of several side by side; whole or as it was before.

    Raises DiskError where it cannot be written.
    """
    text = _page(runs, title=title)
    with writing(path):
        write_text(path, text)


def _page(runs: Sequence[Run], *, title: str) -> str:
    # The one thing on the page that is run. A browser runs nothing else, whatever a name in the metrics looks like.
    script = (_FILES / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(_FILES),
    )
    environment.globals |= {
        "term": term,
        "told": told,
        "svg": svg_of,
        "swatch": swatch,
        "legend": _legend,
        "is_smoothed": is_smoothed,
        "score_note": _score_note,
        "shade": _shade,
        "style": Markup((_FILES / "page.css").read_text()),
        "script": Markup(script),
        "digest": digest,
        "words": WORDS,
    }
    return environment.get_template("page.html.j2").render(title=title, **_context(runs))


def _context(runs: Sequence[Run]) -> dict[str, Any]:
    settings = setting_rows(runs)
    return {
        "runs": runs,
        "several": len(runs) > 1,
        "charts": charts_of(runs),
        "sides": side_by_side(runs),
        "outcomes": [outcome_of(run) for run in runs],
        "efforts": [effort_of(run) for run in runs],
        "findings": [findings_of(run) for run in runs],
        "settings": settings,
        "given": [row for row in settings if any(row.is_given)],
        "different": [row for row in settings if row.differs],
        "environment": environment_rows(runs),
    }


def _legend(chart: Chart, runs: Sequence[Run]) -> list[Look]:
    """Return what a chart's lines or bars are called; nothing where that is the one run of the page."""
    match chart:
        case LineChart():
            found = [Look(series.name, series.look) for series in chart.series]
        case Plane():
            found = [Look(arrow.name, arrow.look) for arrow in chart.arrows]
        case BarChart():
            found = list(chart.runs)
        case _:
            found = []
    return [] if [one.name for one in found] == [run.name for run in runs] and len(runs) == 1 else found


def _score_note(score: TaskScore) -> str:
    """Say what stands behind a score: its digits, and of how many rows it is."""
    if score.value is None:
        return "not a finite number"
    said = f"{score.value:.6g}"
    if score.num_rows is not None:
        said += f" on {score.num_rows} rows"
    error = score.standard_error
    return said if error is None else f"{said}; standard error {100 * error:.1f} points"


def _shade(score: TaskScore | None) -> int:
    """Return how strong the colour of an accuracy is, in percent; 0 for other scores, which have no largest value."""
    if score is None or score.value is None or not score.higher_is_better:
        return 0
    return round(45 * min(1.0, max(0.0, score.value)))
