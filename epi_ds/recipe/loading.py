"""Recipes from YAML: found by name or path, changed by overrides, and told in one message whatever is wrong with them.

Everything that can be wrong with a recipe's keys and plain values is reported at once and before anything is loaded,
each with the nearest valid name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from epi_ds.anchor_config import RUN, STAGE
from epi_ds.combinations import located_combinations
from epi_ds.errors import Problem, UserError, located_problems, nearest, summarize
from epi_ds.launch import recipes as shipped
from epi_ds.recipe.arguments import argument_problems, deepspeed_config, preset_section, schedule_problems
from epi_ds.recipe.document import Document, read_document
from epi_ds.recipe.harness import harness_problems
from epi_ds.recipe.lora import lora_problems
from epi_ds.recipe.models import Recipe
from epi_ds.recipe.sources import Files


def find_recipe(name_or_path: str) -> Path:
    """Return the file of a recipe given by path or by the name of a shipped one. Raises ValueError for neither."""
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            return path
        raise UserError(f"there is no recipe file {name_or_path}")
    if name_or_path in shipped.names():
        return shipped.path_of(name_or_path)
    raise UserError(
        f"{name_or_path!r} is neither a .yaml file nor a shipped recipe ({', '.join(shipped.names())})"
        f"{nearest(name_or_path, shipped.names())}"
    )


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply ``key=value`` overrides (dotted keys, list positions by number), and validate all of it.

    Raises one ValueError that lists every problem found.
    """
    document = read_recipe(name_or_path, overrides)
    return parse_recipe(document.values, place=f"the recipe {document.path}")


def read_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Document:
    """Read a recipe's file, by path or by the name of a shipped one, without looking at what it says.

    Raises UserError for one that is not there, and what `read_document` raises.
    """
    return read_document(find_recipe(name_or_path), overrides, keys=list(Recipe.model_fields))


class Checked(NamedTuple):
    """What a recipe's values are."""

    recipe: Recipe | None
    """None where there is a problem."""
    problems: list[Problem]
    added: dict[str, Any]
    """Settings of ``method.epi`` that the DeepSpeed preset brings: a problem may be with one that is not written."""

    @property
    def settings_added(self) -> str:
        """These as a recipe would write them."""
        return ", ".join(f"{key}: {value}" for key, value in self.added.items())


def parse_recipe(values: Mapping[str, Any], *, place: str, files: Files = Files.MUST_BE_THERE) -> Recipe:
    """Validate the values of a recipe; raise one ValueError that lists every problem found."""
    checked = check_recipe(values, files=files)
    if checked.recipe is None:
        if checked.added:
            place = f"{place}, to whose method.epi the DeepSpeed preset adds {checked.settings_added}"
        raise UserError(summarize(checked.problems, place=place))
    return checked.recipe


def check_recipe(values: Mapping[str, Any], *, files: Files = Files.MUST_BE_THERE) -> Checked:
    """Return the recipe that values are, or every problem with their keys and plain values."""
    added = _added_by_preset(values)
    if added:
        method = values.get("method", {})
        values = {**values, "method": {**method, "epi": {**method.get("epi", {}), **added}}}
    problems: list[Problem] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(values, context=files)
    except ValidationError as error:
        problems += located_problems(error, Recipe)
    train, stages = values.get("train"), values.get("stages")
    if isinstance(train, Mapping):
        problems += argument_problems(train)
    if recipe is not None and recipe.model.lora is not None:
        problems += lora_problems(recipe.model.lora)
    if recipe is not None and recipe.evaluation.lm_eval is not None:
        problems += harness_problems()
    if recipe is not None and not problems:
        found = located_combinations(deepspeed_config(recipe.train), recipe.method.epi)
        problems += [problem.within("train.deepspeed") for problem in found]
    if recipe is not None and files is Files.MUST_BE_THERE:
        problems += _anchor_problems(recipe)
    for index, stage in enumerate(stages if isinstance(stages, list) else ()):
        if isinstance(stage, Mapping) and isinstance(name := stage.get("lr_scheduler_type"), str):
            problems += [Problem(f"stages.{index}.lr_scheduler_type", text) for text in schedule_problems(name)]
    return Checked(None if problems else recipe, problems, added)


def _anchor_problems(recipe: Recipe) -> list[Problem]:
    """Return what is wrong with a folder that weights are pulled towards, before ranks start."""
    anchor, key = recipe.method.epi.anchor, "method.epi.anchor.to"
    if anchor is None or not anchor.is_folder:
        return []
    if recipe.model.lora is not None:
        return [Problem(key, f"{anchor.to} holds no adapter, which is all that model.lora trains; set it to {STAGE}")]
    if not Path(anchor.to).is_dir():
        hint = nearest(anchor.to, (RUN, STAGE))
        return [Problem(key, f"there is no folder {anchor.to}{hint}; give one, {RUN}, or {STAGE}")]
    return []


def _added_by_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``method.epi`` that the preset in ``train.deepspeed`` has and the recipe does not give."""
    train, method = values.get("train"), values.get("method", {})
    given = method.get("epi", {}) if isinstance(method, Mapping) else None
    # What is no mapping is told by the validation.
    if not isinstance(train, Mapping) or not isinstance(given, Mapping):
        return {}
    return {key: value for key, value in preset_section(train).items() if key not in given}
