"""Recipes from YAML: found by name or path, changed by overrides, and told in one message whatever is wrong with them.

Everything that can be wrong with a recipe's keys and plain values is reported at once and before anything is loaded,
each with the nearest valid name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from epi_ds.combinations import combination_problems
from epi_ds.errors import UserError, nearest, problems_of, summarize
from epi_ds.launch import recipes as shipped
from epi_ds.recipe.arguments import argument_problems, deepspeed_config, preset_section, schedule_problems
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


class _Loader(yaml.SafeLoader):
    """Reads ``1e-5`` as a number, as JSON and Python do; YAML 1.1 wants ``1.0e-5`` and makes a string of it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """Return what a text in YAML holds; ``1e-5`` is a number."""
    return yaml.load(text, Loader=_Loader)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply ``key=value`` overrides (dotted keys, list positions by number), and validate all of it.

    Raises one ValueError that lists every problem found.
    """
    path = find_recipe(name_or_path)
    values = read_yaml(path.read_text())
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping with the keys {', '.join(Recipe.model_fields)}")
    for override in overrides:
        _override(values, override)
    return parse_recipe(values, place=f"the recipe {path}")


def parse_recipe(values: Mapping[str, Any], *, place: str, files: Files = Files.MUST_BE_THERE) -> Recipe:
    """Validate the values of a recipe; raise one ValueError that lists every problem found."""
    added = _added_by_preset(values)
    if added:
        method = values.get("method", {})
        values = {**values, "method": {**method, "epi": {**method.get("epi", {}), **added}}}
        # A problem may be with a setting that is not written there.
        settings = ", ".join(f"{key}: {value}" for key, value in added.items())
        place = f"{place}, to whose method.epi the DeepSpeed preset adds {settings}"
    problems: list[str] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(values, context=files)
    except ValidationError as error:
        problems += problems_of(error, Recipe)
    train, stages = values.get("train"), values.get("stages")
    if isinstance(train, Mapping):
        problems += argument_problems(train)
    if recipe is not None and recipe.model.lora is not None:
        problems += lora_problems(recipe.model.lora)
    if recipe is not None and recipe.evaluation.lm_eval is not None:
        problems += harness_problems()
    if recipe is not None and not problems:
        found = combination_problems(deepspeed_config(recipe.train), recipe.method.epi)
        problems += [f"train.deepspeed with method.epi: {problem}" for problem in found]
    for index, stage in enumerate(stages if isinstance(stages, list) else ()):
        if isinstance(stage, Mapping) and isinstance(name := stage.get("lr_scheduler_type"), str):
            problems += [f"stages.{index}.lr_scheduler_type: {problem}" for problem in schedule_problems(name)]
    if problems or recipe is None:
        raise UserError(summarize(problems, place=place))
    return recipe


def _added_by_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``method.epi`` that the preset in ``train.deepspeed`` has and the recipe does not give."""
    train, method = values.get("train"), values.get("method", {})
    given = method.get("epi", {}) if isinstance(method, Mapping) else None
    # What is no mapping is told by the validation.
    if not isinstance(train, Mapping) or not isinstance(given, Mapping):
        return {}
    return {key: value for key, value in preset_section(train).items() if key not in given}


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} must have the form key=value, for example train.max_length=512")
    set_key(values, key, read_yaml(text))


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in the values of a recipe, which are changed; sections that are not there are made.

    Raises UserError where a part of the key is a value and no section, or no item of a list.
    """
    *parents, last = key.split(".")
    node: Any = values
    for part in parents:
        if isinstance(node, list):
            node = node[_position(node, part, key)]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, (dict, list)):
            raise UserError(f"override {key}: {part!r} is a value, not a section, in this recipe")
    if isinstance(node, list):
        node[_position(node, last, key)] = value
    else:
        node[last] = value


def _position(items: list[Any], part: str, key: str) -> int:
    """A list position: a number, or the ``name`` of one of its items."""
    names = [item.get("name") for item in items if isinstance(item, dict)]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = ", ".join(str(name) for name in names)
    raise UserError(f"override {key}: {part!r} is not one of the {len(items)} items here ({known})")
