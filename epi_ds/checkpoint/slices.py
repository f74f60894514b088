"""Where the entries of a parameter lie among the ranks that saved it.

ZeRO-3 deals every parameter out in equal slices of ``ceil(numel / world_size)`` entries, the last of which may be
short or empty. So what another number of ranks needs of a parameter is a few neighbouring pieces of what was saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Piece(NamedTuple):
    """Neighbouring entries of one parameter in the slice of one saved rank."""

    rank: int
    start: int
    """Where it begins in that rank's slice."""
    stop: int
    offset: int
    """Where it begins in what was asked for."""

    @property
    def numel(self) -> int:
        """The number of entries."""
        return self.stop - self.start


def slice_numel(numel: int, world_size: int) -> int:
    """Return the entries of every rank's slice, padding included."""
    return -(-numel // world_size)


def pieces_of(numel: int, *, world_size: int, start: int, stop: int) -> Iterator[Piece]:
    """Yield the pieces that entries ``[start, stop)`` of a parameter are made of, in order; none of them is empty.

    numel       of the whole parameter
    world_size  of the ranks that saved
    """
    size = slice_numel(numel, world_size)
    position = start
    while position < stop:
        rank = position // size
        end = min(stop, (rank + 1) * size)
        yield Piece(rank, position - rank * size, end - rank * size, position - start)
        position = end
