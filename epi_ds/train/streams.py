"""Rows without end: one permutation after another, and several sources mixed by their shares."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch


class SourceShare(NamedTuple):
    """A source of a table, and how much of the table's rows are its own."""

    num_rows: int
    share: float
    """In proportion to those of the other sources."""


class TableRows(NamedTuple):
    """Rows that are drawn from together."""

    num_rows: int
    """Of all its sources, which lie end to end."""
    shares: tuple[SourceShare, ...] = ()
    """Of every source; empty where all rows are one permutation."""


def drawn_from(table: TableRows, *, seed: int, position: int) -> Iterator[int]:
    """Yield a table's rows without end; ``position`` among the tables of a run tells its permutations from theirs."""
    if not table.shares:
        return permuted(table.num_rows, seed, position)
    firsts = itertools.accumulate((source.num_rows for source in table.shares), initial=0)
    return mixed(
        [
            shifted(permuted(source.num_rows, hash_seed(seed, position, index + 1), position), first)
            for index, (source, first) in enumerate(zip(table.shares, firsts, strict=False))
        ],
        [source.share for source in table.shares],
    )


def mixed(streams: Sequence[Iterator[int]], shares: Sequence[float]) -> Iterator[int]:
    """Yield rows of endless streams in proportion to their shares: after any number less than one row off each."""
    total = sum(shares)
    weights = [share / total for share in shares]
    drawn = [0] * len(weights)
    for number in itertools.count(1):
        # Of those whose next row is due, whose it is due soonest (Tijdeman's chairman assignment): after any number of
        # rows every source is less than one off its share. Whoever is furthest behind it would be more, at times.
        due = [one for one, weight in enumerate(weights) if drawn[one] < weight * number]
        index = min(due, key=lambda one: (drawn[one] + 1) / weights[one])
        drawn[index] += 1
        yield next(streams[index])


def permuted(num_rows: int, seed: int, position: int) -> Iterator[int]:
    """Yield rows by one permutation after another. Raises ValueError where there are none."""
    if num_rows < 1:
        raise ValueError("there are no rows to draw from")
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(hash_seed(seed, position, epoch))
        yield from torch.randperm(num_rows, generator=generator).tolist()


def shifted(rows: Iterator[int], offset: int) -> Iterator[int]:
    """Yield rows as they are called where ``offset`` others lie before them."""
    return (offset + row for row in rows)


def hash_seed(seed: int, stage: int, epoch: int) -> int:
    """Mix three small integers into one seed; neighbouring inputs give unrelated permutations."""
    state = seed & 0xFFFFFFFF
    for value in (stage, epoch):
        state = (state * 6364136223846793005 + 1442695040888963407 + value) & 0x7FFFFFFFFFFFFFFF
    return state
