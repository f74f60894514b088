"""``epi-ds inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from epi_ds.inspect.inspection import Inspection
    from epi_ds.report.isolation_map import IsolationMap


def inspect(
    checkpoint: Annotated[
        Path, typer.Argument(help="One checkpoint, or a run: then its newest checkpoint that is whole.")
    ],
    base: Annotated[
        Path | None, typer.Option(help="Folder of the model that training began with: distances are from there.")
    ] = None,
    as_object: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Write a figure: FILE.png or FILE.svg.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Read a checkpoint that lies outside of its run.")] = False,
) -> None:
    """Show what is isolated where, how important it is, and how far weights have moved. Needs no rank and no GPU."""
    from epi_ds.launch.environment import prepare_environment

    prepare_environment()
    from epi_ds.inspect.as_json import as_json
    from epi_ds.inspect.inspection import inspect_checkpoint
    from epi_ds.inspect.sources import open_newest
    from epi_ds.train.metrics import FILE, read_metrics

    if picture is not None:
        from epi_ds.report.isolation_map import FORMATS

        if picture.suffix not in FORMATS:
            raise typer.BadParameter(f"{picture} must end in {' or '.join(FORMATS)}", param_hint="--picture")
    opened = open_newest(checkpoint, base=base, trust=trust)
    found = inspect_checkpoint(opened, base=base, metrics=read_metrics(opened.run_folder / FILE))
    if as_object:
        typer.echo(json.dumps(as_json(found), allow_nan=False))
    else:
        from epi_ds.cli.inspect_tables import show

        show(found, Console())
    if picture is not None:
        from epi_ds.report.isolation_map import isolation_figure, write_figure

        write_figure(isolation_figure(_map_of(found)), picture)
        Console(stderr=as_object, soft_wrap=True, highlight=False).print(f"written {picture}")


def _map_of(found: Inspection) -> IsolationMap:
    from epi_ds.inspect.histogram import axis_of
    from epi_ds.report.isolation_map import IsolationMap

    shares = {(cell.layer, cell.kind.value): cell.isolated / cell.entries for cell in found.cells}
    kinds = [kind.name for kind in found.kinds]
    spread = found.whole.importance
    octaves = () if spread is None else spread.octaves
    axis = axis_of(octaves, at_most=len(octaves) + 1)
    counts = axis.counts(octaves)
    return IsolationMap(
        title=f"{found.checkpoint.name}: {found.whole.share:.2%} of {found.whole.entries:,} entries isolated",
        layers=[layer.name for layer in found.layers],
        kinds=kinds,
        shares=[[shares.get((layer.name, kind)) for kind in kinds] for layer in found.layers],
        floors=axis.floors,
        entries=[entries for entries, _ in counts],
        isolated=[isolated for _, isolated in counts],
    )
