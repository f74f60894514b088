"""A checkpoint of any number of ranks continues on any other: the same bits at that moment, and then the same run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn

from epi_ds.errors import UserError
from tests.support.engines import (
    assert_same,
    collected_logs,
    ds_config,
    engine_of,
    full_importance,
    full_masks,
    full_moments,
    full_state,
    full_weights,
)
from tests.support.models import OddNet, decay_groups_with_own_betas
from tests.support.ranks import run_ranks
from tests.support.tiers import slow_but

pytestmark = pytest.mark.zero3

SECTION: dict[str, Any] = {"ratio": 0.2, "refresh_interval": 4, "ema_decay": 0.9}
SIZES = (1, 2, 3, 4)
# Micro-batches of a step, over all ranks: every number of ranks divides them.
MICRO_BATCHES = 12
SAVED_AFTER, STEPS = 7, 12
SCHEDULER = {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-3, "warmup_max_lr": 2e-2, "warmup_num_steps": 10}}
# After a resume, gradients are summed in another order: fp32, over five steps of a loss near 1.
TOLERANCE = 1e-5


def config_of(world_size: int, section: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Steps of equally many rows at every world size."""
    epi = SECTION | section
    if epi.get("state") == "adam":
        # It is the optimizer's.
        del epi["ema_decay"]
    return ds_config(epi=epi, accumulation=MICRO_BATCHES // world_size, scheduler=SCHEDULER, **changes)


def train_step(engine: Any, step: int) -> float:
    """Take a step over micro-batches that depend on their place in the run only; return their mean loss."""
    world_size, losses = dist.get_world_size(), []
    for micro_batch in range(engine.gradient_accumulation_steps()):
        place = micro_batch * world_size + dist.get_rank()
        generator = torch.Generator().manual_seed(1_000_003 * step + place)
        tokens = torch.randint(0, 11, (4, 5), generator=generator)
        loss = engine(tokens, torch.randn(4, 5, generator=generator))
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    mean = torch.stack(losses).double().mean()
    dist.all_reduce(mean)
    return float(mean) / world_size


def snapshot(engine: Any) -> dict[str, Any]:
    """Everything that a resume must bring back, gathered."""
    tensors = {f"weight/{name}": value for name, value in full_weights(engine).items()}
    tensors |= {f"moment/{name}": value for name, value in full_moments(engine).items()}
    tensors |= {f"mask/{name}": value for name, value in full_masks(engine).items()}
    tensors |= {f"importance/{name}": value for name, value in full_importance(engine).items()}
    for state in engine.epi.controller.states:
        tensors |= {f"{state}/{name}": value for name, value in full_state(engine, state).items()}
    numbers = {
        "counters": engine.epi.stats().counters,
        "thresholds": engine.epi.thresholds(),
        "clipping": [average.to_dict() for average in engine.optimizer._epi_context.clipping],
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in engine.optimizer.optimizer.param_groups
        ],
        "scheduler": engine.lr_scheduler.state_dict(),
        "steps": (engine.global_steps, engine.global_samples, engine.skipped_steps),
    }
    return {"tensors": tensors, "numbers": numbers}


def refreshed(engine: Any) -> dict[str, Any]:
    """Masks and thresholds of a refresh out of turn: of the same importance, the same bits."""
    engine.epi.refresh_now()
    return {"masks": full_masks(engine), "thresholds": engine.epi.thresholds()}


Groups = Callable[[nn.Module], Any]


def _options(groups: Groups | None) -> dict[str, Any]:
    return {} if groups is None else {"model_parameters": groups}


def save(folder: str, section: dict[str, Any], zero: dict[str, Any], groups: Groups | None) -> dict[str, Any]:
    """Train, save in the middle of a window, and train on; return the state at the save and what came after."""
    config = config_of(dist.get_world_size(), section, zero_optimization=zero)
    with engine_of(OddNet, config, **_options(groups)) as engine:
        for step in range(SAVED_AFTER):
            if step == 5 and section.get("memory"):
                engine.epi.finish_stage("first")
            train_step(engine, step)
        assert engine.save_checkpoint(folder)
        state = snapshot(engine)
        losses = [train_step(engine, step) for step in range(SAVED_AFTER, STEPS)]
    with engine_of(OddNet, config, **_options(groups)) as engine:
        engine.load_checkpoint(folder)
        return {"state": state, "losses": losses, "refreshed": refreshed(engine)}


def resume(folder: str, section: dict[str, Any], zero: dict[str, Any], groups: Groups | None) -> dict[str, Any]:
    config = config_of(dist.get_world_size(), section, zero_optimization=zero)
    with engine_of(OddNet, config, **_options(groups)) as engine:
        path, client_state = engine.load_checkpoint(folder)
        assert path is not None
        assert client_state is not None
        state = snapshot(engine)
        losses = [train_step(engine, step) for step in range(SAVED_AFTER, STEPS)]
    with engine_of(OddNet, config, **_options(groups)) as engine:
        engine.load_checkpoint(folder)
        return {"state": state, "losses": losses, "refreshed": refreshed(engine)}


def compare(saved: dict[str, Any], found: dict[str, Any]) -> None:
    assert_same(saved["state"]["tensors"], found["state"]["tensors"])
    assert saved["state"]["numbers"] == found["state"]["numbers"]
    assert_same(saved["refreshed"]["masks"], found["refreshed"]["masks"])
    assert saved["refreshed"]["thresholds"] == found["refreshed"]["thresholds"]
    assert found["losses"] == pytest.approx(saved["losses"], rel=TOLERANCE)


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, dict[str, Any]]]:
    """Two parameter groups with hyper-parameters of their own, several sub-groups, one tag of every world size."""
    found = {}
    for world_size in SIZES:
        folder = tmp_path_factory.mktemp(f"by_{world_size}")
        results = run_ranks(save, world_size, str(folder), {"state": "u16"}, {"sub_group_size": 50}, GROUPS)
        found[world_size] = (folder, results[0])
    return found


GROUPS = decay_groups_with_own_betas


@pytest.mark.parametrize(
    ("before", "after"),
    slow_but(itertools.product(SIZES, SIZES), (1, 2), (2, 3), (3, 4), (4, 1)),
)
def test_any_number_of_ranks_continues_any_other(
    saves: dict[int, tuple[Path, dict[str, Any]]], before: int, after: int
) -> None:
    folder, saved = saves[before]
    groups = saved["state"]["numbers"]["groups"]
    # What DeepSpeed's universal format would not bring back.
    assert groups[0]["betas"] != groups[1]["betas"]
    assert groups[0]["weight_decay"] != groups[1]["weight_decay"]
    assert any(mask.any() for name, mask in saved["state"]["tensors"].items() if name.startswith("mask/"))
    for found in run_ranks(resume, after, str(folder), {"state": "u16"}, {"sub_group_size": 50}, GROUPS):
        compare(saved, found)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp32": ({"state": "fp32"}, {}),
    "bf16": ({"state": "bf16"}, {}),
    "update": ({"apply": "update"}, {}),
    "adam": ({"apply": "update", "state": "adam"}, {}),
    "per_task": ({"memory": "per_task", "state": "u16"}, {}),
    "offload": ({"state": "u16"}, {"offload_optimizer": {"device": "cpu"}}),
    "offload_all": (
        {"state": "u16"},
        {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("before", "after"), [(2, 3), (4, 1)])
def test_every_state_and_placement_can_be_dealt_anew(tmp_path: Path, case: str, before: int, after: int) -> None:
    section, zero = CASES[case]
    saved = run_ranks(save, before, str(tmp_path), section, zero, None)[0]
    compare(saved, run_ranks(resume, after, str(tmp_path), section, zero, None)[0])


def test_other_sub_groups_on_as_many_ranks(tmp_path: Path) -> None:
    saved = run_ranks(save, 2, str(tmp_path), {"state": "u16"}, {"sub_group_size": 50}, None)[0]
    compare(saved, run_ranks(resume, 2, str(tmp_path), {"state": "u16"}, {"sub_group_size": 10**6}, None)[0])


class Blocks(torch.optim.SGD):
    """Keeps an average of squares as 8-bit codes, and a scale for every block of 64 entries."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in (one for group in self.param_groups for one in group["params"] if one.grad is not None):
            state, blocks = self.state[parameter], -(-parameter.numel() // 64)
            scales = state.setdefault("absmax", torch.zeros(blocks))
            scales.copy_(
                torch.nn.functional.pad(parameter.grad.abs(), (0, -parameter.numel() % 64)).view(-1, 64).amax(1)
            )
            state["codes"] = (parameter.grad.abs() / scales.repeat_interleave(64)[: parameter.numel()] * 255).byte()
        super().step(closure)


class Means(torch.optim.SGD):
    """Keeps one number for every partition, as optimizers with a trust ratio do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in (one for group in self.param_groups for one in group["params"] if one.grad is not None):
            mean = self.state[parameter].setdefault("mean", torch.zeros(1))
            mean.lerp_(parameter.grad.abs().mean(), 0.1)
        super().step(closure)


def own_states(world_size: int) -> dict[str, Any]:
    config = config_of(world_size, {"apply": "update"}, zero_allow_untested_optimizer=True)
    del config["optimizer"], config["scheduler"]
    return config


def save_own_states(folder: str, kinds: list[type[torch.optim.SGD]]) -> None:
    config = own_states(dist.get_world_size())
    for kind in kinds:
        with engine_of(OddNet, config, optimizer=partial(_made, kind)) as engine:
            for step in range(2):
                train_step(engine, step)
            assert engine.save_checkpoint(f"{folder}/{kind.__name__}")


def _made(kind: type[torch.optim.SGD], model: nn.Module) -> torch.optim.Optimizer:
    return kind(model.parameters(), lr=1e-2)


def load_own_states(folder: str, kinds: list[type[torch.optim.SGD]]) -> list[str]:
    """Return what the loads say, where they are refused; nothing is touched by them."""
    config = own_states(dist.get_world_size())
    said = []
    for kind in kinds:
        with engine_of(OddNet, config, optimizer=partial(_made, kind)) as engine:
            before = full_weights(engine)
            try:
                engine.load_checkpoint(f"{folder}/{kind.__name__}")
            except UserError as error:
                assert_same(full_weights(engine), before)
                said.append(str(error))
            else:
                said.append("")
    return said


@pytest.mark.parametrize(("before", "after"), slow_but([(2, 1), (1, 2)], (2, 1)))
def test_states_of_a_partition_alone_are_refused_by_name(tmp_path: Path, before: int, after: int) -> None:
    kinds = [Blocks, Means]
    run_ranks(save_own_states, before, str(tmp_path), kinds)
    assert run_ranks(load_own_states, before, str(tmp_path), kinds)[0] == ["", ""]
    blocks, means = run_ranks(load_own_states, after, str(tmp_path), kinds)[0]
    assert f"was saved by {before} ranks with other partitions than here, and the states of Blocks cannot" in blocks
    assert "absmax of sub-group 0 has" in blocks
    assert "the states of Means cannot be dealt out again: mean of sub-group 0 is 0." in means


def test_uint8_importance_is_encoded_anew_within_a_code(tmp_path: Path) -> None:
    """Its blocks are cut at the borders of partitions, so some are other blocks now; masks keep their bits."""
    saved = run_ranks(save, 2, str(tmp_path), {"state": "u8"}, {}, None)[0]["state"]["tensors"]
    found = run_ranks(resume, 3, str(tmp_path), {"state": "u8"}, {}, None)[0]["state"]["tensors"]
    importance = {name for name in saved if name.startswith("importance/")}
    assert_same(
        {name: saved[name] for name in saved.keys() - importance},
        {name: found[name] for name in saved.keys() - importance},
    )
    for name in importance:
        before, after = saved[name].flatten().double(), found[name].flatten().double()
        # One code of a block, whose largest value is at most the parameter's: (j + 1)^2 - j^2 steps of it / 255^2.
        largest = before.max()
        code = (2 * (before / largest).sqrt() * 255 + 1) * largest / 255**2 if largest > 0 else torch.zeros_like(before)
        assert ((after - before).abs() <= code * (1 + 1e-5)).all(), name


def refusal(folder: str, changes: dict[str, Any]) -> str:
    config = ds_config(epi=SECTION | {"state": "u16"}, scheduler=SCHEDULER, **changes)
    with engine_of(OddNet, config) as engine:
        before = full_weights(engine)
        try:
            engine.load_checkpoint(folder)
        except UserError as error:
            assert_same(before, full_weights(engine))
            return str(error)
        return ""


def test_another_number_of_rows_is_refused_with_what_would_do(tmp_path: Path) -> None:
    run_ranks(save, 2, str(tmp_path), {"state": "u16"}, {}, None)
    for found in run_ranks(refusal, 3, str(tmp_path), {"accumulation": 2}):
        assert "a step was of 48 (micro-batch 4 x accumulation 6 x 2 ranks) rows and is of 24" in found
        assert "set micro-batch 4 and gradient_accumulation_steps 4" in found
    allowed = {"accumulation": 2, "epi": SECTION | {"state": "u16", "checkpoint": {"allow_new_batch_size": True}}}
    assert run_ranks(allowed_batch, 3, str(tmp_path), allowed) == [SAVED_AFTER] * 3


def allowed_batch(folder: str, changes: dict[str, Any]) -> int:
    with engine_of(OddNet, ds_config(scheduler=SCHEDULER, **changes)) as engine:
        engine.load_checkpoint(folder)
        return int(engine.global_steps)


def first_mask_of(folder: str) -> tuple[int, list[str]]:
    with collected_logs() as messages, engine_of(OddNet, config_of(dist.get_world_size(), {})) as engine:
        engine.load_checkpoint(folder)
        sample = engine.epi.controller.refresher.first_mask.sample
        return sum(part.numel() for part in sample), [text for text in messages if "first mask" in text]


def test_the_sample_of_the_first_mask_begins_anew_and_says_so(tmp_path: Path) -> None:
    run_ranks(save, 2, str(tmp_path), {}, {}, None)
    ((sampled, said), _) = run_ranks(first_mask_of, 2, str(tmp_path))
    assert sampled > 0
    assert not said
    ((sampled, said), *_) = run_ranks(first_mask_of, 3, str(tmp_path))
    assert sampled == 0
    assert len(said) == 1


# --- frozen parameters ---

# One without entries on all ranks but a few.
FROZEN = ("embed.weight", "blocks.0.bias", "head.bias")


def partly_frozen(frozen: tuple[str, ...] = FROZEN) -> nn.Module:
    model = OddNet()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return model


def all_weights(engine: Any) -> dict[str, torch.Tensor]:
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def save_partly_frozen(folder: str, exclude: bool) -> dict[str, torch.Tensor]:
    with engine_of(partly_frozen, config_of(dist.get_world_size(), {"state": "u16"})) as engine:
        for name, parameter in engine.module.named_parameters():
            if name in FROZEN:
                # Not what any model is made with.
                with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                    parameter.data.copy_(torch.arange(parameter.numel()).view_as(parameter) / 7)
        for step in range(2):
            train_step(engine, step)
        assert engine.save_checkpoint(folder, exclude_frozen_parameters=exclude)
        return all_weights(engine)


def load_partly_frozen(
    folder: str, frozen: tuple[str, ...], options: dict[str, bool]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    config = config_of(dist.get_world_size(), {"state": "u16"})
    with collected_logs() as messages, engine_of(partial(partly_frozen, frozen), config) as engine:
        engine.load_checkpoint(folder, **options)
        return all_weights(engine), messages


@pytest.mark.parametrize(("before", "after"), slow_but([(2, 3), (3, 1), (1, 4), (2, 2)], (2, 3), (3, 1)))
def test_frozen_parameters_are_dealt_anew(tmp_path: Path, before: int, after: int) -> None:
    saved = run_ranks(save_partly_frozen, before, str(tmp_path), False)[0]
    for found, _ in run_ranks(load_partly_frozen, after, str(tmp_path), FROZEN, {}):
        assert_same(saved, found)


def test_weights_alone_do_not_care_what_was_frozen(tmp_path: Path) -> None:
    saved = run_ranks(save_partly_frozen, 2, str(tmp_path), False)[0]
    for frozen in ((), ("head.weight", *FROZEN), ("norm.bias",)):
        for found, _ in run_ranks(load_partly_frozen, 2, str(tmp_path), frozen, {"load_module_only": True}):
            assert_same(saved, found)


def test_frozen_parameters_that_were_left_out_stay_and_are_named(tmp_path: Path) -> None:
    saved = run_ranks(save_partly_frozen, 2, str(tmp_path), True)[0]
    torch.manual_seed(0)
    made = dict(OddNet().named_parameters())
    # DeepSpeed's own condition for such a tag.
    options = {"load_module_strict": False}
    found, messages = run_ranks(load_partly_frozen, 3, str(tmp_path), FROZEN, options)[0]
    assert any("does not hold 3 frozen parameters (embed.weight, ...)" in message for message in messages)
    for name, weight in found.items():
        assert torch.equal(weight, made[name] if name in FROZEN else saved[name]), name
