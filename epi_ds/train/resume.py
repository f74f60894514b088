"""Where a run continues, and whether it may."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from epi_ds.checkpoint.catalog import Checkpoint
from epi_ds.checkpoint.loading import choose
from epi_ds.checkpoint.trainer_folder import TRAINER_STATE
from epi_ds.checkpoint.verdict import on_first_rank
from epi_ds.defaults import with_defaults
from epi_ds.errors import UserError
from epi_ds.recipe.keep import Keep
from epi_ds.recipe.models import ModelSection, Recipe, Stage
from epi_ds.recipe.sources import DataSource
from epi_ds.train.run_folder import RunFolder
from epi_ds.train.stages import StageSpan

MARKER = "recipe.json"
"""Name of the file in a checkpoint that `marker_of` is written to."""
DATA = "data"
"""Key of the marker under which stands what the sources held."""

# Arguments of how a run is watched, saved and fed, which change neither the rows of a step nor the arithmetic.
_HARMLESS_ARGUMENTS = re.compile(
    "(per_device_train_batch_size|gradient_accumulation_steps|save|logging|log|report|hub|push|dataloader|ddp_timeout|"
    "disable_tqdm|run_name|project|dataset_num_proc|eval|per_device_eval|include_num_input_tokens_seen|"
    "skip_memory_metrics|debug)"
)


# Where the recipe does not say otherwise.
DEFAULT_ARGUMENTS: Mapping[str, Any] = {
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    # TRL's default is bf16 wherever the machine can; a recipe that says nothing gives the same weights everywhere.
    "bf16": False,
    # By default transformers shows the average of the losses before instead of one that is not finite.
    "logging_nan_inf_filter": False,
}


def is_harmless(argument: str) -> bool:
    """Whether an argument of ``train`` may change between two starts of a run: it changes no row and no weight."""
    return _HARMLESS_ARGUMENTS.match(argument) is not None


def marker_of(recipe: Recipe, data: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Return what decides which row is trained when and how, as it is written into every checkpoint.

    data  what every stage's source held, and behind them those of what is kept, or the probe's

    How a step's rows are dealt to ranks is not among it: their number is in the manifest.
    """
    return {
        "model": recipe.model.model_dump(mode="json"),
        "method": recipe.method.model_dump(mode="json", include={"probe", "keep"}),
        "stages": [stage.model_dump(mode="json", exclude={"evaluation"}) for stage in recipe.stages],
        "train": {name: value for name, value in recipe.train.items() if not is_harmless(name)},
        DATA: list(data),
    }


def check_data(found: Checkpoint, recipe: Recipe, data: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError where a source holds other rows than when a checkpoint was saved, by name."""
    # A checkpoint of an earlier release says nothing of its data: see `check_steps`.
    saved = json.loads((found.path / MARKER).read_text()).get(DATA)
    if saved is None:
        return
    names = [
        f"stage {stage.name}" if len(stage.sources) == 1 else f"stage {stage.name}, source {number}"
        for stage in recipe.stages
        for number, _ in enumerate(stage.sources, 1)
    ]
    if recipe.method.keep is None:
        names.append("the probe")
    else:
        names += [f"what is kept, source {number}" for number in range(1, len(saved) - len(names) + 1)]
    changed = [
        f"the data of {name}: it had {before['rows']} rows, has {now['rows']}"
        + ("" if before["rows"] != now["rows"] else ", whose content is another")
        for name, before, now in zip(names, saved, data, strict=False)
        if before != now
    ]
    if changed:
        raise UserError(
            f"{found.path} was trained on other rows, and a resume would train some twice and some never:\n  - "
            + "\n  - ".join(changed)
            + "\nRestore the files, choose another output, or start over with --restart"
        )


def check_steps(found: Checkpoint, spans: Sequence[StageSpan], *, global_batch: int) -> None:
    """Raise UserError where a checkpoint that does not say what its data held was saved on the way to other steps.

    Only where a step has as many rows as then: with others it is a run of other steps anyway.
    """
    manifest = found.manifest
    if DATA in json.loads((found.path / MARKER).read_text()) or manifest is None or manifest.batch.rows != global_batch:
        return
    before, now = json.loads((found.path / TRAINER_STATE).read_text())["max_steps"], spans[-1].stop_step
    if before != now:
        stages = ", ".join(f"{span.name} {span.num_steps}" for span in spans)
        raise UserError(
            f"{found.path} was saved by an earlier release on the way to {before} steps, and the rows now fill {now} "
            f"({stages}): a file has changed, or holds rows that were trained on then and are left out now (without an "
            "answer but white space, say). A resume would train some rows twice and some never. Restore the file, "
            "finish the run with the release that began it, choose another output, or start over with --restart"
        )


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
    differences = list(_differences(saved, current))
    if differences:
        raise UserError(
            f"{found.path} belongs to another recipe, and a resume would train other rows:\n  - "
            + "\n  - ".join(differences)
            + "\nRestore the recipe, choose another output, or start over with --restart"
        )


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[str]:
    """Yield what two markers say differently; a key that one of them lacks means its default."""
    yield from _of_values("model", with_defaults(ModelSection, saved["model"]), current["model"])
    probes = [with_defaults(DataSource, marker["method"]["probe"] or {}) for marker in (saved, current)]
    yield from _of_values("method.probe", *probes)
    kept = [with_defaults(Keep, marker["method"].get("keep") or {}) for marker in (saved, current)]
    yield from _of_values("method.keep", *kept)
    before, now = saved["stages"], current["stages"]
    if [stage["name"] for stage in before] != [stage["name"] for stage in now]:
        yield f"the stages were {_names(before)}, are {_names(now)}"
    else:
        for one, other in zip(before, now, strict=True):
            yield from _of_values(f"stages.{one['name']}", _without(with_defaults(Stage, one), "evaluation"), other)
    yield from _of_values("train", with_default_arguments(saved["train"]), with_default_arguments(current["train"]))


def _of_values(place: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys((*before, *now)):
        if before.get(name) != now.get(name):
            yield f"{place}.{name} was {before.get(name)!r}, is {now.get(name)!r}"


def with_default_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's ``train`` with the arguments that it leaves to TRL, but for those of `is_harmless`."""
    # Imported here: TRL takes seconds, and every command reads recipes.
    from trl import SFTConfig

    defaults = {
        field.name: field.default
        for field in dataclasses.fields(SFTConfig)
        if field.default is not dataclasses.MISSING and not is_harmless(field.name)
    }
    return {**json.loads(json.dumps(defaults, default=str)), **DEFAULT_ARGUMENTS, **given}


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def _names(stages: list[dict[str, Any]]) -> str:
    return ", ".join(stage["name"] for stage in stages)
