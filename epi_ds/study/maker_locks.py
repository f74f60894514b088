"""Locks on what is made: bases and rows that several commands share, on several nodes too, are made by one of them."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

logger = logging.getLogger(__name__)


def take_locks(paths: Sequence[Path]) -> ExitStack | None:
    """Lock all of ``paths`` against other commands, or none; return what lets go of them, None where one is taken.

    A process that dies lets go of its locks. They lie beside the paths, and stay: who removed one could not know
    whether somebody waits for it. Where a disk has no locks, that is said, and nobody is kept out.
    """
    with ExitStack() as taken:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = taken.enter_context(path.with_name(f"{path.name}.lock").open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            except OSError as error:
                logger.warning("%s cannot be locked (%s): another command may make it at the same time", path, error)
        return taken.pop_all()
