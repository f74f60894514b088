"""What an earlier release wrote, as the settings of now: a key that it lacks means its default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from epi_ds.errors import is_mapping, nested_model


def with_defaults(model: type[BaseModel], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved values of ``model``, as JSON has them, with those that they lack, in nested models too.

    Nothing is validated: what was valid when it was written is compared with what is there now, and whole dumps are
    refused by rules about settings that would be ignored. A key that has no default stays absent.
    """
    filled = {name: _filled(model, name, value) for name, value in saved.items()}
    for name, field in model.model_fields.items():
        if name not in filled and not field.is_required():
            filled[name] = to_jsonable_python(field.get_default(call_default_factory=True))
    return filled


def _filled(model: type[BaseModel], name: str, value: Any) -> Any:
    field = model.model_fields.get(name)
    nested = None if field is None else nested_model(field.annotation)
    if nested is None:
        return value
    if field is not None and is_mapping(field.annotation):
        return {key: with_defaults(nested, part) for key, part in value.items()}
    if isinstance(value, Mapping):
        return with_defaults(nested, value)
    if isinstance(value, list):
        return [with_defaults(nested, part) if isinstance(part, Mapping) else part for part in value]
    return value
