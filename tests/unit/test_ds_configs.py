"""The shipped DeepSpeed configurations: found by name, with changes, and accepted wherever one is given."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from deepspeed.runtime.config import DeepSpeedConfig
from torch import nn
from transformers import Trainer
from trl import SFTConfig
from typer.testing import CliRunner

import epi_ds
from epi_ds import ds_configs
from epi_ds.api import read_section
from epi_ds.cli.main import app
from epi_ds.combinations import combination_problems
from epi_ds.config import SECTION, parse_config
from epi_ds.ds_configs.keys import KNOWN, SECTIONS
from epi_ds.ds_configs.values import auto_keys
from epi_ds.errors import UserError
from epi_ds.recipe.arguments import deepspeed_config
from epi_ds.recipe.loading import load_recipe
from epi_ds.recipe.models import Recipe
from epi_ds.train.accelerate_setup import prepare_accelerate
from tests.end_to_end.test_callback import tiny_model
from tests.support.engines import train_step
from tests.support.models import OddNet, odd_batch
from tests.support.ranks import run_ranks

NVME_PATH = "zero_optimization.offload_optimizer.nvme_path"
# What a loop of one's own gives.
FILLED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "optimizer.params": {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1},
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own to be in, without a disk to swap to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EPI_DS_NVME", raising=False)
    return tmp_path


# --- what is shipped ---


@pytest.mark.parametrize("name", ds_configs.names())
def test_a_preset_is_plain_json_that_says_when_to_use_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPI_DS_NVME", "/disk")
    # As transformers reads it.
    values = json.loads(ds_configs.text(name))
    assert next(iter(values)) == "comment"
    assert values["comment"] == ds_configs.comment(name)
    assert values["comment"].startswith(("For ", "The default"))
    assert "\n" not in values["comment"]
    loaded = ds_configs.load(name)
    assert "comment" not in loaded
    assert loaded["zero_optimization"]["stage"] == 3
    assert combination_problems(loaded, parse_config(loaded.get(SECTION, {}))) == []
    # The trainer fills these, and on the CPU it has no bf16 to fill.
    expected = {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16.enabled"}
    expected |= {f"optimizer.params.{key}" for key in ("lr", "betas", "eps", "weight_decay")}
    assert set(auto_keys(loaded)) == (expected - {"bf16.enabled"} if name == "cpu" else expected)


def test_the_names_are_those_of_the_documentation() -> None:
    assert ds_configs.names() == ["cpu", "zero3", "zero3_hpz", "zero3_lean", "zero3_offload", "zero3_offload_nvme"]


# --- changes and variables ---


def test_changes_are_at_dotted_keys_and_sections_are_merged() -> None:
    assert epi_ds.ds_config is ds_configs.load
    plain = ds_configs.load("zero3_lean")
    changes = {
        "zero_optimization.stage3_max_live_parameters": 7,
        "zero_optimization": {"zero_hpz_partition_size": 4},
        "epi.ratio": 0.02,
        "aio.block_size": 4096,
        "bf16": None,
    }
    changed = ds_configs.load("zero3_lean", changes)
    assert changed["zero_optimization"] == plain["zero_optimization"] | {
        "stage3_max_live_parameters": 7,
        "zero_hpz_partition_size": 4,
    }
    assert changed["epi"] == {"apply": "update", "state": "adam", "ratio": 0.02}
    assert changed["aio"] == {"block_size": 4096}
    assert changed["bf16"] is None
    assert ds_configs.load("zero3_lean") == plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_optimization.stage.x": 3}, "zero_optimization.stage is a value in zero3, and cannot become {'x': 3}"),
        ({"bf16": {"enabled": {"x": 1}}}, "bf16.enabled is a value in zero3, and cannot become {'x': 1}"),
        ({"bf16": True}, "bf16 is a section in zero3, and cannot become True"),
        ({"zero_optimization..stage": 3}, "changes of zero3 are at dotted keys"),
    ],
)
def test_changes_that_have_no_place_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ds_configs.load("zero3", changes)


def test_a_misspelt_section_is_refused_beside_the_right_one() -> None:
    """DeepSpeed would train with the preset's own section and not say a word about the changes."""
    for changes in ({"zero_optimisation": {"stage3_max_live_parameters": 7}}, {"zero_optimisation.stage": 3}):
        with pytest.raises(UserError, match=r"zero_optimisation: .* did you mean 'zero_optimization'\?"):
            ds_configs.load("zero3", changes)
        with pytest.raises(UserError, match="did you mean 'zero_optimization'"):
            deepspeed_config({"deepspeed": {"preset": "zero3", **changes}})


class Reading(dict[str, Any]):
    """Notes which of its keys are asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> Reading:
        return self


def keys_that_deepspeed_reads() -> set[str]:
    values = Reading({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    DeepSpeedConfig(values)
    return values.asked


def keys_that_deepspeed_reads_of(section: str) -> set[str]:
    # What is given decides what else is asked for.
    given: dict[str, dict[str, Any]] = {"optimizer": {"type": "AdamW"}, "torch_autocast": {"enabled": True}}
    values = Reading(given.get(section, {}))
    DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, section: values})
    return values.asked


@pytest.mark.parametrize("section", SECTIONS)
def test_the_keys_of_a_section_that_deepspeed_does_not_check_are_those_that_it_reads(section: str) -> None:
    assert keys_that_deepspeed_reads_of(section) == SECTIONS[section]


def test_every_key_that_deepspeed_reads_is_known() -> None:
    asked = run_ranks(keys_that_deepspeed_reads, 1)[0]
    assert len(asked) > 40
    assert asked - KNOWN == set()
    assert all(set(ds_configs.read(name)) <= KNOWN for name in ds_configs.names())


def test_a_variable_is_read_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = f"{NVME_PATH} of zero3_offload_nvme .* EPI_DS_NVME, .*; export EPI_DS_NVME=/a/folder/on/a/local/disk"
    with pytest.raises(UserError, match=expected):
        ds_configs.load("zero3_offload_nvme")
    # It would be the folder that a run happens to be in.
    monkeypatch.setenv("EPI_DS_NVME", "")
    with pytest.raises(UserError, match=expected):
        ds_configs.load("zero3_offload_nvme")
    given = ds_configs.load("zero3_offload_nvme", {NVME_PATH: "/disk"})
    monkeypatch.setenv("EPI_DS_NVME", "/disk")
    assert ds_configs.load("zero3_offload_nvme") == given
    listed = ds_configs.load("zero3", {"a.b": [{"c": "${EPI_DS_NVME}/x-${EPI_DS_NVME}"}, "$EPI_DS_NVME"]})
    assert listed["a"]["b"] == [{"c": "/disk/x-/disk"}, "$EPI_DS_NVME"]


# --- files and names ---


def test_a_file_wins_over_a_name(elsewhere: Path) -> None:
    (elsewhere / "zero3_lean").mkdir()
    assert "epi" in ds_configs.load("zero3_lean")
    (elsewhere / "zero3").write_text('{"comment": "mine", "train_batch_size": 8} # as DeepSpeed reads it')
    assert ds_configs.load("zero3") == {"train_batch_size": 8}
    assert not ds_configs.is_shipped("zero3")
    assert ds_configs.load(elsewhere / "zero3", {"train_batch_size": 4}) == {"train_batch_size": 4}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": ', "mine.json cannot be read as a DeepSpeed configuration"),
        (
            '{"bf16": {"a": 1, "a": 2}}',
            "mine.json cannot be read as a DeepSpeed configuration: keys are given twice: a",
        ),
        ("[1]", "mine.json must hold a mapping"),
    ],
)
def test_a_file_that_holds_no_configuration_is_named(elsewhere: Path, content: str, message: str) -> None:
    (elsewhere / "mine.json").write_text(content)
    with pytest.raises(UserError, match=message):
        ds_configs.load("mine.json")


def test_asking_for_a_preset_loads_nothing_heavy() -> None:
    script = (
        "import epi_ds, sys; epi_ds.ds_config('zero3'); "
        "print([m for m in ('transformers', 'trl', 'datasets', 'deepspeed') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


# --- loops of one's own ---


def encoded(values: dict[str, Any]) -> str:
    """A configuration in the form that launchers pass on."""
    return base64.urlsafe_b64encode(json.dumps(values).encode()).decode()


LEAN = ds_configs.load("zero3_lean")
# Values of their own that happen to be ``auto``.
OWN = {"epi": {**LEAN["epi"], "exchange": "auto"}, "data_types": {"keep_in_fp32_modules": "auto"}}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"config": "zero3_lean"}, '"zero3_lean"'),
        ({"config_params": "zero3_lean"}, '"zero3_lean"'),
        ({"args": SimpleNamespace(deepspeed_config="zero3_lean")}, '"zero3_lean"'),
        ({"config": "mine.json"}, '"mine.json"'),
        ({"config": Path("mine.json")}, '"mine.json"'),
        ({"config": LEAN | OWN}, "NAME"),
        ({"config": encoded(LEAN)}, "NAME"),
    ],
)
def test_values_that_a_trainer_would_fill_are_asked_for(elsewhere: Path, given: dict[str, Any], name: str) -> None:
    ds_configs.copy("zero3_lean", elsewhere / "mine.json")
    with pytest.raises(UserError) as raised:
        epi_ds.initialize(model=nn.Linear(2, 2), **given)
    _, found, remedy = str(raised.value).partition(f"config=epi_ds.ds_config({name}, {{\n")
    assert found
    assert re.findall(r'^    "(\S+)": \.\.\.,$', remedy, re.MULTILINE) == list(auto_keys(LEAN))


def test_a_name_that_is_none_is_explained() -> None:
    with pytest.raises(UserError, match=r"neither a file, .*\(cpu, zero3, .*nor .*base64; did you mean 'zero3_lean'\?"):
        epi_ds.initialize(model=nn.Linear(2, 2), config="zero3_lena")
    # Too long for a path, and what it holds is read.
    with pytest.raises(UserError, match='"epi" section of ds_config is missing'):
        read_section(encoded({"long": "x" * 10_000}))
    with pytest.raises(UserError, match='"epi" section of zero3 is missing'):
        read_section("zero3")


def train_from_files(folder: str) -> None:
    """Engines of a file, given in each of the ways that `deepspeed.initialize` knows."""
    path = Path(folder) / "mine.json"
    values = ds_configs.load("cpu", FILLED | {"epi": {"ratio": 0.2, "refresh_interval": 1}})
    written = values | {"comment": "mine", "tensorboard": {"output_path": "${EPI_DS_TEST}/board"}}
    path.write_text(json.dumps(written) + "# and a comment")
    namespace = SimpleNamespace(deepspeed_config=str(path), local_rank=-1)
    os.environ["EPI_DS_TEST"] = folder
    for given in ({"config": str(path)}, {"config_params": path}, {"args": namespace}):
        engine, *_ = epi_ds.initialize(model=OddNet(), **given)
        # What was checked is what DeepSpeed has.
        assert engine._config._param_dict == values | {"tensorboard": {"output_path": f"{folder}/board"}}
        for step in range(2):
            train_step(engine, step, odd_batch)
        assert engine.epi.stats().achieved_ratio > 0.1
        engine.destroy()
    del os.environ["EPI_DS_TEST"]
    # Arguments are as they were, but for what DeepSpeed sets.
    assert vars(namespace) == {"deepspeed_config": str(path), "local_rank": 0}


@pytest.mark.zero3
def test_deepspeed_gets_what_was_read(elsewhere: Path) -> None:
    run_ranks(train_from_files, 1, str(elsewhere))


def train_with_trainer(folder: str) -> None:
    """The trainer fills what is ``auto``, and the callback reads the section of the same configuration."""
    config = epi_ds.ds_config("zero3_lean", {"epi.ratio": 0.2, "epi.refresh_interval": 1})
    # Of other trainers in this process.
    AcceleratorState._reset_state()
    args = SFTConfig(
        output_dir=folder,
        max_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        deepspeed=config,
        **prepare_accelerate(),
    )
    rows = [{"input_ids": [row % 17] * 6, "labels": [row % 17] * 6} for row in range(16)]
    isolation = epi_ds.EPICallback()
    Trainer(args=args, model=tiny_model(), train_dataset=rows, callbacks=[isolation]).train()
    assert isolation.epi.config == parse_config(config["epi"])
    assert isolation.epi.stats().achieved_ratio > 0.1


@pytest.mark.zero3
def test_a_trainer_takes_a_preset(elsewhere: Path) -> None:
    run_ranks(train_with_trainer, 1, str(elsewhere))


# --- recipes ---


def recipe_of(folder: Path, *overrides: str, stages: int = 1, **values: Any) -> Recipe:
    names = [{"name": f"s{index}", "data": {"skill": "logic", "rows": 8}} for index in range(stages)]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": {"path": "m"}, "stages": names, "output": "o", **values}))
    return load_recipe(str(path), overrides)


def test_a_recipe_changes_a_preset(elsewhere: Path) -> None:
    expected = ds_configs.load("zero3_hpz", {"zero_optimization.zero_hpz_partition_size": 4})
    changed = {"preset": "zero3_hpz", "zero_optimization": {"zero_hpz_partition_size": 4}}
    for recipe in (
        recipe_of(elsewhere, train={"deepspeed": changed}),
        recipe_of(
            elsewhere,
            "train.deepspeed.preset=zero3_hpz",
            "train.deepspeed.zero_optimization.zero_hpz_partition_size=4",
        ),
    ):
        assert deepspeed_config(recipe.train) == expected
    assert deepspeed_config(recipe_of(elsewhere).train) == ds_configs.load("zero3")
    ds_configs.copy("zero3_hpz", elsewhere / "mine.json")
    of_a_file = recipe_of(elsewhere, train={"deepspeed": {**changed, "preset": "mine.json"}})
    assert deepspeed_config(of_a_file.train) == expected


@pytest.mark.parametrize("deepspeed", ["zero3_lean", {"preset": "zero3_lean", "gradient_clipping": 0.5}])
def test_the_section_of_a_preset_is_what_a_recipe_begins_from(elsewhere: Path, deepspeed: Any) -> None:
    recipe = recipe_of(elsewhere, "method.epi.ratio=0.05", train={"deepspeed": deepspeed})
    assert recipe.method.epi == parse_config({"apply": "update", "state": "adam", "ratio": 0.05})
    assert "epi" not in deepspeed_config(recipe.train)
    # Keys of the recipe win.
    recipe = recipe_of(elsewhere, train={"deepspeed": deepspeed}, method={"epi": {"state": "u8"}})
    assert recipe.method.epi == parse_config({"apply": "update", "state": "u8"})


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({"stages": 2}, ["state: adam the optimizer's moments are the importance", "set moments: carry there"]),
        ({"method": {"epi": {"ema_decay": 0.9}}}, ["preset adds apply: update, state: adam:", "ema_decay would be"]),
        ({"method": {"epi": 3}}, ["method.epi: "]),
        ({"train": {"deepspeed": "mine.json"}}, ["train.deepspeed.epi: ", "a recipe has method.epi"]),
        ({"train": {"deepspeed": {"preset": "mine.json"}}}, ["train.deepspeed.epi: ", "a recipe has method.epi"]),
        (
            {"train": {"deepspeed": {"preset": "zero3_lean", "epi": {"ratio": 0.2}}}},
            ["train.deepspeed.epi: ", "a recipe has method.epi"],
        ),
        (
            {"train": {"deepspeed": {"preset": "zero3_lean", "epi.ratio": 0.2}}},
            ["train.deepspeed.epi: ", "a recipe has method.epi"],
        ),
        ({"train": {"deepspeed": {"preset": "zero3_lena"}}}, ["train.deepspeed: ", "did you mean 'zero3_lean'?"]),
        ({"train": {"deepspeed": "zero3_offload_nvme"}}, ["train.deepspeed: ", "export EPI_DS_NVME="]),
        (
            {"train": {"deepspeed": {"preset": "zero3_lean", "zero_optimization": {"stage": 2}}}},
            ["train.deepspeed.zero_optimization.stage: ZeRO stage is 2"],
        ),
    ],
)
def test_a_preset_that_cannot_be_is_explained(elsewhere: Path, values: dict[str, Any], messages: list[str]) -> None:
    ds_configs.copy("zero3_lean", elsewhere / "mine.json")
    with pytest.raises(UserError) as raised:
        recipe_of(elsewhere, **{"train": {"deepspeed": "zero3_lean"}, **values})
    for message in messages:
        assert message in str(raised.value)


# --- the command ---


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["configs", *arguments], catch_exceptions=True)


def test_the_command_lists_prints_and_copies(elsewhere: Path) -> None:
    listed = run("list").output.splitlines()
    assert [line.split(maxsplit=1) for line in listed] == [[n, ds_configs.comment(n)] for n in ds_configs.names()]
    shipped = Path(ds_configs.__file__).with_name("zero3_lean.json").read_text()
    assert run("cat", "zero3_lean").output == shipped
    (elsewhere / "folder").mkdir()
    for arguments, written in (
        (["zero3_lean"], "zero3_lean.json"),
        (["zero3_lean", "mine.json"], "mine.json"),
        (["zero3_lean", "folder"], "folder/zero3_lean.json"),
    ):
        assert run("cp", *arguments).output == f"written {written}\n"
        assert (elsewhere / written).read_text() == shipped


def test_the_command_overwrites_nothing(elsewhere: Path) -> None:
    (elsewhere / "zero3.json").write_text("{}")
    refused = run("cp", "zero3").exception
    assert isinstance(refused, UserError)
    assert str(refused) == "zero3.json exists, and is not overwritten; remove it, or give another TARGET"
    assert (elsewhere / "zero3.json").read_text() == "{}"
    for command in ("cat", "cp"):
        unknown = run(command, "zero3_lena").exception
        assert isinstance(unknown, UserError)
        assert "did you mean 'zero3_lean'?" in str(unknown)
    assert sorted(path.name for path in elsewhere.iterdir()) == ["zero3.json"]
