"""Tables of what explains the scores: of every arm the mean over seeds of each measure that its lines have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from epi_ds.study.cells import Cell
from epi_ds.study.comparison import Results, over_seeds
from epi_ds.study.measures import Flips, MaskDrift
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


def _mean_known(values: Iterable[float | None]) -> float | None:
    return _mean(value for value in values if value is not None)


def _drift(result: Result) -> list[MaskDrift]:
    return [] if result.mask_drift is None else [result.mask_drift]


def _flip_rates(result: Result) -> list[float]:
    return [rate for drift in _drift(result) for rate in drift.layer_flip_rate.values()]


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
    _Measures(
        "Masks: overlap (intersection over union), and the share of a layer's mask that a refresh releases",
        {
            "isolated at the end": lambda study, one: _mean(d.isolated_share for d in _drift(one)),
            "first and last mask": lambda study, one: _mean_known(d.first_last for d in _drift(one)),
            "mask and the one before": lambda study, one: _mean_known(d.between_refreshes for d in _drift(one)),
            "steadiest layer": lambda study, one: min(_flip_rates(one), default=None),
            "least steady layer": lambda study, one: max(_flip_rates(one), default=None),
        },
    ),
    _Measures(
        "Importance at the run's end against the base's true squared gradients on what is kept",
        {
            "rank correlation": lambda study, one: _mean_known(s.rank_correlation for s in one.sensitivity.values()),
            "most sensitive held": lambda study, one: _mean_known(s.held for s in one.sensitivity.values()),
            "held by chance": lambda study, one: _mean(d.isolated_share for d in _drift(one) if one.sensitivity),
        },
    ),
    _Measures(
        "Gradient conflict of the new task with what is kept, max(0, -cosine), mean over skills",
        {
            "at the base": lambda study, one: _mean(max(0.0, -c.base) for c in one.conflict.values()),
            "at the end": lambda study, one: _mean(max(0.0, -c.trained) for c in one.conflict.values()),
            "cosine at the base": lambda study, one: _mean(c.base for c in one.conflict.values()),
            "cosine at the end": lambda study, one: _mean(c.trained for c in one.conflict.values()),
        },
    ),
)
