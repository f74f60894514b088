"""``epi-ds estimate``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from epi_ds.choices import Normalizer, Selection, StateFormat


def estimate(
    world_size: Annotated[int, typer.Option(min=1, help="Ranks.")],
    layers: Annotated[int, typer.Option(min=1, help="Layers.")],
    parameters: Annotated[
        int, typer.Option(min=1, help="Covered parameters, dealt evenly to the layers.")
    ] = 7_000_000_000,
    selection: Annotated[Selection, typer.Option(help="As in the epi section.")] = Selection.NORMALIZED_GLOBAL,
    normalizer: Annotated[Normalizer, typer.Option(help="As in the epi section.")] = Normalizer.MINMAX,
    state: Annotated[StateFormat, typer.Option(help="As in the epi section.")] = StateFormat.U16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Estimate what one refresh sends by every transport, and say which one `exchange: auto` picks."""
    from epi_ds.isolation.search.traffic import estimate as estimated

    report = estimated(
        world_size=world_size,
        num_layers=layers,
        parameters=parameters,
        selection=selection,
        normalizer=normalizer,
        state=state,
    )
    if as_json:
        typer.echo(json.dumps(report))
        return
    table = Table("transport", "collectives", "MB sent", "MB transient", "ring", "tree", "", box=None)
    for row in report["transports"]:
        table.add_row(
            row["transport"],
            str(row["collectives"]),
            f"{row['sent_bytes'] / 1e6:.3f}",
            f"{row['transient_bytes'] / 1e6:.1f}",
            str(row["ring_steps"]),
            str(row["tree_steps"]),
            "<- auto" if row["transport"] == report["auto"] else "",
        )
    Console().print(table)
    typer.echo("One refresh, per rank. ring, tree: messages one after another there, the latency terms.")
