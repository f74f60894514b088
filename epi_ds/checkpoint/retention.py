"""Which checkpoints are kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from epi_ds.checkpoint.catalog import REMOVED, Checkpoint, checkpoints_in, leftovers_in, remove


def surplus(checkpoints: Sequence[Checkpoint], *, keep_last: int | None, keep_every: int | None) -> list[Checkpoint]:
    """Return the complete checkpoints that are not to be kept.

    checkpoints  the newest last
    keep_last    how many of the newest complete ones to keep, at least one; None keeps all
    keep_every   keep those of every so many steps for good
    """
    complete = [one for one in checkpoints if one.problem is None]
    if keep_last is None:
        return []
    older = complete[: -max(1, keep_last)]
    return [one for one in older if keep_every is None or one.step % keep_every]


def prune(
    folder: Path,
    *,
    keep_last: int | None,
    keep_every: int | None,
    run_id: str | None = None,
    kept: Collection[Path] = (),
) -> list[Path]:
    """Remove a run's surplus checkpoints from its folder, and what earlier removals left.

    run_id  leaves those of other runs alone
    kept    these stay in any case

    Returns what was removed. A removal that fails is a warning: training goes on, and the next call tries again.
    """
    doomed = doomed_in(folder, keep_last=keep_last, keep_every=keep_every, run_id=run_id, kept=kept)
    return [path for path in doomed if remove(path)]


def doomed_in(
    folder: Path,
    *,
    keep_last: int | None,
    keep_every: int | None,
    run_id: str | None = None,
    kept: Collection[Path] = (),
) -> list[Path]:
    """Return what `prune` would remove."""
    own = [one for one in checkpoints_in(folder) if one.manifest is None or run_id in (None, one.manifest.run_id)]
    kept_paths = {path.resolve() for path in kept}
    surplus_ones = surplus(own, keep_last=keep_last, keep_every=keep_every)
    doomed = [one.path for one in surplus_ones if one.path.resolve() not in kept_paths]
    return doomed + [path for path in leftovers_in(folder) if path.suffix == REMOVED]
