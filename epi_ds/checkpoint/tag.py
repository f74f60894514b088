"""The one way to a tag: it exists, may be read and is whole, and is found in a trainer's folder as well.

[Note: opening] Whoever reads a tag opens it here: a command in one process, or an engine on all ranks at once, which
share the files out and hear the same (see `Readers`). What is asked depends on what is to be read. DeepSpeed's files
are pickles, so they need the user's `Consent` where they are not of the folder's own run, and that is asked before
anything else is read. The isolation's shards are safetensors, in which nothing is executed: they may come from
anywhere, and only they have to be whole.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from epi_ds.checkpoint.catalog import Checkpoint, checkpoints_in, open_checkpoint
from epi_ds.checkpoint.digest import problems_of_files
from epi_ds.checkpoint.manifest import PATH, Kind, Manifest
from epi_ds.checkpoint.run import check_trusted
from epi_ds.checkpoint.shard import is_shard
from epi_ds.errors import CheckpointError, UserError

T = TypeVar("T")


class Tag(NamedTuple):
    """A tag of DeepSpeed's with isolation state, by its folder; the trainer's folder around it, if any, is not it."""

    path: Path
    manifest: Manifest


class Consent(NamedTuple):
    """Whether the user vouches for pickles of another run than the folder's. See [Note: trust] in run.py."""

    given: bool
    remedy: str
    """How it is given, as the end of an error."""

    def check(self, found: Checkpoint) -> None:
        """Raise UserError unless the pickles of a checkpoint may be read."""
        run_id = None if found.manifest is None else found.manifest.run_id
        check_trusted(found.path, run_id, trust=self.given, remedy=self.remedy)


def every_file(name: str) -> bool:
    """Choose all files of a checkpoint."""
    return True


class Readers(Protocol):
    """Who opens a tag."""

    def decide(self, action: Callable[[], T]) -> T:
        """Run an action once, and raise or return the same for everybody."""

    def problems_of(self, found: Checkpoint, *, chosen: Callable[[str], bool]) -> list[str]:
        """Read chosen files of a checkpoint with a manifest; return what is wrong with them, a sentence each."""


class _ThisProcess:
    """One process without others, such as a command."""

    def decide(self, action: Callable[[], T]) -> T:
        return action()

    def problems_of(self, found: Checkpoint, *, chosen: Callable[[str], bool]) -> list[str]:
        files = {} if found.manifest is None else found.manifest.files
        return problems_of_files(found.path, {name: record for name, record in files.items() if chosen(name)})


THIS_PROCESS: Readers = _ThisProcess()


def open_tag(found: Checkpoint, *, consent: Consent, readers: Readers = THIS_PROCESS) -> Tag:
    """Return the tag that a checkpoint is, or that lies in a trainer's, for all of its files to be read.

    Collective where ``readers`` are ranks. Raises UserError for what is no checkpoint, or is another run's without
    consent, and CheckpointError for one that is damaged. See [Note: opening].
    """
    _check_exists(found)
    readers.decide(lambda: consent.check(found))
    return _opened(found, every_file, readers)


def open_shards(found: Checkpoint, *, readers: Readers = THIS_PROCESS) -> Tag:
    """Return the tag that a checkpoint is, or that lies in a trainer's, for its isolation state alone to be read.

    Collective and raises as `open_tag` does; no consent is asked for, since no pickle may be read of what is returned.
    """
    _check_exists(found)
    return _opened(found, is_shard, readers)


def _check_exists(found: Checkpoint) -> None:
    if found.manifest is None:
        raise UserError(f"{found.problem}; give the folder of one checkpoint")


def _opened(found: Checkpoint, chosen: Callable[[str], bool], readers: Readers) -> Tag:
    problems = readers.problems_of(found, chosen=chosen)
    if problems:
        raise CheckpointError("; ".join(problems) + "; take another checkpoint")
    return readers.decide(lambda: _inside(found))


def _inside(found: Checkpoint) -> Tag:
    is_trainers = found.manifest is not None and found.manifest.kind is Kind.TRAINER
    tag = newest_in(found.path) if is_trainers else found
    if tag.manifest is None:
        raise CheckpointError(f"{tag.problem}; take another checkpoint")
    return Tag(tag.path, tag.manifest)


def newest_in(folder: Path) -> Checkpoint:
    """Return the newest of the tags that lie in a folder; its files are not read. CheckpointError without one."""
    tags = checkpoints_in(folder)
    if not tags:
        raise CheckpointError(f"{folder} has no tag in it; restore it, or take another checkpoint")
    return tags[-1]


def tags_below(path: Path) -> list[Checkpoint]:
    """Return every tag with a manifest at or below a path, those in trainers' folders included; files are not read.

    Raises UserError where no checkpoint with isolation state is, and CheckpointError for a damaged manifest.
    """
    found = [open_checkpoint(manifest.parent.parent) for manifest in sorted(path.rglob(PATH))]
    if not found:
        raise UserError(f"{path} holds no checkpoint with isolation state (no {PATH} below it)")
    if problems := [one.problem for one in found if one.problem is not None]:
        raise CheckpointError("; ".join(problems))
    return [one for one in found if one.manifest is not None and one.manifest.kind is Kind.TAG]
