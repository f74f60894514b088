"""What is done about every checkpoint of a run that trains, whoever writes it: the engine, or a trainer around one.

[Note: policy] The folder is taken over, or found to be this process's still (see [Note: fence] in run.py); the
checkpoint is written and made whole; a failure on any rank is told, or ends the run, on all of them
(``checkpoint.on_failure``); what is whole is remembered, and older ones that are not to stay are removed. A trainer's
checkpoint is saved in two goes, its tag by the engine and what lies around the tag by the callback, and is whole after
the second.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from epi_ds.checkpoint.catalog import clean_up
from epi_ds.checkpoint.retention import Retention, prune
from epi_ds.checkpoint.run import RunRecord, take_over, why_not_ours
from epi_ds.checkpoint.saving import SaveTimes
from epi_ds.checkpoint.verdict import AgreedError, on_first_rank
from epi_ds.choices import OnFailure
from epi_ds.config import CheckpointConfig
from epi_ds.errors import CheckpointError

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Run:
    """The checkpoints of the run that this process trains, the same on every rank. Methods are collective.

    ``Run(config.checkpoint)`` is one that has none yet.
    """

    config: CheckpointConfig
    trainer_folder: Path | None = None
    """The output folder of the trainer that drives the engine: its ``checkpoint-N`` are then what becomes whole."""
    verified: Path | None = None
    """A checkpoint whose files were read and found whole before the engine was made."""
    keep_last: int | None = field(init=False)
    """Complete checkpoints to keep; ``config.keep_last`` unless a trainer says otherwise."""
    last_checkpoint: Path | None = None
    """The newest one that was saved or loaded."""
    saved_step: int | None = None
    """The step of that one; None where there is none."""
    failed: Path | None = None
    """What the last save that failed was to write."""
    last_save: SaveTimes | None = None
    """Seconds of this rank's last save of a tag."""
    _occupied: dict[Path, RunRecord] = field(init=False, default_factory=dict)
    """The folders that this process has taken over, with what it wrote there."""

    def __post_init__(self) -> None:
        self.keep_last = self.config.keep_last

    def occupy(self, folder: Path) -> RunRecord:
        """Make this process the one that saves in a run's folder; return its record there.

        Raises CheckpointError where another process has taken it over since. See [Note: fence] in run.py.
        """
        folder = folder.resolve()
        if folder in self._occupied:
            record = self._occupied[folder]
            problem = on_first_rank(lambda: why_not_ours(folder, record))
            if problem is not None:
                raise CheckpointError(problem)
            return record

        def take() -> tuple[RunRecord, list[str]]:
            taken = take_over(folder)
            return taken, clean_up(folder)

        record, done = on_first_rank(take)
        if dist.get_rank() == 0:
            for sentence in done:
                logger.warning("%s", sentence)
        self._occupied[folder] = record
        return record

    def save(self, path: Path, write: Callable[[RunRecord], T]) -> T | None:
        """Write a checkpoint, or a trainer's tag, as [Note: policy] says; return what ``write`` does, None on failure.

        write  is collective, raises AgreedError where it fails, and what it has written then is gone

        Raises AgreedError under ``on_failure: stop``, and CheckpointError where another process has taken the folder
        over.
        """
        try:
            written = write(self.occupy(self.home_of(path)))
        except AgreedError as error:
            self.failed = path
            if self.config.on_failure is OnFailure.STOP:
                raise
            if dist.get_rank() == 0:
                logger.error("%s was not saved, and training goes on (checkpoint.on_failure): %s", path, error)
            return None
        self.last_checkpoint = path
        return written

    def completed(self, path: Path, *, step: int, also_keep: Sequence[Path] = ()) -> None:
        """Note that a checkpoint of a step is whole, and remove older ones of this run that are not to stay.

        also_keep  checkpoints that stay whatever their age
        """
        self.saved_step = step
        home = self.home_of(path)
        if dist.get_rank() == 0:
            paths, run_id = (path, *also_keep), self._occupied[home.resolve()].run_id
            prune(home, Retention(self.keep_last, self.config.keep_every, run_id=run_id, paths=paths))

    def continues_from(self, path: Path, *, step: int) -> None:
        """Note that the run goes on from a tag that was loaded.

        Where this process has saved beside it, it goes on there as a later process would: what it saves from now on is
        newer than what it saved before, also where it has gone back to an older step.
        """
        self.last_checkpoint, self.saved_step = path, step
        folder = path.parent
        if folder.resolve() in self._occupied:
            self.occupy(folder)
            del self._occupied[folder.resolve()]

    def home_of(self, path: Path) -> Path:
        """Return the folder of the run, in which a checkpoint lies or the trainer's whose tag it is."""
        return self.trainer_folder or path.parent
