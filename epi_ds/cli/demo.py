"""``epi-ds demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, as epi-ds train takes them."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the run; what it holds is thrown away.")] = Path("runs/demo"),
    base_steps: Annotated[int, typer.Option(min=1, help="Steps that the small model is pretrained.")] = 600,
) -> None:
    """Show the whole of it on this machine: a small model learns three tasks in turn, is interrupted, resumes, and
    keeps isolated weights to the bit.
    """
    from epi_ds.cli.audit import audit
    from epi_ds.demo.run import run_demo
    from epi_ds.launch.environment import prepare_environment

    prepare_environment()
    run_demo(output, Console(), overrides=overrides or (), base_steps=base_steps)
    audit([output])
