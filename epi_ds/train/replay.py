"""Rows of what must not be forgotten, among those of a stage: how many of every global batch, and which."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from typing import NamedTuple

from epi_ds.train.streams import TableRows, drawn_from, hash_seed, mixed, shifted

NOTHING = Fraction(0)
"""The share where nothing is replayed."""
# Tells the permutations of rows that are replayed from those of the stages.
_SALT = 0x5EED


class Replay(NamedTuple):
    """What is drawn besides the rows of a stage."""

    share: Fraction
    """Of every global batch; at least 0 and below 1."""
    kept: TableRows
    """What is drawn from in every stage."""
    includes_stages: bool = False
    """Whether the stages that have finished are drawn from, too."""


def exact_share(share: float) -> Fraction:
    """Return a share as it was written: 0.3 is three tenths, and not the binary fraction next to it."""
    return Fraction(repr(share))


def replayed_rows(share: Fraction, step: int, *, global_batch: int) -> int:
    """Return how many rows of the global batch of a step, counted from 0 over the run, are replayed."""
    return replayed_before(share, step + 1, global_batch=global_batch) - replayed_before(
        share, step, global_batch=global_batch
    )


def replayed_before(share: Fraction, step: int, *, global_batch: int) -> int:
    """Return how many rows are replayed before a step: rounded down; small batches get their share over time."""
    return step * global_batch * share.numerator // share.denominator


def new_rows(num_steps: int, *, share: Fraction, first_step: int, global_batch: int) -> int:
    """Return how many rows of so many steps are the stage's own, the first of which is ``first_step``."""
    replayed = replayed_before(share, first_step + num_steps, global_batch=global_batch) - replayed_before(
        share, first_step, global_batch=global_batch
    )
    return num_steps * global_batch - replayed


def steps_of(num_rows: int, *, share: Fraction, first_step: int, global_batch: int) -> int:
    """Return how many steps train so many new rows once each, but for the last ones where they fill no global batch.

    No step is added for replayed rows alone.
    """
    new_after = partial(new_rows, share=share, first_step=first_step, global_batch=global_batch)
    # So many steps would have more: what is replayed of them is less than one row off its share.
    numbers = range(int((num_rows + 2) / (global_batch * (1 - share))) + 2)
    most = numbers[bisect_right(numbers, num_rows, key=new_after) - 1]
    return bisect_left(numbers, new_after(most), key=new_after)


def replayed_in_stages(replay: Replay, stages: Sequence[TableRows], *, seed: int) -> Iterator[Iterator[int]]:
    """Yield, for every stage, the rows that are replayed in it, without end.

    Rows are indices: behind all stages' rows, end to end, come those that are kept, and behind these the stages' once
    more, so that an index says whether a row is new or replayed. What is kept and each finished stage have equal parts,
    whatever their sizes; each goes on in a later stage where it stopped in the one before.
    """
    salted = hash_seed(seed, _SALT, 0)
    first = sum(stage.num_rows for stage in stages)
    tables = [shifted(drawn_from(replay.kept, seed=salted, position=len(stages)), first)]
    first += replay.kept.num_rows
    for position, stage in enumerate(stages):
        yield mixed(list(tables), [1.0] * len(tables))
        if replay.includes_stages:
            tables.append(shifted(drawn_from(stage, seed=salted, position=position), first))
        first += stage.num_rows
