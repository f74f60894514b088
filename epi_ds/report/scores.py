"""Scores per task over the stages of a run, and what was forgotten. Reads a run's metrics only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

KEPT = "base/"
"""What the names of tasks begin with that are of what is to be kept; no stage has such a name."""


class TaskScore(NamedTuple):
    """What one task scored at one evaluation."""

    value: float | None
    """An accuracy, or a loss; None where it was not finite."""
    num_rows: int | None
    """None where the metrics do not say."""
    higher_is_better: bool
    """An accuracy, or something else that is better when it is larger."""
    solved: str | None
    """A 0 or 1 for every row, in order; None where that is not known."""

    @property
    def standard_error(self) -> float | None:
        """Of an accuracy, by how much drawing other rows would change it: the root of p (1 - p) / rows."""
        if self.value is None or not self.num_rows or not self.higher_is_better or not 0 <= self.value <= 1:
            return None
        return math.sqrt(self.value * (1 - self.value) / self.num_rows)


class TaskRow(NamedTuple):
    """One task's scores, in the order of the table's columns."""

    name: str
    scores: tuple[TaskScore | None, ...]
    """None where the task was not scored then."""
    higher_is_better: bool
    forgetting: float | None
    """Best score before the last evaluation minus the last one, in the score's own unit; positive = forgotten.

    Of all evaluations, whether they are columns or not. For losses the sign is turned, so that it reads the same. None
    with fewer than two evaluations.
    """

    @property
    def values(self) -> tuple[float | None, ...]:
        """The scores' numbers."""
        return tuple(None if score is None else score.value for score in self.scores)


class ScoreTable(NamedTuple):
    """Scores of every task at some evaluations."""

    columns: tuple[str, ...]
    steps: tuple[int, ...]
    """Of the columns."""
    stages: tuple[str | None, ...]
    """Stage that had ended then, of every column; None before training and within a stage."""
    rows: tuple[TaskRow, ...]

    @property
    def mean_forgetting(self) -> float | None:
        """Mean over the accuracy tasks that have a forgetting."""
        return mean(row.forgetting for row in self.rows if row.higher_is_better)

    @property
    def kept_told(self) -> str | None:
        """What was forgotten of what was to be kept, in words: points of accuracy, and loss; None without any."""
        kept = [row for row in self.rows if row.name.startswith(KEPT)]
        points = mean(row.forgetting for row in kept if row.higher_is_better)
        rise = mean(row.forgetting for row in kept if not row.higher_is_better)
        parts = [] if points is None else [f"{points:.1%}"]
        parts += [] if rise is None else [f"loss {rise:+.3f}"]
        return ", ".join(parts) or None


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there; None where there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def score_table(metrics: Iterable[Mapping[str, Any]]) -> ScoreTable:
    """Collect the evaluations of a run before training, after every stage, and the last one."""
    evaluations = _evaluations_in(metrics)
    return _table(evaluations, [line for line in evaluations if _ends_stage(line) or line is evaluations[-1]])


def score_history(metrics: Iterable[Mapping[str, Any]]) -> ScoreTable:
    """Collect all evaluations of a run, those within stages too."""
    evaluations = _evaluations_in(metrics)
    return _table(evaluations, evaluations)


def _evaluations_in(metrics: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [line for line in metrics if line["event"] == "evaluation"]


def _ends_stage(line: Mapping[str, Any]) -> bool:
    # Earlier releases evaluated nowhere else, and did not say so.
    return bool(line.get("stage_ended", True))


def _table(evaluations: Sequence[Mapping[str, Any]], shown: Sequence[Mapping[str, Any]]) -> ScoreTable:
    names = list(dict.fromkeys(name for line in evaluations for name in line["scores"]))
    # What must not be forgotten comes first, whenever it was first scored.
    names.sort(key=lambda name: not name.startswith(KEPT))
    rows = []
    for name in names:
        scores = [_score(line["scores"][name]) for line in evaluations if name in line["scores"]]
        higher = all(score.higher_is_better for score in scores)
        known = [score.value for score in scores if score.value is not None]
        cells = tuple(_score(line["scores"][name]) if name in line["scores"] else None for line in shown)
        rows.append(TaskRow(name, cells, higher, _forgetting(known, higher_is_better=higher)))
    return ScoreTable(
        columns=tuple(_named(line) for line in shown),
        steps=tuple(int(line["step"]) for line in shown),
        stages=tuple(line["stage"] if line["step"] and _ends_stage(line) else None for line in shown),
        rows=tuple(rows),
    )


def _score(found: Mapping[str, Any]) -> TaskScore:
    value = found["value"]
    return TaskScore(
        value=None if value is None else float(value),
        num_rows=found.get("num_rows"),
        higher_is_better=bool(found["higher_is_better"]),
        solved=found.get("solved"),
    )


def _forgetting(values: Sequence[float], *, higher_is_better: bool) -> float | None:
    if len(values) < 2:
        return None
    return max(values[:-1]) - values[-1] if higher_is_better else values[-1] - min(values[:-1])


def _named(line: Mapping[str, Any]) -> str:
    """Say when an evaluation was."""
    if line["step"] == 0:
        return "before"
    return f"after {line['stage']}" if _ends_stage(line) else f"{line['stage']}, step {line['step']}"
