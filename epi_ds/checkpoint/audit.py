"""Prove, from checkpoints alone, that isolated master weights did not move in one bit.

Two checkpoints saved in the same refresh window were written under the same mask, so every entry that it isolates must
have the same fp32 master weight in both. A pair without an isolated entry, or in which no other entry moved, proves
nothing. Reads DeepSpeed's own optimizer shards: trust them as you trust code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epi_ds.checkpoint.manifest import FOLDER, Manifest, check_record, read_manifest
from epi_ds.checkpoint.shard import Shard, shard_name
from epi_ds.errors import UserError

_OPTIMIZER_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")


class Moved(NamedTuple):
    """Isolated entries of one parameter that differ between two checkpoints."""

    parameter: str
    num_entries: int
    first: Path
    second: Path


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

    @property
    def isolated_moved(self) -> int:
        """Isolated entries that differ; 0 in a sound run."""
        return sum(item.num_entries for item in self.moved)


@dataclass(frozen=True)
class Tag:
    """One checkpoint tag with isolation state."""

    path: Path
    manifest: Manifest

    @property
    def window(self) -> int:
        """Number of the refresh whose mask was in force; 0 before the first, where a mask may have been loaded."""
        return int(self.manifest.counters["refreshes"])

    @property
    def step(self) -> int:
        """Applied steps before the save."""
        return int(self.manifest.counters["applied_steps"])


def find_tags(paths: Sequence[Path]) -> list[Tag]:
    """Find the checkpoint tags with isolation state at or below ``paths``, by step.

    Raises ValueError for a path below which there is none.
    """
    tags: dict[Path, Tag] = {}
    for path in paths:
        manifests = sorted(path.rglob(f"{FOLDER}/manifest.json"))
        if not manifests:
            raise UserError(f"{path} holds no checkpoint with isolation state (no {FOLDER}/manifest.json below it)")
        for file in manifests:
            manifest = read_manifest(file.parent)
            if manifest is not None:
                tags[file.parent.parent] = Tag(file.parent.parent, manifest)
    return sorted(tags.values(), key=lambda tag: (tag.step, tag.path))


def audit(paths: Sequence[Path]) -> AuditReport:
    """Compare neighbouring checkpoints of every refresh window below ``paths``.

    Raises UserError when no window holds two checkpoints that prove something, and RuntimeError for damaged shards.
    """
    tags = find_tags(paths)
    pairs = [
        (first, second)
        for first, second in pairwise(tags)
        if first.window == second.window and first.step < second.step
    ]
    found = ", ".join(f"{tag.path.name} (step {tag.step}, window {tag.window})" for tag in tags)
    if not pairs:
        raise UserError(
            f"no two checkpoints were saved within one refresh window; found: {found}. Save more often than "
            "refresh_interval"
        )
    compared = [_audit_pair(first, second) for first, second in pairs]
    proving = [pair for pair in compared if pair.isolated and pair.plastic_moved]
    moved = tuple(item for pair in compared for item in pair.moved)
    if not proving and not moved:
        raise UserError(
            "no two checkpoints of one refresh window have isolated entries and training between them; found: "
            f"{found}. Save after the first mask is in force, and more often than refresh_interval"
        )
    return AuditReport(
        pairs=tuple(pair.paths for pair in proving),
        idle_pairs=tuple(pair.paths for pair in compared if pair not in proving),
        isolated=sum(pair.isolated for pair in proving),
        plastic=sum(pair.plastic for pair in proving),
        plastic_moved=sum(pair.plastic_moved for pair in proving),
        moved=moved,
    )


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


def _open(tag: Tag, rank: int) -> Shard:
    path = tag.path / FOLDER / shard_name(rank)
    check_record(path, tag.manifest)
    return Shard.open(path)


def _compare(first: Tag, second: Tag) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield (parameter, mask, weights before, weights after) for every rank's slices."""
    if first.manifest.world_size != second.manifest.world_size:
        raise UserError(
            f"{first.path} was saved by {first.manifest.world_size} ranks and {second.path} by "
            f"{second.manifest.world_size}; audit each part of the run alone"
        )
    for rank in range(first.manifest.world_size):
        before, after = _open(first, rank), _open(second, rank)
        if before.segments != after.segments:
            raise UserError(f"{before.path} and {after.path} are slices of different models or partitionings")
        weights = _master_weights(first, rank), _master_weights(second, rank)
        for (segment, mask), (_, mask_after) in zip(before.masks(), after.masks(), strict=True):
            if not torch.equal(mask, mask_after):
                raise UserError(
                    f"{segment.name}: {first.path} and {second.path} are of one refresh window, but their masks differ"
                )
            if segment.real_numel:
                old, new = (flat[segment.sub_group][segment.start : segment.stop] for flat in weights)
                yield segment.name, mask, old, new


def _master_weights(tag: Tag, rank: int) -> list[Tensor]:
    """Read the flat fp32 partitions of one rank: from DeepSpeed's optimizer shard, or the files of NVMe offload."""
    for path in tag.path.iterdir():
        match = _OPTIMIZER_SHARD.search(path.name)
        if match and int(match.group(1)) == rank:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
            groups: list[Tensor] = state["optimizer_state_dict"]["fp32_flat_groups"]
            weights = [group.detach().float() for group in groups]
            for sub_group, name in tag.manifest.extra.get("swapped", {}).items():
                file = tag.path / "offloaded_tensors" / f"rank{rank:0>2d}" / name
                if not file.is_file():
                    raise UserError(
                        f"{tag.path} lacks {file.name} of rank {rank}, which NVMe offload wrote; copy the whole tag"
                    )
                # What the shard has of them is whatever was in memory.
                weights[int(sub_group)] = torch.from_file(str(file), size=file.stat().st_size // 4)
            return weights
    raise UserError(
        f"{tag.path} has no optimizer shard of rank {rank} (zero_pp_rank_{rank}_mp_rank_00_optim_states.pt)"
    )
