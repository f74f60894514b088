"""``epi-ds configs``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from epi_ds import ds_configs

app = typer.Typer(help="Look at the shipped DeepSpeed configurations, and copy them.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A shipped configuration (epi-ds configs list).")]


@app.command("list", epilog="Example: epi-ds configs list")
def list_() -> None:
    """List the shipped configurations, and when to use which."""
    for name in ds_configs.names():
        typer.echo(f"{name:20} {ds_configs.comment(name)}")


@app.command(epilog="Example: epi-ds configs cat zero3_offload")
def cat(name: Name) -> None:
    """Print one as it is."""
    typer.echo(ds_configs.text(name), nl=False)


@app.command(epilog="Example: epi-ds configs cp zero3_offload mine.json")
def cp(
    name: Name,
    target: Annotated[Path | None, typer.Argument(help="File or folder to write to; default NAME.json.")] = None,
) -> None:
    """Copy one, to change it. A file that exists is not overwritten."""
    typer.echo(f"written {ds_configs.copy(name, target)}")
