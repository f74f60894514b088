from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from pydantic import ValidationError

from epi_ds.choices import PolicyName, Selection
from epi_ds.config import EPIConfig, parse_config


def test_defaults_are_the_papers() -> None:
    config = parse_config({})
    assert (config.ratio, config.refresh_interval, config.ema_decay) == (0.01, 500, 0.99)
    assert config.policy is PolicyName.EVOLVING


def test_every_field_is_documented() -> None:
    import ast
    import inspect

    (tree,) = ast.parse(inspect.getsource(EPIConfig)).body
    body = tree.body
    for node, following in pairwise(body):
        if isinstance(node, ast.AnnAssign):
            assert isinstance(following, ast.Expr), f"{ast.unparse(node.target)} has no docstring"


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"ratio": 1.0}, ["ratio: must be a number in [0, 1)", "got 1.0"]),
        ({"ratio": -0.1}, ["ratio: must be a number in [0, 1)", "got -0.1"]),
        ({"ratio": "1%"}, ["ratio: must be a number in [0, 1)", "schedule", "got '1%'"]),
        ({"ratio": {"schedule": "linear", "start": 0.2, "end": 1.5}}, ["ratio: end", "less than 1", "steps"]),
        ({"ratio": "adaptive", "coverage": 1.0}, ["coverage", "less than 1"]),
        ({"max_ratio": 0.1}, ["max_ratio belongs to ratio: adaptive", "remove it"]),
        ({"check_interval": 5}, ["check_interval belongs to refresh_interval: adaptive", "remove it"]),
        ({"memory": "per_task", "selection": "per_layer", "exchange": "reduce_scatter"}, ["per_task", "all_reduce"]),
        ({"memory": "per_task", "state": "adam", "apply": "update"}, ["memory", "state: u8"]),
        ({"ratio": "adaptive", "policy": "none"}, ["ratio: adaptive selects masks", "policy: none"]),
        ({"refresh_interval": 2.5}, ["refresh_interval: must be a whole number", "adaptive", "2.5"]),
        ({"hysteresis": 0.3}, ["hysteresis: must be a power of two", "0.3"]),
        ({"hysteresis": 2.0}, ["hysteresis: must be a power of two", "2.0"]),
        ({"hysteresis": 2.0**-130}, ["hysteresis: must be a power of two", "at least 2^-20"]),
        ({"policy": "none", "warmup_steps": 5}, ["warmup_steps is about masks", "policy: none"]),
        (
            {"policy": "none", "ratio": {"schedule": "linear", "start": 0, "end": 0.2, "steps": 9}},
            ["schedule of ratio", "policy: none"],
        ),
        ({"protects": "past"}, ["protects belongs to memory, and would be ignored", "remove it"]),
        ({"memory": "stage_max", "policy": "static", "probe_steps": 2}, ["probe_steps and memory", "remember()"]),
        ({"warmup_steps": -1}, ["warmup_steps", "greater than or equal to 0"]),
        ({"state": "u4"}, ["state", "'fp32', 'bf16', 'u16', 'u8' or 'adam'", "'u4'"]),
        ({"state": "adam"}, ["state: adam", "set apply: update, or another state"]),
        ({"state": "adam", "apply": "update", "ema_decay": 0.9}, ["ema_decay would be ignored", "beta2"]),
        ({"state": "adam", "apply": "update", "policy": "static", "probe_steps": 1}, ["probe_steps", "another state"]),
        ({"ratio": float("nan")}, ["ratio"]),
        ({"ema_decay": 1.0}, ["ema_decay", "less than 1"]),
        ({"refresh_interval": 0}, ["refresh_interval", "greater than or equal to 1"]),
        ({"selection": "global"}, ["selection", "normalized_global", "per_layer", "raw_global", "'global'"]),
        ({"normalizer": "rank"}, ["normalizer", "selection: per_layer"]),
        ({"selection": "per_layer", "normalizer": "mean"}, ["normalizer", "selection", "per_layer", "remove it"]),
        ({"selection": "raw_global", "normalizer": "minmax"}, ["normalizer", "selection", "raw_global", "remove it"]),
        (
            {"memory": "stage_max", "selection": "per_layer", "exchange": "reduce_scatter"},
            ["stage_max", "mean to take"],
        ),
        ({"exchange": "reduce_scatter"}, ["exchange: reduce_scatter", "normalized_global", "nothing to scatter"]),
        ({"exchange": "reduce_scatter", "selection": "raw_global"}, ["raw_global", "set exchange: all_reduce"]),
        ({"policy": "static"}, ["exactly one source", "mask_from or probe_steps", "none"]),
        ({"policy": "static", "mask_from": "a", "probe_steps": 2}, ["mask_from and probe_steps"]),
        ({"probe_steps": 2}, ["probe_steps belongs to policy: static", "evolving"]),
        ({"redraw": "stage"}, ["redraw belongs to policy: random", "policy: evolving"]),
        ({"policy": "random", "redraw": "epoch"}, ["redraw", "'never', 'stage' or 'refresh'", "'epoch'"]),
        ({"policy": "random", "selection": "normalized_global"}, ["normalises importance", "selection: raw_global"]),
        ({"policy": "random", "refresh_interval": 5}, ["refresh_interval would be ignored", "set redraw: refresh"]),
        ({"policy": "random", "state": "adam", "apply": "update"}, ["state: adam", "policy: random measures none"]),
        ({"policy": "random", "ema_decay": 0.9}, ["ema_decay is about importance", "policy: random"]),
        ({"policy": "random", "hysteresis": 0.5}, ["hysteresis is about masks", "policy: random"]),
        (
            {
                "policy": "random",
                "redraw": "stage",
                "ratio": {"schedule": "linear", "start": 0, "end": 0.2, "steps": 9},
            },
            ["schedule of ratio", "policy: random"],
        ),
        ({"policy": "first", "ratio": "adaptive"}, ["ratio: adaptive", "policy: first"]),
        ({"policy": "inverted", "ratio": "adaptive"}, ["ratio: adaptive", "policy: inverted"]),
        ({"policy": "inverted", "memory": "per_task"}, ["memory: per_task", "set memory: stage_max"]),
        ({"anchor": {}}, ["anchor needs strength or decay, and neither is given"]),
        ({"anchor": {"strength": 1, "decay": 1}}, ["anchor needs strength or decay, and both are given"]),
        ({"anchor": {"strength": 1, "device": "disk"}}, ["anchor.to is run", "or another device"]),
        ({"anchor": {"strength": 1, "device": "disk", "to": "stage"}}, ["anchor.to is stage"]),
        ({"anchor": {"strength": 1, "weight": "importance"}}, ["weight: importance", "memory"]),
        (
            {"anchor": {"strength": 1, "pull": "gradient"}, "state": "adam", "apply": "update"},
            ["pull: gradient", "state: adam"],
        ),
        ({"policy": "momentum"}, ["policy: momentum needs ratio", "0.85 moves the 15 %"]),
        ({"policy": "momentum", "ratio": 0.9, "apply": "reduction"}, ["momenta of Adam", "set apply: update"]),
        ({"policy": "momentum", "ratio": 0.9, "layer": "block"}, ["of each tensor", "layer: tensor"]),
        ({"policy": "half", "ratio": 0.3}, ["half of the matrices", "ratio is 0.3"]),
        ({"policy": "half", "selection": "per_layer"}, ["selection: per_layer would be ignored", "remove it"]),
        ({"policy": "half", "refresh_interval": 5}, ["refresh_interval would be ignored by policy: half"]),
        ({"policy": "half", "warmup_steps": 5}, ["warmup_steps is about masks", "policy: half"]),
        ({"ratoi": 0.1}, ["ratoi: unknown key", "did you mean 'ratio'"]),
        ({"zzz": 0.1}, ["zzz: unknown key", "valid keys are"]),
    ],
)
def test_mistakes_are_named_with_value_and_rule(section: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ValueError, match="problem in") as raised:
        parse_config(section)
    for text in expected:
        assert text in str(raised.value)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ValueError, match="3 problems in the ds_config") as raised:
        parse_config({"ratio": 2, "refresh_interval": -1, "aply": "update"}, place="the ds_config")
    assert str(raised.value).count("\n  - ") == 3


def test_a_section_must_be_a_mapping() -> None:
    with pytest.raises(ValueError, match="must be a mapping"):
        parse_config(["ratio"])  # type: ignore[arg-type]


def test_a_default_normalizer_goes_with_every_selection() -> None:
    for selection in Selection:
        assert parse_config({"selection": selection.value}).selection is selection


def test_values_are_frozen() -> None:
    with pytest.raises(ValidationError):
        parse_config({}).ratio = 0.5  # type: ignore[misc]
