"""Whether a value fits a JSON Schema, for the words that ours has; any other is an error, and never passed over."""

from __future__ import annotations

import re
from typing import Any

Schema = dict[str, Any]

_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
# Words that say nothing of a value, and those that `problems` reads beside others.
_TEXTS = {"$schema", "$defs", "title", "description", "default"}
_BOUNDS = {
    "minimum": lambda value, bound: value >= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
}


def problems(value: Any, schema: Schema, *, root: Schema, place: str = "") -> list[str]:
    """Return where a value does not fit; empty where it does. Raises ValueError for a word that is not known here."""
    found: list[str] = []
    for word, said in schema.items():
        match word:
            case "$ref":
                found += problems(value, _target(said, root), root=root, place=place)
            case "type":
                if not any(_is_of(value, name) for name in ([said] if isinstance(said, str) else said)):
                    found.append(f"{place}: {value!r} is no {said}")
            case "enum":
                if value not in said:
                    found.append(f"{place}: {value!r} is none of {said}")
            case "const":
                if value != said:
                    found.append(f"{place}: {value!r} is not {said!r}")
            case "anyOf" | "oneOf":
                fitting = [not problems(value, one, root=root, place=place) for one in said]
                if not any(fitting) or (word == "oneOf" and sum(fitting) > 1):
                    found.append(f"{place}: {value!r} fits {sum(fitting)} of {word}")
            case "required":
                if isinstance(value, dict):
                    found += [f"{place}: {name} is missing" for name in said if name not in value]
            case "properties":
                if isinstance(value, dict):
                    for name in value.keys() & said.keys():
                        found += problems(value[name], said[name], root=root, place=f"{place}.{name}")
            case "additionalProperties":
                if isinstance(value, dict):
                    for name in value.keys() - schema.get("properties", {}).keys():
                        other = {"enum": []} if said is False else {} if said is True else said
                        found += problems(value[name], other, root=root, place=f"{place}.{name}")
            case "items":
                if isinstance(value, list):
                    for index, item in enumerate(value):
                        found += problems(item, said, root=root, place=f"{place}.{index}")
            case "minItems":
                if isinstance(value, list) and len(value) < said:
                    found.append(f"{place}: fewer than {said}")
            case "pattern":
                if isinstance(value, str) and not re.search(said, value):
                    found.append(f"{place}: {value!r} does not match {said}")
            case _ if word in _BOUNDS:
                if _is_of(value, "number") and not _BOUNDS[word](value, said):
                    found.append(f"{place}: {value!r} is beyond {word} {said}")
            case _ if word not in _TEXTS:
                raise ValueError(f"{place}: {word} is not known here")
    return found


def _is_of(value: Any, name: str) -> bool:
    # A truth value is no number to JSON.
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def _target(reference: str, root: Schema) -> Schema:
    target = root
    for part in reference.removeprefix("#/").split("/"):
        target = target[part]
    return target
