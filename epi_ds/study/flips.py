"""Answers that flipped: how much of a score's stillness is rows that were lost while others were gained.

Test rows are the same in every evaluation of a run, so two of them can be compared row by row.
"""

from __future__ import annotations

from epi_ds.errors import RemedyError
from epi_ds.study.measures import Flips


def flips_between(before: str | None, after: str | None) -> Flips | None:
    """Return how answers changed; None where either evaluation did not write which rows were solved.

    before, after  a character for every row, 1 where it was solved, see `evaluation.scores.Score`

    Raises RemedyError where they are of different numbers of rows.
    """
    if before is None or after is None:
        return None
    if len(before) != len(after):
        raise RemedyError(
            f"a task had {len(before)} test rows before training and {len(after)} at its end, so its answers cannot be "
            "compared; run the cell again"
        )
    pairs = list(zip(before, after, strict=True))
    return Flips(
        right_to_wrong=pairs.count(("1", "0")) / max(1, len(pairs)),
        wrong_to_right=pairs.count(("0", "1")) / max(1, len(pairs)),
    )
