"""``epi-ds init`` looks at a model and at rows, and what it writes is a recipe that a run takes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from epi_ds.cli.main import app
from epi_ds.data.formats import Format
from epi_ds.data.skills import load_tokenizer
from epi_ds.data.skills.tokenization import TOKENIZER_DIR
from epi_ds.demo.base_model import small_llama
from epi_ds.errors import UserError
from epi_ds.recipe.document import read_yaml
from epi_ds.recipe.draft import DataFacts, Draft, ModelFacts, Sizes, recipe_text, sizes_of
from epi_ds.recipe.loading import load_recipe
from epi_ds.train.preview import preview
from tests.support.tables import write_lines


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template, ``chat``, and one without, ``base``."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), load_tokenizer()
    model = small_llama(len(tokenizer), hidden_size=16, num_hidden_layers=1)
    for name in ("chat", "base"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        tokenizer.chat_template = None
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own to be in, with rows to learn and old ones; one in ten of the former says nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EPI_DS_CACHE", str(tmp_path / "cache"))
    write_lines(tmp_path / "new rows.jsonl", [{"question": f"q{n}", "answer": "a" * (n % 10)} for n in range(100)])
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    write_lines(tmp_path / "old.jsonl", [{"messages": turns}] * 20)
    return tmp_path


def init(*arguments: str) -> str:
    return CliRunner().invoke(app, ["init", *arguments], catch_exceptions=False).stdout


def test_it_writes_a_recipe_that_loads_and_says_what_is_next(models: Path) -> None:
    told = init("--model", str(models / "chat"), "--data", "new rows.jsonl", "--gpus", "2")
    assert "format question_answer (question, answer), 90 rows" in told
    assert "left out 10 rows, because of no answer" in told
    # 90 rows, of which 10 are held out, in three epochs.
    assert "written recipe.yaml: about 60 steps of 4 rows, and 10 held out\n" in told
    assert told.endswith("  epi-ds preview-data recipe.yaml\n  epi-ds train recipe.yaml\n")
    recipe = load_recipe("recipe.yaml")
    (stage,) = recipe.stages
    assert (recipe.model.path, stage.name, stage.epochs) == (str(models / "chat"), "new_rows", 3)
    assert stage.sources[0] == stage.data
    assert (stage.sources[0].path, stage.sources[0].split) == ("new rows.jsonl", "train[:-10]")
    assert stage.evaluation is not None
    assert (stage.evaluation.path, stage.evaluation.split) == ("new rows.jsonl", "train[-10:]")
    assert recipe.method.preset == "balanced"
    assert recipe.method.keep is not None
    assert recipe.method.keep.self is not None
    assert (recipe.train["per_device_train_batch_size"], recipe.train["gradient_accumulation_steps"]) == (2, 1)
    assert recipe.train["bf16"] is True
    assert (recipe.output, recipe.ranks) == ("runs/new_rows", 2)
    assert "100 rows, format question_answer, 10 of them left out." in Path("recipe.yaml").read_text()
    assert len(Path("recipe.yaml").read_text().splitlines()) <= 60


def test_old_rows_are_replayed_in_place_of_the_models_own(models: Path) -> None:
    arguments = ("--model", str(models / "chat"), "--data", "new rows.jsonl", "--gpus", "0", "--keep", "old.jsonl")
    init(*arguments, "--name", "mine", "-o", "mine.yaml")
    recipe = load_recipe("mine.yaml")
    keep = recipe.method.keep
    assert keep is not None
    assert (keep.self, keep.replay, keep.importance) == (None, 0.05, False)
    assert [one.path for one in keep.sources] == ["old.jsonl"]
    assert (recipe.stages[0].name, recipe.output, recipe.ranks, recipe.model.dtype) == (
        *("mine", "runs/mine", 1),
        "float32",
    )
    assert "bf16" not in recipe.train
    # Of the first 90 rows nine say nothing, and one of the ten that are held out.
    found = preview(recipe, ranks=1, num_samples=0)
    (stage,) = found.stages
    assert stage.sources[0].num_rows == 81
    assert (found.kept[0].name, found.kept[0].num_rows) == ("old.jsonl", 18)
    assert stage.num_steps * 5 == 81 * 3 + stage.num_replayed - stage.left_over


def test_what_is_not_given_is_named_where_there_is_no_terminal(models: Path) -> None:
    with pytest.raises(UserError, match=r"^--model, --gpus must be given where there is no terminal to ask at$"):
        init("--data", "new rows.jsonl")
    with pytest.raises(UserError, match=r"base has no chat template; give --template, a file or a model that has one"):
        init("--model", str(models / "base"), "--data", "new rows.jsonl", "--gpus", "0")
    assert not Path("recipe.yaml").exists()


def test_nothing_is_overwritten_and_that_is_told_first() -> None:
    Path("recipe.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"^recipe\.yaml exists, and is not overwritten; remove it, or give ano"):
        init("--model", "nowhere", "--data", "nothing.jsonl", "--gpus", "1")
    assert Path("recipe.yaml").read_text() == "mine"
    with pytest.raises(UserError, match=r"there is no folder not/there; make it, or give another --output"):
        init("-o", "not/there/recipe.yaml")


def test_what_cannot_be_looked_at_is_told(models: Path) -> None:
    chat = str(models / "chat")
    with pytest.raises(UserError, match=r"--model .*old\.jsonl cannot be loaded"):
        init("--model", "old.jsonl", "--data", "new rows.jsonl", "--gpus", "1")
    with pytest.raises(UserError, match=r"there is no data file nothing\.jsonl"):
        init("--model", chat, "--data", "nothing.jsonl", "--gpus", "1")
    with pytest.raises(UserError, match=r"has 80 rows to train on, .* for each of 81 GPUs; give more rows, or a small"):
        init("--model", chat, "--data", "new rows.jsonl", "--gpus", "81")
    with pytest.raises(UserError, match="stage is called base"):
        init("--model", chat, "--data", "new rows.jsonl", "--gpus", "1", "--name", "base")
    with pytest.raises(UserError, match="in what is written from these options"):
        init("--model", chat, "--data", "new rows.jsonl", "--gpus", "1", "--name", "a: b")
    assert not Path("recipe.yaml").exists()


@pytest.mark.parametrize("template", [TOKENIZER_DIR / "chat_template.jinja", TOKENIZER_DIR], ids=["file", "model"])
def test_a_base_model_takes_its_template_from_elsewhere(models: Path, template: Path) -> None:
    arguments = ("--data", "new rows.jsonl", "--gpus", "1", "--template", str(template))
    init("--model", str(models / "base"), *arguments)
    assert load_recipe("recipe.yaml").train["chat_template_path"] == str(template)
    assert "its tokenizer has no chat template" in Path("recipe.yaml").read_text()


def test_at_a_terminal_it_asks(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    answers = [models / "base", TOKENIZER_DIR, "new rows.jsonl", 3, "old.jsonl", ""]
    os.write(master, "".join(f"{answer}\n" for answer in answers).encode())
    with os.fdopen(slave) as keyboard, open(os.ttyname(slave), "w") as screen, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", keyboard)
        patch.setattr(sys, "stdout", screen)
        app(["init", "--output", "asked.yaml"], standalone_mode=False)
        screen.flush()
        shown = os.read(master, 1 << 16).decode()
    os.close(master)
    for asked in ("Model (", "no chat template; one from", "Rows to learn", "GPUs that will train", "Old rows", "Name"):
        assert asked in shown
    recipe = load_recipe("asked.yaml")
    assert recipe.model.path == str(models / "base")
    assert recipe.train["chat_template_path"] == str(TOKENIZER_DIR)
    assert (recipe.stages[0].name, recipe.ranks) == ("new_rows", 3)
    assert recipe.method.keep is not None
    assert [one.path for one in recipe.method.keep.sources] == ["old.jsonl"]


# --- sizes and text ---


def draft(rows: int, gpus: int, parameters: float = 7e9, path: str = "new.jsonl", name: str = "new") -> Draft:
    model = ModelFacts("somewhere", int(parameters), has_template=True)
    return Draft(model, DataFacts(path, Format.ALPACA, rows, 0), name, gpus, keep=None, template=None)


@pytest.mark.parametrize(
    ("found", "sizes"),
    [
        (draft(10_000, 8), Sizes(200, 3, 4, 1, 8, 918)),
        (draft(10_000, 2), Sizes(200, 3, 4, 4, 2, 918)),
        (draft(10_000, 1, 70e9), Sizes(200, 3, 1, 32, 1, 918)),
        (draft(100_000, 64, 70e9), Sizes(200, 1, 1, 1, 64, 1559)),
        (draft(10_000, 8, 1e9), Sizes(200, 3, 4, 1, 8, 918)),
        (draft(10_000, 1, 1e9), Sizes(200, 3, 8, 4, 1, 918)),
        (draft(100, 0, 1e6), Sizes(10, 3, 5, 1, 1, 54)),
        (draft(9, 1), Sizes(0, 3, 1, 1, 1, 27)),
        (draft(4, 4), Sizes(0, 3, 1, 1, 4, 3)),
    ],
)
def test_rows_are_dealt_out(found: Draft, sizes: Sizes) -> None:
    assert sizes_of(found) == sizes
    assert sizes.global_batch <= found.data.num_rows - sizes.held_out


def test_a_negative_number_of_gpus_is_refused() -> None:
    with pytest.raises(UserError, match=r"--gpus -1: give how many GPUs will train, or 0 for the CPU"):
        sizes_of(draft(100, -1))


def test_few_rows_are_all_trained_on() -> None:
    found = draft(9, 1)
    values = read_yaml(recipe_text(found, sizes_of(found)))
    assert values["stages"] == [{"name": "new", "data": {"path": "new.jsonl"}, "epochs": 3}]


@pytest.mark.parametrize(
    "path", ["a b.jsonl", "it's, a {file}: 1 #x.jsonl", 'a"b.jsonl', "1e5", "yes", "größe.csv", "-"]
)
def test_any_path_is_read_as_it_is(path: str) -> None:
    found = draft(100, 1, path=path, name="yes")
    values = read_yaml(recipe_text(found, sizes_of(found)))
    assert values["stages"][0]["data"]["path"] == path
    assert values["stages"][0]["evaluation"]["path"] == path
    assert values["stages"][0]["name"] == "yes"
    assert json.loads(json.dumps(values))["output"] == "runs/yes"


@pytest.mark.parametrize(
    ("path", "name"), [("data/new rows.jsonl.gz", "new_rows"), ("openai/gsm8k", "gsm8k"), ("ü/.x", "rows")]
)
def test_a_stage_is_called_as_its_rows(path: str, name: str) -> None:
    assert DataFacts(path, Format.TEXT, 1, 0).name == name
