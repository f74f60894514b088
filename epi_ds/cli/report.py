"""``epi-ds report``, and the end of a run on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from epi_ds.report.scores import ScoreTable

if TYPE_CHECKING:
    from epi_ds.report.card import RunRecord
    from epi_ds.train.run_folder import RunFolder


def report(run: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """Write RUN/report.html from the files of a run, and print its table."""
    show_run(run)


def show_trained(run: Path) -> None:
    """Write the card of the model that a run has exported, if it has, and what `show_run` does."""
    from epi_ds.report.card import write_card
    from epi_ds.train.run_folder import RunFolder

    folder = RunFolder(run)
    if folder.has_export:
        write_card(record_of(folder), folder.export)
    show_run(run)


def record_of(folder: RunFolder) -> RunRecord:
    """Return what a run left of itself. Raises UserError where its recipe is not there."""
    from epi_ds.errors import UserError
    from epi_ds.recipe.brief import brief
    from epi_ds.report.card import RunRecord
    from epi_ds.train.metrics import read_metrics

    if not folder.recipe.is_file():
        raise UserError(f"{folder.recipe} is missing, so the card cannot say what was trained; restore it")
    recipe = json.loads(folder.recipe.read_text())
    metrics = tuple(read_metrics(folder.metrics))
    return RunRecord(folder.root.resolve().name, recipe, brief(recipe), metrics)


def show_run(run: Path) -> None:
    """Write the report of a run and print its scores and files."""
    from epi_ds.report.page import write_report
    from epi_ds.report.scores import score_table
    from epi_ds.train.metrics import read_metrics
    from epi_ds.train.run_folder import RunFolder

    folder = RunFolder(run)
    console = Console()
    metrics = list(read_metrics(folder.metrics))
    write_report(metrics, folder.report, title=run.name)
    table = score_table(metrics)
    if table.rows:
        console.print(_rendered(table))
        if table.kept_told is not None:
            console.print(f"forgotten of what is kept: {table.kept_told} (best earlier score minus the last one)")
        if table.mean_forgetting is not None:
            console.print(f"mean forgetting {table.mean_forgetting:.1%} (best earlier score minus the last one)")
    console.print("written:")
    for path in (folder.own_rows, folder.metrics, folder.checkpoints, folder.export, folder.report):
        if path.exists():
            console.print(f"  {path}{'/' if path.is_dir() else ''}", highlight=False, soft_wrap=True)


def _rendered(scores: ScoreTable) -> Table:
    table = Table("task", *scores.columns, "forgetting")
    for row in scores.rows:
        percent = row.higher_is_better

        def shown(value: float | None, percent: bool = percent) -> str:
            if value is None:
                return "-"
            return f"{value:.0%}" if percent else f"{value:.3f}"

        table.add_row(row.name, *(shown(value) for value in row.values), shown(row.forgetting))
    return table
