"""Importance by task, and one budget shared among tasks by what they have in common (``memory: per_task``).

[Note: shares] Every task has entries that matter most to it. The mask protects, of every task, about equally many of
these, as many as fit into the budget together. What several tasks need is counted once, so the more alike tasks are,
the more of each is protected: two tasks of equal needs get the whole budget both, two that have nothing in common half
of it each, and three of which two are equal again half of it each.

It takes one search. The importance of every task is divided by the threshold of its own mask of an equal share of the
budget (`ThresholdSearch.scale`, after the normaliser where there is one), and selection compares the largest of these
scores. A threshold of 1 would isolate the union of those masks, which is smaller than the budget by what they share;
the search goes below 1 until the budget is full, exactly as for any other importance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.isolation.importance.codes import codes_of, decode
from epi_ds.isolation.importance.views import Importance
from epi_ds.isolation.layout import Segment
from epi_ds.isolation.placement import Placement
from epi_ds.isolation.search.sketch import Extremes
from epi_ds.isolation.search.threshold import Scale
from epi_ds.kernels import chunks


class TaskImportance(NamedTuple):
    """Importance of something that was, or is being, trained for: what stages of one name have in common."""

    name: str | None
    """The name of the finished stage; None for the running one."""
    importance: Importance


class TaskShare(NamedTuple):
    """What one task has of a mask, over all ranks."""

    name: str | None
    """See `TaskImportance`."""
    isolated: int
    """Isolated entries that the task's own score isolates."""
    jaccard: tuple[float | None, ...]
    """Overlap with what every task has, in their order (the paper's table 13); None where neither has any."""


class TaskScores:
    """Importance of several tasks as one: the largest of their scores. See [Note: shares]."""

    code_shift = 0
    """See `Importance.code_shift`: scores are of all codes."""

    def __init__(self, tasks: Sequence[TaskImportance], scale: Scale, placement: Placement) -> None:
        """``scale`` is of ``[len(tasks) * num_layers]``, task after task."""
        self.names = [task.name for task in tasks]
        self._tasks = tasks
        self._placement = placement
        self._minimum, self._factor = (column.view(len(tasks), -1) for column in scale)

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """See `Importance.read`."""
        scores = torch.zeros(stop - start, device=self._placement.home_of(segment))
        for index in range(len(self._tasks)):
            torch.maximum(scores, self._scores(index, segment, start, stop), out=scores)
        return scores

    def _scores(self, index: int, segment: Segment, start: int, stop: int) -> Tensor:
        values = self._tasks[index].importance.read(segment, start, stop).double()
        return _scored(values, self._minimum[index, segment.layer].item(), self._factor[index, segment.layer].item())

    def extremes(self, found: Extremes) -> Extremes:
        """Return the extremes of the scores from those of the tasks' importance, `Scale` for `Scale`.

        The smallest is a bound: no entry scores less than every task's least important one.
        """
        num_tasks, is_empty = len(self._tasks), found.max_codes.view(len(self._tasks), -1)[0] < 0
        largest, smallest = (
            codes_of(_scored(decode(codes.clamp(min=0)), self._minimum.flatten(), self._factor.flatten()))
            .long()
            .view(num_tasks, -1)
            for codes in (found.max_codes, found.min_codes)
        )
        maximum, leader = largest.max(dim=0)
        holders = found.holders.view(num_tasks, -1).gather(0, leader.unsqueeze(0))[0]
        columns = maximum, smallest.max(dim=0).values, holders
        return Extremes(*(column.masked_fill(is_empty, -1) for column in columns))

    def overlaps(self, threshold_codes: Tensor) -> Tensor:
        """Count the entries of this rank that the scores of both of two tasks isolate. [tasks, tasks] int64, CPU.

        threshold_codes  [num_layers] int64, CPU
        """
        limits = [int(code) for code in threshold_codes]
        counts = torch.zeros((len(self._tasks),) * 2, dtype=torch.int64)
        for segment in self._placement.layout.segments:
            for start, stop in chunks(0, segment.real_numel):
                scores = [self._scores(index, segment, start, stop) for index in range(len(self._tasks))]
                # 0 and 1, and sums below 2^24: exact in fp32.
                isolated = (codes_of(torch.stack(scores)) >= limits[segment.layer]).float()
                counts += (isolated @ isolated.T).long().cpu()
        return counts


def _scored(values: Tensor, minimum: Tensor | float, factor: Tensor | float) -> Tensor:
    """Return scores as fp32, finite. ``values`` are fp64, overwritten."""
    return values.sub_(minimum).mul_(factor).clamp_(max=torch.finfo(torch.float32).max).float()


def task_shares(names: Sequence[str | None], overlaps: Tensor) -> tuple[TaskShare, ...]:
    """Return what every task has, from `TaskScores.overlaps` summed over the ranks."""
    own = overlaps.diagonal()
    either = (own.unsqueeze(0) + own.unsqueeze(1) - overlaps).tolist()
    return tuple(
        TaskShare(
            name,
            isolated,
            tuple(b / e if e else None for b, e in zip(both, union, strict=True)),
        )
        for name, isolated, both, union in zip(names, own.tolist(), overlaps.tolist(), either, strict=True)
    )
