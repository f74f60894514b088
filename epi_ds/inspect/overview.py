"""What lies in a folder of checkpoints, for people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from epi_ds.checkpoint.catalog import Checkpoint, checkpoints_in, leftovers_in, open_checkpoint
from epi_ds.checkpoint.digest import problems_of_files
from epi_ds.checkpoint.manifest import FOLDER
from epi_ds.checkpoint.run import is_own
from epi_ds.errors import UserError


class Line(NamedTuple):
    """One checkpoint, or what is left of one."""

    name: str
    step: int | None
    saved_at: str
    ranks: int | None
    num_bytes: int | None
    state: str
    """``complete``, or why it is not."""


def folder_of(path: Path) -> Path:
    """Return where the checkpoints are: of a run's folder the one inside. Raises UserError where there is no folder."""
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    inside = path / "checkpoints"
    return inside if inside.is_dir() else path


def found_at(path: Path) -> list[Checkpoint]:
    """Return the checkpoint at a path, or those in it, the newest last. Raises UserError where there is none."""
    folder = folder_of(path)
    found = [open_checkpoint(folder)] if (folder / FOLDER).is_dir() else checkpoints_in(folder)
    if not found:
        raise UserError(f"{folder} holds no checkpoint")
    return found


def lines_of(path: Path) -> list[Line]:
    """Describe the checkpoints of a folder, and what interrupted saves left. Reads no file but manifests."""
    folder = folder_of(path)
    lines = []
    for found in checkpoints_in(folder):
        manifest = found.manifest
        if manifest is None:
            lines.append(Line(found.path.name, None, "", None, None, str(found.problem)))
        else:
            state = "complete" if is_own(found.path, manifest.run_id) else f"complete, of run {manifest.run_id[:8]}"
            lines.append(
                Line(found.path.name, manifest.step, manifest.saved_at, manifest.world_size, manifest.num_bytes, state)
            )
    left = "left by an interrupted save or removal; put right when the run saves again"
    return [*lines, *(Line(path.name, None, "", None, None, left) for path in leftovers_in(folder))]


def verify(path: Path, report: Callable[[Checkpoint, list[str]], None]) -> bool:
    """Read every file of the checkpoints at a path; report what is wrong with each. Returns whether all are whole."""
    whole = True
    for found in found_at(path):
        manifest = found.manifest
        problems = [str(found.problem)] if manifest is None else problems_of_files(found.path, manifest.files)
        report(found, problems)
        whole = whole and not problems
    return whole
