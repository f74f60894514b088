"""Checkpoints that tests damage, forge and vouch for anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from epi_ds.checkpoint.digest import records_of
from epi_ds.checkpoint.manifest import PATH, Manifest, read_manifest, write_manifest


def manifest_of(tag: Path) -> Manifest:
    """The manifest of a whole tag."""
    manifest = read_manifest(tag)
    assert manifest is not None
    return manifest


def change_manifest(tag: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest so that it is whole again."""
    content = manifest_of(tag).model_dump()
    change(content)
    write_manifest(tag, Manifest.model_validate(content))


def vouch(tag: Path) -> None:
    """Make a manifest vouch for the files as they are now."""
    names = [str(path.relative_to(tag)) for path in tag.rglob("*") if path.is_file()]
    records = {name: record.model_dump() for name, record in records_of(tag, set(names) - {PATH}).items()}
    change_manifest(tag, lambda content: content.update(files=records))


def flip_bit(path: Path, at: int = -1) -> None:
    """Flip one bit of a file, by default in its last byte."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
