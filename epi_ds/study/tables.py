"""Tables of a study as rows of text, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from epi_ds.study.comparison import ArmRow, LevelRow
from epi_ds.study.intervals import CONFIDENCE, Interval
from epi_ds.study.rates import TOLERANCE, RatesRow

_NOTHING = "-"


class TextTable(NamedTuple):
    """A table of words and numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def markdown(self) -> str:
        """The table in Markdown, without its title."""
        lines = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def arms_table(rows: Sequence[ArmRow]) -> TextTable:
    """Return what every arm learnt and kept."""
    return TextTable(
        f"Arms: means over seeds, with {CONFIDENCE:.0%} t-intervals",
        ("arm", "cells", "new", "kept", "above the frontier", "KL to base", "seconds"),
        tuple(
            (
                row.arm,
                f"{row.cells}" + (f" ({row.failed} failed)" if row.failed else ""),
                told(row.new),
                told(row.kept),
                _above(row),
                _NOTHING if row.kl_to_base is None else f"{row.kl_to_base:.3f}",
                _NOTHING if row.seconds is None else f"{row.seconds:.0f}",
            )
            for row in rows
        ),
    )


def levels_table(rows: Sequence[LevelRow], *, best: str) -> TextTable:
    """Return what sweeps keep at equal new-task scores, against plain fine-tuning."""
    return TextTable(
        f"Kept at equal new-task score: shares of what {best} gains",
        ("protection", "at", "kept", "plain", "difference", "p", "p (Holm)", "pairs", "open cells"),
        tuple(
            (
                row.sweep + (" (primary)" if row.is_primary else ""),
                f"{row.level:.0%}",
                told(row.kept),
                told(row.plain),
                told(row.difference, signed=True),
                _probability(None if row.difference is None else row.difference.p),
                _probability(row.p_corrected),
                f"{row.reached} of {row.pairs}",
                str(row.open_cells),
            )
            for row in rows
        ),
    )


def rates_table(rows: Sequence[RatesRow]) -> TextTable:
    """Return how much the rate matters under each protection."""
    return TextTable(
        f"Rates that do no harm: both scores within {TOLERANCE:.0%} of the best at any rate",
        ("protection", "cells", "best new", "kept there", "doublings of the rate"),
        tuple(
            (row.protection, str(row.cells), told(row.best_new), told(row.kept_there), told(row.width)) for row in rows
        ),
    )


def _above(row: ArmRow) -> str:
    beyond = row.cells - row.above_cells
    if not beyond:
        return told(row.above, signed=True)
    beyond_told = f"learns more in {beyond} of {row.cells}"
    return beyond_told if row.above is None else f"{told(row.above, signed=True)}, {beyond_told}"


def _probability(p: float | None) -> str:
    if p is None:
        return _NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def told(interval: Interval | None, *, signed: bool = False) -> str:
    """Return an interval as a cell of a table."""
    if interval is None:
        return _NOTHING
    mean = f"{interval.mean:+.3f}" if signed else f"{interval.mean:.3f}"
    return mean if interval.half_width is None else f"{mean} ± {interval.half_width:.3f}"
