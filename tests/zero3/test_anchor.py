"""An anchor pulls as its formula says, from equal gradients, and touches nothing that is not to be pulled."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file
from torch import Tensor, nn

from epi_ds.errors import UserError
from epi_ds.zero3 import anchor as anchor_module
from tests.support.covering import covering
from tests.support.engines import (
    assert_same,
    collected_logs,
    ds_config,
    engine_of,
    full_masks,
    full_moments,
    full_state,
    full_weights,
    train_step,
)
from tests.support.models import OddNet, TiedLM, TwoHeads, decay_groups, late_batch, odd_batch
from tests.support.ranks import run_ranks
from tests.support.tiers import values_first
from tests.zero3.test_hold import PLACEMENTS

pytestmark = pytest.mark.zero3

STEPS = 6
LR, DECAY, BETAS, EPS, MAX_NORM = 1e-2, 0.1, (0.9, 0.99), 1e-8, 0.5
# Of a stage of twenty steps: one step is a part of it.
TOTAL = 20 * LR
WHOLE_PULL = 3.0


def section_of(pull: str, **changes: Any) -> dict[str, Any]:
    return {"policy": "none", "anchor": {"strength": WHOLE_PULL, "pull": pull, **changes}}


def tied_batch(step: int, rank: int, micro_batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1_000_003 * step + 1009 * rank + micro_batch)
    tokens = torch.randint(0, 17, (4, 6), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


class Oracle:
    """AdamW with a pull, in fp64, from given gradients."""

    def __init__(self, pull: str, start: dict[str, Tensor], remembered: dict[str, Tensor] | None = None) -> None:
        """``remembered`` is the importance that the pull is in proportion to."""
        self._pull = pull
        self._omega = {name: torch.ones((), dtype=torch.float64) for name in start}
        if remembered is not None:
            kept = {
                name: (value.double().sqrt() if pull == "update" else value.double())
                for name, value in remembered.items()
            }
            mean = torch.cat([value.flatten() for value in kept.values()]).mean()
            self._omega = {name: value / mean for name, value in kept.items()}
        self._start = {name: value.double() for name, value in start.items()}
        self._first = {name: torch.zeros_like(value) for name, value in self._start.items()}
        self._second = {name: torch.zeros_like(value) for name, value in self._start.items()}
        self._steps, self._square_sum, self._weight = 0, 0.0, 0.0

    def step(self, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights after a step."""
        self._steps += 1
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
        clipping = 1.0 / max(1.0, (norm + 1e-6) / MAX_NORM)
        num_entries = sum(gradient.numel() for gradient in gradients.values())
        self._square_sum = 0.9 * self._square_sum + 0.1 * (norm * clipping) ** 2 / num_entries
        self._weight = 0.9 * self._weight + 0.1
        rms = math.sqrt(self._square_sum / self._weight)
        return {name: self._moved(name, weights[name], gradients[name] * clipping, rms) for name in weights}

    def _moved(self, name: str, weight: Tensor, gradient: Tensor, rms: float) -> Tensor:
        weight, gradient, start = weight.double(), gradient.double(), self._start[name]
        if self._pull == "gradient":
            gradient = gradient + WHOLE_PULL * self._omega[name] * rms / TOTAL * (weight - start)
        first = self._first[name].mul_(BETAS[0]).add_(gradient, alpha=1 - BETAS[0])
        second = self._second[name].mul_(BETAS[1]).add_(gradient.square(), alpha=1 - BETAS[1])
        corrected = first / (1 - BETAS[0] ** self._steps)
        root = (second / (1 - BETAS[1] ** self._steps)).sqrt()
        moved = weight * (1 - LR * DECAY) - LR * corrected / (root + EPS)
        if self._pull == "update":
            moved = moved - (1 - torch.exp(-WHOLE_PULL * self._omega[name] * LR / TOTAL)) * (moved - start)
        return moved


def largest(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The largest of the importance of tasks, each over its mean. fp64"""
    relative = []
    for state in states:
        mean = torch.cat([value.double().flatten() for value in state.values()]).mean()
        relative.append({name: value.double() / mean for name, value in state.items()})
    return {name: torch.stack([each[name] for each in relative]).amax(0) for name in relative[0]}


def check_oracle(
    pull: str,
    placement: dict[str, Any],
    accumulation: int,
    model: Callable[[], nn.Module],
    memory: str = "none",
    state: str = "u16",
) -> None:
    batch = tied_batch if model is TiedLM else odd_batch
    section = section_of(pull)
    if memory != "none":
        section = section_of(pull, weight="importance") | {"memory": memory, "state": state}
    config = ds_config(epi=section, accumulation=accumulation, **placement)
    with engine_of(model, config) as engine:
        engine.epi.plan_stage([TOTAL])
        parameters = dict(engine.module.named_parameters())
        before, remembered = full_weights(engine), None
        if memory != "none":
            rank = torch.distributed.get_rank()
            for number, task in enumerate(["base", "other"]):
                losses = (engine(*batch(99 - number, rank, part)) for part in range(2 * accumulation))
                engine.epi.remember(task, losses)
            kept = ["remembered_relative"] if memory == "stage_max" else ["task/base", "task/other"]
            remembered = largest([full_state(engine, name) for name in kept])
        oracle = Oracle(pull, before, remembered)
        for step in range(STEPS):
            for micro_batch in range(accumulation):
                engine.backward(engine(*batch(step, torch.distributed.get_rank(), micro_batch)))
                if micro_batch + 1 < accumulation:
                    engine.step()
            gradients = {name: safe_get_full_grad(parameters[name]).clone() for name in before}
            expected = oracle.step(before, gradients)
            engine.step()
            before = full_weights(engine)
            for name, value in before.items():
                # From equal gradients, a step differs by a few roundings of fp32.
                torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7, msg=name)
        assert engine.epi.memory_report().state_bytes["anchor"] > 0


@pytest.mark.parametrize(
    ("world_size", "pull", "placement", "accumulation"),
    values_first(covering([1, 2, 3, 4], ["update", "gradient"], ["device", "offload", "sub-groups"], [1, 3])),
)
def test_a_step_is_that_of_the_oracle(world_size: int, pull: str, placement: str, accumulation: int) -> None:
    run_ranks(check_oracle, world_size, pull, PLACEMENTS[placement], accumulation, OddNet)


OTHER_PLACEMENTS = ["parameter-offload", "partial-offload", "offload-sub-groups", "all-reduce", "scattered-gradients"]


@pytest.mark.slow
@pytest.mark.parametrize("pull", ["update", "gradient"])
@pytest.mark.parametrize("placement", OTHER_PLACEMENTS)
def test_a_step_is_that_of_the_oracle_in_other_placements(placement: str, pull: str) -> None:
    run_ranks(check_oracle, 3, pull, PLACEMENTS[placement], 2, OddNet)


@pytest.mark.slow
def test_a_step_is_that_of_the_oracle_with_secondary_partitions() -> None:
    for pull in ("update", "gradient"):
        run_ranks(check_oracle, 2, pull, {"zero_optimization": {"zero_hpz_partition_size": 2}}, 1, OddNet)


@pytest.mark.parametrize(
    ("world_size", "pull", "memory", "state"),
    [
        (1, "update", "stage_max", "u16"),
        (2, "gradient", "stage_max", "fp32"),
        pytest.param(3, "update", "per_task", "bf16", marks=pytest.mark.slow),
        pytest.param(4, "gradient", "per_task", "u16", marks=pytest.mark.slow),
        pytest.param(2, "update", "per_task", "u8", marks=pytest.mark.slow),
    ],
)
def test_what_is_remembered_is_pulled_more(world_size: int, pull: str, memory: str, state: str) -> None:
    run_ranks(check_oracle, world_size, pull, {"offload": world_size > 2}, 2, OddNet, memory, state)


@pytest.mark.parametrize("pull", ["update", "gradient"])
def test_tied_weights_are_pulled_once(pull: str) -> None:
    run_ranks(check_oracle, 2, pull, {}, 1, TiedLM)


def check_bits(one: dict[str, Any], other: dict[str, Any], changes: dict[str, Any]) -> None:
    """Both sections train to the same bits."""
    results = []
    for section in (one, other):
        with engine_of(OddNet, ds_config(epi=section, accumulation=2, **changes)) as engine:
            for step in range(2 * STEPS):
                train_step(engine, step, odd_batch)
            results.append(full_weights(engine) | full_moments(engine))
    assert_same(*results)


@pytest.mark.parametrize("pull", ["update", pytest.param("gradient", marks=pytest.mark.slow)])
def test_a_strength_of_zero_is_no_anchor(pull: str) -> None:
    for section in ({"policy": "none"}, {"ratio": 0.2, "refresh_interval": 4}):
        run_ranks(check_bits, 2, section, section | {"anchor": {"strength": 0, "pull": pull}}, {"offload": True})


def check_hold(pull: str, apply: str, placement: dict[str, Any]) -> None:
    epi = {"ratio": 0.2, "refresh_interval": 3, "ema_decay": 0.9, "apply": apply}
    epi |= {"anchor": {"strength": WHOLE_PULL, "pull": pull}}
    with engine_of(OddNet, ds_config(epi=epi, **placement)) as engine:
        engine.epi.plan_stage([TOTAL])
        for step in range(12):
            masks, before = full_masks(engine), full_weights(engine)
            train_step(engine, step, odd_batch)
            after = full_weights(engine)
            for name, mask in masks.items():
                assert torch.equal(before[name].view(torch.int32)[mask], after[name].view(torch.int32)[mask])
        assert engine.epi.stats().isolated > 0


@pytest.mark.parametrize(("pull", "apply"), values_first(product(["update", "gradient"], ["reduction", "update"])))
def test_isolated_entries_are_held_whatever_the_anchor_says(pull: str, apply: str) -> None:
    run_ranks(check_hold, 2, pull, apply, {})


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["offload", "partial-offload", "bf16", "sub-groups"])
def test_they_are_held_in_other_placements(placement: str) -> None:
    for pull, apply in (("update", "update"), ("gradient", "reduction")):
        run_ranks(check_hold, 3, pull, apply, PLACEMENTS[placement])


def check_storage(section: dict[str, Any], placement: dict[str, Any]) -> int:
    """Two and four bytes an entry give the same bits; returns the bytes on this rank of the smaller one."""
    exact, results, sizes = anchor_module.is_bf16, [], []
    for narrows in (True, False):
        anchor_module.is_bf16 = exact if narrows else lambda values: False  # type: ignore[assignment]
        try:
            with engine_of(OddNet, ds_config(epi=section, bf16={"enabled": True}, **placement)) as engine:
                engine.epi.plan_stage([TOTAL])
                for step in range(STEPS):
                    train_step(engine, step, lambda *place: (odd_batch(*place)[0], odd_batch(*place)[1].bfloat16()))
                results.append(full_weights(engine) | {n: engine.epi.anchor(n) for n in engine.epi.parameter_names})
                sizes.append(engine.epi.memory_report().state_bytes["anchor"])
        finally:
            anchor_module.is_bf16 = exact
    assert_same(*results)
    assert 2 * sizes[0] == sizes[1]
    return sizes[0]


def test_an_anchor_takes_two_bytes_where_these_are_exact() -> None:
    sizes = run_ranks(check_storage, 3, section_of("update"), {})
    assert sum(sizes) == 2 * sum(p.numel() for p in OddNet().parameters())


def check_resume(folder: str, pull: str, offload: bool) -> None:
    config = ds_config(
        epi=section_of(pull) | {"policy": "evolving", "ratio": 0.2, "refresh_interval": 4}, offload=offload
    )
    with engine_of(OddNet, config) as engine:
        engine.epi.plan_stage([TOTAL])
        for step in range(12):
            if step == 7:
                engine.save_checkpoint(folder)
            train_step(engine, step, odd_batch)
        expected = full_weights(engine) | full_moments(engine)
    with engine_of(OddNet, config) as engine, collected_logs() as messages:
        engine.load_checkpoint(folder)
        # Other sums than those of the stage's beginning are told, and not used.
        engine.epi.plan_stage([2 * TOTAL])
        assert any("the anchor goes on pulling by the former" in message for message in messages) == (
            torch.distributed.get_rank() == 0
        )
        for step in range(7, 12):
            train_step(engine, step, odd_batch)
        assert_same(full_weights(engine) | full_moments(engine), expected)


@pytest.mark.parametrize(("pull", "offload"), values_first(product(["update", "gradient"], [False, True])))
def test_a_resume_is_pulled_to_the_same_bits(pull: str, offload: bool, tmp_path: Path) -> None:
    run_ranks(check_resume, 2, str(tmp_path), pull, offload)


def save_midway(folder: str, config: dict[str, Any]) -> dict[str, Tensor]:
    with engine_of(OddNet, config) as engine:
        engine.epi.plan_stage([TOTAL])
        for step in range(5):
            train_step(engine, step, odd_batch)
        engine.save_checkpoint(folder)
        return {name: engine.epi.anchor(name) for name in engine.epi.parameter_names}


def load_midway(folder: str, config: dict[str, Any]) -> dict[str, Tensor]:
    with engine_of(OddNet, config) as engine:
        engine.load_checkpoint(folder)
        return {name: engine.epi.anchor(name) for name in engine.epi.parameter_names}


def test_an_anchor_is_dealt_out_to_other_ranks(tmp_path: Path) -> None:
    section = section_of("update") | {"checkpoint": {"allow_new_batch_size": True}}
    config = ds_config(epi=section, zero_optimization={"sub_group_size": 60})
    saved = run_ranks(save_midway, 3, str(tmp_path), config)[0]
    for world_size in (1, 2, 4):
        assert_same(run_ranks(load_midway, world_size, str(tmp_path), config)[0], saved)


def shared_batch(step: int, rank: int, micro_batch: int) -> tuple[Tensor, Tensor]:
    """The two batches of a step, whether two ranks have one each or one rank has both."""
    return odd_batch(step, rank + micro_batch, 0)


def go_on(folder: str, config: dict[str, Any], steps: range, load: bool) -> dict[str, Tensor]:
    """Train some steps of a stage, from a checkpoint of its middle or from its beginning; return the weights."""
    with engine_of(OddNet, config) as engine:
        if load:
            engine.load_checkpoint(folder)
        engine.epi.plan_stage([TOTAL])
        for step in steps:
            train_step(engine, step, shared_batch)
        if not load:
            engine.save_checkpoint(folder)
        return full_weights(engine)


@pytest.mark.parametrize("pull", ["update", "gradient"])
def test_other_ranks_go_on_with_the_pull(pull: str, tmp_path: Path) -> None:
    of_two, of_one = (ds_config(epi=section_of(pull), accumulation=accumulation) for accumulation in (1, 2))
    run_ranks(go_on, 2, str(tmp_path), of_two, range(4), False)
    whole = run_ranks(go_on, 2, str(tmp_path), of_two, range(4, 8), True)[0]
    alone = run_ranks(go_on, 1, str(tmp_path), of_one, range(4, 8), True)[0]
    # The gradient of a step is a sum in another order, which Adam's root carries into the weights.
    for name, value in alone.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-6)


def check_changes(folder: str) -> dict[str, list[str]]:
    """Save with one anchor and load with another; return what is told of each pair."""
    anchors: dict[str, dict[str, Any] | None] = {
        "nothing": {"strength": 0},
        "two": {"strength": 2},
        "eight": {"strength": 8},
        "gradient": {"strength": 2, "pull": "gradient"},
        "stage": {"strength": 2, "to": "stage"},
        "none": None,
    }
    configs = {name: ds_config(epi={"policy": "none", "anchor": anchor}) for name, anchor in anchors.items()}
    told = {}
    for before, after in (
        ("two", "two"),
        ("nothing", "two"),
        ("two", "eight"),
        ("two", "gradient"),
        ("two", "stage"),
        ("two", "nothing"),
        ("two", "none"),
        ("none", "two"),
    ):
        tag = f"{folder}/{before}"
        if not Path(tag).exists():
            with engine_of(OddNet, configs[before]) as engine:
                if anchors[before]:
                    engine.epi.plan_stage([TOTAL])
                train_step(engine, 0, odd_batch)
                engine.save_checkpoint(tag)
        with engine_of(OddNet, configs[after]) as engine, collected_logs() as messages:
            engine.load_checkpoint(tag)
        told[f"{before}, {after}"] = [text.partition(": ")[2] for text in messages if "from here on" in text]
    return told


def test_a_load_tells_of_another_pull(tmp_path: Path) -> None:
    told = run_ranks(check_changes, 1, str(tmp_path))[0]
    new = "from here on the anchor is (to: run) what was loaded"
    was = "weights were pulled towards: run when it was saved"
    assert told == {
        "two, two": [],
        "nothing, two": [f"nothing was pulled when it was saved; {new}"],
        "two, eight": ["the anchor had strength: 2.0 when it was saved; from here on it has strength: 8.0"],
        "two, gradient": ["the anchor had pull: update when it was saved; from here on it has pull: gradient"],
        "two, stage": [f"{was}; from here on the anchor is (to: stage) what was loaded"],
        "two, nothing": [f"{was}; from here on nothing is pulled"],
        "two, none": [f"{was}; from here on nothing is pulled"],
        "none, two": [f"nothing was pulled when it was saved; {new}"],
    }


def check_stages(pull: str) -> None:
    """``to: stage`` takes the weights anew and wants a plan of its own; ``to: run`` keeps those of the first step."""
    for to in ("stage", "run"):
        with engine_of(OddNet, ds_config(epi=section_of(pull, to=to))) as engine:
            start = full_weights(engine)
            with pytest.raises(UserError, match=r"call engine\.epi\.plan_stage"):
                train_step(engine, 0, odd_batch)
            engine.optimizer.zero_grad()
            engine.epi.plan_stage([TOTAL])
            train_step(engine, 0, odd_batch)
            assert_same({name: engine.epi.anchor(name) for name in start}, start)
            engine.epi.finish_stage("first")
            second = full_weights(engine)
            engine.epi.plan_stage([TOTAL])
            train_step(engine, 1, odd_batch)
            assert_same({name: engine.epi.anchor(name) for name in start}, second if to == "stage" else start)


def test_a_stage_has_a_plan_and_an_anchor_of_its_own() -> None:
    run_ranks(check_stages, 2, "update")


def check_groups(pull: str) -> None:
    """Every parameter group has its own sum; one whose rates are zero is not pulled, and a wrong number is refused."""
    with engine_of(OddNet, ds_config(epi=section_of(pull)), model_parameters=decay_groups) as engine:
        with pytest.raises(UserError, match="got 1 sums of learning rates, and the optimizer has 2"):
            engine.epi.plan_stage([TOTAL])
        with pytest.raises(UserError, match="add up to -1"):
            engine.epi.plan_stage([TOTAL, -1.0])
        engine.epi.plan_stage([TOTAL, 0.0])
        strength = engine.optimizer._epi_context.anchor.strength
        assert [strength.per_rate(0), strength.per_rate(1)] == [WHOLE_PULL / TOTAL, 0.0]
        for step in range(3):
            train_step(engine, step, odd_batch)


def test_parameter_groups_have_sums_of_their_own() -> None:
    run_ranks(check_groups, 2, "gradient")


def check_stale(offload: bool) -> None:
    """A head that a window does not use is stepped with its old gradient, and the old pull is not in it."""
    seen: list[Tensor] = []
    with engine_of(TwoHeads, ds_config(epi=section_of("gradient"), offload=offload, accumulation=2)) as engine:
        engine.epi.plan_stage([TOTAL])
        zero3 = engine.optimizer
        anchor = zero3._epi_context.anchor
        pulling = anchor.pulling

        def recording(zero3: Any, sub_group: int) -> AbstractContextManager[None]:
            seen.append(zero3.fp32_partitioned_groups_flat[sub_group].grad.clone())
            return pulling(zero3, sub_group)

        anchor.pulling = recording
        for step in range(3):
            train_step(engine, step, late_batch)
            if offload:
                # What the buffer holds after a step is what it held before the pull, bit for bit.
                assert torch.equal(zero3.fp32_partitioned_groups_flat[0].grad, seen[-1])


def test_no_pull_stays_in_a_gradient_that_a_later_step_reads() -> None:
    run_ranks(check_stale, 2, True)


def check_skipped(pull: str) -> None:
    with engine_of(OddNet, ds_config(epi=section_of(pull))) as engine:
        engine.epi.plan_stage([TOTAL])
        train_step(engine, 0, odd_batch)
        anchor = engine.optimizer._epi_context.anchor
        before, scale = full_weights(engine), anchor.scale
        tokens, target = odd_batch(1, 0, 0)
        engine.backward(engine(tokens, target * math.inf))
        engine.step()
        assert engine.optimizer.overflow
        assert_same(full_weights(engine), before)
        assert anchor.scale == scale


@pytest.mark.parametrize("pull", ["update", "gradient"])
def test_a_skipped_step_leaves_no_trace(pull: str) -> None:
    run_ranks(check_skipped, 2, pull)


def check_excluded() -> None:
    section = section_of("update", strength=50.0) | {"exclude": ["embed"]}
    plain = {"policy": "none", "exclude": ["embed"]}
    embeddings = []
    for epi in (section, plain):
        with engine_of(OddNet, ds_config(epi=epi)) as engine:
            engine.epi.plan_stage([LR])
            train_step(engine, 0, odd_batch)
            after = full_weights(engine)
            embeddings.append(after["embed.weight"])
            if epi is section:
                # A pull of the whole way, but for the part e^-50, and two roundings.
                for name in engine.epi.parameter_names:
                    torch.testing.assert_close(after[name], engine.epi.anchor(name), rtol=1e-6, atol=1e-9)
    assert torch.equal(*embeddings)


def check_shown_gradients() -> list[bool]:
    """The copy that the optimizer is shown is the gradient where no anchor is; return whether it differs elsewhere."""
    section = section_of("gradient") | {"exclude": ["embed", "norm"]}
    with engine_of(OddNet, ds_config(epi=section, offload=True)) as engine:
        engine.epi.plan_stage([TOTAL])
        zero3 = engine.optimizer
        context = zero3._epi_context
        pulling = context.anchor.pulling
        differs: list[bool] = []

        @contextmanager
        def comparing(zero3: Any, sub_group: int) -> Iterator[None]:
            flat = zero3.fp32_partitioned_groups_flat[sub_group]
            original = flat.grad.clone()
            with pulling(zero3, sub_group):
                differing = flat.grad != original
                differs.append(bool(differing.any()))
                for segment in context.controller.placement.layout.by_sub_group[sub_group]:
                    differing[segment.start : segment.stop] = False
                assert not differing.any()
                yield

        context.anchor.pulling = comparing
        for step in range(3):
            train_step(engine, step, odd_batch)
        return differs


def test_what_is_not_covered_is_not_pulled() -> None:
    run_ranks(check_excluded, 3)
    for pulled in run_ranks(check_shown_gradients, 3):
        # Nothing has moved before the first step.
        assert not pulled[0]
        assert pulled[-1]


def write_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save what `engine_of` makes an `OddNet` of, in two files, as Hugging Face does."""
    torch.manual_seed(0)
    weights = {name: value.detach().to(dtype) for name, value in OddNet().named_parameters()}
    names = list(weights)
    files = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    folder.mkdir(exist_ok=True)
    for file, own in files.items():
        save_file({name: weights[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def check_folder(folder: str, checkpoints: str, pull: str, offload: bool) -> None:
    """An anchor in a folder, in memory or on the disk, gives the bits of one that is taken at the start."""
    results = []
    for changes in ({}, {"to": folder}, {"to": folder, "device": "disk"}):
        config = ds_config(epi=section_of(pull, **changes), offload=offload)
        with engine_of(OddNet, config) as engine:
            engine.epi.plan_stage([TOTAL])
            for step in range(STEPS):
                if step == 3 and changes:
                    engine.save_checkpoint(checkpoints, tag=changes.get("device", "memory"))
                train_step(engine, step, odd_batch)
            results.append(full_weights(engine) | full_moments(engine))
            if "device" in changes:
                assert engine.epi.memory_report().state_bytes["anchor"] == 0
        if not changes:
            continue
        with engine_of(OddNet, config) as engine:
            engine.load_checkpoint(checkpoints, tag=changes.get("device", "memory"))
            for step in range(3, STEPS):
                train_step(engine, step, odd_batch)
            results.append(full_weights(engine) | full_moments(engine))
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.mark.parametrize(
    ("pull", "offload"), [("update", False), pytest.param("gradient", True, marks=pytest.mark.slow)]
)
def test_an_anchor_in_a_folder_is_the_one_in_memory(pull: str, offload: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "base")
    run_ranks(check_folder, 3, str(folder), str(tmp_path / "run"), pull, offload)


def check_folder_refusals(folder: str, checkpoints: str) -> None:
    config = ds_config(epi=section_of("update", to=folder, device="disk"))
    with engine_of(lambda: OddNet(num_blocks=2), config) as engine:
        engine.epi.plan_stage([TOTAL])
        train_step(engine, 0, odd_batch)
        engine.save_checkpoint(checkpoints)
    with (
        pytest.raises(UserError, match=r"blocks\.2\.weight is not there"),
        engine_of(lambda: OddNet(num_blocks=3), config),
    ):
        pass
    with pytest.raises(UserError, match=r"has shape \(11, 13\) there"), engine_of(lambda: OddNet(width=14), config):
        pass
    with engine_of(OddNet, config) as engine:
        engine.epi.plan_stage([TOTAL])
        with torch.no_grad():
            engine.optimizer.fp32_partitioned_groups_flat[0][0] += 1
        with pytest.raises(UserError, match="give the folder that the model was loaded from"):
            train_step(engine, 0, odd_batch)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        write_folder(Path(folder), torch.bfloat16)
    torch.distributed.barrier()
    with engine_of(OddNet, config) as engine, pytest.raises(UserError, match="Restore its files"):
        engine.load_checkpoint(checkpoints)


def test_a_folder_that_is_not_the_model_s_is_refused(tmp_path: Path) -> None:
    run_ranks(check_folder_refusals, 2, str(write_folder(tmp_path / "base")), str(tmp_path / "run"))


def check_nothing_remembered(pull: str) -> None:
    """Before a stage has ended nothing is pulled; the end of one is looked at in the next step."""
    section = {"ratio": 0.0, "memory": "stage_max"}
    results = []
    for changes in ({}, {"anchor": {"decay": 30.0, "pull": pull, "weight": "importance"}}):
        with engine_of(OddNet, ds_config(epi=section | changes)) as engine:
            for step in range(4):
                train_step(engine, step, odd_batch)
            results.append(full_weights(engine))
            engine.epi.finish_stage("first")
            train_step(engine, 4, odd_batch)
            results.append(full_weights(engine))
    assert_same(results[0], results[2])
    assert any((results[1][name] != results[3][name]).any() for name in results[1])


def test_nothing_is_pulled_before_anything_is_remembered() -> None:
    run_ranks(check_nothing_remembered, 2, "update")


def check_refusals() -> None:
    config = ds_config(epi=section_of("gradient"), optimizer={"type": "SGD", "params": {"lr": LR}})
    config["epi"]["apply"] = "update"
    with pytest.raises(UserError, match=r"anchor\.pull: gradient is in proportion"), engine_of(OddNet, config):
        pass


def test_a_pull_in_the_gradient_wants_an_adam() -> None:
    run_ranks(check_refusals, 1)
