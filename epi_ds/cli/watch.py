"""``epi-ds watch``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def watch(run: Annotated[Path, typer.Argument(help="The folder of a run, on any machine that sees it.")]) -> None:
    """Show a run as it goes, until it ends: its steps, scores and checkpoints, from its files. Ctrl-C leaves it alone.

    Of a run that waits in a queue it waits for the first step; of one that has ended it shows what there was.
    """
    from epi_ds.train.run_folder import RunFolder
    from epi_ds.train.watching import watch as watch_file

    with suppress(KeyboardInterrupt):
        watch_file(RunFolder(run).metrics, Console())
