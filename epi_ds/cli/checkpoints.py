"""``epi-ds checkpoints``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from epi_ds.checkpoint.catalog import Checkpoint

app = typer.Typer(help="Look at a run's checkpoints, verify, remove and convert them.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(metavar="PATH", help="The folder of a run or of its checkpoints.")]
Trust = Annotated[bool, typer.Option("--trust", help="Read a checkpoint that lies outside of its run's folder.")]


@app.command("list", epilog="Example: epi-ds checkpoints list runs/mine")
def list_(path: Run) -> None:
    """List checkpoints and what interrupted saves left. Reads nothing but manifests."""
    from epi_ds.inspect.overview import lines_of

    table = Table("name", "step", "saved", "ranks", "GB", "")
    for line in lines_of(path):
        size = "" if line.num_bytes is None else f"{line.num_bytes / 1e9:.3f}"
        step, ranks = ("" if number is None else str(number) for number in (line.step, line.ranks))
        table.add_row(line.name, step, line.saved_at, ranks, size, line.state)
    # As wide as it is: names are to be copied from here.
    Console(width=200).print(table)


@app.command(epilog="Example: epi-ds checkpoints verify runs/mine")
def verify(
    path: Annotated[Path, typer.Argument(help="One checkpoint, or the folder of a run or of its checkpoints.")],
) -> None:
    """Read every file and compare it with the manifest. Exits 1 where one is damaged or missing."""
    from epi_ds.inspect.overview import verify as read

    console = Console(soft_wrap=True, highlight=False)

    def report(checkpoint: Checkpoint, problems: list[str]) -> None:
        console.print(f"{checkpoint.path}: {'whole' if not problems else 'NOT WHOLE'}")
        for problem in problems:
            console.print(f"  {problem}")

    raise typer.Exit(0 if read(path, report) else 1)


@app.command(epilog="Example: epi-ds checkpoints prune runs/mine --keep-last 2 --dry-run")
def prune(
    path: Run,
    keep_last: Annotated[int, typer.Option(min=1, help="Complete checkpoints to keep.")],
    keep_every: Annotated[int | None, typer.Option(min=1, help="Keep those of every so many steps, too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed.")] = False,
) -> None:
    """Remove older checkpoints. The newest ones are not read: verify them first."""
    from epi_ds.checkpoint.retention import Retention, doomed_in
    from epi_ds.checkpoint.retention import prune as remove
    from epi_ds.inspect.overview import folder_of

    found = (doomed_in if dry_run else remove)(folder_of(path), Retention(keep_last, keep_every))
    console = Console(soft_wrap=True, highlight=False)
    for one in found:
        console.print(f"{'would remove' if dry_run else 'removed'} {one}")


@app.command(epilog="Example: epi-ds checkpoints convert runs/mine/checkpoints/checkpoint-40 universal")
def convert(
    path: Annotated[Path, typer.Argument(help="One checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder to write to; it must not exist.")],
    trust: Trust = False,
) -> None:
    """Write a checkpoint in DeepSpeed's universal format, for other programs.

    To resume with another number of ranks, nothing needs to be converted.
    """
    from epi_ds.launch.environment import prepare_environment

    prepare_environment()
    from epi_ds.checkpoint.catalog import open_checkpoint
    from epi_ds.checkpoint.tag import Consent, open_tag
    from epi_ds.inspect.convert import convert as run
    from epi_ds.inspect.convert import losses

    tag = open_tag(open_checkpoint(path), consent=Consent(trust, "pass --trust"))
    console = Console(soft_wrap=True, highlight=False)
    for sentence in losses(tag):
        console.print(f"not in {output}: {sentence}")
    run(tag, output)
    console.print(f"{output}: every weight has the bits of {tag.path}")
