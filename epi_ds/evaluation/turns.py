"""Batches are dealt to the ranks in rounds, one to each, so that what is collective in a forward finds all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch.distributed as dist


class Turn(NamedTuple):
    """A batch that this rank scores."""

    batch: int
    """Which of all batches."""
    counts: bool
    """Whether its scores are taken."""
    first: int
    """The first batch of the round: those before it are scored, by all ranks."""


def turns_of(num_batches: int, *, gathered: bool) -> Iterator[Turn]:
    """Yield this rank's turns.

    gathered  whether every rank holds all weights. Where they are partitioned every forward is collective, so ranks
              with fewer batches repeat one that does not count
    """
    # A process without a group is the only one.
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for first in range(0, num_batches, world_size):
        counts = first + rank < num_batches
        if counts or not gathered:
            yield Turn(first + rank if counts else num_batches - 1, counts, first)
