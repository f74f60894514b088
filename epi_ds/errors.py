"""Turn validation errors into sentences a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import BaseModel, ValidationError


def nearest(name: str, valid_names: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of ``valid_names``, or an empty string."""
    close = difflib.get_close_matches(name, list(valid_names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> dict[str, type]:
    """Return the fields valid at ``path``, as far as nested models can be followed by field name."""
    fields = model.model_fields
    for part in path:
        field = fields.get(part) if isinstance(part, str) else None
        annotation = field.annotation if field is not None else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if nested:
            fields = nested[0].model_fields
        elif not isinstance(part, int):
            return {}
    return {name: object for name in fields}


def describe(error: ValidationError, model: type[BaseModel], *, place: str) -> str:
    """List every problem of ``error``: where, the value, the rule and, for unknown keys, the nearest valid name.

    ``place`` names what was being read, for example ``the "epi" section of ds_config``.
    """
    problems = []
    for item in error.errors():
        path = item["loc"]
        name = ".".join(str(part) for part in path) or "(whole)"
        if item["type"] == "extra_forbidden":
            valid = _fields_at(model, path[:-1])
            hint = nearest(str(path[-1]), valid)
            problems.append(f"{name}: unknown key{hint or '; valid keys are ' + ', '.join(sorted(valid))}")
        elif item["type"] == "value_error":
            problems.append(f"{name}: {item['ctx']['error']}")
        else:
            problems.append(f"{name}: {item['msg']}, got {item['input']!r}")
    lines = "\n".join(f"  - {problem}" for problem in problems)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{count} in {place}:\n{lines}"
