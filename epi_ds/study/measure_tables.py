"""Tables of what explains the scores: of every arm the mean over seeds of each measure that its lines have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from epi_ds.study.cells import Cell
from epi_ds.study.comparison import Results, over_seeds
from epi_ds.study.flips import Flips
from epi_ds.study.models import Study
from epi_ds.study.result_lines import Result, Status
from epi_ds.study.tables import TextTable, told


class _Measures(NamedTuple):
    title: str
    columns: dict[str, Callable[[Study, Result], float | None]]


def measure_tables(study: Study, results: Results, seeds: Sequence[int]) -> list[TextTable]:
    """Return the tables of which any line has a number; an arm without one is left out of them."""
    tables = (_table(measures, study, results, seeds) for measures in _ALL)
    return [table for table in tables if table.rows]


def _table(measures: _Measures, study: Study, results: Results, seeds: Sequence[int]) -> TextTable:
    rows = []
    for arm in study.arms:
        own = {
            cell: one
            for cell, one in results.items()
            if cell.arm == arm and cell.seed in seeds and one.status is Status.OK
        }
        columns = [_known(study, own, measure) for measure in measures.columns.values()]
        if cells := {cell for column in columns for cell in column}:
            rows.append((arm, str(len(cells)), *(told(over_seeds(column)) for column in columns)))
    return TextTable(measures.title, ("arm", "cells", *measures.columns), tuple(rows))


def _known(study: Study, results: Results, measure: Callable[[Study, Result], float | None]) -> dict[Cell, float]:
    values = {cell: measure(study, one) for cell, one in results.items()}
    return {cell: value for cell, value in values.items() if value is not None}


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def _of_kept(study: Study, result: Result) -> list[Flips]:
    kept = study.kept_skills(result.target)
    return [flips for name, flips in result.flips.items() if name in kept]


def _of_new(study: Study, result: Result) -> list[Flips]:
    kept = study.kept_skills(result.target)
    return [flips for name, flips in result.flips.items() if name not in kept]


_ALL = (
    _Measures(
        "Answers that flipped, as shares of the test rows: before training and at the run's end",
        {
            "new, wrong to right": lambda study, one: _mean(f.wrong_to_right for f in _of_new(study, one)),
            "new, right to wrong": lambda study, one: _mean(f.right_to_wrong for f in _of_new(study, one)),
            "kept, right to wrong": lambda study, one: _mean(f.right_to_wrong for f in _of_kept(study, one)),
            "kept, wrong to right": lambda study, one: _mean(f.wrong_to_right for f in _of_kept(study, one)),
        },
    ),
)
