"""A recipe is validated: everything that is wrong at once, each with its line, and what it would do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from epi_ds.cli.main import app
from epi_ds.launch import recipes
from epi_ds.recipe.document import read_document
from epi_ds.recipe.models import Recipe
from epi_ds.train.validation.findings import Finding, Kind
from epi_ds.train.validation.validate import Validation, validate
from tests.support.few_words import save_few_words
from tests.support.tables import write_lines

ROWS = [{"question": "yes", "answer": "no"}, {"question": "so", "answer": "yes"}] * 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_few_words(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the test's own to be in, with rows, and a cache for what is prepared of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EPI_DS_CACHE", str(tmp_path / "cache"))
    write_lines(tmp_path / "rows.jsonl", ROWS)


def recipe_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """32 rows in 8 steps of 4."""
    return {
        "model": {"path": str(folder)},
        "stages": [{"name": "one", "data": {"path": "rows.jsonl"}}],
        "method": {"epi": {"ratio": 0.1, "refresh_interval": 2}},
        "train": {"per_device_train_batch_size": 2},
        "output": "run",
        **changes,
    }


def validated(values: dict[str, Any] | str, *overrides: str, ranks: int = 2) -> tuple[Validation, dict[Finding, str]]:
    """What is known of a recipe, and the places of its findings."""
    path = Path("recipe.yaml")
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False))
    document = read_document(path, overrides, keys=list(Recipe.model_fields))
    found = validate(document, ranks=ranks)
    return found, {one: document.place_of(one.key) for one in found.findings}


def told(places: dict[Finding, str], kind: Kind) -> list[tuple[str, str, str]]:
    return [(place, one.key, one.text) for one, place in places.items() if one.kind is kind]


def test_five_mistakes_of_five_kinds_are_told_at_once_with_their_lines(model: Path) -> None:
    recipe = f"""\
model: {{path: {model}}}
stages:
  - name: one
    data:
      - path: rows.jsonl
        prompt: qestion
        completion: answer
    epoch: 3
method:
  epi:
    refresh_interval: 2
    exclude:
      - nothing.like.it
train:
  lerning_rate: 1e-5
  deepspeed:
    preset: zero3
    zero_optimization: {{overlap_coms: true}}
output: run
"""
    found, places = validated(recipe)
    assert not found.is_valid
    expected = [
        ("line 5", "stages.0.data.0", "rows.jsonl has no column qestion; there are question, answer"),
        ("line 8", "stages.0.epoch", "unknown key; did you mean 'epochs'?"),
        ("line 12", "method.epi.exclude", "the pattern 'nothing.like.it' matches none of the 12 trainable parameters"),
        ("line 15", "train.lerning_rate", "not an argument of SFTConfig; did you mean 'learning_rate'?"),
        (
            "line 18",
            "train.deepspeed.zero_optimization.overlap_coms",
            "unknown key; did you mean 'overlap_comm'?",
        ),
    ]
    problems = told(places, Kind.PROBLEM)
    assert [problem[:2] for problem in problems] == [one[:2] for one in expected]
    assert all(text.startswith(one[2]) for (_, _, text), one in zip(problems, expected, strict=True))
    assert told(places, Kind.UNCHECKED) == [
        ("line 1", "", "the steps of the stages: the problems with the recipe itself come first")
    ]


def test_a_whole_recipe_says_what_it_would_do(model: Path) -> None:
    stages = [
        {"name": "one", "data": {"path": "rows.jsonl"}},
        {"name": "two", "data": {"path": "rows.jsonl"}, "steps": 5},
    ]
    found, places = validated(recipe_of(model, stages=stages))
    assert places == {}
    assert found.global_batch == 4
    # A row is <|user|> yes <|end|> <|assistant|> no <|end|>.
    assert [
        (stage.num_rows, stage.num_steps, stage.num_refreshes, stage.tokens_per_step) for stage in found.stages
    ] == [
        (32, 8, 4, 24),
        (32, 5, 2, 24),
    ]
    assert found.layout is not None
    assert found.layout.layer_names == ("model.embed_tokens", "model.layers.0", "model.norm", "lm_head")
    assert found.layout.layer_numel == (112, 2208, 16, 112)
    assert found.refresh is not None
    assert found.refresh.sent_bytes > 0


@pytest.mark.parametrize(
    ("changes", "key", "text"),
    [
        (
            {"train": {"deepspeed": {"zero_optimisation": {"stage": 3}}}},
            "train.deepspeed.zero_optimisation",
            "DeepSpeed has no such top-level key and would ignore it; did you mean 'zero_optimization'?",
        ),
        (
            {"train": {"deepspeed": {"preset": "zero3", "activation_checkpointing": {"profle": True}}}},
            "train.deepspeed.activation_checkpointing.profle",
            "DeepSpeed has no such key there and would ignore it; did you mean 'profile'?",
        ),
        (
            {"train": {"deepspeed": {"preset": "zero3", "zero_optimization.offload_param.pin_memry": True}}},
            "train.deepspeed.zero_optimization.offload_param.pin_memry",
            "unknown key; did you mean 'pin_memory'?",
        ),
        (
            {"train": {"deepspeed": {"preset": "zero3", "optimizer": {"params": {"weight_decai": 0.1}}}}},
            "train.deepspeed.optimizer.params.weight_decai",
            "no Adam takes it; did you mean 'weight_decay'?",
        ),
        (
            {"train": {"deepspeed": {"preset": "zero3", "gradient_clipping": 3.0}}},
            "train.deepspeed",
            "the configuration and train differ (ds gradient_clipping=3.0 vs hf max_grad_norm=1.0)",
        ),
        ({"train": {"dataloader_prefetch_factor": 2}}, "train", "the recipe's train section is refused by"),
        (
            {"stages": [{"name": "one", "data": {"path": "rows.jsonl"}, "lr_scheduler_type": "reduce_lr_on_plateau"}]},
            "stages.0.lr_scheduler_type",
            "stage one: lr_scheduler_type reduce_lr_on_plateau depends on metrics",
        ),
        ({"train": {"packing": True, "max_length": None}}, "train.packing", "puts rows into sequences"),
        ({"train": {"max_length": 4}}, "stages.0.data", "rows.jsonl: the answers of all 32 rows lie beyond"),
        (
            {"train": {"per_device_train_batch_size": 40}},
            "stages.0",
            "stage one has 32 rows x 1 epochs, fewer than one",
        ),
        ({"method": {"epi": {"refresh_interval": 50}}}, "method.epi.refresh_interval", "the run has 8 planned steps"),
        ({"method": {"epi": {"ratio": 1e-6, "refresh_interval": 2}}}, "method.epi.ratio", "ratio 1e-06 of the covered"),
        (
            {"method": {"keep": {"data": {"path": "rows.jsonl"}, "windows": 30, "evaluation": False}}},
            "method.keep",
            "what is kept has 32 rows to measure, fewer than method.keep.windows: 30",
        ),
        ({"evaluation": {"tasks": {"chat": {"path": "away.jsonl"}}}}, "evaluation.tasks.chat", "there is no data file"),
        ({"model": {"path": "."}}, "model.path", ". cannot be loaded: Unrecognized model in ."),
    ],
)
def test_what_would_end_a_run_is_a_problem(model: Path, changes: dict[str, Any], key: str, text: str) -> None:
    train = {"per_device_train_batch_size": 2, **changes.pop("train", {})}
    _, places = validated(recipe_of(model, train=train, **changes))
    ((_, found_key, found_text),) = told(places, Kind.PROBLEM)
    assert (found_key, found_text[: len(text)]) == (key, text)


def test_rows_of_which_nothing_is_learnt_are_a_problem(model: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "yes"}, {"role": "assistant", "content": "no", "weight": 0}]
    write_lines(tmp_path / "rows.jsonl", [{"messages": turns}] * 8)
    _, places = validated(recipe_of(model, train={"assistant_only_loss": True}))
    ((_, key, text),) = told(places, Kind.PROBLEM)
    assert key == "stages.0.data"
    assert text.startswith("rows.jsonl, line 1: none of the row's turns is to be learnt, because of its weights")


@pytest.mark.parametrize(
    ("changes", "key", "text"),
    [
        (
            {
                "stages": [
                    {"name": "one", "data": {"path": "rows.jsonl"}},
                    {"name": "two", "data": {"path": "rows.jsonl"}, "steps": 1},
                ]
            },
            "stages.1",
            "stage two has 1 steps, and no refresh is due in it, every 2 steps of the run",
        ),
        ({"train": {"warmup_steps": 20}}, "train.warmup_steps", "the learning rate of stage one rises over 20 steps"),
        (
            {"train": {"deepspeed": {"preset": "zero3", "my_notes": {}}}},
            "train.deepspeed.my_notes",
            "DeepSpeed has no such top-level key, and ignores it",
        ),
        (
            {"method": {"epi": {"refresh_interval": 5}}},
            "method.epi.refresh_interval",
            "the run has 8 planned steps and its first mask acts from step 6",
        ),
        (
            {
                "method": {
                    "epi": {
                        "refresh_interval": 2,
                        "ratio": {"schedule": "linear", "start": 0.2, "end": 0.1, "steps": 100},
                    }
                }
            },
            "method.epi.ratio",
            "the schedule of the ratio arrives at its end after step 100, and the run has 8 steps",
        ),
    ],
)
def test_what_may_not_be_meant_is_a_warning(model: Path, changes: dict[str, Any], key: str, text: str) -> None:
    train = {"per_device_train_batch_size": 2, **changes.pop("train", {})}
    found, places = validated(recipe_of(model, train=train, **changes))
    assert found.is_valid
    ((_, found_key, found_text),) = told(places, Kind.WARNING)
    assert (found_key, found_text[: len(text)]) == (key, text)


def test_what_is_wrong_does_not_hide_what_is_wrong_behind_it(model: Path) -> None:
    """Pydantic looks at two values together only once each of them is right by itself."""
    stages = [
        {"name": "one", "data": {"path": "rows.jsonl"}, "epochs": "two"},
        {"name": "one", "data": {"path": "x.csv"}},
    ]
    _, places = validated(recipe_of(model, stages=stages))
    assert [problem[1:] for problem in told(places, Kind.PROBLEM)] == [
        ("stages.0.epochs", "Input should be a valid integer, unable to parse string as an integer, got 'two'"),
        ("stages.1.data", "there is no data file x.csv"),
        ("", "stage names must differ, repeated: one"),
    ]


def test_a_section_goes_with_a_value_that_it_cannot_be_without(model: Path) -> None:
    keep = {"self": {"rows": "many", "attempts": 0}, "replay": 0.5}
    found, places = validated(recipe_of(model, method={"keep": keep}))
    assert [key for _, key, _ in told(places, Kind.PROBLEM)] == ["method.keep.self.rows", "method.keep.self.attempts"]
    assert found.global_batch == 4


def test_what_a_preset_adds_is_said_with_the_problem(model: Path) -> None:
    stages = [{"name": name, "data": {"path": "rows.jsonl"}} for name in ("one", "two")]
    _, places = validated(recipe_of(model, stages=stages, train={"deepspeed": "zero3_lean"}))
    ((_, _, text),) = told(places, Kind.PROBLEM)
    assert text.startswith("under state: adam the optimizer's moments are the importance, which stage two would forget")
    assert text.endswith("(the preset in train.deepspeed adds apply: update, state: adam to method.epi)")


def test_a_missing_model_is_said_and_rows_are_read_all_the_same(model: Path) -> None:
    found, places = validated(recipe_of(model, model={"path": "no/such/folder"}))
    assert found.is_valid
    assert [key for _, key, _ in told(places, Kind.UNCHECKED)] == ["model.path", "train.max_length"]
    assert [(stage.num_steps, stage.tokens_per_step) for stage in found.stages] == [(8, None)]
    stages = [{"name": "one", "data": {"path": "rows.jsonl", "prompt": "q", "completion": "a"}}]
    _, places = validated(recipe_of(model, model={"path": "no/such/folder"}, stages=stages))
    assert [text for _, _, text in told(places, Kind.PROBLEM)] == [
        "rows.jsonl has no column q, a; there are question, answer"
    ]


@pytest.mark.parametrize("name", recipes.names())
def test_a_shipped_recipe_is_valid_and_says_what_was_not_checked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    of_user = re.findall(r"path: ([\w.]+\.jsonl)", recipes.text(name))
    for path in of_user:
        Path(path).write_text("".join(f'{{"question": "{n}?", "answer": "{n}."}}\n' for n in range(2000)))
    document = read_document(recipes.path_of(name), [], keys=list(Recipe.model_fields))
    found = validate(document, ranks=None)
    assert found.of(Kind.PROBLEM) == found.of(Kind.WARNING) == []
    unchecked = {one.key for one in found.of(Kind.UNCHECKED)}
    assert {"model.path", "train.max_length"} <= unchecked
    of_hub = [
        f"stages.{index}.data"
        for index, stage in enumerate(document.values["stages"])
        if stage["data"].get("path") not in (None, *of_user)
    ]
    assert set(of_hub) <= unchecked


# --- the command ---


def test_the_command_ends_with_2_and_the_problems_or_0_and_the_plan(model: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe_of(model), sort_keys=False))

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["validate", "recipe.yaml", "--ranks", "2", *arguments])
        return done.exit_code, done.output

    code, output = run()
    assert code == 0
    assert "recipe.yaml: no problem was found" in output
    assert "4 rows per step on 2 ranks" in output
    code, output = run("train.lerning_rate=1")
    assert code == 2
    assert "  override train.lerning_rate=1: train.lerning_rate: not an argument of SFTConfig" in output
    code, output = run("--json", "stages.0.epoch=1")
    assert code == 2
    values = json.loads(output)
    assert values["is_valid"] is False
    assert values["findings"][0] == {
        "kind": "problem",
        "key": "stages.0.epoch",
        "text": "unknown key; did you mean 'epochs'?",
        "line": None,
        "override": "stages.0.epoch=1",
    }
