"""A preview shows the rows that a run trains on, by the same code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from epi_ds.cli.main import app
from epi_ds.data.skills.tokenization import TOKENIZER_DIR
from epi_ds.errors import UserError
from epi_ds.recipe.loading import load_recipe, parse_recipe
from epi_ds.recipe.models import Recipe
from epi_ds.train.preview import Stretch, preview
from tests.support.tables import write_lines


def recipe_of(folder: Path, **train: object) -> Recipe:
    rows = [{"question": f"q{n}", "answer": "word " * n} for n in (*range(1, 11), 200)]
    table = write_lines(folder / "rows.jsonl", rows)
    values = {
        "model": {"path": str(TOKENIZER_DIR)},
        "stages": [
            {"name": "table", "data": {"path": str(table)}, "epochs": 3},
            {"name": "skill", "data": {"skill": "logic", "rows": 9}},
        ],
        "train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **train},
        "output": str(folder / "run"),
    }
    return parse_recipe(values, place="the recipe")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPI_DS_CACHE", str(tmp_path / "cache"))


def test_it_counts_steps_and_what_is_left_over(tmp_path: Path) -> None:
    (table, skill), kept = preview(recipe_of(tmp_path), ranks=2, num_samples=1)
    assert kept == ()
    assert (table.sources[0].num_rows, table.num_steps, table.left_over) == (11, 4, 1)
    assert (skill.sources[0].num_rows, skill.num_steps, skill.left_over) == (9, 1, 1)
    assert table.sources[0].samples == (
        (Stretch("<|start|>user\nq1<|end|>\n<|start|>assistant\n", False), Stretch("word <|end|>\n", True)),
    )
    with pytest.raises(UserError, match="stage skill has 9 rows x 1 epochs, fewer than one global batch of 16"):
        preview(recipe_of(tmp_path), ranks=4, num_samples=1)


def test_it_shows_what_is_kept_and_how_many_rows_are_replayed(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path).model_dump(exclude_defaults=True)
    recipe["method"] = {"keep": {"data": {"skill": "code", "rows": 5}, "replay": 0.3, "replay_stages": True}}
    path = tmp_path / "recipe.yaml"
    path.write_text(parse_recipe(recipe, place="the recipe").model_dump_json(exclude_defaults=True))
    (table, skill), kept = preview(load_recipe(str(path)), ranks=2, num_samples=1)
    # Of batches of 8 rows 2, 2, 3, 2, 3 and 2 are replayed: 33 rows fill five of them, where they filled four.
    assert (table.num_steps, table.num_replayed, table.left_over) == (5, 12, 5)
    assert (skill.num_steps, skill.num_replayed, skill.left_over) == (1, 2, 3)
    assert [(source.name, source.num_rows, len(source.samples)) for source in kept] == [("code", 5, 1)]
    shown = CliRunner().invoke(app, ["preview-data", str(path), "--rows", "0", "--ranks", "2"]).output
    assert "5 steps with 12 replayed rows, and 5 rows left over (the last, incomplete batch)" in shown
    assert re.search(r"what is kept .*\n.*\n?code: 5 rows;", shown)


def test_the_command_shows_rows_lengths_and_what_was_cut(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, max_length=160)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.model_dump_json(exclude_defaults=True))
    shown = CliRunner().invoke(app, ["preview-data", str(path), "--rows", "1"]).output
    assert "stage table" in shown
    assert "format question_answer (question, answer), 11 rows" in shown
    assert "1 of 11 rows are longer than train.max_length (160 tokens" in shown
    assert "[[word <|end|>\n]]" in shown
    assert re.search(r"128 to 255 +1  #", shown)
    assert "8 steps, and 1 rows left over" in shown
