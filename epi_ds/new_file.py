"""Files that a command writes for a person to change: what is there already is theirs."""

from __future__ import annotations

from pathlib import Path

from epi_ds.errors import UserError


def check_new(path: Path, *, parameter: str) -> None:
    """Raise UserError where a file cannot be written by `write_new`: it exists by now, or its folder does not.

    parameter  what names the file on the command line, for the message
    """
    if path.exists():
        raise UserError(f"{path} exists, and is not overwritten; remove it, or give another {parameter}")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}; make it, or give another {parameter}")


def write_copy(content: str, name: str, target: Path | None) -> Path:
    """Write what is shipped under a file's name to ``target``, or under that name into it where it is a folder.

    Without a target into the folder of now. Returns the file; raises what `check_new` raises.
    """
    path = Path(name) if target is None else target / name if target.is_dir() else target
    write_new(path, content, parameter="TARGET")
    return path


def write_new(path: Path, content: str, *, parameter: str) -> None:
    """Write a file that does not exist yet, whoever else makes it meanwhile. Raises what `check_new` raises."""
    check_new(path, parameter=parameter)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        check_new(path, parameter=parameter)
        raise
