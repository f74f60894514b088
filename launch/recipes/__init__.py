"""Recipes shipped with the package, found by name. The first line of each says when to use it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from epi_ds.errors import UserError, nearest
from epi_ds.new_file import write_copy

_ENDING = ".yaml"


def names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(
        entry.name.removesuffix(_ENDING) for entry in files(__name__).iterdir() if entry.name.endswith(_ENDING)
    )


def path_of(name: str) -> Path:
    """Return the file of a shipped recipe. Raises UserError for a name that is none."""
    if name not in names():
        raise UserError(f"{name!r} is none of the shipped recipes ({', '.join(names())}){nearest(name, names())}")
    return Path(__file__).parent / f"{name}{_ENDING}"


def text(name: str) -> str:
    """Return a shipped recipe as it is. Raises UserError for a name that is none."""
    return path_of(name).read_text()


def comment(name: str) -> str:
    """Return the line that says when to use a shipped recipe. Raises UserError for a name that is none."""
    return text(name).partition("\n")[0].removeprefix("#").strip()


def copy(name: str, target: Path | None = None) -> Path:
    """Write a shipped recipe to a file, or into a folder under its own name; return the file.

    Without ``target`` into the folder of now. Raises UserError for a name that is none, and where the file exists.
    """
    return write_copy(text(name), f"{name}{_ENDING}", target)
