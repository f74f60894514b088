"""Where a run continues, and whether it may."""

from __future__ import annotations

import json
import re
from typing import Any

from epi_ds.checkpoint.catalog import Checkpoint
from epi_ds.checkpoint.loading import choose
from epi_ds.checkpoint.verdict import on_first_rank
from epi_ds.errors import UserError
from epi_ds.train.recipe import Recipe
from epi_ds.train.run_folder import RunFolder

MARKER = "recipe.json"
"""Name of the file in a checkpoint that `marker_of` is written to."""

# Arguments of how a run is watched, saved and fed, which change neither the rows of a step nor the arithmetic.
_HARMLESS_ARGUMENTS = re.compile(
    "(per_device_train_batch_size|gradient_accumulation_steps|save|logging|log|report|hub|push|dataloader|ddp_timeout|"
    "disable_tqdm|run_name|project|dataset_num_proc|eval|per_device_eval|include_num_input_tokens_seen|"
    "skip_memory_metrics|debug)"
)


def marker_of(recipe: Recipe) -> dict[str, Any]:
    """Return what decides which row is trained when and how, as it is written into every checkpoint.

    How a step's rows are dealt to ranks is not among it: their number is in the manifest.
    """
    return {
        "model": recipe.model.model_dump(mode="json"),
        "method": recipe.method.model_dump(mode="json", include={"probe"}),
        "stages": [stage.model_dump(mode="json", exclude={"evaluation"}) for stage in recipe.stages],
        "train": {name: value for name, value in recipe.train.items() if not _HARMLESS_ARGUMENTS.match(name)},
    }


def find_resume(recipe: Recipe, folder: RunFolder, *, tag: str) -> Checkpoint | None:
    """Return the verified checkpoint that a run continues from, or None where none was ever complete. Collective.

    tag  ``auto`` for the newest that is whole, ``step:N`` or a name

    Raises UserError for a tag that is not there and for a checkpoint of a recipe that would train other rows, and
    RuntimeError where there are checkpoints and none is whole.
    """
    choice = choose(folder.checkpoints, tag, accepts_plain=False)
    if choice is None:
        return None
    found = choice.checkpoint
    on_first_rank(lambda: _check_marker(recipe, found))
    return found


def _check_marker(recipe: Recipe, found: Checkpoint) -> None:
    # As it comes back from a file: lists for tuples.
    current = json.loads(json.dumps(marker_of(recipe)))
    saved = json.loads((found.path / MARKER).read_text())
    differences = [
        f"{name} was {saved.get(name)!r}, is {value!r}" for name, value in current.items() if saved.get(name) != value
    ]
    if differences:
        raise UserError(
            f"{found.path} belongs to another recipe, and a resume would train other rows:\n  - "
            + "\n  - ".join(differences)
            + "\nRestore the recipe, choose another output, or start over with --restart"
        )
