"""The folder that runs are written to, as one node sees it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from epi_ds.checkpoint.durable import sync_folder
from epi_ds.doctor.finding import Finding, Level, Subject

PROBE = ".epi_ds_doctor_"
"""What names of files begin with that a check writes, and removes."""
# fp32 weights and Adam's moments, 16-bit importance and masks.
_CHECKPOINT_BYTES_PER_PARAMETER = 14.1
_LITTLE_BYTES = 10_000_000_000


def folder(path: Path) -> list[Finding]:
    """Do in a folder what saving a checkpoint does: write, fsync, rename over a file, fsync the folder."""
    if not path.is_dir():
        return [_finding(Level.FAIL, f"{path.absolute()} is no folder here", "make it, or name another one")]
    where = path.absolute()
    try:
        seconds = _save(path)
    except OSError as error:
        said = f"{where}: what saving a checkpoint does failed: {error}"
        return [_finding(Level.FAIL, said, "give a folder of another disk")]
    said = f"{where}: write, fsync, rename over a file and fsync of the folder work"
    measured = f"fsync of 1 MB {seconds * 1e3:.1f} ms"
    return [Finding(Level.OK, Subject.FOLDER, said, measured=measured), _room(shutil.disk_usage(path).free)]


def write_synced(path: Path, content: bytes) -> float:
    """Write a file and return the seconds that its fsync took."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        started = time.perf_counter()
        os.fsync(file.fileno())
        return time.perf_counter() - started


def _save(path: Path) -> float:
    """Return the seconds of an fsync. Raises OSError where one of the calls does not work."""
    with tempfile.TemporaryDirectory(prefix=PROBE, dir=path) as own:
        old, new = Path(own) / "file", Path(own) / "file.new"
        write_synced(old, b"old")
        seconds = write_synced(new, b"new" * 333_333)
        os.replace(new, old)
        sync_folder(Path(own))
        if old.read_bytes()[:3] != b"new":
            raise OSError(f"{old} has its old content after a rename over it")
    return seconds


def _room(free_bytes: int) -> Finding:
    largest = free_bytes / _CHECKPOINT_BYTES_PER_PARAMETER
    measured = f"{free_bytes / 1e9:.1f} GB free: one checkpoint of {largest / 1e9:.2g} billion parameters"
    if free_bytes >= _LITTLE_BYTES:
        return Finding(Level.OK, Subject.FOLDER, "room", measured=measured)
    return Finding(Level.WARN, Subject.FOLDER, "little room", "checkpoint.keep_last, or another disk", measured)


def _finding(level: Level, said: str, remedy: str) -> Finding:
    return Finding(level, Subject.FOLDER, said, remedy)
