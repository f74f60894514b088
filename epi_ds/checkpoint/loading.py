"""Choosing and verifying what to resume from. Every function is collective, and all ranks hear the same.

Nothing of a checkpoint is read before it is verified but its manifest, and no pickle before it is trusted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from epi_ds.checkpoint.catalog import Checkpoint, Choice, checkpoints_in, named, newest_valid, of_engine
from epi_ds.checkpoint.deepspeed_files import latest_in
from epi_ds.checkpoint.digest import FileRecord, problems_of_files
from epi_ds.checkpoint.manifest import Manifest, read_manifest
from epi_ds.checkpoint.tag import every_file
from epi_ds.checkpoint.verdict import agree, on_first_rank
from epi_ds.errors import CheckpointError, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

AUTO = "auto"


def choose(folder: Path, tag: str | None, *, accepts_plain: bool, engine: int | None = None) -> Choice | None:
    """Return the verified checkpoint of ``folder`` to resume from; None where none was ever saved there.

    tag            a name, ``step:N``, or None or ``auto`` for the newest one that is whole
    accepts_plain  one that DeepSpeed wrote without us will do: it has no manifest, and is not verified
    engine         the number whose checkpoints may be taken where none is named; None where it is not known

    Says which was taken and what was passed over. Raises UserError for a tag that is not there, or where it is not
    known whose is meant, and CheckpointError for one that is not whole, or where none is.
    """
    if tag is None or tag == AUTO:
        found = on_first_rank(lambda: _look(folder, engine))
        if accepts_plain and found.plain is not None:
            choice: Choice | None = Choice(found.plain, ())
        else:
            choice = newest_valid(folder, found.checkpoints, problems_of=verify, was_saved=found.latest is not None)
    else:
        checkpoint = on_first_rank(lambda: named(folder, tag, engine=engine))
        problems = [checkpoint.problem] if checkpoint.problem is not None else verify(checkpoint)
        if problems and not (accepts_plain and checkpoint.is_plain):
            raise CheckpointError("; ".join(problems) + ". Load another tag, or the newest that is whole (tag auto)")
        choice = Choice(checkpoint, ())
    if choice is not None and dist.get_rank() == 0:
        for reason in choice.skipped:
            logger.warning("passing over %s", reason)
        logger.info("loading %s (step %d)", choice.checkpoint.path, choice.checkpoint.step)
    return choice


def newest_checkpoint(folder: str | Path) -> str | None:
    """Return the path of the newest whole checkpoint in a trainer's output folder; None without. Collective.

    For ``trainer.train(resume_from_checkpoint=newest_checkpoint(args.output_dir))``, which begins a run and goes on
    alike. Raises CheckpointError where there are checkpoints and none is whole, and UserError before there are ranks.
    """
    if not dist.is_initialized():
        raise UserError(
            f"newest_checkpoint({str(folder)!r}) is answered by all ranks together, and there is no process group yet; "
            "call it after the trainer is constructed, or after deepspeed.init_distributed()"
        )
    choice = choose(Path(folder), AUTO, accepts_plain=False)
    return None if choice is None else str(choice.checkpoint.path)


class _Found(NamedTuple):
    checkpoints: list[Checkpoint]
    latest: str | None
    """Content of ``latest``."""

    @property
    def plain(self) -> Checkpoint | None:
        """The one that ``latest`` names, where none in the folder is ours."""
        if any(not one.is_plain for one in self.checkpoints):
            return None
        return next((one for one in self.checkpoints if one.path.name == self.latest), None)


def _look(folder: Path, engine: int | None) -> _Found:
    return _Found(of_engine(folder, checkpoints_in(folder), engine), latest_in(folder))


def verify(found: Checkpoint, *, chosen: Callable[[str], bool] = every_file) -> list[str]:
    """Read every chosen file of a checkpoint once, shared out among the ranks; return what is wrong, the same on all.

    Raises CheckpointError where the ranks do not see the same manifest.
    """
    manifest = agree(lambda: read_manifest(found.path), seen=lambda seen: _describe(found.path, seen))
    if manifest is None:
        return [f"{found.path} disappeared while it was looked at"]
    files = {name: record for name, record in manifest.files.items() if chosen(name)}
    own = share_of(files, rank=dist.get_rank(), world_size=dist.get_world_size())
    problems: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(problems, agree(lambda: problems_of_files(found.path, own)))
    return sorted(problem for ranks in problems for problem in ranks)


class AllRanks(NamedTuple):
    """All ranks as the readers of a tag: see [Note: opening] in tag.py. Every method is collective."""

    verified: Path | None = None
    """A checkpoint whose files were read and found whole before, and are not read again."""

    def decide(self, action: Callable[[], T]) -> T:
        """Run an action on rank 0."""
        return on_first_rank(action)

    def problems_of(self, found: Checkpoint, *, chosen: Callable[[str], bool]) -> list[str]:
        """Read chosen files of a checkpoint, each on one rank."""
        return [] if found.path == self.verified else verify(found, chosen=chosen)


def share_of(files: Mapping[str, FileRecord], *, rank: int, world_size: int) -> dict[str, FileRecord]:
    """Return the files that one rank reads, so that all read about the same number of bytes."""
    loads = [0] * world_size
    own = {}
    for name, record in sorted(files.items(), key=lambda item: (-item[1].num_bytes, item[0])):
        reader = loads.index(min(loads))
        loads[reader] += record.num_bytes
        if reader == rank:
            own[name] = record
    return own


def _describe(folder: Path, manifest: Manifest | None) -> str:
    """Say which manifest this is, in one line."""
    if manifest is None:
        return f"{folder} has no manifest"
    return f"{folder}: step {manifest.step} of run {manifest.run_id}, saved at {manifest.saved_at}"
