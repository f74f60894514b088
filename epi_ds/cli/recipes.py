"""``epi-ds recipes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from epi_ds.launch import recipes

app = typer.Typer(help="Look at the shipped recipes, and copy them.", invoke_without_command=True)

Name = Annotated[str, typer.Argument(help="A shipped recipe (epi-ds recipes list).")]


@app.callback()
def recipes_(context: typer.Context) -> None:
    """Look at the shipped recipes, and copy them. Without a command they are listed."""
    if context.invoked_subcommand is None:
        list_()


@app.command("list", epilog="Example: epi-ds recipes list")
def list_() -> None:
    """List the shipped recipes, and when to use which."""
    for name in recipes.names():
        typer.echo(f"{name:20} {recipes.comment(name)}")


@app.command(epilog="Example: epi-ds recipes cat own_data")
def cat(name: Name) -> None:
    """Print one as it is."""
    typer.echo(recipes.text(name), nl=False)


@app.command(epilog="Example: epi-ds recipes cp own_data mine.yaml")
def cp(
    name: Name,
    target: Annotated[Path | None, typer.Argument(help="File or folder to write to; default NAME.yaml.")] = None,
) -> None:
    """Copy one, to change it. A file that exists is not overwritten."""
    typer.echo(f"written {recipes.copy(name, target)}")
