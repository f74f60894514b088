"""Accuracy per task over the stages of a run, and what was forgotten. Reads a run's metrics only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

KEPT = "base/"
"""What the names of tasks begin with that are of what is to be kept; no stage has such a name."""


class TaskRow(NamedTuple):
    """One task's scores, in the order of the table's columns."""

    name: str
    values: tuple[float | None, ...]
    higher_is_better: bool

    @property
    def forgetting(self) -> float | None:
        """Best score before the last evaluation minus the last one, in the score's own unit; positive = forgotten.

        For losses the sign is turned, so that it reads the same. None with fewer than two evaluations.
        """
        known = [value for value in self.values if value is not None]
        if len(known) < 2:
            return None
        if self.higher_is_better:
            return max(known[:-1]) - known[-1]
        return known[-1] - min(known[:-1])


class ScoreTable(NamedTuple):
    """Scores of every task before training and after every stage."""

    columns: tuple[str, ...]
    rows: tuple[TaskRow, ...]

    @property
    def mean_forgetting(self) -> float | None:
        """Mean over the accuracy tasks that have a forgetting."""
        return _mean(row.forgetting for row in self.rows if row.higher_is_better)

    @property
    def kept_told(self) -> str | None:
        """What was forgotten of what was to be kept, in words: points of accuracy, and loss; None without any."""
        kept = [row for row in self.rows if row.name.startswith(KEPT)]
        points = _mean(row.forgetting for row in kept if row.higher_is_better)
        rise = _mean(row.forgetting for row in kept if not row.higher_is_better)
        parts = [] if points is None else [f"{points:.1%}"]
        parts += [] if rise is None else [f"loss {rise:+.3f}"]
        return ", ".join(parts) or None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def score_table(metrics: Iterable[Mapping[str, Any]]) -> ScoreTable:
    """Collect the evaluations of a run."""
    evaluations = [line for line in metrics if line["event"] == "evaluation"]
    names = list(dict.fromkeys(name for line in evaluations for name in line["scores"]))
    # What must not be forgotten comes first, whenever it was first scored.
    names.sort(key=lambda name: not name.startswith(KEPT))
    rows = []
    for name in names:
        scores = [line["scores"].get(name) for line in evaluations]
        values = tuple(None if score is None or score["value"] is None else float(score["value"]) for score in scores)
        higher = all(score["higher_is_better"] for score in scores if score is not None)
        rows.append(TaskRow(name, values, higher))
    columns = tuple("before" if line["step"] == 0 else f"after {line['stage']}" for line in evaluations)
    return ScoreTable(columns, tuple(rows))
