"""Where the entries of a flat partition belong: runs of it, each of one parameter, in a table that kernels read.

[Note: tiles] A run is walked in tiles: the entries with the same global index / 4096. So tiles are cut at borders of
blocks, and which entries make a tile does not depend on who walks it. Tiles of all runs are numbered through, which is
how threads, or the programs of a GPU, share out a whole partition in one go: the run of a tile is the last one whose
first tile is not behind it.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.kernels.reference.codecs import Stored, num_blocks

TILE_NUMEL = 4096
_TILE_BITS = 12


class Run(NamedTuple):
    """Neighbouring entries of a flat gradient, and where their importance is stored."""

    start: int
    """Offset of the first entry in the gradient."""
    numel: int
    first_code: int
    """Offset in the codes; -1 for entries without importance: padding, or of a parameter that is not covered."""
    first_block: int
    """Offset in the scales."""
    first_index: int
    """Index of the first entry in the flattened parameter."""
    key: int
    """The 32 bits that the parameter's rounding is drawn from; see [Note: dither] in dither.py."""

    def stored_in(self, codes: Tensor, scales: Tensor) -> Stored:
        """Return what is stored of the run's importance; it must have some."""
        blocks = num_blocks(self.first_index, self.numel) if codes.dtype is torch.uint8 else 0
        return Stored(
            codes[self.first_code : self.first_code + self.numel],
            scales[self.first_block : self.first_block + blocks],
            self.first_index,
        )

    @property
    def num_tiles(self) -> int:
        """See [Note: tiles]."""
        if not self.numel:
            return 0
        return ((self.first_index + self.numel - 1) >> _TILE_BITS) - (self.first_index >> _TILE_BITS) + 1


class Column(IntEnum):
    """Columns of a table: the first tile of a run, and then the fields of `Run` in their order."""

    FIRST_TILE = 0
    START = 1
    NUMEL = 2
    FIRST_CODE = 3
    FIRST_BLOCK = 4
    FIRST_INDEX = 5
    KEY = 6


NUM_COLUMNS = len(Column)


def table_of(runs: Iterable[Run], *, device: torch.device) -> Tensor:
    """Return the table of some runs. [num_runs, NUM_COLUMNS] int64 on ``device``; empty runs are left out."""
    rows, num_tiles = [], 0
    for run in runs:
        if run.numel:
            rows.append([num_tiles, *run])
            num_tiles += run.num_tiles
    return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, NUM_COLUMNS)


def runs_of(table: Tensor) -> list[Run]:
    """Return the runs of a table. Synchronises with its device."""
    return [Run(*row[Column.START :]) for row in table.tolist()]
