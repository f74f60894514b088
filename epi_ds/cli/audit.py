"""``epi-ds audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def audit(
    paths: Annotated[list[Path], typer.Argument(help="A run, or checkpoints saved within one refresh window.")],
    trust: Annotated[
        bool, typer.Option("--trust", help="Read checkpoints that lie outside of their run's folder.")
    ] = False,
) -> None:
    """Prove, bit by bit over the master weights, that isolated entries did not move.

    Compares neighbouring checkpoints of every refresh window. Exits 1 if an isolated entry moved.
    """
    from epi_ds.inspect.audit import audit as compare
    from epi_ds.launch.environment import prepare_environment

    prepare_environment()
    console = Console()
    result = compare(paths, trust=trust)
    for first, second in result.pairs:
        console.print(f"compared {first} and {second}", highlight=False, soft_wrap=True)
    for first, second in result.idle_pairs:
        console.print(
            f"left out {first} and {second}: nothing isolated, or nothing trained between them",
            highlight=False,
            soft_wrap=True,
        )
    for item in result.moved:
        console.print(
            f"MOVED {item.num_entries} entries of {item.parameter} from {item.first} to {item.second}",
            soft_wrap=True,
        )
    console.print(
        f"isolated {result.isolated}, moved {result.isolated_moved}; "
        f"plastic {result.plastic}, moved {result.plastic_moved}",
        highlight=False,
    )
    raise typer.Exit(1 if result.isolated_moved else 0)
