"""Saved settings with their defaults, as an earlier release's are read, and without them, as a person reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from epi_ds.errors import is_mapping, nested_model


def with_defaults(model: type[BaseModel], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved values of ``model``, as JSON has them, with those that they lack, in nested models too.

    Nothing is validated: what was valid when it was written is compared with what is there now, and whole dumps are
    refused by rules about settings that would be ignored. A key that has no default stays absent.
    """
    filled = {name: _nested(model, name, value, with_defaults) for name, value in saved.items()}
    for name, field in model.model_fields.items():
        if name not in filled and not field.is_required():
            filled[name] = to_jsonable_python(field.get_default(call_default_factory=True))
    return filled


def without_defaults(model: type[BaseModel], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved values of ``model``, as JSON has them, without those that are defaults, in nested models too.

    Nothing is validated, see `with_defaults`. A key that the model does not have stays.
    """
    return {
        name: _nested(model, name, value, without_defaults)
        for name, value in saved.items()
        if not _is_default(model, name, value)
    }


def _is_default(model: type[BaseModel], name: str, value: Any) -> bool:
    field = model.model_fields.get(name)
    if field is None or field.is_required():
        return False
    return bool(value == to_jsonable_python(field.get_default(call_default_factory=True)))


def _nested(
    model: type[BaseModel], name: str, value: Any, walk: Callable[[type[BaseModel], Mapping[str, Any]], dict[str, Any]]
) -> Any:
    """Return a value of a field, the models inside of which are walked."""
    field = model.model_fields.get(name)
    nested = None if field is None else nested_model(field.annotation)
    if nested is None:
        return value
    if field is not None and is_mapping(field.annotation):
        return {key: walk(nested, part) for key, part in value.items()}
    if isinstance(value, Mapping):
        return walk(nested, value)
    if isinstance(value, list):
        return [walk(nested, part) if isinstance(part, Mapping) else part for part in value]
    return value


class Setting(NamedTuple):
    """A setting as it was saved."""

    key: str
    """Dotted; what is in a list by its ``name`` where it has one, else by its number."""
    value: Any
    default: Any
    """As JSON has it; None where there is none, too."""
    is_given: bool
    """Whether it is not what it would be if nobody said anything."""


def settings_in(model: type[BaseModel], saved: Mapping[str, Any]) -> list[Setting]:
    """Return all saved settings of ``model``, as JSON has them, those that they lack included. Nothing is validated."""
    return list(_settings(model, with_defaults(model, saved), ""))


def _settings(model: type[BaseModel], values: Mapping[str, Any], prefix: str) -> Iterator[Setting]:
    for name, value in values.items():
        field = model.model_fields.get(name)
        nested = None if field is None else nested_model(field.annotation)
        key = f"{prefix}{name}"
        if nested is not None and field is not None and isinstance(value, Mapping) and not is_mapping(field.annotation):
            yield from _settings(nested, value, f"{key}.")
        elif nested is not None and value and isinstance(value, (Mapping, list)):
            # By names that the user gives, or one after another.
            parts = value.items() if isinstance(value, Mapping) else enumerate(value)
            for place, part in parts:
                if isinstance(part, Mapping):
                    yield from _settings(nested, part, f"{key}.{part.get('name', place)}.")
        elif isinstance(value, Mapping) and value:
            yield from (Setting(f"{key}.{part}", given, None, True) for part, given in value.items())
        elif field is None or field.is_required():
            yield Setting(key, value, None, True)
        else:
            default = to_jsonable_python(field.get_default(call_default_factory=True))
            yield Setting(key, value, default, value != default)
