"""Which checkpoints stay and which are removed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from epi_ds.checkpoint.catalog import REMOVED, Checkpoint, checkpoints_in, leftovers_in, remove

logger = logging.getLogger(__name__)


class Retention(NamedTuple):
    """Which of a folder's complete checkpoints stay when older ones are removed."""

    last: int | None
    """How many stay, those of `paths` and then the newest; with None all of them do."""
    every: int | None = None
    """Those of every so many steps stay for good."""
    run_id: str | None = None
    """Checkpoints of other runs are left alone; None sees no difference."""
    engine: int | None = None
    """Those of other engines are left alone; with None every engine's are counted for themselves."""
    paths: tuple[Path, ...] = ()
    """These stay in any case."""


def surplus(checkpoints: Sequence[Checkpoint], retention: Retention) -> list[Checkpoint]:
    """Return the complete checkpoints that are not to be kept, of every engine. See [Note: engines] in seats.py.

    checkpoints  the newest last
    """
    if retention.last is None:
        return []
    paths = {path.resolve() for path in retention.paths}
    by_engine: dict[int, list[Checkpoint]] = {}
    for one in checkpoints:
        manifest = one.manifest
        if manifest is None or retention.run_id not in (None, manifest.run_id):
            continue
        if retention.engine in (None, manifest.engine):
            by_engine.setdefault(manifest.engine, []).append(one)
    found = []
    for tags in by_engine.values():
        others = [one for one in tags if one.path.resolve() not in paths]
        num_named = len(tags) - len(others)
        num_newest = max(0, retention.last - num_named)
        older = others[: max(0, len(others) - num_newest)]
        found += [one for one in older if retention.every is None or one.step % retention.every != 0]
    return found


def doomed_in(folder: Path, retention: Retention) -> list[Path]:
    """Return what `prune` would remove."""
    left = [path for path in leftovers_in(folder) if path.suffix == REMOVED]
    return [one.path for one in surplus(checkpoints_in(folder), retention)] + left


def prune(folder: Path, retention: Retention) -> list[Path]:
    """Remove surplus checkpoints, and what earlier removals left; return what was removed.

    What cannot be removed is a warning: training goes on, and the next call tries again.
    """
    try:
        return [path for path in doomed_in(folder, retention) if remove(path)]
    except OSError as error:
        logger.warning("older checkpoints in %s are not removed: %s", folder, error)
        return []
