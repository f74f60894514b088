"""The JSON Schema of a recipe, from the models that validate it, by which editors complete keys and mark wrong ones.

It allows the keys that `parse_recipe` allows, and no others. What several settings are together stays with the loader.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from epi_ds.recipe.arguments import Argument, arguments
from epi_ds.recipe.docstrings import docstrings_of, one_line, summary_of
from epi_ds.recipe.lora import LoraSection, lora_keys
from epi_ds.recipe.models import Recipe

Schema = dict[str, Any]

_JSON_TYPES = {
    "bool": "boolean",
    "int": "integer",
    "float": "number",
    "str": "string",
    "NoneType": "null",
    "dict": "object",
    "list": "array",
}
# Links between pages of docs/, which lead nowhere from an editor.
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)([^)]+)\)")


def recipe_schema() -> Schema:
    """Return the JSON Schema of a recipe: arguments in ``train`` as the installed TRL has them, ``model.lora`` as PEFT.

    Where PEFT is not installed, any key may stand in ``model.lora``. Raises ModuleNotFoundError, by its name, where TRL
    is not.
    """
    schema = Recipe.model_json_schema(schema_generator=_Generator)
    train = schema["properties"]["train"]
    train["properties"] = {name: _of_argument(argument) for name, argument in arguments().items()}
    train["additionalProperties"] = False
    if keys := lora_keys():
        lora = schema["$defs"][LoraSection.__name__]
        lora["properties"] |= {name: _described(_of_types(key.types), key.description) for name, key in keys.items()}
        lora["additionalProperties"] = False
    return {"$schema": _Generator.schema_dialect, **schema}


class _Generator(GenerateJsonSchema):
    """Describes settings by their docstrings, and leaves out titles and defaults that only repeat what is there."""

    def model_schema(self, schema: core_schema.ModelSchema) -> Schema:
        found = super().model_schema(schema)
        model: type[BaseModel] = schema["cls"]
        found["description"] = summary_of(model)
        texts = docstrings_of(model)
        for name, values in found["properties"].items():
            if text := texts.get(name):
                values["description"] = _LINK.sub(r"\1: docs/\2", text)
            if isinstance(values.get("default"), (dict, list)):
                # The defaults of a section stand in it.
                del values["default"]
        return found

    def enum_schema(self, schema: core_schema.EnumSchema) -> Schema:
        found = super().enum_schema(schema)
        return _described(found, found.get("description", ""))

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _of_argument(argument: Argument) -> Schema:
    found = _of_types(argument.types)
    words = {"enum": list(argument.choices)}
    if argument.choices and "list" in argument.types:
        found = {"anyOf": [words, {"type": "array", "items": words}, {"type": "null"}]}
    elif argument.choices:
        found = words
    if argument.range is not None:
        found |= argument.range.as_schema()
    return _described(found, argument.description)


def _of_types(types: tuple[str, ...]) -> Schema:
    names = [_JSON_TYPES[name] for name in types]
    return {"type": names if len(names) > 1 else names[0]} if names else {}


def _described(schema: Schema, text: str) -> Schema:
    return {**schema, "description": one_line(text)} if text else schema
