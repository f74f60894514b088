from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from epi_ds import ds_configs
from epi_ds.cli.main import app
from epi_ds.errors import UserError
from epi_ds.launch import recipes
from epi_ds.recipe.advice import advice_on
from epi_ds.recipe.loading import load_recipe, parse_recipe
from epi_ds.recipe.presets import Preset

MINIMAL: dict[str, Any] = {
    "model": {"path": "somewhere"},
    "stages": [{"name": "one", "data": {"skill": "logic", "rows": 8}}],
    "output": "runs/x",
}


def write(folder: Path, recipe: dict[str, Any]) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def put_files_of(recipe: str) -> None:
    """Put the files of the user's own that a shipped recipe names where it looks for them."""
    for path in re.findall(r"path: ([\w.]+\.jsonl)", recipe):
        Path(path).touch()


@pytest.mark.parametrize("name", recipes.names())
def test_shipped_recipes_are_valid_and_say_what_they_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put_files_of(recipes.text(name))
    load_recipe(name)
    assert recipes.comment(name).startswith("For ")
    assert recipes.comment(name).endswith(".")
    head = recipes.text(name).partition("\nmodel:")[0]
    assert "\n# Needs " in head
    assert re.search(r"\bcosts\b", head)


def recipes_command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["recipes", *arguments])


def test_shipped_recipes_are_listed_with_what_they_are_for() -> None:
    listed = recipes_command("list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == recipes.names()
    assert listed[recipes.names().index("paper")].endswith(recipes.comment("paper"))
    assert recipes_command().stdout.splitlines() == listed


def test_a_copied_recipe_is_the_shipped_one_and_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipes_command("cat", "paper").stdout == recipes.text("paper")
    for target, path in ((), "paper.yaml"), (("mine.yaml",), "mine.yaml"), (("folder",), "folder/paper.yaml"):
        Path("folder").mkdir(exist_ok=True)
        assert recipes_command("cp", "paper", *target).stdout == f"written {path}\n"
        assert Path(path).read_text() == recipes.text("paper")
        Path(path).write_text("mine")
        refused = recipes_command("cp", "paper", *target).exception
        assert isinstance(refused, UserError)
        assert str(refused) == f"{path} exists, and is not overwritten; remove it, or give another TARGET"
        assert Path(path).read_text() == "mine"
    refused = recipes_command("cp", "paper", "nowhere/mine.yaml").exception
    assert str(refused) == "there is no folder nowhere; make it, or give another TARGET"
    assert "none of the shipped recipes" in str(recipes_command("cat", "papr").exception)
    assert "did you mean 'paper'?" in str(recipes_command("cp", "papr").exception)


def test_overrides_reach_every_depth(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, MINIMAL),
        [
            "train.learning_rate=1e-5",
            "stages.0.epochs=3",
            "stages.one.data.rows=9",
            "method.epi.ratio=0.05",
            "ranks=2",
        ],
    )
    assert recipe.train["learning_rate"] == 1e-5
    assert recipe.stages[0].epochs == 3
    assert recipe.stages[0].data.rows == 9
    assert recipe.method.epi.ratio == 0.05
    assert recipe.ranks == 2


def test_a_number_in_scientific_notation_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {path: m}\nstages: [{name: a, data: {skill: logic, rows: 8}, learning_rate: 1e-5}]\noutput: o\n"
    )
    assert load_recipe(str(path)).stages[0].learning_rate == 1e-5


def test_every_mistake_is_named_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    wrong = {
        **MINIMAL,
        "modle": 1,
        "stages": [{"name": "a", "data": {"skill": "lgic", "rows": 8}}, {"name": "b", "data": {"rows": 3}}],
        "method": {"epi": {"refresh_intervall": 3}},
        "train": {"lerning_rate": 1, "max_steps": 3},
    }
    with pytest.raises(ValueError, match="6 problems in the recipe") as raised:
        load_recipe(write(tmp_path, wrong))
    for text in (
        "modle: unknown key; did you mean 'model'?",
        "there is no skill 'lgic'; did you mean 'logic'?",
        "stages.1.data: give one of skill, path and glob",
        "method.epi.refresh_intervall: unknown key; did you mean 'refresh_interval'?",
        "train.lerning_rate: not an argument of SFTConfig; did you mean 'learning_rate'?",
        "train.max_steps: decided by the recipe; set stages[].steps",
    ):
        assert text in str(raised.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nonsense", "must have the form key=value"),
        ("stages.7.epochs=2", "'7' is not one of the 1 items here (one)"),
        ("output.x=2", "'output' is a value, not a section"),
        ("stages.0.data.prompt=question", "skill logic has conversations, so prompt would be ignored"),
        ("stages.0.data={path: a.jsonl, prompt: q}", "prompt and completion name two columns"),
        ("stages.0.data={path: a.jsonl, messages: m, prompt: q, completion: a}", "not both"),
        ("stages.0.data.split=dev", "train or test"),
        ("stages.0.data={skill: logic}", "rows must say how many"),
        ("stages.0.data={path: a.jsonl, prompt: q, completion: a}", "there is no data file a.jsonl"),
        ("method.probe={skill: code, rows: 4}", "policy: static with probe_steps only"),
        ("method.keep={}", "there is nothing to keep; give data (rows), self"),
        ("method.keep={self: many}", "method.keep.self: must be a number of rows, or a mapping such as"),
        ("method.keep={self: {rows: 4, file: own.json}}", "the name ends with .jsonl; got 'own.json'"),
        ("method.keep={self: 4, importance: false, evaluation: false}", "nothing would be done with what is kept"),
        ("method.keep={self: 4, importance: false, windows: 2}", "windows says how much importance is measured on"),
        ("method.keep={self: 4, replay_loss: token}", "replay_loss says how rows are replayed, and replay is 0"),
        ("method.keep={self: 4, replay: 1}", "method.keep.replay: Input should be less than 1, got 1"),
        ("method.keep={self: 4, data: [{skill: code, rows: 4, share: 1}]}", "share is of several sources"),
        ("method={keep: {self: 4}, epi: {memory: none}}", "set method.epi.memory: stage_max or per_task"),
        ("method={keep: {self: 4}, epi: {policy: static, probe_steps: 2}}", "probe_steps and memory both say"),
        ("method={epi: {policy: none, memory: stage_max}}", "memory has nothing to remember: policy: none"),
        ("stages.0.lr_scheduler_type=cosinus", "'cosinus' is no schedule; did you mean 'cosine'?"),
        ("train.lr_scheduler_type=cosinus", "'cosinus' is no schedule; did you mean 'cosine'?"),
        ("train.learning_rate=fast", "train.learning_rate: must be float, got 'fast'"),
        ("train.gradient_accumulation_steps=0", "train.gradient_accumulation_steps: must be at least 1, got 0"),
        ("train.learning_rate=0", "train.learning_rate: must be above 0, got 0"),
        ("train.seed=-1", "train.seed: must be at least 0 and below 4294967296, got -1"),
        ("train.max_length=0", "train.max_length: must be at least 1, got 0"),
        ("train.weight_decay=-0.1", "train.weight_decay: must be at least 0, got -0.1"),
        ("train.adam_beta1=1.0", "train.adam_beta1: must be at least 0 and below 1, got 1.0"),
        ("train.save_strategy=best", "train.save_strategy: must be 'no', 'steps' or 'epoch', got 'best'"),
        ("train.save_strategy=no", "train.save_strategy: must be 'no', 'steps' or 'epoch', got False; YAML reads"),
        ("train.metric_for_best_model=loss", "train.metric_for_best_model: decided by the recipe; set nothing: the"),
        ("train.eval_steps=10", "train.eval_steps: decided by the recipe; set evaluation.every"),
        ("train.report_to=[wandbb]", "train.report_to: 'wandbb' is no tracker; did you mean 'wandb'?"),
        ("train.packing_strategy=best", "train.packing_strategy: must be 'bfd', 'bfd_split' or 'wrapped', got 'best'"),
        ("evaluation.rows=0", "evaluation.rows: Input should be greater than or equal to 1, got 0"),
        ("evaluation.every=0", "evaluation.every: Input should be greater than or equal to 1, got 0"),
        ("method.epi.ratio=-0.1", "method.epi.ratio: "),
        ("stages.0.steps=0", "stages.0.steps: Input should be greater than or equal to 1, got 0"),
        ("stages.0.data.share=0.5", "share is of several sources: give all of them one, or none"),
        ("stages.0.data.rows=maybe", "stages.0.data.rows: Input should be a valid integer"),
        ("train.bf16=maybe", "train.bf16: must be bool or null, got 'maybe'"),
        ("train.gradient_accumulation_steps='4'", "train.gradient_accumulation_steps: must be int, got '4'"),
        ("train.save_only_model=true", "without optimizer and importance no run can continue"),
        ("train.loss_type=chunked_nll", "train.loss_type: 'chunked_nll' is TRL's old name of nll"),
        ("train.loss_type=dtf", "none of the losses that were tried under ZeRO-3: nll, dft; did you mean 'dft'?"),
        ("train.optim=adafactor", "set optimizer in the DeepSpeed configuration"),
        ("train.dataset_kwargs={skip_prepare_dataset: true}", "would train the first stage only"),
        ("train.deepspeed=zero4x", "neither a JSON file nor one of the shipped configurations"),
        ("train.deepspeed={scheduler: {type: WarmupLR}}", "would replace the schedules of the stages"),
        ("train.deepspeed={epi: {ratio: 0.1}}", "a recipe has method.epi"),
    ],
)
def test_mistaken_overrides_are_explained(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"override|problem") as raised:
        load_recipe(write(tmp_path, MINIMAL), [override])
    assert message in str(raised.value)


def test_stage_names_must_differ(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage names must differ, repeated: one"):
        load_recipe(write(tmp_path, {**MINIMAL, "stages": MINIMAL["stages"] * 2}))


@pytest.mark.parametrize(
    ("method", "memory", "protects"),
    [
        ({"keep": {"self": 4}}, "stage_max", "past"),
        ({"keep": {"self": {"rows": 4}}, "epi": {"policy": "none"}}, "stage_max", "past"),
        ({"keep": {"self": 4}, "epi": {"policy": "static"}}, "stage_max", "past"),
        ({"keep": {"self": 4}, "epi": {"memory": "per_task"}}, "per_task", "past"),
        ({"keep": {"self": 4}, "epi": {"protects": "past_and_present"}}, "stage_max", "past_and_present"),
        ({"keep": {"self": 4, "importance": False}}, "none", "past_and_present"),
        ({}, "none", "past_and_present"),
    ],
)
def test_what_is_kept_is_remembered_and_protected(
    tmp_path: Path, method: dict[str, Any], memory: str, protects: str
) -> None:
    epi = load_recipe(write(tmp_path, {**MINIMAL, "method": method})).method.epi
    assert (epi.memory, epi.protects) == (memory, protects)


def test_kept_rows_are_given_or_written_or_both(tmp_path: Path) -> None:
    data = [{"skill": "logic", "rows": 8}, {"skill": "code", "rows": 4}]
    method = {"keep": {"data": data, "self": {"rows": 16, "temperature": 0.7}}}
    keep = load_recipe(write(tmp_path, {**MINIMAL, "method": method})).method.keep
    assert keep is not None
    assert [source.label for source in keep.sources] == ["logic", "code"]
    assert keep.self is not None
    assert (keep.self.rows, keep.self.temperature, keep.self.top_p) == (16, 0.7, 1.0)


def test_a_stage_may_be_called_base_where_nothing_is_kept(tmp_path: Path) -> None:
    recipe = {**MINIMAL, "stages": [{**MINIMAL["stages"][0], "name": "base"}]}
    load_recipe(write(tmp_path, recipe))
    with pytest.raises(ValueError, match=r"a stage is called base, which is what method.keep remembers"):
        load_recipe(write(tmp_path, {**recipe, "method": {"keep": {"self": 4}}}))


def test_unknown_recipes_and_configurations_name_what_there_is() -> None:
    with pytest.raises(ValueError, match="did you mean 'demo'"):
        load_recipe("dmeo")
    with pytest.raises(ValueError, match=r"there is no recipe file missing.yaml"):
        load_recipe("missing.yaml")
    with pytest.raises(ValueError, match="did you mean 'zero3'"):
        ds_configs.load("zero4x")


LORA = "model.lora={r: 4, target_modules: [q_proj]"


# Importing PEFT takes seconds.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{LORA}, lora_alpah: 8}}", "model.lora.lora_alpah: not a key of LoraConfig; did you mean 'lora_alpha'?"),
        (f"{LORA}, task_type: CAUSAL_LM}}", "model.lora.task_type: decided by the recipe"),
        (f"{LORA}, use_dora: true}}", "model.lora.use_dora: takes whole weights"),
        (f"{LORA}, init_lora_weights: pissa}}", "set true, false or gaussian"),
        (f"{LORA}, merge: maybe}}", "model.lora.merge: Input should be a valid boolean"),
        ("model.lora={layers_to_transform: [1], target_modules: '.*q'}", "model.lora: "),
    ],
)
def test_an_adapter_that_cannot_be_made_is_refused_before_ranks_start(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match="1 problem in") as raised:
        load_recipe(write(tmp_path, MINIMAL), [override])
    assert message in str(raised.value)


def test_an_adapter_without_peft_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else object())
    with pytest.raises(ValueError, match=r"model\.lora: needs peft, which is not installed here: pip install"):
        load_recipe(write(tmp_path, MINIMAL), [f"{LORA}}}"])


@pytest.mark.parametrize("name", list(Preset))
def test_a_preset_is_a_recipe_and_every_key_of_it_can_be_given_otherwise(name: Preset) -> None:
    method = parse_recipe({**MINIMAL, "method": {"preset": name.value}}, place="the recipe").method
    assert method.preset is name
    assert (method.keep is not None) == (name in (Preset.BALANCED, Preset.STRONG))
    given: dict[str, Any] = {"preset": name.value, "epi": {"seed": 7}}
    if method.epi.anchor is not None:
        given["epi"]["anchor"] = {"strength": 1}
    changed = parse_recipe({**MINIMAL, "method": given}, place="the recipe").method
    expected = method.epi.model_dump(mode="json") | {"seed": 7}
    if method.epi.anchor is not None:
        # What is given beside it stays.
        expected["anchor"] |= {"strength": 1.0}
    assert changed.epi.model_dump(mode="json") == expected
    assert changed.keep == method.keep


def test_what_a_preset_sets_for_the_sake_of_another_setting_goes_with_it() -> None:
    def method_of(preset: str, **given: Any) -> Any:
        return parse_recipe({**MINIMAL, "method": {"preset": preset, **given}}, place="the recipe").method

    anchor = method_of("balanced", epi={"anchor": {"decay": 10}}).epi.anchor
    assert (anchor.strength, anchor.decay, anchor.to) == (None, 10, "stage")
    half = method_of("strong", epi={"policy": "half"})
    assert (half.epi.ratio, half.epi.anchor.weight, half.keep.replay) == (0.5, "importance", 0.1)
    for keep in (None, {"importance": False}):
        found = method_of("strong", keep=keep).epi
        assert (found.memory, found.protects, found.anchor.weight) == ("none", "past_and_present", "uniform")
        assert (found.ratio, found.anchor.strength) == (0.05, 4)


def advice(method: dict[str, Any], stages: int = 1) -> list[str]:
    several = [{**MINIMAL["stages"][0], "name": f"s{number}"} for number in range(stages)]
    return list(map(str, advice_on(parse_recipe({**MINIMAL, "stages": several, "method": method}, place="the recipe"))))


def test_a_folder_that_is_pulled_towards_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def told(to: str, **changes: Any) -> str:
        method = {"epi": {"policy": "none", "anchor": {"strength": 2, "to": to}}}
        with pytest.raises(UserError) as raised:
            parse_recipe({**MINIMAL, **changes, "method": method}, place="the recipe")
        return str(raised.value)

    assert "method.epi.anchor.to: there is no folder stages; did you mean 'stage'?" in told("stages")
    (tmp_path / "base").mkdir()
    lora = {"model": {**MINIMAL["model"], "lora": {"r": 4}}}
    assert "base holds no adapter, which is all that model.lora trains; set it to stage" in told("base", **lora)
    method = {"epi": {"policy": "none", "anchor": {"strength": 2, "to": "base"}}}
    assert parse_recipe({**MINIMAL, "method": method}, place="the recipe").method.epi.anchor is not None


def test_what_few_people_mean_is_told() -> None:
    anchor = {"epi": {"policy": "none", "anchor": {"strength": 2}}}
    assert not advice(anchor)
    (told,) = advice(anchor, stages=2)
    assert "a later stage undoes what an earlier one learnt, and leaves 14% of it" in told
    for preset in Preset:
        assert not advice({"preset": preset.value}, stages=2)
    kept = {"keep": {"self": 64, "replay": 0.05}, "epi": {"policy": "none"}}
    (told,) = advice(kept)
    assert "nothing asks for it: policy: none isolates nothing by importance" in told
    weighed = {"policy": "random", "ratio": 0.2, "anchor": {"strength": 2, "weight": "importance"}}
    assert not advice({**kept, "epi": weighed})
    assert not advice({**kept, "epi": {"ratio": 0.2, "refresh_interval": 5}})


def test_a_section_of_a_preset_can_be_left_out_and_an_unknown_one_is_named() -> None:
    method = {"preset": "balanced", "keep": None}
    assert parse_recipe({**MINIMAL, "method": method}, place="the recipe").method.keep is None
    with pytest.raises(UserError, match="'paper', 'balanced', 'strong' or 'data_free'"):
        parse_recipe({**MINIMAL, "method": {"preset": "strongest"}}, place="the recipe")
