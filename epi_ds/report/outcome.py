"""What a run learnt against what it kept: every task before training and at the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from epi_ds.report.run import Run
from epi_ds.report.scores import TaskScore, mean


class Change(NamedTuple):
    """One task, the first time it was scored and the last."""

    name: str
    before: TaskScore
    after: TaskScore | None
    """None where it was scored once only."""

    @property
    def difference(self) -> float | None:
        """The last score minus the first one; None where either is not known."""
        if self.after is None or self.after.value is None or self.before.value is None:
            return None
        return self.after.value - self.before.value

    @property
    def is_better(self) -> bool | None:
        """Whether it scores better than before; None where it is the same, or not known."""
        if not self.difference:
            return None
        return (self.difference > 0) is self.before.higher_is_better

    def flips(self) -> tuple[int, int] | None:
        """Return how many test rows were right and are wrong, and were wrong and are right; None if not known."""
        solved = self.before.solved, None if self.after is None else self.after.solved
        if solved[0] is None or solved[1] is None or len(solved[0]) != len(solved[1]):
            return None
        pairs = list(zip(solved[0], solved[1], strict=True))
        return pairs.count(("1", "0")), pairs.count(("0", "1"))


class Means(NamedTuple):
    """Mean accuracies of some tasks, of those that were scored both times."""

    num_tasks: int
    before: float
    after: float


class Outcome(NamedTuple):
    """What a run came to."""

    learnt: tuple[Change, ...]
    """Tasks that a stage trains."""
    kept: tuple[Change, ...]
    """All others: what the model could before, and no stage trains."""

    @property
    def learnt_mean(self) -> Means | None:
        """Over the accuracies of what was learnt; None without one."""
        return _means(self.learnt)

    @property
    def kept_mean(self) -> Means | None:
        """Over the accuracies of what was kept; None without one."""
        return _means(self.kept)


def outcome_of(run: Run) -> Outcome:
    """Return what a run learnt and kept, as far as its evaluations say."""
    changes = []
    for row in run.history.rows:
        scored = [score for score in row.scores if score is not None]
        changes.append(Change(row.name, scored[0], scored[-1] if len(scored) > 1 else None))
    return Outcome(
        learnt=tuple(change for change in changes if change.name in run.stages),
        kept=tuple(change for change in changes if change.name not in run.stages),
    )


def _means(changes: Iterable[Change]) -> Means | None:
    pairs = [
        (change.before.value, change.after.value)
        for change in changes
        if change.before.higher_is_better and change.after is not None
    ]
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    before, after = mean(one for one, _ in known), mean(one for _, one in known)
    return None if before is None or after is None else Means(len(known), before, after)


class Cell(NamedTuple):
    """One score of one run, beside those of others."""

    before: float | None
    after: float | None
    against_first: float | None
    """How far its end is above that of the first run; None of the first, and where either is not known."""


class SideRow(NamedTuple):
    """One score of all runs."""

    name: str
    group: str
    """``learnt`` or ``kept``."""
    is_accuracy: bool
    cells: tuple[Cell | None, ...]
    """By run; None where it has no such task."""


def side_by_side(runs: Sequence[Run]) -> tuple[SideRow, ...]:
    """Return the scores of several runs beside each other: means, and then every task."""
    outcomes = [outcome_of(run) for run in runs]
    means = [
        _side_row("mean of all", group, True, [None if one is None else (one.before, one.after) for one in found])
        for group, found in (
            ("learnt", [outcome.learnt_mean for outcome in outcomes]),
            ("kept", [outcome.kept_mean for outcome in outcomes]),
        )
        if any(found)
    ]
    by_name = [
        {change.name: (group, change) for group in ("learnt", "kept") for change in getattr(outcome, group)}
        for outcome in outcomes
    ]
    rows = []
    for name in dict.fromkeys(name for one in by_name for name in one):
        group, first = next(one[name] for one in by_name if name in one)
        pairs = [_ends(one[name][1]) if name in one else None for one in by_name]
        rows.append(_side_row(name, group, first.before.higher_is_better, pairs))
    rows.sort(key=lambda row: row.group != "learnt")
    return (*means, *rows)


def _ends(change: Change) -> tuple[float | None, float | None]:
    return change.before.value, None if change.after is None else change.after.value


def _side_row(
    name: str, group: str, is_accuracy: bool, pairs: Sequence[tuple[float | None, float | None] | None]
) -> SideRow:
    first = None if pairs[0] is None else pairs[0][1]
    cells: list[Cell | None] = []
    for place, pair in enumerate(pairs):
        after = None if pair is None else pair[1]
        against = after - first if place and after is not None and first is not None else None
        cells.append(None if pair is None else Cell(pair[0], after, against))
    return SideRow(name, group, is_accuracy, tuple(cells))
