"""``epi-ds demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from epi_ds.demo.comparison import Comparison


def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, as epi-ds train takes them."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of both runs; what earlier ones left is thrown away.")] = Path(
        "runs/demo"
    ),
    base_steps: Annotated[int, typer.Option(min=1, help="Steps that the small model is pretrained.")] = 600,
) -> None:
    """Show the whole of it on this machine: a small model learns a new task, plainly and protected.

    The protected run is stopped on the way, resumes, and keeps isolated weights to the bit.
    """
    from epi_ds.cli.audit import audit
    from epi_ds.demo.comparison import points_of
    from epi_ds.demo.plane import text_plane
    from epi_ds.demo.run import DemoFolder, run_demo
    from epi_ds.launch.environment import prepare_environment

    prepare_environment()
    console, folder = Console(), DemoFolder(output)
    comparison = run_demo(output, console, overrides=overrides or (), base_steps=base_steps)
    console.print(_table(comparison))
    console.print(text_plane(points_of(comparison)), highlight=False, markup=False)
    console.print(f"as a picture: {folder.plane}", highlight=False, soft_wrap=True)
    console.print("the audit of the protected run:")
    audit([folder.protected])


def _table(comparison: Comparison) -> Table:
    from epi_ds.demo.comparison import TaskScores, mean_scores

    table = Table("", "before", "plain", "protected")

    def add(row: TaskScores, *, style: str | None = None) -> None:
        table.add_row(row.name, *(f"{value:.0%}" for value in row[1:]), style=style)

    for name, rows in (("learnt", comparison.learnt), ("kept", comparison.kept)):
        add(mean_scores(name, rows), style="bold")
        for row in rows:
            add(row._replace(name=f"  {row.name}"))
        table.add_section()
    table.add_row("how far the weights went", "", "100%", f"{comparison.distance:.0%}")
    return table
