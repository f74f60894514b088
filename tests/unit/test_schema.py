"""``epi-ds schema`` allows the keys that the loader allows, and no others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from epi_ds.cli.main import app
from epi_ds.errors import UserError
from epi_ds.launch import recipes
from epi_ds.recipe.docstrings import docstrings_of
from epi_ds.recipe.document import read_yaml
from epi_ds.recipe.loading import parse_recipe
from epi_ds.recipe.lora import LoraSection
from epi_ds.recipe.models import Recipe
from epi_ds.recipe.sources import Files
from tests.support.json_schema import Schema, problems

MINIMAL = """
model: {path: somewhere}
stages: [{name: one, data: {skill: logic, rows: 8}}]
output: runs/x
"""


@pytest.fixture(scope="module")
def schema() -> Schema:
    found = CliRunner().invoke(app, ["schema"], catch_exceptions=False)
    printed: Schema = json.loads(found.stdout)
    return printed


def changed(key: str, text: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(MINIMAL)
    *parents, last = key.split(".")
    node: Any = values
    for part in parents:
        node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
    node[last] = read_yaml(text)
    return values


def is_loaded(values: dict[str, Any]) -> bool:
    try:
        parse_recipe(values, place="the recipe", files=Files.ARE_NOT_LOOKED_FOR)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("name", recipes.names())
def test_shipped_recipes_fit(schema: Schema, name: str) -> None:
    assert problems(read_yaml(recipes.text(name)), schema, root=schema) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modle", "{}"),
        ("model.pth", "x"),
        ("model.lora", "{rr: 8}"),
        ("stages.0.epoch", "2"),
        ("stages.0.data.row", "2"),
        ("stages.0.data", "[{skill: logic, rows: 2, shre: 1}]"),
        ("stages.0.evaluation", "{skill: logic, rows: 2, metrc: loss}"),
        ("method.epi.refresh_intervall", "5"),
        ("method.epi.anchor", "{strenght: 2}"),
        ("method.keep", "{self: {row: 3}}"),
        ("method.keep", "{self: true}"),
        ("method.preset", "balancd"),
        ("evaluation.task", "{}"),
        ("train.lerning_rate", "1e-5"),
        # Decided by the recipe.
        ("train.max_steps", "5"),
        ("train.learning_rate", "0"),
        ("train.learning_rate", "high"),
        ("train.adam_beta1", "1"),
        ("train.packing", "1"),
        ("train.max_length", "0"),
        ("train.lr_scheduler_type", "cosin"),
        ("train.save_strategy", "best"),
        ("train.loss_type", "chunked_nll"),
        ("train.report_to", "[tensorbord]"),
        ("train.label_names", "labels"),
        ("train.dataset_kwargs", "5"),
        ("train.deepspeed", "null"),
    ],
)
def test_what_the_loader_refuses_does_not_fit(schema: Schema, key: str, value: str) -> None:
    values = changed(key, value)
    assert problems(values, schema, root=schema) != []
    assert not is_loaded(values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.lora", "{r: 8, target_modules: all-linear, merge: false, init_lora_weights: gaussian}"),
        ("stages.0.data", "[{skill: logic, rows: 2, share: 1}, {skill: code, rows: 2, share: 2}]"),
        ("stages.0.data.split", "test"),
        ("method.keep", "{self: 5}"),
        ("method.keep", "{self: {rows: 5}}"),
        ("method.keep", "null"),
        ("method.epi.ratio", "{schedule: linear, start: 0.2, end: 0.1, steps: 10}"),
        ("method.epi.ratio", "0.5"),
        ("method.epi.refresh_interval", "adaptive"),
        ("method.epi.layer", '{one: ".*"}'),
        ("evaluation.tasks", "{chat: {skill: logic, rows: 2}}"),
        ("train.learning_rate", "1"),
        ("train.max_length", "null"),
        ("train.save_strategy", '"no"'),
        ("train.report_to", "none"),
        ("train.report_to", "[tensorboard, wandb]"),
        ("train.label_names", "[labels]"),
        ("train.include_for_metrics", "[inputs]"),
        ("train.gradient_checkpointing_kwargs", "{use_reentrant: false}"),
        ("train.deepspeed", "zero3_hpz"),
        ("train.deepspeed", "{preset: zero3_hpz, gradient_clipping: 0.5}"),
    ],
)
def test_what_the_loader_takes_fits(schema: Schema, key: str, value: str) -> None:
    values = changed(key, value)
    assert problems(values, schema, root=schema) == []
    assert is_loaded(values)


def models_below(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for one in model.__subclasses__():
        yield from models_below(one)
        if one.__module__.startswith("epi_ds."):
            yield one


def test_every_key_is_there_and_says_what_it_is(schema: Schema) -> None:
    by_name = {model.__name__: model for model in models_below(BaseModel)}
    sections = {Recipe.__name__: schema, **schema["$defs"]}
    told = [name for name in sections if name in by_name]
    assert {"Recipe", "Stage", "TrainingData", "EPIConfig", "AnchorConfig", "OwnRows", "HarnessSection"} <= set(told)
    for name in told:
        section, model = sections[name], by_name[name]
        assert section["additionalProperties"] is False
        if model is not LoraSection:
            assert section["properties"].keys() == model.model_fields.keys()
        for key, text in docstrings_of(model).items():
            # The same but for links, which lead nowhere from an editor.
            assert section["properties"][key]["description"][:20] == text[:20]
    assert "default" not in schema["properties"]["method"]
    assert schema["properties"]["train"]["properties"]["learning_rate"]["description"]
