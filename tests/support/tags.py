"""Checkpoints that tests damage, forge and vouch for anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from epi_ds.checkpoint.digest import records_of
from epi_ds.checkpoint.manifest import (
    FORMAT_VERSION,
    PATH,
    Batch,
    Isolation,
    Kind,
    Manifest,
    read_manifest,
    write_manifest,
)


def make_checkpoint(
    folder: Path, *, step: int, files: dict[str, str] | None = None, run_id: str = "run", incarnation: int = 1
) -> Path:
    """A small folder that is a checkpoint as far as anyone can tell without loading it."""
    for name, text in (files or {"weights": f"of step {step}"}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    isolation = Isolation(
        config={}, counters={"applied_steps": step}, states=(), threshold_codes=None, last_row_codes=None, extra={}
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        kind=Kind.TAG,
        run_id=run_id,
        incarnation=incarnation,
        saved_at=f"2026-01-01T00:00:{step % 60:02d}+00:00",
        versions={},
        step=step,
        batch=Batch(micro_batch=1, accumulation=1, world_size=1),
        model_dtype="float32",
        sub_groups=(),
        isolation=isolation,
        files=records_of(folder, names),
    )
    write_manifest(folder, manifest)
    return folder


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
