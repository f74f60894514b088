"""Which checkpoints are kept."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from epi_ds.checkpoint.catalog import REMOVED, Checkpoint, checkpoints_in, leftovers_in, remove

logger = logging.getLogger(__name__)


class Keep(NamedTuple):
    """What is kept of a folder's complete checkpoints."""

    last: int | None
    """How many of the newest, at least one; None keeps all."""
    every: int | None = None
    """Those of every so many steps, for good."""
    run_id: str | None = None
    """Those of other runs are left alone; None sees no difference."""
    paths: tuple[Path, ...] = ()
    """These in any case."""


def surplus(checkpoints: Sequence[Checkpoint], keep: Keep) -> list[Checkpoint]:
    """Return the complete checkpoints that are not to be kept.

    checkpoints  the newest last
    """
    if keep.last is None:
        return []
    paths = {path.resolve() for path in keep.paths}
    own = [one for one in checkpoints if one.manifest is not None and keep.run_id in (None, one.manifest.run_id)]
    older = own[: -max(1, keep.last)]
    return [one for one in older if one.path.resolve() not in paths and (keep.every is None or one.step % keep.every)]


def doomed_in(folder: Path, keep: Keep) -> list[Path]:
    """Return what `prune` would remove."""
    left = [path for path in leftovers_in(folder) if path.suffix == REMOVED]
    return [one.path for one in surplus(checkpoints_in(folder), keep)] + left


def prune(folder: Path, keep: Keep) -> list[Path]:
    """Remove surplus checkpoints, and what earlier removals left; return what was removed.

    What cannot be removed is a warning: training goes on, and the next call tries again.
    """
    try:
        return [path for path in doomed_in(folder, keep) if remove(path)]
    except OSError as error:
        logger.warning("older checkpoints in %s are not removed: %s", folder, error)
        return []
