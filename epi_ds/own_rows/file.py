"""The file of own rows: a person may read, edit or replace it, and what was written says so beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from epi_ds.checkpoint.disk import writing
from epi_ds.checkpoint.durable import write_json, write_text
from epi_ds.data.store import digest_of
from epi_ds.errors import UserError


class Standing(NamedTuple):
    """Rows that stand in a file already."""

    num_rows: int
    is_edited: bool
    """Whether somebody else wrote them, or changed them since."""


def record_of(file: Path) -> Path:
    """Return where it stands what a file of own rows was written with: ``own_rows.written.json``."""
    return file.with_suffix(".written.json")


def standing_in(file: Path, settings: Mapping[str, Any]) -> Standing | None:
    """Return what stands in a file; None where there is none.

    settings  what would be written now is written with, as JSON has it

    Raises UserError where the rows were written with other settings, and nobody has edited them since: they would be
    taken for what they are not.
    """
    if not file.exists():
        return None
    with file.open(encoding="utf-8") as lines:
        num_rows = sum(bool(line.strip()) for line in lines)
    record = record_of(file)
    written = json.loads(record.read_text()) if record.exists() else {}
    if written.get("sha256") != digest_of(file):
        return Standing(num_rows, is_edited=True)
    before = written["settings"]
    changed = [
        f"{name} was {before.get(name)!r}, is {value!r}"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{file} holds rows that were written with other settings: {', '.join(changed)}; remove it to have them "
            "written anew, restore the settings, or give another file"
        )
    return Standing(num_rows, is_edited=False)


def write_rows(
    file: Path, rows: Sequence[Mapping[str, Any]], *, settings: Mapping[str, Any], found: Mapping[str, Any]
) -> None:
    """Write rows as JSON lines, and beside them what they were written with. Whole or absent also after a crash.

    found  what else the record says: counts and times

    Raises DiskError where they cannot be written.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    digest = hashlib.sha256(text.encode()).hexdigest()
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        # First what vouches: rows without it would be taken for a person's.
        write_json(record_of(file), {"sha256": digest, "settings": dict(settings), **found})
        write_text(file, text)
