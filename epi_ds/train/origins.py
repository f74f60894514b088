"""Where a run's model and rows come from, as far as others can have them, too."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from epi_ds.data.hub import is_hub_id
from epi_ds.data.sources import is_local
from epi_ds.recipe.models import Recipe


class FromHub(NamedTuple):
    """What a run takes from the hub. Only where it runs is it known: elsewhere a folder's name may be an id."""

    model: str | None
    """The id; None for a folder."""
    datasets: tuple[str, ...]
    """That are trained on or replayed."""


def taken_from_hub(recipe: Recipe) -> FromHub:
    """Return what a recipe takes from the hub on this machine."""
    path, keep = recipe.model.path, recipe.method.keep
    sources = [source for stage in recipe.stages for source in stage.sources]
    sources += () if keep is None else keep.sources
    named = (source.path for source in sources if source.path is not None and not is_local(source.path))
    return FromHub(
        path if is_hub_id(path) and not Path(path).exists() else None,
        tuple(dict.fromkeys(named)),
    )
