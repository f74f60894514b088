"""Whether all ranks see one folder: what rank 0 writes and renames there, the others read."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import NamedTuple

from epi_ds.checkpoint.durable import sync_folder
from epi_ds.doctor.finding import Finding, Level, Subject
from epi_ds.doctor.folder import PROBE, write_synced
from epi_ds.doctor.team import Team

# A client of NFS asks the server anew when a file is opened; what takes longer is no cache, but another folder.
_PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.02
# Some stripes of a parallel file system, so that half a file would show.
_FILE_BYTES = 1_000_000
_REMEDY = (
    "give a folder on a disk that all nodes mount, by its absolute path; on NFS look at its options, such as actimeo"
)


class Sight(NamedTuple):
    """What one rank saw of a file."""

    seconds: float
    """Until it was whole and new."""
    problem: str = ""
    """Why it was not; empty where it was."""


def shared_folder(team: Team, path: Path) -> list[Finding]:
    """Write a file, rename another one over it, and have all ranks look. Collective; rank 0 returns findings.

    Every rank looks into ``path`` as it sees it: one that works in another directory would write its runs there, too.
    """
    name = team.tell(f"{PROBE}{uuid.uuid4().hex}")
    file = path.absolute() / name
    old, new = content(f"old {name}"), content(f"new {name}")
    try:
        sights = _write_and_look(team, file, old, before=None)
        if not any(sight.problem for sight in sights):
            sights = _write_and_look(team, file, new, before=old)
    finally:
        if team.rank == 0:
            file.unlink(missing_ok=True)
            _unfinished(file).unlink(missing_ok=True)
    return _told(team, path, sights) if team.rank == 0 else []


def content(line: str) -> bytes:
    """Return a large file that is made of one line."""
    return f"{line}\n".encode() * (_FILE_BYTES // len(line))


def look(file: Path, expected: bytes, *, before: bytes | None, seconds: float = _PATIENCE_SECONDS) -> Sight:
    """Wait until a file has its expected content.

    before   what it may hold until then; anything else is half a file, which a rename must never show
    seconds  how long to wait
    """
    started = time.monotonic()
    while True:
        try:
            found = file.read_bytes()
        except OSError as error:
            problem = f"does not see it: {error}"
        else:
            if found == expected:
                return Sight(time.monotonic() - started)
            if found != before:
                return Sight(0.0, f"reads {len(found)} bytes of {file} that are neither the old file nor the new one")
            problem = f"still reads the old {file}"
        if time.monotonic() - started > seconds or not file.parent.is_dir():
            return Sight(0.0, problem)
        time.sleep(_POLL_SECONDS)


def _write_and_look(team: Team, file: Path, expected: bytes, *, before: bytes | None) -> list[Sight]:
    """Return what every rank saw, on all of them."""
    problem = ""
    if team.rank == 0:
        try:
            write_synced(_unfinished(file), expected)
            _unfinished(file).replace(file)
            sync_folder(file.parent)
        except OSError as error:
            problem = f"cannot write it: {error}"
    # Nobody looks before it is written.
    if problem := team.tell(problem):
        return [Sight(0.0, problem)] + [Sight(0.0)] * (len(team.nodes) - 1)
    # The others wait for this rank's answer, and no longer than that.
    patience = min(_PATIENCE_SECONDS, team.timeout.total_seconds() / 2)
    return team.gather(look(file, expected, before=before, seconds=patience))


def _unfinished(file: Path) -> Path:
    return file.with_name(f"{file.name}.new")


def _told(team: Team, path: Path, sights: list[Sight]) -> list[Finding]:
    nodes_of: dict[str, dict[str, None]] = {}
    for node, sight in zip(team.nodes, sights, strict=True):
        if sight.problem:
            nodes_of.setdefault(sight.problem, {})[node] = None
    if nodes_of:
        return [
            Finding(Level.FAIL, Subject.FOLDER, f"what rank 0 writes: {problem}", _REMEDY, nodes=tuple(nodes))
            for problem, nodes in nodes_of.items()
        ]
    alone = "" if len(team.leaders) > 1 else " (all of one node)"
    said = f"all ranks{alone} read what rank 0 has renamed over a file"
    slowest = max(sight.seconds for sight in sights)
    return [Finding(Level.OK, Subject.FOLDER, said, measured=f"the last one after {slowest * 1e3:.0f} ms")]
