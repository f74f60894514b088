"""``epi-ds study``: what protection buys, measured."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from epi_ds.study.cells import Cell
    from epi_ds.study.comparison import ArmRow
    from epi_ds.study.loading import Found
    from epi_ds.study.result_lines import Result
    from epi_ds.study.tables import TextTable

app = typer.Typer(no_args_is_help=True, help="Compare arms of a recipe: what each learns, and what it keeps.")

_Study = Annotated[str, typer.Argument(metavar="STUDY", help="A .yaml file, or the name of a shipped study.")]
_Results = Annotated[
    Path | None, typer.Option(help="File of results; default beside the study, of a shipped one in the package.")
]
_SeedsOption = Annotated[str | None, typer.Option(help="These seeds only, e.g. 0,1; default all.")]
_ReportedSeeds = Annotated[
    str | None,
    typer.Option(help="These seeds only; default those under `report`, or under `choose` while none of them has run."),
]
_ArmsOption = Annotated[str | None, typer.Option(help="These arms only, separated by commas.")]
_TargetsOption = Annotated[str | None, typer.Option(help="These targets only, separated by commas.")]
_Work = Annotated[Path | None, typer.Option(help="Folder of the runs; default runs/study/NAME.")]


@app.command("run", epilog="Example: epi-ds study run tiny --seeds 0 --arms full_lr_1,anchor_update_2")
def run(
    study: _Study,
    seeds: _SeedsOption = None,
    arms: _ArmsOption = None,
    targets: _TargetsOption = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Cells side by side; default one per core, of several ranks one.")
    ] = None,
    work: _Work = None,
    results: _Results = None,
) -> None:
    """Run the cells that are not finished yet, each a run of its own, and append a line of results for each.

    A cell that failed is run again. Stopped, the study goes on where it was; told to end by SIGTERM or SIGUSR1, it lets
    cells save, and ends with exit code 85. Several commands may run parts of one study.
    """
    from epi_ds.launch.environment import prepare_environment

    prepare_environment()
    from epi_ds.launch.stop_signals import ending_when_told
    from epi_ds.study.cells import WorkFolder
    from epi_ds.study.result_lines import Status
    from epi_ds.study.run import Progress, run_cells

    found = _found(study, results)
    console = Console(soft_wrap=True, highlight=False)
    open_cells = _open_cells(found, seeds=seeds, arms=arms, targets=targets)
    if not open_cells:
        return
    done = 0

    def ended(result: Result) -> None:
        nonlocal done
        done += 1
        told = f"[{done}/{len(open_cells)}] {result.cell.name}: "
        if result.status is Status.OK:
            console.print(f"{told}new {result.new:.3f}, kept {result.kept:.3f}, {result.seconds:.0f} s", markup=False)
        else:
            console.print(f"{told}failed\n{result.error}", markup=False)

    folder = _work_folder(found, work)
    with ending_when_told():
        failed = run_cells(
            found.study,
            open_cells,
            work=WorkFolder(folder),
            results=found.results,
            side_by_side=jobs or (len(os.sched_getaffinity(0)) if found.study.ranks == 1 else 1),
            progress=Progress(lambda name: console.print(f"started: {name}", markup=False), ended),
        )
    console.print(f"results are in {found.results}")
    if failed:
        console.print(f"{failed} cells failed; their logs are in {folder}. The same command runs them again")
        raise typer.Exit(1)


@app.command("slurm", epilog="Example: epi-ds study slurm mine.yaml --cpus 4 --parallel 8 --submit")
def slurm(
    study: _Study,
    seeds: _SeedsOption = None,
    arms: _ArmsOption = None,
    targets: _TargetsOption = None,
    *,
    cpus: Annotated[int, typer.Option(min=1, help="Cores of a cell.")] = 1,
    parallel: Annotated[int | None, typer.Option(min=1, help="Cells at the same time.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="An option of sbatch; may be repeated.")] = None,
    work: _Work = None,
    results: _Results = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit what was written.")] = False,
) -> None:
    """Write a batch script that runs the cells which are not finished yet as an array, and submit it.

    Each task is `epi-ds study run` of one cell. Folders are to be on a disk that all nodes share.
    """
    from epi_ds.launch import slurm as jobs
    from epi_ds.study.cells import WorkFolder, validated
    from epi_ds.study.slurm_array import array_of

    found = _found(study, results)
    work_folder = WorkFolder(_work_folder(found, work))
    open_cells = _open_cells(found, seeds=seeds, arms=arms, targets=targets)
    if not open_cells:
        return
    for cell in open_cells:
        # What is wrong with an arm is to be said now, and not in the queue.
        validated(found.study, cell, work_folder)
    array = array_of(
        str(Path(study).resolve()) if Path(study).suffix else study,
        open_cells,
        work=work_folder,
        results=found.results.resolve(),
        cpus=cpus,
        parallel=parallel,
        options=option or [],
    )
    array.write()
    typer.echo(array.path)
    if submit:
        typer.echo(f"submitted job {jobs.submit([array])[0]}")
    else:
        typer.echo(f"submit with:\n  {shlex.join(jobs.submit_command(array, after=None))}")


@app.command("status", epilog="Example: epi-ds study status tiny")
def status(study: _Study, results: _Results = None) -> None:
    """Say which cells are finished, which failed, and which lines are of other settings than the study's."""
    from epi_ds.study.cells import cells_of, digest_of
    from epi_ds.study.result_lines import Status, newest, read_results

    found = _found(study, results)
    digests = {cell: digest_of(found.study, cell) for cell in cells_of(found.study)}
    lines = read_results(found.results)
    present = newest(lines, digests)
    table = Table("arm", "finished", "failed", "open", title=found.study.name)
    for arm in found.study.arms:
        own = [cell for cell in digests if cell.arm == arm]
        ended = [present[cell].status for cell in own if cell in present]
        good = ended.count(Status.OK)
        table.add_row(arm, str(good), str(len(ended) - good), str(len(own) - len(ended)))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    for cell, one in present.items():
        if one.status is Status.FAILED:
            console.print(f"failed: {cell.name}\n{one.error}", markup=False)
    if others := sum(digests.get(one.cell) != one.digest for one in lines):
        console.print(f"{others} lines of {found.results} are of other settings, and are not used")


@app.command("table", epilog="Example: epi-ds study table tiny --markdown")
def table(
    study: _Study,
    seeds: _ReportedSeeds = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="For documentation.")] = False,
    results: _Results = None,
) -> None:
    """Print the tables of a study from its results alone; the runs are not needed."""
    compared = _compared(_found(study, results), seeds)
    typer.echo(f"{compared.seeds}\n")
    for one in compared.tables:
        if markdown:
            typer.echo(f"{one.title}\n\n{one.markdown}\n")
            continue
        shown = Table(*one.columns, title=one.title)
        # Names that are cut could be of several arms.
        shown.columns[0].no_wrap, shown.columns[0].overflow = True, "fold"
        shown.columns[0].min_width = max(len(row[0]) for row in one.rows)
        for row in one.rows:
            shown.add_row(*row)
        Console().print(shown)


@app.command("report", epilog="Example: epi-ds study report tiny --output docs/measured/tiny")
def report(
    study: _Study,
    seeds: _ReportedSeeds = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write to; default runs/study/NAME.")
    ] = None,
    results: _Results = None,
) -> None:
    """Write the tables as Markdown, and the plane of arms as SVG: all of them, or those that the study names."""
    from epi_ds.study.plane import plane_figure

    found = _found(study, results)
    compared = _compared(found, seeds)
    folder = output or Path("runs/study") / found.study.name
    folder.mkdir(parents=True, exist_ok=True)
    page, plane = folder / "study.md", folder / "plane.svg"
    plane.write_text(plane_figure(found.study, compared.arms))
    sections = "\n\n".join(f"## {one.title}\n\n{one.markdown}" for one in compared.tables)
    page.write_text(f"# {found.study.name}\n\n![new against kept](plane.svg)\n\n{compared.seeds}\n\n{sections}\n")
    for path in (page, plane):
        typer.echo(f"written {path}")


def _found(study: str, results: Path | None) -> Found:
    from epi_ds.study.loading import load_study

    found = load_study(study)
    return found if results is None else found._replace(results=results)


def _open_cells(found: Found, *, seeds: str | None, arms: str | None, targets: str | None) -> list[Cell]:
    """Return the cells of those that are asked for which are not finished, and say how many are."""
    from epi_ds.study.cells import cells_of
    from epi_ds.study.run import pending

    cells = list(cells_of(found.study, seeds=_numbers(seeds), arms=_names(arms), targets=_names(targets)))
    open_cells = pending(found.study, cells, found.results)
    typer.echo(f"{found.study.name}: {len(cells)} cells, {len(cells) - len(open_cells)} of them finished")
    return open_cells


def _work_folder(found: Found, work: Path | None) -> Path:
    return (work or Path("runs/study") / found.study.name).resolve()


class _Compared(NamedTuple):
    seeds: str
    """Which they are, in a sentence."""
    arms: list[ArmRow]
    tables: list[TextTable]


def _compared(found: Found, seeds: str | None) -> _Compared:
    from epi_ds.errors import UserError
    from epi_ds.study.comparison import arm_rows, level_rows
    from epi_ds.study.measure_tables import measure_tables
    from epi_ds.study.rates import rates_rows
    from epi_ds.study.tables import arms_table, levels_table, rates_table

    present = _present(found)
    wanted = _wanted(found, seeds, present)
    arms = arm_rows(found.study, present, wanted)
    if not arms:
        raise UserError(
            f"{found.results} holds no line of {found.study.name} with its present settings and these seeds; "
            f"epi-ds study run {found.study.name} makes them"
        )
    tables = [arms_table(arms)]
    if found.study.sweeps:
        tables.append(levels_table(level_rows(found.study, present, wanted), best=found.study.best))
    if harmless := rates_rows(found.study, present, wanted):
        tables.append(rates_table(harmless))
    tables += measure_tables(found.study, present, wanted)
    fresh = set(wanted) <= set(found.study.seeds.report)
    told = f"Seeds {', '.join(map(str, wanted))}: " + (
        "fresh ones, on which nothing was chosen." if fresh else "settings were chosen on some of them."
    )
    return _Compared(told, arms, tables)


def _present(found: Found) -> dict[Cell, Result]:
    from epi_ds.study.cells import cells_of, digest_of
    from epi_ds.study.result_lines import newest, read_results

    digests = {cell: digest_of(found.study, cell) for cell in cells_of(found.study)}
    return newest(read_results(found.results), digests)


def _wanted(found: Found, seeds: str | None, present: Iterable[Cell]) -> list[int]:
    """Return the seeds that are asked for. What was chosen on a seed is not confirmed by it: fresh ones come first."""
    from epi_ds.study.cells import cells_of

    if seeds is None:
        ran = {cell.seed for cell in present}
        return [seed for seed in found.study.seeds.report if seed in ran] or list(found.study.seeds.choose)
    return list(dict.fromkeys(cell.seed for cell in cells_of(found.study, seeds=_numbers(seeds))))


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str | None) -> list[int] | None:
    names = _names(text)
    if names is None:
        return None
    if wrong := next((name for name in names if not name.isdigit()), None):
        raise typer.BadParameter(f"{wrong!r} is no seed; give whole numbers separated by commas", param_hint="--seeds")
    return [int(name) for name in names]
