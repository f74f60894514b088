"""The arguments that the installed TRL takes, known without importing it a second time.

Importing TRL takes seconds, and every command that reads a recipe wants to know its arguments before a rank starts.
They change with its release only, so they are kept in the cache by release, and by what reads them: an upgrade may read
more.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import types
import typing
from contextlib import suppress
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from epi_ds.launch.environment import cache_folder

# Types of arguments that are checked; others are left to TrainingArguments.
PLAIN = {"bool": bool, "int": int, "float": float, "str": str, "NoneType": type(None), "dict": dict, "list": list}
_PACKAGES = ("trl", "transformers")


class TrainerArguments(NamedTuple):
    """What ``SFTConfig`` and ``TrainingArguments`` of the installed releases take."""

    types: dict[str, tuple[str, ...]]
    """By argument the names of its types in `PLAIN`; empty where it takes others too."""
    descriptions: dict[str, str]
    """By argument what TRL or transformers say of it, as Markdown."""
    schedules: tuple[str, ...]
    """Names of learning-rate schedules."""
    trackers: tuple[str, ...]
    """What ``report_to`` may name."""


@cache
def trainer_arguments() -> TrainerArguments:
    """Return the arguments of the installed TRL. Raises ModuleNotFoundError, by its name, where there is none."""
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    releases = "-".join(f"{name}-{importlib.metadata.version(name)}" for name in _PACKAGES)
    # What is read, and how it is kept, changes with this file.
    reader = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    kept = cache_folder() / f"arguments-{releases}-{reader}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        values = json.loads(kept.read_text())
        kinds = {name: tuple(names) for name, names in values["types"].items()}
        return TrainerArguments(kinds, values["descriptions"], tuple(values["schedules"]), tuple(values["trackers"]))
    found = _read_from_trl()
    # Without a place to keep it, the next command takes seconds longer.
    with suppress(OSError):
        _keep(kept, found)
    return found


def _read_from_trl() -> TrainerArguments:
    from transformers import SchedulerType
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from trl import SFTConfig

    hints = typing.get_type_hints(SFTConfig)
    fields = [field for field in dataclasses.fields(SFTConfig) if field.init]
    return TrainerArguments(
        types={field.name: plain_types(hints[field.name]) for field in fields},
        descriptions={field.name: field.metadata.get("help", "") for field in fields},
        schedules=tuple(kind.value for kind in SchedulerType),
        trackers=tuple(INTEGRATION_TO_CALLBACK),
    )


def plain_types(annotation: Any) -> tuple[str, ...]:
    """Return the names in `PLAIN` of the types that an annotation allows; empty where it allows others too."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    names = tuple(_plain_name(typing.get_origin(member) or member) for member in members)
    return tuple(dict.fromkeys(names)) if all(names) else ()


def _plain_name(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum) and issubclass(kind, str):
        return "str"
    return next((name for name, plain in PLAIN.items() if plain is kind), "")


def _keep(path: Path, found: TrainerArguments) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_name(f"{path.name}.{os.getpid()}")
    begun.write_text(json.dumps(found._asdict()))
    begun.replace(path)
