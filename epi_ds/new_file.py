"""Files that a command writes for a person to change: what is there already is theirs."""

from __future__ import annotations

from pathlib import Path

from epi_ds.errors import UserError


def write_new(path: Path, content: str, *, parameter: str) -> None:
    """Write a file that does not exist yet.

    parameter  what names the file on the command line, for the message

    Raises UserError where it exists by now, whoever made it, and where its folder does not.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        raise UserError(f"{path} exists, and is not overwritten; remove it, or give another {parameter}") from None
    except FileNotFoundError:
        raise UserError(f"there is no folder {path.parent}; make it, or give another {parameter}") from None
