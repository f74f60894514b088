"""Ready ZeRO-3 configurations, found by name. `load` returns one with changes, which is also ``epi_ds.ds_config``.

Values that are ``auto`` are for the Hugging Face trainer to fill. A loop of one's own gives them as changes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import hjson

from epi_ds.ds_configs.keys import misspelt, misspelt_problem
from epi_ds.ds_configs.values import changed, expanded
from epi_ds.errors import UserError, nearest, summarize
from epi_ds.new_file import write_copy

# Key of the line that says when to use a configuration. DeepSpeed has no such key.
_COMMENT = "comment"


def names() -> list[str]:
    """Return the names of the shipped configurations."""
    return sorted(
        entry.name.removesuffix(".json") for entry in files(__name__).iterdir() if entry.name.endswith(".json")
    )


def is_shipped(name_or_path: str) -> bool:
    """Return whether this names a shipped configuration. A file of that name wins."""
    return name_or_path in names() and not os.path.isfile(name_or_path)


def text(name: str) -> str:
    """Return the file of a shipped configuration as it is. Raises UserError for a name that is none."""
    if name not in names():
        raise UserError(
            f"{name!r} is none of the shipped configurations ({', '.join(names())}){nearest(name, names())}"
        )
    return files(__name__).joinpath(f"{name}.json").read_text()


def comment(name: str) -> str:
    """Return the line that says when to use a shipped configuration. Raises UserError for a name that is none."""
    line: str = json.loads(text(name))[_COMMENT]
    return line


def copy(name: str, target: Path | None = None) -> Path:
    """Write a shipped configuration to a file, or into a folder under its own name; return the file.

    Without ``target`` into the folder of now. Raises UserError for a name that is none, and where the file exists.
    """
    return write_copy(text(name), f"{name}.json", target)


def read(name_or_path: str) -> dict[str, Any]:
    """Return a shipped configuration or that of a file without its ``comment``, variables not yet replaced.

    A file is read as DeepSpeed reads it, so comments are allowed. Raises UserError for what is neither, and for a file
    that holds no configuration.
    """
    # Not by Path.is_file, which raises where a long string can be no path.
    is_file = os.path.isfile(name_or_path)
    if not is_file and name_or_path not in names():
        raise UserError(
            f"{name_or_path!r} is neither a JSON file nor one of the shipped configurations "
            f"({', '.join(names())}){nearest(name_or_path, names())}"
        )
    content = Path(name_or_path).read_text() if is_file else text(name_or_path)
    try:
        values = hjson.loads(content, object_pairs_hook=_distinct)
    except ValueError as error:
        raise UserError(f"{name_or_path} cannot be read as a DeepSpeed configuration: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{name_or_path} must hold a mapping of DeepSpeed's settings, got {values!r}")
    return {key: value for key, value in values.items() if key != _COMMENT}


def load(name_or_path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a shipped configuration by name, or that of a file by path, with changes. A file wins over a name.

    changes  values by dotted keys, for example ``{"zero_optimization.zero_hpz_partition_size": 4, "epi.ratio": 0.02}``;
             a mapping is merged into the section that is there

    ``${NAME}`` in a string becomes the environment variable's value. Raises UserError for what cannot be read, for a
    change that would make a section of a value or the other way round, for a variable that is not set, and for a
    misspelt key at the top, which DeepSpeed would ignore.
    """
    source = os.fspath(name_or_path)
    values = changed(read(source), changes or {}, source=source)
    if problems := [misspelt_problem(*found) for found in misspelt(values)]:
        raise UserError(summarize(problems, place=f"{source}{' with the given changes' if changes else ''}"))
    return expanded(values, source=source)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse what DeepSpeed refuses too: of a key given twice, the parser would keep one without a word."""
    keys = [key for key, _ in pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise UserError(f"keys are given twice: {', '.join(repeated)}")
    return dict(pairs)
