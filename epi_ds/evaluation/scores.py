"""What an evaluation finds, and how far it has come."""

from __future__ import annotations

from typing import NamedTuple


class Score(NamedTuple):
    """The result of one task."""

    value: float
    """Share of rows solved, or mean teacher-forced loss per token; of lm-evaluation-harness its metric."""
    num_rows: int
    higher_is_better: bool
    solved: str | None = None
    """A character for every row, in order, 1 where it is solved and 0 where not; None of what has no answers that are
    right or wrong here: a loss, and tasks of lm-evaluation-harness."""
    metric: str | None = None
    """What lm-evaluation-harness calls the value; None for tasks of our own."""


class Scored(NamedTuple):
    """How far an evaluation has come, on all ranks together, which are taken to be equally fast."""

    task: str
    """The one that is being scored."""
    done: int
    """Rows of it that were when this rank's next batch began."""
    total: int
    seconds: float
    """Since the evaluation began."""
