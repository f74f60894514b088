"""What is compared: the frontier of plain fine-tuning, intervals over seeds, and the tables of both."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epi_ds.cli.study import report
from epi_ds.study.cells import Cell
from epi_ds.study.comparison import arm_rows, level_rows, plain_curve
from epi_ds.study.frontier import Point, envelope, frontier, kept_at, new_at
from epi_ds.study.intervals import Interval, holm, interval_of
from epi_ds.study.measure_tables import measure_tables
from epi_ds.study.models import Study
from epi_ds.study.plane import plane_figure
from epi_ds.study.rates import RatePoint, rates_rows, width_of
from epi_ds.study.result_lines import Result
from epi_ds.study.tables import arms_table, levels_table, rates_table
from tests.unit.test_study import STUDY, result_of

ROOT = Path(__file__).resolve().parents[2]
CURVE = (Point(0.3, 0.85), Point(0.52, 0.76), Point(0.78, 0.5), Point(0.91, 0.22))
score = st.floats(0, 1).map(lambda value: round(value, 6))
points = st.lists(st.builds(Point, score, score), min_size=1, max_size=12)


# --- frontier ---


def test_points_that_are_beaten_in_both_scores_are_not_on_it() -> None:
    assert frontier([*CURVE, Point(0.5, 0.5), Point(0.3, 0.2), Point(0.91, 0.1)]) == CURVE
    assert frontier([]) == ()


def test_between_neighbours_it_is_linear_and_above_them_nothing() -> None:
    assert kept_at(CURVE, 0.52) == 0.76
    assert kept_at(CURVE, 0.65) == pytest.approx(0.63)
    # Who learns more than is asked for keeps what he keeps.
    assert kept_at(CURVE, 0.29) == 0.85
    assert kept_at(CURVE, 0.92) is None
    assert kept_at((), 0.5) is None
    assert new_at(0.1, 0.9, level=0.8) == pytest.approx(0.74)


@given(points, score, score)
def test_more_of_the_new_task_never_keeps_more(cloud: list[Point], one: float, other: float) -> None:
    curve = frontier(cloud)
    low, high = (kept_at(curve, new) for new in sorted((one, other)))
    assert low is None or high is None or low >= high - 1e-12


@given(points, score)
def test_it_never_extrapolates(cloud: list[Point], new: float) -> None:
    curve = frontier(cloud)
    found = kept_at(curve, new)
    assert (found is not None) == (new <= max(point.new for point in cloud))
    if found is not None:
        # A run has at least so much of both, or lies between two that have.
        assert found <= max(point.kept for point in cloud if point.new >= new or point in curve) + 1e-12
        assert min(point.kept for point in cloud) - 1e-12 <= found <= max(point.kept for point in cloud) + 1e-12


@given(points, st.data())
def test_a_point_that_is_beaten_changes_nothing(cloud: list[Point], data: st.DataObject) -> None:
    better = data.draw(st.sampled_from(cloud))
    worse = Point(better.new * data.draw(st.floats(0, 1)), better.kept * data.draw(st.floats(0, 1)))
    assert frontier([*cloud, worse]) == frontier(cloud)


@given(points, st.builds(Point, score, score), score)
def test_no_further_point_lowers_the_envelope(cloud: list[Point], further: Point, new: float) -> None:
    before, after = (kept_at(envelope(points), new) for points in (cloud, [*cloud, further]))
    assert before is None or (after is not None and after >= before - 1e-9)
    plain = kept_at(frontier(cloud), new)
    assert before is None or (plain is not None and before >= plain - 1e-9)


def test_of_a_frontier_that_bends_inwards_the_envelope_is_the_line() -> None:
    assert envelope(CURVE) == CURVE
    assert envelope([Point(0, 0.9), Point(0.6, 0.2), Point(0.7, 0.15), Point(0.9, 0.0)]) == ((0, 0.9), (0.9, 0.0))


# --- intervals ---


def test_intervals_are_students() -> None:
    # Of the tables: t(0.975, 4) = 2.776.
    found = interval_of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found is not None
    assert (found.mean, found.seeds) == (3.0, 5)
    assert found.half_width == pytest.approx(2.7764 * 0.70711, abs=1e-3)
    assert found.low == pytest.approx(3.0 - 1.9632, abs=1e-3)
    # t = 3 / .70711 = 4.2426 with 4 degrees of freedom.
    assert found.p == pytest.approx(0.01324, abs=1e-4)


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    assert interval_of([]) is None
    assert interval_of([0.5]) == Interval(0.5, None, None, 1)
    assert interval_of([0.5, 0.5]) == Interval(0.5, 0.0, 0.0, 2)
    assert interval_of([0.0, 0.0]) == Interval(0.0, 0.0, 1.0, 2)


def test_holm_steps_down() -> None:
    # 4 x .005, 3 x .01, 2 x .03 and, not to fall below it, 1 x .04.
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


# --- tables ---

ARMS = ("full_lr_1", "full_lr_2", "weak", "middle", "strong")


def study_of() -> Study:
    changes: dict[str, Any] = {
        "targets": {"instruct": STUDY["targets"]["instruct"]},
        "arms": {arm: {"train.learning_rate": 1e-3 * (1 + number)} for number, arm in enumerate(ARMS)},
        "sweeps": {"pull": ["weak", "middle", "strong"]},
        "primary": {"sweep": "pull", "level": 0.8},
    }
    return Study.model_validate({**STUDY, **changes})


def results_of(**scores: tuple[float, float]) -> dict[Cell, Result]:
    """The same scores with a little more for every seed."""
    found = {}
    for arm, (new, kept) in scores.items():
        for seed in (0, 1, 2):
            cell = Cell(arm, seed, "instruct")
            more = kept + 0.01 * seed * (arm not in ("full_lr_1", "full_lr_2"))
            path = [{"step": 0, "new": 0.0, "kept": 0.9}] if arm == "full_lr_1" else []
            found[cell] = result_of(cell, new=new, kept=more, new_before=0.0, kept_before=0.9, path=path)
    return found


SCORES = {
    "full_lr_1": (1.0, 0.2),
    "full_lr_2": (0.6, 0.6),
    "weak": (0.95, 0.6),
    "middle": (0.85, 0.7),
    "strong": (0.65, 0.8),
}


def test_a_sweep_is_compared_at_shares_of_the_gain() -> None:
    study, results = study_of(), results_of(**SCORES)
    assert plain_curve(study, results, seed=0, target="instruct") == ((0.0, 0.9), (0.6, 0.6), (1.0, 0.2))
    at_80, at_90 = level_rows(study, results, [0, 1, 2])
    # Of the curve at .8: strong .8 and middle .7 meet at .725; plain is .4 there.
    assert at_80.kept is not None
    assert at_80.kept.mean == pytest.approx(0.725 + 0.01)
    assert at_80.difference is not None
    assert at_80.difference.mean == pytest.approx(0.335)
    assert at_80.difference.half_width == pytest.approx(4.3027 * 0.01 / 3**0.5, abs=1e-4)
    assert (at_80.is_primary, at_80.p_corrected, at_80.reached, at_80.pairs) == (True, None, 3, 3)
    assert at_90.difference is not None
    assert at_90.p_corrected == at_90.difference.p
    above = {row.arm: row.above for row in arm_rows(study, results, [0, 1, 2])}
    assert above["middle"] is not None
    assert above["middle"].mean == pytest.approx(0.7 + 0.01 - 0.35)


def test_what_is_not_reached_has_no_number() -> None:
    study = study_of()
    low = results_of(**{**SCORES, "weak": (0.85, 0.6), "middle": (0.8, 0.7)})
    _, at_90 = level_rows(study, low, [0, 1, 2])
    assert (at_90.kept, at_90.difference, at_90.reached, at_90.pairs) == (None, None, 0, 3)
    without_best = {cell: one for cell, one in low.items() if cell.arm != "full_lr_1"}
    assert all(row.pairs == 0 for row in level_rows(study, without_best, [0, 1, 2]))
    higher = arm_rows(study, results_of(full_lr_1=(0.5, 0.2), weak=(0.9, 0.9)), [0])
    assert [row.above for row in higher if row.arm == "weak"] == [None]


def test_measures_of_lines_that_have_them_get_a_table() -> None:
    study, results = study_of(), results_of(**SCORES)
    # Lines of before anything was measured.
    assert measure_tables(study, results, [0, 1, 2]) == []
    for seed, lost in ((0, 0.25), (1, 0.75)):
        cell = Cell("middle", seed, "instruct")
        flips = {
            "new": {"right_to_wrong": 0.0, "wrong_to_right": 0.5},
            "code": {"right_to_wrong": lost, "wrong_to_right": 0.0},
            "logic": {"right_to_wrong": lost, "wrong_to_right": 0.125},
        }
        results[cell] = result_of(cell, flips=flips)
    (table,) = measure_tables(study, results, [0, 1, 2])
    # t(0.975, 1) = 12.706.
    assert table.markdown.splitlines()[2:] == [
        "| middle | 2 | 0.500 ± 0.000 | 0.000 ± 0.000 | 0.500 ± 3.177 | 0.062 ± 0.000 |"
    ]


def test_every_measure_has_its_table_and_a_gap_where_it_is_missing() -> None:
    study, results = study_of(), results_of(**SCORES)
    drift = {"refreshes": 1, "isolated_share": 0.2, "first_last": None, "between_refreshes": None}
    for seed, measures in enumerate(
        [
            {
                "mask_drift": {**drift, "refreshes": 2, "first_last": 0.25, "layer_flip_rate": {"a": 0.5, "b": 0.25}},
                "sensitivity": {
                    "code": {"rank_correlation": 0.5, "held": 0.75},
                    "logic": {"rank_correlation": None, "held": 0.25},
                },
                "conflict": {"code": {"base": -0.5, "trained": 0.5}, "logic": {"base": 0.25, "trained": -0.5}},
            },
            {"mask_drift": {**drift, "layer_flip_rate": {}}},
        ]
    ):
        cell = Cell("middle", seed, "instruct")
        results[cell] = result_of(cell, **measures)
    found = [table.markdown.splitlines()[2:] for table in measure_tables(study, results, [0, 1, 2])]
    assert found == [
        ["| middle | 2 | 0.200 ± 0.000 | 0.250 | - | 0.250 | 0.500 |"],
        ["| middle | 1 | 0.500 | 0.500 | 0.200 |"],
        ["| middle | 1 | 0.250 | 0.250 | -0.125 | 0.000 |"],
    ]


def test_tables_and_the_plane_say_what_was_found() -> None:
    study, results = study_of(), results_of(**SCORES)
    failed = Cell("strong", 2, "instruct")
    results[failed] = result_of(failed, status="failed", new=None, kept=None)
    rows = arm_rows(study, results, [0, 1, 2])
    arms = arms_table(rows).markdown
    assert "| weak | 3 | 0.950 ± 0.000 | 0.610 ± 0.025 | +0.360 ± 0.025 | - | 2 |" in arms
    assert "| strong | 2 (1 failed) |" in arms
    levels = levels_table(level_rows(study, results, [0, 1, 2]), best="full_lr_1").markdown
    assert "| pull (primary) | 80% |" in levels
    # With a strength that is missing the numbers may be others.
    assert "| 3 of 3 | 1 |" in levels
    plane = plane_figure(study, rows)
    assert plane.startswith("<svg")
    assert plane == plane_figure(study, rows)
    assert plane_figure(study, []).startswith("<svg")


def test_the_committed_tables_and_picture_are_what_the_command_writes(tmp_path: Path) -> None:
    """``epi-ds study report tiny -o docs/measured/tiny`` makes them again from the lines of results."""
    report("tiny", output=tmp_path)
    for name in ("study.md", "plane.svg"):
        assert (tmp_path / name).read_text() == (ROOT / "docs/measured/tiny" / name).read_text(), name


def test_what_pages_say_of_arms_stands_in_the_tables() -> None:
    """Rows of pages that are written by hand name their arm, and give its scores as the committed table has them."""
    of_arms = {cells[0]: cells[1:4] for cells in reversed(cells_of(ROOT / "docs/measured/tiny/study.md"))}
    quoted = [cells for cells in cells_of(ROOT / "docs/measured/does-it-help.md") if cells[1][:1] == "`"]
    assert len(quoted) > 8
    for _, arm, *scores in quoted:
        assert scores == of_arms[arm.strip("`")], arm


def cells_of(page: Path) -> list[list[str]]:
    """Return the cells of all rows of a page's tables."""
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows]


# --- rates ---


@given(st.lists(st.tuples(score, score), min_size=3, max_size=7))
def test_a_width_is_that_of_the_widest_stretch(scores: list[tuple[float, float]]) -> None:
    found = [RatePoint(2.0**octave, new, kept) for octave, (new, kept) in enumerate(scores)]
    per_octave = 200
    at = (np.arange((len(scores) - 1) * per_octave) + 0.5) / per_octave
    both = np.ones(len(at), dtype=bool)
    for values in zip(*scores, strict=True):
        both &= np.interp(at, np.arange(len(scores)), values) >= 0.95 * max(values)
    widest = max((len(list(run)) for inside, run in groupby(both) if inside), default=0)
    # A stretch is known to a step at either end.
    assert width_of(found) == pytest.approx(widest / per_octave, abs=2.5 / per_octave)
    assert width_of(list(reversed(found))) == width_of(found)


def test_a_flat_protection_is_as_wide_as_its_rates() -> None:
    assert width_of([RatePoint(rate, 0.8, 0.9) for rate in (1e-4, 2e-4, 8e-4)]) == pytest.approx(3)
    assert width_of([RatePoint(rate, new, 1 - new) for rate, new in ((1e-4, 0.1), (2e-4, 0.5), (4e-4, 0.9))]) == 0


def test_rates_are_compared_where_all_of_them_have_run() -> None:
    arms = {f"lr_{rate}": {"train.learning_rate": rate} for rate in (1e-4, 2e-4, 4e-4)}
    study = Study.model_validate(
        {
            **STUDY,
            "arms": {**STUDY["arms"], **arms},
            "targets": {"code": STUDY["targets"]["code"]},
            "rates": {"x": list(arms)},
        }
    )
    results = {
        cell: result_of(cell, new=0.8, kept=0.5 if arm == "lr_0.0004" else 0.9)
        for arm in arms
        for cell in (Cell(arm, 0, "code"), Cell(arm, 1, "code"))
        if cell != Cell("lr_0.0001", 1, "code")
    }
    (row,) = rates_rows(study, results, seeds=[0, 1])
    assert (row.protection, row.cells) == ("x", 1)
    # One doubling, and the part of the second in which what is kept falls by 5 % of .9, to .855, of .4.
    assert row.width.mean == pytest.approx(1 + 0.045 / 0.4)
    assert "| x | 1 | 0.800 | 0.900 | 1.113 |" in rates_table([row]).markdown
    assert rates_rows(study, results, seeds=[1]) == []
