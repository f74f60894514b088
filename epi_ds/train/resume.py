"""Where a run continues, and whether it may."""

from __future__ import annotations

from typing import Any

from epi_ds.errors import UserError
from epi_ds.train.recipe import Recipe
from epi_ds.train.run_folder import Checkpoint, RunFolder

# Arguments that decide which row is trained when, and with which learning rate.
_ORDERING_ARGUMENTS = (
    "seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "packing",
    "assistant_only_loss",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
)


def marker_of(recipe: Recipe, *, world_size: int) -> dict[str, Any]:
    """Return what decides which row is trained when, as it is written into every complete checkpoint."""
    return {
        "model": recipe.model.model_dump(mode="json"),
        "stages": [stage.model_dump(mode="json", exclude={"evaluation"}) for stage in recipe.stages],
        "train": {name: recipe.train.get(name) for name in _ORDERING_ARGUMENTS},
        "world_size": world_size,
    }


def find_resume(recipe: Recipe, folder: RunFolder, *, world_size: int) -> Checkpoint | None:
    """Return the newest complete checkpoint of the run, or None where there is none.

    Raises ValueError when it is of a recipe that would train other rows.
    """
    committed = folder.committed_checkpoints()
    if not committed:
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
