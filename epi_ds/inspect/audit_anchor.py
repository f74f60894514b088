"""Prove, from checkpoints alone, that what an anchor pulls towards did not change in one bit.

It is taken once, for a run or for a stage, so that neighbouring checkpoints of one engine, and of one stage where it is
a stage's, must hold the same. What lies in a folder has no copy in a checkpoint: there the folder's files are compared
with the digests that the checkpoint has of them, where the folder still is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from epi_ds.anchor_config import STAGE
from epi_ds.checkpoint.digest import FileRecord, problems_of_files
from epi_ds.checkpoint.manifest import ANCHOR_STATE, SavedAnchor
from epi_ds.checkpoint.shards import TagShards
from epi_ds.checkpoint.tag import Tag


class Moved(NamedTuple):
    """Entries of one parameter that differ between two checkpoints, and were not to."""

    parameter: str
    num_entries: int
    first: Path
    second: Path


class AnchorFolder(NamedTuple):
    """A folder that weights are pulled towards, and whether it is that still."""

    path: Path
    is_there: bool
    """Whether it could be looked at: nothing is known of one that is gone, or is on another machine."""
    problems: tuple[str, ...]


class AnchorAudit(NamedTuple):
    """What was compared of anchors."""

    pairs: tuple[tuple[Path, Path], ...] = ()
    """Pairs of checkpoints that hold what they pull towards."""
    entries: int = 0
    """That were compared, over all pairs."""
    moved: tuple[Moved, ...] = ()
    folders: tuple[AnchorFolder, ...] = ()

    @property
    def num_moved(self) -> int:
        """Entries that differ; 0 in a sound run."""
        return sum(item.num_entries for item in self.moved)

    @property
    def has_findings(self) -> bool:
        """Whether anything that is pulled towards is not what it was."""
        return bool(self.moved) or any(folder.problems for folder in self.folders)


def have_one_anchor(first: SavedAnchor | None, second: SavedAnchor | None) -> bool:
    """Whether two checkpoints of one engine, one after the other, hold what must be the same."""
    if first is None or second is None or not (first.is_taken and second.is_taken) or first.to != second.to:
        return False
    # An earlier release did not say which stage it was.
    return first.to != STAGE or (first.stage is not None and first.stage == second.stage)


def compare_anchors(first: Tag, second: Tag) -> tuple[int, list[Moved]]:
    """Return how many entries two checkpoints hold of an anchor, and those that differ."""
    shards, others = TagShards(*first), TagShards(*second)
    entries, moved = 0, []
    for rank in range(first.manifest.world_size):
        for segment in shards.shard(rank).header.segments:
            if not segment.real_numel:
                continue
            # Kept in two bytes only where these are exact; other ranks may have kept four.
            before, after = (
                one.stored(ANCHOR_STATE, segment).codes.float().view(torch.int32) for one in (shards, others)
            )
            entries += segment.real_numel
            if count := int((before != after).sum()):
                moved.append(Moved(segment.name, count, first.path, second.path))
    return entries, moved


def check_folders(anchors: Mapping[Path, SavedAnchor | None]) -> tuple[AnchorFolder, ...]:
    """Compare the folders that checkpoints name with the digests they have of them; each is read once.

    anchors  by the checkpoint they were saved in
    """
    expected: dict[tuple[str, tuple[tuple[str, FileRecord], ...]], None] = {}
    for anchor in anchors.values():
        if anchor is not None and anchor.folder_files is not None:
            expected[anchor.to, tuple(sorted(anchor.folder_files.items()))] = None
    found = []
    for to, files in expected:
        path = Path(to)
        problems = problems_of_files(path, dict(files)) if path.is_dir() else []
        found.append(AnchorFolder(path, path.is_dir(), tuple(problems)))
    return tuple(found)
