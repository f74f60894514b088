"""Combinations that cannot work are named from the configurations alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from epi_ds.api import read_section
from epi_ds.combinations import combination_problems
from epi_ds.config import parse_config
from epi_ds.errors import UserError
from epi_ds.recipe.loading import load_recipe

ZERO3: dict[str, Any] = {"zero_optimization": {"stage": 3}}
ADAM = {"state": "adam", "apply": "update"}
MOMENTUM = {"policy": "momentum", "ratio": 0.9}


@pytest.mark.parametrize(
    ("ds_config", "section", "expected"),
    [
        ({}, {}, ["ZeRO stage is 0", "set zero_optimization.stage: 3"]),
        ({"zero_optimization": {"stage": 2}}, {}, ["ZeRO stage is 2"]),
        ({"zero_optimisation": {"stage": 3}}, {}, ["ZeRO stage is 0", "did you mean 'zero_optimization'"]),
        (ZERO3 | {"gradient_cliping": 1.0}, {}, ["gradient_cliping: ", "did you mean 'gradient_clipping'?"]),
        (ZERO3 | {"optimizer": {"type": "Lion"}}, {}, ["apply: reduction", "Lion", "apply: update"]),
        (ZERO3 | {"optimizer": {"type": "OneBitAdam"}}, ADAM, ["state: adam", "OneBitAdam", "state: u8"]),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            ADAM,
            ["offload_optimizer.device: nvme", "state: u8"],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            ADAM,
            ["offload_optimizer.ratio is 0.5", "offload_optimizer.ratio: 1.0"],
        ),
        (ZERO3 | {"optimizer": {"type": "Lion"}}, MOMENTUM, ["policy: momentum", "Lion", "use AdamW"]),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            MOMENTUM,
            ["offload_optimizer.device: nvme", "policy: momentum", "device: cpu"],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "${EPI_DS_NVME}"}}},
            {},
            ["offload_param.nvme_path is '${EPI_DS_NVME}'", "epi_ds.ds_config"],
        ),
    ],
)
def test_impossible_combinations_are_named(
    ds_config: dict[str, Any], section: dict[str, Any], expected: list[str]
) -> None:
    (problem,) = combination_problems(ds_config, parse_config(section))
    for text in expected:
        assert text in problem


@pytest.mark.parametrize(
    ("ds_config", "section"),
    [
        (ZERO3, {}),
        (ZERO3 | {"optimizer": {"type": "AdamW"}}, ADAM),
        (ZERO3 | {"optimizer": {"type": "Adam"}}, {}),
        (ZERO3 | {"comment": "a note", "my_own": {}, "comet": {}}, {}),
        (ZERO3 | {"optimizer": {"type": "Lion"}}, {"apply": "update"}),
        (ZERO3 | {"optimizer": "auto"}, {}),
        ({"zero_optimization": {"stage": "auto"}, "optimizer": {"type": "auto"}}, ADAM),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, {"state": "u8"}),
    ],
)
def test_possible_ones_pass(ds_config: dict[str, Any], section: dict[str, Any]) -> None:
    assert combination_problems(ds_config, parse_config(section)) == []


def test_a_section_is_read_together_with_the_rest() -> None:
    with pytest.raises(UserError, match=r"with the rest of it:\n  - optimizer\.type: apply: reduction .* Lion"):
        read_section(ZERO3 | {"epi": {}, "optimizer": {"type": "Lion"}})


def test_a_recipe_is_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: {path: nowhere}\nstages: [{name: a, data: {skill: logic, rows: 8}}]\noutput: out\n"
        "train: {deepspeed: {zero_optimization: {stage: 3}, optimizer: {type: Lion}}}\n"
    )
    with pytest.raises(UserError, match=r"train\.deepspeed\.optimizer\.type: apply: reduction .* Lion"):
        load_recipe(str(recipe))
