"""``epi-ds audit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from epi_ds.inspect.audit import AuditReport
    from epi_ds.inspect.audit_anchor import AnchorAudit


def audit(
    paths: Annotated[list[Path], typer.Argument(help="A run, or checkpoints saved within one refresh window.")],
    trust: Annotated[
        bool, typer.Option("--trust", help="Read checkpoints that lie outside of their run's folder.")
    ] = False,
) -> None:
    """Prove, bit by bit over the master weights, that isolated entries did not move.

    Compares neighbouring checkpoints of every refresh window, and what an anchor pulls towards in all checkpoints that
    were pulled towards the same. Exits 1 if an isolated entry or an anchor moved.
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
    console.print(counts_of(result), highlight=False)
    _show_anchor(console, result.anchor)
    console.print(f"verdict: {verdict_of(result)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if result.isolated_moved or result.anchor.has_findings else 0)


def counts_of(result: AuditReport) -> str:
    """Say how many entries were compared."""
    return (
        f"isolated {result.isolated}, moved {result.isolated_moved}; "
        f"plastic {result.plastic}, moved {result.plastic_moved}"
    )


def verdict_of(result: AuditReport) -> str:
    """Say what an audit came to."""
    if result.isolated_moved or result.anchor.has_findings:
        return "something moved that must not; see above"
    if not result.pairs:
        return "nothing was isolated between these checkpoints, and what is pulled towards is what it was"
    return "not one bit of an isolated weight moved"


def _show_anchor(console: Console, found: AnchorAudit) -> None:
    """Say what was compared of what is pulled towards; nothing where nothing is."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    for first, second in found.pairs:
        say(f"compared the anchor in {first} and {second}")
    for item in found.moved:
        say(f"MOVED {item.num_entries} entries of the anchor of {item.parameter} from {item.first} to {item.second}")
    if found.pairs:
        say(f"anchor {found.entries}, moved {found.num_moved}")
    for folder in found.folders:
        if not folder.is_there:
            say(f"not checked: weights are pulled towards {folder.path}, which is not there")
        elif folder.problems:
            say(f"CHANGED {folder.path}, which weights are pulled towards: {'; '.join(folder.problems)}")
        else:
            say(f"anchor in {folder.path}: its files are those that were pulled towards")
