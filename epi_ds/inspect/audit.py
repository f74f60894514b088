"""Prove, from checkpoints alone, that isolated master weights did not move in one bit.

Two checkpoints saved in the same refresh window were written under the same mask, so every entry that it isolates
must have the same fp32 master weight in both, whatever numbers of ranks saved them. A pair without an isolated entry,
or in which no other entry moved, proves nothing. What an anchor pulls towards is audited beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.checkpoint.catalog import Checkpoint
from epi_ds.checkpoint.deepspeed_files import WEIGHTS, SavedPartitions
from epi_ds.checkpoint.manifest import SavedAnchor
from epi_ds.checkpoint.shards import TagShards
from epi_ds.checkpoint.tag import Consent, Tag, open_tag, tags_below
from epi_ds.errors import UserError
from epi_ds.inspect.audit_anchor import (
    AnchorAudit,
    AnchorFolder,
    Moved,
    check_folders,
    compare_anchors,
    have_one_anchor,
)


class AuditReport(NamedTuple):
    """What an audit compared. Counts are summed over the pairs that prove something."""

    pairs: tuple[tuple[Path, Path], ...]
    """Pairs with isolated entries, between which plastic entries moved."""
    idle_pairs: tuple[tuple[Path, Path], ...]
    """Pairs that prove nothing: nothing is isolated in them, or nothing was trained between them."""
    isolated: int
    plastic: int
    plastic_moved: int
    """Plastic entries that differ."""
    moved: tuple[Moved, ...]
    """Isolated entries that differ, in pairs of both kinds."""
    anchor: AnchorAudit

    @property
    def isolated_moved(self) -> int:
        """Isolated entries that differ; 0 in a sound run."""
        return sum(item.num_entries for item in self.moved)


def audit(paths: Sequence[Path], *, trust: bool = False) -> AuditReport:
    """Compare neighbouring checkpoints of every refresh window below ``paths``, and of what holds an anchor all.

    trust  read checkpoints that are not of the run whose folder they lie in: see [Note: trust] in run.py

    Raises UserError when no two checkpoints prove something or one of them is not trusted, and
    CheckpointError for damaged files. Checkpoints without a neighbour in their window or of their anchor are not read.
    """
    candidates = _candidates(paths)
    pairs = [
        (first, second)
        for first, second in pairwise(candidates)
        if (first.engine, first.window) == (second.engine, second.window) and first.step < second.step
    ]
    found = ", ".join(f"{one.checkpoint.path.name} (step {one.step}, window {one.window})" for one in candidates)
    anchored = [
        (first, second)
        for first, second in pairwise(candidates)
        if first.engine == second.engine and first.step < second.step and have_one_anchor(first.anchor, second.anchor)
    ]
    folders = check_folders({one.checkpoint.path: one.anchor for one in candidates})
    looked_at_anchor = bool(anchored) or any(folder.is_there for folder in folders)
    if not pairs and not looked_at_anchor:
        raise UserError(
            f"no two checkpoints were saved within one refresh window; found: {found}. Save more often than "
            "refresh_interval"
        )
    # Each is read once, though it may have a neighbour on either side.
    consent = Consent(trust, "pass --trust")
    needed = {one.checkpoint.path: one.checkpoint for pair in [*pairs, *anchored] for one in pair}
    tags = {path: open_tag(one, consent=consent) for path, one in needed.items()}
    compared = [_audit_pair(*(tags[one.checkpoint.path] for one in pair)) for pair in pairs]
    proving = [pair for pair in compared if pair.isolated and pair.plastic_moved]
    moved = tuple(item for pair in compared for item in pair.moved)
    if not proving and not moved and not looked_at_anchor:
        raise UserError(
            "no two checkpoints of one refresh window have isolated entries and training between them; found: "
            f"{found}.{_told_of_gone(folders)} Save after the first mask is in force, and more often than "
            "refresh_interval"
        )
    found_anchors = [compare_anchors(*(tags[one.checkpoint.path] for one in pair)) for pair in anchored]
    return AuditReport(
        pairs=tuple(pair.paths for pair in proving),
        idle_pairs=tuple(pair.paths for pair in compared if pair not in proving),
        isolated=sum(pair.isolated for pair in proving),
        plastic=sum(pair.plastic for pair in proving),
        plastic_moved=sum(pair.plastic_moved for pair in proving),
        moved=moved,
        anchor=AnchorAudit(
            pairs=tuple((first.checkpoint.path, second.checkpoint.path) for first, second in anchored),
            entries=sum(entries for entries, _ in found_anchors),
            moved=tuple(item for _, items in found_anchors for item in items),
            folders=folders,
        ),
    )


def _told_of_gone(folders: Sequence[AnchorFolder]) -> str:
    """Say which folders that weights are pulled towards could not be looked at either."""
    gone = [str(folder.path) for folder in folders if not folder.is_there]
    return f" Not checked: weights are pulled towards {', '.join(gone)}, which is not there." if gone else ""


class _Candidate(NamedTuple):
    """A tag with isolation state that is not yet opened."""

    checkpoint: Checkpoint
    step: int
    """Applied steps before the save."""
    engine: int
    """Which of the engines that save in its folder saved it. See [Note: engines] in seats.py."""
    window: int
    """Number of the refresh whose mask was in force; 0 before the first, where a mask may have been loaded."""
    anchor: SavedAnchor | None


def _candidates(paths: Sequence[Path]) -> list[_Candidate]:
    """Return the tags at or below ``paths``, by engine and step."""
    found: dict[Path, _Candidate] = {}
    for one in (one for path in paths for one in tags_below(path)):
        if one.manifest is not None:
            counters = one.manifest.counters
            anchor = one.manifest.isolation.extra.anchor
            found[one.path] = _Candidate(
                one, counters.applied_steps, one.manifest.engine, window=counters.refreshes, anchor=anchor
            )
    return sorted(found.values(), key=lambda one: (one.engine, one.step, one.checkpoint.path))


class _Pair(NamedTuple):
    """What two checkpoints of one window say."""

    paths: tuple[Path, Path]
    isolated: int
    plastic: int
    plastic_moved: int
    moved: tuple[Moved, ...]


def _audit_pair(first: Tag, second: Tag) -> _Pair:
    isolated = plastic = plastic_moved = 0
    moved: list[Moved] = []
    for name, mask, before, after in _compare(first, second):
        # Bit patterns: -0.0 equals 0.0 and a NaN differs from itself as numbers.
        differs = before.view(torch.int32) != after.view(torch.int32)
        isolated += int(mask.sum())
        plastic += int((~mask).sum())
        plastic_moved += int((differs & ~mask).sum())
        if count := int((differs & mask).sum()):
            moved.append(Moved(name, count, first.path, second.path))
    return _Pair((first.path, second.path), isolated, plastic, plastic_moved, tuple(moved))


def _compare(first: Tag, second: Tag) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield (parameter, mask, weights before, weights after) for the slices of the ranks that saved the first."""
    masks = [TagShards(*tag) for tag in (first, second)]
    weights = [SavedPartitions(*tag) for tag in (first, second)]
    if weights[0].places.keys() != weights[1].places.keys():
        raise UserError(f"{first.path} and {second.path} are of different models")
    for rank in range(first.manifest.world_size):
        for segment in masks[0].shard(rank).header.segments:
            mask, mask_after = (shards.mask(segment) for shards in masks)
            if not torch.equal(mask, mask_after):
                raise UserError(
                    f"{segment.name}: {first.path} and {second.path} are of one refresh window, but their masks differ"
                )
            if segment.real_numel:
                old, new = torch.empty(2, segment.real_numel)
                for target, partitions in zip((old, new), weights, strict=True):
                    partitions.read_into(target, segment.name, WEIGHTS, start=segment.global_start)
                yield segment.name, mask, old, new
