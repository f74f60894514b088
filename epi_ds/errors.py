"""Turn validation errors into sentences a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import NamedTuple, get_origin

from pydantic import BaseModel, ValidationError


class UserError(ValueError):
    """The user's mistake: the message names the value, the rule, the place and the remedy, and needs no traceback."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written: the message names the file and the remedy, and needs no traceback."""


class RemedyError(RuntimeError):
    """Something beside the command and the code is in the way: a tool, a disk, data on which training diverges.

    The message ends with the remedy and needs no traceback. Ranks raise it together.
    """


class DiskError(RemedyError):
    """A file cannot be written: a full disk, say, or one that is read-only. See [Note: disk] in checkpoint/disk.py.

    Unlike others of its kind it may be raised by one rank alone, which then speaks for itself.
    """


class LostRankError(RuntimeError):
    """Another rank died or stands still; the message says who noticed, and the traceback would only say where."""


class Problem(NamedTuple):
    """What is wrong with a value, and which one."""

    key: str
    """Dotted, with the positions of list items; empty for the whole that was read."""
    text: str

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" if self.key else self.text

    def within(self, section: str) -> Problem:
        """Return the same problem, said of a whole in which that value stands under ``section``."""
        return self._replace(key=f"{section}.{self.key}" if self.key else section)


def nearest(name: str, valid_names: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of ``valid_names``, or an empty string."""
    close = difflib.get_close_matches(name, list(valid_names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def summarize(problems: Sequence[str | Problem], *, place: str) -> str:
    """Put problems under one heading. ``place`` names what was read, e.g. ``the "epi" section of ds_config``."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{count} in {place}:\n" + "\n".join(f"  - {problem}" for problem in problems)


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return one sentence per problem: where, the value, the rule and, for unknown keys, the nearest valid name."""
    return [str(problem) for problem in located_problems(error, model)]


def located_problems(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Return the problems of which `problems_of` makes sentences."""
    problems = []
    for item in error.errors():
        # Tags of a union are no part of what the user wrote.
        path = tuple(part for part in item["loc"] if not str(part).startswith("<"))
        key = ".".join(str(part) for part in path)
        if item["type"] == "extra_forbidden":
            valid = _fields_at(model, path[:-1])
            hint = nearest(str(path[-1]), valid)
            text = f"unknown key{hint or '; valid keys are ' + ', '.join(sorted(valid))}"
        elif item["type"] == "value_error":
            text = str(item["ctx"]["error"])
        else:
            text = f"{item['msg']}, got {item['input']!r}"
        problems.append(Problem(key, text))
    return problems


def unknown_keys(error: ValidationError) -> list[str]:
    """Return the keys that a model does not have, dotted; empty where all that is wrong is something else."""
    return [".".join(map(str, item["loc"])) for item in error.errors() if item["type"] == "extra_forbidden"]


def _fields_at(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """Return the fields valid at ``path``, following nested models by field name."""
    # Of a value in a mapping: it is the user's.
    is_name = False
    for part in path:
        if isinstance(part, int) or is_name:
            is_name = False
            continue
        field = model.model_fields.get(part)
        if field is None or (nested := nested_model(field.annotation)) is None:
            return []
        model, is_name = nested, is_mapping(field.annotation)
    # Whoever has an alias is known by it.
    return [field.alias or name for name, field in model.model_fields.items()]


def nested_model(annotation: object) -> type[BaseModel] | None:
    """Return the model inside an annotation such as ``M``, ``M | None``, ``tuple[M, ...]`` or ``dict[str, M]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := nested_model(argument)) is not None:
            return found
    return None


def is_mapping(annotation: object) -> bool:
    """Whether a field holds values by names that the user gives: ``dict[str, M]``."""
    return get_origin(annotation) is dict
