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


class Written(NamedTuple):
    """What is known of the rows in a file. None where a person gave or edited them: nobody counted."""

    written: int
    """Rows that stand in the file."""
    asked: int | None
    """Rows that the model was to write."""
    left_out: dict[str, int] | None
    """Rows that it wrote and that were not kept, by reason."""
    num_tokens: int | None
    """That were sampled, for rows that were left out too."""
    seconds: float | None
    tokens_per_second: float | None
    is_edited: bool
    file: str
    sha256: str


def record_of(file: Path) -> Path:
    """Return where it stands what a file of own rows was written with: ``own_rows.written.json``."""
    return file.with_suffix(".written.json")


def standing_in(file: Path, settings: Mapping[str, Any]) -> Standing | None:
    """Return what stands in a file; None where there is none.

    settings  what would be written now is written with, as JSON has it

    Raises UserError for a file without rows, and where the rows were written with other settings and nobody has edited
    them since: they would be taken for what they are not.
    """
    if not file.exists():
        return None
    num_rows = _count(file)
    if not num_rows:
        raise UserError(
            f"{file} holds no row, and what stands there is used as it is; remove it to have rows written, or put "
            "some there"
        )
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


def written_in(file: Path) -> Written:
    """Return what is known of the rows in a file, by what `write_rows` wrote beside them."""
    digest, record = digest_of(file), record_of(file)
    found = json.loads(record.read_text()) if record.exists() else {}
    rows = _count(file)
    if found.get("sha256") != digest:
        return Written(rows, None, None, None, None, None, is_edited=True, file=str(file), sha256=digest)
    seconds, num_tokens = found["seconds"], found["num_tokens"]
    return Written(
        rows,
        asked=found["settings"]["rows"],
        left_out=found["left_out"],
        num_tokens=num_tokens,
        seconds=seconds,
        tokens_per_second=num_tokens / seconds if seconds else None,
        is_edited=False,
        file=str(file),
        sha256=digest,
    )


def _count(file: Path) -> int:
    with file.open(encoding="utf-8") as lines:
        return sum(bool(line.strip()) for line in lines)


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
