"""Where a run continues, and whether it may."""

from __future__ import annotations

import logging
import re
from typing import Any

from epi_ds.errors import UserError
from epi_ds.train.recipe import Recipe
from epi_ds.train.run_folder import Checkpoint, RunFolder

logger = logging.getLogger(__name__)

# Arguments of how a run is watched, saved and fed, which change neither the rows nor the arithmetic.
_HARMLESS_ARGUMENTS = re.compile(
    "(save|logging|log|report|hub|push|dataloader|ddp_timeout|disable_tqdm|run_name|project|dataset_num_proc|eval|"
    "per_device_eval|include_num_input_tokens_seen|skip_memory_metrics|debug)"
)


def marker_of(recipe: Recipe, *, world_size: int) -> dict[str, Any]:
    """Return what decides which row is trained when and how, as it is written into every complete checkpoint."""
    return {
        "model": recipe.model.model_dump(mode="json"),
        "method": recipe.method.model_dump(mode="json", include={"probe"}),
        "stages": [stage.model_dump(mode="json", exclude={"evaluation"}) for stage in recipe.stages],
        "train": {name: value for name, value in recipe.train.items() if not _HARMLESS_ARGUMENTS.match(name)},
        "world_size": world_size,
    }


def find_resume(recipe: Recipe, folder: RunFolder, *, world_size: int) -> Checkpoint | None:
    """Return the newest complete checkpoint of the run, or None where there is none.

    Warns of incomplete ones. Raises ValueError when the newest is of a recipe that would train other rows.
    """
    committed = folder.committed_checkpoints()
    if not committed:
        incomplete = sorted(path.name for path in folder.checkpoints.glob("checkpoint-*"))
        if incomplete:
            logger.warning(
                "%s holds no complete checkpoint, only %s, cut off while it was written: the run starts at step 0",
                folder.checkpoints,
                ", ".join(incomplete),
            )
        return None
    newest = committed[-1]
    differences = [
        f"{name} was {newest.marker.get(name)!r}, is {value!r}"
        for name, value in marker_of(recipe, world_size=world_size).items()
        if newest.marker.get(name) != value
    ]
    if differences:
        raise UserError(
            f"{newest.path} belongs to another recipe, and a resume would train other rows:\n  - "
            + "\n  - ".join(differences)
            + "\nRestore the recipe, choose another output, or start over with --restart"
        )
    return newest
