"""Whose checkpoints a folder holds, and which process writes them now.

[Note: trust] DeepSpeed's files are pickles: reading one runs whatever its author wrote. A manifest beside them proves
that they are whole, not where they come from, because a stranger can write both. So a run has an id that lies in its
folder, ``epi_run.json``, and not in its checkpoints, and pickles are read only of checkpoints that carry the id of
the folder they lie in. A checkpoint that was copied in from elsewhere does not; reading it takes the user's word
(``trust``). A record within a trainer's checkpoint counts for nothing, since its author could write that too. A whole
run that was copied with its record does count: it was the user who put it there.

[Note: fence] A process that begins to save takes the folder over. One that lives on beside it, on a node that was lost
or because a job was started twice, finds at its next save that it did, and saves nothing more. There is no lock that a
killed process could leave behind, and no clock that two nodes would have to share.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from epi_ds.checkpoint.durable import write_json
from epi_ds.checkpoint.manifest import PATH, written_later
from epi_ds.errors import CheckpointError, UserError

FILE = "epi_run.json"


class RunRecord(BaseModel):
    """What the folder of a run says about it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    incarnation: int = 0
    """Processes that have begun to save here, this one included."""
    holder: str
    """Drawn by the process that took the folder over last."""
    host: str = "an unknown host"
    pid: int = 0
    since: str = "an unknown time"

    @property
    def holder_description(self) -> str:
        """Who took the folder over, for people."""
        return f"process {self.pid} on {self.host}, since {self.since}"


def read_run(folder: Path) -> RunRecord | None:
    """Return the record of a run's folder, None where there is none. CheckpointError where it is unreadable."""
    path = folder / FILE
    try:
        return RunRecord.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        if isinstance(error, ValidationError) and (later := written_later(path, error)):
            raise CheckpointError(later) from None
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}), so it does not say whose checkpoints lie beside it. Restore "
            "it; or, if they are your own, remove it and resume with trust: true once"
        ) from None


def take_over(folder: Path) -> RunRecord:
    """Make this process the one that saves in ``folder``; return what was written. See [Note: fence]."""
    found = read_run(folder)
    if found is None:
        return _written(folder, run_id=None, incarnation=1)
    return _written(folder, run_id=found.run_id, incarnation=found.incarnation + 1)


def _written(folder: Path, *, run_id: str | None, incarnation: int) -> RunRecord:
    record = RunRecord(
        run_id=run_id or uuid.uuid4().hex,
        incarnation=incarnation,
        holder=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, json.loads(record.model_dump_json()))
    return record


def run_id_of(folder: Path) -> str:
    """Return the id of a folder's run; draw one where there is none yet, for a process that may take it over."""
    return (read_run(folder) or _written(folder, run_id=None, incarnation=0)).run_id


def why_not_ours(folder: Path, record: RunRecord) -> str | None:
    """Return why this process may not save in ``folder``; None where it is the one that took it over last."""
    found = read_run(folder)
    if found is not None and found.holder == record.holder:
        return None
    by = f"{folder / FILE} is gone" if found is None else f"{found.holder_description} has taken {folder} over"
    return (
        f"{by}, so this process ({record.holder_description}) saves nothing there. Stop one of the two jobs, or "
        "give each a folder of its own"
    )


def is_own(checkpoint: Path, run_id: str | None) -> bool:
    """Whether a checkpoint of this run id lies in a folder of its own run, or a tag in a trainer's checkpoint there.

    run_id  None for one that we did not write
    """
    folder = checkpoint.resolve().parent
    if (folder / PATH).exists():
        # A trainer's checkpoint.
        folder = folder.parent
    record = read_run(folder)
    return run_id is not None and record is not None and record.run_id == run_id


def check_trusted(checkpoint: Path, run_id: str | None, *, trust: bool, remedy: str) -> None:
    """Raise UserError unless the pickles of a checkpoint may be read. See [Note: trust].

    remedy  how the user says that they may
    """
    if trust or is_own(checkpoint, run_id):
        return
    whose = "has no manifest of ours" if run_id is None else f"belongs to run {run_id[:8]}"
    raise UserError(
        f"{checkpoint} {whose}, and no {FILE} in the folder it lies in says that this is its run. DeepSpeed's files "
        f"are pickles, so reading a stranger's checkpoint runs the stranger's code; {remedy} if you know where it "
        "comes from"
    )
