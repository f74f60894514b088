"""``epi-ds recipes``."""

from __future__ import annotations

from typing import Annotated

import typer


def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None) -> None:
    """List the shipped recipes, or print one."""
    from epi_ds.recipe.loading import find_recipe, shipped_names

    if name is not None:
        typer.echo(find_recipe(name).read_text(), nl=False)
        return
    for shipped in shipped_names():
        first_line = find_recipe(shipped).read_text().partition("\n")[0]
        typer.echo(f"{shipped:20} {first_line.removeprefix('#').strip()}")
