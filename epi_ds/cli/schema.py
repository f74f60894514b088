"""``epi-ds schema``."""

from __future__ import annotations

import json

import typer


def schema() -> None:
    """Print the JSON Schema of recipes, by which editors complete keys, explain them and mark wrong ones.

    Arguments in train are those of the installed TRL, so write it anew after an upgrade. With it in recipe.schema.json,
    the first line of a recipe is: # yaml-language-server: $schema=recipe.schema.json
    """
    from epi_ds.recipe.schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))
