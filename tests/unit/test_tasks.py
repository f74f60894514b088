"""What is evaluated can be scored, or is refused before training begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from epi_ds.errors import UserError
from epi_ds.evaluation.tasks import build_tasks
from epi_ds.recipe.loading import parse_recipe
from epi_ds.recipe.models import Recipe
from tests.support.tables import write_lines


def recipe_of(path: Path, **evaluation: Any) -> Recipe:
    stage = {
        "name": "a",
        "data": {"path": str(path)},
        "evaluation": {"path": str(path), **evaluation},
    }
    return parse_recipe({"model": {"path": "m"}, "stages": [stage], "output": "o"}, place="the recipe")


def test_references_of_final_number_hold_numbers(tmp_path: Path) -> None:
    rows = [{"question": "1+1?", "answer": "#### 2"}, {"question": "2+2?", "answer": "four"}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"metric final_number of a: 1 of 2 reference answers hold no number"):
        build_tasks(recipe_of(path, metric="final_number"))
    (task,) = build_tasks(recipe_of(path, metric="final_number", rows=1))
    assert task.check is not None
    assert task.check(0, "it is 2")
    assert not task.check(0, "it is 3")


def test_documents_have_a_loss_only(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "a document"}])
    with pytest.raises(UserError, match="plain texts have no answers to compare; set metric: loss"):
        build_tasks(recipe_of(path))
    (task,) = build_tasks(recipe_of(path, metric="loss"))
    assert task.check is None


def test_a_skill_that_is_named_for_the_evaluation_brings_its_check() -> None:
    values = {
        "model": {"path": "model"},
        "stages": [
            {
                "name": "one",
                "data": {"skill": "arithmetic", "rows": 8},
                "evaluation": {"skill": "arithmetic", "split": "test", "rows": 3},
            }
        ],
        "output": "run",
    }
    (task,) = build_tasks(parse_recipe(values, place="a test"))
    assert len(task.conversations) == 3
    assert task.check is not None
    number = task.conversations[0].answer.rpartition(" ")[2]
    # Another working, and the same result.
    assert task.check(0, f"It is {number}")
    assert not task.check(0, f"It is {number}0")


def test_rows_that_no_stage_trains_are_scored_by_their_own_names(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "1+1?", "completion": "2"}] * 3)
    values: dict[str, Any] = {
        "model": {"path": "m"},
        "stages": [{"name": "a", "data": {"path": str(path)}}],
        "evaluation": {"tasks": {"chat": {"path": str(path), "metric": "loss", "rows": 2}}},
        "output": "o",
    }
    (task,) = build_tasks(parse_recipe(values, place="a test"))
    assert (task.name, len(task.conversations), task.higher_is_better) == ("chat", 2, False)
    values["evaluation"]["tasks"] = {"a": {"path": str(path)}}
    with pytest.raises(UserError, match=r"evaluation\.tasks\.a has the name of a stage"):
        parse_recipe(values, place="a test")
    values["evaluation"]["tasks"] = {"a b": {"path": str(path)}}
    with pytest.raises(UserError, match="task 'a b' is to be named by letters"):
        parse_recipe(values, place="a test")
    values["evaluation"]["tasks"] = {"chat": {"path": str(path), "metrc": "loss"}}
    with pytest.raises(UserError, match=r"evaluation\.tasks\.chat\.metrc: unknown key; did you mean 'metric'\?"):
        parse_recipe(values, place="a test")
