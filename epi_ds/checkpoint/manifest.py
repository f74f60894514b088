"""``epi/manifest.json``: written last, by rename. A tag without one has no isolation state."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from epi_ds.errors import problems_of, summarize

FOLDER = "epi"
FILE = "manifest.json"


class FileRecord(BaseModel):
    """Size and checksum of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a tag's isolation state consists of, and what it was made with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    versions: dict[str, str]
    world_size: int
    counters: dict[str, int | float]
    config: dict[str, Any]
    threshold_codes: dict[str, int] | None
    """Threshold code of each layer; None before the first refresh."""
    last_row_codes: list[int] | None
    """Where the last search ended (`Thresholds.row_codes`); what an adaptive run decides next depends on it."""
    extra: dict[str, Any]
    files: dict[str, FileRecord]
    """The shards, by file name inside the ``epi`` folder."""


def record_of(path: Path) -> FileRecord:
    """Read a file once and return its record."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return FileRecord(num_bytes=path.stat().st_size, sha256=digest.hexdigest())


def check_record(path: Path, manifest: Manifest) -> None:
    """Raise RuntimeError where a file of an ``epi`` folder is not the one that its manifest was written for."""
    expected, found = manifest.files.get(path.name), record_of(path)
    if expected != found:
        raise RuntimeError(f"{path} is damaged: the manifest says {expected}, the file is {found}. Load another tag")


def remove_manifest(folder: Path) -> None:
    """Remove the manifest of an ``epi`` folder, where there is one, so that it stays removed after a crash."""
    if (folder / FILE).exists():
        (folder / FILE).unlink()
        _sync(folder)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of an ``epi`` folder so that it is either whole or absent, also after a crash."""
    temporary = folder / f".{FILE}.tmp"
    with temporary.open("w") as file:
        json.dump(manifest.model_dump(), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / FILE)
    _sync(folder)


def _sync(folder: Path) -> None:
    """Make the names in a folder outlive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of an ``epi`` folder; None where there is none. RuntimeError where it is unreadable."""
    path = folder / FILE
    try:
        return Manifest.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problems = summarize(problems_of(error, Manifest), place=str(path))
        raise RuntimeError(f"{problems}\nLoad another tag.") from None
