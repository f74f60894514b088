"""What counts: kept ability at equal new-task score, per seed and target against plain fine-tuning of the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple, cast

from epi_ds.study.cells import Cell
from epi_ds.study.frontier import Point, envelope, frontier, kept_at, new_at
from epi_ds.study.intervals import Interval, holm, interval_of
from epi_ds.study.models import Study
from epi_ds.study.result_lines import Result, Status

Results = Mapping[Cell, Result]


class ArmRow(NamedTuple):
    """An arm over its seeds; a seed's value is the mean over its targets."""

    arm: str
    cells: int
    failed: int
    new: Interval | None
    kept: Interval | None
    above: Interval | None
    """Kept minus what the frontier of plain fine-tuning keeps at the same new-task score, where it learns so much."""
    above_cells: int
    """Cells where it does; in the others the arm learns more than plain fine-tuning at any rate."""
    kl_to_base: float | None
    seconds: float | None


class LevelRow(NamedTuple):
    """A sweep at a share of the gain of the best plain arm."""

    sweep: str
    level: float
    kept: Interval | None
    plain: Interval | None
    """What the frontier keeps there, in the cells that both reach."""
    difference: Interval | None
    p_corrected: float | None
    """Holm's, over all rows but the primary one, whose own p stands uncorrected."""
    is_primary: bool
    reached: int
    """Pairs of seed and target where both have a number."""
    pairs: int
    """Pairs in which the best plain arm was run."""
    open_cells: int
    """Cells of the sweep and of the frontier that are missing in these: with them the numbers may be others."""


class _Pair(NamedTuple):
    seed: int
    target: str


def plain_curve(study: Study, results: Results, *, seed: int, target: str) -> tuple[Point, ...]:
    """Return the envelope of plain fine-tuning of a seed and target: its arms' ends, and the middles of their runs."""
    found = [one for arm in study.frontier if (one := _ok(results, Cell(arm, seed, target))) is not None]
    return envelope(
        [
            *(_end(one) for one in found),
            *(Point(part.new, part.kept) for one in found for part in one.path),
        ]
    )


def arm_rows(study: Study, results: Results, seeds: Sequence[int]) -> list[ArmRow]:
    """Return the arms of which there is any result, in the order of the study."""
    rows = []
    for arm in study.arms:
        own = {cell: one for cell, one in results.items() if cell.arm == arm and cell.seed in seeds}
        done = {cell: one for cell, one in own.items() if one.status is Status.OK}
        if not own:
            continue
        above: dict[Cell, float] = {}
        for cell, one in done.items():
            end = _end(one)
            plain = kept_at(plain_curve(study, results, seed=cell.seed, target=cell.target), end.new)
            if plain is not None:
                above[cell] = end.kept - plain
        divergences = [one.kl_to_base for one in done.values() if one.kl_to_base is not None]
        rows.append(
            ArmRow(
                arm,
                len(done),
                len(own) - len(done),
                over_seeds({cell: _end(one).new for cell, one in done.items()}),
                over_seeds({cell: _end(one).kept for cell, one in done.items()}),
                over_seeds(above),
                len(above),
                fmean(divergences) if divergences else None,
                fmean(one.seconds for one in done.values()) if done else None,
            )
        )
    return rows


def level_rows(study: Study, results: Results, seeds: Sequence[int]) -> list[LevelRow]:
    """Return every sweep at every level, against the frontier."""
    rows = []
    for sweep, arms in study.sweeps.items():
        for level in study.levels:
            kept: dict[Cell, float] = {}
            plain: dict[Cell, float] = {}
            pairs = open_cells = 0
            for pair in (_Pair(seed, target) for seed in seeds for target in study.targets):
                both = _at_level(study, results, pair, arms=arms, level=level)
                if both is None:
                    continue
                pairs += 1
                wanted = [Cell(arm, *pair) for arm in dict.fromkeys((*arms, *study.frontier))]
                open_cells += sum(_ok(results, cell) is None for cell in wanted)
                if both.kept is not None and both.plain is not None:
                    cell = Cell(sweep, *pair)
                    kept[cell], plain[cell] = both.kept, both.plain
            primary = study.primary
            rows.append(
                LevelRow(
                    sweep,
                    level,
                    over_seeds(kept),
                    over_seeds(plain),
                    over_seeds({cell: kept[cell] - plain[cell] for cell in kept}),
                    None,
                    primary is not None and (primary.sweep, primary.level) == (sweep, level),
                    len(kept),
                    pairs,
                    open_cells,
                )
            )
    return _corrected(rows)


class _AtLevel(NamedTuple):
    kept: float | None
    plain: float | None


def _at_level(study: Study, results: Results, pair: _Pair, *, arms: Iterable[str], level: float) -> _AtLevel | None:
    """Return what a sweep and the frontier keep; None where the best plain arm was not run."""
    best = _ok(results, Cell(study.best, *pair))
    if best is None:
        return None
    new = new_at(best.new_before or 0.0, _end(best).new, level=level)
    found = [one for arm in arms if (one := _ok(results, Cell(arm, *pair))) is not None]
    plain = kept_at(plain_curve(study, results, seed=pair.seed, target=pair.target), new)
    return _AtLevel(kept_at(frontier(_end(one) for one in found), new), plain)


def _corrected(rows: list[LevelRow]) -> list[LevelRow]:
    raw = {
        f"{position}": row.difference.p
        for position, row in enumerate(rows)
        if row.difference is not None and row.difference.p is not None and not row.is_primary
    }
    corrected = holm({name: p for name, p in raw.items() if p is not None})
    return [row._replace(p_corrected=corrected.get(f"{position}")) for position, row in enumerate(rows)]


def over_seeds(values: Mapping[Cell, float]) -> Interval | None:
    """Return the interval over seeds: targets of one seed share its base, so they are one value."""
    by_seed: dict[int, list[float]] = {}
    for cell, value in values.items():
        by_seed.setdefault(cell.seed, []).append(value)
    return interval_of([fmean(of_seed) for of_seed in by_seed.values()])


def _ok(results: Results, cell: Cell) -> Result | None:
    found = results.get(cell)
    return None if found is None or found.status is not Status.OK else found


def _end(result: Result) -> Point:
    """Return the scores of a cell that ended well, which `Result` refuses to be without."""
    return Point(cast(float, result.new), cast(float, result.kept))
