"""``epi-ds report``, and the end of a run on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from epi_ds.errors import UserError

if TYPE_CHECKING:
    from epi_ds.report.card import RunRecord
    from epi_ds.report.run import Audit, Run
    from epi_ds.report.scores import ScoreTable
    from epi_ds.train.run_folder import RunFolder


def report(
    runs: Annotated[list[Path], typer.Argument(help="The folder of a run, or of several to put side by side.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; default RUN/report.html. Several runs need one.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Write every figure there, too, as SVG and PNG, as wide as a paper's column.")
    ] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Audit the runs' checkpoints; the page has the verdict.")
    ] = False,
    base: Annotated[
        Path | None, typer.Option(help="The model that training began from; the page has how far every layer went.")
    ] = None,
) -> None:
    """Write a page of a run, or of several side by side, from their files, and print the scores.

    The page is one file that opens without a network.
    """
    from epi_ds.report.figures import write_figures
    from epi_ds.report.page import charts_of, write_report
    from epi_ds.report.run import names_of
    from epi_ds.train.run_folder import RunFolder

    if output is None and len(runs) > 1:
        raise UserError(f"the page of {len(runs)} runs belongs to none of their folders; say where by -o page.html")
    names = names_of(runs)
    found = [_read(RunFolder(path), name, with_audit=audit, base=base) for path, name in zip(runs, names, strict=True)]
    page = output or RunFolder(runs[0]).report
    write_report(found, page, title=" against ".join(names))
    written = [] if figures is None else write_figures(charts_of(found).all, figures)
    console = Console()
    for run in found:
        if len(found) > 1:
            console.print(run.name, markup=False, highlight=False)
        _show_scores(console, run.scores)
    _show_written(console, [page, *written])


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
    from epi_ds.report.run import names_of
    from epi_ds.train.run_folder import RunFolder

    folder = RunFolder(run)
    (name,) = names_of([run])
    found = _read(folder, name)
    write_report([found], folder.report, title=name)
    console = Console()
    _show_scores(console, found.scores)
    _show_written(console, (folder.own_rows, folder.metrics, folder.checkpoints, folder.export, folder.report))


def _read(folder: RunFolder, name: str, *, with_audit: bool = False, base: Path | None = None) -> Run:
    from epi_ds.defaults import settings_in
    from epi_ds.inspect.displacement import displacement_by_layer
    from epi_ds.recipe.models import Recipe
    from epi_ds.report.run import read_run
    from epi_ds.train.metrics import read_metrics

    recipe = folder.recipe
    if base is not None and not folder.has_export:
        raise UserError(f"{folder.root} has exported no model yet that --base could be compared with; finish the run")
    return read_run(
        name,
        list(read_metrics(folder.metrics)),
        place=str(folder.root),
        settings=settings_in(Recipe, json.loads(recipe.read_text())) if recipe.is_file() else (),
        displacement=None if base is None else displacement_by_layer(base, folder.export),
        audit=_audited(folder.root) if with_audit else None,
    )


def _audited(run: Path) -> Audit:
    from epi_ds.cli.audit import counts_of, verdict_of
    from epi_ds.inspect.audit import audit
    from epi_ds.launch.environment import prepare_environment
    from epi_ds.report.run import Audit

    prepare_environment()
    try:
        result = audit([run])
    except UserError as error:
        return Audit(f"nothing could be compared: {error}", "", is_sound=None)
    has_moved = result.isolated_moved > 0 or result.anchor.has_findings
    return Audit(verdict_of(result), counts_of(result), is_sound=not has_moved if has_moved or result.pairs else None)


def _show_scores(console: Console, table: ScoreTable) -> None:
    if table.rows:
        console.print(_rendered(table))
        if table.kept_told is not None:
            console.print(f"forgotten of what is kept: {table.kept_told} (best earlier score minus the last one)")
        if table.mean_forgetting is not None:
            console.print(f"mean forgetting {table.mean_forgetting:.1%} (best earlier score minus the last one)")


def _show_written(console: Console, paths: Sequence[Path]) -> None:
    console.print("written:")
    for path in paths:
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
