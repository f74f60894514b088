"""A run as one ordered list of rows: which row when, which stage a step belongs to, and its learning rate.

Stages follow one another; within a stage every epoch is one permutation of its rows, drawn from the seed. Where its
sources have shares, each is permuted by itself and begins anew when it is exhausted. A share of every global batch may
be replayed: rows of what is kept, behind the stage's own. The list is read from front to back, so the position of a run
is the number of rows it has consumed, at every world size with the same global batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from epi_ds.errors import UserError
from epi_ds.train.replay import NOTHING, Replay, replayed_in_stages, replayed_rows, steps_of
from epi_ds.train.streams import SourceShare, TableRows, drawn_from


class StageSpan(NamedTuple):
    """The steps of one stage, ``[first_step, stop_step)`` counted from 0 over the whole run."""

    name: str
    first_step: int
    stop_step: int

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.stop_step - self.first_step


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

    @property
    def table(self) -> TableRows:
        """What its rows are drawn from."""
        return TableRows(self.num_rows, self.shares)


def plan_stages(
    stages: Sequence[StageRows], *, global_batch: int, replayed_share: Fraction = NOTHING
) -> list[StageSpan]:
    """Lay the stages' steps end to end. A stage's last, incomplete global batch is left out.

    replayed_share  of every global batch, so that a stage has more steps for the same rows

    Raises UserError for a stage that does not fill one global batch.
    """
    spans: list[StageSpan] = []
    first_step = 0
    for stage in stages:
        spans.append(span_of(stage, first_step=first_step, global_batch=global_batch, replayed_share=replayed_share))
        first_step = spans[-1].stop_step
    return spans


def span_of(stage: StageRows, *, first_step: int, global_batch: int, replayed_share: Fraction = NOTHING) -> StageSpan:
    """Return the steps of a stage that begins at ``first_step``.

    Raises UserError for one that does not fill one global batch.
    """
    num_steps = stage.steps
    if num_steps is None:
        num_steps = steps_of(
            stage.num_rows * stage.epochs, share=replayed_share, first_step=first_step, global_batch=global_batch
        )
    if num_steps == 0:
        replayed = replayed_rows(replayed_share, first_step, global_batch=global_batch)
        raise UserError(
            f"stage {stage.name} has {stage.num_rows} rows x {stage.epochs} epochs, fewer than one global batch of "
            f"{global_batch} (micro-batch x accumulation x ranks)"
            + (f", of which {replayed} are replayed" if replayed else "")
            + "; give it more rows or use a smaller batch"
        )
    return StageSpan(stage.name, first_step, first_step + num_steps)


def epoch_ends(
    stages: Sequence[StageRows], spans: Sequence[StageSpan], *, global_batch: int, replayed_share: Fraction = NOTHING
) -> frozenset[int]:
    """Return the numbers of steps after which an epoch of a stage has ended: the step with its last row is done.

    A stage ends its last epoch, whether the batches fill it or not. What is replayed belongs to no epoch.
    """
    ends: set[int] = set()
    for stage, span in zip(stages, spans, strict=True):
        seen = 0
        for step in range(span.first_step, span.stop_step):
            new = global_batch - replayed_rows(replayed_share, step, global_batch=global_batch)
            if (seen + new) // stage.num_rows > seen // stage.num_rows:
                ends.add(step + 1)
            seen += new
        ends.add(span.stop_step)
    return frozenset(ends)


def row_order(
    stages: Sequence[StageRows],
    spans: Sequence[StageSpan],
    *,
    global_batch: int,
    seed: int,
    replay: Replay | None = None,
) -> list[int]:
    """Return the rows of the run in order, as indices into the stages' rows laid end to end.

    Those that are replayed are the last of their global batch, and their indices are beyond the stages', see
    `replayed_in_stages`. What is new is in the same order with and without them.
    """
    order: list[int] = []
    offset = 0
    share = NOTHING if replay is None else replay.share
    tables = [stage.table for stage in stages]
    kept = [iter(())] * len(tables) if replay is None else list(replayed_in_stages(replay, tables, seed=seed))
    for position, (table, span, replayed) in enumerate(zip(tables, spans, kept, strict=True)):
        rows = drawn_from(table, seed=seed, position=position)
        for step in range(span.first_step, span.stop_step):
            count = replayed_rows(share, step, global_batch=global_batch)
            order += [offset + row for row in itertools.islice(rows, global_batch - count)]
            order += itertools.islice(replayed, count)
        offset += table.num_rows
    return order


def stage_at(spans: Sequence[StageSpan], step: int) -> StageSpan:
    """Return the stage that the step with this index (from 0) belongs to; the last one for any step beyond."""
    for span in spans:
        if step < span.stop_step:
            return span
    return spans[-1]
