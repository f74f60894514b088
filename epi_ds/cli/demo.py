"""``epi-ds demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def demo(
    output: Annotated[Path, typer.Option(help="Folder of the run; what it holds is thrown away.")] = Path("runs/demo"),
) -> None:
    """Show the whole of it on this machine: a small model learns three tasks in turn, is interrupted, resumes, and
    keeps isolated weights to the bit.
    """
    from epi_ds.cli.audit import audit
    from epi_ds.demo.run import run_demo
    from epi_ds.launch.environment import prepare_environment

    prepare_environment()
    run_demo(output, Console())
    audit([output])
