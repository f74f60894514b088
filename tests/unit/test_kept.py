"""What is kept, as rows: which are held out, which are measured, and in which order."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from epi_ds.data.sources import SkillRows
from epi_ds.data.table import Reading, Table, read_table
from epi_ds.errors import UserError
from epi_ds.evaluation.kept import kept_sources, kept_tasks
from epi_ds.evaluation.tasks import build_tasks
from epi_ds.recipe.keep import Keep
from epi_ds.recipe.loading import parse_recipe
from epi_ds.recipe.models import Recipe
from epi_ds.train import own_rows
from epi_ds.train.measuring import check_own_rows_fill, kept_windows
from epi_ds.train.rows import row_arguments_of
from epi_ds.train.run_folder import RunFolder
from tests.support.tables import write_lines


def recipe_of(keep: dict[str, Any], **evaluation: Any) -> Recipe:
    values = {
        "model": {"path": "m"},
        "stages": [{"name": "new", "data": {"skill": "arithmetic", "rows": 8}}],
        "method": {"keep": keep},
        "evaluation": {"rows": 4, **evaluation},
        "output": "o",
    }
    return parse_recipe(values, place="the recipe")


def rows_file(folder: Path, name: str, count: int) -> Path:
    return write_lines(folder / name, [{"question": f"{name} {i}?", "answer": f"It is {i}."} for i in range(count)])


def answers(table: Table | SkillRows) -> list[str]:
    assert isinstance(table, Table)
    return [row.answer for _, row in read_table(table, Reading())]


def test_held_out_rows_are_scored_and_nothing_else(tmp_path: Path) -> None:
    data = [
        {"path": str(rows_file(tmp_path, "many.jsonl", 100))},
        {"path": str(rows_file(tmp_path, "few.jsonl", 25)), "rows": 21},
        {"skill": "logic", "rows": 8},
    ]
    recipe = recipe_of({"data": data}, skills=["logic", "code"])
    kept = kept_sources(recipe, None)
    # One in ten, and no more than evaluation.rows; a skill has test rows.
    assert [one.num_held_out for one in kept] == [4, 2, 0]
    assert answers(kept[0].resolve(seed=3)) == [f"It is {i}." for i in range(4, 100)]
    assert answers(kept[1].resolve(seed=3)) == [f"It is {i}." for i in range(2, 21)]
    assert kept[2].resolve(seed=3) == SkillRows("logic", "train", 8, 3)
    tasks = kept_tasks(kept, recipe)
    assert [task.name for task in tasks] == [f"base/{data[0]['path']}", f"base/{data[1]['path']}", "base/logic"]
    assert [[row.answer for row in task.conversations] for task in tasks[:2]] == [
        [f"It is {i}." for i in range(4)],
        [f"It is {i}." for i in range(2)],
    ]
    assert [task.higher_is_better for task in tasks] == [False, False, True]
    # A skill that is kept is not scored once more.
    assert [task.name for task in build_tasks(recipe)] == ["new", "code"]


def test_rows_that_are_not_scored_are_all_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = rows_file(tmp_path, "rows.jsonl", 30)
    recipe = recipe_of({"data": {"path": str(path)}, "evaluation": False}, skills=["logic"])
    kept = kept_sources(recipe, None)
    assert len(answers(kept[0].resolve(seed=0))) == 30
    assert not kept_tasks(kept, recipe)
    assert not kept_sources(parse_recipe({**recipe.model_dump(), "method": {}}, place="the recipe"), None)
    own = rows_file(tmp_path, "own.jsonl", 9)
    with caplog.at_level(logging.WARNING):
        kept = kept_sources(recipe_of({"self": 9}), own)
    assert [(one.label, one.num_held_out) for one in kept] == [("own_rows", 0)]
    assert "own_rows has 9 rows to keep, of which none is held out" in caplog.text


def test_what_is_measured_is_a_permutation_of_all_sources() -> None:
    data = [Dataset.from_dict({"row": [f"{name}{i}" for i in range(size)]}) for name, size in (("a", 10), ("b", 7))]
    keep = Keep.model_validate({"self": 17})
    measured = kept_windows(keep, data, global_batch=4, seed=3)
    assert (measured.num_windows, measured.name, len(measured.rows)) == (4, "base", 16)
    assert len(set(measured.rows["row"])) == 16
    assert {row[0] for row in measured.rows["row"][:8]} == {"a", "b"}
    # The same rows in another cut: only the global batch counts, which is the same at every number of ranks.
    assert kept_windows(keep, data, global_batch=8, seed=3).rows["row"] == measured.rows["row"]
    assert kept_windows(keep, data, global_batch=4, seed=4).rows["row"] != measured.rows["row"]
    fewer = Keep.model_validate({"self": 17, "windows": 2})
    assert kept_windows(fewer, data, global_batch=4, seed=3).rows["row"] == measured.rows["row"][:8]
    long = [Dataset.from_dict({"row": list(range(1000))})]
    assert kept_windows(keep, long, global_batch=4, seed=3).num_windows == 64


def test_sources_are_measured_by_their_shares() -> None:
    data = [Dataset.from_dict({"row": [f"{name}{i}" for i in range(40)]}) for name in ("a", "b")]
    sources = [{"skill": "logic", "rows": 40, "share": 3}, {"skill": "code", "rows": 40, "share": 1}]
    rows = kept_windows(Keep.model_validate({"data": sources}), data, global_batch=8, seed=0).rows["row"]
    for first in range(0, len(rows), 8):
        assert sum(row.startswith("a") for row in rows[first : first + 8]) == 6


def test_fewer_rows_than_are_to_be_measured_are_refused() -> None:
    data = [Dataset.from_dict({"row": list(range(7))})]
    with pytest.raises(UserError, match="has 7 rows to measure, fewer than one global batch of 8"):
        kept_windows(Keep.model_validate({"self": 7}), data, global_batch=8, seed=0)
    with pytest.raises(UserError, match=r"fewer than method\.keep\.windows: 4, global batches of 2"):
        kept_windows(Keep.model_validate({"self": 7, "windows": 4}), data, global_batch=2, seed=0)


@pytest.mark.parametrize(
    ("keep", "fits"),
    [
        ({"self": 64}, False),
        ({"self": 64, "evaluation": False}, True),
        ({"self": 71}, True),
        ({"self": 64, "importance": False, "replay": 0.1}, True),
        ({"self": 640, "windows": 10}, False),
        ({"self": 64, "data": {"skill": "code", "rows": 64}}, True),
    ],
)
def test_too_few_own_rows_are_refused_before_they_are_written(keep: dict[str, Any], fits: bool) -> None:
    """One row in ten is held out, and a global batch has 64."""
    with nullcontext() if fits else pytest.raises(UserError, match="rows to measure, fewer than"):
        check_own_rows_fill(Keep.model_validate(keep), evaluated=1000, global_batch=64)


def test_a_run_that_goes_on_needs_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_rows, "on_first_rank", lambda action: action())
    recipe, folder = recipe_of({"self": 4}), RunFolder(tmp_path)
    arguments = row_arguments_of(recipe)

    def file_of(recipe: Recipe) -> Path | None:
        return own_rows.write_before_training(recipe, folder, None, arguments, resumes=True, console=None)

    with pytest.raises(UserError, match=r"own_rows\.jsonl is gone, which holds the rows that the model wrote before"):
        file_of(recipe)
    path = rows_file(tmp_path, "own_rows.jsonl", 4)
    # Nothing is loaded, and nothing written: a resume has the rows that it was trained with, or none.
    assert file_of(recipe) == folder.own_rows == path
    shared = rows_file(tmp_path, "shared.jsonl", 4)
    assert file_of(recipe_of({"self": {"rows": 4, "file": str(shared)}})) == shared
    assert file_of(recipe_of({"data": {"skill": "logic", "rows": 8}})) is None
    folder.clear()
    assert not path.exists()
    assert shared.exists()
