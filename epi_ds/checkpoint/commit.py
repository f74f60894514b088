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

from epi_ds.checkpoint.catalog import checkpoints_in, clean_up, open_checkpoint
from epi_ds.checkpoint.retention import Retention, prune
from epi_ds.checkpoint.run import RunRecord, take_over, why_not_ours
from epi_ds.checkpoint.saving import SaveTimes
from epi_ds.checkpoint.seats import free_number, leave_seats, take_seat
from epi_ds.checkpoint.verdict import AgreedError, on_first_rank
from epi_ds.checkpoint_config import CheckpointConfig
from epi_ds.choices import OnFailure
from epi_ds.errors import CheckpointError, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class _Held:
    """A folder that this process has taken over, for all its engines."""

    record: RunRecord
    """What was written there last."""


# By resolved path.
_held: dict[Path, _Held] = {}


@dataclass
class Run:
    """The checkpoints of the run that an engine of this process trains, the same on every rank. Methods are collective.

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
    _occupied: dict[Path, _Held] = field(init=False, default_factory=dict)
    """The folders that this engine has come to since it last loaded from them."""
    _numbers: dict[Path, int] = field(init=False, default_factory=dict)
    """The engine's number in folders that it has saved in or loaded from. See [Note: engines] in seats.py."""

    def __post_init__(self) -> None:
        self.keep_last = self.config.keep_last

    def occupy(self, folder: Path) -> RunRecord:
        """Make this process the one that saves in a run's folder; return its record there.

        Raises CheckpointError where another process has taken it over since. See [Note: fence] in run.py.
        """
        folder = folder.resolve()
        if folder in self._occupied:
            record = self._occupied[folder].record
            problem = on_first_rank(lambda: why_not_ours(folder, record))
            if problem is not None:
                raise CheckpointError(problem)
            return record
        held = _held.get(folder)

        def take() -> tuple[bool, RunRecord, list[str]]:
            is_held = held is not None and why_not_ours(folder, held.record) is None
            return is_held, take_over(folder), clean_up(folder)

        is_held, record, done = on_first_rank(take)
        if dist.get_rank() == 0:
            for sentence in done:
                logger.warning("%s", sentence)
        if held is None or not is_held:
            # Engines that lost the folder to another process stay out of it.
            held = _held[folder] = _Held(record)
        held.record, self._occupied[folder] = record, held
        self._take_number(folder, wanted=None)
        return record

    def number_in(self, folder: Path) -> int | None:
        """Return the engine's number in a folder; None where it has neither saved there nor loaded from there.

        A trainer's output folder is one engine's alone.
        """
        return 0 if self.trainer_folder is not None else self._numbers.get(folder.resolve())

    def check_name(self, path: Path) -> None:
        """Raise UserError where a tag of this name is another engine's of this process, which a save would replace."""
        number = self.number_in(path.parent)

        def check() -> None:
            there = open_checkpoint(path).manifest
            if there is not None and there.engine != number:
                raise UserError(
                    f"{path} is a tag of engine {there.engine} of those that save there, and this is engine {number}: "
                    "it would be replaced. Give each engine tags (save_checkpoint(..., tag=...)) or a folder of "
                    "its own, or end the other one by its destroy()"
                )

        on_first_rank(check)

    def leave(self) -> None:
        """Note that the engine saves nothing any more: another one may have its numbers. Not collective."""
        leave_seats(self)
        self._numbers.clear()

    def _take_number(self, folder: Path, *, wanted: int | None) -> None:
        def choose() -> int:
            there = (one.manifest.engine for one in checkpoints_in(folder) if one.manifest is not None)
            return free_number(folder, self, wanted=wanted, there=there)

        self._numbers[folder] = on_first_rank(choose)
        take_seat(folder, self, self._numbers[folder])

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

        also_keep  checkpoints that stay whatever their age, and count among those to keep
        """
        self.saved_step = step
        self._remove_older(self.keep_last, home=self.home_of(path), paths=(path, *also_keep))

    def keep_only(self, path: Path) -> None:
        """Remove all checkpoints of this run beside one, but for those that ``keep_every`` keeps, if that one is whole.

        Whatever is newer goes too.
        """
        if open_checkpoint(path).problem is None:
            self._remove_older(0, home=self.home_of(path), paths=(path,))

    def _remove_older(self, last: int | None, *, home: Path, paths: tuple[Path, ...]) -> None:
        held = self._occupied.get(home.resolve())
        if held is not None and dist.get_rank() == 0:
            run_id, engine = held.record.run_id, self.number_in(home)
            prune(home, Retention(last, self.config.keep_every, run_id=run_id, engine=engine, paths=paths))

    def continues_from(self, path: Path, *, step: int, engine: int) -> None:
        """Note that the run goes on from a tag that was loaded, of an engine of that number.

        Where this process has saved beside it, it goes on there as a later process would: what it saves from now on is
        newer than what it saved before, also where it has gone back to an older step.
        """
        self.last_checkpoint, self.saved_step = path, step
        folder = path.parent
        if folder.resolve() in self._occupied:
            self.occupy(folder)
            del self._occupied[folder.resolve()]
        self._take_number(folder.resolve(), wanted=engine)

    def home_of(self, path: Path) -> Path:
        """Return the folder of the run, in which a checkpoint lies or the trainer's whose tag it is."""
        return self.trainer_folder or path.parent
