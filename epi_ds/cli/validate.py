"""``epi-ds validate``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from epi_ds.isolation.layout import Layout
    from epi_ds.recipe.document import Document
    from epi_ds.train.validation.dry_run import DryRun
    from epi_ds.train.validation.findings import Finding
    from epi_ds.train.validation.validate import Validation

_MISTAKEN = 2


def validate(
    recipe: Annotated[str, typer.Argument(help="A .yaml file, or the name of a shipped recipe (epi-ds recipes).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, as epi-ds train takes them.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks that will train; default those of the recipe.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Make model and engine of so many ranks too, without a byte of weights.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say everything that is wrong with a recipe, each with its line, before any rank starts.

    Reads all rows, prepared as a run does, which then finds them; needs no GPU, and of the model its configuration and
    tokenizer. Ends with exit code 2 where there is a problem. What cannot be checked here is said.
    """
    from epi_ds.launch.environment import prepare_environment

    prepare_environment()
    from epi_ds.recipe.loading import read_recipe
    from epi_ds.train.validation.offline import stay_offline_without_hub

    document = read_recipe(recipe, overrides or [])
    stay_offline_without_hub(document.values)
    from epi_ds.train.validation.validate import validate as validated

    found = validated(document, ranks=ranks, makes_engine=dry_run)
    if as_json:
        typer.echo(json.dumps(found.as_json(document), indent=2))
    else:
        _show(found, document)
    if not found.is_valid:
        raise typer.Exit(_MISTAKEN)


def _show(found: Validation, document: Document) -> None:
    from epi_ds.train.validation.findings import Kind

    for kind, heading in (
        (Kind.PROBLEM, "problems in"),
        (Kind.WARNING, "warnings about"),
        (Kind.UNCHECKED, "not checked of"),
    ):
        told = found.of(kind)
        if told:
            typer.echo(f"{heading} {document.path}:")
        for one in told:
            typer.echo(f"  {_line(one, document)}")
    if found.is_valid:
        _show_plan(found, document)


def _line(one: Finding, document: Document) -> str:
    return f"{document.place_of(one.key)}: {one.key}: {one.text}" if one.key else one.text


def _show_plan(found: Validation, document: Document) -> None:
    typer.echo(f"{document.path}: no problem was found")
    if found.stages:
        table = Table("stage", "rows", "steps", "replayed rows", "refreshes", "tokens per step", box=None)
        for stage in found.stages:
            tokens = "unknown" if stage.tokens_per_step is None else str(stage.tokens_per_step)
            counts = (stage.num_rows, stage.num_steps, stage.num_replayed, stage.num_refreshes)
            table.add_row(stage.name, *map(str, counts), tokens)
        Console().print(table)
    typer.echo(f"{found.global_batch} rows per step on {found.ranks} ranks")
    if found.layout is not None:
        typer.echo(f"{found.layout.covered_numel} covered parameters in {len(found.layout.layer_names)} layers")
    if found.refresh is not None:
        typer.echo(
            f"a refresh sends {found.refresh.sent_bytes / 1e6:.3f} MB per rank in {found.refresh.collectives} "
            f"collectives ({found.refresh.transport})"
        )
    if found.dry_run is not None and found.layout is not None:
        _show_engine(found.dry_run, found.layout)


def _show_engine(made: DryRun, layout: Layout) -> None:
    table = Table("layer", "parameters", box=None)
    for name, numel in zip(layout.layer_names, layout.layer_numel, strict=True):
        table.add_row(name, str(numel))
    Console().print(table)
    typer.echo(
        f"an engine of {made.ranks} ranks was made: {made.num_parameters} parameters, of which each rank trains "
        f"{made.partition_numel} in {made.num_sub_groups} sub-groups"
    )
    typer.echo(
        f"isolation begins with {made.isolation_bytes / 1e6:.3f} MB per rank, a refresh sends "
        f"{made.refresh_bytes / 1e6:.3f} MB per rank, a checkpoint takes {made.checkpoint_bytes / 1e9:.3f} GB"
    )
