"""The isolation state of a tag as any number of ranks reads it: each opens the shards that hold its entries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from epi_ds.checkpoint.manifest import FOLDER, Manifest
from epi_ds.checkpoint.shard import Shard, shard_name
from epi_ds.checkpoint.slices import Piece, pieces_of
from epi_ds.isolation.layout import Segment
from epi_ds.kernels import Stored, decode


class TagShards:
    """Reads the state of segments of any layout. Shards are opened when they are first needed."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """``folder`` is the tag's, whose files are verified."""
        self._folder = folder / FOLDER
        self._world_size = manifest.world_size
        self._opened: dict[int, Shard] = {}

    def shard(self, rank: int) -> Shard:
        """Return the shard of a rank that saved. Raises RuntimeError where it cannot be read."""
        if rank not in self._opened:
            self._opened[rank] = Shard(self._folder / shard_name(rank))
        return self._opened[rank]

    def mask(self, segment: Segment) -> Tensor:
        """Return the mask of a segment. [real_numel] bool"""
        mask = torch.zeros(segment.real_numel, dtype=torch.bool)
        for rank, start, stop, offset in self._pieces(segment):
            mask[offset : offset + stop - start] = self.shard(rank).mask(segment.name, start, stop)
        return mask

    def stored(self, state: str, segment: Segment) -> Stored:
        """Return what is stored of a segment, in the saved format where that does not depend on the partitioning.

        A slice that is exactly one of the saved ones is returned as it was saved; uint8 whose blocks were cut
        elsewhere comes back as fp32.
        """
        pieces = list(self._pieces(segment))
        if not pieces:
            return self.shard(0).stored(state, segment.name).part(0, 0)
        parts = [self.shard(rank).stored(state, segment.name) for rank, *_ in pieces]
        if len(pieces) == 1 and parts[0].codes.numel() == segment.real_numel:
            return parts[0]
        cut = [part.part(start, stop) for part, (_, start, stop, _) in zip(parts, pieces, strict=True)]
        if parts[0].scales.numel():
            return Stored(torch.cat([decode(part) for part in cut]), torch.zeros(0), segment.global_start)
        return Stored(_joined([part.codes for part in cut]), torch.zeros(0), segment.global_start)

    def _pieces(self, segment: Segment) -> list[Piece]:
        first, last = segment.global_start, segment.global_start + segment.real_numel
        return list(pieces_of(segment.numel, world_size=self._world_size, start=first, stop=last))


def _joined(codes: Sequence[Tensor]) -> Tensor:
    # Not every operation knows uint16.
    dtype = codes[0].dtype
    return torch.cat([part.view(torch.uint8) for part in codes]).view(dtype)
