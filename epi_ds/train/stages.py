"""A run as one ordered list of rows: which row when, which stage a step belongs to, and its learning rate.

Stages follow one another; within a stage every epoch is one permutation of its rows, drawn from the seed. Where its
sources have shares, each is permuted by itself and begins anew when it is exhausted. The list is read from front to
back, so the position of a run is the number of rows it has consumed, at every world size with the same global batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from epi_ds.errors import UserError


class StageSpan(NamedTuple):
    """The steps of one stage, ``[first_step, stop_step)`` counted from 0 over the whole run."""

    name: str
    first_step: int
    stop_step: int

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.stop_step - self.first_step


class SourceShare(NamedTuple):
    """A source of a stage, and how much of the stage's rows are its own."""

    num_rows: int
    share: float
    """In proportion to those of the other sources."""


class StageRows(NamedTuple):
    """What `plan_stages` needs to know of a stage."""

    name: str
    num_rows: int
    """Of all its sources, which lie end to end."""
    epochs: int
    shares: tuple[SourceShare, ...] = ()
    """Of every source; empty where all rows are one permutation."""
    steps: int | None = None
    """How many steps it has, whatever that takes; None for as many as its epochs fill."""


def plan_stages(stages: Sequence[StageRows], *, global_batch: int) -> list[StageSpan]:
    """Lay the stages' steps end to end. A stage's last, incomplete global batch is left out.

    Raises ValueError for a stage that does not fill one global batch.
    """
    spans: list[StageSpan] = []
    first_step = 0
    for stage in stages:
        num_steps = stage.num_rows * stage.epochs // global_batch if stage.steps is None else stage.steps
        if num_steps == 0:
            raise UserError(
                f"stage {stage.name} has {stage.num_rows} rows x {stage.epochs} epochs, fewer than one global batch of "
                f"{global_batch} (micro-batch x accumulation x ranks); give it more rows or use a smaller batch"
            )
        spans.append(StageSpan(stage.name, first_step, first_step + num_steps))
        first_step += num_steps
    return spans


def epoch_ends(stages: Sequence[StageRows], spans: Sequence[StageSpan], *, global_batch: int) -> frozenset[int]:
    """Return the numbers of steps after which an epoch of a stage has ended: the step with its last row is done.

    A stage ends its last epoch, whether the batches fill it or not.
    """
    ends: set[int] = set()
    for stage, span in zip(stages, spans, strict=True):
        within = (-(-stage.num_rows * epoch // global_batch) for epoch in itertools.count(1))
        ends.update(span.first_step + step for step in itertools.takewhile(span.num_steps.__gt__, within))
        ends.add(span.stop_step)
    return frozenset(ends)


def row_order(stages: Sequence[StageRows], spans: Sequence[StageSpan], *, global_batch: int, seed: int) -> list[int]:
    """Return the rows of the run in order, as indices into the stages' rows laid end to end."""
    order: list[int] = []
    offset = 0
    for position, (stage, span) in enumerate(zip(stages, spans, strict=True)):
        rows = _rows_of(stage, seed=seed, position=position)
        order += [offset + row for row in itertools.islice(rows, span.num_steps * global_batch)]
        offset += stage.num_rows
    return order


def _rows_of(stage: StageRows, *, seed: int, position: int) -> Iterator[int]:
    """Yield a stage's rows without end."""
    if not stage.shares:
        yield from _permuted(stage.num_rows, seed, position)
    total = sum(source.share for source in stage.shares)
    weights = [source.share / total for source in stage.shares]
    firsts = list(itertools.accumulate((source.num_rows for source in stage.shares), initial=0))
    streams = [
        _permuted(source.num_rows, hash_seed(seed, position, index + 1), position)
        for index, source in enumerate(stage.shares)
    ]
    drawn = [0] * len(weights)
    for number in itertools.count(1):
        # Of those whose next row is due, whose it is due soonest (Tijdeman's chairman assignment): after any number of
        # rows every source is less than one off its share. Whoever is furthest behind it would be more, at times.
        due = [one for one, weight in enumerate(weights) if drawn[one] < weight * number]
        index = min(due, key=lambda one: (drawn[one] + 1) / weights[one])
        drawn[index] += 1
        yield firsts[index] + next(streams[index])


def _permuted(num_rows: int, seed: int, position: int) -> Iterator[int]:
    """Yield rows by one permutation after another."""
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(hash_seed(seed, position, epoch))
        yield from torch.randperm(num_rows, generator=generator).tolist()


def hash_seed(seed: int, stage: int, epoch: int) -> int:
    """Mix three small integers into one seed; neighbouring inputs give unrelated permutations."""
    mixed = seed & 0xFFFFFFFF
    for value in (stage, epoch):
        mixed = (mixed * 6364136223846793005 + 1442695040888963407 + value) & 0x7FFFFFFFFFFFFFFF
    return mixed


def stage_at(spans: Sequence[StageSpan], step: int) -> StageSpan:
    """Return the stage that the step with this index (from 0) belongs to; the last one for any step beyond."""
    for span in spans:
        if step < span.stop_step:
            return span
    return spans[-1]
